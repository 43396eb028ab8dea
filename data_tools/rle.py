"""COCO run-length masks: strings to runs, runs to grid-cell coverage, without ever building the full-size mask."""

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pycocotools import mask as coco

if TYPE_CHECKING:
    from swim.data_tools.records import Rle

Crop = tuple[float, float, float, float]
"""Top, left, bottom, right in pixels of a mask."""
MAX_MASK_SIDE = 16384
MAX_CHARS_PER_RUN = 7  # 35 bits: more than any image, and far from overflowing int64


def decode_counts(counts: str) -> np.ndarray:
    """Run lengths int64 [R] of a COCO compressed string, background first; ValueError if the string is damaged."""
    return _decode([counts])[0]


def _decode(strings: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Run lengths of several strings one behind the other, and how many each has."""
    sizes = np.array([len(string) for string in strings])
    if not sizes.all():
        raise ValueError("the RLE string is empty")
    text = "".join(strings)
    codes = np.frombuffer(text.encode("ascii", "replace"), np.uint8) - np.uint8(48)
    ends = np.flatnonzero(codes < 32)  # bit 5 says that the number goes on in the next character
    starts = np.append(0, ends[:-1] + 1)
    lengths = ends - starts + 1
    outside = not text.isascii() or codes.max() > 63
    if outside or (codes[np.cumsum(sizes) - 1] > 31).any() or lengths.max() > MAX_CHARS_PER_RUN:
        raise ValueError(next(problem for string in strings if (problem := _damage(string))))
    bits = codes & 31
    runs = bits[starts].astype(np.int64)
    for place in range(1, int(lengths.max())):
        longer = np.flatnonzero(lengths > place)
        runs[longer] += bits[starts[longer] + place].astype(np.int64) << (5 * place)
    runs -= (codes[ends] >> 4 & 1).astype(np.int64) << (5 * lengths)  # bit 4 of the last character is the sign
    counts = np.diff(np.searchsorted(ends, np.cumsum(sizes) - 1), prepend=-1)
    first = np.cumsum(counts) - counts
    # From the fourth number on, each is the difference to the number two before it.
    odd = _places(counts) % 2 == 1
    chains = np.where(odd, 0, runs), np.where(odd, runs, 0)
    chains[0][first] = 0  # the first number is in none
    even_sum, odd_sum = (total - np.repeat(total[first], counts) for total in map(np.cumsum, chains))
    starts_with = runs[first]
    runs = np.where(odd, odd_sum, even_sum)
    runs[first] = starts_with
    if runs.min() < 0:
        worst = int(np.argmin(runs))
        run = worst - int(first[np.searchsorted(first, worst, side="right") - 1])
        raise ValueError(f"run {run} has the negative length {runs[worst]}")
    return runs, counts


def _damage(string: str) -> str:
    """What is wrong with the characters of a string, if anything."""
    at = next((i for i, letter in enumerate(string) if not "0" <= letter <= "o"), None)
    if at is not None:
        return f"character {string[at]!r} at position {at} is outside the RLE alphabet '0'..'o'"
    if string[-1] > "O":
        return f"the RLE string ends inside a number (length {len(string)})"
    longest = 1 + max(len(more) for more in re.split("[0-O]", string))
    return f"an RLE number has {longest} characters, the limit is {MAX_CHARS_PER_RUN}" * (longest > MAX_CHARS_PER_RUN)


def _places(counts: np.ndarray) -> np.ndarray:
    """0, 1, ... up to each count, one behind the other."""
    return np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)


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
    """Bool mask [H, W] of an RLE, for reports and tests; training reads `clip_coverage`."""
    size, counts = _unpack(rle)
    return coco.decode({"size": list(size), "counts": counts.encode("ascii")}).astype(bool)


def clip_coverage(
    rles: "Sequence[Rle | Mapping[str, Any]]", grid: tuple[int, int], *, crop: Crop | None = None, flip: bool = False
) -> np.ndarray:
    """Exact covered share float64 [N, h, w] of each cell of an h x w grid laid over the whole image, for N masks.

    Area shares do not change when the image is resized, so the masks' own sizes need not be the model's. With `crop`,
    the grid lies over that part alone: (top, left, bottom, right) in pixels of the mask, whole or not; `flip` mirrors
    the result left to right. ValueError for a damaged mask or a crop outside of it.
    """
    coverage_Nhw = np.empty((len(rles), *grid))
    masks = [(tuple(size), counts) for size, counts in map(_unpack, rles)]
    cover = _compiled() or _cover
    for size in dict.fromkeys(size for size, _ in masks):  # of one clip, nearly always one
        box = crop or (0.0, 0.0, float(size[0]), float(size[1]))
        if not all(0 <= low < high <= side for low, high, side in zip(box[:2], box[2:], size)):
            raise ValueError(f"crop {box} is not (top, left, bottom, right) inside a mask of {size[0]} x {size[1]}")
        own = [number for number, mask in enumerate(masks) if mask[0] == size]
        runs, counts = _decode([masks[number][1] for number in own])
        coverage_Nhw[own] = cover(runs, counts, size[0], box, grid)
    return coverage_Nhw[..., ::-1] if flip else coverage_Nhw


def _cover(runs: np.ndarray, counts: np.ndarray, height: int, box: Crop, grid: tuple[int, int]) -> np.ndarray:
    """Coverage [N, h, w] of a box of masks of equal height, given by their runs and how many each has.

    The covered area is the sum over the borders of all runs, with a sign, of the area in front of the border. Runs go
    down the columns: that area is whole columns, and a part of the border's own.
    """
    rows, columns = grid
    first, totals = np.cumsum(counts) - counts, np.cumsum(runs)
    borders = totals - np.repeat(totals[first] - runs[first], counts)
    place, paired = _places(counts), counts // 2 * 2  # the last background ends at no border
    kept = place < np.repeat(paired, counts)
    border, sign, mask = borders[kept], place[kept] % 2 * 2.0 - 1, np.repeat(np.arange(len(counts)), paired)
    top, left, bottom, right = box
    column = np.floor(border / height)
    x0, x1 = (np.clip((column + k - left) * (columns / (right - left)), 0, columns) for k in (0, 1))
    y = np.clip((border - column * height - top) * (rows / (bottom - top)), 0, rows)
    # Both borders of a run inside one column have the same whole columns in front, which cancel.
    crossing = np.repeat(column[::2] != column[1::2], 2)
    whole_NC = _in_front(x0[crossing], sign[crossing], mask[crossing], len(counts), columns)
    num_cells = (np.ceil(x1) - np.floor(x0)).astype(np.intp)  # that the border's column crosses
    part = np.repeat(np.arange(len(border)), num_cells)
    cell = np.floor(x0)[part] + _places(num_cells)
    width = np.minimum(x1[part], cell + 1) - np.maximum(x0[part], cell)
    bins = mask[part] * columns + cell.astype(np.intp)
    part_NCR = _in_front(y[part], sign[part] * width, bins, len(counts) * columns, rows).reshape(-1, columns, rows)
    return np.clip((part_NCR + whole_NC[..., None]).transpose(0, 2, 1), 0, 1)


def _in_front(at: np.ndarray, weight: np.ndarray, bins: np.ndarray, num_bins: int, num_cells: int) -> np.ndarray:
    """[num_bins, num_cells]: sums over each bin of weight x clip(at - cell, 0, 1), the share of a cell in front of
    `at`."""
    # As cells from the last to the first: one number where `at` lies, one in the cell before, and a running sum.
    cell = np.floor(at)
    own = weight * (at - cell)
    place = bins * (num_cells + 2) + cell.astype(np.intp)
    change = np.bincount(np.append(place + 1, place), np.append(own, weight - own), num_bins * (num_cells + 2))
    return change.reshape(num_bins, num_cells + 2)[:, ::-1].cumsum(1)[:, -2:0:-1]


@functools.cache
def _compiled() -> Callable[..., np.ndarray] | None:
    try:
        from swim.data_tools.rle_numba import cover
    except ImportError:
        return None
    return cover


def _unpack(rle: "Rle | Mapping[str, Any]") -> tuple[tuple[int, int], str]:
    if isinstance(rle, Mapping):
        return rle["size"], rle["counts"]
    return rle.size, rle.counts
