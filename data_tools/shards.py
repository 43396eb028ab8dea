"""Data sets with random access: shards, or JSONL files beside loose videos, in a folder or behind a URL.

A sample of a shard is `KEY.json`, `KEY.masks.json` and one member `KEY.<Media.member>` per stored medium, so any
WebDataset reader understands the tar. `shard-000000.tar` has its index beside it in `shard-000000.index.jsonl`, and so
has `mine.jsonl` in `mine.index.jsonl`.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swim.data_tools.access import Opened, Reader
from swim.data_tools.facts import FACTS_VERSION, Facts, facts_of, load_arrays, save_arrays
from swim.data_tools.index import (
    BadSample,
    ConversationFacts,
    Entries,
    Entry,
    ShardError,
)
from swim.data_tools.layers import Joined, Layer, join
from swim.data_tools.loose import LINE, line_values
from swim.data_tools.records import Masks, Record, RecordError, parse_sample
from swim.data_tools.storage import FileCache
from swim.data_tools.writer import ShardWriter, index_shard

__all__ = [
    "BadSample",
    "ConversationFacts",
    "Entry",
    "Sample",
    "ShardError",
    "ShardSet",
    "ShardWriter",
    "index_shard",
]


@dataclass(frozen=True)
class Sample:
    """One sample: `record` and `masks` are there, media bytes are read on request."""

    key: str
    record: Record
    masks: Masks
    _reader: Reader = field(repr=False, compare=False)
    _entry: Entry = field(repr=False, compare=False)

    @property
    def place(self) -> tuple[str, int]:
        """Name of the shard or JSONL file and offset in bytes, to find the sample by hand."""
        return self._entry.shard, min(offset for offset, _, _ in self._entry.members.values())

    def media(self, i: int = 0) -> bytes:
        """Bytes of medium `i`, checked against the CRC32 in the index; BadSample if it is damaged.

        A loose file's `path` counts from the folder of its shard, which knows no CRC32 of it, or of its JSONL file.
        """
        medium = self.record.media[i]
        if medium.member is not None:
            return self._reader.member(self._entry, medium.member)
        return self._reader.loose(self._entry, f"media[{i}]", str(medium.path))


class ShardSet:
    """A data set with random access by number or key, in order of file names; safe to fork and to pickle.

    It is a folder of shards or, without any, of JSONL files, or one JSONL file, or the URL of such. `entries` are the
    index facts, `facts` some of them as arrays, `digest` is the SHA-256 of all indices, whatever the folder is called.
    With a folder `cache`, facts and remote indices are kept there, and an index is parsed and checked only once. Files
    behind a URL are read through `files`, or in ranges without it. `layers` are joined one after the other.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        layers: Sequence[str | Path] = (),
        cache: Path | None = None,
        files: FileCache | None = None,
    ) -> None:
        opened = Opened(folder, cache=cache, files=files)
        self.folder, self.digest, self._reader = opened.folder, opened.digest, opened.read
        entries = Entries(opened.lines)
        self.entries: Sequence[Entry] = entries
        self._keys, self._layers = entries.keys, list[Layer]()
        if layers:
            keys = list(entries.keys())
            self._layers = [Layer(layer, keys, cache=cache, files=files) for layer in layers]
            self.entries = Joined(entries, self._layers)
            digests = " ".join([self.digest, *(layer.digest for layer in self._layers)])
            self.digest = hashlib.sha256(digests.encode()).hexdigest()
        self._number: dict[str, int] = {}
        # Facts of this digest were taken from the same bytes, which were found to be good.
        file = cache and cache / f"facts{FACTS_VERSION}_{self.digest[:24]}.npz"
        arrays = load_arrays(file) if file is not None else None
        self.facts = Facts(**arrays) if arrays is not None else facts_of(self._checked())
        if file is not None and arrays is None:
            save_arrays(file, **vars(self.facts))

    def _checked(self) -> Iterator[Entry]:
        keys = set()
        for entry in self.entries:
            if entry.key in keys:
                raise ShardError(f"{self.folder}: key {entry.key!r} is there twice; remove one of its shards or lines")
            keys.add(entry.key)
            yield entry

    def __len__(self) -> int:
        return len(self.entries)

    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return list(self._numbers())

    def read_member(self, which: int | str, member: str) -> bytes:
        """Bytes of the member KEY.<member> of a sample by number or key; BadSample for damage."""
        return self._reader.member(self.entries[self._find(which)], member)

    def read(self, which: int | str, *, masks: bool = True) -> Sample:
        """Sample by number or key, without its masks on request; BadSample for damage, KeyError or IndexError if there
        is none."""
        number = self._find(which)
        entry = self.entries[number]
        names = (LINE, "json", "masks.json")[: 2 + masks]
        text = {name: self._reader.member(entry, name) for name in names if name in entry.members}
        changes = [change for layer in self._layers if (change := layer.read(number, masks=masks)) is not None]
        try:
            if LINE in text:
                values: tuple[Any, Any] = line_values(entry, text[LINE], masks=masks)
            else:
                values = text["json"], text.get("masks.json")
            parsed = parse_sample(entry.key, *(join(*values, changes) if changes else values))
        except RecordError as error:
            raise BadSample(entry.key, entry.shard, self._at(entry), str(error)) from error
        return Sample(entry.key, *parsed, self._reader, entry)

    @staticmethod
    def _at(entry: Entry) -> int:
        return entry.members[LINE if LINE in entry.members else "json"][0]

    def _find(self, which: int | str) -> int:
        return self._numbers()[which] if isinstance(which, str) else which

    def _numbers(self) -> dict[str, int]:
        if not self._number:
            self._number = {key: i for i, key in enumerate(self._keys())}
        return self._number
