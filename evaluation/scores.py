"""Units of scored ids -> means with intervals, coverage, differences of two runs, and the files they are written to.

A unit is what a benchmark says about one expected id: `id`, `clip`, `task`, `status`, `reason`, `target`, `answer`,
`parsed` (what scoring read in the answer) and `values`, a number per metric. A metric that is None in a scored unit was
not to be had (unparsed) and counts worst; one that is not there does not apply and is left out. A unit that is not
scored counts worst in every metric; `value_scored_only` is the mean without what counted worst.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim.evaluation.predictions import (
    Expected,
    Header,
    Lines,
    Prediction,
    PredictionsError,
    count_statuses,
    parse_prediction,
)
from swim.evaluation.statistics import Difference, Estimate, cluster_bootstrap, paired_difference

Unit = dict[str, Any]
INTERVAL = "95 % percentile bootstrap clustered by clip"
RESERVED = {"difference", "protocol", "provenance", "variants"}


@dataclass(frozen=True)
class Metric:
    """A number per unit: what a failure counts, and whether a clip's units are averaged first."""

    name: str
    worst: float = 0.0
    per_clip: bool = False


@dataclass(frozen=True)
class Settings:
    """How intervals are drawn, and where the raw replies of a judge lie."""

    seed: int = 0
    resamples: int = 2000
    judge: Path | None = None
    judged_by: Mapping[str, Any] | None = None  # whose replies count; default: those of the last one in the file


@dataclass(frozen=True)
class PredictionFile:
    """Predictions with what they should be: lines by id, and the header beside them."""

    header: Header
    lines: Lines
    path: Path | None = None

    def predictions(self) -> list[tuple[Expected, Prediction]]:
        """A prediction for every expected id, in order; PredictionsError if there are lines for other ids."""
        expected = {entry.id for entry in self.header.expected}
        if unexpected := sorted(set(self.lines.by_id) - expected):
            raise PredictionsError(
                f"{len(unexpected)} predictions were not expected, first {unexpected[0]!r}: the predictions "
                "belong to another set of clips or an older file is being appended to"
            )
        return [(entry, self._prediction(entry)) for entry in self.header.expected]

    def _prediction(self, entry: Expected) -> Prediction:
        line = self.lines.by_id.get(entry.id)
        if line is not None:
            found = parse_prediction(line)
            if found.target and entry.target and found.target != entry.target:
                problem = (
                    f"its target {found.target!r:.80} is not the expected one, {entry.target!r:.80}: of other data"
                )
                return Prediction(entry.id, entry.clip, entry.task, error=problem, status="unparsed")
            return found
        return Prediction(entry.id, entry.clip, entry.task, error="no prediction", status="missing")


def make_unit(expected: Expected, line: Prediction, **more: Any) -> Unit:
    """The unit of an id, without values; what the line cannot say comes from what was expected."""
    return {
        "id": expected.id,
        "clip": expected.clip,
        "task": line.task if line.task != "unknown" else expected.task,
        "status": line.status,
        "reason": line.error,
        "prompt": line.prompt,
        "target": line.target or expected.target,
        "answer": line.answer,
        "parsed": line.answer,
        "values": {},
        **more,
    }


def values_by_clip(units: Iterable[Unit], metric: Metric, *, scored_only: bool = False) -> dict[str, list[float]]:
    """What the bootstrap draws: a value per unit, or one mean per clip."""
    values: dict[str, list[float]] = {}
    for unit in units:
        scored = unit["status"] == "scored"
        if scored and metric.name not in unit["values"]:
            continue
        value = unit["values"][metric.name] if scored else None
        if value is None and scored_only:
            continue
        values.setdefault(unit["clip"], []).append(metric.worst if value is None else value)
    return {clip: [sum(v) / len(v)] for clip, v in values.items()} if metric.per_clip else values


def estimate(units: Sequence[Unit], metric: Metric, settings: Settings) -> dict[str, Any]:
    """Mean over the units with its interval, the mean without what counted worst, and how many there are of both."""
    options = {"seed": settings.seed, "resamples": settings.resamples}
    every, only = values_by_clip(units, metric), values_by_clip(units, metric, scored_only=True)
    found = dict(cluster_bootstrap(every, **options))
    return found | {
        "value_scored_only": mean(only),
        "num": sum(map(len, every.values())),
        "num_scored": sum(map(len, only.values())),
    }


def mean(values: Mapping[str, Sequence[float]]) -> float | None:
    """Mean over all values; None without any."""
    flat = [value for of_clip in values.values() for value in of_clip]
    return sum(flat) / len(flat) if flat else None


def estimate_values(values: Mapping[str, Sequence[float]], settings: Settings) -> Estimate:
    """Mean with its interval of values by clip."""
    return cluster_bootstrap(values, seed=settings.seed, resamples=settings.resamples)


def summarise(file: PredictionFile, units: Sequence[Unit], metrics: Sequence[Metric], s: Settings) -> dict[str, Any]:
    """An estimate per metric, `coverage`, `failures` and the `units`."""
    results: dict[str, Any] = {metric.name: estimate(units, metric, s) for metric in metrics}
    results["coverage"] = {
        **count_statuses([unit["status"] for unit in units]),
        "clips": len({unit["clip"] for unit in units}),
        "duplicate_lines": file.lines.duplicates,
        "broken_lines": list(file.lines.broken),
    }
    results["failures"] = [{"id": unit["id"], "reason": unit["reason"]} for unit in units if unit["status"] != "scored"]
    results["units"] = list(units)
    return results


def compare(
    base: Mapping[str, Any], other: Mapping[str, Any], metrics: Sequence[Metric], settings: Settings | None = None
) -> dict[str, Difference]:
    """Other minus base for each metric, paired by clip, from two scored arms over the same expected ids."""
    s = settings or Settings()
    if {unit["id"] for unit in base["units"]} != {unit["id"] for unit in other["units"]}:
        raise PredictionsError(
            "the two runs were scored over different expected ids; a paired difference needs the same"
        )
    return {
        metric.name: paired_difference(
            values_by_clip(other["units"], metric),
            values_by_clip(base["units"], metric),
            seed=s.seed,
            resamples=s.resamples,
        )
        for metric in metrics
    }


def compare_variant(
    arm: Mapping[str, Any], variant: Mapping[str, Any], metrics: Sequence[Metric], settings: Settings
) -> dict[str, Any]:
    """What other prompts for the same ids change: values, paired difference, share of ids with the same answer.

    `consistency` counts an id that is not scored in both as changed.
    """
    parsed = {unit["id"]: unit.get("choice", unit["parsed"]) for unit in arm["units"] if unit["status"] == "scored"}
    difference = compare(arm, variant, metrics, settings)
    for unit in variant["units"]:
        said = unit.get("choice", unit["parsed"]) if unit["status"] == "scored" else None
        same = said is not None and parsed.get(unit["id"]) == said
        unit["values"]["consistency"] = float(same)
    consistency = Metric("consistency")
    return {
        "metrics": {metric.name: variant[metric.name] for metric in metrics},
        "difference": difference,
        "consistency": estimate(variant["units"], consistency, settings),
        "coverage": variant["coverage"],
    }


def write_results(
    path: Path,
    arms: Mapping[str, Mapping[str, Any]],
    metrics: Sequence[Metric],
    *,
    protocol: Mapping[str, Any],
    provenance: Mapping[str, Any],
    settings: Settings | None = None,
) -> dict[str, Any]:
    """Writes results.json at `path` and scores.jsonl (one line per arm and id) beside it; returns the former's content.

    `arms` holds one or two scored arms, the baseline first, to which the caller adds figures such as `seconds` and
    `peak_memory_mib`.
    """
    s = settings or Settings()
    if not 1 <= len(arms) <= 2:
        raise ValueError(f"one or two arms can be reported, not {len(arms)}")
    if reserved := RESERVED & set(arms):
        raise ValueError(f"an arm cannot be named {reserved.pop()!r}: results.json uses that key itself")
    results: dict[str, Any] = {name: {k: v for k, v in arm.items() if k != "units"} for name, arm in arms.items()}
    if len(arms) == 2:
        base, other = arms.values()
        results["difference"] = compare(base, other, metrics, s)
    results["protocol"] = {
        **protocol,
        "metrics": [metric.name for metric in metrics],
        "failed_counts_as": {metric.name: metric.worst for metric in metrics},
        "interval": INTERVAL,
        "bootstrap": {"seed": s.seed, "resamples": s.resamples},
    }
    results["provenance"] = dict(provenance)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    with path.with_name("scores.jsonl").open("w", encoding="utf-8") as file:
        for name, arm in arms.items():
            for number, unit in enumerate(arm["units"]):
                file.write(json.dumps(dump_line(name, number, unit), ensure_ascii=False, allow_nan=False) + "\n")
    return results


def dump_line(arm: str, number: int, unit: Mapping[str, Any]) -> dict[str, Any]:
    """A line of scores.jsonl; `doc_id`, `target`, `resps`, `filtered_resps`, `doc_hash` and metrics as lmms-eval has
    them."""
    doc = json.dumps([unit["clip"], unit["prompt"], unit["target"]], ensure_ascii=False)
    rest = {k: v for k, v in unit.items() if k not in ("answer", "parsed", "values", "prompt", "target")}
    return {
        "arm": arm,
        "doc_id": number,
        "doc_hash": hashlib.sha256(doc.encode()).hexdigest(),
        "target": unit["target"],
        "resps": [[unit["answer"]]],
        "filtered_resps": [unit["parsed"]],
        **unit["values"],
        **rest,
    }
