"""The order of training as a pure function of index digests, seed, epoch and batching: nothing is decoded to know it.

A unit is a clip with the conversations chosen for it, a pack is `clips_per_pack` units, a step is `packs_per_step`
packs. No part of this knows how many ranks there are: the order is the same for any number of them.
"""

import hashlib
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from swim.data_tools.shards import Entry

PLAN_VERSION = 1  # raise it with every change that gives another order for the same arguments


class PlanError(ValueError):
    """A plan cannot be made, or a saved position belongs to another plan."""


class Unit(NamedTuple):
    """Clip number `clip` of data set number `dataset` with these of its conversations, which stay together."""

    dataset: int
    clip: int
    conversations: tuple[int, ...]


Pack = tuple[Unit, ...]
"""The units of one micro-batch."""


@dataclass(frozen=True)
class Plan:
    """All packs of one epoch in order; `digest` is a SHA-256 of everything the order depends on."""

    packs: tuple[Pack, ...]
    packs_per_step: int
    epoch: int
    digest: str

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the epoch; the last one may have fewer packs."""
        return -(-len(self.packs) // self.packs_per_step)

    def step(self, index: int) -> list[Pack]:
        """Packs of step `index`, in order; IndexError outside [0, num_steps)."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of a plan of {self.num_steps} steps")
        return list(self.packs[index * self.packs_per_step : (index + 1) * self.packs_per_step])

    def rank_packs(self, step: int, rank: int, world: int) -> list[Pack | None]:
        """Packs rank, rank + world, ... of a step; None fills up, so that every rank has equally many."""
        packs = self.step(step)
        own: list[Pack | None] = list(packs[rank::world])
        return own + [None] * (-(-len(packs) // world) - len(own))


@dataclass(frozen=True)
class PlanState:
    """Position in a run: `step` steps of `epoch` are done, by the plan with this digest."""

    epoch: int
    step: int
    plan_digest: str

    def check(self, plan: Plan) -> None:
        """PlanError unless this position lies in `plan`."""
        if self.plan_digest != plan.digest:
            raise PlanError(
                f"the saved position (epoch {self.epoch}, step {self.step}) belongs to plan {self.plan_digest[:12]}, "
                f"this run has plan {plan.digest[:12]}: data, seed, epoch, tasks or batch shape have changed; "
                "restore them to resume, or start a new run"
            )
        if not 0 <= self.step <= plan.num_steps:
            raise PlanError(f"the saved step {self.step} is outside the plan's {plan.num_steps}; start a new run")


def make_plan(
    digests: Sequence[str],
    units: Sequence[Sequence[Entry]],
    *,
    weights: Sequence[float] | None,
    clips_per_pack: int,
    packs_per_step: int,
    seed: int,
    epoch: int,
    tasks: Sequence[str] | None = None,
    max_conversations: int | None = None,
    shuffle: bool = True,
) -> Plan:
    """Plan of one epoch over data sets with these index digests and entries; each chosen clip comes exactly once.

    `tasks` keeps conversations of these tasks, `max_conversations` draws at most so many of each clip, anew in every
    epoch. PlanError for data without a matching conversation, ValueError for impossible sizes or weights other than 1.
    """
    if len(digests) != len(units) or len(weights or digests) != len(digests):
        found = f"{len(digests)} digests, {len(units)} lists of entries, {len(weights or digests)} weights"
        raise ValueError(f"{found}: give one of each per data set")
    if other := [weight for weight in weights or () if weight != 1]:
        raise ValueError(f"weight {other[0]}: each data set is read once per epoch, so every weight must be 1")
    sizes = {"clips_per_pack": clips_per_pack, "packs_per_step": packs_per_step, "max_conversations": max_conversations}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}, must be at least 1")
    # Philox is counter-based: the same stream on every platform, and (seed, epoch) are its key, not a state.
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    chosen = _choose(units, tasks, max_conversations, rng if shuffle else None)
    if shuffle:
        chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    packs = tuple(tuple(chosen[i : i + clips_per_pack]) for i in range(0, len(chosen), clips_per_pack))
    identity = [PLAN_VERSION, list(digests), seed, epoch, tasks and sorted(set(tasks)), shuffle, *sizes.values()]
    digest = hashlib.sha256(json.dumps(identity).encode()).hexdigest()
    return Plan(packs, packs_per_step, epoch, digest)


def _choose(
    units: Sequence[Sequence[Entry]],
    tasks: Iterable[str] | None,
    most: int | None,
    rng: np.random.Generator | None,
) -> list[Unit]:
    present = {facts.task for entry in itertools.chain(*units) for facts in entry.conversations}
    wanted = present if tasks is None else set(tasks)
    if not wanted or wanted - present:
        raise PlanError(f"no conversation of task {sorted(wanted - present)}; the data has {sorted(present)}")
    chosen = []
    for dataset, entries in enumerate(units):
        for clip, entry in enumerate(entries):
            kept = [i for i, facts in enumerate(entry.conversations) if facts.task in wanted]
            if most is not None and len(kept) > most:
                kept = kept[:most] if rng is None else sorted(rng.permutation(kept)[:most].tolist())
            if kept:
                chosen.append(Unit(dataset, clip, tuple(kept)))
    return chosen
