"""What a step says about itself beside its loss: loss by source, operations a second, and which rank is slow.

All of it rides in the two all-reduces that a step has in any case.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from swim.train.batch import Batch
from swim.train.config import Config
from swim.train.flops import StepFlops, peak_flops
from swim.train.skew import OwnTime, Skew
from swim.train.sources import Sources
from swim.train.system import System, Term
from swim.train.world import World


class Watch:
    """Looks at steps of `engine` and changes nothing in them."""

    def __init__(self, config: Config, system: System, engine: Any, world: World) -> None:
        self._world, self._shared = world, config.parallel.sequence
        self._flops = StepFlops(engine.module, system.model_config)
        self._peak = peak_flops(world.device, config.model.dtype)
        self._sources, self._skew = Sources(), Skew(world.rank, world.size)
        self.own = OwnTime(engine.module, world.device)

    def before(self, batches: Sequence[Batch]) -> dict[str, float]:
        """For the sum over ranks before the forward pass, from batches that are still in main memory."""
        self.own.take()  # what a probe took is no part of this step
        flops = sum(self._flops.of(batch) for batch in batches) / self._shared
        return {"flops": flops, **self._sources.announce(batches)}

    def agree(self, counts: Mapping[str, float]) -> None:
        """Take in what the ranks said before the forward pass."""
        self._sources.agree(counts, self._world)

    def after(self, batches: Sequence[Batch], losses: Sequence[Mapping[str, Term]], waited: float) -> dict[str, float]:
        """For the sum over ranks behind the backward pass; `waited` are this rank's seconds for its loader."""
        return self._sources.slots(batches, losses) | self._skew.slots(waited + self.own.take())

    def numbers(self, sums: Mapping[str, float], step_s: float) -> dict[str, float]:
        """What to log of a step of `step_s` seconds; mfu is NaN where no peak is known."""
        rate = sums["flops"] / step_s / self._world.size
        mfu = rate / self._peak if math.isfinite(self._peak) else math.nan
        numbers = {"tflops": rate / 1e12, "mfu": mfu}
        return numbers | self._sources.numbers(sums) | self._skew.numbers(sums, step_s)
