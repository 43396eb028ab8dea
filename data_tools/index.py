"""Sidecar indices: a header line, then one line of raw facts per sample, enough to plan, count and read without
touching what they describe."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from swim.data_tools.files import written_whole
from swim.data_tools.records import Masks, Record, RecordError

INDEX_VERSION = 1
Place = tuple[int, int, int]
"""Offset and size in bytes, CRC32."""


class ShardError(ValueError):
    """A data set is incomplete or inconsistent; the message names path, value and remedy."""


class BadSample(Exception):  # noqa: N818 - it names what the loader then has, not a fault of the program
    """One sample cannot be read; `key`, `shard` (file name), `offset` (bytes) and `reason` say which and why."""

    def __init__(self, key: str, shard: str, offset: int, reason: str) -> None:
        super().__init__(key, shard, offset, reason)  # all of them, so that it survives pickling between processes
        self.key, self.shard, self.offset, self.reason = key, shard, offset, reason

    def __str__(self) -> str:
        return f"sample {self.key!r} in {self.shard} at byte {self.offset}: {self.reason}"


@dataclass(frozen=True)
class ConversationFacts:
    """Index facts of one conversation; `num_mask_objects` counts the distinct mentioned objects that have masks."""

    task: str
    span: tuple[int, int] | None
    num_mentions: int
    num_mask_objects: int
    num_chars: int


@dataclass(frozen=True)
class Entry:
    """Index facts of one sample; `members` maps a suffix to (offset, size, CRC32), `files` the path of a loose medium
    to (size, CRC32); media facts are the first medium's.

    A sample without media has height, width, num_frames and fps 0. A line of a JSONL file is the member `line`.
    """

    key: str
    members: dict[str, Place]
    height: int
    width: int
    num_frames: int
    fps: float
    conversations: tuple[ConversationFacts, ...]
    shard: str = ""
    files: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def num_bytes(self) -> int:
        """Bytes of all members and loose media."""
        return sum(size for _, size, _ in self.members.values()) + sum(size for size, _ in self.files.values())


def entry_of(
    key: str, members: dict[str, Place], record: Record, masks: Masks, files: Mapping[str, tuple[int, int]] = {}
) -> Entry:
    """Facts of a sample; RecordError if it names a member that is not there."""
    for item in record.media:
        if item.member is not None and item.member not in members:
            problem = f"member {item.member!r} is not in the tar, which has {sorted(members)!s:.200}"
            raise RecordError(f"record {key!r}, media: {problem}; write the tar anew")
    height, width, num_frames, fps = 0, 0, 0, 0.0
    if record.media:
        first = record.media[0]
        height, width, num_frames, fps = first.height, first.width, first.num_frames, first.fps
    said = conversation_facts(record, masks)
    return Entry(key, members, height, width, num_frames, fps, said, files=dict(files))


def conversation_facts(record: Record, masks: Masks) -> tuple[ConversationFacts, ...]:
    """Facts of every conversation of a record."""
    found = []
    for conversation in record.conversations:
        mentions = [mention for turn in conversation.turns for mention in turn.mentions]
        named = {name for mention in mentions for name in mention.object_ids}
        num_chars = sum(len(turn.text) for turn in conversation.turns)
        num_mask_objects = sum(bool(masks.get(name)) for name in named)
        facts = ConversationFacts(conversation.task, conversation.span, len(mentions), num_mask_objects, num_chars)
        found.append(facts)
    return tuple(found)


def index_name(name: str) -> str:
    """Name of the index of a tar or JSONL file."""
    return f"{name.rpartition('.')[0]}.index.jsonl"


def write_index(path: Path, size: int, lines: Iterable[Any], **header: Any) -> Path:
    """Write the index of the file `path` of `size` bytes, whole or not at all: entries, or other dataclasses."""
    index = path.with_name(index_name(path.name))
    with written_whole(index, synced=True) as hidden, hidden.open("w") as file:
        print(_compact({"version": INDEX_VERSION, "shard": path.name, "size": size, **header}), file=file)
        for line in lines:
            facts = asdict(line)
            facts.pop("shard", None)  # in the header
            if not facts.get("files", True):
                del facts["files"]
            print(_compact(facts), file=file)
    return index


def _compact(facts: dict[str, Any]) -> str:
    return json.dumps(facts, separators=(",", ":"))


def check_header(where: str, text: bytes, size: int | None, **more: Any) -> dict[str, Any]:
    """Header of the index text of the file at path or URL `where`; ShardError unless it fits a file of `size` bytes
    (None: not known yet) and holds `more`."""
    try:
        header = json.loads(text[: text.find(b"\n") + 1])
    except ValueError as error:
        raise ShardError(f"{_index_of(where)}: its header is damaged ({error}); {remedy(where)}") from error
    found = header if isinstance(header, dict) else {}
    name = where.rpartition("/")[2]
    expected = {"version": INDEX_VERSION, "shard": name, "size": found.get("size") if size is None else size, **more}
    if {key: found.get(key) for key in expected} != expected or not isinstance(found["size"], int):
        problem = f"its header is {header}, the file needs {expected}"
        raise ShardError(f"{_index_of(where)}: {problem}; copy the file again or {remedy(where)}")
    return found


def remedy(where: str) -> str:
    """How to make the index of the file at path or URL `where` anew."""
    return f"run 'swim data index {where if where.endswith('.jsonl') else where.rpartition('/')[0]}'"


def _index_of(where: str) -> str:
    folder, slash, name = where.rpartition("/")
    return f"{folder}{slash}{index_name(name)}"


_KEY = re.compile(rb'\{"key":"([A-Za-z0-9_-]{1,80})"')


class Lines(Sequence[dict[str, Any]]):
    """The lines of several indices as JSON objects, each parsed when it is asked for: parsed, they take six times the
    memory of their text, and that in every process, since Python writes to whatever it reads.

    `places` are the paths or URLs of the files that the indices `texts` describe.
    """

    def __init__(self, places: Sequence[str], texts: Sequence[bytes]) -> None:
        self.places, self._texts = list(places), list(texts)
        self._starts = []  # of the lines behind the header
        for text in texts:
            starts = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
            self._starts.append(starts[starts < len(text)])
        self._first = np.cumsum([0, *map(len, self._starts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def keys(self) -> Iterator[str]:
        """The keys of all lines, without parsing what is written as we write it."""
        number = 0
        for text, starts in zip(self._texts, self._starts):
            for start in starts.tolist():
                found = _KEY.match(text, start)
                yield found[1].decode() if found else str(self[number]["key"])
                number += 1

    @overload
    def __getitem__(self, which: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, which: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, which: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        number = range(len(self))[which]
        shard = self.shard_of(number)
        line = number - int(self._first[shard])
        start = int(self._starts[shard][line])
        text = self._texts[shard]
        end = text.find(b"\n", start)
        return self._parse(shard, line + 2, text[start : end if end >= 0 else None])

    def shard_of(self, number: int) -> int:
        """Which of the `places` line `number` belongs to."""
        return int(np.searchsorted(self._first, number, side="right")) - 1

    def _parse(self, shard: int, number: int, line: bytes) -> dict[str, Any]:
        try:
            facts = json.loads(line)
            facts["members"] = {name: tuple(place) for name, place in facts["members"].items()}
            facts["conversations"] = tuple(
                ConversationFacts(**item | {"span": item["span"] and tuple(item["span"])})
                for item in facts["conversations"]
            )
            return facts | {"shard": self.places[shard].rpartition("/")[2]}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            place = self.places[shard]
            problem = f"line {number} is damaged ({error!r})"
            raise ShardError(f"{_index_of(place)}: {problem}; {remedy(place)}") from error


class Entries(Sequence[Entry]):
    """The entries of indices."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines

    def __len__(self) -> int:
        return len(self.lines)

    def keys(self) -> Iterator[str]:
        """The keys of all entries, in order."""
        return self.lines.keys()

    @overload
    def __getitem__(self, which: int) -> Entry: ...
    @overload
    def __getitem__(self, which: slice) -> list[Entry]: ...
    def __getitem__(self, which: int | slice) -> Entry | list[Entry]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        facts = self.lines[which]
        try:
            return Entry(**facts | {"files": {name: tuple(x) for name, x in facts.get("files", {}).items()}})
        except (TypeError, AttributeError) as error:
            place = self.lines.places[self.lines.shard_of(range(len(self))[which])]
            problem = f"line of {facts.get('key')!r} is damaged ({error!r})"
            raise ShardError(f"{_index_of(place)}: {problem}; {remedy(place)}") from error
