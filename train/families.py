"""What differs between video LLM families: pixels, the clip's place in the text, its tokens' positions, batch keys.

A family says how frames become the model's pixels, which text stands where the chat template puts a video (with one
placeholder token per run of visual tokens), how long each run is, and which positions the tokens have. The visual
tokens of a clip are its first T x h x w placeholder tokens, in that order; they need not be contiguous. Everything
else (encoding, batches, attention, losses) is the same for all. Equal to the stock processors, see
tests/train/test_families.py.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim.train.preprocess import Geometry, patchify


@dataclass(frozen=True)
class Clip:
    """A decoded clip: model pixels, token grid (T, h, w), stored frames behind each temporal step, and its timing."""

    key: str
    pixels: Tensor
    grid: tuple[int, int, int]
    frames: list[list[int]]
    seconds_per_step: float
    fps: float  # of the stored video

    @property
    def num_cells(self) -> int:
        """Visual tokens of the clip's grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class Family(ABC):
    """One model family; built from a model config and its tokenizer."""

    frames_per_step: int  # stored frames behind one temporal step of the grid
    template: str  # what the chat template writes for a video
    token: str  # the placeholder that the model replaces by visual features
    token_id: int

    @abstractmethod
    def pixels(self, frames: np.ndarray, *, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
        """Model pixels and token grid (T, h, w) of RGB frames (N, height, width, 3) uint8."""

    @abstractmethod
    def text(self, clip: Clip) -> str:
        """The text in place of `template`, with one placeholder `token` for every run of visual tokens."""

    @abstractmethod
    def runs(self, clip: Clip) -> list[int]:
        """Tokens of each run, in order; together they start with the T x h x w visual tokens."""

    @abstractmethod
    def inputs(self, clips: Sequence[Clip], types: Tensor) -> dict[str, Tensor]:
        """Batch keys of the clips, in the order of their placeholders; `types` (B, L) is 2 at placeholders, else 0."""

    @abstractmethod
    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:
        """Position ids (3, L) or (1, L) of one sequence whose placeholders belong to `clip`."""

    @abstractmethod
    def dummy(self) -> Clip:
        """The smallest clip the vision tower accepts, for batches without any."""


class Qwen2VL(Family):
    """Qwen2-VL (arXiv 2409.12191): one run per clip, multimodal RoPE over (time, row, column)."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.geometry = Geometry.of(config)
        self.frames_per_step = self.geometry.temporal_patch_size
        self.token_id = config.video_token_id
        self.token = self.template = str(tokenizer.convert_ids_to_tokens(config.video_token_id))

    def pixels(self, frames: np.ndarray, *, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:
        """Patch rows (T * H * W, values) and the grid of merged tokens."""
        patches, (steps, rows, columns) = patchify(frames, self.geometry, min_pixels=min_pixels, max_pixels=max_pixels)
        return patches, (steps, rows // self.geometry.merge_size, columns // self.geometry.merge_size)

    def text(self, clip: Clip) -> str:  # noqa: ARG002
        """The placeholder alone: the template frames it."""
        return self.token

    def runs(self, clip: Clip) -> list[int]:
        """One run."""
        return [clip.num_cells]

    def inputs(self, clips: Sequence[Clip], types: Tensor) -> dict[str, Tensor]:
        """Patches of all clips, their grids in patches, and the token types that multimodal RoPE needs."""
        merge = self.geometry.merge_size
        return {
            "pixel_values_videos": torch.cat([clip.pixels for clip in clips]),
            "video_grid_thw": torch.tensor([(t, h * merge, w * merge) for t, h, w in (clip.grid for clip in clips)]),
            "mm_token_type_ids": types.int(),
        }

    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:
        """Multimodal RoPE; a step of time is one position."""
        return mrope_positions(types, [(clip.grid, 1.0)] if clip else [])

    def dummy(self) -> Clip:
        """One visual token."""
        pixels = torch.zeros(self.geometry.merge_size**2, self.geometry.patch_values)
        return Clip(key="", pixels=pixels, grid=(1, 1, 1), frames=[[]], seconds_per_step=1.0, fps=1.0)


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL (arXiv 2502.13923): positions in time follow the seconds between steps."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.tokens_per_second = config.vision_config.tokens_per_second

    def inputs(self, clips: Sequence[Clip], types: Tensor) -> dict[str, Tensor]:
        """As Qwen2-VL, with the seconds per step: generation computes its own positions."""
        seconds = torch.tensor([clip.seconds_per_step for clip in clips])
        return super().inputs(clips, types) | {"second_per_grid_ts": seconds}

    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:
        """Multimodal RoPE with time in seconds."""
        # float32 as in the model, which truncates the product: float64 would differ at exact multiples.
        stride = float(np.float32(clip.seconds_per_step) * np.float32(self.tokens_per_second)) if clip else 1.0
        return mrope_positions(types, [(clip.grid, stride)] if clip else [])


class Qwen3VL(Qwen2VL):
    """Qwen3-VL: one run per temporal step, each behind its time as text; every step's positions start anew."""

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        self.geometry = self.geometry.model_copy(update={"image_mean": (0.5, 0.5, 0.5), "image_std": (0.5, 0.5, 0.5)})
        start, end = tokenizer.convert_ids_to_tokens([config.vision_start_token_id, config.vision_end_token_id])
        self.template = self._step = f"{start}{self.token}{end}"

    def text(self, clip: Clip) -> str:
        """`<1.5 seconds>` and a framed placeholder for every step: the mean time of its first and last frame."""
        times = [(frames[0] + frames[-1]) / 2 / clip.fps if frames else 0.0 for frames in clip.frames]
        return "".join(f"<{time:.1f} seconds>{self._step}" for time in times)

    def runs(self, clip: Clip) -> list[int]:
        """One run per step."""
        return [clip.grid[1] * clip.grid[2]] * clip.grid[0]

    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:
        """Multimodal RoPE with every step a clip of its own."""
        return mrope_positions(types, [((1, *clip.grid[1:]), 1.0)] * clip.grid[0] if clip else [])


def mrope_positions(types: np.ndarray, clips: Sequence[tuple[tuple[int, int, int], float]]) -> np.ndarray:
    """Multimodal RoPE positions (3, L): text counts on, a clip (grid, positions per step) spans time, row, column.

    After a clip, text goes on at the clip's start plus the longer side of its grid. Source: Qwen2.5-VL (arXiv
    2502.13923), 2.1.
    """
    positions = np.empty((3, len(types)), dtype=np.int64)
    remaining, at, position = list(clips), 0, 0
    while at < len(types):
        if types[at] == 0:
            end = at + int(np.argmax(types[at:] != 0)) if (types[at:] != 0).any() else len(types)
            positions[:, at:end] = position + np.arange(end - at)
            position += end - at
        else:
            (steps, height, width), stride = remaining.pop(0)
            end = at + steps * height * width
            time = (np.arange(steps, dtype=np.float32) * np.float32(stride)).astype(np.int64)
            grid = np.stack(np.meshgrid(time, np.arange(height), np.arange(width), indexing="ij"))
            positions[:, at:end] = position + grid.reshape(3, -1)
            position += max(height, width)
        at = end
    return positions


FAMILIES: dict[str, Any] = {"qwen2_vl": Qwen2VL, "qwen2_5_vl": Qwen25VL, "qwen3_vl": Qwen3VL}


def family_of(config: Any, tokenizer: Any) -> Family:
    """The family of a model config; ValueError for one that has no adapter."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} has no family adapter; there are: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type](config, tokenizer)
