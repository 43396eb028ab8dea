"""Noun attention: where a few query rows look among the visual keys of their clip.

    A[n, j] = 1/H * sum_h softmax_{j in s} ( scale * <q[b, h, r_n], k[b, h // G, j]> )     (SWIM Eq. 5, head mean)

Row n belongs to one clip; the clip's keys are cut into segments s and every segment is a softmax of its own: one
segment per temporal step is the paper's per-frame scope, one segment per clip the clip-wide scope. In causal and full
scope the softmax runs over more keys than the map shows, text among them: all that the row attends to, or all of its
conversation, later tokens too (the release's); such a map sums to less than 1. Maps are fp32 (fp64 for fp64 inputs)
and ragged, so they are returned flat: `table.map_sizes[n]` values for row n. No L x L matrix and no per-head map of
text rows ever exists.

`noun_attention_reference` is the specification and what runs on a CPU; `noun_attention_triton.py` has the same as
Triton kernels (a file of its own, because CPU torch brings no Triton and decorators need it at import), registered
here as the operator `swim::noun_attention`.

Shape suffixes: B batch, H query heads, K kv heads, G = H / K, L sequence, D head dim, N rows, V keys of a clip, C
clips, S keys in a clip's softmax ranges, I items.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from swim.kernels.backend import INTERPRETED, Backend, choose_triton, without_triton

Scope = Literal["frame", "clip", "causal", "full"]

# A segment of up to SPLIT_KEYS keys is the work of one program; a longer one is cut, into MAX_SPLITS at most. So many
# are also the parts from which a row's dq is added up, each H x D in fp32.
SPLIT_KEYS, MAX_SPLITS = 1024, 16


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
    # int64, with scattered keys: (sum V,) their sequence positions, into which `first key` then points; in the wider
    # scopes behind them, for every column in `clip_range`, its place in the clip's maps or -1
    key_index: Tensor | None
    row_ranges: Tensor | None  # (N, 4) int64 in causal and full scope: two [first, last) column ranges of the softmax
    clip_range: tuple[tuple[int, int], ...]  # per clip: columns that hold its keys and the ranges of all its rows
    clips: Tensor  # (C, 8) int64: the four tuples again, so that an operator, which takes tensors, can have them
    items: Tensor  # (I, 13) int64, see `_work_items`
    row_parts: Tensor  # (N, 5) int64, see `_work_items`
    sizes: tuple[int, ...]  # map values, statistics, parts of dq; most rows, keys and splits of any item, last wave
    unfit: str | None  # why Triton cannot take this table
    least_shape: tuple[int, int] = (0, 0)  # batch rows and columns that q and k must have

    @property
    def num_rows(self) -> int:
        """Number of noun rows N."""
        return self.row_position.shape[0]

    @property
    def map_sizes(self) -> list[int]:
        """Number of map values of every row, in row order."""
        return [v for (lo, hi), (_, _, v) in zip(self.clip_rows, self.clip_keys) for _ in range(hi - lo)]

    @property
    def tensors(self) -> list[Tensor]:
        """What travels through an operator; nothing is an empty tensor there."""
        optional = (self.clips.new_empty(0) if x is None else x for x in (self.key_index, self.row_ranges))
        return [self.clips, self.items, self.row_batch, self.row_position, self.row_parts, *optional]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "WorkTable":
        """Copy with all tensors on `device`."""
        moved = {f.name: t for f in fields(self) if isinstance(t := getattr(self, f.name), Tensor)}
        moved = {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in moved.items()}
        return WorkTable(**{**vars(self), **moved})


def build_work_table(rows: Sequence[Row], clips: Sequence[ClipKeys], scope: Scope = "frame") -> WorkTable:
    """Work table of `rows`, which must be sorted by clip; ValueError if they are not, if a wide scope lacks ranges, or
    for a negative place."""
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
        bounds = [bound for row in rows[first_row:last_row] for span in row.ranges for bound in span]
        bounds += [bound + i for i, bound in enumerate(_ends(clip, num_keys))] if num_keys else []
        clip_rows.append((first_row, last_row))
        clip_keys.append((clip.batch, len(index) if scattered else clip.start, num_keys))
        clip_segments.append(steps if scope == "frame" else 1)
        clip_range.append((min(bounds, default=0), max(bounds, default=0)))
        if scattered:
            index.extend(clip.positions if clip.positions is not None else range(clip.start, clip.start + num_keys))
    ranges = [[bound for span in (*row.ranges, (0, 0))[:2] for bound in span] for row in rows]
    queries = [(clips[row.clip].batch, row.position) for row in rows]
    table = [
        (*of_rows, *of_keys, segments, *span)
        for of_rows, of_keys, segments, span in zip(clip_rows, clip_keys, clip_segments, clip_range)
    ]
    origins = [line[3] for line in table]
    if wide and scattered:
        for number, (_, _, _, first_key, num_keys, _, lo, hi) in enumerate(table):
            origins[number] = lo - len(index)
            slots = dict(zip(index[first_key : first_key + num_keys], range(num_keys)))
            index.extend(slots.get(column, -1) for column in range(lo, hi))
    # Kernels check nothing: what a table names must be there.
    batches, places = [clip.batch for clip in clips], [(row.position, row.position) for row in rows]
    places += [(first, last - 1) for row in rows for first, last in row.ranges]
    places += [_ends(clip, line[4]) for clip, line in zip(clips, table) if line[4]]
    if (least := min([*batches, *(first for first, _ in places)], default=0)) < 0:
        raise ValueError(f"{least} is the smallest batch row or column of rows, ranges and keys; count from 0")
    items, parts, sizes = _work_items(table, queries, origins, wide=wide)
    return WorkTable(
        row_batch=torch.tensor([clips[clip].batch for clip in clip_of_row], dtype=torch.int64),
        row_position=torch.tensor([row.position for row in rows], dtype=torch.int64),
        clip_rows=tuple(clip_rows),
        clip_keys=tuple(clip_keys),
        clip_segments=tuple(clip_segments),
        key_index=torch.tensor(index, dtype=torch.int64) if scattered else None,
        row_ranges=torch.tensor(ranges, dtype=torch.int64).view(-1, 4) if wide else None,
        clip_range=tuple(clip_range),
        clips=torch.tensor(table, dtype=torch.int64).view(-1, 8),
        items=torch.tensor(items, dtype=torch.int64).view(-1, 13),
        row_parts=torch.tensor(parts, dtype=torch.int64).view(-1, 5),
        sizes=sizes,
        unfit=_unfit(clips, table, wide=wide),
        least_shape=(max(batches, default=-1) + 1, max((last for _, last in places), default=-1) + 1),
    )


def _ends(clip: ClipKeys, num_keys: int) -> tuple[int, int]:
    """First and last column of a clip's keys."""
    if clip.positions is not None:
        return min(clip.positions), max(clip.positions)
    return clip.start, clip.start + num_keys - 1


def _work_items(
    table: Sequence[tuple[int, ...]], queries: Sequence[tuple[int, int]], origins: Sequence[int], *, wide: bool
) -> tuple[list[tuple[int, ...]], list[list[int]], tuple[int, ...]]:
    """Items, row parts and sizes of a WorkTable; an item is all rows of a clip on at most a program's worth of keys.

    Item: batch row; first row, number of rows; first key, number of keys (as in `clip_keys`; columns in the wider
    scopes); place of the clip's maps in the flat map, place of the first key in a row's map, counted from the clip's
    `origin` (with scattered keys in the wider scopes, place in `key_index` of that place), V; place of the item's
    statistics, one for each row; which split of its segment, of how many; place of its part of dq, one for each row,
    and in which wave it is added there: the items of a wave have parts of their own. Row part: whether no earlier row
    is the same query, the next row that is (or -1), and where its parts of dq are: `first`, `first + step`, ... `count`
    of them.
    """
    align = SPLIT_KEYS // 8  # a whole number of blocks
    items: list[tuple[int, ...]] = []
    parts: list[list[int]] = []
    map_size = num_stats = num_parts = 0
    for (first_row, last_row, batch, first_key, num_keys, segments, lo, hi), origin in zip(table, origins):
        num_rows, lines = last_row - first_row, []
        start, total = (lo, hi - lo) if wide else (first_key, num_keys)
        size = total // segments if num_rows and segments else 0
        splits = min(-(-size // SPLIT_KEYS), MAX_SPLITS)
        step = size if splits == 1 else -(-size // max(splits, 1) // align) * align
        for segment in range(start, start + total, size) if size else ():
            keys = range(segment, segment + size, step)
            for split, key in enumerate(keys):
                span = (key, min(step, segment + size - key))
                shown = (map_size, key - origin, num_keys)
                lines.append((batch, first_row, num_rows, *span, *shown, num_stats, split, len(keys)))
                num_stats += num_rows
        count = min(len(lines), MAX_SPLITS)
        for number, line in enumerate(lines):
            items.append((*line, num_parts + number % count * num_rows, number // count))
        parts += [[1, -1, num_parts + row, num_rows, count] for row in range(num_rows)]
        num_parts += count * num_rows
        map_size += num_rows * num_keys
    last: dict[tuple[int, int], int] = {}
    for row, query in enumerate(queries):
        if query in last:
            parts[last[query]][1], parts[row][0] = row, 0
        last[query] = row
    most = (max((item[column] for item in items), default=0) for column in (2, 4, 10, 12))
    return items, parts, (map_size, num_stats, num_parts, *most)


def _unfit(clips: Sequence[ClipKeys], table: Sequence[tuple[int, ...]], *, wide: bool) -> str | None:
    """Why the Triton kernels cannot take a table: each key's gradient is written by one program alone."""
    spans = []
    for clip, (first_row, last_row, _, _, num_keys, _, lo, hi) in zip(clips, table):
        if first_row == last_row or not (hi - lo if wide else num_keys):
            continue
        if clip.positions is not None and len(set(clip.positions)) < num_keys:
            return "a key that stands twice in a clip"
        first, last = _ends(clip, num_keys)
        spans.append((clip.batch, lo, hi) if wide else (clip.batch, first, last + 1))
    if any(a[0] == b[0] and a[2] > b[1] for a, b in pairwise(sorted(spans))):
        return "clips whose keys interleave"
    return None


def noun_attention_reference(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float) -> Tensor:
    """The specification, in differentiable torch: flat fp32 maps (sum of map sizes,); see the module's formula."""
    # Scores are taken in fp32 at least, whatever autocast wants: rounded to bf16 they cost three digits of the map.
    device = q_BHLD.device.type
    with torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext():
        return _reference(q_BHLD, k_BKLD, table, scale)


def _reference(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float) -> Tensor:
    dtype = torch.promote_types(q_BHLD.dtype, torch.float32)
    num_heads, num_kv_heads = q_BHLD.shape[1], k_BKLD.shape[1]
    # The rows of all clips at once: every indexing of q costs the backward pass a gradient of q in full size.
    q_HND = q_BHLD[table.row_batch, :, table.row_position].to(dtype).transpose(0, 1)
    maps = []
    for clip, ((first_row, last_row), (batch, first_key, num_keys)) in enumerate(zip(table.clip_rows, table.clip_keys)):
        if first_row == last_row or not num_keys:
            continue
        num_rows = last_row - first_row
        # M = G * N rows that share one kv head
        q_KMD = q_HND[:, first_row:last_row].reshape(num_kv_heads, -1, q_HND.shape[-1])
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
            # Filled again: a row that sees nothing has a map of zeros.
            weights = scores_KMS.masked_fill(unseen_MS, -torch.inf).softmax(-1).masked_fill(unseen_MS, 0)[..., columns]
        maps.append(weights.view(num_heads, num_rows, num_keys).mean(0).flatten())
    return torch.cat(maps) if maps else q_BHLD.new_zeros(0, dtype=dtype)


def _from_tensors(clips: Tensor, *others: Tensor | None) -> WorkTable:
    """What the reference reads of a table, from the tensors that travel through an operator."""
    lines = clips.tolist()
    names = ("items", "row_batch", "row_position", "row_parts", "key_index", "row_ranges")
    return WorkTable(
        clip_rows=tuple((line[0], line[1]) for line in lines),
        clip_keys=tuple((line[2], line[3], line[4]) for line in lines),
        clip_segments=tuple(line[5] for line in lines),
        clip_range=tuple((line[6], line[7]) for line in lines),
        clips=clips,
        sizes=(),
        unfit=None,
        **dict(zip(names, others)),  # type: ignore[arg-type]
    )


def _reference_gradients(
    grad: Tensor, q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float
) -> tuple[Tensor, Tensor]:
    q_BHLD, k_BKLD = (x.detach().requires_grad_() for x in (q_BHLD, k_BKLD))
    flat = noun_attention_reference(q_BHLD, k_BKLD, table, scale)
    if not flat.requires_grad:  # no rows, no keys
        return torch.zeros_like(q_BHLD), torch.zeros_like(k_BKLD)
    dq, dk = torch.autograd.grad(flat, (q_BHLD, k_BKLD), grad)
    return torch.empty_like(q_BHLD).copy_(dq), torch.empty_like(k_BKLD).copy_(dk)  # strides as the kernels give them


def _with_none(work: Sequence[Tensor]) -> list[Tensor | None]:
    return [*work[:5], *(x if len(x) else None for x in work[5:])]


@torch.library.custom_op("swim::noun_attention", mutates_args=())
def _forward_op(
    q_BHLD: Tensor, k_BKLD: Tensor, work: Sequence[Tensor], sizes: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Flat maps, and the log-sum-exp of every item, row and head that the backward pass needs."""
    tensors: list[Any] = _with_none(work)
    if q_BHLD.device.type == "cpu" and not INTERPRETED:
        flat = noun_attention_reference(q_BHLD, k_BKLD, _from_tensors(*tensors), scale)
        return flat, flat.new_zeros(sizes[1], q_BHLD.shape[1])
    from swim.kernels import noun_attention_triton

    _, items, _, row_position, _, *optional = tensors
    return noun_attention_triton.forward(q_BHLD, k_BKLD, items, row_position, *optional, sizes=sizes, scale=scale)


@_forward_op.register_fake
def _(q_BHLD: Tensor, k_BKLD: Tensor, work: Any, sizes: Sequence[int], scale: float) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    empty = q_BHLD.new_empty(0, dtype=torch.float32)
    return empty.new_empty(sizes[0]), empty.new_empty(sizes[1], q_BHLD.shape[1])


@torch.library.custom_op("swim::noun_attention_backward", mutates_args=())
def _backward_op(
    grad: Tensor,
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    stats: Tensor,
    work: Sequence[Tensor],
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k, full size."""
    tensors: list[Any] = _with_none(work)
    if q_BHLD.device.type == "cpu" and not INTERPRETED:
        # Autograd is switched off for the thread that runs an operator, beyond what enable_grad switches on.
        with ThreadPoolExecutor(1) as other:
            table = _from_tensors(*tensors)
            return other.submit(_reference_gradients, grad, q_BHLD, k_BKLD, table, scale).result()
    from swim.kernels import noun_attention_triton

    return noun_attention_triton.backward(grad, q_BHLD, k_BKLD, stats, *tensors[1:], sizes=sizes, scale=scale)


@_backward_op.register_fake
def _(grad: Tensor, q_BHLD: Tensor, k_BKLD: Tensor, *args: Any) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    return torch.empty_like(q_BHLD), torch.empty_like(k_BKLD)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q_BHLD, k_BKLD, work, ctx.sizes, ctx.scale = inputs
    ctx.save_for_backward(q_BHLD, k_BKLD, output[1], *work)
    ctx.mark_non_differentiable(output[1])


def _gradients(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    q_BHLD, k_BKLD, stats, *work = ctx.saved_tensors
    dq, dk = _backward_op(grad, q_BHLD, k_BKLD, stats, work, ctx.sizes, ctx.scale)
    return dq, dk, [None] * len(work), None, None


_forward_op.register_autograd(_gradients, setup_context=_save)


def unsupported(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable) -> str | None:
    """Why the Triton kernels cannot take this call; None if they can."""
    if reason := without_triton(q_BHLD):
        return reason
    if q_BHLD.dtype != k_BKLD.dtype or q_BHLD.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtypes {q_BHLD.dtype} and {k_BKLD.dtype}"
    if q_BHLD.shape[3] > 256:
        return f"head_dim {q_BHLD.shape[3]} above 256"
    if q_BHLD.shape[1] > 64 * k_BKLD.shape[1]:
        return f"{q_BHLD.shape[1] // k_BKLD.shape[1]} query heads per kv head, more than 64"
    return table.unfit


class _SumOverRanks(torch.autograd.Function):
    """All-reduce whose gradient is passed on as it is: every rank has the sum and computes the same loss from it, so
    what reaches this rank is the whole gradient already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:  # noqa: ARG004
        total = x.clone()
        torch.distributed.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


def noun_attention(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    table: WorkTable,
    *,
    scale: float,
    backend: Backend = "auto",
    group: "torch.distributed.ProcessGroup | None" = None,
) -> Tensor:
    """Head-mean attention maps of the table's rows, flat fp32 (sum of map sizes,), differentiable in q (B,H,L,D) and k
    (B,K,L,D); fp64 for fp64.

    With a `group` (sequence parallelism by heads, as Ulysses has it) q and k hold this rank's H of the group's heads,
    the same number on every rank, and all of the sequence; the maps are those of all heads, the same on every rank. The
    loss is then to be computed on every rank and counts once: gradients are d(loss)/d(this rank's q and k), not P
    times that, so those of parameters, and of a kv head that several ranks hold, are to be summed over the ranks.
    Raises ValueError for shapes that do not fit, for an unknown backend, and under `triton` for what its kernels cannot
    do; `auto` then takes torch and says so once. Sources: SWIM Eq. 5 (arXiv 2605.18018), Ulysses (arXiv 2309.14509).
    """
    flat = _local_mean(q_BHLD, k_BKLD, table, scale, backend)
    return flat if group is None else _SumOverRanks.apply(flat / group.size(), group)


def _local_mean(q_BHLD: Tensor, k_BKLD: Tensor, table: WorkTable, scale: float, backend: Backend) -> Tensor:
    if q_BHLD.shape[1] % k_BKLD.shape[1]:
        raise ValueError(f"{q_BHLD.shape[1]} query heads are not a multiple of {k_BKLD.shape[1]} kv heads")
    if q_BHLD.shape[0] != k_BKLD.shape[0] or q_BHLD.shape[2:] != k_BKLD.shape[2:]:
        raise ValueError(f"q {tuple(q_BHLD.shape)} and k {tuple(k_BKLD.shape)} may differ in their heads alone")
    size = (q_BHLD.shape[0], q_BHLD.shape[2])
    if size[0] < table.least_shape[0] or size[1] < table.least_shape[1]:
        raise ValueError(f"q and k of {size} batch rows and columns are too small for a table of {table.least_shape}")
    if not q_BHLD.device == k_BKLD.device == table.clips.device:
        devices = f"{q_BHLD.device}, {k_BKLD.device} and {table.clips.device}"
        raise ValueError(f"q, k and the table are on {devices}; bring them together, the table by table.to(q.device)")
    if not choose_triton("noun_attention", backend, q_BHLD, unsupported(q_BHLD, k_BKLD, table)):
        return noun_attention_reference(q_BHLD, k_BKLD, table, scale)
    flat, _ = _forward_op(q_BHLD, k_BKLD, table.tensors, table.sizes, scale)
    return flat
