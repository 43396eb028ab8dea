"""A tiny model, its system and a few synthetic clips, shared by the tests and by the processes they start."""

import json
from pathlib import Path
from typing import Any

import numpy as np
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
    fixed = [f"data.train=[{data}]", "data.synth=null", "data.shared_prefix=false"]
    return load_config("tiny_cpu", [*fixed, "system.layers=[1, 3]", "system.mask_weight=1", *overrides])


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
    # numpy's maximum keeps a NaN, Python's max may pass over it.
    return float(np.max([float((a[name] - b[name]).detach().abs().max()) for name in a]))


def family_config(data: Path, model_type: str, *overrides: str) -> Config:
    """A small model of any family over the shards in `data`; layers 0 and 2 of its three are supervised."""
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    text = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.08,
    }
    vision: dict[str, Any] = {"patch_size": 7, "initializer_range": 0.08}
    grid = {"spatial_merge_size": 2, "temporal_patch_size": 2, "depth": 2, "num_heads": 2}
    plain = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    match model_type:
        case "qwen2_vl":
            text |= {"rope_parameters": {**rope, "mrope_section": [2, 3, 3]}}
            vision |= {**grid, "embed_dim": 32, "mlp_ratio": 2}
        case "qwen2_5_vl":
            text |= {"rope_parameters": {**rope, "mrope_section": [2, 3, 3]}}
            vision |= {**grid, "hidden_size": 32, "intermediate_size": 64, "tokens_per_second": 2}
            vision |= {"window_size": 28, "fullatt_block_indexes": [1]}
        case "qwen3_vl":
            text |= {"rope_parameters": {**rope, "mrope_section": [4, 2, 2]}, "head_dim": 16}
            vision |= {**grid, "hidden_size": 32, "intermediate_size": 64}
            vision |= {"num_position_embeddings": 144, "deepstack_visual_indexes": [0, 1]}
        case "llava_onevision":  # nine patches a side, so that pooling rounds up
            text |= {"model_type": "qwen2", "rope_parameters": rope}
            vision |= {**plain, "model_type": "siglip_vision_model", "image_size": 63, "vision_use_head": False}
            del vision["initializer_range"]
        case "internvl":
            text |= {"model_type": "qwen2", "rope_parameters": rope}
            vision |= {**plain, "image_size": 56}
    model = {"model_type": model_type, "tie_word_embeddings": False, "text_config": text, "vision_config": vision}
    return tiny_config(data, f"model.config={json.dumps(model)}", "system.layers=[0, 2]", *overrides)


def contents(folder: Path) -> dict[str, bytes]:
    """The bytes of every file of a folder, by its path inside."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
