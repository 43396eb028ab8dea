"""Predictions of known scores, as files and in memory, for the tests of scoring."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from swim.evaluation.predictions import Expected, Header, clip_of, read_lines, write_header
from swim.evaluation.scores import PredictionFile


def header(
    ids: Sequence[str],
    *,
    name: str = "run",
    benchmark: str = "alignment-grid",
    tasks: Mapping[str, str] | None = None,
    target: str = "left",
    nouns: int = 0,
) -> Header:
    """A header that expects these ids, of task `direction` and target `left` unless told, with so many nouns each."""
    expected = tuple(Expected(id, clip_of(id), (tasks or {}).get(id, "direction"), target, nouns) for id in ids)
    return Header(name, benchmark, expected, {}, {})


def make_file(lines: Iterable[Mapping[str, Any]] | Path, ids: Sequence[str], **options: Any) -> PredictionFile:
    """The lines with the header that `options` describe."""
    return PredictionFile(header(ids, **options), read_lines(lines), lines if isinstance(lines, Path) else None)


def write_file(path: Path, lines: Iterable[Mapping[str, Any]], ids: Sequence[str], **options: Any) -> Path:
    """predictions.jsonl at `path` with its header."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    write_header(path, header(ids, **options))
    return path
