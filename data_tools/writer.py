"""Tars with their indices: written atomically, or indexed where somebody else wrote them."""

import io
import itertools
import os
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from swim.data_tools.files import sync
from swim.data_tools.index import Entry, Place, ShardError, entry_of, write_index
from swim.data_tools.records import Masks, Record, RecordError, masks_json, parse_sample


class TarWriter:
    """Context manager that writes members into `folder` as tars of at most about `max_bytes`, each with its index.

    A tar is written under a hidden name and gets its own only when complete. ShardError if tars of this prefix exist.
    With `number`, the first tar has that number, and what does not fit goes to `PREFIX-NUMBER.1.tar` and so on, so that
    several writers share a folder; `names` are the tars so far.
    """

    header: Mapping[str, Any] = {}

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
        self._lines: list[Any] = []

    def _new(self, key: str) -> None:
        if key in self._keys:
            raise RecordError(f"record {key!r}, key: it was written before; keys are unique over a data set")

    def _add(self, key: str, data: Mapping[str, bytes]) -> dict[str, Place]:
        """Append the members of a key and return their places; the caller appends its line of the index."""
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
        return members

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._tar is not None and error is None:
            self._finish()
        elif self._tar is not None:
            with suppress(OSError):  # a full disk
                self._tar.close()
            self._hidden.unlink(missing_ok=True)

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
        write_index(self._path, self._hidden.stat().st_size, self._lines, **self.header)
        os.replace(self._hidden, self._path)
        sync(self.folder)
        self.names.append(self._path.name)
        self._tar, self._lines = None, []


class ShardWriter(TarWriter):
    """A TarWriter of samples."""

    def write(self, key: str, record: Record, masks: Masks, media: Mapping[str, bytes]) -> None:
        """Append one sample; `media` maps member suffixes to bytes. RecordError if it is not valid or not unique."""
        self._new(key)
        expected = {item.member for item in record.media if item.member is not None}
        if set(media) != expected:
            problem = f"bytes were given for {sorted(media)}, but media names {sorted(expected)}"
            raise RecordError(f"record {key!r}, media: {problem}; pass exactly the named members")
        data = {"json": record.model_dump_json().encode(), "masks.json": masks_json(masks), **media}
        parse_sample(key, data["json"], data["masks.json"])
        members = self._add(key, data)
        self._lines.append(entry_of(key, members, record, masks))


def index_shard(tar_path: str | Path) -> Path:
    """Write the index of a tar anew, the same bytes that its writer wrote, and return its path.

    ShardError if members of a key are not adjacent, RecordError if a sample is not valid.
    """
    path = Path(tar_path)

    def entries() -> Iterator[Entry]:
        for key, members, text in tar_samples(path):
            if "json" not in text:
                raise ShardError(f"{path}: {key!r} has {sorted(members)} but no '{key}.json'; write the tar anew")
            yield entry_of(key, members, *parse_sample(key, text["json"], text.get("masks.json")))

    return write_index(path, _size(path), entries())


def tar_samples(path: Path) -> Iterator[tuple[str, dict[str, Place], dict[str, bytes]]]:
    """Key, places of all members and text of the JSON members of every sample of a tar; ShardError if it is damaged."""
    keys = set()
    try:
        length = path.stat().st_size
        with tarfile.open(path, "r:") as tar:
            for key, infos in itertools.groupby(tar, lambda info: info.name.partition(".")[0]):
                if key in keys:
                    raise ShardError(
                        f"{path}: members of {key!r} are not adjacent, or it is there twice; write it anew"
                    )
                keys.add(key)
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
                    if suffix.split(".")[-1] == "json":
                        text[suffix] = data
                yield key, members, text
    except (tarfile.TarError, OSError) as error:
        raise ShardError(f"{path}: cannot be read as a tar ({error}); copy it again from its source") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise ShardError(f"{path}: cannot be read ({error}); give the path of a tar") from error
