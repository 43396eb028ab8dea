"""From the plan to micro-batches: which packs this rank reads, and the batches made of them in loader workers."""

import contextlib
import itertools
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

from swim.data_tools.mixture import DataSet, PlanOptions, repeats
from swim.data_tools.plan import Pack, Plan, PlanState, Unit, load_plan, make_plan, plan_identity
from swim.data_tools.pool import ALL, Attempt, Pool
from swim.data_tools.shards import BadSample, ShardSet
from swim.data_tools.storage import FileCache
from swim.train.batch import Batch, Hole
from swim.train.config import Config
from swim.train.lengths import refuse_upscaling, token_model
from swim.train.system import Collator, Request, System


class Order:
    """The plans of all epochs of a run, laid one behind the other; the same on every rank.

    A token budget needs the `system`; with one, plans know their tokens in any case if `counted`. Plans are kept in the
    folder `cache`, and written there if `writes`.
    """

    def __init__(
        self,
        config: Config,
        system: System | None = None,
        *,
        cache: Path | None = None,
        writes: bool = True,
        counted: bool = False,
    ) -> None:
        data = config.data
        folder, size = data.cache or config.run.cache / "files", int(data.cache_gib * 2**30)
        files = FileCache(folder, size) if size else None
        self.shards = [
            ShardSet(part.path, layers=part.layers, cache=config.run.cache, files=files) for part in data.train
        ]
        self._packs_per_step, self._cache, self._writes = data.packs_per_step, cache, writes
        self._data = [
            DataSet(part.path, shards.digest, shards.facts, shards.entries, part.repeat, part.proportion)
            for part, shards in zip(data.train, self.shards)
        ]
        self._options = PlanOptions(
            packs_per_step=data.packs_per_step,
            seed=config.run.seed,
            clips_per_pack=data.clips_per_pack,
            tokens_per_pack=data.tokens_per_pack,
            tasks=None if data.tasks is None else tuple(data.tasks),
            max_conversations=data.max_conversations,
            shuffle_shards=data.shuffle_shards,
        )
        if system is not None:
            refuse_upscaling(config, system.collator.encoder.family, self.shards)
        counted = counted or data.tokens_per_pack is not None
        self._tokens = token_model(config, system, self.shards) if counted and system is not None else None
        self._plans: dict[int, Plan] = {}
        self._starts = [(0, 0)]  # first step of the run, and number, of the epochs known so far
        self.plan(0)

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch."""
        if epoch not in self._plans:
            if len(self._plans) > 2:
                self._plans.clear()  # a long run has many epochs
            self._plans[epoch] = self._load(epoch)
        return self._plans[epoch]

    def repeats(self) -> list[float]:
        """How often the clips of each data set come in an epoch, on average."""
        return repeats(self._data, self._options.tasks)

    def _load(self, epoch: int) -> Plan:
        identity = plan_identity(self._data, self._options, epoch, self._tokens)
        path = self._cache and self._cache / f"epoch_{epoch:05d}_{identity[0][:16]}.npz"
        if path is not None and (plan := load_plan(path, self._options, epoch, identity)) is not None:
            return plan
        plan = make_plan(self._data, self._options, epoch, self._tokens)
        if path is not None and self._writes:
            plan.save(path)
            for old in path.parent.glob("epoch_*.npz"):  # small data has many epochs
                if 0 < int(old.name.split("_")[1]) < epoch - 1:
                    old.unlink(missing_ok=True)
        return plan

    def _find(self, step: int) -> tuple[int, int]:
        """Epoch and step inside it of a step counted over the whole run; epochs differ in length by their packing."""
        start, epoch = self._starts[bisect_right(self._starts, (step, 1 << 62)) - 1]
        while step - start >= (length := self.plan(epoch).num_steps):
            start, epoch = start + length, epoch + 1
            self._starts.append((start, epoch))
        return epoch, step - start

    def packs(self, step: int, rank: int, size: int) -> list[Pack | None]:
        """This rank's packs of a step counted over the whole run; None is a dummy pack. Every rank gets equally
        many."""
        epoch, step = self._find(step)
        own = self.plan(epoch).rank_packs(step, rank, size)
        # The last step of an epoch may have fewer packs: accumulation is fixed in the engine, so dummies fill it up.
        return own + [None] * (self.micro_batches(size) - len(own))

    def micro_batches(self, size: int) -> int:
        """Micro-batches per rank and step: ceil(packs per step / ranks)."""
        return -(-self._packs_per_step // size)

    def state(self, step: int) -> PlanState:
        """Position after `step` steps of the run."""
        epoch, in_epoch = self._find(step)
        plan = self.plan(epoch)
        return PlanState(step, epoch, in_epoch, plan.digest, plan.identity)

    def resume(self, state: PlanState) -> int:
        """Steps of the run that `state` stands for; PlanError if the order has changed since."""
        state.check(self.plan(state.epoch), [one.name for one in self._data])
        self._starts = [(state.run_step - state.step, state.epoch)]  # no plan of an earlier epoch is needed
        return state.run_step


class Loader:
    """This rank's micro-batches, made of the order's packs by `workers` processes; without any, by this one.

    A sample that cannot be read, or takes longer than `deadline_s`, or crashes its worker, becomes a hole. Up to
    `prefetch` steps are made ahead, in pinned memory if `pinned`. Close it; make it early and in the main thread, since
    its processes are copies of this one.
    """

    def __init__(
        self,
        order: Order,
        collator: Collator,
        *,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        deadline_s: float = 120.0,
        prefetch: int = 2,
        pinned: bool = False,
    ) -> None:
        self._order, self._collator, self._rank, self._size = order, collator, rank, size
        self._prefetch, self._pinned = prefetch, pinned
        self._pool: Pool[Unit, Batch] = Pool(self._batch, workers=workers, deadline_s=deadline_s)

    def steps(self, start: int, stop: int) -> Iterator[list[Batch]]:
        """The micro-batches of each of the steps [start, stop) of the run, in their order."""
        rank, size = self._rank, self._size
        packs = (pack or () for step in range(start, stop) for pack in self._order.packs(step, rank, size))
        each = self._order.micro_batches(size)
        pin = Batch.pinned if self._pinned else None
        with contextlib.closing(self._pool.map(packs, ahead=self._prefetch * each, finish=pin)) as batches:
            while micro_batches := list(itertools.islice(batches, each)):
                yield micro_batches

    def close(self) -> None:
        """End the workers."""
        self._pool.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _batch(self, pack: Sequence[Unit], attempt: Attempt) -> Batch:
        holes: list[Hole] = []
        batch = self._collator(self._requests(pack, attempt, holes))
        batch.holes += holes
        return batch

    def _requests(self, pack: Sequence[Unit], attempt: Attempt, holes: list[Hole]) -> Iterator[Request]:
        """The readable units, each announced before it is read; holes for the others."""
        for number, unit in enumerate(pack):
            shards = self._order.shards[unit.dataset]
            try:
                if (reason := attempt.why_lost(number)) is not None:
                    entry = shards.entries[unit.clip]
                    raise BadSample(entry.key, entry.shard, min(place[0] for place in entry.members.values()), reason)
                attempt.begin(number)
                request = Request(shards.read(unit.clip), unit.conversations)
            except BadSample as error:
                holes += [Hole(f"{error.key}#{i}", error.shard, error.offset, error.reason) for i in unit.conversations]
                continue
            if attempt.probing:
                self._collator([request])
            yield request
        attempt.begin(ALL)
