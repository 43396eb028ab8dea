"""The order of training as a pure function of index digests, token counts, mixture, seed, epoch and batching: nothing
is decoded to know it.

A unit is a clip with conversations chosen for it, a pack is the units of a micro-batch, a step is `packs_per_step`
packs. No part of this knows how many ranks there are: the order is the same for any number of them.

    mixture -> draw of conversations -> shuffle (mixture.py) -> packs -> steps (packing.py)

Packs are `clips_per_pack` units each, or are filled up to `tokens_per_pack`; only the latter are balanced in cost.
"""

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from swim.data_tools.facts import load_arrays, save_arrays
from swim.data_tools.mixture import DataSet, PlanError, PlanOptions, Streams, mixture, repeats, shuffled
from swim.data_tools.packing import Counted, TokenModel, balanced, first_fit

# Raise it with every change that gives another order for the same arguments, such as that of a window in packing.py.
PLAN_VERSION = 2


class Unit(NamedTuple):
    """Clip number `clip` of data set number `dataset` with these of its conversations, which stay together."""

    dataset: int
    clip: int
    conversations: tuple[int, ...]


Pack = tuple[Unit, ...]
"""The units of one micro-batch."""


@dataclass(frozen=True, eq=False)
class Plan:
    """All packs of one epoch in order, as arrays; `digest` is a SHA-256 of `identity`, everything the order depends on.

    Unit u is clip `clips[u]` = (data set, clip) with conversations `chosen[unit_bounds[u]:unit_bounds[u + 1]]`, pack p
    has units pack_bounds[p] up to pack_bounds[p + 1]. `tokens` and `costs` of packs are None where no token model was
    given.
    """

    clips: np.ndarray
    unit_bounds: np.ndarray
    chosen: np.ndarray
    pack_bounds: np.ndarray
    tokens: np.ndarray | None
    costs: np.ndarray | None
    packs_per_step: int
    epoch: int
    digest: str
    identity: dict[str, Any]

    @property
    def num_packs(self) -> int:
        """Packs in the epoch."""
        return len(self.pack_bounds) - 1

    @property
    def num_steps(self) -> int:
        """Optimizer steps in the epoch; the last one may have fewer packs."""
        return -(-self.num_packs // self.packs_per_step)

    def pack(self, index: int) -> Pack:
        """Pack `index` of the epoch."""
        first, last = self.pack_bounds[index : index + 2].tolist()
        clips, bounds = self.clips[first:last].tolist(), self.unit_bounds[first : last + 1].tolist()
        chosen = (tuple(self.chosen[a:b].tolist()) for a, b in itertools.pairwise(bounds))
        return tuple(Unit(dataset, clip, of_unit) for (dataset, clip), of_unit in zip(clips, chosen))

    def units(self) -> Iterator[Unit]:
        """All units of the epoch, in order."""
        return itertools.chain.from_iterable(self.pack(i) for i in range(self.num_packs))

    def step(self, index: int) -> list[Pack]:
        """Packs of step `index`, in order; IndexError outside [0, num_steps)."""
        if not 0 <= index < self.num_steps:
            raise IndexError(f"step {index} of a plan of {self.num_steps} steps")
        first = index * self.packs_per_step
        return [self.pack(i) for i in range(first, min(first + self.packs_per_step, self.num_packs))]

    def rank_packs(self, step: int, rank: int, world: int) -> list[Pack | None]:
        """Packs rank, rank + world, ... of a step; None fills up, so that every rank has equally many."""
        packs = self.step(step)
        own: list[Pack | None] = list(packs[rank::world])
        return own + [None] * (-(-len(packs) // world) - len(own))

    def balance(self, world: int) -> np.ndarray:
        """For every full step, the cost of its costliest rank over the mean of all ranks; ValueError without costs."""
        if self.costs is None:
            raise ValueError("a plan without a token model knows no costs; give make_plan one")
        full = self.num_packs // self.packs_per_step
        costs = self.costs[: full * self.packs_per_step].reshape(full, self.packs_per_step)
        ranks = np.stack([costs[:, rank::world].sum(1) for rank in range(world)], 1)
        return ranks.max(1, initial=0) / ranks.mean(1)

    def save(self, path: Path) -> None:
        """Write the arrays as .npz, whole or not at all."""
        save_arrays(path, **{name: value for name in _ARRAYS if (value := getattr(self, name)) is not None})


_ARRAYS = ("clips", "unit_bounds", "chosen", "pack_bounds", "tokens", "costs")


@dataclass(frozen=True)
class PlanState:
    """Position in a run: `run_step` steps are done, `step` of them in `epoch`, by the plan with this digest."""

    run_step: int
    epoch: int
    step: int
    plan_digest: str
    identity: dict[str, Any]

    def check(self, plan: Plan, names: Sequence[str] = ()) -> None:
        """PlanError unless this position lies in `plan`; it says what has changed, `names` are those of the data
        sets."""
        place = f"the saved position (epoch {self.epoch}, step {self.step})"
        if self.plan_digest != plan.digest:
            raise PlanError(
                f"{place} belongs to plan {self.plan_digest[:12]}, this run has plan {plan.digest[:12]}: "
                f"{'; '.join(_changes(self.identity, plan.identity, names))}. Restore that to resume, or start a new "
                "run: with another run.name, and model.path set to the folder of a finished model to go on from its "
                "weights"
            )
        if not 0 <= self.step <= plan.num_steps:
            raise PlanError(f"{place} is outside the plan's {plan.num_steps} steps; start a new run")


def plan_identity(
    data: Sequence[DataSet], options: PlanOptions, epoch: int, tokens: TokenModel | None = None
) -> tuple[str, dict[str, Any]]:
    """Digest of the plan that `make_plan` would make of the same arguments, and the parts that it is made of."""
    identity: dict[str, Any] = {"plan version": PLAN_VERSION, "epoch": epoch, **asdict(options)}
    identity["tasks"] = options.tasks and sorted(set(options.tasks))
    identity["data"] = [
        {"digest": one.digest, "repeat": repeat} for one, repeat in zip(data, repeats(data, options.tasks))
    ]
    if options.tokens_per_pack is not None:
        if tokens is None:
            raise ValueError("tokens_per_pack needs a token model")
        for part, lengths in zip(identity["data"], tokens.lengths, strict=True):
            part["tokens"] = lengths.digest
        cost = [tokens.linear, tokens.pair]
        identity |= {"tokenizer": tokens.tokenizer, "shared_prefix": tokens.shared_prefix, "dummy tokens": tokens.dummy}
        identity |= {"cost per token and pair": cost}
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest(), json.loads(text)


def make_plan(data: Sequence[DataSet], options: PlanOptions, epoch: int, tokens: TokenModel | None = None) -> Plan:
    """Plan of one epoch over these data sets: by default each clip with a matching conversation comes exactly once.

    `tokens_per_pack` needs a token model; with `clips_per_pack` one only adds the numbers of tokens and costs.
    PlanError for data without a matching conversation, and for a conversation longer than a pack.
    """
    digest, identity = plan_identity(data, options, epoch, tokens)
    rng, budget = Streams(options.seed, epoch), options.tokens_per_pack
    units = mixture(data, options, rng)
    units = units.take(shuffled(units, data, options, rng))
    counted = Counted(data, tokens) if tokens is not None else None
    if budget is None:
        assert options.clips_per_pack is not None
        pack = np.arange(len(units)) // options.clips_per_pack
    else:
        assert counted is not None  # plan_identity has asked for it
        counted.check(data, options.tasks, budget)
        units = counted.split(units, budget)
        size, cost, seen = counted.units(units)
        pack = first_fit(size, np.where(seen, 0, counted.dummy), budget)
        pack = balanced(np.bincount(pack, cost), options, rng)[pack]
    units, pack = units.take(np.argsort(pack, kind="stable")), np.sort(pack)
    num_packs = int(pack.max(initial=-1)) + 1
    of_pack = counted.packs(units, pack, num_packs) if counted is not None else (None, None)
    return Plan(
        clips=np.stack([units.dataset, units.clip], 1).astype(np.int32),
        unit_bounds=np.append(0, np.cumsum(units.count)),
        chosen=units.conversation.astype(np.int32),
        pack_bounds=np.append(0, np.cumsum(np.bincount(pack, minlength=num_packs))),
        tokens=of_pack[0],
        costs=of_pack[1],
        packs_per_step=options.packs_per_step,
        epoch=epoch,
        digest=digest,
        identity=identity,
    )


def load_plan(path: Path, options: PlanOptions, epoch: int, identity: tuple[str, dict[str, Any]]) -> Plan | None:
    """The plan that `Plan.save` wrote; None if it is missing or damaged."""
    if (arrays := load_arrays(path)) is None:
        return None
    of_plan: dict[str, Any] = {name: arrays.get(name) for name in _ARRAYS}
    return Plan(**of_plan, packs_per_step=options.packs_per_step, epoch=epoch, digest=identity[0], identity=identity[1])


def _changes(then: dict[str, Any], now: dict[str, Any], names: Sequence[str]) -> list[str]:
    """What differs between two identities, in words."""
    found = []
    sets = then.get("data", []), now["data"]
    if len(sets[0]) != len(sets[1]):
        found.append(f"data.train had {len(sets[0])} folders, has {len(sets[1])}")
    tokens_may_differ = then.get("tokenizer") != now.get("tokenizer")
    if tokens_may_differ:
        found.append("the tokenizer, its chat template or the model family is another")
    for number, (old, new) in enumerate(zip(*sets)):
        name = f"data.train[{number}]" + (f" ({names[number]})" if number < len(names) else "")
        if old["digest"] != new["digest"]:
            found.append(
                f"{name} has other shards or layers (index digest {old['digest'][:12]} then, {new['digest'][:12]} now)"
            )
        elif not tokens_may_differ and old.get("tokens") != new.get("tokens"):
            found.append(f"{name} has other numbers of tokens (data.num_frames, fps, or a limit of pixels?)")
        if old["repeat"] != new["repeat"]:
            found.append(f"{name} came {old['repeat']:g} times an epoch, now {new['repeat']:g}")
    for key in sorted((then.keys() | now.keys()) - {"data", "tokenizer"}):
        if then.get(key) != now.get(key):
            found.append(f"{key} was {then.get(key)}, is {now.get(key)}")
    return found or ["parts that this version does not know"]
