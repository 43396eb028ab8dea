"""Which rank is slow: seconds that each of them works by itself, in which it does not wait for others.

Under ZeRO-3 all ranks wait for each other in every layer, so a step takes equally long everywhere. What differs is the
time that a rank waits for its own loader and spends inside its linear layers in the forward pass: their weights are
gathered before they are entered. Cost: two clock readings a linear layer, no collective; on CUDA two events, read when
the step is over.
"""

import time
from collections import deque
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

WINDOW = 100  # steps


class OwnTime:
    """Seconds that this rank spends in the linear layers of `model`; make it behind the engine, whose hooks gather."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self._cuda, self._seconds = device.type == "cuda", 0.0
        self._events: list[tuple[Any, Any]] = []
        self._began: Any = None
        self._linear = [module for module in model.modules() if isinstance(module, nn.Linear)]
        self._handles: list[Any] = []
        self.open()

    def open(self) -> None:
        """Put the clocks on."""
        for module in self._linear:
            self._handles += [module.register_forward_pre_hook(self._begin), module.register_forward_hook(self._end)]

    def take(self) -> float:
        """The seconds since the last call."""
        if self._cuda and self._events:
            self._events[-1][1].synchronize()
            self._seconds = sum(began.elapsed_time(ended) for began, ended in self._events) / 1000
            self._events.clear()
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def close(self) -> None:
        """Take the clocks away."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _begin(self, *_: object) -> None:
        self._began = self._now()

    def _end(self, *_: object) -> None:
        now = self._now()
        if self._cuda:
            self._events.append((self._began, now))
        else:
            self._seconds += now - self._began

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Skew:
    """Percentiles of the ranks' own seconds in a step, and of the last steps' lengths."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._lengths: deque[float] = deque(maxlen=WINDOW)

    def slots(self, seconds: float) -> dict[str, float]:
        """A slot for every rank, to be summed over them."""
        return {f"own/{rank}": seconds if rank == self._rank else 0.0 for rank in range(self._size)}

    def numbers(self, totals: Mapping[str, float], step_s: float) -> dict[str, float]:
        """What to log of a step of `step_s` seconds: time/rank_* over ranks, time/step_* over the last WINDOW steps."""
        self._lengths.append(step_s)
        own = np.array([totals[f"own/{rank}"] for rank in range(self._size)])
        found = {"time/slowest_rank": float(own.argmax())} if self._size > 1 else {}
        for name, values in (("rank", own), ("step", np.array(self._lengths))):
            p50, p95 = np.percentile(values, (50, 95))
            found |= {f"time/{name}_p50": float(p50), f"time/{name}_p95": float(p95)}
            found[f"time/{name}_max"] = float(values.max())
        return found
