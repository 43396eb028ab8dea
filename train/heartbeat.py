"""Every rank says where it is, and a rank that gets no further ends the job instead of waiting for ever.

`RUN/ranks/rank_00000.json` holds step, phase, since when, and when it was written; a thread writes it, so that a rank
that waits for others can be told from one that is stopped or gone. When a phase takes longer than its limit, every rank
that still runs dumps the stacks of its threads beside it, names the silent ranks, and exits. Cost: a small file written
every few seconds.
"""

import faulthandler
import json
import os
import socket
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Self

FOLDER = "ranks"
EVERY_S = 5.0
HUNG_CODE = 86
_PATIENT = ("start", "save")  # phases that may take as long as a first step


@dataclass(frozen=True)
class Beat:
    """What one rank last said; times in s since the epoch."""

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    since: float
    written: float

    def described(self, now: float) -> str:
        """The rank in words."""
        return (
            f"rank {self.rank} on {self.host} (process {self.pid}): step {self.step}, {self.phase} for "
            f"{now - self.since:.0f} s, last heard of {now - self.written:.0f} s ago"
        )


class Heartbeat:
    """Context in which `phase(name, step)` is noted for rank `rank` of `size`; `limit_s` is the longest phase from the
    second step on, `start_limit_s` the longest before it and for saving."""

    def __init__(self, folder: Path, rank: int, size: int, *, limit_s: float, start_limit_s: float) -> None:
        self._folder, self._rank, self._size = folder / FOLDER, rank, size
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._now = ("start", 0, time.time())
        self._first_step: int | None = None
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def phase(self, name: str, step: int) -> None:
        """Note what begins now."""
        self._now = (name, step, time.time())
        if self._first_step is None and name != "start":
            self._first_step = step

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self.phase("end" if kind is None else f"end by {kind.__name__}", self._now[1])
        self._write()

    def _beat(self) -> None:
        while not self._end.wait(min(EVERY_S, self._limit_s / 4)):
            self._write()
            phase, step, since = self._now
            patient = phase in _PATIENT or self._first_step in (None, step)
            limit = self._start_limit_s if patient else self._limit_s
            if time.time() - since > limit:
                self._give_up(phase, limit)

    def _write(self) -> None:
        phase, step, since = self._now
        beat = Beat(self._rank, socket.gethostname(), os.getpid(), step, phase, since, time.time())
        # Written in place: a reader may see a torn line, and looks again later. A full disk must not end the run.
        try:
            (self._folder / f"rank_{self._rank:05d}.json").write_text(json.dumps(vars(beat)) + "\n")
        except OSError as error:
            print(f"rank {self._rank}: heartbeat not written ({error})", flush=True)

    def _give_up(self, phase: str, limit: float) -> None:
        path = self._folder / f"stacks_{self._rank:05d}.txt"
        with path.open("w") as file:
            faulthandler.dump_traceback(file, all_threads=True)
        print(f"rank {self._rank}: {phase!r} takes longer than {limit:g} s (guard.hang_s): {path}", flush=True)
        time.sleep(min(EVERY_S, self._limit_s / 4))  # until the others have written that they wait as well
        if self._rank == min(self._waiting(), default=self._rank):
            for line in diagnose(self._folder.parent, self._size, silent_s=self._silent_s()):
                print(line, flush=True)
        os._exit(HUNG_CODE)

    def _silent_s(self) -> float:
        return 3 * min(EVERY_S, self._limit_s / 4)

    def _waiting(self) -> list[int]:
        now = time.time()
        return [beat.rank for beat in read_beats(self._folder.parent) if now - beat.written < self._silent_s()]


def read_beats(run: Path) -> list[Beat]:
    """What the ranks of a run last said, by rank; without those whose file is torn or missing."""
    beats = []
    for path in sorted((run / FOLDER).glob("rank_*.json")):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except (ValueError, TypeError, OSError):
            continue
    return beats


def diagnose(
    run: Path, size: int | None = None, *, silent_s: float = 3 * EVERY_S, now: float | None = None
) -> list[str]:
    """Lines that name the silent ranks of a run, or else the ones furthest behind; [] if there is nothing to say.

    `now` is the time to judge from; on a file system whose clock is another, the newest beat is a good one.
    """
    beats = read_beats(run)
    if not beats:
        return [f"{run / FOLDER}: no rank has written anything"]
    now = time.time() if now is None else now
    lines = []
    missing = sorted(set(range(size or 0)) - {beat.rank for beat in beats})
    lines += [f"rank {rank}: has never written anything" for rank in missing]
    running = [beat for beat in beats if not beat.phase.startswith("end")]
    lines += [f"silent: {beat.described(now)}" for beat in running if now - beat.written > silent_s]
    if not lines and running:
        # Those that wait in a collective entered their phase last; the one they wait for is at an earlier place.
        behind = min(running, key=lambda beat: (beat.step, beat.since))
        lines.append(f"furthest behind: {behind.described(now)}")
    return lines
