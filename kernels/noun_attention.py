"""Noun attention: where a few query rows look among the visual keys of their clip.

    A[n, j] = 1/H * sum_h softmax_{j in s} ( scale * <q[b, h, r_n], k[b, h // G, j]> )     (SWIM Eq. 5, head mean)

Row n belongs to one clip; the clip's keys are cut into segments s and every segment is a softmax of its own: one
segment per temporal step is the paper's per-frame scope, one segment per clip the clip-wide scope. Maps are fp32 and
ragged, so they are returned flat: `table.map_sizes[n]` values for row n. No L x L matrix and no per-head map of text
rows ever exists.

Shape suffixes: B batch, H query heads, K kv heads, G = H / K, L sequence, D head dim, N rows, V keys of a clip, C
clips.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Scope = Literal["frame", "clip"]
Backend = Literal["auto", "torch"]


class ClipKeys(NamedTuple):
    """Visual keys of one clip: T x h x w merged tokens from `start` on in row `batch`, or at `positions` (V,)."""

    batch: int
    start: int
    grid: tuple[int, int, int]
    positions: Sequence[int] | None = None


@dataclass(frozen=True)
class WorkTable:
    """Which rows look at which keys; built once per batch on the CPU and reused by every supervised layer."""

    row_batch: Tensor  # (N,) int64
    row_position: Tensor  # (N,) int64
    clip_rows: tuple[tuple[int, int], ...]  # per clip: [first row, last row)
    clip_keys: tuple[tuple[int, int, int], ...]  # per clip: batch row, first key, number of keys V
    clip_segments: tuple[int, ...]  # per clip: number of equal segments its keys are cut into
    key_index: Tensor | None  # (sum V,) int64, sequence positions of scattered keys; then `first key` points into it

    @property
    def num_rows(self) -> int:
        """Number of noun rows N."""
        return self.row_position.shape[0]

    @property
    def map_sizes(self) -> list[int]:
        """Number of map values of every row, in row order."""
        return [v for (lo, hi), (_, _, v) in zip(self.clip_rows, self.clip_keys) for _ in range(hi - lo)]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "WorkTable":
        """Copy with all tensors on `device`."""
        moved = {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in moved.items()}
        return WorkTable(**{**vars(self), **moved})


def build_work_table(rows: Sequence[tuple[int, int]], clips: Sequence[ClipKeys], scope: Scope = "frame") -> WorkTable:
    """Work table of `rows` (clip number, sequence position), which must be sorted by clip; ValueError if they are
    not."""
    clip_of_row = [clip for clip, _ in rows]
    if clip_of_row != sorted(clip_of_row) or any(not 0 <= clip < len(clips) for clip in clip_of_row):
        raise ValueError(
            f"rows must be sorted by clip and name one of {len(clips)} clips, got clips {clip_of_row}; sort the rows"
        )
    if scope not in ("frame", "clip"):
        raise ValueError(f"softmax scope is {scope!r}; use 'frame' or 'clip'")
    scattered = any(clip.positions is not None for clip in clips)
    index: list[int] = []
    clip_rows, clip_keys, clip_segments = [], [], []
    for number, clip in enumerate(clips):
        steps, height, width = clip.grid
        num_keys = steps * height * width
        if clip.positions is not None and len(clip.positions) != num_keys:
            raise ValueError(
                f"clip {number} has a {steps}x{height}x{width} grid but {len(clip.positions)} key positions; "
                f"give {num_keys}"
            )
        clip_rows.append((bisect_left(clip_of_row, number), bisect_right(clip_of_row, number)))
        clip_keys.append((clip.batch, len(index) if scattered else clip.start, num_keys))
        clip_segments.append(steps if scope == "frame" else 1)
        if scattered:
            index.extend(clip.positions if clip.positions is not None else range(clip.start, clip.start + num_keys))
    return WorkTable(
        row_batch=torch.tensor([clips[clip].batch for clip in clip_of_row], dtype=torch.int64),
        row_position=torch.tensor([position for _, position in rows], dtype=torch.int64),
        clip_rows=tuple(clip_rows),
        clip_keys=tuple(clip_keys),
        clip_segments=tuple(clip_segments),
        key_index=torch.tensor(index, dtype=torch.int64) if scattered else None,
    )


def noun_attention_reference(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float) -> Tensor:
    """The specification, in differentiable torch: flat fp32 maps (sum of map sizes,); see the module's formula."""
    num_groups = q_BHLD.shape[1] // k_BKLD.shape[1]
    maps = []
    for (first_row, last_row), (batch, first_key, num_keys), segments in zip(
        table.clip_rows, table.clip_keys, table.clip_segments
    ):
        if first_row == last_row:
            continue
        q_HND = q_BHLD[batch, :, table.row_position[first_row:last_row]]
        if table.key_index is None:
            k_KVD = k_BKLD[batch, :, first_key : first_key + num_keys]
        else:
            k_KVD = k_BKLD[batch, :, table.key_index[first_key : first_key + num_keys]]
        # Scores are taken in fp32: rounded to bf16 they cost three digits of the map.
        q_KMD = q_HND.float().reshape(k_KVD.shape[0], -1, q_HND.shape[-1])  # M = G * N rows that share one kv head
        scores_KMV = (q_KMD @ k_KVD.float().mT) * scale
        weights = scores_KMV.unflatten(-1, (segments, -1)).softmax(-1)
        maps.append(weights.reshape(-1, num_groups, last_row - first_row, num_keys).mean((0, 1)).flatten())
    return torch.cat(maps) if maps else q_BHLD.new_zeros(0, dtype=torch.float32)


def noun_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, *, scale: float, backend: Backend = "auto"
) -> Tensor:
    """Head-mean attention maps of the table's rows, flat fp32 (sum of map sizes,), differentiable in q (B,H,L,D) and k
    (B,K,L,D).

    Raises ValueError for shapes that do not fit and for an unknown backend. Source: SWIM Eq. 5 (arXiv 2605.18018).
    """
    if q_BHLD.shape[1] % k_BKLD.shape[1]:
        raise ValueError(f"{q_BHLD.shape[1]} query heads are not a multiple of {k_BKLD.shape[1]} kv heads")
    if backend not in ("auto", "torch"):
        raise ValueError(f"noun_attention backend is {backend!r}; use 'auto' or 'torch'")
    return noun_attention_reference(q_BHLD, k_BKLD, table, scale)
