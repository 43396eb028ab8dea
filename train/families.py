"""What differs between video LLM families: pixels, the clip's place in the text, its tokens' positions, batch keys.

A family says how frames become the model's pixels, which text stands where the chat template puts a video (with one
placeholder token per run of visual tokens), how long each run is, and which positions the tokens have. The visual
tokens of a clip are its first T x h x w placeholder tokens, in that order; they need not be contiguous. Everything
else (encoding, batches, attention, losses) is the same for all. Equal to the stock processors and models, see
tests/train/test_families.py and test_preprocess.py.

Means and deviations of pixels are those of the processor file beside a pretrained model, else the constants named here.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim.train.preprocess import (
    CLIP,
    HALF,
    IMAGENET,
    Geometry,
    colours_of,
    patchify,
    processor_file,
    resize,
    side_of,
    smart_resize,
)


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


def sampled_clip(
    key: str, chosen: Sequence[int], pixels: Tensor, grid: tuple[int, int, int], *, per_step: int, fps: float
) -> Clip:
    """The clip of `chosen` stored frames, `per_step` to a temporal step, of a video with `fps` frames per second."""
    # A clip shorter than the number of sampled frames ends in repetitions of its last frame, which take no time.
    spacing = max(1.0, (chosen[-1] - chosen[0]) / max(len(chosen) - 1, 1))
    frames = [list(chosen[t * per_step : (t + 1) * per_step]) for t in range(grid[0])]
    return Clip(key, pixels, grid, frames, seconds_per_step=per_step * spacing / fps, fps=fps)


class Family(ABC):
    """One model family; built from a model config and its tokenizer."""

    frames_per_step: int  # stored frames behind one temporal step of the grid
    template: str  # what the chat template writes for a video
    token: str  # the placeholder that the model replaces by visual features
    token_id: int
    names_times = False  # whether `text` depends on which frames were sampled, not only on their number
    stacks_clips = False  # whether the clips of a batch need equally many frames

    @abstractmethod
    def grid(self, num_frames: int, size: tuple[int, int], *, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
        """Token grid (T, h, w) that `pixels` gives to so many frames of `size` (height, width); VideoError as there."""

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

    colours = CLIP

    def __init__(self, config: Any, tokenizer: Any) -> None:
        self.geometry = Geometry.of(config, self.colours)
        self.frames_per_step = self.geometry.temporal_patch_size
        self.token_id = config.video_token_id
        self.token = self.template = _token(tokenizer, config.video_token_id)

    def grid(self, num_frames: int, size: tuple[int, int], *, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:
        """Merged tokens."""
        cell = self.geometry.cell
        height, width = smart_resize(*size, cell, min_pixels, max_pixels)
        return -(-num_frames // self.frames_per_step), height // cell, width // cell

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
    """Qwen3-VL (arXiv 2511.21631): one run per temporal step, each behind its time as text; every step's positions
    start anew.

    Every step has a pair of start and end tokens, and the template's own pair stays around them all, as transformers
    writes it since 5.10 and vLLM with it (vLLM issue 46817); earlier releases took that pair away.
    The pixel budget is a frame's, as in the other families; the stock processor's is a clip's: N times as much for N
    frames, N even (an odd last frame counts once more or less there). It also enlarges frames with a side below one
    cell before it applies the budget.
    """

    colours = HALF
    names_times = True

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        start, end = (_token(tokenizer, i) for i in (config.vision_start_token_id, config.vision_end_token_id))
        self._step = f"{start}{self.token}{end}"

    def text(self, clip: Clip) -> str:
        """`<1.5 seconds>` and a framed placeholder for every step: the mean time of its first and last frame."""
        # Divided before they are added, as in the stock processor: the other order rounds differently now and then.
        ends = [(frames[0] / clip.fps, frames[-1] / clip.fps) if frames else (0.0, 0.0) for frames in clip.frames]
        return "".join(f"<{(first + last) / 2:.1f} seconds>{self._step}" for first, last in ends)

    def runs(self, clip: Clip) -> list[int]:
        """One run per step."""
        return [clip.grid[1] * clip.grid[2]] * clip.grid[0]

    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:
        """Multimodal RoPE with every step a clip of its own."""
        return mrope_positions(types, [((1, *clip.grid[1:]), 1.0)] * clip.grid[0] if clip else [])


class _SquareFrames(Family):
    """Families that stretch every frame to a square of the vision tower's size; a frame is a step, positions are plain.

    The tower knows one size, so the pixel budget is not looked at.
    """

    frames_per_step = 1
    colours = CLIP
    strategy: str  # the one vision_feature_select_strategy whose features are all patches and nothing else

    def __init__(self, config: Any) -> None:
        if (strategy := config.vision_feature_select_strategy) != self.strategy:
            raise ValueError(f"vision_feature_select_strategy is {strategy!r}; only {self.strategy!r} is implemented")
        fields = processor_file(config)
        self.normalisation = colours_of(fields, self.colours)
        self.side = side_of(config.vision_config, "image_size")
        self.patches = self.side // side_of(config.vision_config, "patch_size")  # per row of a frame
        size = fields.get("size") or {}
        if (stored := (size.get("height"), size.get("width"))) not in ((None, None), (self.side, self.side)):
            raise ValueError(
                f"the video processor of {config.name_or_path} makes frames of {stored[0]}x{stored[1]} pixels, its "
                f"vision_config.image_size is {self.side}; only equal sizes are implemented"
            )

    @property
    @abstractmethod
    def cells(self) -> int:
        """Visual tokens per row, and rows, of a frame."""

    def grid(self, num_frames: int, size: tuple[int, int], *, min_pixels: int, max_pixels: int) -> tuple[int, int, int]:  # noqa: ARG002
        """The same square for every frame."""
        return num_frames, self.cells, self.cells

    def pixels(self, frames: np.ndarray, *, min_pixels: int, max_pixels: int) -> tuple[Tensor, tuple[int, int, int]]:  # noqa: ARG002
        """Frames (N, 3, side, side) and the grid."""
        return resize(frames, self.side, self.side, self.normalisation), (len(frames), self.cells, self.cells)

    def positions(self, types: np.ndarray, clip: Clip | None) -> np.ndarray:  # noqa: ARG002
        """Tokens count on."""
        return np.arange(len(types))[None]

    def dummy(self) -> Clip:
        """One frame."""
        grid = (1, self.cells, self.cells)
        pixels = torch.zeros(1, 3, self.side, self.side)
        return Clip(key="", pixels=pixels, grid=grid, frames=[[]], seconds_per_step=1.0, fps=1.0)


class LlavaOnevision(_SquareFrames):
    """LLaVA-OneVision (arXiv 2408.03326): patches pooled two by two, one run per clip that ends in a line break.

    Published checkpoints bring SigLIP's means of 0.5 in their processor file; the stock class's are CLIP's.
    """

    strategy = "full"
    stacks_clips = True

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config)
        self.token_id = config.video_token_id
        self.token = self.template = _token(tokenizer, config.video_token_id)

    @property
    def cells(self) -> int:
        """Half the patches, rounded up."""
        return -(-self.patches // 2)

    def text(self, clip: Clip) -> str:  # noqa: ARG002
        """The placeholder alone."""
        return self.token

    def runs(self, clip: Clip) -> list[int]:
        """One run; its last token is the line break, not a part of any frame."""
        return [clip.num_cells + 1]

    def inputs(self, clips: Sequence[Clip], types: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Frames (clips, N, 3, side, side): all clips of a batch need as many frames."""
        return {"pixel_values_videos": torch.stack([clip.pixels for clip in clips])}


class InternVL(_SquareFrames):
    """InternVL 2.5 and 3 (arXiv 2412.05271): every frame is an image of its own, named `Frame1: ` and so on.

    The constants are those of the published checkpoints (ImageNet's), not of the stock class (CLIP's).
    """

    colours = IMAGENET
    strategy = "default"
    template = "<video>"
    frame = ("<img>", "</img>")

    def __init__(self, config: Any, tokenizer: Any) -> None:
        super().__init__(config)
        self.ratio = config.downsample_ratio
        if self.patches * self.ratio != self.cells:
            raise ValueError(f"downsample_ratio {self.ratio} does not divide the {self.patches} patches of a row")
        if missing := [token for token in self.frame if token not in tokenizer.get_vocab()]:
            raise ValueError(f"the tokenizer has no {' and '.join(missing)}, which frame the images of InternVL")
        self.token_id = config.image_token_id
        self.token = _token(tokenizer, config.image_token_id)

    @property
    def cells(self) -> int:
        """Rows and columns of patches that pixel shuffle leaves."""
        return int(self.patches * self.ratio)

    def text(self, clip: Clip) -> str:
        """A line per frame."""
        start, end = self.frame
        return "\n".join(f"Frame{i + 1}: {start}{self.token}{end}" for i in range(clip.grid[0]))

    def runs(self, clip: Clip) -> list[int]:
        """One run per frame."""
        return [clip.grid[1] * clip.grid[2]] * clip.grid[0]

    def inputs(self, clips: Sequence[Clip], types: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """Frames of all clips as images."""
        return {"pixel_values": torch.cat([clip.pixels for clip in clips])}


def _token(tokenizer: Any, number: int) -> str:
    # A config that names a token beyond the vocabulary would otherwise end in a template without any placeholder.
    if (token := tokenizer.convert_ids_to_tokens(number)) is None:
        raise ValueError(f"the config names token {number}, the tokenizer has {len(tokenizer)}; give the model's own")
    return str(token)


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


FAMILIES: dict[str, Any] = {
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "llava_onevision": LlavaOnevision,
    "internvl": InternVL,
}


def family_of(config: Any, tokenizer: Any) -> Family:
    """The family of a model config; ValueError for one that has no adapter."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type {config.model_type!r} has no family adapter; there are: {', '.join(FAMILIES)}")
    return FAMILIES[config.model_type](config, tokenizer)
