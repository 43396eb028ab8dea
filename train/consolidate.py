"""A stock model folder from any checkpoint, without the engine that wrote it."""

import shutil
from functools import partial
from pathlib import Path

import torch

from swim.train.checkpoint import verify
from swim.train.config import parse_config
from swim.train.partitions import CheckpointError, Partitions
from swim.train.stock import tokenizer_and_config
from swim.train.weights import MAX_SHARD_BYTES, finish_folder, stock_shards, write_shard


def consolidate(checkpoint: Path, out: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the stock model folder `out` of a checkpoint, whatever number of ranks wrote it: its fp32 values rounded to
    the model's type, equal to what `save_model` writes.

    Needs memory for one shard and no GPU. CheckpointError for a damaged checkpoint, or if `out` exists.
    """
    if out.exists():
        raise CheckpointError(f"{out} exists already; give another folder, or remove it")
    manifest = verify(checkpoint)
    stock, saved = manifest["stock"], Partitions([checkpoint / name for name in manifest["files"]], manifest["world"])
    dtype, sizes = getattr(torch, stock["dtype"]), {**saved.trained, **saved.frozen}
    model = parse_config(manifest["config"], source=str(checkpoint)).model
    shapes = {name: torch.empty(sizes[own], dtype=dtype, device="meta") for name, own in stock["names"].items()}
    hidden = out.with_name(f".{out.name}.incoming")
    shutil.rmtree(hidden, ignore_errors=True)
    fetch = partial(saved.parameter, dtype=dtype)
    for path, tensors in stock_shards(hidden, stock, shapes, fetch, max_shard_bytes):
        write_shard(path, tensors)
        del tensors
    adapters = {name: fetch(name) for name in sizes if ".lora_" in name}
    finish_folder(hidden, out, stock, shapes, tokenizer_and_config(model)[0], model.path, max_shard_bytes, adapters)
