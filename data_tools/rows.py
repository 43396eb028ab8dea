"""Rows of JSON arrays and JSON Lines files too large to load: streamed once, then read by their place in the file.

The usual incremental parsers do not say where in the file a value lies, so the second read, by clip instead of in file
order, would have to parse everything again. Here the standard decoder runs over a window of text and its places are
counted in bytes.
"""

import codecs
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from swim.data_tools.records import MAX_JSON_BYTES, RecordError

CHUNK = 1 << 20
_SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()


@dataclass(frozen=True)
class Row:
    """One record of a foreign file: `number` counts from 0 in its `file`, `value` is its JSON value."""

    file: Path
    number: int
    value: Any

    @property
    def name(self) -> str:
        """What the row calls itself, else its number."""
        value = self.value if isinstance(self.value, dict) else {}
        named = next(
            (value[key] for key in ("index", "id", "key", "video_id") if value.get(key) not in (None, "")), None
        )
        return f"{named:.80}" if isinstance(named, str) else f"record_{self.number if named is None else named!r:.80}"

    def error(self, field: str, problem: str) -> RecordError:
        """The error that names this row and one of its fields."""
        return RecordError(f"record {self.name!r}, {field}: {problem}")

    def get(self, field: str, kind: type, default: Any = None) -> Any:
        """Value of a field that must be a `kind`; RecordError otherwise, and for a missing one without default."""
        if not isinstance(self.value, dict):
            what = "it is not JSON" if self.value is None else f"{self.value!r:.80} is not a JSON object"
            raise self.error("record", f"{what}; write one object per record")
        found = self.value.get(field)
        found = default if found is None else found
        if not isinstance(found, kind):
            raise self.error(field, f"{found!r:.80} is not a {kind.__name__}; correct it")
        return found


def stream_rows(path: Path) -> Iterator[tuple[int, bytes, Any]]:
    """(offset in bytes, bytes, value) of every row of a JSON array or, in a file `*.jsonl`, of every line.

    A line that is not JSON has the value None. RecordError for a file that is not UTF-8, for an array that is not well
    formed and for rows of more than `MAX_JSON_BYTES`, with the byte where it happens.
    """
    with path.open("rb") as file:
        yield from _lines(path, file) if path.suffix == ".jsonl" else _Array(path, file)


def _lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, bytes, Any]]:
    start = 0
    while line := file.readline(MAX_JSON_BYTES + 1):
        if len(line) > MAX_JSON_BYTES:
            limit = f"a line of more than {MAX_JSON_BYTES} bytes"
            raise RecordError(f"{path}: {limit} begins at byte {start}; write one record per line")
        if line.strip():
            try:
                yield start, line, json.loads(line)
            except (ValueError, RecursionError):
                yield start, line, None
        start += len(line)


class _Array:
    """Iterator over the elements of a JSON array; character `at` of the window `text` is byte `start`."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file = path, file
        self.decode = codecs.getincrementaldecoder("utf-8-sig")().decode
        self.text, self.at, self.start, self.ended = "", 0, 0, False

    def __iter__(self) -> Iterator[tuple[int, bytes, Any]]:
        self.start = 3 * self._has_mark()
        if self._peek() != "[":
            _, value = self._value()
            raise RecordError(f"{self.path}: holds {type(value).__name__}; give one JSON array of records")
        self._skip(1)
        if self._peek() == "]":
            return self._end()
        while True:
            self._peek()
            start = self.start
            yield start, *self._value()
            mark = self._peek()
            if mark not in (",", "]"):
                raise self._error(f"{mark!r} where ',' or ']' is due")
            if mark == "]":
                return self._end()
            self._skip(1)

    def _has_mark(self) -> bool:
        mark = self.file.read(3) == codecs.BOM_UTF8
        self.file.seek(0)
        return mark

    def _end(self) -> None:
        self._skip(1)
        if self._peek():
            raise self._error("something follows the array")

    def _peek(self) -> str:
        """The next character that is no space, or '' at the end."""
        while True:
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self._skip(match.end() - self.at)
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def _skip(self, count: int) -> bytes:
        skipped = self.text[self.at : self.at + count].encode()
        self.at, self.start = self.at + count, self.start + len(skipped)
        return skipped

    def _more(self) -> bool:
        self.text = self.text[self.at :]
        self.at = 0
        # As much again as is there: an element that needs many attempts is then still parsed in linear time.
        data = self.file.read(max(CHUNK, len(self.text)))
        self.ended = not data
        try:
            self.text += self.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise self._error(f"not UTF-8 ({error.reason})") from None
        return not self.ended

    def _value(self) -> tuple[bytes, Any]:
        while True:
            problem: Exception | None = None
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                # A number may go on behind the window, be it with 'e+1'.
                if self.ended or len(self.text) - end >= 3 or isinstance(value, (dict, list, str)):
                    return self._skip(end - self.at), value
            except RecursionError:
                raise self._error("it is nested too deeply") from None
            except ValueError as error:
                problem = error
            if problem is not None and (self.ended or len(self.text) - self.at > MAX_JSON_BYTES):
                raise self._error(str(problem)) from None
            self._more()

    def _error(self, problem: str) -> RecordError:
        return RecordError(
            f"{self.path}: not JSON (at or after byte {self.start}: {problem}); give one JSON array of records, each "
            f"of at most {MAX_JSON_BYTES} bytes"
        )
