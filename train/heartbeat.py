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
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from swim.train.stop import Stopped

FOLDER, FAILED = "ranks", "failed.json"
EVERY_S = 5.0
HUNG_CODE = 86
_PATIENT = ("start", "save", "load")  # phases that may take as long as a first step


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

    def __init__(self, run: Path, rank: int, size: int, *, limit_s: float, start_limit_s: float) -> None:
        self._run, self._folder, self._rank, self._size = run, run / FOLDER, rank, size
        self._limit_s, self._start_limit_s = limit_s, start_limit_s
        self._every_s = min(EVERY_S, limit_s / 4)
        self._now = ("start", 0, time.time(), time.monotonic())
        self._first_step: int | None = None
        self._end = threading.Event()
        # Two threads: the one that writes may hang with the file system, and the other must see it.
        self._threads = [
            threading.Thread(target=work, name=work.__name__.strip("_"), daemon=True)
            for work in (self._write_on, self._watch)
        ]

    def phase(self, name: str, step: int) -> None:
        """Note what begins now."""
        self._now = (name, step, time.time(), time.monotonic())
        if self._first_step is None and name != "start":
            self._first_step = step

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True, exist_ok=True)
        self._write()
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        name = "end" if kind is None else f"end by {kind.__name__}"
        self.phase(name, self._now[1])
        self._end.set()
        if kind is not None and not issubclass(kind, Stopped):
            # A launcher that ends the other ranks waits long for those that are in a collective.
            with suppress(OSError):
                (self._folder / FAILED).write_text(json.dumps({"rank": self._rank, "error": kind.__name__}))
        for thread in self._threads:
            thread.join(timeout=5)

    def _write_on(self) -> None:
        while not self._end.wait(self._every_s):
            self._write()
        self._write()

    def _watch(self) -> None:
        while not self._end.wait(self._every_s):
            phase, step, _, since = self._now
            patient = phase in _PATIENT or self._first_step in (None, step)
            limit = self._start_limit_s if patient else self._limit_s
            if time.monotonic() - since > limit:
                self._give_up(phase, f"{limit:g} s (guard.{'start_s' if patient else 'hang_s'})")
            with suppress(OSError):
                failed = (self._folder / FAILED).read_text()
                if not self._end.wait(self._every_s):  # else this rank has noticed by itself
                    print(f"rank {self._rank}: leaves, since another one has failed: {failed}", flush=True)
                    os._exit(1)

    def _write(self) -> None:
        phase, step, since, _ = self._now
        beat = Beat(self._rank, socket.gethostname(), os.getpid(), step, phase, since, time.time())
        # Written in place: a reader may see a torn line, and looks again later. A full disk must not end the run.
        try:
            (self._folder / f"rank_{self._rank:05d}.json").write_text(json.dumps(vars(beat)) + "\n")
        except OSError as error:
            print(f"rank {self._rank}: heartbeat not written ({error})", flush=True)

    def _give_up(self, phase: str, limit: str) -> None:
        # Whatever the file system does to the rest.
        last = threading.Timer(4 * self._every_s + 1, os._exit, [HUNG_CODE])
        last.daemon = True
        last.start()
        path = self._folder / f"stacks_{self._rank:05d}.txt"
        print(f"rank {self._rank}: {phase!r} takes longer than {limit}: {path}", flush=True)
        with suppress(OSError):
            with path.open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
            before = read_beats(self._run)
            time.sleep(2 * self._every_s)
            # The first of those that still write speaks for all.
            if self._rank == min(alive(before, read_beats(self._run)), default=self._rank):
                for line in diagnose(self._run, self._size, before=before):
                    print(line, flush=True)
        os._exit(HUNG_CODE)


def read_beats(run: Path) -> list[Beat]:
    """What the ranks of a run last said, by rank; without those whose file is torn or missing."""
    beats = []
    for path in sorted((run / FOLDER).glob("rank_*.json")):
        try:
            beats.append(Beat(**json.loads(path.read_text())))
        except (ValueError, TypeError, OSError):
            continue
    return beats


def alive(before: Sequence[Beat], after: Sequence[Beat]) -> list[int]:
    """Ranks that have written between two readings; no clock is compared with that of another machine."""
    then = {beat.rank: beat.written for beat in before}
    return [beat.rank for beat in after if beat.written != then.get(beat.rank)]


def diagnose(
    run: Path,
    size: int | None = None,
    *,
    before: Sequence[Beat] | None = None,
    silent_s: float = 3 * EVERY_S,
    now: float | None = None,
) -> list[str]:
    """Lines that name the silent ranks of a run of `size`, or else the one furthest behind; [] if there is nothing to
    say.

    Silent are those that have not written since the reading `before`, without one those not heard of for `silent_s`
    before the time `now`.
    """
    beats = [beat for beat in read_beats(run) if size is None or beat.rank < size]
    if not beats:
        return [f"{run / FOLDER}: no rank has written anything"]
    now = time.time() if now is None else now
    missing = sorted(set(range(size or 0)) - {beat.rank for beat in beats})
    lines = [f"rank {rank}: has never written anything" for rank in missing]
    running = [beat for beat in beats if not beat.phase.startswith("end")]
    heard = alive(before, beats) if before is not None else [b.rank for b in beats if now - b.written <= silent_s]
    lines += [f"silent: {beat.described(now)}" for beat in running if beat.rank not in heard]
    if not lines and running:
        # Those that wait in a collective entered their phase last; the one they wait for is at an earlier place.
        behind = min(running, key=lambda beat: (beat.step, beat.since))
        lines.append(f"furthest behind: {behind.described(now)}")
    return lines
