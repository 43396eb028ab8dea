"""A few steps under torch.profiler: a trace for chrome://tracing or Perfetto and a table of the top operators, per
rank, in the run folder; nothing outside its window."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from swim.train.config import ProfileConfig
from swim.train.world import World

FOLDER = "profile"
TOP = 30  # operators
_MAX_ENTRIES = 100_000  # allocations in a snapshot


class Profiler:
    """Records the steps that `asked` names, if this rank is among those that it names."""

    def __init__(self, asked: ProfileConfig | None, run: Path, world: World) -> None:
        self._asked = asked if asked is not None and world.rank in asked.ranks else None
        self._folder, self._rank, self._cuda = run / FOLDER, world.rank, world.device.type == "cuda"
        self._profile: Any = None
        self._first = 0

    @contextmanager
    def step(self, step: int) -> Iterator[None]:
        """Around step `step` (from 1); a run that resumes inside the window records what is left of it."""
        if self._asked is None or not self._asked.start <= step < self._asked.start + self._asked.steps:
            yield
            return
        if self._profile is None:
            self._begin(step)
        with torch.profiler.record_function(f"step {step}"):
            yield
        if step == self._asked.start + self._asked.steps - 1:
            self.close(step)

    def close(self, step: int) -> None:
        """Write what was recorded up to `step`, if anything was; a full disk is said and ends nothing."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        recorded.stop()
        name = f"rank_{self._rank:05d}_steps_{self._first}-{step}"
        try:
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(self._folder / f"{name}.json.gz"))
            by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
            table = recorded.key_averages().table(sort_by=by, row_limit=TOP, max_name_column_width=60)
            (self._folder / f"{name}.txt").write_text(table + "\n")
            if self._snapshots:
                torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.memory.pickle"))
        except (OSError, RuntimeError) as error:  # kineto raises either where it cannot write
            print(f"rank {self._rank}: profile of steps {self._first}-{step} not written: {error}", flush=True)
        finally:
            if self._snapshots:
                torch.cuda.memory._record_memory_history(enabled=None)

    @property
    def _snapshots(self) -> bool:
        return self._cuda and self._asked is not None and self._asked.memory

    def _begin(self, step: int) -> None:
        assert self._asked is not None
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        self._first = step
        if self._snapshots:
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ENTRIES)
        self._profile = profile(activities=activities, profile_memory=self._asked.memory)
        self._profile.start()
