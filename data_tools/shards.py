"""Shards: plain tars with a sidecar index, written atomically, read by offset.

A sample is `KEY.json`, `KEY.masks.json` and one member `KEY.<Media.member>` per stored medium, so any WebDataset reader
understands the tar. `shard-000000.tar` has its index beside it in `shard-000000.index.jsonl`: a header line, then one
line of raw facts per sample, enough to plan, count and read without touching the tar.
"""

import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, overload

import numpy as np

from swim.data_tools.facts import FACTS_VERSION, Facts, facts_of, load_arrays, save_arrays
from swim.data_tools.records import Masks, Record, RecordError, masks_json, parse_sample

INDEX_VERSION = 1
MAX_OPEN_FILES = 128


class ShardError(ValueError):
    """A shard folder is incomplete or inconsistent; the message names path, value and remedy."""


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
    """Index facts of one sample; `members` maps a suffix to (offset, size, CRC32), media facts are the first medium's.

    A sample without media has height, width, num_frames and fps 0.
    """

    key: str
    members: dict[str, tuple[int, int, int]]
    height: int
    width: int
    num_frames: int
    fps: float
    conversations: tuple[ConversationFacts, ...]
    shard: str = ""


class ShardWriter:
    """Context manager that writes samples into `folder` as tars of at most about `max_bytes`, each with its index.

    A tar is written under a hidden name and gets its own only when complete. ShardError if shards of this prefix exist.
    With `number`, the first tar has that number, and what does not fit goes to `PREFIX-NUMBER.1.tar` and so on, so that
    several writers share a folder; `names` are the tars so far.
    """

    def __init__(
        self, folder: str | Path, *, prefix: str = "shard", max_bytes: int = 1 << 30, number: int | None = None
    ) -> None:
        self.folder, self.prefix, self.max_bytes, self.number = Path(folder), prefix, max_bytes, number
        self.names: list[str] = []
        self.folder.mkdir(parents=True, exist_ok=True)
        mine = f"{prefix}-*.tar" if number is None else f"{prefix}-{number:06d}.*"
        existing = next(self.folder.glob(mine), None)
        if existing is not None:
            raise ShardError(f"{existing} already exists; write to an empty folder or with another prefix")
        self._keys: set[str] = set()
        self._tar: tarfile.TarFile | None = None
        self._entries: list[Entry] = []

    def write(self, key: str, record: Record, masks: Masks, media: Mapping[str, bytes]) -> None:
        """Append one sample; `media` maps member suffixes to bytes. RecordError if it is not valid or not unique."""
        if key in self._keys:
            raise RecordError(f"record {key!r}, key: it was written before; keys are unique over a data set")
        expected = {item.member for item in record.media if item.member is not None}
        if set(media) != expected:
            problem = f"bytes were given for {sorted(media)}, but media names {sorted(expected)}"
            raise RecordError(f"record {key!r}, media: {problem}; pass exactly the named members")
        data = {"json": record.model_dump_json().encode(), "masks.json": masks_json(masks), **media}
        parse_sample(key, data["json"], data["masks.json"])
        if self._tar is not None and self._tar.offset + sum(map(len, data.values())) > self.max_bytes:
            self._finish()
        if self._tar is None:
            self._tar = tarfile.open(self._hidden, "w", format=tarfile.USTAR_FORMAT)  # noqa: SIM115 - closed in _finish
        members = {}
        for suffix, content in data.items():
            # Owner, mode and time are TarInfo's constants, so equal samples give equal shards.
            info = tarfile.TarInfo(f"{key}.{suffix}")
            info.size = len(content)
            members[suffix] = (self._tar.offset + tarfile.BLOCKSIZE, len(content), zlib.crc32(content))
            self._tar.addfile(info, io.BytesIO(content))
        self._keys.add(key)
        self._entries.append(_entry(key, members, record, masks))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None and error is None:
            self._finish()
        elif self._tar is not None:
            self._tar.close()
            self._hidden.unlink()

    @property
    def _path(self) -> Path:
        written = len(self.names)
        number, more = (written, "") if self.number is None else (self.number, f".{written}" if written else "")
        return self.folder / f"{self.prefix}-{number:06d}{more}.tar"

    @property
    def _hidden(self) -> Path:
        return self.folder / f".{self._path.name}.{os.getpid()}.partial"

    def _finish(self) -> None:
        assert self._tar is not None
        self._tar.close()
        sync(self._hidden)
        # The index first: what has the name of a shard is then complete, whenever the machine stops.
        _write_index(self._path, self._hidden.stat().st_size, self._entries)
        os.replace(self._hidden, self._path)
        sync(self.folder)
        self.names.append(self._path.name)
        self._tar, self._entries = None, []


def index_shard(tar_path: str | Path) -> Path:
    """Write the index of a tar anew, the same bytes that its writer wrote, and return its path.

    ShardError if members of a key are not adjacent, RecordError if a sample is not valid.
    """
    path = Path(tar_path)
    entries: dict[str, Entry] = {}
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for key, infos in itertools.groupby(tar, lambda info: info.name.partition(".")[0]):
                if key in entries:
                    raise ShardError(
                        f"{path}: members of {key!r} are not adjacent, or it is there twice; write it anew"
                    )
                members, text = {}, {}
                for info in infos:
                    # A link would be read as what it points to, a sparse file as the zeros that it leaves out.
                    file = tar.extractfile(info) if info.isfile() and not info.issparse() else None
                    if file is None:
                        raise ShardError(f"{path}: {info.name!r} is not a plain file; remove it from the tar")
                    if not 0 <= info.size <= length - info.offset_data:  # or memory would be asked for all of it
                        problem = f"{info.name!r} has {info.size} bytes at byte {info.offset_data} of {length}"
                        raise ShardError(f"{path}: {problem}; copy it again from its source")
                    data, suffix = file.read(), info.name.partition(".")[2]
                    members[suffix] = (info.offset_data, info.size, zlib.crc32(data))
                    if suffix in ("json", "masks.json"):
                        text[suffix] = data
                if "json" not in text:
                    raise ShardError(f"{path}: {key!r} has {sorted(members)} but no '{key}.json'; write the tar anew")
                record, masks = parse_sample(key, text["json"], text.get("masks.json"))
                entries[key] = _entry(key, members, record, masks)
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: cannot be read as a tar ({error}); copy it again from its source") from error
    return _write_index(path, path.stat().st_size, list(entries.values()))


@dataclass(frozen=True)
class Sample:
    """One sample: `record` and `masks` are there, media bytes are read on request."""

    key: str
    record: Record
    masks: Masks
    _files: "_Files" = field(repr=False, compare=False)
    _entry: Entry = field(repr=False, compare=False)

    @property
    def place(self) -> tuple[str, int]:
        """Shard file name and offset in bytes, to find the sample by hand."""
        return self._entry.shard, min(offset for offset, _, _ in self._entry.members.values())

    def media(self, i: int = 0) -> bytes:
        """Bytes of medium `i`, checked against its CRC32 where it lies in the shard; BadSample if it is damaged.

        A loose file's `path` counts from the shard folder.
        """
        medium = self.record.media[i]
        if medium.member is not None:
            return self._files.read(self._entry, medium.member)
        # A record is data from outside: it may name files of its own folder, nothing else on this machine.
        path = (self._files.folder / str(medium.path)).resolve()
        if not path.is_relative_to(self._files.folder.resolve()) or not path.is_file():
            reason = f"media[{i}].path {medium.path!r} is not a file inside {self._files.folder}; put it there"
            raise BadSample(self.key, self._entry.shard, 0, reason)
        try:
            return path.read_bytes()
        except OSError as error:
            raise BadSample(self.key, self._entry.shard, 0, f"media[{i}] cannot be read: {error}") from error


class ShardSet:
    """A folder of shards with random access by number or key, in order of shard names; safe to fork and to pickle.

    `entries` are the index facts, `facts` some of them as arrays, `digest` is the SHA-256 of all indices, whatever the
    folder is called. With a folder `cache`, facts are kept there, and an index is parsed and checked only once.
    """

    def __init__(self, folder: str | Path, *, cache: Path | None = None) -> None:
        self.folder = Path(folder)
        self._files = _Files(self.folder)
        paths = sorted(self.folder.glob("*.tar"))
        if not paths:
            raise ShardError(f"{self.folder}: no *.tar found; give a folder that 'swim data' wrote")
        digest = hashlib.sha256()
        texts = []
        for path in paths:
            texts.append(_read_index(path))
            digest.update(texts[-1])
        self.entries: Sequence[Entry] = _Entries(paths, texts)
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
                raise ShardError(f"{self.folder}: key {entry.key!r} is there twice; remove one of its shards")
            keys.add(entry.key)
            yield entry

    def __len__(self) -> int:
        return len(self.entries)

    def keys(self) -> list[str]:
        """Keys of all samples, in order."""
        return list(self._numbers())

    def read_member(self, which: int | str, member: str) -> bytes:
        """Bytes of the member KEY.<member> of a sample by number or key; BadSample for damage."""
        return self._files.read(self._find(which), member)

    def read(self, which: int | str, *, masks: bool = True) -> Sample:
        """Sample by number or key, without its masks on request; BadSample for damage, KeyError or IndexError if there
        is none."""
        entry = self._find(which)
        layers = ("json", "masks.json")[: 1 + masks]
        text = {name: self._files.read(entry, name) for name in layers if name in entry.members}
        try:
            parsed = parse_sample(entry.key, text["json"], text.get("masks.json"))
        except RecordError as error:
            raise BadSample(entry.key, entry.shard, entry.members["json"][0], str(error)) from error
        return Sample(entry.key, *parsed, self._files, entry)

    def _find(self, which: int | str) -> Entry:
        return self.entries[self._numbers()[which] if isinstance(which, str) else which]

    def _numbers(self) -> dict[str, int]:
        if not self._number:
            self._number = {entry.key: i for i, entry in enumerate(self.entries)}
        return self._number


class _Entries(Sequence[Entry]):
    """The entries of indices, each parsed when it is asked for: parsed, they take six times the memory of their text,
    and that in every process, since Python writes to whatever it reads."""

    def __init__(self, paths: Sequence[Path], texts: Sequence[bytes]) -> None:
        self._paths, self._texts = list(paths), list(texts)
        self._starts = []  # of the lines behind the header
        for text in texts:
            starts = np.flatnonzero(np.frombuffer(text, np.uint8) == ord("\n")) + 1
            self._starts.append(starts[starts < len(text)])
        self._first = np.cumsum([0, *map(len, self._starts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, which: int) -> Entry: ...
    @overload
    def __getitem__(self, which: slice) -> list[Entry]: ...
    def __getitem__(self, which: int | slice) -> Entry | list[Entry]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        number = range(len(self))[which]
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        line = number - int(self._first[shard])
        start = int(self._starts[shard][line])
        text = self._texts[shard]
        end = text.find(b"\n", start)
        return _parse_line(self._paths[shard], line + 2, text[start : end if end >= 0 else None])


class _File:
    """A descriptor that closes when the last reader lets go of it, so that a full cache may drop it at any time."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class _Files:
    """Checked reads from the shards of a folder; `pread` has no file position, so processes and threads may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._open: dict[str, _File] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_open": {}}

    def read(self, entry: Entry, member: str) -> bytes:
        offset, size, crc = entry.members.get(member, (0, 0, 0))
        if member not in entry.members:
            raise BadSample(entry.key, entry.shard, offset, f"no member {member!r}, only {sorted(entry.members)}")
        try:
            file = self._open.get(entry.shard)
            if file is None:
                while len(self._open) >= MAX_OPEN_FILES:
                    self._open.pop(next(iter(self._open)), None)
                file = self._open[entry.shard] = _File(self.folder / entry.shard)
            data = os.pread(file.descriptor, size, offset)
        except OSError as error:
            raise BadSample(entry.key, entry.shard, offset, f"member {member!r} cannot be read: {error}") from error
        if len(data) != size:
            reason = f"member {member!r} ends after {len(data)} of {size} bytes; copy the shard again"
            raise BadSample(entry.key, entry.shard, offset, reason)
        if zlib.crc32(data) != crc:
            reason = f"member {member!r} has CRC32 {zlib.crc32(data):#010x}, the index says {crc:#010x}"
            raise BadSample(entry.key, entry.shard, offset, f"{reason}; copy the shard again")
        return data


def _entry(key: str, members: dict[str, tuple[int, int, int]], record: Record, masks: Masks) -> Entry:
    for item in record.media:
        if item.member is not None and item.member not in members:
            problem = f"member {item.member!r} is not in the tar, which has {sorted(members)!s:.200}"
            raise RecordError(f"record {key!r}, media: {problem}; write the tar anew")
    conversations = []
    for conversation in record.conversations:
        mentions = [mention for turn in conversation.turns for mention in turn.mentions]
        named = {name for mention in mentions for name in mention.object_ids}
        num_chars = sum(len(turn.text) for turn in conversation.turns)
        num_mask_objects = sum(bool(masks.get(name)) for name in named)
        facts = ConversationFacts(conversation.task, conversation.span, len(mentions), num_mask_objects, num_chars)
        conversations.append(facts)
    height, width, num_frames, fps = 0, 0, 0, 0.0
    if record.media:
        first = record.media[0]
        height, width, num_frames, fps = first.height, first.width, first.num_frames, first.fps
    return Entry(key, members, height, width, num_frames, fps, tuple(conversations))


def _index_path(tar_path: Path) -> Path:
    return tar_path.with_suffix(".index.jsonl")


def _write_index(tar_path: Path, size: int, entries: list[Entry]) -> Path:
    lines: list[dict[str, Any]] = [{"version": INDEX_VERSION, "shard": tar_path.name, "size": size}]
    for entry in entries:
        lines.append(asdict(entry))
        del lines[-1]["shard"]  # in the header
    path = _index_path(tar_path)
    hidden = path.with_name(f".{path.name}.partial")
    hidden.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    sync(hidden)
    os.replace(hidden, path)
    return path


def _read_index(tar_path: Path) -> bytes:
    path = _index_path(tar_path)
    remedy = f"run 'swim data index {tar_path.parent}'"
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ShardError(f"{tar_path}: its index {path.name} is missing; {remedy}") from None
    size = tar_path.stat().st_size
    try:
        header = json.loads(text.partition(b"\n")[0])
    except ValueError as error:
        raise ShardError(f"{path}: its header is damaged ({error}); {remedy}") from error
    expected = {"version": INDEX_VERSION, "shard": tar_path.name, "size": size}
    if header != expected:
        raise ShardError(f"{path}: its header is {header}, the tar needs {expected}; copy the tar again or {remedy}")
    return text


def _parse_line(tar_path: Path, number: int, line: bytes) -> Entry:
    try:
        facts = json.loads(line)
        members = {name: tuple(place) for name, place in facts.pop("members").items()}
        conversations = tuple(
            ConversationFacts(**item | {"span": item["span"] and tuple(item["span"])})
            for item in facts.pop("conversations")
        )
        return Entry(**facts, members=members, conversations=conversations, shard=tar_path.name)
    except (ValueError, KeyError, TypeError) as error:
        problem = f"line {number} is damaged ({error!r})"
        raise ShardError(f"{_index_path(tar_path)}: {problem}; run 'swim data index {tar_path.parent}'") from error


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
