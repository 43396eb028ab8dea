"""The loss told by the source of the records: sums and counts in slots of the step's own all-reduce.

A rank that meets a new source says so in the counts that are summed before the forward pass; only then names are
gathered, once a source and run. From there on every rank has a slot for it.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from swim.train.batch import Batch
from swim.train.system import Term
from swim.train.world import World

_NEW = "sources/new"


class Sources:
    """The sources that all ranks know of, in an order that all have in common."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def announce(self, batches: Sequence[Batch]) -> dict[str, float]:
        """How many sources of these batches are new, for the sum over ranks before the forward pass."""
        self._own = {name for batch in batches for name in batch.sources}
        return {_NEW: float(len(self._own - {*self.names}))}

    def agree(self, counts: Mapping[str, float], world: World) -> None:
        """Learn new names, where any rank has one; `counts` are those summed."""
        if counts[_NEW]:
            self.names += sorted({name for own in world.gather(self._own) for name in own} - {*self.names})

    def slots(self, batches: Sequence[Batch], losses: Sequence[Mapping[str, Term]]) -> dict[str, float]:
        """Sum and count of every source, for the sum over ranks behind the backward pass."""
        slots = {
            f"sources/{kind}/{term}/{name}": 0.0
            for kind in ("sum", "count")
            for term, part in losses[0].items()
            if part.units is not None
            for name in self.names
        }
        for batch, loss in zip(batches, losses):
            for term, part in loss.items():
                if part.units is None or part.conversations is None or not batch.sources:
                    continue
                sums, counts = _by_conversation(part.units, part.conversations, len(batch.sources))
                for name, total, count in zip(batch.sources, sums, counts):
                    slots[f"sources/sum/{term}/{name}"] += total
                    slots[f"sources/count/{term}/{name}"] += count
        return slots

    def numbers(self, totals: Mapping[str, float]) -> dict[str, float]:
        """loss/TERM/SOURCE, the mean over its units, and count/TERM/SOURCE, of the sources that the step has."""
        found: dict[str, float] = {}
        for name, count in totals.items():
            if name.startswith("sources/count/") and count:
                short = name.removeprefix("sources/count/")
                found |= {f"loss/{short}": totals[f"sources/sum/{short}"] / count, f"count/{short}": count}
        return found


def _by_conversation(units: Tensor, conversations: Tensor, num: int) -> tuple[list[float], list[float]]:
    # On the host: there is one number a token, and on a GPU the order of such sums is not fixed.
    of, values = conversations.cpu(), units.cpu().double()
    sums = torch.zeros(num, dtype=torch.float64).index_add_(0, of, values)
    return sums.tolist(), torch.bincount(of, minlength=num).double().tolist()
