"""How many tokens every conversation has and what they cost, without decoding: what the plan needs to fill packs.

Text is counted once, by the very code that makes batches, and kept in `run.output`/.cache, one file per data set and
way of counting. Visual tokens follow from the index facts (size, frames, rate), the sampling and the pixel budget.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.progress import track

from swim.data_tools.facts import load_arrays, save_arrays
from swim.data_tools.mixture import PlanError
from swim.data_tools.packing import Lengths, TokenModel
from swim.data_tools.shards import BadSample, ShardSet
from swim.data_tools.video import VideoError
from swim.train.config import Config
from swim.train.families import Clip, Family
from swim.train.preprocess import side_of
from swim.train.system import Collator, Request, System

COUNT_VERSION = 1  # raise it when the code that turns a conversation into tokens gives other numbers of them


class TextCounts(NamedTuple):
    """Tokens of a data set's conversations (C,) where every run of visual tokens counts as one: `tokens` in all, 0 for
    what cannot be used, `prefix` up to the end of the clip; equal `group` of a clip: equal prefix."""

    tokens: np.ndarray
    prefix: np.ndarray
    group: np.ndarray


def token_model(config: Config, system: System, shards: Sequence[ShardSet]) -> TokenModel:
    """Token counts of these data sets and costs of this model; text that was not counted before is counted now."""
    collator = system.collator
    family = collator.encoder.family
    tokenizer = _fingerprint(config, system)
    cost = Cost(system.model_config)
    lengths = []
    for one in shards:
        key = hashlib.sha256(f"{COUNT_VERSION} {one.digest} {tokenizer}".encode()).hexdigest()
        text = _cached(config.run.cache / f"tokens_{key[:24]}.npz", one, collator)
        lengths.append(_lengths(one, text, family, config, cost))
    dummy = len(collator.encoder.clip_tokens(family.dummy())[0])
    return TokenModel(tuple(lengths), config.data.shared_prefix, dummy, cost.linear, cost.pair, tokenizer)


def refuse_upscaling(config: Config, family: Family, shards: Sequence[ShardSet]) -> None:
    """PlanError if `data.min_pixels` makes stored frames larger, unless `data.upscale` allows it."""
    data = config.data

    def enlarged(size: tuple[int, int]) -> bool:
        try:
            free, limited = (
                family.grid(1, size, min_pixels=least, max_pixels=data.max_pixels) for least in (1, data.min_pixels)
            )
        except VideoError:
            return False  # a hole in training
        return limited > free

    for one in () if data.upscale else shards:
        sizes, counts = np.unique(one.facts.sizes, axis=0, return_counts=True)
        small = {(h, w): n for (h, w), n in zip(sizes.tolist(), counts.tolist()) if h and enlarged((h, w))}
        if small:
            height, width = min(small, key=lambda size: size[0] * size[1])
            raise PlanError(
                f"{one.folder}: data.min_pixels {data.min_pixels} enlarges the frames of {sum(small.values()):,} of "
                f"{len(one):,} clips, the smallest of {width}x{height} pixels: more tokens, nothing more to see. Lower "
                f"it to {height * width}, store larger videos, or set data.upscale=true"
            )


class Cost:
    """Floating-point operations of a forward pass, two for each multiplication and addition, from a model config.

    With width d, MLP width i, L layers and k = key heads / query heads, a token costs 2 L (d^2 (2 + 2k) + 3di) in the
    text model's matrices, and each (query, key) pair 4 L d; a vision patch 2 L (4d^2 + 2di) and 4 L d for each patch of
    its own temporal step, as if all saw each other. The backward pass is about twice as much everywhere.
    """

    def __init__(self, config: Any) -> None:
        text, vision = config.get_text_config(), config.vision_config
        width, layers = text.hidden_size, text.num_hidden_layers
        grouped = text.num_key_value_heads / text.num_attention_heads
        self.linear = 2.0 * layers * (width**2 * (2 + 2 * grouped) + 3 * width * text.intermediate_size)
        self.pair = 4.0 * layers * width
        layers = _first(vision, "depth", "num_hidden_layers")
        width = vision_width(vision)
        inner = getattr(vision, "intermediate_size", None) or int(width * getattr(vision, "mlp_ratio", 4))
        self.patch = 2.0 * layers * (4 * width**2 + 2 * width * inner)
        self.patch_pair = 4.0 * layers * width
        self._merge = getattr(vision, "spatial_merge_size", 0)
        # Square frames, whose patches are pooled in the family's own way.
        self._square = 0 if self._merge else (side_of(vision, "image_size") // side_of(vision, "patch_size")) ** 2

    def vision(self, grid: tuple[int, int, int]) -> float:
        """Cost of the vision pass of a clip with token grid (T, h, w)."""
        patches = self._square or grid[1] * grid[2] * self._merge**2
        return grid[0] * patches * (self.patch + patches * self.patch_pair)


def vision_width(vision: Any) -> int:
    """Width of the vision tower of this part of a config; Qwen2-VL calls the text model's width hidden_size."""
    return _first(vision, "embed_dim", "hidden_size")


def _first(config: Any, *names: str) -> int:
    return next(value for name in names if (value := getattr(config, name, None)) is not None)


def _fingerprint(config: Config, system: System) -> str:
    """SHA-256 of what the number of text tokens depends on beside the data."""
    family = system.collator.encoder.family
    tokenizer = system.tokenizer
    # Which frames are sampled matters only where the text names their times.
    sampling = config.data.frame_sampling if family.names_times else None
    parts: tuple[Any, ...] = (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.chat_template,
        type(family).__name__,
        config.data.num_frames,
        sampling,
        config.system["name"],
    )
    if config.data.frame_sampling == "fps":  # with the number of frames, the text differs in every family
        parts += ("fps", config.data.fps, config.data.min_frames)
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _cached(path: Path, shards: ShardSet, collator: Collator) -> TextCounts:
    if (arrays := load_arrays(path)) is not None:
        return TextCounts(**arrays)
    counts = count_text(shards, collator)
    save_arrays(path, **counts._asdict())
    return counts


def count_text(shards: ShardSet, collator: Collator) -> TextCounts:
    """Count the text tokens of every conversation; reads every record, and the masks only where frames' times count."""
    console = Console(stderr=True)
    print(f"counting the tokens of {len(shards)} records in {shards.folder}", flush=True)
    rows = []
    numbers = range(len(shards))
    for number in track(numbers, "counting tokens", console=console, disable=not console.is_terminal):
        rows.append(_count(shards, number, collator))
    return TextCounts(*np.concatenate([np.empty((0, 3), np.int32), *rows]).T)


def _count(shards: ShardSet, number: int, collator: Collator) -> np.ndarray:
    """(conversations, 3) tokens, prefix and group of one record; zeros for what cannot be used."""
    rows = np.zeros((len(shards.entries[number].conversations), 3), dtype=np.int32)
    family = collator.encoder.family
    try:
        sample = shards.read(number, masks=family.names_times)
    except BadSample:
        return rows  # a hole in training as well
    groups: dict[bytes, int] = {}
    for name, encoded, clip in collator.measure(Request(sample, tuple(range(len(rows))))):
        wide = _runs(family, clip)
        group = groups.setdefault(encoded.ids[: encoded.prefix].tobytes(), len(groups))
        rows[int(name.rsplit("#", 1)[1])] = len(encoded.ids) - wide, encoded.prefix - wide, group
    return rows


def _runs(family: Family, clip: Clip | None) -> int:
    """Tokens by which the runs of a clip are longer than one each."""
    runs = family.runs(clip) if clip is not None else []
    return sum(runs) - len(runs)


def _lengths(shards: ShardSet, text: TextCounts, family: Family, config: Config, cost: Cost) -> Lengths:
    data = config.data
    model = replace(family.dummy(), pixels=torch.empty(0))

    def of_frames(num_frames: int, height: int, width: int) -> tuple[int, float]:
        """Visual tokens beyond one a run, and cost; -1 for frames that cannot be resized."""
        if not height:
            return 0, 0.0  # text alone
        try:
            grid = family.grid(num_frames, (height, width), **data.pixel_limits(num_frames))
        except VideoError:
            return -1, 0.0
        return _runs(family, replace(model, grid=grid)), cost.vision(grid)

    facts = shards.facts
    timing, which = np.unique(np.stack([facts.num_frames, facts.fps], 1), axis=0, return_inverse=True)
    sampled = np.array([data.frames_of(int(n), fps) if n else 0 for n, fps in timing.tolist()], np.int64)
    clips = np.column_stack([sampled[which.reshape(-1)], facts.sizes])
    kinds, which = np.unique(clips, axis=0, return_inverse=True)
    visual, vision = np.array([of_frames(*kind) for kind in kinds.tolist()]).reshape(-1, 2)[which.reshape(-1)].T
    visual = np.repeat(visual.astype(np.int64), shards.facts.counts)
    usable = (text.tokens > 0) & (visual >= 0)
    prefix = np.where(usable & (text.prefix > 0), text.prefix + visual, 0)
    return Lengths(
        prefix=prefix,
        branch=np.where(usable, text.tokens - text.prefix, 0),
        group=text.group,
        vision=vision,
    )
