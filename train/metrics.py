"""What a run says: metrics.jsonl always, other sinks when asked; a progress bar on a terminal, else plain lines."""

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from swim.data_tools.files import write_whole
from swim.train.config import Config
from swim.train.sinks import Sinks
from swim.train.stop import Stopped

METRICS_FILE = "metrics.jsonl"
PARTS_FILE = "parts.jsonl"  # a line for every start of a run
PLAIN_EVERY_S = 10.0


class Metrics:
    """Appends one JSON line per logged step and shows progress; only the main rank makes one that writes.

    With a `config` the other sinks that it asks for get the same numbers.
    """

    def __init__(self, path: Path | None, *, start: int, steps: int, config: Config | None = None) -> None:
        self._path = path
        self._console = Console()
        self._sinks = Sinks(config, start, self._say) if path and config else None
        self._start, self._steps, self._began, self._said = start, steps, time.perf_counter(), 0.0
        self._progress: Progress | None = None
        if path and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            self._progress = Progress(*columns, console=self._console)
            self._task = self._progress.add_task("train", total=steps, completed=start)
            self._progress.start()

    def log(self, step: int, values: dict[str, float]) -> None:
        """Note step `step` (from 1)."""
        if self._path is None:
            return
        try:
            append_jsonl(self._path, [{"step": step, **{name: _short(value) for name, value in values.items()}}])
        except OSError as error:  # a full disk, which the next checkpoint may outlive
            self._say(f"step {step} is missing in {METRICS_FILE}: {error}")
        if self._sinks:
            self._sinks.log(step, {name: value for name, value in values.items() if math.isfinite(value)})
        # Without those of single sources.
        shown = [name for name in values if name.startswith("loss/") and name.count("/") == 1]
        shown += ["lr", "tokens_per_s", "data_wait", "peak_memory_mib"]
        text = "  ".join(f"{name} {values[name]:.4g}" for name in shown)
        if values["holes"]:
            self._say(f"step {step}: {values['holes']:.0f} conversations could not be read, see quarantine.jsonl")
        if probed := [f"{name} {value:.4g}" for name in ("pointing", "mass") if (value := values.get(f"probe/{name}"))]:
            self._say(f"step {step}: probe {'  '.join(probed)}")
        if self._progress:
            self._progress.update(self._task, completed=step, description=text)
        elif (now := time.perf_counter()) - self._said > PLAIN_EVERY_S or step == self._steps:
            self._said = now
            left = (now - self._began) / max(step - self._start, 1) * (self._steps - step)
            print(f"step {step}/{self._steps}  {text}  remaining {left:.0f} s", flush=True)

    def _say(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._progress:
            self._progress.stop()
        if self._sinks:
            self._sinks.close(failed=kind is not None and not issubclass(kind, Stopped))


def peak_memory_mib(device: torch.device) -> float:
    """Peak memory of this process so far in MiB: allocated by torch on a GPU, resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)


def append_jsonl(path: Path, lines: list[dict[str, Any]]) -> None:
    """Append lines to a JSONL file; does not create it for nothing."""
    if lines:
        with path.open("a") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Lines of a JSONL file, without those cut off while they were written; none if it is missing."""
    lines = []
    for line in path.read_bytes().split(b"\n") if path.exists() else ():
        with suppress(ValueError):
            lines.append(json.loads(line))
    return lines


def drop_after(path: Path, step: int) -> None:
    """Drop lines of a JSONL file beyond `step`, and a torn last line: what a resumed run does again is then said
    once."""
    if not path.exists():
        return
    write_whole(path, "".join(json.dumps(line) + "\n" for line in read_jsonl(path) if line["step"] <= step))


def _short(value: float) -> float | None:
    # JSON has no NaN and no infinity.
    return float(f"{value:.9g}") if math.isfinite(value) else None
