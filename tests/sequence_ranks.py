"""Whole runs on several ranks, in gloo processes that import everything once: the loop, ZeRO-3 and all."""

import os
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import deepspeed
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed import ProcessGroup

from swim.train import loop
from swim.train.config import Config, ConfigError
from swim.train.loader import Loader, Order
from swim.train.sequence import agreed, gather_columns, gather_heads, sent_by_layer
from swim.train.system import Progress, build_system
from swim.train.world import World, init_world


def train_on_ranks(rank: int, size: int, port: int, configs: Sequence[Config], out: Path) -> None:
    """Process `rank` of `size`: trains each config, whose first gradient the main rank saves as `out`/<run name>.pt.

    A config that is refused leaves its message as `out`/<run name>.txt.
    """
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    world = init_world()
    World.close = World.barrier  # type: ignore[method-assign]  # the next run is in the same world
    loop.init_world = lambda *_: world
    for config in configs:
        try:
            with recorded(out / f"{config.run.name}.pt"):
                loop.train(config)
        except ConfigError as error:
            if rank == 0:
                (out / f"{config.run.name}.txt").write_text(str(error))
    check_heads(world)
    check_agreement(world)
    check_memory(world, configs[0])
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


class recorded:  # noqa: N801
    """Saves the gradients that the first optimizer step of an engine sees."""

    def __init__(self, path: Path) -> None:
        self.path, self.step = path, deepspeed.DeepSpeedEngine.step

    def __enter__(self) -> None:
        def step(engine: deepspeed.DeepSpeedEngine) -> None:
            if engine.is_gradient_accumulation_boundary() and not self.path.exists():
                named = engine.module.named_parameters()
                found = {name: deepspeed.utils.safe_get_full_grad(p) for name, p in named}
                torch.distributed.barrier()
                if engine.global_rank == 0:
                    torch.save({name: grad.clone() for name, grad in found.items()}, self.path)
            self.step(engine)

        deepspeed.DeepSpeedEngine.step = step

    def __exit__(self, *_: object) -> None:
        deepspeed.DeepSpeedEngine.step = self.step


def check_heads(world: World) -> None:
    """Every query head meets its own kv head, whatever their numbers, and as much is sent as the formula says."""
    group = world.subgroup(world.size)
    assert group is not None
    length, sent, all_to_all = 3, [], torch.distributed.all_to_all_single

    def counting(received: torch.Tensor, given: torch.Tensor, **options: Any) -> None:
        sent.append(given.numel() * (world.size - 1) // world.size)
        all_to_all(received, given, **options)

    torch.distributed.all_to_all_single = counting
    for heads, kv_heads in ((4, 4), (4, 2), (4, 1), (12, 3), (12, 6), (28, 7)):
        own = slice(length * world.rank, length * (world.rank + 1))
        columns = torch.arange(length * world.size, dtype=torch.float32)
        q, k = (10 * torch.arange(n)[None, :, None, None] + columns[None, None, :, None] for n in (heads, kv_heads))
        mine, keys = gather_columns(q[:, :, own], group), gather_columns(k[:, :, own], group)
        gather_heads(mine.transpose(1, 2), group)
        assert sum(sent) + sent[1] == sent_by_layer(length * world.size, heads, kv_heads, 1, world.size)
        sent.clear()
        first = heads // world.size * world.rank
        assert torch.equal(mine, q[:, first : first + heads // world.size])
        meets = keys.repeat_interleave(mine.shape[1] // keys.shape[1], 1)
        assert torch.equal(meets, k.repeat_interleave(heads // kv_heads, 1)[:, first : first + heads // world.size])
    torch.distributed.all_to_all_single = all_to_all


def check_agreement(world: World) -> None:
    """Where a sample failed on one rank alone, all go on with what the first one read."""
    group = world.subgroup(2)
    assert group is not None
    first = world.rank // 2 * 2
    good, bad = (SimpleNamespace(ids=ids, layout=None, read_by=world.rank) for ids in (["a#0", "a#1"], []))
    steps = agreed(iter([[good, good], [good, bad if world.rank % 2 else good]]), group)
    assert [batch.read_by for batch in next(steps)] == [world.rank] * 2, "nothing is sent without need"
    assert [(batch.read_by, batch.ids) for batch in next(steps)] == [(first, good.ids)] * 2


def check_memory(world: World, config: Config) -> None:
    """What the text model keeps for its backward pass is divided among the ranks."""
    alone, together = (kept_by_text_model(config, group) for group in (None, world.subgroup(2)))
    assert 0.5 <= together / alone < 0.55, (together, alone)


def kept_by_text_model(config: Config, group: ProcessGroup | None) -> int:
    """Bytes that one forward call keeps, parameters aside; everything that shares memory counts once."""
    system = build_system(config)
    model: Any = system.build_model(group).train()
    batches = next(Loader(Order(config, system, writes=False), system.collator).steps(0, 1))
    batch = max(batches, key=lambda batch: batch.num_tokens)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def note(x: torch.Tensor) -> torch.Tensor:
        if (storage := x.untyped_storage()).data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    hooks = saved_tensors_hooks(note, lambda x: x)
    model.get_decoder().register_forward_pre_hook(lambda *_: hooks.__enter__())
    model.get_decoder().register_forward_hook(lambda *_: hooks.__exit__(None, None, None))
    system.loss(model, batch, Progress(0, 1))
    return sum(storage.nbytes() for storage in kept.values())
