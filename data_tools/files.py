"""Files that are there whole or not at all, and locks between processes."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path, *, synced: bool = False) -> Iterator[Path]:
    """A hidden path beside `path`, which takes its name at the end, on disk if `synced`; gone after any error."""
    hidden = path.with_name(f".{path.name}.{os.urandom(4).hex()}.partial")  # machines share process numbers
    try:
        yield hidden
        if synced:
            sync(hidden)
        os.replace(hidden, path)
    finally:
        hidden.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file that is there whole, and on disk, or not at all."""
    with written_whole(path, synced=True) as hidden:
        hidden.write_text(text)


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold the lock file `path`, made if it is missing; a process that dies lets go of it.

    Gives whether it is held: not where a file cannot be made, nor where the file system has no locks. BlockingIOError
    if somebody has it and we do not wait.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError:
        yield False
        return
    held = False
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except BlockingIOError:
            raise
        except OSError:
            pass
        yield held
    finally:
        os.close(descriptor)
