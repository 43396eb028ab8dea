"""Which clips an epoch has, how often each, with which conversations, and in which order: before they become packs.

Every random draw comes from Philox, which is counter-based: the same on every platform, with seed and epoch as its key
and no state.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swim.data_tools.facts import Facts
from swim.data_tools.index import Entry

_SHUFFLE, _DRAW, _REPEAT, STEPS, _SHARDS = range(5)  # what a random stream is for


class PlanError(ValueError):
    """A plan cannot be made, or a saved position belongs to another plan."""


@dataclass(frozen=True)
class DataSet:
    """A part of the mixture: its index facts, and how often its clips come in an epoch, `repeat` times or in
    `proportion` to the other sets; `name` and `entries` are for messages."""

    name: str
    digest: str
    facts: Facts
    entries: Sequence[Entry]
    repeat: float = 1.0
    proportion: float | None = None


@dataclass(frozen=True)
class PlanOptions:
    """How an epoch becomes packs and steps; the fields of `data:` and `run:` of the same names.

    ValueError for impossible sizes, and unless exactly one of `clips_per_pack` and `tokens_per_pack` is given.
    """

    packs_per_step: int
    seed: int
    clips_per_pack: int | None = None
    tokens_per_pack: int | None = None
    tasks: tuple[str, ...] | None = None
    max_conversations: int | None = None
    shuffle: bool = True
    shuffle_shards: int | None = None

    def __post_init__(self) -> None:
        if (self.clips_per_pack is None) == (self.tokens_per_pack is None):
            found = f"clips_per_pack {self.clips_per_pack} and tokens_per_pack {self.tokens_per_pack}"
            raise ValueError(f"{found}: give exactly one of them")
        for name in ("packs_per_step", "clips_per_pack", "tokens_per_pack", "max_conversations", "shuffle_shards"):
            if (size := getattr(self, name)) is not None and size < 1:
                raise ValueError(f"{name} is {size}, must be at least 1")


class Streams:
    """Independent random streams of one epoch."""

    def __init__(self, seed: int, epoch: int) -> None:
        self.seed, self.epoch = seed, epoch

    def __call__(self, purpose: int) -> np.random.Generator:
        """The stream of this epoch for one purpose."""
        return np.random.Generator(np.random.Philox(key=[self.seed, self.epoch], counter=[0, 0, 0, purpose]))

    def of_run(self, dataset: int) -> np.random.Generator:
        """The stream of the whole run for a data set's repetitions."""
        return np.random.Generator(np.random.Philox(key=[self.seed, dataset], counter=[0, 0, 0, _REPEAT]))


@dataclass(frozen=True)
class Units:
    """Units as arrays (U,): data set, clip, copy of the clip in this epoch, and `count` conversations each, which lie
    behind each other in `conversation` (F,)."""

    dataset: np.ndarray
    clip: np.ndarray
    copy: np.ndarray
    count: np.ndarray
    conversation: np.ndarray

    def __len__(self) -> int:
        return len(self.clip)

    def take(self, order: np.ndarray) -> "Units":
        """The units in another order."""
        flat = _ranges((np.cumsum(self.count) - self.count)[order], self.count[order])
        dataset, clip, copy, count = (x[order] for x in (self.dataset, self.clip, self.copy, self.count))
        return Units(dataset, clip, copy, count, self.conversation[flat])


def mixture(data: Sequence[DataSet], options: PlanOptions, rng: Streams) -> Units:
    """All units of the epoch, unshuffled: data sets, copies and clips in order."""
    present = {str(name) for one in data for name in one.facts.task_names}
    tasks = present if options.tasks is None else set(options.tasks)
    if not tasks or tasks - present:
        raise PlanError(f"no conversation of task {sorted(tasks - present)}; the data has {sorted(present)}")
    parts = []
    for number, (one, repeat) in enumerate(zip(data, repeats(data, options.tasks))):
        kept = wanted(one, options.tasks)
        counts = _counts(kept, one.facts.bounds)
        clips = np.flatnonzero(counts)
        conversations = np.flatnonzero(kept) - np.repeat(one.facts.bounds[:-1], counts)
        copies = _copies(len(clips), repeat, rng.epoch, rng.of_run(number))
        times = [np.flatnonzero(copies > copy) for copy in range(copies.max(initial=0))]
        copy = np.repeat(np.arange(len(times)), [len(x) for x in times])
        of_set = Units(np.full(len(clips), number), clips, np.zeros_like(clips), counts[clips], conversations)
        of_set = of_set.take(np.concatenate([np.empty(0, np.int64), *times]))
        parts.append((of_set.dataset, of_set.clip, copy, of_set.count, of_set.conversation))
    units = Units(*(np.concatenate(columns) for columns in zip(*parts)))
    return _drawn(units, options, rng)


def shuffled(units: Units, data: Sequence[DataSet], options: PlanOptions, rng: Streams) -> np.ndarray:
    """Order of the units; with `shuffle_shards` a random order of shards, and of units among so many shards."""
    if not options.shuffle:
        return np.arange(len(units))
    order = rng(_SHUFFLE).permutation(len(units))
    if options.shuffle_shards is None:
        return order
    shards = np.concatenate([one.facts.shards for one in data])
    first = np.cumsum([0, *(len(one.facts.counts) for one in data[:-1])])
    # The copies of a shard are read at different times.
    which = (units.copy * len(data) + units.dataset) * (shards.max(initial=0) + 1) + shards[
        first[units.dataset] + units.clip
    ]
    numbers, which = np.unique(which, return_inverse=True)
    which = rng(_SHARDS).permutation(len(numbers))[which]
    return order[np.argsort(which[order] // options.shuffle_shards, kind="stable")]


def wanted(one: DataSet, tasks: Sequence[str] | None) -> np.ndarray:
    """(C,) whether each conversation is of a wanted task."""
    names, numbers = one.facts.task_names, one.facts.tasks
    if tasks is None:
        return np.ones(len(numbers), dtype=bool)
    return np.isin(names, tasks)[numbers]


def repeats(data: Sequence[DataSet], tasks: Sequence[str] | None) -> list[float]:
    """How often the clips of each data set come in an epoch, on average."""
    proportions = [one.proportion for one in data if one.proportion is not None]
    if not proportions:
        return [float(one.repeat) for one in data]
    if len(proportions) < len(data):
        raise ValueError(f"{len(proportions)} of {len(data)} data sets have a proportion; give one to all or to none")
    # An epoch has as many clips as the sets have together.
    sizes = [int(np.count_nonzero(_counts(wanted(one, tasks), one.facts.bounds))) for one in data]
    if empty := [one.name for one, size in zip(data, sizes) if not size]:
        raise PlanError(f"{empty[0]} has a proportion, but no conversation of the wanted tasks; leave it out")
    return [sum(sizes) * share / sum(proportions) / size for share, size in zip(proportions, sizes)]


def _copies(num_clips: int, repeat: float, epoch: int, rng: np.random.Generator) -> np.ndarray:
    """(num_clips,) how often each clip comes in this epoch.

    Floor or ceiling of `repeat`: clip i's count over all epochs up to e is floor(e * repeat + phase i), so after any
    number of epochs no clip is more than one ahead of another, and every epoch has num_clips * repeat units (+-1). The
    phases i / num_clips are dealt out by the seed.
    """
    if repeat == 1:
        return np.ones(num_clips, dtype=np.int64)
    phase = rng.permutation(num_clips) / num_clips
    return (np.floor((epoch + 1) * repeat + phase) - np.floor(epoch * repeat + phase)).astype(np.int64)


def _drawn(units: Units, options: PlanOptions, rng: Streams) -> Units:
    """At most `max_conversations` of every unit: drawn, or the first ones where nothing is shuffled."""
    most = options.max_conversations
    if most is None or units.count.max(initial=0) <= most:
        return units
    unit = np.repeat(np.arange(len(units)), units.count)
    place = np.arange(len(unit)) - np.repeat(np.cumsum(units.count) - units.count, units.count)
    if options.shuffle:
        order = np.lexsort((rng(_DRAW).random(len(unit)), unit))  # units stay where they are
        rank = np.empty_like(place)
        rank[order] = place
        place = rank
    kept = place < most
    return Units(units.dataset, units.clip, units.copy, np.minimum(units.count, most), units.conversation[kept])


def _counts(kept: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """(N,) kept conversations of every clip."""
    total = np.append(0, np.cumsum(kept))
    return total[bounds[1:]] - total[bounds[:-1]]


def _ranges(starts: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """start, start + 1, ..., start + count - 1 of every pair, behind each other."""
    return np.arange(counts.sum()) + np.repeat(starts - (np.cumsum(counts) - counts), counts)
