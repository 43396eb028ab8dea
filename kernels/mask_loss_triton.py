"""Triton kernels of `pixel_sums`: the sums of a mask loss at mask resolution and their slopes at the map, in one pass
over masks that stay bits.

Bilinear interpolation makes the pixels between four neighbouring cell centres a function of those four cells alone.
Such a patch (half a patch along the borders) is read by one program, which keeps of its pixels, gradients included,
only six sums: with fx, fy the place of a pixel within its patch and g the slope of its term,

    sum g (1-fy) (1-fx),  sum g (1-fy) fx,  sum g fy (1-fx),  sum g fy fx,  sum of terms,  pixels inside the mask

so nothing of the masks' size is ever stored. A cell's slope is the sum of four patches' corners, Wy^T G Wx. Two
launches: `pixel_kernel` over patches, `slope_kernel` over frames, which also differentiates the scaling of the map.
No atomics, fp32 sums in an order that sizes alone decide: two runs agree bit for bit.

A map is held as shares s of its peak with the logarithm `offset` of what they are shares of: m = exp(offset) s.
"""
# mypy: disallow-untyped-defs=False

import torch
import triton
import triton.language as tl
from torch import Tensor

from swim.kernels import mask_loss

MIN_PROBABILITY = tl.constexpr(mask_loss.MIN_PROBABILITY)
MIN_COMPLEMENT = tl.constexpr(mask_loss.MIN_COMPLEMENT)
MIN_SPREAD = tl.constexpr(mask_loss.MIN_SPREAD)
FOCAL_ALPHA = tl.constexpr(mask_loss.FOCAL_ALPHA)

PATCH_PIXELS = 1024  # pixels of one row that a program holds: eight for each of its threads
CELL_BLOCK = 1024
PARTS = tl.constexpr(6)


@triton.jit
def _first_pixel(patch, cells, size):
    """First pixel of a patch along one axis; patch p lies between the centres of cells p - 1 and p."""
    twice = (2 * patch - 1) * size - cells  # of the border between patches, in 1 / cells of a pixel
    return tl.minimum((tl.maximum(twice, 0) + 2 * cells - 1) // (2 * cells), size)


@triton.jit
def _fraction(pixel, patch, cells, size):
    """Place of a pixel's centre between the two cells; beyond the outermost cell all weight is on that one."""
    place = ((2 * pixel + 1) * cells - (2 * patch - 1) * size).to(tl.float32) / (2 * size).to(tl.float32)
    return tl.where(patch == 0, 1.0, tl.where(patch == cells, 0.0, place))


@triton.jit
def _patch_weight(patch, cells, size):
    """Number of pixels in a patch, and the sum of their fractions."""
    first, last = _first_pixel(patch, cells, size).to(tl.int64), _first_pixel(patch + 1, cells, size).to(tl.int64)
    number = last - first
    twice = (last * last - first * first) * cells - number * (2 * patch - 1) * size
    between = twice.to(tl.float32) / (2 * size).to(tl.float32)
    number = number.to(tl.float32)
    return number, tl.where(patch == 0, number, tl.where(patch == cells, 0.0, between))


@triton.jit
def _cell_weight(cell, cells, size):
    """Sum of a cell's interpolation weights over all pixels of an axis."""
    _, near = _patch_weight(cell, cells, size)
    number, far = _patch_weight(cell + 1, cells, size)
    return near + number - far


@triton.jit
def _ends(log_map, cells, BLOCK: tl.constexpr):
    """Logarithm of a frame's peak, and its smallest cell as a share of it."""
    peak = tl.full((BLOCK,), float("-inf"), tl.float32)
    least = tl.full((BLOCK,), float("inf"), tl.float32)
    for start in range(0, cells, BLOCK):
        cell = start + tl.arange(0, BLOCK)
        peak = tl.maximum(peak, tl.load(log_map + cell, mask=cell < cells, other=float("-inf")))
        least = tl.minimum(least, tl.load(log_map + cell, mask=cell < cells, other=float("inf")))
    top = tl.max(peak, 0)
    return top, tl.exp(tl.min(least, 0) - top)


@triton.jit
def _scaled(share, low, SCALE: tl.constexpr):
    """Scaled map of shares of the peak."""
    if SCALE == "minmax":
        spread = 1 - low
        share = tl.where(spread > MIN_SPREAD, share - low, 0.0) / tl.maximum(spread, MIN_SPREAD)
        share = tl.maximum(share, MIN_PROBABILITY, propagate_nan=tl.PropagateNan.ALL)
    return share


@triton.jit
def _offset(peak, SCALE: tl.constexpr):
    offset = peak
    if SCALE != "none":
        offset = 0.0 * peak
    return offset


@triton.jit
def _true_side(share, inside, above_floor, size, KIND: tl.constexpr, SCALE: tl.constexpr):
    """What a map of exp(offset) = `size` gives to a pixel's true side, as a share inside the mask and as 1 - m outside
    (1 for kl); the slope of its logarithm at the share; and log(1 - m) of small m, which then count 1 in the first."""
    if KIND == "kl":
        chosen = tl.where(inside, share, 1.0)
        return chosen, tl.where(inside & above_floor, _inverse(chosen), 0.0), 0.0 * share
    m = share
    if SCALE == "none":
        m = share * size
    capped = tl.minimum(m, 1 - MIN_COMPLEMENT, propagate_nan=tl.PropagateNan.ALL)
    chosen = tl.where(inside, share, 1 - capped)
    inverse = _inverse(chosen)
    falling = -inverse
    if SCALE == "none":
        falling = -size * inverse
    slope = tl.where(inside, tl.where(above_floor, inverse, 0.0), tl.where(capped == m, falling, 0.0))
    # 1 - m rounds to 6e-8, which is much of a small m; the series is exact to 1e-8 up to 1/64.
    small = (m < 1 / 64) & (inside == 0)
    series = -m * (1 + m * (1 / 2 + m * (1 / 3 + m * (1 / 4))))
    # 0 * inverse: `_mantissa` forgets that a number was none.
    return tl.where(small, 1.0, chosen), slope, tl.where(small, series, 0.0 * inverse)


@triton.jit
def _inverse(x):
    """1 / x of positive numbers; a division takes four times the instructions."""
    root = tl.math.rsqrt(x)
    return root * root


@triton.jit
def _mantissa(x):
    """A positive number's mantissa in [1, 2) and the bits of its exponent."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True), bits >> 23


@triton.jit(do_not_specialize=["rows", "columns", "height", "width", "row_bytes"])
def pixel_kernel(
    log_map, packed, parts, rows, columns, height, width, row_bytes,
    KIND: tl.constexpr, SCALE: tl.constexpr, CELLS: tl.constexpr, PATCHES: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """Six sums (frames, 6, rows + 1, columns + 1) of every patch; grid (frames, rows + 1, blocks of patches)."""
    frame, down = tl.program_id(0).to(tl.int64), tl.program_id(1)
    log_map += frame * rows * columns
    packed += frame * height * row_bytes
    peak, low = _ends(log_map, rows * columns, CELLS)
    offset = _offset(peak, SCALE)
    size = tl.exp(offset)

    across = tl.program_id(2) * PATCHES + tl.arange(0, PATCHES)
    real = across <= columns
    x = _first_pixel(across, columns, width)[:, None] + tl.arange(0, PIXELS)[None, :]
    live = real[:, None] & (x < _first_pixel(across + 1, columns, width)[:, None])
    fx = _fraction(x, across[:, None], columns, width)
    left, right = tl.maximum(across - 1, 0), tl.minimum(across, columns - 1)
    above = log_map + tl.maximum(down - 1, 0) * columns
    below = log_map + tl.minimum(down, rows - 1) * columns
    # Rows of pixels differ in fy alone: what is the same for all of them is interpolated here.
    top = _scaled(tl.exp(tl.load(above + left, mask=real, other=0.0) - peak), low, SCALE)[:, None] * (1 - fx)
    top += _scaled(tl.exp(tl.load(above + right, mask=real, other=0.0) - peak), low, SCALE)[:, None] * fx
    bottom = _scaled(tl.exp(tl.load(below + left, mask=real, other=0.0) - peak), low, SCALE)[:, None] * (1 - fx)
    bottom += _scaled(tl.exp(tl.load(below + right, mask=real, other=0.0) - peak), low, SCALE)[:, None] * fx

    step = bottom - top
    top_slope = tl.zeros((PATCHES, PIXELS), tl.float32)
    bottom_slope = tl.zeros((PATCHES, PIXELS), tl.float32)
    terms = tl.zeros((PATCHES, PIXELS), tl.float32)
    covered = tl.zeros((PATCHES, PIXELS), tl.float32)
    # A sum of logarithms is the logarithm of a product, of which the exponent is taken off at every factor.
    product = tl.full((PATCHES, PIXELS), 1.0, tl.float32)
    exponents = tl.zeros((PATCHES, PIXELS), tl.int32)
    first_y, last_y = _first_pixel(down, rows, height), _first_pixel(down + 1, rows, height)
    for y in range(first_y, last_y):
        fy = _fraction(y, down, rows, height)
        interpolated = top + fy * step
        share = tl.maximum(interpolated, MIN_PROBABILITY, propagate_nan=tl.PropagateNan.ALL)
        byte = tl.load(packed + y * row_bytes + x // 8, mask=live, other=0).to(tl.int32)
        inside = ((byte >> (x % 8)) & 1) == 1
        if KIND == "dice" or KIND == "iou":
            slope = tl.where(inside, 1.0, 0.0)
            terms += tl.where(inside, share, 0.0)
            covered += slope
        else:
            above_floor = interpolated >= MIN_PROBABILITY
            chosen, log_slope, log_small = _true_side(share, inside, above_floor, size, KIND, SCALE)
            if KIND == "focal":
                m = share * size
                wrong = tl.where(inside, 1 - m, m)
                log = tl.log(chosen) + log_small + tl.where(inside, offset, 0.0)
                turn = tl.where(inside, tl.where(above_floor, -size, 0.0), size)
                weight = tl.where(inside, FOCAL_ALPHA, 1 - FOCAL_ALPHA) * wrong  # gamma is 2
                terms -= weight * wrong * log
                slope = -weight * (wrong * log_slope + 2 * log * turn)
            else:
                product, exponent = _mantissa(product * chosen)
                exponents += exponent - 127
                terms -= log_small
                slope = -log_slope
                if KIND == "kl" or SCALE == "none":
                    covered += tl.where(inside, 1.0, 0.0)
        bottom_slope += fy * slope
        top_slope += (1 - fy) * slope
    terms -= tl.log(product) + exponents * 0.6931471805599453

    plane = (rows + 1) * (columns + 1)
    line = parts + frame * PARTS * plane + down * (columns + 1) + across
    tl.store(line, tl.sum(tl.where(live, top_slope * (1 - fx), 0.0), 1), mask=real)
    tl.store(line + plane, tl.sum(tl.where(live, top_slope * fx, 0.0), 1), mask=real)
    tl.store(line + 2 * plane, tl.sum(tl.where(live, bottom_slope * (1 - fx), 0.0), 1), mask=real)
    tl.store(line + 3 * plane, tl.sum(tl.where(live, bottom_slope * fx, 0.0), 1), mask=real)
    tl.store(line + 4 * plane, tl.sum(tl.where(live, terms, 0.0), 1), mask=real)
    tl.store(line + 5 * plane, tl.sum(tl.where(live, covered, 0.0), 1), mask=real)


@triton.jit
def _sum_of_plane(plane, size, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        place = start + tl.arange(0, BLOCK)
        total += tl.load(plane + place, mask=place < size, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _slope_of_first(parts, cell, live, rows, columns):
    """Slope of the first sum at scaled cells: the corners of the four patches around each."""
    plane, line = (rows + 1) * (columns + 1), columns + 1
    corner = parts + (cell // columns) * line + cell % columns
    slope = tl.load(corner + line + 1, mask=live, other=0.0)
    slope += tl.load(corner + plane + line, mask=live, other=0.0)
    slope += tl.load(corner + 2 * plane + 1, mask=live, other=0.0)
    return slope + tl.load(corner + 3 * plane, mask=live, other=0.0)


@triton.jit
def _slope_of_mass(cell, live, rows, columns, height, width):
    """Slope at scaled cells of the sum over all pixels."""
    down = _cell_weight(cell // columns, rows, height)
    return tl.where(live, down * _cell_weight(cell % columns, columns, width), 0.0)


@triton.jit
def _above_floor(share, low):
    """Where min-max lets a gradient through: not where it raised a cell to MIN_PROBABILITY."""
    spread = 1 - low
    return tl.where(spread > MIN_SPREAD, share - low, 0.0) / tl.maximum(spread, MIN_SPREAD) >= MIN_PROBABILITY


@triton.jit
def _through_scale(slope, share, low, at_peak, at_low, inner, outer, SCALE: tl.constexpr):
    """Slope at the log map from that at the scaled one; `inner` and `outer` are sums of `_scale_sums` over the frame,
    `at_peak` and `at_low` the share of a cell in its peak and its smallest value, which others may equal."""
    if SCALE == "none":  # the peak is only a common factor
        return slope * share
    if SCALE == "max":
        return slope * share - at_peak * outer
    spread = tl.maximum(1 - low, MIN_SPREAD)
    slope = tl.where(_above_floor(share, low), slope / spread, 0.0)
    return share * (slope - at_low * inner) - at_peak * (outer - low * inner)


@triton.jit
def _scale_sums(slope, share, scaled, low, SCALE: tl.constexpr):
    """What cells add to the negative slopes at a frame's smallest share and at the logarithm of its peak."""
    inner = 0.0 * slope
    if SCALE == "minmax":
        slope = tl.where(_above_floor(share, low), slope / tl.maximum(1 - low, MIN_SPREAD), 0.0)
        inner = slope * (1 - scaled)
    return inner, slope * share


@triton.jit(do_not_specialize=["rows", "columns", "height", "width"])
def slope_kernel(
    log_map, parts, sums, slopes, rows, columns, height, width,
    KIND: tl.constexpr, SCALE: tl.constexpr, CELLS: tl.constexpr,
):  # fmt: skip
    """Sums (frames, 3) and slopes (frames, 1 or 2, rows, columns) of the first two at the log map; grid (frames,)."""
    MASS: tl.constexpr = KIND == "kl" or KIND == "dice" or KIND == "iou"
    frame = tl.program_id(0).to(tl.int64)
    cells, plane = rows * columns, (rows + 1) * (columns + 1)
    log_map += frame * cells
    parts += frame * PARTS * plane
    peak, low = _ends(log_map, cells, CELLS)
    offset = _offset(peak, SCALE)
    size = tl.exp(offset)

    lanes = tl.zeros((CELLS,), tl.float32)
    mass, at_peaks, at_lows, inner, outer, inner_mass, outer_mass = lanes, lanes, lanes, lanes, lanes, lanes, lanes
    for start in range(0, cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        live = cell < cells
        logs = tl.load(log_map + cell, mask=live, other=float("-inf"))
        share = tl.exp(logs - peak)
        scaled = _scaled(share, low, SCALE)
        at_peaks += tl.where(logs == peak, 1.0, 0.0)
        at_lows += tl.where(live & (share == low), 1.0, 0.0)
        add_inner, add_outer = _scale_sums(_slope_of_first(parts, cell, live, rows, columns), share, scaled, low, SCALE)
        inner, outer = inner + add_inner, outer + add_outer
        if MASS:
            weight = _slope_of_mass(cell, live, rows, columns, height, width)
            mass += weight * scaled
            add_inner, add_outer = _scale_sums(weight, share, scaled, low, SCALE)
            inner_mass, outer_mass = inner_mass + add_inner, outer_mass + add_outer
    peaks, lows, total = tl.sum(at_peaks, 0), tl.sum(at_lows, 0), tl.sum(mass, 0)
    term = _sum_of_plane(parts + 4 * plane, plane, CELLS)
    covered = _sum_of_plane(parts + 5 * plane, plane, CELLS)
    first_factor, second_factor = 1.0, size
    if KIND == "kl":
        first, second, third = term - offset * covered, tl.log(total) + offset, covered
        second_factor = 1 / total
    elif MASS:
        first, second, third = size * term, size * total, covered
        first_factor = size
    else:
        first, second, third = term, (height * 1.0) * width, 0.0 * covered
        if KIND == "bce":
            first -= offset * covered
    tl.store(sums + frame * 3, first)
    tl.store(sums + frame * 3 + 1, second)
    tl.store(sums + frame * 3 + 2, third)

    slopes += frame * cells * (1 + MASS)
    inner_of_first, outer_of_first = tl.sum(inner, 0), tl.sum(outer, 0)
    inner_of_mass, outer_of_mass = tl.sum(inner_mass, 0), tl.sum(outer_mass, 0)
    for start in range(0, cells, CELLS):
        cell = start + tl.arange(0, CELLS)
        live = cell < cells
        logs = tl.load(log_map + cell, mask=live, other=float("-inf"))
        share = tl.exp(logs - peak)
        at_peak, at_low = tl.where(logs == peak, 1.0, 0.0) / peaks, tl.where(share == low, 1.0, 0.0) / lows
        slope = _slope_of_first(parts, cell, live, rows, columns)
        slope = _through_scale(slope, share, low, at_peak, at_low, inner_of_first, outer_of_first, SCALE)
        tl.store(slopes + cell, slope * first_factor, mask=live)
        if MASS:
            slope = _slope_of_mass(cell, live, rows, columns, height, width)
            slope = _through_scale(slope, share, low, at_peak, at_low, inner_of_mass, outer_of_mass, SCALE)
            tl.store(slopes + cells + cell, slope * second_factor, mask=live)


def pixel_sums(log_map_NYX: Tensor, packed_NHB: Tensor, width: int, kind: str, scale: str) -> tuple[Tensor, Tensor]:
    """Sums (N, 3) and slopes (N, 1 or 2, Y, X) of `mask_loss.pixel_sums`."""
    (frames, rows, columns), (_, height, row_bytes) = log_map_NYX.shape, packed_NHB.shape
    sums = log_map_NYX.new_empty(frames, 3)
    slopes = log_map_NYX.new_empty(frames, mask_loss.num_slopes(kind), rows, columns)
    if not frames:
        return sums, slopes
    log_map_NYX, packed_NHB = log_map_NYX.contiguous(), packed_NHB.contiguous()
    parts = log_map_NYX.new_empty(frames, PARTS.value, rows + 1, columns + 1)
    pixels = triton.next_power_of_2(-(-width // columns))
    patches = min(triton.next_power_of_2(columns + 1), max(PATCH_PIXELS // pixels, 1))
    cells = min(CELL_BLOCK, triton.next_power_of_2(rows * columns))
    grid = (frames, rows + 1, triton.cdiv(columns + 1, patches))
    sizes = (rows, columns, height, width)
    options = {"KIND": kind, "SCALE": scale, "CELLS": cells, "enable_fp_fusion": True}
    with torch.cuda.device_of(log_map_NYX):
        pixel_kernel[grid](
            log_map_NYX, packed_NHB, parts, *sizes, row_bytes, PATCHES=patches, PIXELS=pixels, num_warps=4, **options
        )
        # maxnreg: else ptxas spills a few bytes to fit one more program on a processor.
        slope_kernel[(frames,)](log_map_NYX, parts, sums, slopes, *sizes, num_warps=8, maxnreg=255, **options)
    return sums, slopes
