"""What the benchmarks measure with: ways that take turns, tensors alive at once, floors, result files."""

import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

MIB = 2**20
RESULTS = Path(__file__).parent / "results"
SHORTEST_TURN = 0.2  # seconds; a way that takes less is repeated within its turn


class PeakMemory:
    """Bytes of tensors alive at once on the CPU, as its allocator saw them: what was made inside and not yet freed."""

    def __enter__(self) -> Self:
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._profile.__exit__(*error)
        with tempfile.TemporaryDirectory() as folder:
            self._profile.export_chrome_trace(f"{folder}/trace.json")
            trace = json.loads(Path(f"{folder}/trace.json").read_text())["traceEvents"]
        events = sorted((e for e in trace if e["name"] == "[memory]"), key=lambda e: (e["ts"], e["args"]["Ev Idx"]))
        self._changes = [(e["args"]["Addr"], e["args"]["Bytes"]) for e in events]

    def peak(self, *without: Tensor) -> int:
        """Most bytes alive at once, those of the given tensors (results that any way has to return) left out."""
        last = {x.untyped_storage().data_ptr() for x in without}
        left_out = {max(i for i, (place, size) in enumerate(self._changes) if place == p and size > 0) for p in last}
        alive: dict[int, int] = {}
        most = 0
        for number, (place, size) in enumerate(self._changes):
            if size < 0:
                alive.pop(place, None)  # or it was made before
            elif number not in left_out:
                alive[place] = size
                most = max(most, sum(alive.values()))
        return most


def in_turns(benchmark: Any, ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every way in every round. All ways run in each round, every other round in reverse, so that a busy
    machine disturbs all of them alike; what pytest-benchmark times is a whole round."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    orders = [list(ways), list(ways)[::-1]]

    def one_round() -> None:
        for name in orders[0]:
            began, count = time.perf_counter(), 0
            while (spent := time.perf_counter() - began) < SHORTEST_TURN or not count:
                ways[name]()
                count += 1
            seconds[name].append(spent / count)
        orders.reverse()

    benchmark.pedantic(one_round, rounds=rounds, warmup_rounds=1)
    return {name: times[1:] for name, times in seconds.items()}


def ratios(times: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    """Median and quartiles of the ratios within the rounds."""
    quartiles = statistics.quantiles([a / b for a, b in zip(times, base)], n=4, method="inclusive")
    return {"median": quartiles[1], "quartiles": [quartiles[0], quartiles[2]], "rounds": len(times)}


class Ceilings(NamedTuple):
    """What a device was measured to do in a second."""

    bytes: float  # copied: read and written
    flops: float  # of a bf16 matrix product
    specials: float  # base-2 logarithms and reciprocals


class Work(NamedTuple):
    """The least that a computation has to do."""

    bytes: float
    flops: float
    specials: float

    def floor_us(self, ceilings: Ceilings) -> float:
        """Microseconds below which no version can come: the largest of the three."""
        return 1e6 * max(self.bytes / ceilings.bytes, self.flops / ceilings.flops, self.specials / ceilings.specials)


def floor_us(works: Iterable[Work], ceilings: Ceilings) -> float:
    """Of works that have to follow each other."""
    return sum(work.floor_us(ceilings) for work in works)


def machine() -> dict[str, Any]:
    """Where and when a result was measured."""
    found: dict[str, Any] = {"date": datetime.now(UTC).date().isoformat(), "device": _processor(), "versions": {}}
    if torch.cuda.is_available():
        found["device"] = torch.cuda.get_device_name()
        found["multiprocessors"] = torch.cuda.get_device_properties(0).multi_processor_count
    else:
        found["threads"] = torch.get_num_threads()
    for name in ("torch", "triton", "transformers"):
        try:
            found["versions"][name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def write_result(name: str, result: Mapping[str, Any]) -> None:
    """One JSON file in $OUT, or in benchmarks/results."""
    folder = Path(os.environ.get("OUT") or RESULTS)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({**machine(), **result}, indent=1) + "\n")
