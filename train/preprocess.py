"""Frames to model pixels, in torch alone (the stock video processors need torchvision).

    resize (bicubic, antialiased) and normalise; for the Qwen-VL families to multiples of patch * merge within the
    pixel budget, then cut into patches

A patch row holds channel x temporal_patch x patch x patch values; rows run over t, then over merge x merge blocks, so
that each block of merge^2 rows becomes one visual token. Equal to the stock video processors
(tests/train/test_preprocess.py).
"""

import math
from typing import Any

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers.models.auto.video_processing_auto import get_video_processor_config

from swim.data_tools.video import VideoError

RGB = tuple[float, float, float]
Colours = tuple[RGB, RGB]  # means and deviations of pixels in [0, 1]
CLIP: Colours = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
IMAGENET: Colours = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF: Colours = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_BICUBIC = 3  # Pillow's number, which processor files use


def processor_file(config: Any) -> dict[str, Any]:
    """Fields of the video processor file beside the model that `config` was read from, {} if there is none.

    ValueError for one that prepares frames in a way this module does not.
    """
    fields: dict[str, Any] = get_video_processor_config(config.name_or_path) if config.name_or_path else {}
    for key, known in {"resample": _BICUBIC, "do_normalize": True, "do_center_crop": False}.items():
        if (value := fields.get(key)) is not None and value != known:
            raise ValueError(
                f"the video processor of {config.name_or_path} has {key} {value}; only {known} is implemented"
            )
    return fields


def colours_of(fields: dict[str, Any], default: Colours) -> Colours:
    """Means and deviations that a processor file gives, else `default`."""
    mean, std = (tuple(fields.get(key) or of) for key, of in zip(("image_mean", "image_std"), default))
    if not len(mean) == len(std) == 3:
        raise ValueError(f"image_mean {list(mean)} and image_std {list(std)} of the video processor need three values")
    return mean, std


def side_of(section: Any, key: str) -> int:
    """A side in pixels that a config gives as one number or as a square; ValueError for anything else."""
    value = getattr(section, key, None)
    sides = set(value) if isinstance(value, list | tuple) else {value}
    if len(sides) != 1 or not isinstance(side := sides.pop(), int) or side < 1:
        raise ValueError(f"vision_config.{key} is {value!r}; a positive number, or a square of two, is needed")
    return side


class Geometry(BaseModel):
    """How the Qwen-VL families cut video into tokens; patch sizes in pixels and frames, colours of pixels in [0, 1]."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    patch_size: int
    merge_size: int
    temporal_patch_size: int
    image_mean: RGB = CLIP[0]
    image_std: RGB = CLIP[1]

    @classmethod
    def of(cls, config: Any, colours: Colours = CLIP) -> "Geometry":
        """Read the geometry of a Qwen-VL model config, and its colours where a processor file stands beside it."""
        vision = config.vision_config
        mean, std = colours_of(processor_file(config), colours)
        return cls(
            patch_size=side_of(vision, "patch_size"),
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=side_of(vision, "temporal_patch_size"),
            image_mean=mean,
            image_std=std,
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


def resize(frames: np.ndarray, height: int, width: int, colours: Colours) -> Tensor:
    """Normalised pixels (N, 3, height, width) fp32 of RGB frames (N, height, width, 3) uint8 of any size."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2)
    if (height, width) != video.shape[-2:]:
        # On uint8, as the stock processor does: its result is rounded to whole grey levels before normalisation.
        video = torch.nn.functional.interpolate(video, (height, width), mode="bicubic", antialias=True)
    mean, std = (255 * torch.tensor(x).view(1, 3, 1, 1) for x in colours)
    return (video.float() - mean) / std


def patchify(
    frames: np.ndarray, geometry: Geometry, *, min_pixels: int, max_pixels: int
) -> tuple[Tensor, tuple[int, int, int]]:
    """Patch rows (T*H*W, patch_values) fp32 and grid (T, H, W) in patches, from RGB frames (N, height, width, 3) uint8.

    An odd last frame is repeated to fill its temporal patch. `min_pixels` and `max_pixels` are per frame.
    """
    height, width = smart_resize(frames.shape[1], frames.shape[2], geometry.cell, min_pixels, max_pixels)
    video = resize(frames, height, width, (geometry.image_mean, geometry.image_std))
    if missing := -len(video) % geometry.temporal_patch_size:
        video = torch.cat([video, video[-1:].expand(missing, -1, -1, -1)])
    p, m, t = geometry.patch_size, geometry.merge_size, geometry.temporal_patch_size
    grid = (len(video) // t, height // p, width // p)
    blocks = video.view(grid[0], t, 3, grid[1] // m, m, p, grid[2] // m, m, p)
    return blocks.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(-1, geometry.patch_values), grid
