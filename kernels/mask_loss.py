"""Mask loss on the token grid: how far a noun's attention map is from the share of each cell that its object covers.

A *unit* u is one softmax of one noun: a temporal step in frame scope, all annotated steps of the clip in clip scope.
With map m, coverage c in [0, 1] and cells j of the unit:

    kl    p_j = c_j / sum(c),  m'_j = m_j / sum(m):   KL(p || m') = sum_j p_j (log p_j - log m'_j)
    bce   mean_j  -( c_j log m_j + (1 - c_j) log(1 - m_j) )                                             (SWIM Eq. 7)

The result is sum_u weight_u * loss_u; with weights 1 / (units of the noun) it is the sum over nouns of their mean loss.
`kl` renormalises the map over the unit, so steps without annotation carry no loss in any scope.

Shape suffixes: Y supervised cells, all units one behind the other; U units.
"""

from typing import Literal

import torch
from torch import Tensor

LossKind = Literal["kl", "bce"]

# Keeps logs finite. Far below any probability that a cell can lose its gradient at: d log m / d logit is 1 down to
# here.
MIN_PROBABILITY = 1e-30


def mask_loss(
    map_Y: Tensor, coverage_Y: Tensor, unit_lengths_U: Tensor, unit_weights_U: Tensor, *, kind: LossKind
) -> Tensor:
    """Weighted sum of the units' losses, fp32 scalar, differentiable in the map; every unit of `kl` needs some
    coverage.

    Raises ValueError for an unknown kind. Sources: SWIM Eq. 7 (`bce`); `kl` is the cross-entropy of a soft target less
    its entropy.
    """
    map_Y, coverage_Y = map_Y.float(), coverage_Y.float()
    if kind == "kl":
        target_Y = coverage_Y / _sums_per_cell(coverage_Y, unit_lengths_U)
        log_map_Y = (map_Y / _sums_per_cell(map_Y, unit_lengths_U)).clamp_min(MIN_PROBABILITY).log()
        cell_loss_Y = torch.xlogy(target_Y, target_Y) - target_Y * log_map_Y
    elif kind == "bce":
        # Clamped in fp32: a map value of exactly 0 or 1 would give an infinite log (and, in bf16, a dead gradient).
        m_Y = map_Y.clamp(MIN_PROBABILITY, 1 - 1e-6)
        cell_loss_Y = -(coverage_Y * m_Y.log() + (1 - coverage_Y) * torch.log1p(-m_Y))
        cell_loss_Y = cell_loss_Y / unit_lengths_U.to(m_Y.dtype).repeat_interleave(unit_lengths_U)
    else:
        raise ValueError(f"mask loss is {kind!r}; use 'kl' or 'bce'")
    return (cell_loss_Y * unit_weights_U.float().repeat_interleave(unit_lengths_U)).sum()


def _sums_per_cell(values_Y: Tensor, unit_lengths_U: Tensor) -> Tensor:
    # segment_reduce rather than index_add: no atomics, so two runs on a GPU are bit-equal.
    sums_U = torch.segment_reduce(values_Y, "sum", lengths=unit_lengths_U)
    return sums_U.clamp_min(MIN_PROBABILITY).repeat_interleave(unit_lengths_U)
