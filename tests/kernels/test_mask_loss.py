"""Promise: the mask loss is the formula, unit by unit, on the grid and at mask resolution, and never makes a number
that is not finite."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swim.kernels import mask_loss as module
from swim.kernels.mask_loss import LossKind, frame_sums, mask_loss, unpack_masks, upsample_log_map

KINDS = get_args(LossKind)
LENGTHS = [6, 1, 12, 4]
WEIGHTS = torch.tensor([0.5, 0.5, 1.0, 2.0])


def inputs(seed: int = 0) -> tuple[Tensor, Tensor]:
    """Maps that are distributions over their units, and coverage with zeros, ones and shares."""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.cat([torch.randn(n, generator=generator).mul(3).softmax(0) for n in LENGTHS])
    coverage = (torch.rand(len(maps), generator=generator) * 3 - 1).clamp(0, 1)
    coverage[torch.tensor(LENGTHS).cumsum(0) - 1] = 0.7  # every unit of kl needs some
    return maps, coverage


def loss_of(maps: Tensor, coverage: Tensor, kind: LossKind, lengths=LENGTHS, weights=WEIGHTS) -> Tensor:
    """Every unit is one frame, as long as it is wide."""
    log_maps = maps.clamp_min(1e-30).log()
    frames = zip(log_maps.split(lengths), coverage.split(lengths))
    sums = [frame_sums(log_map[None, None], c[None, None], kind=kind) for log_map, c in frames]
    return mask_loss(torch.cat(sums), torch.ones(len(sums), dtype=torch.int64), weights, kind=kind)


def naive(maps: Tensor, coverage: Tensor, kind: str) -> Tensor:
    """Cell by cell in float64."""
    maps, coverage = maps.double(), coverage.double()
    total, start = torch.zeros((), dtype=torch.float64), 0
    for length, weight in zip(LENGTHS, WEIGHTS.tolist()):
        m, c = maps[start : start + length], coverage[start : start + length]
        start += length
        if kind == "kl":
            p, r = c / c.sum(), m / m.sum()
            unit = sum(p[j] * (p[j].log() - r[j].log()) for j in range(length) if p[j] > 0)
        elif kind == "bce":
            unit = sum(-(c[j] * m[j].log() + (1 - c[j]) * (1 - m[j]).log()) for j in range(length)) / length
        elif kind == "focal":
            cells = [
                c[j] * 0.25 * (1 - m[j]) ** 2 * -m[j].log() + (1 - c[j]) * 0.75 * m[j] ** 2 * -(1 - m[j]).log()
                for j in range(length)
            ]
            unit = sum(cells) / length
        else:
            both = sum(m[j] * c[j] for j in range(length))
            either = sum(m[j] + c[j] for j in range(length))
            unit = 1 - 2 * both / either if kind == "dice" else 1 - both / (either - both)
        total = total + weight * unit
    return total


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_equal_the_formula(kind, seed, dtype):
    maps, coverage = inputs(seed)
    maps = (0.9 * maps).to(dtype).requires_grad_()  # sums below 1 as in a wider scope, and no exact 1 for bce
    want, got = naive(maps, coverage, kind), loss_of(maps, coverage, kind)
    assert got.dtype == dtype, "float64 is for tests of the whole objective"
    tolerance = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    torch.testing.assert_close(got, want.to(dtype), **tolerance)
    (want_grad,) = torch.autograd.grad(want, maps)
    (got_grad,) = torch.autograd.grad(got, maps)
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 1e-10, "rtol": 1e-10}
    torch.testing.assert_close(got_grad, want_grad.to(dtype), **tolerance)


@pytest.mark.parametrize("kind", ["bce", "dice", "iou"])
def test_an_ideal_map_costs_nothing(kind):
    mask = torch.tensor([1.0, 1, 0, 0, 0, 1])
    assert abs(loss_of(mask, mask, kind, [6], torch.ones(1)).item()) < 1e-5
    assert loss_of(1 - mask, mask, kind, [6], torch.ones(1)).item() > 0.99


def test_focal_looks_away_from_what_is_already_right():
    """Against bce, a cell that is nearly right counts less the closer it is (arXiv 1708.02002)."""
    mask = torch.tensor([1.0])
    ratios = [
        (loss_of(torch.tensor([m]), mask, "focal", [1], torch.ones(1))
         / loss_of(torch.tensor([m]), mask, "bce", [1], torch.ones(1))).item()
        for m in (0.1, 0.5, 0.9)
    ]  # fmt: skip
    assert ratios == pytest.approx([0.25 * 0.81, 0.25 * 0.25, 0.25 * 0.01], rel=1e-3)


def test_kl_is_zero_at_the_target_alone():
    _, coverage = inputs()
    target = torch.cat([c / c.sum() for c in coverage.split(LENGTHS)])
    perfect = target.clone().requires_grad_()
    loss = loss_of(perfect, coverage, "kl")
    assert abs(loss.item()) < 1e-5
    for seed in range(20):
        other, _ = inputs(seed)
        for share in (1.0, 1e-2):
            mixed = ((1 - share) * target + share * other).double()  # in float64: the smallest kl is about 1e-6
            single = [torch.tensor([float(i == unit) for i in range(4)]) for unit in (0, 2, 3)]  # unit 1 is one cell
            losses = [loss_of(mixed, coverage, "kl", weights=weights).item() for weights in single]
            assert min(losses) > 0, "kl is positive away from the target"


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_descent_on_logits_finds_the_object(kind):
    """The formulas have the right sign: from a flat map the mass moves onto the mask, whichever the loss."""
    mask = torch.tensor([0.0, 1, 1, 0, 0, 0])
    logits = torch.zeros(6, requires_grad=True)
    for _ in range(300):
        (grad,) = torch.autograd.grad(loss_of(logits.softmax(0), mask, kind, [6], torch.ones(1)), logits)
        with torch.no_grad():
            logits -= grad
    assert logits.softmax(0)[1:3].sum() > 0.85


def test_kl_renormalises_the_map_over_its_unit():
    """In wide scopes the unit is the annotated steps alone: mass on the others costs nothing."""
    maps, coverage = inputs()
    scale = torch.tensor([0.5, 1e-3, 0.9, 3.0]).repeat_interleave(torch.tensor(LENGTHS))
    losses = [loss_of(m, coverage, "kl") for m in (maps, scale * maps)]
    torch.testing.assert_close(*losses)


def test_a_unit_of_several_frames_is_judged_as_one():
    """kl over frames of different sizes and magnitudes equals kl over all their cells in one frame."""
    maps, coverage = inputs()
    maps = maps * torch.tensor([1e-20, 1.0, 1e-3, 1e-9]).repeat_interleave(torch.tensor(LENGTHS))
    coverage = coverage.clone()
    coverage[6:7] = 0  # an absent frame is a zero target among the others
    together = loss_of(maps, coverage, "kl", [23], torch.ones(1))
    frames = zip(maps.log().split(LENGTHS), coverage.split(LENGTHS))
    sums = torch.cat([frame_sums(log_map[None, None], c[None, None], kind="kl") for log_map, c in frames])
    torch.testing.assert_close(mask_loss(sums, torch.tensor([4]), torch.ones(1), kind="kl"), together)
    # Two units: each renormalises over its own frames.
    halves = loss_of(maps, coverage, "kl", [7, 16], torch.tensor([1.0, 2.0]))
    two = mask_loss(sums, torch.tensor([2, 2]), torch.tensor([1.0, 2.0]), kind="kl")
    torch.testing.assert_close(two, halves)


@pytest.mark.parametrize("kind", KINDS)
def test_units_weigh_what_their_noun_gives_them(kind):
    maps, coverage = inputs()
    parts = [
        weight * loss_of(m, c, kind, [len(m)], torch.ones(1))
        for m, c, weight in zip(maps.split(LENGTHS), coverage.split(LENGTHS), WEIGHTS)
    ]
    torch.testing.assert_close(loss_of(maps, coverage, kind), sum(parts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 1 - 6e-8, 1.0])
@pytest.mark.parametrize("covered", [0.0, 1e-7, 1.0])
def test_extreme_probabilities_are_finite_and_so_are_their_gradients(kind, value, covered):
    maps = torch.tensor([value, 1 - value, 0.0, 0.0], requires_grad=True)
    coverage = torch.tensor([covered, 1.0, 0.0, 1.0])
    loss = loss_of(maps, coverage, kind, [4], torch.ones(1))
    (grad,) = torch.autograd.grad(loss, maps)
    assert math.isfinite(loss.item())
    assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_maps_are_judged_in_fp32(kind):
    maps, coverage = inputs()
    rounded = (0.9 * maps).log().bfloat16()
    sums = [
        frame_sums(log_map[None, None], c[None, None], kind=kind)
        for log_map, c in zip(rounded.split(LENGTHS), coverage.split(LENGTHS))
    ]
    loss = mask_loss(torch.cat(sums), torch.ones(4, dtype=torch.int64), WEIGHTS, kind=kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, naive(rounded.double().exp(), coverage, kind).float(), atol=1e-5, rtol=1e-5)


def test_an_unknown_kind_is_named():
    maps, coverage = inputs()
    with pytest.raises(ValueError, match=r"mask loss is 'miou'; use 'kl', 'bce', 'dice', 'focal' or 'iou'"):
        loss_of(maps, coverage, "miou")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask loss is 'miou'"):
        mask_loss(torch.ones(1, 3), torch.ones(1, dtype=torch.int64), torch.ones(1), kind="miou")  # type: ignore[arg-type]


# ---- mask resolution


def packed(masks: np.ndarray) -> Tensor:
    return torch.from_numpy(np.packbits(masks, axis=-1, bitorder="little"))


@pytest.mark.parametrize("width", [1, 7, 8, 9, 16, 31])
def test_masks_survive_the_way_through_bits(width):
    masks = np.random.default_rng(width).random((3, 5, width)) > 0.5
    bits = packed(masks)
    assert bits.shape == (3, 5, -(-width // 8))
    assert unpack_masks(bits, width).tolist() == masks.tolist()


@pytest.mark.parametrize("size", [(5, 7), (40, 56), (33, 20), (3, 4), (1, 1), (64, 7)])
def test_the_map_is_upsampled_as_interpolate_does(size):
    log_map = torch.randn(2, 5, 7, dtype=torch.float64, requires_grad=True)
    got = upsample_log_map(log_map, size).exp()
    want = nn.functional.interpolate(log_map.exp()[:, None], size=size, mode="bilinear", align_corners=False)[:, 0]
    torch.testing.assert_close(got, want)
    probe = torch.randn_like(want)
    grads = [torch.autograd.grad((x * probe).sum(), log_map)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


def test_upsampling_knows_no_smallest_map():
    log_map = torch.randn(1, 4, 4)
    torch.testing.assert_close(upsample_log_map(log_map - 400, (9, 9)), upsample_log_map(log_map, (9, 9)) - 400)


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_are_judged_like_cells_of_the_upsampled_map(kind, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    log_map = torch.randn(5, 12, generator=generator).log_softmax(-1).view(5, 3, 4).requires_grad_()
    masks = np.random.default_rng(0).random((5, 10, 13)) > 0.5
    want = frame_sums(upsample_log_map(log_map, (10, 13)), torch.from_numpy(masks).float(), kind=kind)
    monkeypatch.setitem(module.CHUNK_PIXELS, "cpu", 2 * 130)  # chunks of 2, 2 and 1 frames
    got = frame_sums(log_map, packed(masks), kind=kind, size=(10, 13))
    torch.testing.assert_close(got, want)
    probe = torch.randn(got.shape, generator=generator)
    grads = [torch.autograd.grad((x * probe).sum(), log_map)[0] for x in (got, want)]
    torch.testing.assert_close(*grads)


def test_upsampling_stays_in_fp32_under_autocast():
    log_map = torch.randn(1, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = upsample_log_map(log_map, (20, 20))
    assert torch.equal(got, upsample_log_map(log_map, (20, 20)))
