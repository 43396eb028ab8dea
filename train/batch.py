"""From encoded conversations to one padded batch: positions, labels, noun rows and the table of keys they look at.

Everything here is picklable CPU work for loader workers; the model is not needed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from swim.kernels.noun_attention import ClipKeys, Scope, WorkTable, build_work_table
from swim.train.encode import IGNORE, Encoded, Noun, SpecialTokens
from swim.train.preprocess import Geometry


@dataclass(frozen=True)
class Clip:
    """A decoded clip: patch rows (T*H*W, values), token grid (T, h, w), stored frames behind each temporal step."""

    key: str
    patches: Tensor
    grid: tuple[int, int, int]
    frames: list[list[int]]
    seconds_per_step: float


def mrope_positions(
    types: np.ndarray, clips: Sequence[tuple[tuple[int, int, int], float]], tokens_per_second: float
) -> np.ndarray:
    """Multimodal RoPE positions (3, L) of one sequence: text counts on, a clip (grid, seconds per step) spans time,
    row, column.

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
            (steps, height, width), seconds = remaining.pop(0)
            end = at + steps * height * width
            # float32 as in the model, which truncates the product: float64 would differ at exact multiples.
            time = (
                np.arange(steps, dtype=np.float32) * np.float32(np.float32(seconds) * np.float32(tokens_per_second))
            ).astype(np.int64)
            grid = np.stack(np.meshgrid(time, np.arange(height), np.arange(width), indexing="ij"))
            positions[:, at:end] = position + grid.reshape(3, -1)
            position += max(height, width)
        at = end
    return positions


@dataclass(frozen=True)
class Hole:
    """A unit that could not be made into rows: it keeps its place in the order and carries no loss."""

    id: str
    shard: str
    offset: int
    reason: str


@dataclass
class Batch:
    """One micro-batch: model inputs, answer labels, noun rows, counts for step-wide means, and who is in it."""

    inputs: dict[str, Tensor]
    label_columns: Tensor  # (C,) sequence columns whose logits are needed (`logits_to_keep`)
    label_rows: Tensor  # (A,) batch row of each answer token
    label_slots: Tensor  # (A,) its place in label_columns
    labels: Tensor  # (A,) the answer tokens
    table: WorkTable
    nouns: list[Noun]
    clips: list[Clip | None]  # per batch row
    ids: list[str]  # per batch row, KEY#conversation
    prompt_lengths: list[int]  # per batch row
    counts: dict[str, float]
    holes: list[Hole] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def pad_batch(
    rows: Sequence[tuple[str, Encoded, Clip | None]],
    *,
    special: SpecialTokens,
    geometry: Geometry,
    scope: Scope,
    pad_token: int,
    holes: Sequence[Hole] = (),
) -> Batch:
    """Right-pad encoded conversations (id, tokens, clip) into one batch; without any clip, a one-token dummy clip is
    appended.

    The dummy stands behind the last token of row 0, where causal attention hides it from every label; it makes the
    vision tower run on every rank in every micro-batch, as ZeRO-3's collectives need. With no rows at all the batch is
    such a dummy alone.
    """
    encoded = [e for _, e, _ in rows] or [
        Encoded(np.array([pad_token]), np.array([0]), np.array([IGNORE]), nouns=[], answer_start=1)
    ]
    clips: list[Clip | None] = [clip for _, _, clip in rows] or [None]
    seen = [clip for clip in clips if clip is not None]
    if not seen:
        encoded[0] = _with_dummy_clip(encoded[0], special)
        zeros = torch.zeros(geometry.merge_size**2, geometry.patch_values)
        seen = [Clip(key="", patches=zeros, grid=(1, 1, 1), frames=[], seconds_per_step=1.0)]
    spans = iter([(clip.grid, clip.seconds_per_step) for clip in seen])

    shape = (len(encoded), max(len(e.ids) for e in encoded))
    ids, types, mask = np.full(shape, pad_token), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, positions = np.full(shape, IGNORE), np.zeros((3, *shape), dtype=np.int64)
    keys: list[ClipKeys] = []
    noun_rows: list[tuple[int, int]] = []
    nouns: list[Noun] = []
    for row, e in enumerate(encoded):
        length = len(e.ids)
        ids[row, :length], types[row, :length], mask[row, :length], labels[row, :length] = e.ids, e.types, 1, e.labels
        of_row = [next(spans)] if e.types.any() else []
        positions[:, row, :length] = mrope_positions(e.types, of_row, geometry.tokens_per_second)
        if (clip := clips[row]) is not None:
            nouns += [replace(noun, row=row) for noun in e.nouns]
            noun_rows += [(len(keys), token) for noun in e.nouns for token in noun.tokens]
            keys.append(ClipKeys(row, int(np.argmax(e.types == 2)), clip.grid))

    # Logits are taken only where a label is predicted: with a vocabulary of 152 000 they are a step's largest tensor.
    label_rows, label_positions = np.nonzero(labels != IGNORE)
    columns, slots = np.unique(label_positions - 1, return_inverse=True)
    merge = geometry.merge_size
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
            "mm_token_type_ids": torch.from_numpy(types).int(),
            "pixel_values_videos": torch.cat([clip.patches for clip in seen]),
            "video_grid_thw": torch.tensor([(t, h * merge, w * merge) for t, h, w in (clip.grid for clip in seen)]),
        },
        label_columns=torch.from_numpy(columns) if len(columns) else torch.zeros(1, dtype=torch.int64),
        label_rows=torch.from_numpy(label_rows),
        label_slots=torch.from_numpy(slots.reshape(-1)),
        labels=torch.from_numpy(labels[label_rows, label_positions]),
        table=build_work_table(noun_rows, keys, scope),
        nouns=nouns,
        # Without the pixels, which are among the inputs: a batch crosses from the loader's process to the trainer's.
        clips=[clip and replace(clip, patches=clip.patches[:0]) for clip in clips],
        ids=[name for name, _, _ in rows],
        prompt_lengths=[e.answer_start for e in encoded],
        counts={"text": float(len(label_rows))},
        holes=list(holes),
    )


def _with_dummy_clip(encoded: Encoded, special: SpecialTokens) -> Encoded:
    tail = np.array([special.vision_start, special.video, special.vision_end])
    return replace(
        encoded,
        ids=np.concatenate([encoded.ids, tail]),
        types=np.concatenate([encoded.types, np.array([0, 2, 0])]),
        labels=np.concatenate([encoded.labels, np.full(3, IGNORE)]),
    )
