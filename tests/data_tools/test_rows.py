"""Rows of large files come one by one with their exact place in bytes, and files that are none are refused."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from swim.data_tools import rows
from swim.data_tools.records import RecordError
from swim.data_tools.rows import Row, stream_rows

VALUES: list[Any] = [
    {"a": 'quote " and \\ and ] } , ü 漢字 😀', "b": [[], {}, [1, {"c": "]"}]]},
    {"\x7f": "\u2028", "empty": ""},
    12,
    -3.5e4,
    "text",
    None,
    [],
    {"long": "ü" * 300},
]


def _check(path: Path, values: list[Any]) -> None:
    found = list(stream_rows(path))
    assert [value for _, _, value in found] == values
    data = path.read_bytes()
    for start, text, value in found:
        assert data[start : start + len(text)] == text
        assert json.loads(text) == value


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 64, 1 << 20])
def test_places_are_exact_wherever_the_window_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(rows, "CHUNK", chunk)
    for options in ({}, {"ensure_ascii": False}, {"indent": 2, "ensure_ascii": False}):
        for mark in ("", "\ufeff"):
            (tmp_path / "a.json").write_text(f"{mark} \n{json.dumps(VALUES, **options)}\r\n ")
            _check(tmp_path / "a.json", VALUES)
    (tmp_path / "a.json").write_text("[ ]")
    _check(tmp_path / "a.json", [])


def test_random_arrays_agree_with_the_standard_parser(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw = random.Random(0)

    def value(depth: int) -> Any:
        kind = draw.randrange(6 if depth else 4)
        text = "".join(draw.choice('ab"\\[]{},:\n é漢😀') for _ in range(draw.randrange(12)))
        if kind == 4:
            return [value(depth - 1) for _ in range(draw.randrange(4))]
        if kind == 5:
            return {str(i): value(depth - 1) for i in range(draw.randrange(4))}
        return [text, draw.randrange(10**9), draw.random(), None][kind]

    for _ in range(50):
        monkeypatch.setattr(rows, "CHUNK", draw.randrange(1, 40))
        values = [value(3) for _ in range(draw.randrange(8))]
        (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=draw.random() < 0.5))
        _check(tmp_path / "a.json", values)


def test_lines_are_rows_and_a_bad_line_is_none(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"a": "ü"}\n\n  \nnot json\n{"b": 1}')
    found = list(stream_rows(tmp_path / "a.jsonl"))
    assert [(start, value) for start, _, value in found] == [(0, {"a": "ü"}), (16, None), (25, {"b": 1})]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", r"not JSON \(at or after byte 0: Expecting value"),
        (b"{", r"not JSON \(at or after byte 0: Expecting property name"),
        (b"{}", r"holds dict; give one JSON array of records"),
        (b'[{"a": 1}, {"b": ]', r"at or after byte 11: Expecting value"),
        (b'[{"a": 1} {"b": 2}]', r"byte 10: '\{' where ',' or '\]' is due"),
        (b'[{"a": 1}', r"byte 9: '' where"),
        (b'[{"a": 1}] x', r"byte 11: something follows the array"),
        (b"[1,]", r"byte 3: Expecting value"),
        (b'[{"a": "\xff"}]', r"not UTF-8"),
        (b"[" + b"[" * 200_000, r"nested too deeply"),
        (b'["' + b"a" * 5000, r"at or after byte 1: .*at most 1000 bytes"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, message: str) -> None:
    monkeypatch.setattr(rows, "MAX_JSON_BYTES", 1000)
    (tmp_path / "x.json").write_bytes(text)
    with pytest.raises(RecordError, match=rf"x.json: .*{message}"):
        list(stream_rows(tmp_path / "x.json"))


def test_a_line_too_long_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "MAX_JSON_BYTES", 1000)
    (tmp_path / "x.jsonl").write_bytes(b'{"a": 1}\n"' + b"a" * 5000)
    with pytest.raises(RecordError, match=r"a line of more than 1000 bytes begins at byte 9"):
        list(stream_rows(tmp_path / "x.jsonl"))


def test_rows_name_themselves_and_their_fields() -> None:
    assert Row(Path("f"), 3, {"id": "x"}).name == "x"
    assert Row(Path("f"), 3, {}).name == "record_3"
    assert Row(Path("f"), 3, None).name == "record_3"
    with pytest.raises(RecordError, match=r"record 'x', videos: 'a' is not a list; correct it"):
        Row(Path("f"), 3, {"id": "x", "videos": "a"}).get("videos", list)
    with pytest.raises(RecordError, match=r"record 'record_3', record: it is not JSON"):
        Row(Path("f"), 3, None).get("videos", list)
