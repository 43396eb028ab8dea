"""Predictions as written by a model run: one JSON line per (clip, conversation), read into arrays.

```
{"id": "KEY#2", "clip": "KEY", "task": str, "prompt": str, "target": str, "answer": str,
 "nouns": [{"text": str, "turn": int, "start": int, "end": int, "object_ids": [str],
            "frames": [[stored frame numbers of step 0], ...],  # T lists
            "map": [T][h][w],                                   # attention, layer and head mean
            "coverage": [T][h][w] in [0, 1],                    # share of the cell under the mask; null per step:
                                                                # that step is not annotated
            "detail": {...}}],                                  # optional, see detail.py
 "unsaid": [{"text": str, "object_ids": [str]}]}                # optional: nouns that the answer should have, and lacks
{"id": "KEY#3", "clip": "KEY", "error": "reason"}               # the model gave no prediction
```
The file is append-only and resumable, so a later line of the same id replaces the earlier one. What should be in it
lies beside it (`Header`), so that scoring needs neither data nor model.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

Status = Literal["scored", "failed", "unparsed", "missing"]
HEADER_VERSION = 1


class PredictionsError(ValueError):
    """Predictions, or what lies beside them, cannot be scored as they are; the message says what to do."""


@dataclass(frozen=True)
class Expected:
    """An id that is to be predicted, and what is known about it before: `nouns` that should have a map among it."""

    id: str
    clip: str
    task: str = "unknown"
    target: str = ""
    nouns: int = 0


@dataclass(frozen=True)
class Header:
    """What lies beside the lines: a name, the benchmark, the expected ids, how they were predicted and from what."""

    name: str
    benchmark: str
    expected: tuple[Expected, ...]
    protocol: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


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
    detail: Mapping[str, Any] | None = None


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
    unsaid: tuple[str, ...] = ()
    error: str | None = None
    status: Status = "scored"


@dataclass(frozen=True)
class Lines:
    """Lines of a file by id, the last of each; how many were replaced; where and why others could not be read."""

    by_id: Mapping[str, Mapping[str, Any]]
    duplicates: int = 0
    broken: tuple[str, ...] = ()


def clip_of(id: str) -> str:
    """Clip key of the id `KEY#conversation`."""
    return id.rsplit("#", 1)[0]


def header_path(predictions: Path) -> Path:
    """Where the header of a predictions file lies: NAME.meta.json beside NAME.jsonl."""
    return predictions.with_suffix(".meta.json")


def write_header(predictions: Path, header: Header) -> None:
    """Write the header of a predictions file."""
    text = json.dumps({"version": HEADER_VERSION, **asdict(header)}, indent=1, ensure_ascii=False)
    header_path(predictions).write_text(text + "\n", encoding="utf-8")


def read_header(predictions: Path, path: Path | None = None) -> Header:
    """The header of a predictions file, from `path` if it lies elsewhere; PredictionsError if there is no good one."""
    path = path or header_path(predictions)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if found["version"] != HEADER_VERSION:
            raise PredictionsError(f"{path}: version {found['version']}, this program reads {HEADER_VERSION}")
        expected = tuple(Expected(**entry) for entry in found["expected"])
        if len({entry.id for entry in expected}) < len(expected):
            raise PredictionsError(f"{path}: an expected id is listed twice; list each once")
        header = Header(found["name"], found["benchmark"], expected, found["protocol"], found["provenance"])
        texts = [header.name, header.benchmark]
        texts += [text for entry in expected for text in (entry.id, entry.clip, entry.task, entry.target)]
        if not all(isinstance(text, str) for text in texts) or not header.name:
            raise TypeError("name, benchmark, and texts in `expected` must be strings, the name not empty")
        if not all(isinstance(entry.nouns, int) and entry.nouns >= 0 for entry in expected):
            raise TypeError("`nouns` in `expected` must be numbers from 0")
        if not isinstance(header.protocol, dict) or not isinstance(header.provenance, dict):
            raise TypeError("protocol and provenance must be objects")
        return header
    except FileNotFoundError:
        raise PredictionsError(
            f"{path} is missing: it says which ids {predictions} should hold. `swim evaluate predict` writes it; name "
            "another file with --expected"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise PredictionsError(f"{path}: not the header of predictions ({type(error).__name__}: {error})") from None


def read_lines(source: Path | str | Iterable[Mapping[str, Any]]) -> Lines:
    """Lines by id in the order of first appearance; what is no JSON object with an id is listed as broken."""
    by_id: dict[str, Mapping[str, Any]] = {}
    duplicates, broken = 0, []
    for where, line in _objects(source):
        if not isinstance(line, Mapping):
            broken.append(f"{where}: {line}")
        elif not isinstance(line.get("id"), str):
            broken.append(f"{where}: no id")
        else:
            duplicates += line["id"] in by_id
            by_id[line["id"]] = line
    return Lines(by_id, duplicates, tuple(broken))


def read_predictions(source: Path | str | Iterable[Mapping[str, Any]]) -> dict[str, Prediction]:
    """Predictions by id, in the order of first appearance; a line that is none has its reason in `error`."""
    return {id: parse_prediction(line) for id, line in read_lines(source).by_id.items()}


def parse_prediction(line: Mapping[str, Any]) -> Prediction:
    """The prediction in a line that has an id; status `failed` if the model gave none, `unparsed` if it is not one."""
    id = line["id"]
    try:
        return _parse(id, line)
    except KeyError as error:
        problem = f"the prediction lacks the key {error}"
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        problem = str(error)
    return Prediction(id, clip_of(id), error=problem, status="unparsed")


def _objects(source: Path | str | Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any] | str]]:
    """Objects with where they stand; in place of what is no JSON object, why."""
    if not isinstance(source, Path | str):
        yield from ((f"prediction {number}", line) for number, line in enumerate(source))
        return
    # As bytes: a line cut off within a character is no text at all.
    with open(source, "rb") as file:
        for number, data in enumerate(file, start=1):
            if not data.strip():
                continue
            try:
                found = json.loads(data.decode())
                if b"\\u" in data:  # half a character, which could not be written again
                    json.dumps(found, ensure_ascii=False).encode()
            except (ValueError, RecursionError) as error:
                found = f"not a JSON line ({error})" + ("" if data.endswith(b"\n") else "; cut off in mid-write")
            yield f"line {number}", found if isinstance(found, dict | str) else "not a JSON object"


def _parse(id: str, line: Mapping[str, Any]) -> Prediction:
    clip = line["clip"]
    if clip_of(id) != clip:
        raise ValueError(f"id {id!r} does not belong to clip {clip!r}; ids are CLIP#conversation")
    error = line.get("error")
    if error is not None:
        task = line.get("task")
        return Prediction(id, clip, task if isinstance(task, str) else "unknown", error=str(error), status="failed")
    texts = [line[name] for name in ("task", "prompt", "target", "answer")]
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("task, prompt, target and answer must be strings")
    nouns = tuple(_parse_noun(noun) for noun in line["nouns"])
    unsaid = tuple(str(noun["text"]) for noun in line.get("unsaid", ()))
    task, prompt, target, answer = texts
    prediction = Prediction(id, clip, task, prompt, target, answer, nouns, unsaid)
    for noun in nouns:
        # A broken map is a failure of the model, to be scored as one.
        if not (np.isfinite(noun.map).all() and (noun.map >= 0).all()):
            error = f"attention map of {noun.text!r} has values that are negative or not finite"
            return replace(prediction, answer="", nouns=(), error=error, status="failed")
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
    return Noun(
        noun["text"],
        noun["turn"],
        noun["start"],
        noun["end"],
        tuple(str(object_id) for object_id in noun["object_ids"]),
        frames,
        map_THW,
        coverage_T,
        noun.get("detail"),
    )


def count_statuses(statuses: Sequence[Status]) -> dict[str, int]:
    """Numbers of ids: expected, predicted (a line is there), scored, failed, unparsed, missing."""
    counts = {status: statuses.count(status) for status in ("scored", "failed", "unparsed", "missing")}
    return {"expected": len(statuses), "predicted": len(statuses) - counts["missing"], **counts}
