"""Mask loss: how far a noun's attention map is from its object's mask, on the token grid or at mask resolution.

A *frame* is one map of h x w cells against one target: coverage c in [0, 1] of the same cells (grid side), or a binary
mask of H x W pixels to whose size the map is upsampled bilinearly (pixel side; align_corners=False). A *unit* is the
frames that are judged together: one frame, except that `kl` may span all annotated frames of a noun. With map m and
cells or pixels j of the unit:

    kl     p_j = c_j / sum(c),  m'_j = m_j / sum(m):   KL(p || m') = sum_j p_j (log p_j - log m'_j)
    bce    mean_j  -( c_j log m_j + (1 - c_j) log(1 - m_j) )                                             (SWIM Eq. 7)
    focal  mean_j  -( c_j a (1 - m_j)^g log m_j + (1 - c_j) (1 - a) m_j^g log(1 - m_j) )     (arXiv 1708.02002, Eq. 5)
    dice   1 - 2 sum(m c) / (sum(m) + sum(c))
    iou    1 - sum(m c) / (sum(m) + sum(c) - sum(m c))

The result is sum_u weight_u * loss_u. Every loss is a function of a few sums over a frame, so the work is one pass over
the cells (`frame_sums`) and a little arithmetic on its sums (`mask_loss`). Maps come as logarithms: a product over
layers is then a sum, and no map underflows. fp64 is computed in fp64, everything else in fp32.

At mask resolution `pixel_sums_reference` is the specification and what runs on a CPU; `mask_loss_triton.py` has the
same as Triton kernels, registered here as the operator `swim::pixel_sums`. The grid side is plain torch: its tensors
are as small as the maps.

Shape suffixes: F frames, N frames of one grid and one mask size, Y X rows and columns of cells or pixels, H rows of a
mask, B bytes of such a row, U units.
"""

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from swim.kernels.backend import INTERPRETED, Backend, choose_triton, without_triton

LossKind = Literal["kl", "bce", "dice", "focal", "iou"]
MapScale = Literal["none", "minmax", "max"]

# Keeps logs finite. Far below any probability that a cell can lose its gradient at: d log m / d logit is 1 down to
# here.
MIN_PROBABILITY = 1e-30
# Nearest that m comes to 1 inside log(1 - m), which fp32 knows to 6e-8; a peak scaled to 1 has its loss capped here. A
# power of two, so that fp32 and fp64 cap alike.
MIN_COMPLEMENT = 2.0**-20
# Cells that differ by less than this share of the frame's peak count as equal (fp32 knows a share of 6e-8): such a map
# ranks no cell above another, so min-max makes it 0, without a gradient.
MIN_SPREAD = 1e-6
FOCAL_GAMMA, FOCAL_ALPHA = 2.0, 0.25  # the defaults of arXiv 1708.02002

# Pixels upsampled at a time; about ten fp32 tensors of this size are alive in between. What fits a CPU's cache is
# fastest there; a GPU wants fewer launches.
CHUNK_PIXELS = {"cpu": 1 << 19, "cuda": 1 << 23}


def frame_sums(
    log_map_NYX: Tensor,
    target: Tensor,
    *,
    kind: LossKind,
    size: tuple[int, int] | None = None,
    scale: MapScale = "none",
    backend: Backend = "auto",
) -> Tensor:
    """Sums (N, 3) that `mask_loss` needs of every frame, differentiable in the finite log maps.

    `target` is coverage (N, Y, X) of the map's own cells, or with `size` (H, W) masks as bits (N, H, B) that
    `unpack_masks` reads; then the maps are upsampled, by Triton without a tensor of that size, by torch a few frames
    at a time and again in the backward pass. Maps are scaled first, see `scale_frames`. Raises ValueError for masks
    that do not fit, and for what `backend` cannot do.
    """
    log_map_NYX = log_map_NYX if log_map_NYX.dtype == torch.float64 else log_map_NYX.float()
    if size is None:
        return _sums(scale_frames(log_map_NYX, scale), target.to(log_map_NYX.dtype), kind)
    if kind not in get_args(LossKind):
        raise _unknown(kind)
    wanted = (len(log_map_NYX), size[0], -(-size[1] // 8))
    if tuple(target.shape) != wanted or target.dtype != torch.uint8:
        raise ValueError(f"masks of {size} pixels are uint8 {wanted}, got {target.dtype} {tuple(target.shape)}")
    if choose_triton("frame_sums", backend, log_map_NYX, unsupported(log_map_NYX)):
        return _pixel_op(log_map_NYX, target, size[1], kind, scale)[0]
    return pixel_sums_reference(log_map_NYX, target, size[1], kind, scale)


def pixel_sums_reference(
    log_map_NYX: Tensor, packed_NHB: Tensor, width: int, kind: LossKind, scale: MapScale
) -> Tensor:
    """The specification of `frame_sums` at mask resolution, in differentiable torch."""
    size = (packed_NHB.shape[1], width)

    def of_pixels(log_map_NYX: Tensor, packed_NHB: Tensor) -> Tensor:
        mask_NYX = unpack_masks(packed_NHB, width).to(log_map_NYX.dtype)
        return _sums(upsample_log_map(log_map_NYX, size), mask_NYX, kind)

    chunk = max(1, CHUNK_PIXELS["cpu" if log_map_NYX.device.type == "cpu" else "cuda"] // (size[0] * size[1]))
    sums = [
        checkpoint(of_pixels, log_map, packed, use_reentrant=False, preserve_rng_state=False)
        for log_map, packed in zip(scale_frames(log_map_NYX, scale).split(chunk), packed_NHB.split(chunk))
    ]
    return torch.cat(sums)


def scale_frames(log_map_NYX: Tensor, scale: MapScale) -> Tensor:
    """Logarithm of each frame's map scaled to [0, 1] (`minmax`; 0 becomes MIN_PROBABILITY) or to a peak of 1 (`max`);
    gradients flow through both ends."""
    if scale == "none":
        return log_map_NYX
    log_share_NYX = log_map_NYX - log_map_NYX.amax((1, 2), keepdim=True)
    if scale == "max":
        return log_share_NYX
    share_NYX = log_share_NYX.exp()
    low_N11 = share_NYX.amin((1, 2), keepdim=True)
    spread_N11 = 1 - low_N11
    above_NYX = torch.where(spread_N11 > MIN_SPREAD, share_NYX - low_N11, 0.0)
    return (above_NYX / spread_N11.clamp_min(MIN_SPREAD)).clamp_min(MIN_PROBABILITY).log()


def mask_loss(sums_F3: Tensor, unit_lengths_U: Tensor, unit_weights_U: Tensor, *, kind: LossKind) -> Tensor:
    """Weighted sum of the units' losses, a scalar; sums of a unit's frames stand one behind the other.

    Every unit of `kl`, `dice` and `iou` needs some coverage. Only `kl` may have units of several frames. Raises
    ValueError for an unknown kind. Sources: SWIM Eq. 7 (`bce`); `kl` is the cross-entropy of a soft target less its
    entropy.
    """
    first_F, second_F, third_F = sums_F3.unbind(-1)
    if kind == "kl":
        # first: sum(c log c - c log m), second: log sum(m), third: sum(c); sums of m are added as logarithms.
        top_U = torch.segment_reduce(second_F.detach(), "max", lengths=unit_lengths_U, unsafe=True)
        top_F = top_U.repeat_interleave(unit_lengths_U, output_size=len(second_F))
        mass_U = _per_unit((second_F - top_F).exp(), unit_lengths_U)
        covered_U = _per_unit(third_F, unit_lengths_U)
        loss_U = _per_unit(first_F, unit_lengths_U) / covered_U - covered_U.log() + mass_U.log() + top_U
    elif kind in ("bce", "focal"):
        loss_U = first_F / second_F  # a sum over cells and their number
    elif kind == "dice":
        loss_U = 1 - 2 * first_F / (second_F + third_F)
    elif kind == "iou":
        loss_U = 1 - first_F / (second_F + third_F - first_F)
    else:
        raise _unknown(kind)
    return (loss_U * unit_weights_U.to(loss_U.dtype)).sum()


def _sums(log_map_NYX: Tensor, c_NYX: Tensor, kind: LossKind) -> Tensor:
    if kind == "kl":
        cross_N = (torch.xlogy(c_NYX, c_NYX) - c_NYX * log_map_NYX).sum((1, 2))
        return torch.stack([cross_N, log_map_NYX.logsumexp((1, 2)), c_NYX.sum((1, 2))], -1)
    m_NYX = log_map_NYX.exp()
    if kind in ("dice", "iou"):
        return torch.stack([(m_NYX * c_NYX).sum((1, 2)), m_NYX.sum((1, 2)), c_NYX.sum((1, 2))], -1)
    if kind not in ("bce", "focal"):
        raise _unknown(kind)
    log_complement_NYX = torch.log1p(-m_NYX.clamp_max(1 - MIN_COMPLEMENT))
    inside_NYX, outside_NYX = c_NYX, 1 - c_NYX
    if kind == "focal":
        inside_NYX = inside_NYX * FOCAL_ALPHA * (1 - m_NYX) ** FOCAL_GAMMA
        outside_NYX = outside_NYX * (1 - FOCAL_ALPHA) * m_NYX**FOCAL_GAMMA
    loss_N = -(inside_NYX * log_map_NYX + outside_NYX * log_complement_NYX).sum((1, 2))
    cells_N = torch.full_like(loss_N, math.prod(c_NYX.shape[1:]))
    return torch.stack([loss_N, cells_N, torch.zeros_like(loss_N)], -1)


def _per_unit(values_F: Tensor, unit_lengths_U: Tensor) -> Tensor:
    # segment_reduce rather than index_add: no atomics, so two runs on a GPU are bit-equal.
    # `unsafe` leaves out a check of the lengths that would wait for the GPU.
    return torch.segment_reduce(values_F, "sum", lengths=unit_lengths_U, unsafe=True)


def _unknown(kind: str) -> ValueError:
    return ValueError(f"mask loss is {kind!r}; use 'kl', 'bce', 'dice', 'focal' or 'iou'")


def upsample_log_map(log_map_NYX: Tensor, size: tuple[int, int]) -> Tensor:
    """Logarithm of the bilinearly resized map, (N, *size), as `interpolate(align_corners=False)` resizes."""
    # Relative to each frame's peak, so that maps of any magnitude survive the way through probabilities.
    peak_N11 = log_map_NYX.detach().amax((1, 2), keepdim=True)
    rows = _bilinear(log_map_NYX.shape[1], size[0], log_map_NYX)
    columns = _bilinear(log_map_NYX.shape[2], size[1], log_map_NYX)
    # Two matrix products rather than interpolate, whose backward adds with atomics; never in autocast's bf16.
    with torch.autocast(log_map_NYX.device.type, enabled=False):
        m_NYX = rows @ (log_map_NYX - peak_N11).exp() @ columns.mT
    return m_NYX.clamp_min(MIN_PROBABILITY).log() + peak_N11


def _bilinear(num_in: int, num_out: int, like: Tensor) -> Tensor:
    """Weights (num_out, num_in) of linear interpolation between cell centres, constant beyond the outermost."""
    centre = (torch.arange(num_out, dtype=torch.float64, device=like.device) + 0.5) * (num_in / num_out) - 0.5
    distance = centre.clamp(0, num_in - 1)[:, None] - torch.arange(num_in, dtype=torch.float64, device=like.device)
    return (1 - distance.abs()).clamp_min(0).to(like.dtype)


def unpack_masks(packed_NYB: Tensor, width: int) -> Tensor:
    """Bool masks (N, Y, width) of bits (N, Y, B): rows start on a byte, pixel x is bit x % 8 of byte x // 8."""
    bits = packed_NYB[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed_NYB.device)
    return (bits & 1).flatten(-2)[..., :width].bool()


# The operator. Its second result is what the backward pass needs: the slopes of the first two sums at the log maps. The
# second sum of bce and focal is the number of pixels; the third is the mask's own.


def num_slopes(kind: str) -> int:
    """Number of sums that depend on the map."""
    return 1 if kind in ("bce", "focal") else 2


@torch.library.custom_op("swim::pixel_sums", mutates_args=())
def _pixel_op(log_map_NYX: Tensor, packed_NHB: Tensor, width: int, kind: str, scale: str) -> tuple[Tensor, Tensor]:
    if log_map_NYX.device.type == "cpu" and not INTERPRETED:
        # Autograd is switched off for the thread that runs an operator, beyond what enable_grad switches on.
        with ThreadPoolExecutor(1) as other:
            return other.submit(_reference_slopes, log_map_NYX, packed_NHB, width, kind, scale).result()
    from swim.kernels import mask_loss_triton

    return mask_loss_triton.pixel_sums(log_map_NYX, packed_NHB, width, kind, scale)


def _reference_slopes(
    log_map_NYX: Tensor, packed_NHB: Tensor, width: int, kind: Any, scale: Any
) -> tuple[Tensor, Tensor]:
    log_map_NYX = log_map_NYX.detach().requires_grad_()
    sums_N3 = pixel_sums_reference(log_map_NYX, packed_NHB, width, kind, scale)
    slopes = [
        torch.autograd.grad(sums_N3[:, i].sum(), log_map_NYX, retain_graph=True)[0] for i in range(num_slopes(kind))
    ]
    return sums_N3.detach(), torch.stack(slopes, 1)


@_pixel_op.register_fake
def _(log_map_NYX: Tensor, packed_NHB: Tensor, width: int, kind: str, scale: str) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    frames, rows, columns = log_map_NYX.shape
    return log_map_NYX.new_empty(frames, 3), log_map_NYX.new_empty(frames, num_slopes(kind), rows, columns)


def _save_slopes(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:  # noqa: ARG001
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])


@once_differentiable
def _apply_slopes(ctx: Any, grad_N3: Tensor, _: Any) -> tuple[Any, ...]:
    (slopes_NSYX,) = ctx.saved_tensors
    weights_NS11 = grad_N3[:, : slopes_NSYX.shape[1], None, None]
    return (slopes_NSYX * weights_NS11).sum(1), None, None, None, None


_pixel_op.register_autograd(_apply_slopes, setup_context=_save_slopes)


def unsupported(log_map_NYX: Tensor) -> str | None:
    """Why the Triton kernels cannot take these maps; None if they can."""
    if reason := without_triton(log_map_NYX):
        return reason
    return None if log_map_NYX.dtype == torch.float32 else f"dtype {log_map_NYX.dtype}"
