"""predictions.jsonl -> scores: alignment, accuracy, baselines, coverage, and the comparison of two runs.

Alignment is averaged steps -> noun -> id -> clip -> mean over clips, accuracy over ids; intervals are drawn by clip.
An id without a usable prediction counts as wrong and as `alignment.WORST`; `value_scored_only` leaves such ids out.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swim.evaluation.alignment import (
    CENTRE_SIGMA,
    GAMEPOINT_PERCENT,
    METRICS,
    PRECISION_THRESHOLD,
    PREVALENCES,
    WORST,
    baseline_metrics,
    count_steps,
    mean_metrics,
    noun_metrics,
)
from swim.evaluation.answers import chance_level, is_correct
from swim.evaluation.predictions import Noun, Prediction, clip_of, read_predictions
from swim.evaluation.statistics import Difference, cluster_bootstrap, paired_difference

BASELINES = ("uniform", "centre", "wrong_noun")
PROTOCOL = {
    "id": "alignment-grid",
    "version": 1,
    "aggregation": "steps -> noun -> id -> clip -> mean over clips",
    "gamepoint_percent": list(GAMEPOINT_PERCENT),
    "precision_threshold": PRECISION_THRESHOLD,
    "centre_sigma": CENTRE_SIGMA,
    "failed_counts_as": dict(WORST) | {"accuracy": 0.0},
    "answer": "free generation, normalised exact match",
    "interval": "95 % percentile bootstrap clustered by clip",
}


def score(
    predictions: Path | str | Iterable[Mapping[str, Any]],
    *,
    expected_ids: Sequence[str],
    seed: int = 0,
    resamples: int = 2000,
) -> dict[str, Any]:
    """Scores of one run: an estimate per metric, by-task accuracy, baselines, coverage, failures and per-id `units`.

    Raises ValueError for a malformed prediction, a repeated expected id and a prediction that was not expected.
    """
    lines = read_predictions(predictions)
    if len(set(expected_ids)) != len(expected_ids):
        raise ValueError(f"expected_ids repeats {Counter(expected_ids).most_common(1)[0][0]!r}")
    if unexpected := sorted(set(lines) - set(expected_ids)):
        raise ValueError(
            f"{len(unexpected)} predictions were not expected, first {unexpected[0]!r}: the predictions "
            "belong to another set of clips or an older file is being appended to"
        )
    clip_nouns: dict[str, list[Noun]] = {}
    for line in lines.values():
        clip_nouns.setdefault(line.clip, []).extend(line.nouns)
    units = [_unit(id, lines.get(id), clip_nouns.get(clip_of(id), [])) for id in expected_ids]
    scored = [unit for unit in units if unit["status"] == "scored"]
    options = {"seed": seed, "resamples": resamples}

    results: dict[str, Any] = {}
    for metric in ("accuracy", *METRICS):
        scored_only = cluster_bootstrap(_by_clip(scored, metric), **options)["value"]
        results[metric] = cluster_bootstrap(_by_clip(units, metric), **options) | {"value_scored_only": scored_only}
    for metric in PREVALENCES:
        results[metric] = cluster_bootstrap(_by_clip(scored, metric), **options)
    results["accuracy_by_task"] = {}
    for task in sorted({unit["task"] for unit in units}):
        of_task = [unit for unit in units if unit["task"] == task]
        chance = chance_level(unit["target"] for unit in of_task if unit["target"])
        estimate = cluster_bootstrap(_by_clip(of_task, "accuracy"), **options)
        results["accuracy_by_task"][task] = estimate | {"num": len(of_task), "chance": chance}
    results["coverage"] = _coverage(units)
    results["failures"] = [{"id": unit["id"], "reason": unit["reason"]} for unit in units if unit["status"] != "scored"]
    results["baselines"] = {}
    for baseline in BASELINES:
        values = {metric: _by_clip(scored, metric, baseline) for metric in METRICS}
        results["baselines"][baseline] = {
            "metrics": {metric: cluster_bootstrap(values[metric], **options) for metric in METRICS},
            "clips": len(values["ap"]),
            "excluded_clips": results["coverage"]["annotated_clips"] - len(values["ap"]),
        }
    results["units"] = units
    return results


def compare(
    base: Mapping[str, Any], other: Mapping[str, Any], *, seed: int = 0, resamples: int = 2000
) -> dict[str, Difference]:
    """Other minus base for each metric, paired by clip, from two results of `score` over the same expected ids."""
    if {unit["id"] for unit in base["units"]} != {unit["id"] for unit in other["units"]}:
        raise ValueError("the two runs were scored over different expected ids; a paired difference needs the same")
    return {
        metric: paired_difference(
            _by_clip(other["units"], metric), _by_clip(base["units"], metric), seed=seed, resamples=resamples
        )
        for metric in ("accuracy", *METRICS)
    }


def write_results(
    path: Path,
    arms: Mapping[str, Mapping[str, Any]],
    *,
    provenance: Mapping[str, Any],
    protocol: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Writes results.json at `path` and scores.jsonl (one line per arm and id) beside it; returns the former's content.

    `arms` holds one or two results of `score`, the baseline first, to which the caller adds figures such as `seconds`
    and `peak_memory_mib`; `protocol` adds what the scorer cannot know (softmax scope, layers, decoding).
    """
    if not 1 <= len(arms) <= 2:
        raise ValueError(f"one or two arms can be reported, not {len(arms)}")
    if reserved := {"difference", "protocol", "provenance"} & set(arms):
        raise ValueError(f"an arm cannot be named {reserved.pop()!r}: results.json uses that key itself")
    results: dict[str, Any] = {name: {k: v for k, v in arm.items() if k != "units"} for name, arm in arms.items()}
    if len(arms) == 2:
        results["difference"] = compare(*arms.values(), seed=seed)
    results["protocol"] = PROTOCOL | dict(protocol or {})
    results["provenance"] = dict(provenance)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with path.with_name("scores.jsonl").open("w", encoding="utf-8") as file:
        for name, arm in arms.items():
            for unit in arm["units"]:
                file.write(json.dumps({"arm": name} | unit, ensure_ascii=False, allow_nan=False) + "\n")
    return results


def _unit(id: str, line: Prediction | None, clip_nouns: Sequence[Noun]) -> dict[str, Any]:
    """Scores of one expected id; `metrics` is None when no step can be scored."""
    if line is None:
        line = Prediction(id, clip_of(id), error="no prediction")
        status = "missing"
    else:
        status = "scored" if line.error is None else "failed"
    nouns: list[dict[str, Any]] = [
        {
            "text": noun.text,
            "turn": noun.turn,
            "start": noun.start,
            "end": noun.end,
            "object_ids": list(noun.object_ids),
            "steps": count_steps(noun.coverage),
            "metrics": noun_metrics(noun.map, noun.coverage),
            "baselines": baseline_metrics(noun, clip_nouns),
        }
        for noun in line.nouns
    ]
    rows = {baseline: [noun["baselines"][baseline] for noun in nouns] for baseline in BASELINES}
    return {
        "id": id,
        "clip": line.clip,
        "task": line.task,
        "status": status,
        "reason": line.error,
        "target": line.target,
        "answer": line.answer,
        "correct": is_correct(line.answer, line.target),
        "metrics": mean_metrics([noun["metrics"] for noun in nouns if noun["metrics"]]),
        "baselines": {baseline: mean_metrics([row for row in rows[baseline] if row]) for baseline in BASELINES},
        "nouns": nouns,
    }


def _coverage(units: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    status = Counter(unit["status"] for unit in units)
    nouns = [noun for unit in units for noun in unit["nouns"]]
    return {
        "expected": len(units),
        "predicted": len(units) - status["missing"],
        "scored": status["scored"],
        "failed": status["failed"],
        "missing": status["missing"],
        "clips": len({unit["clip"] for unit in units}),
        "annotated_clips": len({unit["clip"] for unit in units if unit["metrics"]}),
        "nouns": len(nouns),
        "steps": {kind: sum(noun["steps"][kind] for noun in nouns) for kind in ("scored", "absent", "unannotated")},
    }


def _by_clip(units: Sequence[Mapping[str, Any]], metric: str, baseline: str | None = None) -> dict[str, list[float]]:
    """What the bootstrap draws: every id's correctness, or one mean per clip of an alignment metric."""
    values: dict[str, list[float]] = {}
    for unit in units:
        if metric == "accuracy":
            value = float(unit["correct"])
        elif unit["status"] != "scored":
            value = WORST[metric]
        else:
            row = unit["baselines"][baseline] if baseline else unit["metrics"]
            if row is None:
                continue
            value = row[metric]
        values.setdefault(unit["clip"], []).append(value)
    return values if metric == "accuracy" else {clip: [sum(v) / len(v)] for clip, v in values.items()}
