"""Bytes of a data set's files: local ones by `pread`, remote ones through fsspec, whole into a bounded cache on a local
disk, or in ranges without one. Every error is an OSError that says what could not be read and why."""

import errno
import hashlib
import itertools
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import fsspec
from fsspec.callbacks import Callback

from swim.data_tools.files import locked, write_whole
from swim.data_tools.index import ShardError

MAX_OPEN_FILES = 128
MAX_MEDIA_BYTES = 4 << 30
MANIFEST = "shards.json"
DEAD_AFTER = 120.0  # seconds in which nothing more of a download came
WAITS = (0.5, 2.0, 8.0)  # seconds between attempts at a remote file
# What only reads. fsspec has more: some run programs, some wrap other URLs, some render templates.
SCHEMES = frozenset(
    {"abfs", "abfss", "adl", "az", "ftp", "gcs", "gs", "hdfs", "hf", "http", "https", "memory", "oci", "oss", "s3"}
    | {"s3a", "sftp", "ssh", "tos", "webhdfs"}
)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+)://")
_CACHED = re.compile(r"[0-9a-f]{32}|\.(?P<download>[0-9a-f]{32})\.(?P<total>\d+)\.[0-9a-f]+\.partial")
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:")

_T = TypeVar("_T")


def locate(where: str | Path) -> Path | str:
    """The local path, or the URL without a slash at its end, that a user means; ShardError for `pipe:`, chained URLs
    and unknown schemes."""
    found = None if isinstance(where, Path) else _URL.match(where)
    text, scheme = str(where), found[1].lower() if found else ""
    if isinstance(where, Path) or not ("://" in text or text.startswith("pipe:")):
        return Path(where)
    if scheme in ("file", "local"):
        return Path(text.partition("://")[2])
    if scheme not in SCHEMES or "::" in text:
        problem = f"{text!r} is neither a folder nor a plain URL of a known scheme ({', '.join(sorted(SCHEMES))})"
        raise ShardError(f"{problem}; give one of those, or copy the data")
    return text.rstrip("/")


class _File:
    """A descriptor that closes when the last reader lets go of it, so that a full cache may drop it at any time."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def __del__(self) -> None:
        os.close(self.descriptor)


# Of all data sets of the process, since what a process may open is counted over all of them.
_open_files: dict[tuple[int, str], _File] = {}
_numbers = itertools.count()


class LocalFiles:
    """Files of a local folder; `pread` has no file position, so processes and threads may share."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._number = next(_numbers)

    def __reduce__(self) -> tuple[Any, ...]:
        return LocalFiles, (self.folder,)

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of a file; fewer where it ends before."""
        try:
            return os.pread(self._file(name).descriptor, size, offset)
        except OSError as error:
            # Its server was restarted, or somebody else has opened all that the process may: once more.
            _open_files.pop((self._number, name), None)
            if error.errno in (errno.EMFILE, errno.ENFILE):
                _open_files.clear()
            return os.pread(self._file(name).descriptor, size, offset)

    def _file(self, name: str) -> _File:
        if (file := _open_files.get((self._number, name))) is None:
            while len(_open_files) >= MAX_OPEN_FILES:
                _open_files.pop(next(iter(_open_files)), None)
            file = _File(os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC))
            _open_files[self._number, name] = file
        return file

    def read_media(self, name: str, size: int | None) -> bytes:
        """All bytes of a file that data names, or more than `size` where that is known; OSError unless it is a regular
        file inside the folder."""
        with self.find(name).open("rb") as file:
            return file.read(-1 if size is None else size + 1)

    def find(self, name: str) -> Path:
        """Path of a file that data names. It may be one of the folder, nothing else on this machine: OSError."""
        # A record is data from outside.
        size = -1
        with suppress(OSError, ValueError, RuntimeError):  # RuntimeError: a loop of links
            path = (self.folder / name).resolve()
            found = path.stat()
            plain = not os.path.isabs(name) and not _SCHEME.match(name) and stat.S_ISREG(found.st_mode)
            if plain and path.is_relative_to(self.folder.resolve()):
                size = found.st_size
        if size < 0:
            raise OSError(f"{name!r} is not a file inside {self.folder}; put it there")
        if size > MAX_MEDIA_BYTES:
            raise OSError(f"{name!r} has {size} bytes, the limit is {MAX_MEDIA_BYTES}; cut it")
        return path

    def forget(self, name: str) -> bool:  # noqa: ARG002
        """Whether another attempt may find other bytes: not here."""
        return False


class RemoteFiles:
    """Files of a remote folder. With a `cache` they are fetched whole on first use, without one in ranges.

    `sizes` in bytes are those of the files that have an index; whether the storage `lists` files: web servers do not.
    Every attempt is repeated `len(WAITS)` times; what is not there or not allowed fails at once.
    """

    def __init__(self, url: str, cache: "FileCache | None") -> None:
        self.folder, self.cache = url, cache
        self.lists = not url.startswith(("http://", "https://"))
        self.sizes: dict[str, int] = {}
        self._process, self._found, self._forgotten = 0, ("", ""), set[str]()

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_process": 0, "_found": ("", "")}

    def read(self, name: str, offset: int, size: int) -> bytes:
        """`size` bytes from `offset` of a file; fewer where it ends before."""
        return self._read(name, offset, size, self.sizes[name])

    def _read(self, name: str, offset: int, size: int, total: int) -> bytes:
        if self.cache is None:
            data = self._repeat(name, lambda fs, path: bytes(fs.cat_file(path, start=offset, end=offset + size)))
            if len(data) > size:
                remedy = "give data.cache_gib room for whole files"
                raise OSError(f"{self._url(name)}: {len(data)} bytes came instead of {size}; {remedy}")
            return data
        file = _File(self.cache.open(self._url(name), total, lambda target: self._fetch(name, target, total)))
        return os.pread(file.descriptor, size, offset)

    def read_media(self, name: str, size: int | None) -> bytes:
        """All bytes of a file that data names, of `size` bytes where that is known; OSError if it leads elsewhere."""
        if name.startswith("/") or _SCHEME.match(name) or ".." in name.split("/"):
            raise OSError(f"{name!r} is not a file inside {self.folder}; put it there")
        if size is None:
            size = self._repeat(name, lambda fs, path: int(fs.size(path) or 0))
            if size > MAX_MEDIA_BYTES:
                raise OSError(f"{self._url(name)} has {size} bytes, the limit is {MAX_MEDIA_BYTES}; cut it")
            return self.read_whole(name)
        return self._read(name, 0, size, size)

    def read_whole(self, name: str) -> bytes:
        """All bytes of a small file, past the cache."""
        return self._repeat(name, lambda fs, path: bytes(fs.cat_file(path)))

    def forget(self, name: str) -> bool:
        """Drop what was fetched of a file; whether another attempt may find other bytes: once per file and process."""
        if name in self._forgotten:
            return False
        self._forgotten.add(name)
        if self.cache is not None:
            self.cache.drop(self._url(name))
        return True

    def names(self) -> dict[str, str]:
        """Names of the files of the folder, each with what changes when the file does.

        Of a web server they are those of the manifest, with the SHA-256 of each index.
        """
        if self.lists:
            listed = self._repeat("", lambda fs, path: fs.ls(path, detail=True))
            return {item["name"].rpartition("/")[2]: repr(sorted(item.items())) for item in listed}
        try:
            files = json.loads(self.read_whole(MANIFEST))["files"]
            return {str(name): str(digest) for name, digest in files.items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            problem = f"{self.folder}/{MANIFEST} is damaged ({error!r})"
            raise OSError(f"{problem}; run 'swim data index' where the folder is, and copy that file") from error
        except FileNotFoundError as error:
            problem = f"{self.folder}/{MANIFEST} is not there, and a web server lists no files"
            raise FileNotFoundError(f"{problem}; run 'swim data index' before the upload") from error

    def _url(self, name: str) -> str:
        return f"{self.folder}/{name}"

    def _fetch(self, name: str, target: Path, total: int) -> None:
        def fetch(fs: Any, path: str) -> None:
            fs.get_file(path, str(target), callback=_Limit(total))
            if (size := target.stat().st_size) != total:
                with target.open("rb") as file:
                    raise OSError(f"{size} of {total} bytes came, beginning with {file.read(16)!r}; copy it again")

        self._repeat(name, fetch)

    def _repeat(self, name: str, attempt: Callable[[Any, str], _T]) -> _T:
        url = self._url(name) if name else self.folder
        fs, root = self._filesystem()
        path = f"{root}/{name if self.lists else quote(name)}" if name else root
        for wait in (*WAITS, None):
            try:
                found = attempt(fs, path)
                break
            except FileNotFoundError as error:
                raise FileNotFoundError(f"{url}: {error}") from error
            except PermissionError as error:
                raise PermissionError(f"{url}: {error}") from error
            except Exception as error:  # every storage has its own
                if wait is None:
                    problem = f"{type(error).__name__} {error}, {len(WAITS) + 1} times"
                    raise OSError(f"{url}: {problem}") from error
                time.sleep(wait)
        return found

    def _filesystem(self) -> tuple[Any, str]:
        # A connection does not survive a fork; fsspec's own instances are kept per process.
        if self._process != os.getpid():
            options: dict[str, Any] = {"use_listings_cache": False}
            try:
                if not self.lists:
                    import aiohttp

                    # By default a download may take five minutes, however large it is.
                    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)
                    options["client_kwargs"] = {"timeout": timeout}
                self._found = fsspec.core.url_to_fs(self.folder, **options)
            except ImportError as error:
                raise ShardError(f"{self.folder}: {error}; install that package") from error
            self._process = os.getpid()
        return self._found


class _Limit(Callback):
    """Stops a download that becomes larger than it should be, before it fills the disk."""

    def __init__(self, total: int) -> None:
        super().__init__()
        self.total = total

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        if self.value > self.total:
            raise OSError(f"more than {self.total} bytes came; copy the file again or its index")


def write_manifest(folder: Path) -> Path:
    """Write which files a folder of shards or JSONL files has, with a digest of each index, and return its path."""
    files = {}
    for path in sorted([*folder.glob("[!.]*.tar"), *folder.glob("[!.]*.index.jsonl")]):
        index = path if path.suffix == ".jsonl" else path.with_suffix(".index.jsonl")
        files[path.name] = hashlib.sha256(index.read_bytes()).hexdigest() if index.is_file() else ""
    write_whole(folder / MANIFEST, json.dumps({"version": 1, "files": files}, indent=1) + "\n")
    return folder / MANIFEST


class FileCache:
    """Whole remote files in a folder of at most `max_bytes`, for all processes of a machine; the ones used longest ago
    go first. Who has opened a file may go on reading after it went."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder, max_bytes

    def open(self, url: str, total: int, fetch: Callable[[Path], None]) -> int:
        """A descriptor of the file at `url` with `total` bytes, which `fetch` writes to a path if it is not there."""
        name = _name(url)
        if (descriptor := self._use(name, total)) is not None:
            return descriptor
        if total > self.max_bytes:
            limit = f"data.cache_gib allows {self.max_bytes}; raise it, or set it to 0 to read in ranges"
            raise OSError(f"{url} has {total} bytes, {limit}")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked(name):
            # Another process may have fetched it since.
            if (descriptor := self._use(name, total)) is not None:
                return descriptor
            hidden = self.folder / f".{name}.{total}.{os.urandom(4).hex()}.partial"
            try:
                self._reserve(hidden, total)
                fetch(hidden)
                descriptor = os.open(hidden, os.O_RDONLY | os.O_CLOEXEC)
                os.replace(hidden, self.folder / name)
            finally:
                hidden.unlink(missing_ok=True)
        return descriptor

    def drop(self, url: str) -> None:
        """Remove the file of `url`, to be fetched again."""
        (self.folder / _name(url)).unlink(missing_ok=True)

    def _use(self, name: str, total: int) -> int | None:
        try:
            descriptor = os.open(self.folder / name, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        if os.fstat(descriptor).st_size != total:  # of another version of the data set
            os.close(descriptor)
            return None
        with suppress(OSError):
            os.utime(descriptor)
        return descriptor

    def _reserve(self, hidden: Path, total: int) -> None:
        """Make room for a file of `total` bytes; downloads count with the size in their name."""
        while True:
            with self._locked("all"):
                files = sorted(self._files())
                spare = self.max_bytes - sum(size for _, size, _ in files)
                for _, size, path in files:
                    if spare < total and not self._in_use(path):
                        path.unlink(missing_ok=True)
                        spare += size
                if spare >= total:
                    hidden.touch()
                    return
            time.sleep(0.1)  # all of it is being fetched by others

    def _files(self) -> Iterator[tuple[float, int, Path]]:
        """Time of last use, size and path of what is ours in the folder."""
        for path in self.folder.iterdir():
            if found := _CACHED.fullmatch(path.name):
                with suppress(FileNotFoundError):
                    now = path.stat()
                    yield now.st_mtime, int(found["total"] or now.st_size), path

    def _in_use(self, path: Path) -> bool:
        """Whether it is a download that somebody is at."""
        found = _CACHED.fullmatch(path.name)
        if found is None or not found["total"]:
            return False
        try:
            if time.time() - path.stat().st_mtime < DEAD_AFTER:  # locks may not reach other machines
                return True
            with self._locked(found["download"], wait=False):
                return False
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False

    def _locked(self, name: str, *, wait: bool = True) -> AbstractContextManager[bool]:
        return locked(self.folder / f"{name}.lock", wait=wait)


def _name(url: str) -> str:
    return hashlib.sha256(url.encode()).hexdigest()[:32]
