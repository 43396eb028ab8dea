"""Triton kernels of `noun_attention`: maps forward, gradients of q and k backward.

An *item* (`_work_items`) is all rows of one clip on at most a program's worth of keys of one softmax segment. Rows are
taken in tiles: ROWS rows times the query heads that share a kv head (padded to WIDTH) are the M side of every matrix
product, so a key is read once for all of them. With S = scale q k, P = exp(S - lse), g = dA / H, delta = sum_j P g:

    forward    lse of every item, head and row; A = 1/H sum_h P       (one launch where every segment is one item)
    backward   dq = sum_j scale P (g - delta) k_j, in fp32 for each item, then added up in a fixed order;
               dk = sum_m scale P (g - delta) q_m, where one program owns a key

The kv heads are looped inside the map's program, so no map of a single head is ever stored. No atomics, and block sizes
come from input sizes alone: two runs agree bit for bit. Sums are fp32. P (g - delta) is rounded to the inputs' type for
the tensor cores, as flash attention does; fp16 would underflow there and is multiplied as TF32.
"""
# mypy: disallow-untyped-defs=False

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from swim.kernels.backend import INTERPRETED


class Work(NamedTuple):
    """Tensors of a WorkTable; the last two may be None."""

    items: Any
    row_position: Any
    key_index: Any
    row_ranges: Any


class Item(NamedTuple):
    """An item as `_work_items` writes it."""

    batch: Any
    first_row: Any
    num_rows: Any
    first_key: Any
    num_keys: Any
    map_start: Any
    map_shift: Any
    map_width: Any
    stat: Any
    split: Any
    num_splits: Any
    part: Any
    wave: Any


class Tile(NamedTuple):
    """Lanes (M,) of a row tile: row of the clip, row of the table, query head, and whether there is such a lane."""

    row: Any
    place: Any
    head: Any
    live: Any


@triton.jit
def _item(work, number):
    line = work.items + tl.cast(number, tl.int64) * 13
    return Item(
        tl.load(line),
        tl.load(line + 1),
        tl.load(line + 2),
        tl.load(line + 3),
        tl.load(line + 4).to(tl.int32),
        tl.load(line + 5),
        tl.load(line + 6),
        tl.load(line + 7),
        tl.load(line + 8),
        tl.load(line + 9),
        tl.load(line + 10).to(tl.int32),
        tl.load(line + 11),
        tl.load(line + 12),
    )


@triton.jit
def _tile(item, number, kv, GROUP: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    lane = tl.arange(0, ROWS * WIDTH)
    row = tl.cast(number, tl.int64) * ROWS + lane // WIDTH
    live = (row < item.num_rows) & (lane % WIDTH < GROUP)
    return Tile(row, item.first_row + row, tl.cast(kv, tl.int64) * GROUP + lane % WIDTH, live)


@triton.jit
def _queries(q, strides, work, item, tile, DIM: tl.constexpr, PAD: tl.constexpr, DOT: tl.constexpr):
    """Queries (M, PAD) of a tile."""
    column = tl.load(work.row_position + tile.place, mask=tile.live, other=0)
    dim = tl.arange(0, PAD)
    pointer = q + item.batch * strides[0] + tile.head * strides[1] + column * strides[2]
    mask = tile.live[:, None] & (dim < DIM)[None, :]
    return tl.load(pointer[:, None] + dim.to(tl.int64)[None, :] * strides[3], mask=mask, other=0.0).to(DOT)


@triton.jit
def _columns(work, item, number):
    """Sequence columns of an item's keys."""
    column = item.first_key + number
    if work.key_index is not None and work.row_ranges is None:
        column = tl.load(work.key_index + column, mask=number < item.num_keys, other=0)
    return column


@triton.jit
def _slots(work, item, number):
    """Places of an item's keys in a row's map; the wider scopes have keys that no map shows, and their places are
    outside of it."""
    slot = item.map_shift + number
    if work.key_index is not None and work.row_ranges is not None:
        slot = tl.load(work.key_index + slot, mask=number < item.num_keys, other=-1)
    return slot


@triton.jit
def _key_pointers(k, strides, item, kv, column, PAD: tl.constexpr):
    dim = tl.arange(0, PAD).to(tl.int64)
    pointer = k + item.batch * strides[0] + tl.cast(kv, tl.int64) * strides[1] + column * strides[2]
    return pointer[:, None] + dim[None, :] * strides[3]


@triton.jit
def _keys(k, strides, item, kv, number, column, DIM: tl.constexpr, PAD: tl.constexpr, DOT: tl.constexpr):
    """Keys (KEYS, PAD) of a block."""
    mask = (number < item.num_keys)[:, None] & (tl.arange(0, PAD) < DIM)[None, :]
    return tl.load(_key_pointers(k, strides, item, kv, column, PAD), mask=mask, other=0.0).to(DOT)


@triton.jit
def _hide(scores, work, item, number, column, place, live):
    """Scores with -inf where a row does not look; keys and rows come shaped for the scores' two axes."""
    seen = number < item.num_keys
    if work.row_ranges is not None:
        line = work.row_ranges + place * 4
        seen &= ((column >= tl.load(line, mask=live, other=0)) & (column < tl.load(line + 1, mask=live, other=0))) | (
            (column >= tl.load(line + 2, mask=live, other=0)) & (column < tl.load(line + 3, mask=live, other=0))
        )
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _map_gradient(grad, work, item, number, row, live):
    """Gradient at the map; keys and rows come shaped for two axes."""
    slot = _slots(work, item, number)
    shown = live & (number < item.num_keys) & (slot >= 0) & (slot < item.map_width)
    return tl.load(grad + item.map_start + row * item.map_width + slot, mask=shown, other=0.0)


@triton.jit
def _add_exp2(top, total, new_top, new_total):
    """Sum of 2^top * total and 2^new_top * new_total, in that form; nothing is (-inf, 0)."""
    best = tl.maximum(top, new_top)
    base = tl.where(best == float("-inf"), 0.0, best)
    return best, total * tl.exp2(top - base) + new_total * tl.exp2(new_top - base)


@triton.jit
def _stat(item, split, tile, HEADS: tl.constexpr):
    """Place of the statistics of a split of the item's segment."""
    return (item.stat + (split - item.split) * item.num_rows + tile.row) * HEADS + tile.head


@triton.jit
def _segment_lse(stats, item, tile, HEADS: tl.constexpr):
    """Base-2 log-sum-exp over all splits of the segment; inf, which makes P = 0, for lanes that see nothing."""
    top = tl.full(tile.row.shape, float("-inf"), tl.float32)
    total = tl.zeros(tile.row.shape, tl.float32)
    for split in range(item.num_splits):
        lse = tl.load(stats + _stat(item, split, tile, HEADS), mask=tile.live, other=float("-inf"))
        top, total = _add_exp2(top, total, lse, tl.full(tile.row.shape, 1.0, tl.float32))
    return tl.where(total == 0, float("inf"), top + tl.log2(total))


@triton.jit
def _segment_delta(deltas, item, tile, HEADS: tl.constexpr):
    total = tl.zeros(tile.row.shape, tl.float32)
    for split in range(item.num_splits):
        total += tl.load(deltas + _stat(item, split, tile, HEADS), mask=tile.live, other=0.0)
    return total


@triton.jit
def _item_lse(
    queries, k, k_strides, work, item, tile, kv, scale2,
    DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Base-2 log-sum-exp of one item and kv head; -inf where a lane sees nothing."""
    top = tl.full(tile.row.shape, float("-inf"), tl.float32)
    total = tl.zeros(tile.row.shape, tl.float32)
    for start in range(0, item.num_keys, KEYS):
        number = start + tl.arange(0, KEYS)
        column = _columns(work, item, number)
        keys = _keys(k, k_strides, item, kv, number, column, DIM, PAD, DOT)
        scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale2
        scores = _hide(scores, work, item, number[None, :], column[None, :], tile.place[:, None], tile.live[:, None])
        best = tl.max(scores, 1)
        base = tl.where(best == float("-inf"), 0.0, best)
        top, total = _add_exp2(top, total, best, tl.sum(tl.exp2(scores - base[:, None]), 1))
    return top + tl.log2(total)


@triton.jit
def _weights_and_gradient(
    queries, keys, grad, lse, work, item, tile, number, column, scale2, HEADS: tl.constexpr
):  # fmt: skip
    """P and g (M, KEYS) of a block."""
    scores = tl.dot(queries, tl.trans(keys), input_precision="ieee") * scale2
    scores = _hide(scores, work, item, number[None, :], column[None, :], tile.place[:, None], tile.live[:, None])
    gradient = _map_gradient(grad, work, item, number[None, :], tile.row[:, None], tile.live[:, None]) / HEADS
    return tl.exp2(scores - lse[:, None]), gradient


@triton.jit
def _item_delta(
    queries, k, k_strides, grad, lse, work, item, tile, kv, scale2,
    HEADS: tl.constexpr, DIM: tl.constexpr, PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Sum over one item's keys of P g, of one kv head."""
    total = tl.zeros(tile.row.shape, tl.float32)
    for start in range(0, item.num_keys, KEYS):
        number = start + tl.arange(0, KEYS)
        column = _columns(work, item, number)
        keys = _keys(k, k_strides, item, kv, number, column, DIM, PAD, DOT)
        weights, gradient = _weights_and_gradient(
            queries, keys, grad, lse, work, item, tile, number, column, scale2, HEADS
        )
        total += tl.sum(weights * gradient, 1)
    return total


@triton.jit
def lse_kernel(
    q, k, stats, work, q_strides, k_strides, tiles, scale2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp of every item, row and head; grid (items x tiles, kv heads)."""
    kv = tl.program_id(1)
    item = _item(work, tl.program_id(0) // tiles)
    tile = _tile(item, tl.program_id(0) % tiles, kv, GROUP, ROWS, WIDTH)
    if (tl.program_id(0) % tiles) * ROWS >= item.num_rows:
        return
    queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
    lse = _item_lse(queries, k, k_strides, work, item, tile, kv, scale2, DIM, PAD, KEYS, DOT)
    tl.store(stats + _stat(item, item.split, tile, KV_HEADS * GROUP), lse, mask=tile.live)


@triton.jit
def map_kernel(
    q, k, flat, stats, work, q_strides, k_strides, tiles, scale2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr, FUSED: tl.constexpr, KV_PAD: tl.constexpr,
):  # fmt: skip
    """Maps; grid (items x tiles, parts of an item). FUSED: every segment is one item, and its log-sum-exp is found
    here; then an item has one part."""
    item = _item(work, tl.program_id(0) // tiles)
    number_of_tile = tl.program_id(0) % tiles
    if number_of_tile * ROWS >= item.num_rows:
        return
    if FUSED:
        # One row for each kv head, picked by a sum below: registers cannot be indexed.
        heads = tl.arange(0, KV_PAD)[:, None]
        all_lse = tl.zeros((KV_PAD, ROWS * WIDTH), tl.float32)
        for kv in range(KV_HEADS):
            tile = _tile(item, number_of_tile, kv, GROUP, ROWS, WIDTH)
            queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
            lse = _item_lse(queries, k, k_strides, work, item, tile, kv, scale2, DIM, PAD, KEYS, DOT)
            tl.store(stats + _stat(item, item.split, tile, KV_HEADS * GROUP), lse, mask=tile.live)
            lse = tl.where(tile.live & (lse != float("-inf")), lse, float("inf"))
            all_lse = tl.where(heads == kv, lse[None, :], all_lse)
    for start in range(tl.program_id(1) * KEYS, item.num_keys, tl.num_programs(1) * KEYS):
        number = start + tl.arange(0, KEYS)
        column = _columns(work, item, number)
        # Keys on the first axis: the sum over heads then stays within a thread.
        total = tl.zeros((KEYS, ROWS * WIDTH), tl.float32)
        for kv in range(KV_HEADS):
            tile = _tile(item, number_of_tile, kv, GROUP, ROWS, WIDTH)
            queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
            keys = _keys(k, k_strides, item, kv, number, column, DIM, PAD, DOT)
            scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale2
            scores = _hide(
                scores, work, item, number[:, None], column[:, None], tile.place[None, :], tile.live[None, :]
            )
            if FUSED:
                lse = tl.sum(tl.where(heads == kv, all_lse, 0.0), 0)
            else:
                lse = _segment_lse(stats, item, tile, KV_HEADS * GROUP)
            total += tl.exp2(scores - lse[None, :])
        mean = tl.sum(tl.reshape(total, (KEYS, ROWS, WIDTH)), 2) / (KV_HEADS * GROUP)
        row = number_of_tile.to(tl.int64) * ROWS + tl.arange(0, ROWS)
        slot = _slots(work, item, number)
        shown = (number < item.num_keys) & (slot >= 0) & (slot < item.map_width)
        pointer = flat + item.map_start + row[None, :] * item.map_width + slot[:, None]
        tl.store(pointer, mean, mask=shown[:, None] & (row < item.num_rows)[None, :])


@triton.jit
def delta_kernel(
    q, k, grad, stats, deltas, work, q_strides, k_strides, tiles, scale2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Delta of every item, row and head; grid (items x tiles, kv heads)."""
    kv = tl.program_id(1)
    item = _item(work, tl.program_id(0) // tiles)
    tile = _tile(item, tl.program_id(0) % tiles, kv, GROUP, ROWS, WIDTH)
    if (tl.program_id(0) % tiles) * ROWS >= item.num_rows:
        return
    HEADS: tl.constexpr = KV_HEADS * GROUP
    queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
    lse = _segment_lse(stats, item, tile, HEADS)
    delta = _item_delta(queries, k, k_strides, grad, lse, work, item, tile, kv, scale2, HEADS, DIM, PAD, KEYS, DOT)
    tl.store(deltas + _stat(item, item.split, tile, HEADS), delta, mask=tile.live)


@triton.jit(do_not_specialize=["wave"])
def dq_kernel(
    q, k, grad, stats, deltas, partial, work, q_strides, k_strides, tiles, wave, scale, scale2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
    FUSED: tl.constexpr,
):  # fmt: skip
    """Adds what comes from the items of a wave to the parts of dq, (parts, heads, DIM) fp32; grid (items x tiles, kv
    heads). FUSED: every segment is one item, and delta is found here."""
    kv = tl.program_id(1)
    item = _item(work, tl.program_id(0) // tiles)
    tile = _tile(item, tl.program_id(0) % tiles, kv, GROUP, ROWS, WIDTH)
    if ((tl.program_id(0) % tiles) * ROWS >= item.num_rows) | (item.wave != wave):
        return
    HEADS: tl.constexpr = KV_HEADS * GROUP
    queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
    lse = _segment_lse(stats, item, tile, HEADS)
    if FUSED:
        delta = _item_delta(queries, k, k_strides, grad, lse, work, item, tile, kv, scale2, HEADS, DIM, PAD, KEYS, DOT)
        tl.store(deltas + _stat(item, item.split, tile, HEADS), delta, mask=tile.live)
    else:
        delta = _segment_delta(deltas, item, tile, HEADS)
    total = tl.zeros((ROWS * WIDTH, PAD), tl.float32)
    for start in range(0, item.num_keys, KEYS):
        number = start + tl.arange(0, KEYS)
        column = _columns(work, item, number)
        keys = _keys(k, k_strides, item, kv, number, column, DIM, PAD, DOT)
        weights, gradient = _weights_and_gradient(
            queries, keys, grad, lse, work, item, tile, number, column, scale2, HEADS
        )
        score_gradient = weights * (gradient - delta[:, None])
        total += tl.dot(score_gradient.to(GRAD), keys.to(GRAD), input_precision=PRECISION)
    dim = tl.arange(0, PAD)
    pointer = partial + ((item.part + tile.row) * HEADS + tile.head)[:, None] * DIM + dim[None, :]
    mask = tile.live[:, None] & (dim < DIM)[None, :]
    before = tl.load(pointer, mask=mask & (wave > 0), other=0.0)
    tl.store(pointer, before + total * scale, mask=mask)


@triton.jit
def dk_kernel(
    q, k, grad, stats, deltas, dk, work, q_strides, k_strides, dk_strides, blocks, scale, scale2,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
    PAD: tl.constexpr, KEYS: tl.constexpr, DOT: tl.constexpr, GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk of a block of keys, over all row tiles; grid (items x blocks, kv heads)."""
    kv = tl.program_id(1)
    item = _item(work, tl.program_id(0) // blocks)
    start = (tl.program_id(0) % blocks) * KEYS
    if start >= item.num_keys:
        return
    HEADS: tl.constexpr = KV_HEADS * GROUP
    number = start + tl.arange(0, KEYS)
    column = _columns(work, item, number)
    keys = _keys(k, k_strides, item, kv, number, column, DIM, PAD, DOT)
    total = tl.zeros((KEYS, PAD), tl.float32)
    for number_of_tile in range(tl.cdiv(item.num_rows.to(tl.int32), ROWS)):
        tile = _tile(item, number_of_tile, kv, GROUP, ROWS, WIDTH)
        queries = _queries(q, q_strides, work, item, tile, DIM, PAD, DOT)
        lse = _segment_lse(stats, item, tile, HEADS)
        delta = _segment_delta(deltas, item, tile, HEADS)
        scores = tl.dot(keys, tl.trans(queries), input_precision="ieee") * scale2
        scores = _hide(scores, work, item, number[:, None], column[:, None], tile.place[None, :], tile.live[None, :])
        weights = tl.exp2(scores - lse[None, :])
        gradient = _map_gradient(grad, work, item, number[:, None], tile.row[None, :], tile.live[None, :]) / HEADS
        score_gradient = weights * (gradient - delta[None, :])
        total += tl.dot(score_gradient.to(GRAD), queries.to(GRAD), input_precision=PRECISION)
    mask = (number < item.num_keys)[:, None] & (tl.arange(0, PAD) < DIM)[None, :]
    tl.store(_key_pointers(dk, dk_strides, item, kv, column, PAD), total * scale, mask=mask)


@triton.jit
def sum_kernel(
    partial, row_parts, row_batch, row_position, dq, strides,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, PAD: tl.constexpr,
):  # fmt: skip
    """dq from its parts, in the order of parts and of rows that are the same query; grid (rows, blocks of heads)."""
    first = tl.program_id(0).to(tl.int64)
    if tl.load(row_parts + first * 5) == 0:
        return
    head = tl.program_id(1).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    dim = tl.arange(0, PAD)
    mask = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    total = tl.zeros((BLOCK, PAD), tl.float32)
    row = first
    while row >= 0:
        start, step = tl.load(row_parts + row * 5 + 2), tl.load(row_parts + row * 5 + 3)
        for part in range(tl.load(row_parts + row * 5 + 4).to(tl.int32)):
            place = (start + part * step) * HEADS + head
            total += tl.load(partial + place[:, None] * DIM + dim[None, :], mask=mask, other=0.0)
        row = tl.load(row_parts + row * 5 + 1)
    place = tl.load(row_batch + first) * strides[0] + tl.load(row_position + first) * strides[2]
    pointer = dq + place + head[:, None] * strides[1] + dim.to(tl.int64)[None, :] * strides[3]
    tl.store(pointer, total, mask=mask)


def _arch() -> int:
    return 0 if INTERPRETED else triton.runtime.driver.active.get_current_target().arch


def _blocks(q_BHLD: Tensor, k_BKLD: Tensor, max_rows: int) -> dict[str, Any]:
    """Block sizes, from sizes alone: a choice by the clock would change the order of sums from run to run."""
    (_, heads, _, dim), kv_heads = q_BHLD.shape, k_BKLD.shape[1]
    width, pad = triton.next_power_of_2(heads // kv_heads), max(16, triton.next_power_of_2(dim))
    size = q_BHLD.element_size()
    # Backward, fp16 is multiplied as TF32, of twice the size.
    small = q_BHLD.dtype == torch.bfloat16 and pad <= 128
    lanes, keys = (16, 16) if size == 4 else (64, 64 if width < 64 else 32) if small else (32, 32)
    # At least 16 lanes, the least that a matrix product can add up.
    rows = max(min(triton.next_power_of_2(max_rows), lanes // width), 16 // width, 1)
    full = small and rows * width >= 64
    # Left to itself, ptxas fits one more program on a processor: without spills for sm_90, for sm_80 with short heads.
    free = full and width < 64 and _arch() in ((90,) if pad > 64 else (80, 86, 89, 90))
    dtype = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[q_BHLD.dtype]
    return {
        "KV_HEADS": kv_heads,
        "GROUP": heads // kv_heads,
        "DIM": dim,
        "ROWS": rows,
        "WIDTH": width,
        "PAD": pad,
        "KEYS": keys,
        # The interpreter multiplies the bits of bf16 as integers.
        "DOT": tl.float32 if INTERPRETED else dtype,
        "num_warps": 16 if size == 4 else 4 if small and not full else 8,
        "num_stages": 3 if small else 2,
        "maxnreg": 128 if size == 4 else None if free else 255,
        "enable_fp_fusion": True,  # Triton 3.10 changes the default
    }


def _gradient_type(dtype: torch.dtype) -> dict[str, Any]:
    if dtype == torch.bfloat16 and not INTERPRETED:
        return {"GRAD": tl.bfloat16, "PRECISION": "ieee"}
    return {"GRAD": tl.float32, "PRECISION": "tf32" if dtype == torch.float16 else "ieee"}


def forward(
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    items: Tensor,
    row_position: Tensor,
    key_index: Tensor | None,
    row_ranges: Tensor | None,
    *,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Flat maps, and the base-2 log-sum-exp (statistics, H) of every item, row and head."""
    map_size, num_stats, _, max_rows, max_keys, max_splits, _ = sizes
    flat = q_BHLD.new_empty(map_size, dtype=torch.float32)
    stats = q_BHLD.new_empty(num_stats, q_BHLD.shape[1], dtype=torch.float32)
    if not len(items):
        return flat, stats
    work = Work(items, row_position, key_index, row_ranges)
    with torch.cuda.device_of(q_BHLD):
        blocks = _blocks(q_BHLD, k_BKLD, max_rows)
    tiles = triton.cdiv(max_rows, blocks["ROWS"])
    kv_heads, fused = k_BKLD.shape[1], max_splits == 1
    arguments = (work, q_BHLD.stride(), k_BKLD.stride(), tiles, scale * math.log2(math.e))
    with torch.cuda.device_of(q_BHLD):
        if not fused:
            lse_kernel[(len(items) * tiles, kv_heads)](q_BHLD, k_BKLD, stats, *arguments, **blocks)
        parts = 1 if fused else triton.cdiv(max_keys, blocks["KEYS"])
        map_kernel[(len(items) * tiles, parts)](
            q_BHLD, k_BKLD, flat, stats, *arguments, **blocks, FUSED=fused, KV_PAD=triton.next_power_of_2(kv_heads)
        )
    return flat, stats


def backward(
    grad: Tensor,
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    stats: Tensor,
    items: Tensor,
    row_batch: Tensor,
    row_position: Tensor,
    row_parts: Tensor,
    key_index: Tensor | None,
    row_ranges: Tensor | None,
    *,
    sizes: Sequence[int],
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Gradients of q and k: full size, zero but for the rows and their keys."""
    _, _, num_parts, max_rows, max_keys, max_splits, last_wave = sizes
    dq, dk = torch.zeros_like(q_BHLD), torch.zeros_like(k_BKLD)
    if not len(items):
        return dq, dk
    grad = grad.contiguous()  # one value for each of the map; autograd hands over expanded scalars
    _, heads, _, dim = q_BHLD.shape
    deltas = torch.empty_like(stats)
    partial = stats.new_empty(num_parts, heads, dim)
    work = Work(items, row_position, key_index, row_ranges)
    with torch.cuda.device_of(q_BHLD):
        blocks = _blocks(q_BHLD, k_BKLD, max_rows)
    types = _gradient_type(q_BHLD.dtype)
    tiles, key_blocks = triton.cdiv(max_rows, blocks["ROWS"]), triton.cdiv(max_keys, blocks["KEYS"])
    kv_heads, fused = k_BKLD.shape[1], max_splits == 1
    strides, scale2 = (q_BHLD.stride(), k_BKLD.stride()), scale * math.log2(math.e)
    inputs = (q_BHLD, k_BKLD, grad, stats, deltas)
    with torch.cuda.device_of(q_BHLD):
        if not fused:
            delta_kernel[(len(items) * tiles, kv_heads)](*inputs, work, *strides, tiles, scale2, **blocks)
        for wave in range(last_wave + 1):
            dq_kernel[(len(items) * tiles, kv_heads)](
                *inputs, partial, work, *strides, tiles, wave, scale, scale2, **blocks, **types, FUSED=fused
            )
        dk_kernel[(len(items) * key_blocks, kv_heads)](
            *inputs, dk, work, *strides, dk.stride(), key_blocks, scale, scale2, **blocks, **types
        )
        block = max(1, 1024 // blocks["PAD"])
        sum_kernel[(len(row_position), triton.cdiv(heads, block))](
            partial, row_parts, row_batch, row_position, dq, dq.stride(),
            HEADS=heads, DIM=dim, BLOCK=block, PAD=blocks["PAD"], num_warps=4,
        )  # fmt: skip
    return dq, dk
