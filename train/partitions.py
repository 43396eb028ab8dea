"""What DeepSpeed's state files hold, by parameter name and range, whatever number of ranks wrote them.

DeepSpeed's own way to another world size (its universal form, 0.19.8) rewrites the whole checkpoint on disk, reads all
of it on every rank, gives every parameter group the weight decay of the first and one shared step counter, which Adam
then counts once per group, and leaves frozen weights as they are. Here every rank maps the files and copies its own
ranges.
"""

import math
import re
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

_KNOWN = [LossScaler, ZeroStageEnum, fragment_address]  # all that the files hold beside tensors and plain data
_RANK = re.compile(r"zero_pp_rank_(\d+)_")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, is damaged or does not fit; the message names file, value and remedy."""


class _Piece(NamedTuple):
    """`numel` elements of a flattened parameter from `begin`, at `offset` of a rank's group."""

    rank: int
    group: int
    offset: int
    begin: int
    numel: int


class Partitions:
    """Parameters and optimizer state in the files of a checkpoint that `size` ranks wrote; they are mapped, not read,
    and unpickled with an allow-list."""

    def __init__(self, files: Iterable[Path], size: int) -> None:
        self._size = size
        files = list(files)
        optim, models = (
            {_rank(path): path for path in files if path.name.endswith(end)}
            for end in ("_optim_states.pt", "_model_states.pt")
        )
        self._optim = cache(lambda rank: load_state(optim[rank])["optimizer_state_dict"])
        self._model = cache(lambda rank: load_state(models[rank]))
        self.stage = int(self._optim(0)["zero_stage"])

    @cached_property
    def counters(self) -> dict[str, int]:
        """The engine's counts of steps and samples."""
        return {name: self._model(0)[name] for name in ("global_steps", "global_samples", "skipped_steps")}

    @cached_property
    def buffers(self) -> dict[str, Tensor]:
        """Buffers of the module."""
        return {name: self._model(0)["module"][name] for name in self._model(0)["buffer_names"]}

    @cached_property
    def trained(self) -> dict[str, torch.Size]:
        """Shapes of the parameters that have optimizer state."""
        return {name: shape for group in self._model(0)["param_shapes"] for name, shape in group.items()}

    @cached_property
    def frozen(self) -> dict[str, torch.Size]:
        """Shapes of the parameters that have none."""
        model = self._model(0)
        if self.stage == 3:
            return dict(model["frozen_param_shapes"])
        # Stage 1 lists none; here the module's own state has them whole.
        other = {*self.trained, *self.buffers, *model["shared_params"]}
        return {name: tensor.shape for name, tensor in model["module"].items() if name not in other}

    def read(self, name: str, key: str, start: int, numel: int) -> Tensor:
        """A range of a flattened trained parameter: its `fp32` value, or what the optimizer keeps under `key`."""
        parts = []
        for piece in self._pieces[name]:
            first, last = max(start, piece.begin), min(start + numel, piece.begin + piece.numel)
            if first < last:
                flat = self._flat(piece.rank, piece.group, key)
                parts.append(flat.narrow(0, piece.offset + first - piece.begin, last - first))
        return torch.cat(parts) if parts else torch.empty(0)

    def read_frozen(self, name: str, start: int, numel: int) -> Tensor:
        """A range of a flattened frozen parameter in the model's type."""
        if self.stage < 3:
            return self._model(0)["module"][name].flatten().narrow(0, start, numel)
        share = math.ceil(self.frozen[name].numel() / self._size)
        parts = []
        for rank in range(start // share, min(self._size, math.ceil((start + numel) / share))):
            first, last = max(start, rank * share), min(start + numel, (rank + 1) * share)
            fragment = self._model(rank)["frozen_param_fragments"][name].flatten()
            parts.append(fragment.narrow(0, first - rank * share, last - first))
        return torch.cat(parts) if parts else torch.empty(0)

    def parameter(self, name: str, dtype: torch.dtype) -> Tensor:
        """A whole parameter: a trained one rounded from its fp32 value, as the engine rounds it."""
        if name in self.frozen:
            shape = self.frozen[name]
            return self.read_frozen(name, 0, shape.numel()).view(shape).to(dtype)
        shape = self.trained[name]
        return self.read(name, "fp32", 0, shape.numel()).view(shape).to(dtype)

    def optimizer_state(self, name: str) -> dict[str, Any]:
        """What the optimizer keeps about the saved group that holds a trained parameter, on the first rank."""
        return self._state(0)[self._pieces[name][0].group]

    @cached_property
    def _pieces(self) -> dict[str, list[_Piece]]:
        pieces: dict[str, list[_Piece]] = {name: [] for name in self.trained}
        for rank in range(self._size):
            for name, group, offset, numel in self._slices(rank):
                begin = sum(piece.numel for piece in pieces[name])
                pieces[name].append(_Piece(rank, group, offset, begin, numel))
        return pieces

    def _slices(self, rank: int) -> Iterator[tuple[str, int, int, int]]:
        if self.stage < 3:
            for group, names in enumerate(self._optim(rank)["param_slice_mappings"]):
                for name, address in names.items():
                    yield name, group, address.start, address.numel
            return
        for group, shapes in enumerate(self._model(0)["param_shapes"]):
            offset = 0
            for name, shape in shapes.items():
                share = math.ceil(shape.numel() / self._size)
                yield name, group, offset, max(0, min(share, shape.numel() - rank * share))
                offset += share

    def _flat(self, rank: int, group: int, key: str) -> Tensor:
        if key == "fp32":
            flat: Tensor = self._optim(rank)[FP32_GROUPS[self.stage == 3]][group]
        else:
            flat = self._state(rank)[group][key]
        return flat

    def _state(self, rank: int) -> dict[int, dict[str, Any]]:
        optimizer = "optimizer_state_dict" if self.stage == 3 else "base_optimizer_state"
        state: dict[int, dict[str, Any]] = self._optim(rank)[optimizer]["state"]
        return state


FP32_GROUPS = ("single_partition_of_fp32_groups", "fp32_flat_groups")  # ZeRO-1 and 2, ZeRO-3


def load_state(path: Path) -> dict[str, Any]:
    """One of DeepSpeed's state files, mapped; nothing in it can run code."""
    with torch.serialization.safe_globals(_KNOWN):
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return state


@torch.no_grad()
def load_partitions(engine: Any, saved: Partitions) -> None:
    """Give the engine, in place, what a checkpoint of any world size holds: weights, frozen ones too, optimizer state,
    buffers and counters."""
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # all parameters partitioned
        flats = optimizer.fp32_partitioned_groups_flat
    else:
        flats = optimizer.single_partition_of_fp32_groups
    on_device = any(optimizer.optimizer.param_groups[0].get(name) for name in ("fused", "capturable"))
    for group, flat in enumerate(flats):
        device = flat.device if on_device else "cpu"  # where Adam wants its step
        own = list(_own_ranges(engine, stage, group))
        if not own:
            continue
        _fill(flat, saved, "fp32", own)
        live = optimizer.optimizer.state[flat]
        for key, value in saved.optimizer_state(own[0][0]).items():
            if torch.is_tensor(value) and value.dim() == 1:
                live.setdefault(key, torch.empty_like(flat, dtype=value.dtype))
                _fill(live[key], saved, key, own)
            else:
                # A copy each: groups that shared one tensor would count their steps together.
                live[key] = value.to(device, copy=True) if torch.is_tensor(value) else value
    for parameter, name in engine.param_names.items():
        if name in saved.frozen:
            numel = saved.frozen[name].numel()
            start, live = 0, parameter.flatten() if stage < 3 else parameter.ds_tensor
            if stage == 3:
                start = torch.distributed.get_rank() * live.numel()
                numel = max(0, min(live.numel(), numel - start))
            live.narrow(0, 0, numel).copy_(saved.read_frozen(name, start, numel))
            if stage == 3:
                # hpZ's second copy: DeepSpeed 0.19.8 renews those of trained parameters alone.
                parameter.ds_secondary_tensor = None
    for name, buffer in engine.module.named_buffers():
        if name in saved.buffers:
            buffer.copy_(saved.buffers[name])
    if stage == 3:
        # The optimizer's state is in place; this carries the fp32 values over into the model's.
        optimizer.load_state_dict([optimizer.state_dict()] * torch.distributed.get_world_size(), False)
        optimizer.checkpoint_event_epilogue()
    else:
        optimizer.update_lp_params()
    for name, count in saved.counters.items():
        setattr(engine, name, count)


def _fill(live: Tensor, saved: Partitions, key: str, own: list[tuple[str, int, int, int]]) -> None:
    live.zero_()  # what pads a group
    for name, start, numel, offset in own:
        live.narrow(0, offset, numel).copy_(saved.read(name, key, start, numel))


def _own_ranges(engine: Any, stage: int, group: int) -> Iterator[tuple[str, int, int, int]]:
    """Name, start and size of what this rank has of each parameter, and where that lies in its flat group."""
    optimizer, names = engine.optimizer, engine.param_names
    if stage < 3:
        for parameter in optimizer.bit16_groups[group]:
            if (mapping := parameter._hp_mapping) is not None:
                own = mapping.lp_fragment_address
                yield names[parameter], own.start, own.numel, mapping.hp_fragment_address.start
        return
    rank, offset = torch.distributed.get_rank(), 0
    for parameter in optimizer.fp16_groups[group]:
        share = parameter.partition_numel()
        yield names[parameter], rank * share, max(0, min(share, parameter.ds_numel - rank * share)), offset
        offset += share


def _rank(path: Path) -> int:
    found = _RANK.search(path.name)
    return int(found[1]) if found else 0  # ZeRO-1 and 2 have one model file
