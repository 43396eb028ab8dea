"""A model of Qwen2.5-VL-7B's shape with random weights, and its training step: plain and supervised.

Made of the lowest pieces (attention capture, kernels), so that a machine with torch and transformers alone can run it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from benchmarks.pixel_loss import pack
from swim.kernels.mask_loss import MIN_PROBABILITY, frame_sums, mask_loss
from swim.kernels.noun_attention import ClipKeys, Row, build_work_table
from swim.train.attention import MODEL_KWARG, Capture, enable_checkpointing, register_capture

GIB = 2**30
TEXT = {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_window_layers": 28,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]},
}
VISION = {"hidden_size": 1280, "out_hidden_size": 3584, "tokens_per_second": 2}  # the rest is transformers' default
# Weights and gradients of a layer in bf16 and its checkpoint; embeddings, vision tower and one layer's activations.
GIB_PER_LAYER, GIB_BESIDE = 1.1, 18


@dataclass(frozen=True)
class Shape:
    """One clip of `grid` merged cells and text around it, `length` tokens in all; the nouns stand in its last part."""

    layers: int = 28
    grid: tuple[int, int, int] = (20, 24, 32)
    length: int = 16384
    nouns: int = 5
    answer: int = 512
    mask_size: tuple[int, int] = (480, 854)
    text: tuple[tuple[str, Any], ...] = ()  # overrides of the configuration
    vision: tuple[tuple[str, Any], ...] = ()

    @property
    def supervised(self) -> tuple[int, ...]:
        """At most six layers, evenly apart, that end at the last: 2, 7, 12, 17, 22, 27 of 28 (SWIM's)."""
        return tuple(range(self.layers - 1, -1, -max(1, round(self.layers / 6))))[:6][::-1]

    def config(self) -> Qwen2_5_VLConfig:
        text = {**TEXT, "num_hidden_layers": self.layers, **dict(self.text)}
        return Qwen2_5_VLConfig(text_config=text, vision_config={**VISION, **dict(self.vision)})


def layers_that_fit(free_bytes: int) -> int:
    """Decoder layers that a device has room for."""
    return max(1, min(28, int((free_bytes / GIB - GIB_BESIDE) / GIB_PER_LAYER)))


def build_model(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Any, str]:
    """The stock model with a frozen vision tower and non-reentrant checkpointing, and the name of the capturing
    attention."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2_5_VLForConditionalGeneration._from_config(shape.config(), dtype=dtype, attn_implementation="sdpa")
    model.model.visual.requires_grad_(False)
    enable_checkpointing(model)
    return model.train(), register_capture(model)


def model_inputs(shape: Shape, config: Any, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """Random pixels and tokens: a few of text, the clip, text."""
    generator = torch.Generator().manual_seed(0)
    steps, height, width = shape.grid
    vision = config.vision_config
    cells, merge = steps * height * width, vision.spatial_merge_size
    before = 4
    ids = torch.randint(100, (1, shape.length), generator=generator)
    ids[0, before : before + cells] = config.video_token_id
    ids[0, before - 1], ids[0, before + cells] = config.vision_start_token_id, config.vision_end_token_id
    values = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(cells * merge**2, values, generator=generator)
    inputs = {
        "input_ids": ids,
        "mm_token_type_ids": 2 * (ids == config.video_token_id).int(),
        "pixel_values_videos": pixels.to(dtype),
        "video_grid_thw": torch.tensor([[steps, height * merge, width * merge]]),
        "second_per_grid_ts": torch.ones(1),
    }
    return {name: x.to(device) for name, x in inputs.items()}


def steps(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Any, dict[str, Callable[[], Tensor]]]:
    """The model, and forward and backward of plain fine-tuning and of both sides of the mask loss, which return the
    loss and leave gradients on the model, and the vision tower's forward."""
    model, capturing = build_model(shape, device, dtype)
    inputs = model_inputs(shape, model.config, device, dtype)
    columns = torch.arange(shape.length - 1 - shape.answer, shape.length - 1, device=device)
    labels = inputs["input_ids"][0, columns + 1]
    cells = shape.grid[0] * shape.grid[1] * shape.grid[2]
    rows = [Row(0, shape.length - shape.answer + 7 * n) for n in range(shape.nouns)]
    table = build_work_table(rows, [ClipKeys(0, 4, shape.grid)]).to(device)
    frames, (height, width) = shape.nouns * shape.grid[0], shape.mask_size
    lengths = torch.ones(frames, dtype=torch.int64, device=device)
    weights = torch.full((frames,), 1 / frames, device=device)
    mask_1YX = torch.zeros(1, height, width, dtype=torch.bool, device=device)
    mask_1YX[:, height // 3 : height // 2, width // 3 : width // 2] = True
    coverage_1YX = torch.nn.functional.adaptive_avg_pool2d(mask_1YX.float(), shape.grid[1:])
    sides: dict[str, dict[str, Any]] = {
        "grid": {"kind": "kl", "target": coverage_1YX.expand(frames, -1, -1)},
        "pixel": {"kind": "bce", "target": pack(mask_1YX).expand(frames, -1, -1).contiguous(), "size": shape.mask_size},
    }

    def step(side: str | None) -> Tensor:
        model.zero_grad(set_to_none=True)
        model.set_attn_implementation({"text_config": capturing if side else "sdpa"})
        capture = Capture(table, shape.supervised) if side else None
        extra = {MODEL_KWARG: capture} if side else {}
        logits = model(**inputs, use_cache=False, logits_to_keep=columns, **extra).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), labels)
        if capture is not None and side is not None:
            layers_SP = torch.stack(list(capture.maps().values()))
            log_map = layers_SP.mean(0).clamp_min(MIN_PROBABILITY).log().view(frames, *shape.grid[1:])
            sums = frame_sums(log_map, **sides[side])
            loss = loss + mask_loss(sums, lengths, weights, kind=sides[side]["kind"])
        loss.backward()
        return loss.detach()

    def vision() -> Tensor:
        with torch.no_grad():
            grid = inputs["video_grid_thw"]
            return model.model.visual(inputs["pixel_values_videos"], grid_thw=grid)[0]

    assert cells + 5 + shape.answer <= shape.length
    return model, {
        "plain": partial(step, None),
        "supervised, grid side (kl)": partial(step, "grid"),
        "supervised, pixel side (bce)": partial(step, "pixel"),
        "vision tower alone": vision,
    }
