"""VideoRefer-Bench-D: four grades from 0 to 5 for a description, by a language model; protocol `videorefer-bench-d`.

A grade is the median over the judge's repeats. A description without a grade counts 0 on that axis, in
`value_scored_only` not at all: that is the published way, in which each axis has an n of its own. `average` is the mean
of the four axes. What both parsers make of the same replies is in `parsers`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median, stdev
from typing import Any

from swim.evaluation.judge import Pair, read_judged
from swim.evaluation.judge_profiles import AXES, HIGHEST, LOWEST, Scores, parse_official, parse_robust
from swim.evaluation.predictions import PredictionsError
from swim.evaluation.registry import Benchmark
from swim.evaluation.scores import Metric, PredictionFile, Settings, Unit, make_unit, summarise

PARSERS = {"official-text": parse_official, "robust": parse_robust}
SCORED = (*(Metric(axis) for axis in AXES), Metric("average"))
PROTOCOL = {"id": "videorefer-bench-d", "version": 1, "grades": [LOWEST, HIGHEST], "aggregation": "mean over ids"}


def pairs_of(file: PredictionFile) -> list[Pair]:
    """What is to be judged: every id with an answer, an empty one too."""
    name = file.header.name
    return [
        Pair(name, entry.id, line.target or entry.target, line.answer)
        for entry, line in file.predictions()
        if line.status == "scored"
    ]


def score(file: PredictionFile, settings: Settings) -> dict[str, Any]:
    """An arm from its answers and the judge's replies; PredictionsError if there are no replies to these answers."""
    path = settings.judge or Path("judge.jsonl")
    pairs = {pair.id: pair for pair in pairs_of(file)}
    # The last of each counts: what failed was asked again.
    judged = list(
        {
            (line["id"], line["repeat"]): line
            for line in read_judged(path, settings.judged_by)
            if line["arm"] == file.header.name and line["id"] in pairs and line["pair"] == pairs[line["id"]].digest
        }.values()
    )
    replies: dict[str, dict[int, Mapping[str, Any]]] = {}
    for line in judged:
        replies.setdefault(line["id"], {})[line["repeat"]] = line
    if lacking := [id for id in pairs if id not in replies]:
        raise PredictionsError(
            f"{path} has no reply about {len(lacking)} of {len(pairs)} answers of {file.header.name}, first "
            f"{lacking[0]!r}; give --judge-url and --judge-model"
        )
    about = judged[-1]["judge"] if judged else None
    parse = PARSERS[about["profile"]] if about else parse_robust
    units = []
    for entry, prediction in file.predictions():
        unit = make_unit(entry, prediction)
        if entry.id in replies:
            _grade(unit, [*replies[entry.id].values()], parse)
        units.append(unit)
    results = summarise(file, units, SCORED, settings)
    axes = [results[axis]["value_scored_only"] for axis in AXES]
    # As published: the mean of the axes' means, each over what was parsed on it.
    results["average"]["value_scored_only"] = sum(axes) / len(axes) if all(a is not None for a in axes) else None
    results["judge"] = (about or {}) | _about_replies(judged, units)
    results["parsers"] = {name: _by_parser(judged, parser) for name, parser in PARSERS.items()}
    return results


def _grade(unit: Unit, replies: Sequence[Mapping[str, Any]], parse: Any) -> None:
    """Fill in a unit's grades from the replies of all repeats; `unparsed` if there is none at all."""
    found: list[Scores] = [parse(line["reply"]) if line["reply"] is not None else {} for line in replies]
    grades = {axis: [scores[axis] for scores in found if axis in scores] for axis in AXES}
    values: dict[str, float | None] = {axis: median(of) if of else None for axis, of in grades.items()}
    unit["parsed"] = values.copy()
    unit["judge_replies"] = [line["reply"] if line["reply"] is not None else line["error"] for line in replies]
    spreads = [stdev(of) for of in grades.values() if len(of) > 1]
    unit["judge_sd"] = sum(spreads) / len(spreads) if spreads else None
    if not any(grades.values()):
        unit["status"], unit["reason"] = "unparsed", f"no grade in the judge's reply: {unit['judge_replies'][0]!r:.200}"
        return
    unit["values"] = values | {"average": sum(v or 0.0 for v in values.values()) / len(AXES)}


def _about_replies(judged: Sequence[Mapping[str, Any]], units: Sequence[Unit]) -> dict[str, Any]:
    usage = [line["usage"] for line in judged if isinstance(line["usage"], dict)]
    spreads = [unit["judge_sd"] for unit in units if unit.get("judge_sd") is not None]
    return {
        "replies": len(judged),
        "errors": sum(line["error"] is not None for line in judged),
        "repeats": max((line["repeat"] + 1 for line in judged), default=0),
        "sd_between_repeats": sum(spreads) / len(spreads) if spreads else None,
        **{
            # A server may say anything here.
            name: sum(entry[name] for entry in usage if isinstance(entry.get(name), int))
            for name in ("prompt_tokens", "completion_tokens")
        },
    }


def _by_parser(judged: Sequence[Mapping[str, Any]], parse: Any) -> dict[str, Any]:
    """What a parser reads in all replies: n and mean per axis, replies without any grade, grades out of range."""
    found = [parse(line["reply"]) if line["reply"] is not None else {} for line in judged]
    by_axis = {axis: [scores[axis] for scores in found if axis in scores] for axis in AXES}
    return {
        "axes": {axis: {"n": len(of), "mean": sum(of) / len(of) if of else None} for axis, of in by_axis.items()},
        "replies_without_grades": sum(not scores for scores in found),
        "out_of_range": sum(not LOWEST <= grade <= HIGHEST for of in by_axis.values() for grade in of),
    }


BENCHMARK = Benchmark(protocol=PROTOCOL, metrics=SCORED, headline=tuple(metric.name for metric in SCORED), score=score)
