"""Promise: the mask loss is the formula, unit by unit and noun by noun, and never makes a number that is not finite."""

import math

import pytest
import torch
from torch import Tensor

from swim.kernels.mask_loss import mask_loss

LENGTHS = torch.tensor([6, 1, 12, 4])
WEIGHTS = torch.tensor([0.5, 0.5, 1.0, 2.0])


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps that are distributions over their units, and coverage with zeros, ones and shares."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.cat([torch.randn(int(n), generator=generator).mul(3).softmax(0) for n in LENGTHS])
    coverage = (torch.rand(len(maps), generator=generator) * 3 - 1).clamp(0, 1)
    coverage[torch.cumsum(LENGTHS, 0) - 1] = 0.7  # every unit of kl needs some
    return maps, coverage


def naive(maps: Tensor, coverage: Tensor, kind: str) -> Tensor:
    """Term by term in float64."""
    maps, coverage = maps.double(), coverage.double()
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length, weight in zip(LENGTHS.tolist(), WEIGHTS.tolist()):
        m, c = maps[start : start + length], coverage[start : start + length]
        start += length
        if kind == "kl":
            p, r = c / c.sum(), m / m.sum()
            unit = sum(p[j] * (p[j].log() - r[j].log()) for j in range(length) if p[j] > 0)
        else:
            unit = sum(-(c[j] * m[j].log() + (1 - c[j]) * (1 - m[j]).log()) for j in range(length)) / length
        total = total + weight * unit
    return total


@pytest.mark.parametrize("kind", ["kl", "bce"])
@pytest.mark.parametrize("seed", range(5))
def test_value_and_gradient_equal_the_formula(kind, seed):
    maps, coverage = inputs(seed)
    maps = (0.9 * maps).requires_grad_()  # sums below 1 as in a wider scope, and no exact 1 for bce
    want, got = naive(maps, coverage, kind), mask_loss(maps, coverage, LENGTHS, WEIGHTS, kind=kind)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want.float(), atol=1e-5, rtol=1e-5)
    (want_grad,) = torch.autograd.grad(want, maps)
    (got_grad,) = torch.autograd.grad(got, maps)
    torch.testing.assert_close(got_grad, want_grad.float(), atol=1e-4, rtol=1e-4)


def test_kl_is_zero_at_the_target_alone():
    _, coverage = inputs()
    target = torch.cat([c / c.sum() for c in coverage.split(LENGTHS.tolist())])
    perfect = target.clone().requires_grad_()
    loss = mask_loss(perfect, coverage, LENGTHS, WEIGHTS, kind="kl")
    assert abs(loss.item()) < 1e-6
    for seed in range(20):
        other, _ = inputs(seed)
        for share in (1.0, 1e-2):
            mixed = (1 - share) * target + share * other
            single = [torch.tensor([float(i == unit) for i in range(4)]) for unit in (0, 2, 3)]  # unit 1 is one cell
            losses = [mask_loss(mixed, coverage, LENGTHS, weights, kind="kl").item() for weights in single]
            assert min(losses) > 0, "kl is positive away from the target"


def test_kl_renormalises_the_map_over_its_unit():
    """In clip scope the unit is the annotated steps alone: mass on the others costs nothing."""
    maps, coverage = inputs()
    scale = torch.tensor([0.5, 1e-3, 0.9, 3.0]).repeat_interleave(LENGTHS)
    losses = [mask_loss(m, coverage, LENGTHS, WEIGHTS, kind="kl") for m in (maps, scale * maps)]
    torch.testing.assert_close(*losses)


def test_units_weigh_what_their_noun_gives_them():
    maps, coverage = inputs()
    parts = [
        weight * mask_loss(m, c, torch.tensor([len(m)]), torch.ones(1), kind="kl")
        for m, c, weight in zip(maps.split(LENGTHS.tolist()), coverage.split(LENGTHS.tolist()), WEIGHTS)
    ]
    torch.testing.assert_close(mask_loss(maps, coverage, LENGTHS, WEIGHTS, kind="kl"), sum(parts))


@pytest.mark.parametrize("kind", ["kl", "bce"])
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1 - 6e-8, 1.0])
@pytest.mark.parametrize("covered", [0.0, 1e-7, 1.0])
def test_extreme_probabilities_are_finite_and_so_are_their_gradients(kind, value, covered):
    maps = torch.tensor([value, 1 - value, 0.0, 0.0], requires_grad=True)
    coverage = torch.tensor([covered, 1.0, 0.0, 1.0])
    loss = mask_loss(maps, coverage, torch.tensor([4]), torch.ones(1), kind=kind)
    (grad,) = torch.autograd.grad(loss, maps)
    assert math.isfinite(loss.item())
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_half_precision_maps_are_judged_in_fp32(kind):
    maps, coverage = inputs()
    rounded = (0.9 * maps).bfloat16().requires_grad_()
    loss = mask_loss(rounded, coverage, LENGTHS, WEIGHTS, kind=kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive(rounded, coverage, kind).float())


def test_no_units_cost_nothing():
    empty = torch.zeros(0, requires_grad=True)
    loss = mask_loss(empty, torch.zeros(0), torch.zeros(0, dtype=torch.int64), torch.zeros(0), kind="bce")
    assert loss.item() == 0


def test_an_unknown_kind_is_named():
    maps, coverage = inputs()
    with pytest.raises(ValueError, match=r"mask loss is 'dice'; use 'kl' or 'bce'"):
        mask_loss(maps, coverage, LENGTHS, WEIGHTS, kind="dice")  # type: ignore[arg-type]
