"""A tiny model, its system and a few synthetic clips, shared by the tests and by the processes they start."""

from pathlib import Path
from typing import Any

import torch

from swim.data_tools.shards import ShardSet
from swim.data_tools.synth import synthesise
from swim.train.config import Config, load_config
from swim.train.system import Request
from swim.train.systems.swim.data import SwimBatch
from swim.train.systems.swim.model import SwimSystem

torch.set_num_threads(1)

ALL_TASKS = "data.tasks=null"


def tiny_config(data: Path, *overrides: str) -> Config:
    """The tiny recipe over the shards in `data`: two supervised layers, a row per conversation as eager attention
    needs, no rendering of its own."""
    fixed = [f"data.train=[{data}]", "data.synth=null", "data.shared_prefix=false", "system.layers=[1, 3]"]
    return load_config("tiny_cpu", [*fixed, *overrides])


def make_data(folder: Path, clips: int = 8, seed: int = 3) -> ShardSet:
    """A few synthetic clips of 8 frames, half of their objects hidden in a part of it."""
    return synthesise(folder, clips=clips, seed=seed, hidden=0.5)


def requests(shards: ShardSet, clips: list[int], conversations: list[int] | None = None) -> list[Request]:
    """Requests for the given conversations (default: all) of the given clips."""
    samples = [shards.read(clip) for clip in clips]
    return [Request(s, tuple(conversations or range(len(s.record.conversations)))) for s in samples]


def make_batch(
    system: SwimSystem, shards: ShardSet, clips: list[int], conversations: list[int] | None = None
) -> SwimBatch:
    """One batch."""
    return system.collator(requests(shards, clips, conversations))


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Copy of every gradient, zeros where there is none."""
    return {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Largest absolute difference between two dictionaries of tensors with the same names."""
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)
