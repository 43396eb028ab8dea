"""Data sets with random access: shards, or JSONL files beside loose videos, in a folder or behind a URL.

A sample of a shard is `KEY.json`, `KEY.masks.json` and one member `KEY.<Media.member>` per stored medium, so any
WebDataset reader understands the tar. `shard-000000.tar` has its index beside it in `shard-000000.index.jsonl`, and so
has `mine.jsonl` in `mine.index.jsonl`.
"""

import hashlib
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from swim.data_tools.facts import FACTS_VERSION, Facts, facts_of, load_arrays, save_arrays
from swim.data_tools.index import (
    BadSample,
    ConversationFacts,
    Entries,
    Entry,
    Lines,
    ShardError,
    check_header,
    index_name,
    remedy,
    sync,
)
from swim.data_tools.loose import LINE, fresh_index, jsonl_files, line_values
from swim.data_tools.records import Masks, Record, RecordError, parse_sample
from swim.data_tools.storage import MANIFEST, FileCache, LocalFiles, RemoteFiles, locate
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
    "sync",
]


@dataclass(frozen=True)
class Sample:
    """One sample: `record` and `masks` are there, media bytes are read on request."""

    key: str
    record: Record
    masks: Masks
    _reader: "_Reader" = field(repr=False, compare=False)
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
    behind a URL are read through `files`, or in ranges without it.
    """

    def __init__(self, folder: str | Path, *, cache: Path | None = None, files: FileCache | None = None) -> None:
        self.folder = locate(folder)
        opened = _open_local(self.folder) if isinstance(self.folder, Path) else _open_remote(self.folder, cache, files)
        self._reader = _Reader(opened.files)
        digest = hashlib.sha256()
        for place, text in zip(opened.places, opened.texts):
            header = check_header(place, text, None)
            if isinstance(opened.files, RemoteFiles):
                opened.files.sizes[place.rpartition("/")[2]] = header["size"]
            digest.update(text)
        self.entries: Sequence[Entry] = Entries(Lines(opened.places, opened.texts))
        self.digest = digest.hexdigest()
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
        entry = self.entries[self._find(which)]
        layers = (LINE, "json", "masks.json")[: 2 + masks]
        text = {name: self._reader.member(entry, name) for name in layers if name in entry.members}
        try:
            if LINE in text:
                values: tuple[Any, Any] = line_values(entry, text[LINE], masks=masks)
            else:
                values = text["json"], text.get("masks.json")
            parsed = parse_sample(entry.key, *values)
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
            keys = self.entries.keys() if isinstance(self.entries, Entries) else (entry.key for entry in self.entries)
            self._number = {key: i for i, key in enumerate(keys)}
        return self._number


@dataclass(frozen=True)
class _Opened:
    """Files of a data set, paths or URLs of those that have an index, and the texts of the indices."""

    files: LocalFiles | RemoteFiles
    places: list[str]
    texts: list[bytes]


def _open_local(folder: Path) -> _Opened:
    paths = [folder] if folder.suffix == ".jsonl" and folder.is_file() else sorted(folder.glob("*.tar"))
    paths = paths or jsonl_files(folder)
    if not paths:
        raise ShardError(f"{folder}: no *.tar and no *.jsonl found; give a folder that 'swim data' wrote, or your own")
    texts = [fresh_index(path) if path.suffix == ".jsonl" else _read_index(path) for path in paths]
    return _Opened(LocalFiles(paths[0].parent), list(map(str, paths)), texts)


def _read_index(path: Path) -> bytes:
    try:
        text = path.with_name(index_name(path.name)).read_bytes()
    except FileNotFoundError:
        problem = f"{path}: its index {index_name(path.name)} is missing"
        raise ShardError(f"{problem}; {remedy(str(path))}") from None
    check_header(str(path), text, path.stat().st_size)
    return text


def _open_remote(url: str, cache: Path | None, files: FileCache | None) -> _Opened:
    """Read the indices, from the folder `cache` where they have not changed."""
    folder, _, name = url.rpartition("/") if url.endswith(".jsonl") else (url, "", "")
    remote = RemoteFiles(folder, files)
    try:
        listed = remote.names()
        found = [name] if name else sorted(other for other in listed if other.endswith(".tar"))
        found = found or sorted(f"{other.removesuffix('.index.jsonl')}.jsonl" for other in listed if _indexed(other))
        texts = [_remote_index(remote, one, listed, cache) for one in found]
    except OSError as error:
        raise ShardError(f"{url}: cannot be opened ({error})") from error
    if not texts:
        raise ShardError(f"{url}: no *.tar and no index of a *.jsonl found; run 'swim data index' before the upload")
    return _Opened(remote, [f"{folder}/{one}" for one in found], texts)


def _indexed(name: str) -> bool:
    return name.endswith(".index.jsonl")


def _remote_index(remote: RemoteFiles, described: str, listed: dict[str, str], cache: Path | None) -> bytes:
    name = index_name(described)
    if name not in listed:
        raise FileNotFoundError(f"{name} is not there; run 'swim data index' before the upload")
    version = hashlib.sha256(f"{remote.folder}/{name} {listed[name]}".encode()).hexdigest()
    kept = cache and cache / f"index_{version[:32]}.jsonl"
    if kept is not None and kept.is_file():
        return kept.read_bytes()
    text = remote.read_whole(name)
    if not remote.lists and listed[name] != hashlib.sha256(text).hexdigest():
        problem = f"{remote.folder}/{name} is not the one that {MANIFEST} names"
        raise OSError(f"{problem}; run 'swim data index' where the folder is, and copy it again")
    check_header(f"{remote.folder}/{described}", text, None)
    if kept is not None:
        kept.parent.mkdir(parents=True, exist_ok=True)
        hidden = kept.with_name(f".{kept.name}.{os.getpid()}")
        hidden.write_bytes(text)
        os.replace(hidden, kept)
    return text


class _Reader:
    """Reads of a data set's files, checked against the index."""

    def __init__(self, files: LocalFiles | RemoteFiles) -> None:
        self.files = files

    def member(self, entry: Entry, name: str) -> bytes:
        """Bytes of a member; BadSample if they are damaged."""
        if name not in entry.members:
            raise BadSample(entry.key, entry.shard, 0, f"no member {name!r}, only {sorted(entry.members)}")
        offset, size, crc = entry.members[name]
        shard = entry.shard

        def read() -> bytes:
            return self.files.read(shard, offset, size)

        repair = remedy(f"{self.files.folder}/{shard}") if name == LINE else "copy the shard again"
        return self._checked(entry, offset, f"member {name!r}", shard, read, (size, crc), repair)

    def loose(self, entry: Entry, what: str, path: str) -> bytes:
        """Bytes of a file beside the shards; BadSample if it is none of theirs or damaged."""
        expected = entry.files.get(path)

        def read() -> bytes:
            return self.files.read_media(path, expected and expected[0])

        repair = f"fetch it again, or {remedy(f'{self.files.folder}/{entry.shard}')} if it is meant to be another"
        return self._checked(entry, 0, what, path, read, expected, repair)

    def _checked(
        self,
        entry: Entry,
        offset: int,
        what: str,
        file: str,
        read: Callable[[], bytes],
        expected: tuple[int, int] | None,
        repair: str,
    ) -> bytes:
        problem = None
        while problem is None or self.files.forget(file):
            try:
                data = read()
            except OSError as error:
                raise BadSample(entry.key, entry.shard, offset, f"{what} cannot be read: {error}") from error
            size, crc = expected or (len(data), None)
            if len(data) < size:
                problem = f"{what} ends after {len(data)} of {size} bytes"
            elif len(data) > size:
                problem = f"{what} has more than the {size} bytes that the index says"
            elif crc is not None and (found := zlib.crc32(data)) != crc:
                problem = f"{what} has CRC32 {found:#010x}, the index says {crc:#010x}"
            else:
                return data
        raise BadSample(entry.key, entry.shard, offset, f"{problem}; {repair}")
