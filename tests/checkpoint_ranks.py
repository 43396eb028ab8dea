"""A small ZeRO engine for tests of checkpoints, alone or in gloo processes."""

import errno
import os
from pathlib import Path
from typing import Any

import deepspeed
import torch

from swim.data_tools.plan import PlanState
from swim.train import checkpoint, state_files
from swim.train.engine import nothing_applied
from swim.train.world import World, init_world

STATE = PlanState(run_step=0, epoch=0, step=0, plan_digest="digest", identity={})


class Small(torch.nn.Module):
    """Frozen and trained parameters whose sizes no number of ranks divides, a parameter group with and one without
    decay, a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.eye = torch.nn.Linear(7, 5)
        self.norm = torch.nn.LayerNorm(5)
        self.head = torch.nn.Linear(5, 3)
        self.register_buffer("seen", torch.zeros(2))
        self.eye.weight.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.head(self.norm(self.eye(x)))
        return y.square().mean()


def build_small(
    stage: int = 3, seed: int = 0, *, persistent: bool = False, torch_adam: bool = True, **zero: object
) -> Any:
    """The engine around a small model of this seed, whose parameters stay whole on every rank if `persistent`; `zero`
    are further fields of its ZeRO section."""
    torch.manual_seed(seed)
    model = Small()
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in trained if p.dim() == 1], "weight_decay": 0.0},
    ]
    fields = {
        "train_micro_batch_size_per_gpu": 1,
        "zero_optimization": {
            "stage": stage,
            "stage3_param_persistence_threshold": 1000 if persistent else 0,
            "overlap_comm": False,
            **zero,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2, "torch_adam": torch_adam}},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=fields)
    return engine


def train_small(engine: Any, first: int, last: int) -> list[float]:
    """Mean loss of every step; 12 rows a step, dealt out to the ranks."""
    rank, size, losses = torch.distributed.get_rank(), torch.distributed.get_world_size(), []
    for step in range(first, last):
        x = torch.randn(12, 7, generator=torch.Generator().manual_seed(step))
        loss = engine(x[rank::size])
        engine.backward(loss)
        engine.step()
        mean = loss.detach().clone()
        torch.distributed.all_reduce(mean)
        losses.append(float(mean) / size)
    return losses


def weights(engine: Any) -> dict[str, torch.Tensor]:
    """Every parameter and buffer, whole."""
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return {name: tensor.detach().clone() for name, tensor in engine.module.state_dict().items()}


def join(rank: int, size: int, port: int) -> World:
    """Join the others."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    return init_world()


def save_on_ranks(rank: int, size: int, port: int, out: Path) -> None:
    """Save under ZeRO-1, 2 and 3 what `expected.pt` holds, losses of the next steps included; the last rank's disk is
    full once, which every rank notes in `error_<rank>`."""
    world = join(rank, size, port)
    checkpoint.stock_description = lambda _: {}
    expected = {}
    for stage in (1, 2, 3):
        engine = build_small(stage)
        engine.module.seen += 1
        train_small(engine, 0, 3)
        if stage == 3:
            _fail_once(engine, out, world)
        checkpoint.save_checkpoint(engine, out / f"stage{stage}", 3, STATE, world)
        expected[stage] = {"weights": weights(engine), "losses": train_small(engine, 3, 8)}
    if world.is_main:
        torch.save(expected, out / "expected.pt")
    world.barrier()
    world.close()


HOST = {"device": "cpu"}
PROFILES: dict[str, dict[str, Any]] = {
    "zero3": {},
    "zero2": {"stage": 2},
    "sub_groups": {"sub_group_size": 20},
    "offload_optimizer": {"offload_optimizer": HOST},
    "offload_all": {"offload_optimizer": HOST, "offload_param": HOST},
    "offload_compiled": {"offload_optimizer": HOST, "offload_param": HOST, "torch_adam": False},
    # The last: its groups of ranks stay with the process.
    "hpz": {"zero_hpz_partition_size": 2},
}


def train_profiles(rank: int, size: int, port: int, out: Path, names: list[str]) -> None:
    """For every profile: three steps, one that is refused, a save, five steps; again from there, and from there under
    plain ZeRO-3 and back. The main rank notes what it saw in `out`/<name>.pt."""
    world = join(rank, size, port)
    checkpoint.stock_description = lambda _: {}
    for name in names:
        engine = build_small(**PROFILES[name])
        losses = train_small(engine, 0, 3)
        before = weights(engine)
        engine.backward(engine(torch.ones(3, 7)))
        with nothing_applied(engine):
            engine.step()
        found: dict[str, Any] = {"before": before, "refused": weights(engine), "applied": engine.was_step_applied()}
        path = checkpoint.save_checkpoint(engine, out / name, 3, STATE, world)
        found["losses"] = losses + train_small(engine, 3, 8)
        _spoil(engine)
        train_small(engine, 0, 1)
        checkpoint.load_checkpoint(engine, path, world)
        found["loaded"], found["again"] = weights(engine), train_small(engine, 3, 8)
        if name != "zero3":
            checkpoint.load_checkpoint(engine, out / "zero3" / path.name, world)
            found["from zero3"] = train_small(engine, 3, 8)
        if world.is_main:
            torch.save(found, out / f"{name}.pt")
        engine.destroy()
    world.barrier()
    world.close()


def _spoil(engine: Any) -> None:
    """Other frozen weights, as an engine has that was built from another base."""
    frozen = [p for p in engine.module.parameters() if not p.requires_grad]
    with torch.no_grad(), deepspeed.zero.GatheredParameters(frozen, modifier_rank=0):
        frozen[0].zero_()


def _fail_once(engine: Any, out: Path, world: World) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if world.rank == world.size - 1:
        state_files.open = full
    try:
        checkpoint.save_checkpoint(engine, out / "stage3", 3, STATE, world)
    except checkpoint.CheckpointError as error:
        (out / f"error_{world.rank}").write_text(str(error))
    if world.rank == world.size - 1:
        del state_files.open
