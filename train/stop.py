"""Ending a run early and well: on USR1 or TERM, on a file `stop` in its folder, when its time is up, and when its
launcher is gone.

Any rank may be asked; the ranks agree in the step's all-reduce, so all of them stop behind the same step. The run is
saved, and ends with exit code 75 (EX_TEMPFAIL): start it again and it goes on.
"""

import os
import signal
import time
from contextlib import suppress
from pathlib import Path
from typing import Self

EXIT_CODE = 75
STOP_FILE = "stop"


class Stopped(RuntimeError):  # noqa: N818 - nothing went wrong
    """The run was asked to end and is saved; the message says where and how to go on."""


class StopSwitch:
    """Listens, inside `with`, for USR1 and TERM; the rank with a `folder` also looks for its stop file and at the time,
    of which there are `seconds` from now on."""

    def __init__(self, folder: Path | None, seconds: float | None = None) -> None:
        self._file = folder / STOP_FILE if folder is not None else None
        self._end = time.monotonic() + seconds if folder is not None and seconds is not None else None
        self._signal: str | None = None
        self._launchers = _launchers()

    def asked(self) -> str | None:
        """What asks for the end, if anything does."""
        if self._signal:
            return self._signal
        # A DeepSpeed runner that is ended by TERM leaves its launcher behind, and that one its ranks.
        if self._launchers != _launchers()[: len(self._launchers)]:
            return "the launcher has ended"
        if self._end is not None and time.monotonic() > self._end:
            return "run.max_hours are over"
        with suppress(OSError):  # a file system that is away for a moment
            if self._file is not None and self._file.exists():
                return f"the file {self._file}"
        return None

    def clear(self) -> None:
        """Remove the stop file, which has done its duty once the run is saved."""
        if self._file is not None:
            with suppress(OSError):
                self._file.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._hear) for number in (signal.SIGUSR1, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        self._signal = signal.Signals(number).name


def _launchers() -> list[int]:
    """Process numbers of DeepSpeed's launcher and runner, as far as they started this process."""
    found, pid = [], os.getppid()
    for _ in range(2):
        try:
            if b"deepspeed" not in Path(f"/proc/{pid}/cmdline").read_bytes():
                break
            found.append(pid)
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:  # no such process any more, or another system
            break
    return found
