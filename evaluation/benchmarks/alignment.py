"""Alignment of noun attention with masks, and exact-match answers: protocol `alignment-grid` of `evaluation.alignment`.

Alignment is averaged steps -> noun -> id -> clip -> mean over clips, accuracy over ids. An id without a usable
prediction counts as wrong and as `alignment.WORST`; so does a noun that the answer should have named and did not.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from swim.evaluation.alignment import (
    CENTRE_SIGMA,
    GAMEPOINT_PERCENT,
    KL_FLOOR,
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
from swim.evaluation.detail import BROKEN, LayerRow, layer_rows, score_layers
from swim.evaluation.pixels import PIXEL_METRICS, line_metrics
from swim.evaluation.pixels import PROTOCOL as PIXEL_PROTOCOL
from swim.evaluation.predictions import Expected, Noun, Prediction
from swim.evaluation.registry import Benchmark
from swim.evaluation.scores import (
    Metric,
    PredictionFile,
    Settings,
    Unit,
    estimate,
    estimate_values,
    make_unit,
    summarise,
)

BASELINES = ("uniform", "centre", "wrong_frame", "wrong_noun")
ACCURACY = Metric("accuracy")
SCORED = (ACCURACY, *(Metric(name, worst=WORST[name], per_clip=True) for name in METRICS))
PROTOCOL = {
    "id": "alignment-grid",
    "version": 2,
    "aggregation": "steps -> noun -> id -> clip -> mean over clips",
    "gamepoint_percent": list(GAMEPOINT_PERCENT),
    "precision_threshold": PRECISION_THRESHOLD,
    "kl_floor": KL_FLOOR,
    "centre_sigma": CENTRE_SIGMA,
    "answer": "free generation, normalised exact match",
    "pixels": PIXEL_PROTOCOL,
}


def score(file: PredictionFile, settings: Settings) -> dict[str, Any]:
    """An arm: an estimate per metric, by-task accuracy, baselines, layers and pixels where kept, coverage, units."""
    pairs = file.predictions()
    clip_nouns: dict[str, list[Noun]] = {}
    for _, line in pairs:
        clip_nouns.setdefault(line.clip, []).extend(line.nouns)
    units = [_unit(entry, line, clip_nouns[line.clip]) for entry, line in pairs]
    scored = [unit for unit in units if unit["status"] == "scored"]
    results = summarise(file, units, SCORED, settings)
    for name in PREVALENCES:
        results[name] = estimate_values(_rows_by_clip(scored, "prevalences", name), settings)
    results["accuracy_by_task"] = _by_task(units, settings)
    results["coverage"] |= _coverage(units)
    results["baselines"] = {}
    for baseline in BASELINES:
        values = {name: _rows_by_clip(scored, baseline, name) for name in METRICS}
        results["baselines"][baseline] = {
            "metrics": {name: estimate_values(values[name], settings) for name in METRICS},
            "clips": len(values["ap"]),
            "excluded_clips": results["coverage"]["annotated_clips"] - len(values["ap"]),
        }
    kept = _read_details([line for _, line in pairs])
    results["coverage"]["broken_details"] = kept.broken
    if (layers := score_layers(kept.layers, settings)) is not None:
        results["by_layer"] = layers
    if any(kept.pixels):
        # A line without pixels counts worst where others have them; `value_scored_only` is the release's mean.
        on_pixels = [
            unit | {"status": unit["status"] if row or not unit["prevalences"] else "failed", "values": row or {}}
            for unit, row in zip(units, kept.pixels)
        ]
        results["pixels"] = {metric.name: estimate(on_pixels, metric, settings) for metric in PIXEL_METRICS}
    return results


@dataclass
class _Details:
    layers: list[tuple[str, list[LayerRow]]]
    pixels: list[dict[str, float] | None]
    broken: list[str]


def _read_details(lines: Sequence[Prediction]) -> _Details:
    """What is kept beside the maps; a line whose details cannot be read has none, and is listed."""
    found = _Details([], [], [])
    for line in lines:
        try:
            layers, pixels = layer_rows(line), line_metrics(line)
        except BROKEN as error:
            found.broken.append(f"{line.id}: {type(error).__name__}: {error}")
            layers, pixels = [], None
        found.layers.append((line.clip, layers))
        found.pixels.append(pixels)
    return found


def _unit(expected: Expected, line: Prediction, clip_nouns: Sequence[Noun]) -> Unit:
    nouns = [_noun(noun, clip_nouns) for noun in line.nouns]
    # Else a line could raise its mean by leaving out what it is bad at.
    lacking = max(expected.nouns - len(nouns) - len(line.unsaid), 0) if line.status == "scored" else 0
    unit = make_unit(expected, line, nouns=nouns, unsaid=list(line.unsaid), lacking_nouns=lacking)
    correct = is_correct(line.answer, unit["target"])
    unit["values"] = {"accuracy": float(correct)} if line.status == "scored" else {}
    rows = [noun["metrics"] for noun in nouns if noun["metrics"]] + [dict(WORST)] * (len(line.unsaid) + lacking)
    unit["values"] |= mean_metrics(rows, METRICS) or {}
    unit["prevalences"] = mean_metrics([noun["metrics"] for noun in nouns if noun["metrics"]], PREVALENCES)
    for baseline in BASELINES:
        found = [noun["baselines"][baseline] for noun in nouns if noun["baselines"][baseline]]
        unit[baseline] = mean_metrics(found, METRICS)
    return unit


def _noun(noun: Noun, clip_nouns: Sequence[Noun]) -> dict[str, Any]:
    return {
        "text": noun.text,
        "turn": noun.turn,
        "start": noun.start,
        "end": noun.end,
        "object_ids": list(noun.object_ids),
        "steps": count_steps(noun.coverage),
        "metrics": noun_metrics(noun.map, noun.coverage),
        "baselines": baseline_metrics(noun, clip_nouns),
    }


def _by_task(units: Sequence[Unit], settings: Settings) -> dict[str, Any]:
    found = {}
    for task in sorted({unit["task"] for unit in units}):
        of_task = [unit for unit in units if unit["task"] == task]
        chance = chance_level(unit["target"] for unit in of_task if unit["target"])
        found[task] = estimate(of_task, ACCURACY, settings) | {"num": len(of_task), "chance": chance}
    return found


def _coverage(units: Sequence[Unit]) -> dict[str, Any]:
    nouns = [noun for unit in units for noun in unit["nouns"]]
    return {
        "annotated_clips": len({unit["clip"] for unit in units if unit["prevalences"]}),
        "nouns": len(nouns),
        "unsaid_nouns": sum(len(unit["unsaid"]) for unit in units),
        "lacking_nouns": sum(unit["lacking_nouns"] for unit in units),
        "steps": {kind: sum(noun["steps"][kind] for noun in nouns) for kind in ("scored", "absent", "unannotated")},
    }


def _rows_by_clip(units: Sequence[Unit], key: str, name: str) -> dict[str, list[float]]:
    """One mean per clip of a metric in the rows `key` of the units that have it."""
    values: dict[str, list[float]] = {}
    for unit in units:
        if unit[key] is not None:
            values.setdefault(unit["clip"], []).append(unit[key][name])
    return {clip: [sum(of_clip) / len(of_clip)] for clip, of_clip in values.items()}


BENCHMARK = Benchmark(
    protocol=PROTOCOL,
    metrics=SCORED,
    headline=("accuracy", "pointing", "mass", "ap", "ap_lift", "auc", "nss", "prevalence_px"),
    score=score,
)
