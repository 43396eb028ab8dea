"""COCO run-length masks: strings to runs, runs to grid-cell coverage, without ever building the full-size mask."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco

if TYPE_CHECKING:
    from swim.data_tools.records import Rle

MAX_MASK_SIDE = 16384
MAX_CHARS_PER_RUN = 7  # 35 bits: more than any image, and far from overflowing int64


def decode_counts(counts: str) -> np.ndarray:
    """Run lengths int64 [R] of a COCO compressed string, background first; ValueError if the string is damaged."""
    codes = np.frombuffer(counts.encode("utf-32-le"), "<u4").astype(np.int64) - 48
    if codes.size == 0:
        raise ValueError("the RLE string is empty")
    outside = np.flatnonzero((codes < 0) | (codes > 63))
    if outside.size:
        at = int(outside[0])
        raise ValueError(f"character {counts[at]!r} at position {at} is outside the RLE alphabet '0'..'o'")
    final = (codes & 32) == 0  # bit 5 says that the number goes on in the next character
    if not final[-1]:
        raise ValueError(f"the RLE string ends inside a number (length {codes.size})")
    ends = np.flatnonzero(final)
    starts = np.concatenate(([0], ends[:-1] + 1))
    lengths = ends - starts + 1
    if lengths.max() > MAX_CHARS_PER_RUN:
        raise ValueError(f"an RLE number has {lengths.max()} characters, the limit is {MAX_CHARS_PER_RUN}")
    place = np.arange(codes.size) - np.repeat(starts, lengths)
    runs = np.add.reduceat((codes & 31) << (5 * place), starts)
    runs -= ((codes[ends] & 16) != 0).astype(np.int64) << (5 * lengths)  # bit 4 of the last character is the sign
    # From the fourth number on, each is the difference to the number two before it.
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    if runs.min() < 0:
        raise ValueError(f"run {int(np.argmin(runs))} has the negative length {runs.min()}")
    return runs


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """COCO compressed RLE `{"size": (H, W), "counts": str}` of a bool mask [H, W]."""
    rle = coco.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": (mask.shape[0], mask.shape[1]), "counts": rle["counts"].decode("ascii")}


def encode_counts(size: tuple[int, int], runs: Sequence[int]) -> dict[str, Any]:
    """COCO compressed RLE of run lengths, background first; ValueError unless they are the pixels of `size` (H, W)."""
    height, width = _checked(size)
    if not all(type(run) is int and 0 <= run <= MAX_MASK_SIDE**2 for run in runs):
        raise ValueError(f"counts {list(runs[:8])!s:.60} hold other things than pixel numbers; encode the mask again")
    if sum(runs) != height * width:
        problem = f"the runs sum to {sum(runs)}, but {height} x {width} is {height * width}"
        raise ValueError(f"{problem}; size and counts belong to different masks, encode it again")
    rle = coco.frPyObjects({"size": [height, width], "counts": list(runs)}, height, width)
    return {"size": (height, width), "counts": rle["counts"].decode("ascii")}


def encode_polygons(size: tuple[int, int], polygons: Sequence[Sequence[float]]) -> dict[str, Any]:
    """COCO compressed RLE of the union of polygons (x0, y0, x1, y1, ...) in pixels; none give an empty mask.

    ValueError for fewer than 3 points and for points more than 1 pixel outside `size` (H, W).
    """
    height, width = _checked(size)
    for polygon in polygons:
        numbers = np.array(polygon, np.float64)
        if numbers.ndim != 1 or numbers.size < 6 or numbers.size % 2:
            raise ValueError(f"a polygon of {numbers.size} numbers is not x0, y0, x1, y1, x2, y2, ...; correct it")
        limits = np.resize(np.array([width, height], np.float64), numbers.size)
        outside = np.flatnonzero(~((numbers >= -1) & (numbers <= limits + 1)))
        if outside.size:
            at = int(outside[0])
            raise ValueError(
                f"polygon coordinate {numbers[at]} is outside 0 to {limits[at]:g}; give pixels of the video"
            )
    if not polygons:
        return encode_mask(np.zeros((height, width), bool))
    rle = coco.merge(coco.frPyObjects([list(map(float, polygon)) for polygon in polygons], height, width))
    return {"size": (height, width), "counts": rle["counts"].decode("ascii")}


def _checked(size: tuple[int, int]) -> tuple[int, int]:
    """The size, before anything of it is allocated."""
    height, width = size
    if not all(type(side) is int and 1 <= side <= MAX_MASK_SIDE for side in (height, width)):
        raise ValueError(
            f"size {height!r:.20} x {width!r:.20} is not two numbers of pixels from 1 to {MAX_MASK_SIDE}; correct it"
        )
    return height, width


def decode_mask(rle: "Rle | Mapping[str, Any]") -> np.ndarray:
    """Bool mask [H, W] of an RLE, for reports and tests; training reads `cell_coverage`."""
    size, counts = _unpack(rle)
    return coco.decode({"size": list(size), "counts": counts.encode("ascii")}).astype(bool)


def cell_coverage(rle: "Rle | Mapping[str, Any]", grid: tuple[int, int]) -> np.ndarray:
    """Exact covered share float64 [h, w] of each cell of an h x w grid laid over the whole image.

    Area shares do not change when the image is resized, so the mask's own size need not be the model's.
    """
    (height, width), counts = _unpack(rle)
    rows, columns = grid
    edges = np.cumsum(decode_counts(counts))
    edges = edges[: edges.size // 2 * 2]  # drops the last background run; pairs (start, end) remain
    sign = np.tile([-1.0, 1.0], edges.size // 2)
    column, row = np.divmod(edges, height)  # runs go down the columns
    # In units of one cell, the area before position (column, row) inside cell (j, i) is U_i + V_i * Y_j: U the whole
    # columns to the left, V the column the position lies in, Y the part of that column above it.
    cell = np.arange(columns)
    left = np.clip(column[:, None] * (columns / width) - cell, 0, 1)
    own = np.clip((column[:, None] + 1) * (columns / width) - cell, 0, 1) - left
    above = np.clip(row[:, None] * (rows / height) - np.arange(rows), 0, 1)
    return np.clip(sign @ left + above.T @ (sign[:, None] * own), 0, 1)


def _unpack(rle: "Rle | Mapping[str, Any]") -> tuple[tuple[int, int], str]:
    if isinstance(rle, Mapping):
        return rle["size"], rle["counts"]
    return rle.size, rle.counts
