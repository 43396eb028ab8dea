"""A stock model folder from any checkpoint, without the engine that wrote it."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from swim.train.checkpoint import verify
from swim.train.config import Config, parse_config
from swim.train.partitions import CheckpointError, Partitions
from swim.train.stock import tokenizer_and_config
from swim.train.weights import MAX_SHARD_BYTES, finish_folder, stock_shards, write_shard


class Weights(NamedTuple):
    """What `stock_shards` makes a folder of: description, meta tensors by stock name, a way to get any parameter by its
    name in training, and the adapters among them."""

    stock: Mapping[str, Any]
    shapes: dict[str, Tensor]
    fetch: Callable[[str], Tensor]
    adapters: dict[str, Tensor]


def checkpoint_weights(checkpoint: Path) -> tuple[Config, Weights]:
    """Config of the run and weights of a checkpoint, its fp32 values rounded to the model's type; CheckpointError if it
    is damaged."""
    manifest = verify(checkpoint)
    stock, saved = manifest["stock"], Partitions([checkpoint / name for name in manifest["files"]], manifest["world"])
    dtype, sizes = getattr(torch, stock["dtype"]), {**saved.trained, **saved.frozen}
    shapes = {name: torch.empty(sizes[own], dtype=dtype, device="meta") for name, own in stock["names"].items()}
    fetch = partial(saved.parameter, dtype=dtype)
    adapters = {name: fetch(name) for name in sizes if ".lora_" in name}
    return parse_config(manifest["config"], source=str(checkpoint)), Weights(stock, shapes, fetch, adapters)


def consolidate(checkpoint: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the stock model folder `out` of a checkpoint, whatever number of ranks wrote it: its fp32 values rounded to
    the model's type, equal to what `save_model` writes.

    Needs memory for one shard and no GPU. CheckpointError for a damaged checkpoint, or if `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; give another folder, or remove it")
    config, (stock, shapes, fetch, adapters) = checkpoint_weights(checkpoint)
    hidden = out.with_name(f".{out.name}.incoming")
    shutil.rmtree(hidden, ignore_errors=True)
    for path, tensors in stock_shards(hidden, stock, shapes, fetch, max_shard_bytes):
        write_shard(path, tensors)
        del tensors
    tokenizer = tokenizer_and_config(config.model)[0]
    finish_folder(hidden, out, stock, shapes, tokenizer, config.model.path, max_shard_bytes, adapters)
