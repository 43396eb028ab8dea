"""The files of a checkpoint as one rank writes them: hashed on the way, synced, and never an error that the other ranks
do not hear of."""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from deepspeed.runtime.checkpoint_engine import TorchCheckpointEngine


class StateFiles(TorchCheckpointEngine):
    """Writes the files of one rank in place of DeepSpeed's own checkpoint engine: synced, with size and hash.

    It never raises, for the other ranks wait inside DeepSpeed's barriers: the first problem is kept, and what comes
    after it is only counted.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self._folder = folder
        self.entries: dict[str, dict[str, Any]] = {}
        self.problem: str | None = None

    @contextmanager
    def noting(self) -> Iterator[None]:
        """Keep what goes wrong inside, if it is the first."""
        try:
            yield
        except Exception as error:  # whatever it is, all ranks must hear of it
            self.problem = self.problem or f"{type(error).__name__}: {error}"

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the checkpoint."""
        with self._hashed(self._folder / name) as file:
            file.write(data)

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """DeepSpeed's call for a folder."""
        with self.noting():
            os.makedirs(path, exist_ok=exist_ok)

    def save(self, state_dict: Any, path: str) -> None:
        """DeepSpeed's call for one of its state files."""
        with self._hashed(Path(path)) as file:
            torch.save(state_dict, cast(IO[bytes], file))

    @contextmanager
    def _hashed(self, path: Path) -> Iterator["_HashedFile"]:
        file = _HashedFile(None if self.problem else path, self)
        with self.noting():
            yield file
        file.close()
        self.entries[str(path.relative_to(self._folder))] = {"size": file.size, "sha256": file.digest.hexdigest()}


class _HashedFile:
    """What `torch.save` needs of a file; without a path it only counts."""

    def __init__(self, path: Path | None, files: StateFiles) -> None:
        self.size, self.digest, self._files = 0, hashlib.sha256(), files
        self._file: Any = None
        with files.noting():
            self._file = path and open(path, "wb", buffering=1 << 20)  # noqa: SIM115 - closed by close()

    def write(self, data: Any) -> int:
        self.size += len(data)
        self.digest.update(data)
        if self._file and not self._files.problem:
            with self._files.noting():
                self._file.write(data)
        return len(data)

    def flush(self) -> None:
        """torch calls it; the end is early enough."""

    def close(self) -> None:
        if self._file:
            with self._files.noting():
                self._file.flush()
                os.fsync(self._file.fileno())
            with self._files.noting():
                self._file.close()


@contextmanager
def written_by(engine: Any, files: StateFiles) -> Iterator[None]:
    """Inside, what the engine saves goes through `files`."""
    before = engine.checkpoint_engine
    engine.checkpoint_engine = files
    # It would be put beside the checkpoints, outside any of them.
    engine._copy_recovery_script = lambda _: None
    try:
        yield
    finally:
        engine.checkpoint_engine = before
        del engine._copy_recovery_script
