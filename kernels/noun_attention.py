"""Noun attention: where a few query rows look among the visual keys of their clip.

    A[n, j] = 1/H * sum_h softmax_{j in s} ( scale * <q[b, h, r_n], k[b, h // G, j]> )     (SWIM Eq. 5, head mean)

Row n belongs to one clip; the clip's keys are cut into segments s and every segment is a softmax of its own: one
segment per temporal step is the paper's per-frame scope, one segment per clip the clip-wide scope. In causal and full
scope the softmax runs over more keys than the map shows, text among them: all that the row attends to, or all of its
conversation, later tokens too (the release's); such a map sums to less than 1. Maps are fp32 (fp64 for fp64 inputs)
and ragged, so they are returned flat: `table.map_sizes[n]` values for row n. No L x L matrix and no per-head map of
text rows ever exists.

Shape suffixes: B batch, H query heads, K kv heads, G = H / K, L sequence, D head dim, N rows, V keys of a clip, C
clips, S keys in a clip's softmax ranges.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

Scope = Literal["frame", "clip", "causal", "full"]
Backend = Literal["auto", "torch"]


class Row(NamedTuple):
    """A query row: number of its clip, its column, and in the wider scopes the columns of its softmax."""

    clip: int
    position: int
    ranges: tuple[tuple[int, int], ...] = ()  # at most two [first, last): a shared prefix and the row's own branch


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
    row_ranges: Tensor | None  # (N, 4) int64 in causal and full scope: two [first, last) column ranges of the softmax
    clip_range: tuple[tuple[int, int], ...]  # per clip: columns that hold its keys and the ranges of all its rows

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


def build_work_table(rows: Sequence[Row], clips: Sequence[ClipKeys], scope: Scope = "frame") -> WorkTable:
    """Work table of `rows`, which must be sorted by clip; ValueError if they are not, or if a wide scope lacks
    ranges."""
    clip_of_row = [row.clip for row in rows]
    if clip_of_row != sorted(clip_of_row) or any(not 0 <= clip < len(clips) for clip in clip_of_row):
        raise ValueError(
            f"rows must be sorted by clip and name one of {len(clips)} clips, got clips {clip_of_row}; sort the rows"
        )
    if scope not in get_args(Scope):
        raise ValueError(f"softmax scope is {scope!r}; use one of {', '.join(get_args(Scope))}")
    wide = scope in ("causal", "full")
    if bad := [row for row in rows if wide and not 1 <= len(row.ranges) <= 2]:
        raise ValueError(f"softmax scope {scope!r} needs one or two key ranges for every row, got {bad[0]}")
    scattered = any(clip.positions is not None for clip in clips)
    index: list[int] = []
    clip_rows, clip_keys, clip_segments, clip_range = [], [], [], []
    for number, clip in enumerate(clips):
        steps, height, width = clip.grid
        num_keys = steps * height * width
        if clip.positions is not None and len(clip.positions) != num_keys:
            raise ValueError(
                f"clip {number} has a {steps}x{height}x{width} grid but {len(clip.positions)} key positions; "
                f"give {num_keys}"
            )
        first_row, last_row = bisect_left(clip_of_row, number), bisect_right(clip_of_row, number)
        places = clip.positions if clip.positions is not None else (clip.start, clip.start + num_keys - 1)
        bounds = [bound for row in rows[first_row:last_row] for span in row.ranges for bound in span]
        bounds += [min(places), max(places) + 1] if num_keys else []
        clip_rows.append((first_row, last_row))
        clip_keys.append((clip.batch, len(index) if scattered else clip.start, num_keys))
        clip_segments.append(steps if scope == "frame" else 1)
        clip_range.append((min(bounds, default=0), max(bounds, default=0)))
        if scattered:
            index.extend(clip.positions if clip.positions is not None else range(clip.start, clip.start + num_keys))
    ranges = [[bound for span in (*row.ranges, (0, 0))[:2] for bound in span] for row in rows]
    return WorkTable(
        row_batch=torch.tensor([clips[clip].batch for clip in clip_of_row], dtype=torch.int64),
        row_position=torch.tensor([row.position for row in rows], dtype=torch.int64),
        clip_rows=tuple(clip_rows),
        clip_keys=tuple(clip_keys),
        clip_segments=tuple(clip_segments),
        key_index=torch.tensor(index, dtype=torch.int64) if scattered else None,
        row_ranges=torch.tensor(ranges, dtype=torch.int64).view(-1, 4) if wide else None,
        clip_range=tuple(clip_range),
    )


def noun_attention_reference(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float) -> Tensor:
    """The specification, in differentiable torch: flat fp32 maps (sum of map sizes,); see the module's formula."""
    # Scores are taken in fp32 at least: rounded to bf16 they cost three digits of the map.
    dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
    num_heads, num_kv_heads = q_BHLD.shape[1], k_BKLD.shape[1]
    maps = []
    for clip, ((first_row, last_row), (batch, first_key, num_keys)) in enumerate(zip(table.clip_rows, table.clip_keys)):
        if first_row == last_row:
            continue
        num_rows = last_row - first_row
        q_HND = q_BHLD[batch, :, table.row_position[first_row:last_row]].to(dtype)
        q_KMD = q_HND.reshape(num_kv_heads, -1, q_HND.shape[-1])  # M = G * N rows that share one kv head
        lo, hi = (0, k_BKLD.shape[2]) if table.row_ranges is None else table.clip_range[clip]
        if table.key_index is None:
            columns: Tensor | slice = slice(first_key - lo, first_key - lo + num_keys)
        else:
            columns = table.key_index[first_key : first_key + num_keys] - lo
        if table.row_ranges is None:
            scores_KMV = (q_KMD @ k_BKLD[batch, :, columns].to(dtype).mT) * scale
            weights = scores_KMV.unflatten(-1, (table.clip_segments[clip], -1)).softmax(-1).flatten(-2)
        else:
            scores_KMS = (q_KMD @ k_BKLD[batch, :, lo:hi].to(dtype).mT) * scale
            ranges_N4 = table.row_ranges[first_row:last_row, :, None]
            key_S = torch.arange(lo, hi, device=q_BHLD.device)
            seen_NS = ((key_S >= ranges_N4[:, 0::2]) & (key_S < ranges_N4[:, 1::2])).any(1)
            unseen_MS = ~seen_NS.repeat(num_heads // num_kv_heads, 1)
            weights = scores_KMS.masked_fill(unseen_MS, -torch.inf).softmax(-1)[..., columns]
        maps.append(weights.view(num_heads, num_rows, num_keys).mean(0).flatten())
    return torch.cat(maps) if maps else q_BHLD.new_zeros(0, dtype=dtype)


def noun_attention(
    q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, *, scale: float, backend: Backend = "auto"
) -> Tensor:
    """Head-mean attention maps of the table's rows, flat fp32 (sum of map sizes,), differentiable in q (B,H,L,D) and k
    (B,K,L,D); fp64 for fp64.

    Raises ValueError for shapes that do not fit and for an unknown backend. Source: SWIM Eq. 5 (arXiv 2605.18018).
    """
    if q_BHLD.shape[1] % k_BKLD.shape[1]:
        raise ValueError(f"{q_BHLD.shape[1]} query heads are not a multiple of {k_BKLD.shape[1]} kv heads")
    if backend not in ("auto", "torch"):
        raise ValueError(f"noun_attention backend is {backend!r}; use 'auto' or 'torch'")
    return noun_attention_reference(q_BHLD, k_BKLD, table, scale)
