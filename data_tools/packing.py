"""Packs of at most so many tokens, and steps whose packs cost about the same, from numbers of tokens alone."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from swim.data_tools.mixture import STEPS, DataSet, PlanError, PlanOptions, Streams, Units, wanted

# Units packed together. First-fit-decreasing needs many small ones for the last gaps: on log-normal lengths, windows of
# 256 units leave 1.7 % of the tokens empty, of 1024 0.6 %, of 4096 0.25 %. The time for units of a whole pack each, the
# worst case, grows with the window.
PACK_WINDOW = 1024
# Packs among which a step finds neighbours in cost, and the least number of steps. With 32 packs a step on 32 ranks and
# log-normal lengths, the costliest rank is 3.3 % above the mean with 256 packs, 1.0 % with 1024.
BALANCE_WINDOW, BALANCE_STEPS = 1024, 16


@dataclass(frozen=True)
class Lengths:
    """Tokens of the C conversations of a data set: `prefix` up to the end of the clip, 0 without one, and `branch`
    behind it; both 0 for what cannot be used. Neighbours of a clip with the same `group` may share their prefix.

    `vision` (N,) is the cost of each clip's vision pass.
    """

    prefix: np.ndarray
    branch: np.ndarray
    group: np.ndarray
    vision: np.ndarray

    @cached_property
    def digest(self) -> str:
        """SHA-256 of all numbers."""
        arrays = (self.prefix, self.branch, self.group, self.vision)
        kinds = (np.int64, np.int64, np.int64, np.float64)
        return hashlib.sha256(b"".join(np.asarray(a, k).tobytes() for a, k in zip(arrays, kinds))).hexdigest()


@dataclass(frozen=True)
class TokenModel:
    """What a model makes of the data: tokens per data set, and the cost of a pack in floating-point operations.

    cost = sum of `vision` over clips + `linear` x tokens + `pair` x (query, key) pairs of causal attention. `dummy` is
    the number of tokens added to a pack without a clip; `tokenizer` is a digest of what makes tokens of text.
    """

    lengths: tuple[Lengths, ...]
    shared_prefix: bool
    dummy: int
    linear: float
    pair: float
    tokenizer: str


class Counted:
    """Tokens and costs of units: the lengths of all data sets behind each other."""

    def __init__(self, data: Sequence[DataSet], tokens: TokenModel) -> None:
        self.dummy, self.shared = tokens.dummy, tokens.shared_prefix
        self.linear, self.pair = tokens.linear, tokens.pair
        self.first = np.cumsum([0, *(len(one.facts.counts) for one in data[:-1])])  # clip of each data set
        sizes = [one.facts.bounds[-1] for one in data]
        self.bounds = np.concatenate([one.facts.bounds[:-1] + at for one, at in zip(data, np.cumsum([0, *sizes]))])
        self.prefix, self.branch, self.group = (
            np.concatenate([getattr(lengths, name) for lengths in tokens.lengths]).astype(np.int64)
            for name in ("prefix", "branch", "group")
        )
        self.vision = np.concatenate([lengths.vision for lengths in tokens.lengths])

    def conversations(self, units: Units) -> tuple[np.ndarray, ...]:
        """For the conversations of units (F,): the unit, prefix, branch, and whether the prefix is laid out anew."""
        unit = np.repeat(np.arange(len(units)), units.count)
        number = np.repeat(self.bounds[self.first[units.dataset] + units.clip], units.count) + units.conversation
        prefix, branch, group = self.prefix[number], self.branch[number], self.group[number]
        own = np.ones(len(unit), dtype=bool)
        if self.shared:
            used = np.flatnonzero(prefix + branch)  # what cannot be used separates no neighbours
            same = (unit[used][1:] == unit[used][:-1]) & (group[used][1:] == group[used][:-1])
            own[used[1:]] = ~same
        return unit, prefix, branch, own

    def check(self, data: Sequence[DataSet], tasks: Sequence[str] | None, budget: int) -> None:
        """PlanError if a conversation of these tasks is longer than a pack, also if this epoch does not draw it."""
        alone = self._alone(self.prefix, self.branch) * np.concatenate([wanted(one, tasks) for one in data])
        if alone.max(initial=0) <= budget:
            return
        worst, others = int(alone.argmax()), np.count_nonzero(alone > budget) - 1
        clip = int(np.searchsorted(self.bounds, worst, side="right")) - 1
        number = int(np.searchsorted(self.first, clip, side="right")) - 1
        key = f"{data[number].entries[clip - self.first[number]].key}#{worst - self.bounds[clip]}"
        raise PlanError(
            f"{data[number].name}: {key} has {alone[worst]} tokens, {self.prefix[worst]} of them up to the end of its "
            f"clip; data.tokens_per_pack is {budget}, and {others} other conversations are longer as well. Raise it to "
            f"{alone[worst]}, or lower data.max_pixels or data.num_frames"
        )

    def _alone(self, prefix: np.ndarray, branch: np.ndarray) -> np.ndarray:
        """Tokens of a pack with this conversation alone, 0 for what cannot be used."""
        return prefix + branch + np.where((prefix == 0) & (branch > 0), self.dummy, 0)

    def split(self, units: Units, budget: int) -> Units:
        """A unit longer than a pack becomes several of the same clip, each with the next conversations that fit."""
        unit, prefix, branch, own = self.conversations(units)
        alone, size = self._alone(prefix, branch), branch + own * prefix
        of_unit = np.bincount(unit, size, len(units)) + self.dummy * (np.bincount(unit, prefix, len(units)) == 0)
        piece = np.zeros(len(unit), dtype=np.int64)
        starts = np.cumsum(units.count) - units.count
        for long in np.flatnonzero(of_unit > budget):
            number, left = 0, None
            for at in range(starts[long], starts[long] + units.count[long]):
                if alone[at]:
                    fits = left is not None and size[at] <= left
                    number += left is not None and not fits
                    left = left - size[at] if fits else budget - alone[at]
                piece[at] = number
        new = np.flatnonzero(np.diff(unit, prepend=-1) | np.diff(piece, prepend=0))
        count = np.diff(new, append=len(unit))
        dataset, clip, copy = (x[unit[new]] for x in (units.dataset, units.clip, units.copy))
        return Units(dataset, clip, copy, count, units.conversation)

    def units(self, units: Units) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(U,) tokens, cost, and whether the unit shows a clip."""
        unit, prefix, branch, own = self.conversations(units)
        pairs = branch * (prefix + branch / 2) + own * prefix**2 / 2
        size, pairs, seen = (np.bincount(unit, x, len(units)) for x in (branch + own * prefix, pairs, prefix > 0))
        vision = np.where(seen, self.vision[self.first[units.dataset] + units.clip], 0)
        return size.astype(np.int64), vision + self.linear * size + self.pair * pairs, seen > 0

    def packs(self, units: Units, pack: np.ndarray, num_packs: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and costs of packs, which have a dummy clip, behind one token at least, where they have no other."""
        size, cost, seen = (np.bincount(pack, x, num_packs) for x in self.units(units))
        size += (seen == 0) * (self.dummy + (size == 0))
        return size.astype(np.int64), cost


def first_fit(size: np.ndarray, alone: np.ndarray, budget: int) -> np.ndarray:
    """(U,) pack of every unit: first-fit-decreasing in windows of PACK_WINDOW units, all windows at once.

    `alone` is what a pack that the unit opens needs beside its tokens.
    """
    windows = -(-len(size) // PACK_WINDOW)
    padded = np.zeros((2, windows * PACK_WINDOW), dtype=np.int64)
    padded[0, : len(size)], padded[1, : len(size)] = size, alone
    sizes, extra = padded.reshape(2, windows, PACK_WINDOW)
    order = np.argsort(-sizes, axis=1, kind="stable")
    window = np.arange(windows)
    space = np.full((windows, 1), budget)
    pack = np.empty((windows, PACK_WINDOW), dtype=np.int64)
    for unit in order.T:
        own = sizes[window, unit]
        if (space[:, -1] != budget).any():  # every window has an untouched pack left
            space = np.concatenate([space, np.full((windows, space.shape[1]), budget)], 1)
        found = (space >= own[:, None]).argmax(1)
        space[window, found] -= own + np.where(space[window, found] == budget, extra[window, unit], 0)
        pack[window, unit] = found
    pack = (pack + window[:, None] * (space.shape[1] + 1)).reshape(-1)[: len(size)]
    return np.unique(pack, return_inverse=True)[1].reshape(-1)


def balanced(costs: np.ndarray, options: PlanOptions, rng: Streams) -> np.ndarray:
    """New place of each pack: inside a window the costliest first, cut into steps, and the steps shuffled.

    Rank r of W takes packs r, r + W, ... of a step: for any W its sum differs from another rank's by less than the
    step's costliest and cheapest pack differ, and the ranks' first packs, second packs, ... are neighbours too.
    """
    size = options.packs_per_step
    window = np.arange(len(costs)) // (size * max(BALANCE_STEPS, -(-BALANCE_WINDOW // size)))
    order = np.lexsort((-costs, window))
    num_steps = -(-len(costs) // size)
    key = rng(STEPS).random(num_steps) if options.shuffle else np.zeros(num_steps)
    if len(costs) % size:
        key[-1] = 2  # the step with fewer packs stays the last
    steps = np.lexsort((key, window[np.arange(num_steps) * size]))
    packs = (steps[:, None] * size + np.arange(size)).reshape(-1)
    place = np.empty(len(costs), dtype=np.int64)
    place[order[packs[packs < len(costs)]]] = np.arange(len(costs))
    return place
