"""Alignment of attention and masks on a few held-out clips while a run trains: the numbers of `swim evaluate`, without
answers.

The clips are packs of a plan of their own, one clip each, the same in every run; all ranks take equally many, dummy
packs included, since ZeRO-3 gathers weights in each. Nothing that training depends on is touched: no gradient, no
dropout, and the random state is put back. Cost: a forward pass and a decode of every clip, every `probe.every` steps.
"""

from collections.abc import Mapping
from typing import Any, Self

import torch

from swim.evaluation.alignment import mean_metrics
from swim.evaluation.predictions import clip_of
from swim.train.config import Config, ConfigError, ProbeConfig, TrainSet
from swim.train.heartbeat import Heartbeat
from swim.train.loader import Loader
from swim.train.prepare import build_order
from swim.train.sequence import agreed
from swim.train.system import System
from swim.train.world import World


class Probe:
    """Context in which the held-out clips of `probe` can be looked at; make it where the loader is made."""

    def __init__(
        self, probe: ProbeConfig, config: Config, system: System, world: World, group: Any, heartbeat: Heartbeat
    ) -> None:
        self._every, self._system, self._world = probe.every, system, world
        self._group, self._heartbeat = group, heartbeat
        data = config.data.model_copy(
            update={
                "train": [TrainSet.model_validate(probe.data)],
                "clips_per_pack": 1,
                "tokens_per_pack": None,
                "packs_per_step": probe.clips,
                "max_conversations": None,
            }
        )
        # Not the run's seed: runs that differ in it are compared on the same clips.
        fixed = config.model_copy(update={"data": data, "run": config.run.model_copy(update={"seed": 0})})
        order = build_order(fixed, system, world)
        if not order.plan(0).num_packs:
            raise ConfigError(f"probe.data: {probe.data} has no clip with a conversation of data.tasks {data.tasks}")
        self._loader = Loader(
            order,
            system.probe_collator,
            rank=world.rank // config.parallel.sequence,
            size=world.size // config.parallel.sequence,
            workers=min(1, data.workers),
            deadline_s=data.deadline_s,
            prefetch=1,
        )

    def due(self, step: int) -> bool:
        """Whether step `step` (from 1) is followed by a probe."""
        return step % self._every == 0

    def __call__(self, engine: Any, step: int) -> dict[str, float]:
        """probe/METRIC, means over clips of means over conversations, on every rank."""
        steps = self._loader.steps(0, 1)
        rows: dict[str, Mapping[str, float]] = {}
        missing = 0
        device = self._world.device
        engine.module.eval()
        with torch.random.fork_rng([device] if device.type == "cuda" else []), torch.no_grad():
            for batches in agreed(steps, self._group) if self._group else steps:
                for batch in batches:
                    self._heartbeat.phase("probe", step)
                    rows |= self._system.probe(engine, batch.to(device))
                    missing += len(batch.holes)
        engine.module.train()
        first = self._group is None or self._group.rank() == 0  # the others have the same rows
        return summarise(self._world.gather((rows, missing) if first else ({}, 0)))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._loader.close()


def summarise(found: list[tuple[Mapping[str, Mapping[str, float]], int]]) -> dict[str, float]:
    """Means over clips of means over conversations, from every rank's rows by id and number of unreadable
    conversations."""
    by_clip: dict[str, list[Mapping[str, float]]] = {}
    for rows, _ in found:
        for name, row in rows.items():
            by_clip.setdefault(clip_of(name), []).append(row)
    means = [mean for of_clip in by_clip.values() if (mean := mean_metrics(of_clip)) is not None]
    numbers = {f"probe/{name}": value for name, value in (mean_metrics(means) or {}).items()}
    return numbers | {"probe/clips": float(len(means)), "probe/holes": float(sum(holes for _, holes in found))}
