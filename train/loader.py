"""From the plan to micro-batches: which packs this rank reads, and the batches made of them in loader workers."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset

from swim.data_tools.plan import Pack, Plan, PlanState, make_plan
from swim.data_tools.shards import BadSample, ShardSet
from swim.train.batch import Batch, Hole
from swim.train.config import Config
from swim.train.system import Collator, Request


class Order:
    """The plans of all epochs of a run, laid one behind the other; the same on every rank."""

    def __init__(self, config: Config) -> None:
        self.shards = [ShardSet(folder) for folder in config.data.train]
        self._config = config
        self._plans: dict[int, Plan] = {}
        self.steps_per_epoch = self.plan(0).num_steps

    def plan(self, epoch: int) -> Plan:
        """The plan of one epoch."""
        if epoch not in self._plans:
            if len(self._plans) > 2:
                self._plans.clear()  # a long run has many epochs
            data = self._config.data
            self._plans[epoch] = make_plan(
                [shards.digest for shards in self.shards],
                [shards.entries for shards in self.shards],
                weights=None,
                clips_per_pack=data.clips_per_pack,
                packs_per_step=data.packs_per_step,
                seed=self._config.run.seed,
                epoch=epoch,
                tasks=data.tasks,
                max_conversations=data.max_conversations,
            )
        return self._plans[epoch]

    def packs(self, step: int, rank: int, size: int) -> list[Pack | None]:
        """This rank's packs of a step counted over the whole run; None is a dummy pack. Every rank gets equally
        many."""
        epoch, step = divmod(step, self.steps_per_epoch)
        own = self.plan(epoch).rank_packs(step, rank, size)
        # The last step of an epoch may have fewer packs: accumulation is fixed in the engine, so dummies fill it up.
        return own + [None] * (self.micro_batches(size) - len(own))

    def micro_batches(self, size: int) -> int:
        """Micro-batches per rank and step: ceil(packs per step / ranks)."""
        return -(-self._config.data.packs_per_step // size)

    def state(self, step: int) -> PlanState:
        """Position after `step` steps of the run."""
        epoch, step = divmod(step, self.steps_per_epoch)
        return PlanState(epoch, step, self.plan(epoch).digest)

    def resume(self, state: PlanState) -> int:
        """Steps of the run that `state` stands for; PlanError if the order has changed since."""
        state.check(self.plan(state.epoch))
        return state.epoch * self.steps_per_epoch + state.step


class _Steps(Dataset[list[Batch]]):
    def __init__(self, order: Order, collator: Collator, rank: int, size: int) -> None:
        self.order, self.collator, self.rank, self.size = order, collator, rank, size

    def __getitem__(self, step: int) -> list[Batch]:
        return [self._batch(pack or ()) for pack in self.order.packs(step, self.rank, self.size)]

    def _batch(self, pack: Pack) -> Batch:
        requests, holes = [], []
        for unit in pack:
            shards = self.order.shards[unit.dataset]
            try:
                requests.append(Request(shards.read(unit.clip), unit.conversations))
            except BadSample as error:
                holes += [Hole(f"{error.key}#{i}", error.shard, error.offset, error.reason) for i in unit.conversations]
        return self.collator(requests, holes)


def load_steps(
    order: Order, collator: Collator, *, start: int, stop: int, rank: int, size: int, workers: int
) -> Iterator[list[Batch]]:
    """This rank's micro-batches of steps [start, stop), one list per step, prefetched by `workers` processes in step
    order."""
    loader: DataLoader[list[Batch]] = DataLoader(
        _Steps(order, collator, rank, size),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=workers,
        worker_init_fn=_one_thread if workers else None,
        generator=torch.Generator(),  # else its base seed is drawn from the generator that a checkpoint restores
    )
    return iter(loader)


def _one_thread(_: int) -> None:
    torch.set_num_threads(1)
