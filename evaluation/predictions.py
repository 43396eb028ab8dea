"""Predictions as written by a model run: one JSON line per (clip, conversation), read into arrays.

```
{"id": "KEY#2", "clip": "KEY", "task": str, "prompt": str, "target": str, "answer": str,
 "nouns": [{"text": str, "turn": int, "start": int, "end": int, "object_ids": [str],
            "frames": [[stored frame numbers of step 0], ...],  # T lists
            "map": [T][h][w],                                   # attention, layer and head mean
            "coverage": [T][h][w] in [0, 1]}]}                  # share of the cell under the mask; null per step:
                                                                # that step is not annotated
{"id": "KEY#3", "clip": "KEY", "error": "reason"}               # the model gave no prediction
```
The file is append-only and resumable, so a later line of the same id replaces the earlier one.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np


@dataclass(frozen=True, eq=False)
class Noun:
    """One noun of a conversation with its attention map [T, h, w] and, per step, the mask coverage [h, w] or None."""

    text: str
    turn: int
    start: int
    end: int
    object_ids: tuple[str, ...]
    frames: tuple[tuple[int, ...], ...]
    map: np.ndarray
    coverage: tuple[np.ndarray | None, ...]


@dataclass(frozen=True, eq=False)
class Prediction:
    """One line of predictions.jsonl; `error` is the reason when there is no usable prediction, else None."""

    id: str
    clip: str
    task: str = "unknown"
    prompt: str = ""
    target: str = ""
    answer: str = ""
    nouns: tuple[Noun, ...] = ()
    error: str | None = None


def clip_of(id: str) -> str:
    """Clip key of the id `KEY#conversation`."""
    return id.rsplit("#", 1)[0]


def read_predictions(source: Path | str | Iterable[Mapping[str, Any]]) -> dict[str, Prediction]:
    """Predictions by id, in the order of first appearance; raises ValueError on a malformed line, naming it."""
    predictions: dict[str, Prediction] = {}
    for where, line in _lines(source):
        try:
            prediction = _parse(line)
        except KeyError as error:
            raise ValueError(f"{where}: the prediction lacks the key {error}") from error
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        predictions[prediction.id] = prediction
    return predictions


def _lines(source: Path | str | Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if not isinstance(source, Path | str):
        yield from ((f"prediction {number}", line) for number, line in enumerate(source))
        return
    with open(source, encoding="utf-8") as file:
        for number, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield f"{source}:{number}", json.loads(text)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{source}:{number}: not a JSON line ({error}); a run killed while writing leaves "
                        "one such line: delete it and resume"
                    ) from error


def _parse(line: Mapping[str, Any]) -> Prediction:
    id, clip = line["id"], line["clip"]
    if clip_of(id) != clip:
        raise ValueError(f"id {id!r} does not belong to clip {clip!r}; ids are CLIP#conversation")
    error = line.get("error")
    if error is not None:
        return Prediction(id, clip, line.get("task", "unknown"), error=str(error))
    nouns = tuple(_parse_noun(noun) for noun in line["nouns"])
    prediction = Prediction(id, clip, line["task"], line["prompt"], line["target"], line["answer"], nouns)
    for noun in nouns:
        # A broken map is a failure of the model, to be scored as one; a wrong shape is a bug of the writer, and raised.
        if not (np.isfinite(noun.map).all() and (noun.map >= 0).all()):
            error = f"attention map of {noun.text!r} has values that are negative or not finite"
            return replace(prediction, answer="", nouns=(), error=error)
    return prediction


def _parse_noun(noun: Mapping[str, Any]) -> Noun:
    map_THW = np.asarray(noun["map"], dtype=np.float32)
    coverage_T = tuple(None if step is None else np.asarray(step, dtype=np.float32) for step in noun["coverage"])
    shape = map_THW.shape
    if len(shape) != 3 or not map_THW.size or not len(coverage_T) == len(noun["frames"]) == shape[0]:
        raise ValueError(
            f"noun {noun['text']!r}: map {shape}, {len(coverage_T)} coverage steps and "
            f"{len(noun['frames'])} frame lists; expected [T, h, w], T and T"
        )
    for step in coverage_T:
        if step is not None and (step.shape != shape[1:] or not ((step >= 0) & (step <= 1)).all()):
            raise ValueError(f"noun {noun['text']!r}: coverage of a step must be {shape[1:]} in [0, 1] or null")
    frames = tuple(tuple(step) for step in noun["frames"])
    object_ids = tuple(noun["object_ids"])
    return Noun(noun["text"], noun["turn"], noun["start"], noun["end"], object_ids, frames, map_THW, coverage_T)
