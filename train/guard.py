"""Whether a step may change the weights: decided from the step's loss, alike on every rank, before the optimizer runs.

A loss or gradient that is not finite, or a loss far outside what the last steps had (median + k MAD), refuses the step:
nothing is updated, and the ids of its samples are written. Cost: nothing; the loss is summed over ranks in any case.
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from swim.train.config import GuardConfig

_MAD_TO_SIGMA = 1.4826  # of a normal distribution


class Refusal(NamedTuple):
    """Why a step changes nothing."""

    reason: str
    spike: bool = False


class Guard:
    """Judges losses; `state` holds the arguments with which a resumed run judges alike."""

    def __init__(self, config: GuardConfig, losses: Sequence[float] = (), refused: int = 0) -> None:
        self.config = config
        self.refused = refused  # steps in a row
        self._window: deque[float] = deque(losses, maxlen=config.spike_window)

    @property
    def losses(self) -> list[float]:
        """The losses that the next one is compared with, oldest first."""
        return list(self._window)

    @property
    def state(self) -> dict[str, Any]:
        """Keyword arguments of a guard that goes on from here."""
        return {"losses": self.losses, "refused": self.refused}

    def verdict(self, loss: float) -> Refusal | None:
        """Why the step of this loss must not change the weights; None if it may."""
        if not math.isfinite(loss):
            return Refusal("the loss is not finite")
        limit = self.limit()
        if self.config.spike != "none" and loss > limit:
            return Refusal(f"the loss {loss:.4g} is a spike: the limit is {limit:.4g}", spike=True)
        return None

    def limit(self) -> float:
        """Median + `spike_deviations` robust standard deviations of the window; infinite until it is full."""
        if len(self._window) < self.config.spike_window:
            return math.inf
        median = statistics.median(self._window)
        deviation = _MAD_TO_SIGMA * statistics.median(abs(loss - median) for loss in self._window)
        # A loss that has settled moves less than it is known to.
        return median + self.config.spike_deviations * max(deviation, 1e-3 * abs(median))

    def note(self, loss: float, *, applied: bool) -> None:
        """Count a step; only what was applied is compared with."""
        self.refused = 0 if applied else self.refused + 1
        if applied:
            self._window.append(loss)
