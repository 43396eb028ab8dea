"""Floating-point operations that a training step needs, and what share of the device's peak they are (MFU, PaLM,
arXiv 2204.02311).

Two for every multiplication and addition of a weight or an attended pair, in the forward pass, again where a gradient
flows to the input, and again for trained weights; nothing for recomputation, padding or supervision. A test counts the
same with torch's FlopCounterMode.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from swim.train.batch import Batch
from swim.train.lengths import vision_width
from swim.train.preprocess import side_of
from swim.train.scaling import device_of


class StepFlops:
    """Operations of batches of `model`, which may be partitioned, with this transformers config."""

    def __init__(self, model: nn.Module, model_config: Any) -> None:
        text, self._vision = model_config.get_text_config(), model_config.vision_config
        width = vision_width(self._vision)
        trained = {_kind(name) for name, parameter in model.named_parameters() if parameter.requires_grad}
        tower, below = "patch" in trained, bool(trained - {"head"})
        # Operations for each token, label, patch, and place behind the merger.
        self._each = {"text": 0.0, "head": 0.0, "patch": 0.0, "merged": 0.0}
        self._merged = 1.0  # places behind the merger for each patch
        open_: set[str] = set()  # mergers with a trained layer, into which gradients flow
        for name, module in model.named_modules():
            if not isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
                continue
            kind = _kind(name)
            weight: Any = module.weight
            if isinstance(module, nn.Linear) and kind == "merged" and not self._each["merged"]:
                self._merged = width / module.in_features
            # Nothing flows to pixels, nor into a frozen tower.
            merger = name.rpartition(".")[0]
            flows = below if kind in ("text", "head") else merger in open_ or (tower and isinstance(module, nn.Linear))
            if kind == "merged" and weight.requires_grad:
                open_.add(merger)
            numel = getattr(weight, "ds_numel", weight.numel())  # ZeRO-3 leaves none in the parameter itself
            self._each[kind] += 2.0 * numel * (1 + flows + weight.requires_grad)
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self._pair = 4.0 * text.num_hidden_layers * text.num_attention_heads * head_dim * (1 + 2 * below)
        self._patch_pair = 4.0 * width * (1 + 2 * tower)

    def of(self, batch: Batch) -> float:
        """Operations of a training step on the batch."""
        each = self._each
        vision = 0.0
        for steps, height, width in self._grids(batch):
            patches = steps * height * width
            vision += patches * (each["patch"] + self._merged * each["merged"])
            vision += steps * self._patch_pair * self._pairs(height, width)
        text = each["text"] * batch.num_tokens + self._pair * batch.num_pairs
        return text + each["head"] * len(batch.labels) + vision

    def _grids(self, batch: Batch) -> Iterator[tuple[int, int, int]]:
        """Steps, rows and columns of patches of every clip."""
        if (grids := batch.inputs.get("video_grid_thw")) is not None:
            yield from grids.tolist()
            return
        pixels = next(tensor for name, tensor in batch.inputs.items() if name.startswith("pixel_values"))
        side = side_of(self._vision, "patch_size")
        yield math.prod(pixels.shape[:-3]), pixels.shape[-2] // side, pixels.shape[-1] // side

    def _pairs(self, height: int, width: int) -> int:
        """Pairs of patches of a frame that see each other, over all layers."""
        layers = getattr(self._vision, "depth", None) or self._vision.num_hidden_layers
        whole = getattr(self._vision, "fullatt_block_indexes", None)
        num_whole = layers if whole is None else len(whole)
        pairs = num_whole * (height * width) ** 2
        if num_whole < layers:
            side = self._vision.window_size // self._vision.patch_size
            pairs += (layers - num_whole) * _squares(height, side) * _squares(width, side)
        return pairs


def peak_flops(device: torch.device, dtype: str) -> float:
    """Operations a second of the data sheet of a device for this type; NaN for a CPU, another type or an unknown
    device."""
    known = device_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    return known.flops if known is not None and dtype == "bfloat16" else math.nan


def _kind(name: str) -> str:
    if "lm_head" in name:
        return "head"
    if "language_model" in name:
        return "text"
    return "merged" if "merger" in name or "vis" not in name else "patch"


def _squares(length: int, side: int) -> int:
    """Sum of the squares of the parts when `length` is cut into parts of `side`."""
    return length // side * side**2 + (length % side) ** 2
