"""Opening a data set: its files with an index, the texts of the indices, and reads that are checked against them."""

import hashlib
import zlib
from collections.abc import Callable
from pathlib import Path

from swim.data_tools.files import written_whole
from swim.data_tools.index import BadSample, Entry, Lines, ShardError, check_header, index_name, remedy
from swim.data_tools.loose import LINE, fresh_index, jsonl_files
from swim.data_tools.storage import MANIFEST, FileCache, LocalFiles, RemoteFiles, locate


class Opened:
    """The tars of a folder, without any its JSONL files, or one JSONL file, or the URL of such.

    `folder` is its path or URL, `lines` are those of the indices, `digest` is the SHA-256 of their texts, `read` reads
    what they name. Indices behind a URL are kept in the folder `cache`, other files in `files`. ShardError unless it is
    a layer or none, as `layer` says.
    """

    def __init__(self, where: str | Path, *, cache: Path | None, files: FileCache | None, layer: bool = False) -> None:
        self.folder = locate(where)
        if isinstance(self.folder, Path):
            self.files, places, texts = _open_local(self.folder)
        else:
            self.files, places, texts = _open_remote(self.folder, cache, files)
        digest = hashlib.sha256()
        for place, text in zip(places, texts):
            header = check_header(place, text, None)
            if header.get("layer", False) != layer:
                kind = "no layer; write one with LayerWriter" if layer else "a layer; name it in `layers` of its base"
                raise ShardError(f"{place}: it is {kind}")
            if isinstance(self.files, RemoteFiles):
                self.files.sizes[place.rpartition("/")[2]] = header["size"]
            digest.update(text)
        self.lines, self.digest, self.read = Lines(places, texts), digest.hexdigest(), Reader(self.files)


def _open_local(folder: Path) -> tuple[LocalFiles | RemoteFiles, list[str], list[bytes]]:
    paths = [folder] if folder.suffix == ".jsonl" and folder.is_file() else sorted(folder.glob("[!.]*.tar"))
    paths = paths or jsonl_files(folder)
    if not paths:
        raise ShardError(f"{folder}: no *.tar found and no *.jsonl; give a folder that 'swim data' wrote, or your own")
    texts = [fresh_index(path) if path.suffix == ".jsonl" else _read_index(path) for path in paths]
    return LocalFiles(paths[0].parent), list(map(str, paths)), texts


def _read_index(path: Path) -> bytes:
    try:
        text = path.with_name(index_name(path.name)).read_bytes()
    except FileNotFoundError:
        problem = f"{path}: its index {index_name(path.name)} is missing"
        raise ShardError(f"{problem}; {remedy(str(path))}") from None
    check_header(str(path), text, path.stat().st_size)
    return text


def _open_remote(
    url: str, cache: Path | None, files: FileCache | None
) -> tuple[LocalFiles | RemoteFiles, list[str], list[bytes]]:
    """Read the indices, from the folder `cache` where they have not changed."""
    folder, _, name = url.rpartition("/") if url.endswith(".jsonl") else (url, "", "")
    remote = RemoteFiles(folder, files)
    try:
        listed = remote.names()
        found = [name] if name else sorted(other for other in listed if other.endswith(".tar"))
        indices = (other for other in listed if other.endswith(".index.jsonl"))
        found = found or sorted(f"{other.removesuffix('.index.jsonl')}.jsonl" for other in indices)
        texts = [_remote_index(remote, one, listed, cache) for one in found]
    except OSError as error:
        raise ShardError(f"{url}: cannot be opened ({error})") from error
    if not texts:
        raise ShardError(f"{url}: no *.tar found and no index of a *.jsonl; run 'swim data index' before the upload")
    return remote, [f"{folder}/{one}" for one in found], texts


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
        with written_whole(kept) as hidden:
            hidden.write_bytes(text)
    return text


class Reader:
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
