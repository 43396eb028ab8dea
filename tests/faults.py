"""A disk that stops working at the nth operation, to see what a save leaves behind."""

import errno
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from swim.train import state_files

CREATING = ("open", "write", "fsync", "mkdir", "replace", "symlink")
REMOVING = ("unlink", "rmdir")


class Killed(BaseException):
    """The process is gone: nothing catches this, and nothing behind it reaches the disk."""


class Disk:
    """Counts the operations below; the `fatal`th either kills (the write it falls on is torn, files without fsync lose
    what they had, as when power fails) or, with `full`, finds no space, as does every one behind it that needs some."""

    def __init__(self, root: Path, fatal: int | None = None, *, full: bool = False) -> None:
        self.root, self.fatal, self.full = root, fatal, full
        self.operations: list[str] = []
        self.failed = False
        self._unsynced: set[int] = set()

    @contextmanager
    def watched(self) -> Iterator["Disk"]:
        """Every operation of a save goes through this disk."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(state_files, "open", self._open, raising=False)
            for name in ("fsync", "mkdir", "replace", "symlink", *REMOVING):
                patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
            yield self
        if self.failed and not self.full:
            for path in self.root.rglob("*"):
                if path.is_file() and path.stat().st_ino in self._unsynced:
                    os.truncate(path, 0)

    def fails(self, name: str) -> bool:
        """Whether this operation does; counts it."""
        if self.full and name in REMOVING:
            return False
        self.operations.append(name)
        self.failed = self.failed or len(self.operations) - 1 == self.fatal
        return self.failed

    def _wrapped(self, name: str, real: Any) -> Any:
        def operation(*arguments: Any, **options: Any) -> Any:
            if self.fails(name):
                self._fail()
            done = real(*arguments, **options)
            if name == "fsync":
                self._unsynced.discard(os.fstat(arguments[0]).st_ino)
            return done

        return operation

    def _fail(self) -> None:
        if self.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise Killed

    def _open(self, path: Path, _: str, buffering: int) -> io.BufferedWriter:
        if self.fails("open"):
            self._fail()
        return io.BufferedWriter(_File(path, self), buffering)

    def wrote(self, inode: int) -> None:
        """A file has data that no fsync has made safe."""
        self._unsynced.add(inode)


class _File(io.FileIO):
    def __init__(self, path: Path, disk: Disk) -> None:
        super().__init__(path, "wb")
        self._disk = disk

    def write(self, data: Any) -> int:
        before = self._disk.failed
        if self._disk.fails("write"):
            if self._disk.full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Not raised: the caller is torch's C++ writer. The next operation of another kind is.
            if not before:
                super().write(data[: len(data) // 2])
        else:
            super().write(data)
        self._disk.wrote(os.fstat(self.fileno()).st_ino)
        return len(data)
