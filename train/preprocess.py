"""Frames to model pixels for the Qwen-VL families, in torch alone (the stock video processor needs torchvision).

    resize (bicubic, antialiased) to multiples of patch * merge within the pixel budget, normalise, cut into patches

A patch row holds channel x temporal_patch x patch x patch values; rows run over t, then over merge x merge blocks, so
that each block of merge^2 rows becomes one visual token. Equal to Qwen2VLVideoProcessor
(tests/train/test_preprocess.py).
"""

import math
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from swim.data_tools.video import VideoError


class Geometry(BaseModel):
    """How a model family cuts video into tokens; patch sizes in pixels and frames, means and deviations of pixels in
    [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: tuple[float, float, float] = (0.48145466, 0.4578275, 0.40821073)
    image_std: tuple[float, float, float] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def of(cls, config: Any) -> "Geometry":
        """Read the geometry of a Qwen-VL model config."""
        vision = config.vision_config
        return cls(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
        )

    @property
    def cell(self) -> int:
        """Side of one visual token in resized pixels."""
        return self.patch_size * self.merge_size

    @property
    def patch_values(self) -> int:
        """Values in one patch row."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def smart_resize(height: int, width: int, cell: int, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """Height and width rounded to multiples of `cell`, scaled into [min_pixels, max_pixels] at nearly the same aspect
    ratio.

    Raises VideoError beyond an aspect ratio of 200. Source: the resize rule of Qwen2-VL's processor.
    """
    if max(height, width) > 200 * min(height, width):
        raise VideoError(f"frame of {width}x{height} pixels has an aspect ratio beyond 200; crop it first")
    new_height, new_width = (round(side / cell) * cell for side in (height, width))
    if new_height * new_width > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        new_height, new_width = (max(cell, math.floor(side / shrink / cell) * cell) for side in (height, width))
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height, new_width = (math.ceil(side * grow / cell) * cell for side in (height, width))
    return new_height, new_width


def patchify(
    frames: np.ndarray, geometry: Geometry, *, min_pixels: int, max_pixels: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patch rows (T*H*W, patch_values) fp32 and grid (T, H, W) in patches, from RGB frames (N, height, width, 3) uint8.

    An odd last frame is repeated to fill its temporal patch. `min_pixels` and `max_pixels` are per frame.
    """
    height, width = smart_resize(frames.shape[1], frames.shape[2], geometry.cell, min_pixels, max_pixels)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if (height, width) != video.shape[-2:]:
        # On uint8, as the stock processor does: its result is rounded to whole grey levels before normalisation.
        video = torch.nn.functional.interpolate(video, (height, width), mode="bicubic", antialias=True)
    mean, std = (255 * torch.tensor(x).view(1, 3, 1, 1) for x in (geometry.image_mean, geometry.image_std))
    video = (video.float() - mean) / std
    if missing := -len(video) % geometry.temporal_patch_size:
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
    p, m, t = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    grid = (len(video) // t, height // p, width // p)
    blocks = video.view(grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, geometry.patch_values), grid
