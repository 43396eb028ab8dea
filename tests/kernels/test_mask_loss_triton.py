"""Promise: the Triton kernels of the mask loss compute what the reference computes, sums and slopes, for any map, mask
size, loss and scale, twice alike; and the operator behaves as torch's own under compile and checkpointing.

In the interpreter on a CPU (`test_interpreted_*`, see interpreter.py), and on a device where there is one.
"""

import itertools
from typing import get_args

import numpy as np
import pytest
import torch
from interpreter import interpreted, needs_triton, not_interpreted, run_interpreted
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from swim.kernels import backend as backends
from swim.kernels import mask_loss as module
from swim.kernels.mask_loss import LossKind, MapScale, frame_sums

KINDS, SCALES = get_args(LossKind), get_args(MapScale)


def bits(mask: Tensor, *, stray: int = 0) -> Tensor:
    """Masks as bits; `stray` is set in what is left of each row's last byte."""
    packed = torch.from_numpy(np.packbits(mask.cpu().numpy(), axis=-1, bitorder="little"))
    used = mask.shape[-1] % 8
    packed[..., -1] |= (stray << used) & 255 if used else 0
    return packed.to(mask.device)


def inputs(grid: tuple[int, int], size: tuple[int, int], frames: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Log maps of very different sums, and masks (with something in each) from sparse to full."""
    generator = torch.Generator().manual_seed(seed)
    log_map = 3 * torch.randn(frames, *grid, generator=generator)
    log_map -= log_map.logsumexp((1, 2), keepdim=True)
    log_map -= torch.tensor([0.0, 5.0, 40.0]).repeat(frames)[:frames, None, None]
    mask = torch.rand(frames, *size, generator=generator) < torch.rand(frames, 1, 1, generator=generator)
    mask[:, 0, 0] = True
    return log_map, mask


def sums_and_slopes(log_map: Tensor, packed: Tensor, width: int, kind, scale, backend) -> tuple[Tensor, Tensor]:
    log_map = log_map.detach().requires_grad_()
    sums = frame_sums(log_map, packed, kind=kind, size=(packed.shape[1], width), scale=scale, backend=backend)
    of_sums = [torch.autograd.grad(sums[:, i].sum(), log_map, retain_graph=True)[0] for i in range(3)]
    return sums.detach(), torch.stack(of_sums, 1)


def assert_equals_oracle(log_map: Tensor, mask: Tensor, kind: str, scale: str) -> tuple[Tensor, Tensor]:
    """Triton against the reference in float64: every sum, and the slopes of each in each frame, by relative error."""
    packed, width = bits(mask, stray=255), mask.shape[-1]
    got = sums_and_slopes(log_map, packed, width, kind, scale, "triton")
    want = sums_and_slopes(log_map.double(), packed, width, kind, scale, "torch")
    assert got[0].dtype == got[1].dtype == torch.float32
    torch.testing.assert_close(got[0].double(), want[0], rtol=1e-6, atol=1e-6)
    error, norm = (x.flatten(2).norm(dim=2) for x in (got[1].double() - want[1], want[1]))
    floor = 1e-4 if scale != "none" else 0.0  # one cell alone has no slope at all
    assert (error <= 1e-5 * norm.clamp_min(floor)).all(), (kind, scale, error, norm)
    return got


@needs_triton
@not_interpreted
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


@interpreted
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_interpreted_every_loss_and_scale(kind, scale):
    """Twice alike, and every element written: new tensors are filled with NaN."""
    log_map, mask = inputs((4, 5), (30, 43))
    torch.use_deterministic_algorithms(True)
    got = assert_equals_oracle(log_map, mask, kind, scale)
    assert torch.empty(3).isnan().all()
    torch.use_deterministic_algorithms(False)
    again = sums_and_slopes(log_map, bits(mask), 43, kind, scale, "triton")
    assert all(torch.equal(x, y) for x, y in zip(got, again)), "bits beyond a row's end count for nothing"


SIZES = [
    ((1, 1), (5, 9)),
    ((1, 6), (7, 6)),
    ((6, 5), (6, 5)),
    ((5, 7), (3, 2)),  # the mask has fewer pixels than the map has cells
    ((5, 7), (1, 1)),
    ((3, 4), (16, 200)),  # patches of 50 pixels
    ((2, 40), (9, 2100)),  # more patches than a program takes
    ((36, 33), (40, 40)),  # more cells than a block of them
]


@interpreted
@pytest.mark.parametrize("number", range(len(SIZES)))
def test_interpreted_sizes(number):
    grid, size = SIZES[number]
    kind, scale = (("bce", "none"), ("iou", "minmax"), ("kl", "max"))[number % 3]
    assert_equals_oracle(*inputs(grid, size, seed=1), kind, scale)


@interpreted
@pytest.mark.parametrize("seed", range(10))
def test_interpreted_drawn_sizes(seed):
    random = np.random.default_rng(seed)
    grid, size = random.integers(1, 9, 2), random.integers(1, 60, 2)
    kind, scale = KINDS[seed % len(KINDS)], SCALES[int(random.integers(3))]
    assert_equals_oracle(*inputs(tuple(grid), tuple(size), int(random.integers(1, 4)), seed), kind, scale)


@interpreted
@pytest.mark.parametrize(("kind", "scale"), itertools.product(["bce", "dice"], SCALES))
def test_interpreted_ties_flat_maps_and_vanishing_cells(kind, scale):
    """Cells that share the peak or the smallest value share its slope; a flat map under min-max has none."""
    log_map = torch.tensor([[0.0, -1, -1, 0], [-2, -2, 0, -1], [-1, 0, -2, -1]])
    log_map = torch.stack([log_map, torch.full_like(log_map, -3.0), torch.where(log_map < -1, -200.0, log_map) - 1])
    mask = torch.rand(3, 11, 13, generator=torch.Generator().manual_seed(0)) < 0.5
    got = assert_equals_oracle(log_map, mask, kind, scale)
    assert scale != "minmax" or not got[1][1].any()


@interpreted
def test_interpreted_masks_of_nothing_and_of_everything():
    log_map, mask = inputs((3, 4), (20, 21), frames=2)
    mask[0], mask[1] = False, True
    for kind in ("bce", "focal", "dice"):
        assert_equals_oracle(log_map, mask, kind, "none")


@interpreted
def test_interpreted_no_frames_strides_and_half_precision():
    empty = frame_sums(torch.zeros(0, 3, 4), torch.zeros(0, 8, 1, dtype=torch.uint8), kind="bce", size=(8, 8),
                       backend="triton")  # fmt: skip
    assert empty.shape == (0, 3)
    log_map, mask = inputs((4, 3), (10, 20))
    want = frame_sums(log_map, bits(mask), kind="bce", size=(10, 20), backend="triton")
    strided = torch.zeros(3, 3, 8).mT[:, ::2].copy_(log_map)
    wide = torch.cat([bits(mask), bits(mask)], -1)[..., :3]
    assert torch.equal(frame_sums(strided, wide, kind="bce", size=(10, 20), backend="triton"), want)
    half = frame_sums(log_map.bfloat16(), bits(mask), kind="bce", size=(10, 20), backend="triton")
    same = frame_sums(log_map.bfloat16().float(), bits(mask), kind="bce", size=(10, 20), backend="triton")
    assert torch.equal(half, same)


@interpreted
@pytest.mark.parametrize("scale", ["none", "max"])
@pytest.mark.parametrize("kind", ["kl", "bce", "focal"])
def test_interpreted_no_slope_below_the_least_probability(kind, scale):
    """Pixels among cells of 1e-33 of the peak count as 1e-30, and pull at nothing."""
    log_map, mask = torch.full((1, 6, 6), -75.0), torch.ones(1, 40, 40, dtype=torch.bool)
    log_map[0, 0, 0] = 0
    assert_equals_oracle(log_map, mask, kind, scale)


@interpreted
def test_interpreted_a_diffuse_map_has_an_exact_loss():
    """fp32 knows 1 - m of a uniform map to 2e-5 of m, the same for every pixel."""
    log_map, mask = torch.full((1, 4, 4), -7.2), torch.zeros(1, 30, 30, dtype=torch.bool)
    sums = frame_sums(log_map, bits(mask), kind="bce", size=(30, 30), backend="triton")
    exact = -900 * torch.log1p(-log_map[0, 0, 0].double().exp())
    assert sums[0, 0].item() == pytest.approx(exact.item(), rel=1e-6)


def assert_nan_stays(kind: str, scale: str, device: str) -> None:
    log_map, mask = (x.to(device) for x in inputs((3, 3), (6, 7), frames=2))
    log_map[0, 1, 1] = torch.nan
    for inside, backend in itertools.product((True, False), ("triton", "torch")):
        mask[0] = inside
        mask[0, 0, 0] = True  # every mask has something
        sums, slopes = sums_and_slopes(log_map, bits(mask), 7, kind, scale, backend)
        assert sums[0, :2].isnan().any(), backend
        assert slopes[0].isnan().any(), backend
        assert torch.isfinite(sums[1]).all()
        assert torch.isfinite(slopes[1]).all()


@interpreted
@pytest.mark.parametrize(("kind", "scale"), zip(KINDS, itertools.cycle(SCALES)))
def test_interpreted_what_is_not_a_number_stays_none(kind, scale):
    """A step that has gone wrong must be seen: nothing hides a NaN."""
    assert_nan_stays(kind, scale, "cpu")


# The operator, with the reference on a CPU in the kernels' place.


@pytest.fixture
def operator(monkeypatch):
    """`frame_sums` through the operator."""
    monkeypatch.setattr(module, "unsupported", lambda *_: None)
    return lambda log_map, packed, kind, scale: frame_sums(
        log_map, packed, kind=kind, size=(10, 13), scale=scale, backend="triton"
    )


@pytest.mark.parametrize(("kind", "scale"), itertools.product(KINDS, SCALES))
def test_the_operator_equals_the_reference(operator, kind, scale):
    log_map, mask = inputs((3, 4), (10, 13))
    packed, probe = bits(mask), torch.randn(3, 3, dtype=torch.float64)
    log_map = log_map.double().requires_grad_()
    got = operator(log_map, packed, kind, scale)
    want = frame_sums(log_map, packed, kind=kind, size=(10, 13), scale=scale, backend="torch")
    assert torch.equal(got, want)
    for x, y in zip(*(torch.autograd.grad((sums * probe).sum(), log_map) for sums in (got, want))):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_opcheck(kind):
    log_map, mask = inputs((3, 4), (10, 13))
    arguments = (log_map.requires_grad_(), bits(mask), 13, kind, "max")
    torch.library.opcheck(torch.ops.swim.pixel_sums.default, arguments)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", SCALES)
def test_gradcheck_of_the_reference(kind, scale):
    log_map, mask = inputs((3, 4), (10, 13))
    log_map = log_map[:2].double()
    sums = lambda x: frame_sums(x, bits(mask[:2]), kind=kind, size=(10, 13), scale=scale, backend="torch")  # noqa: E731
    assert torch.autograd.gradcheck(sums, log_map.requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-5)


def test_compiles_as_one_graph_and_survives_checkpointing(operator):
    log_map, mask = inputs((3, 4), (10, 13))
    packed, log_map = bits(mask), log_map.requires_grad_()

    def loss(log_map: Tensor) -> Tensor:
        return operator(2 * log_map, packed, "dice", "minmax").square().sum()

    (want,) = torch.autograd.grad(loss(log_map), log_map)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    for run in (compiled, lambda x: checkpoint(loss, x, use_reentrant=False)):
        torch.testing.assert_close(torch.autograd.grad(run(log_map), log_map)[0], want)


def test_only_the_slopes_are_kept_for_the_backward_pass(operator):
    log_map, mask = inputs((3, 4), (10, 13))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        operator(log_map.requires_grad_(), bits(mask), "bce", "max")
    assert [tuple(x.shape) for x in kept] == [(3, 1, 3, 4)]


def test_there_is_no_second_derivative(operator):
    """It would leave out that slopes depend on the map."""
    log_map, mask = inputs((3, 4), (10, 13))
    sums = operator(log_map.requires_grad_(), bits(mask), "dice", "none")
    (slopes,) = torch.autograd.grad(sums.square().sum(), log_map, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        slopes.sum().backward()


def test_what_does_not_fit_is_named(monkeypatch, caplog):
    log_map, mask = inputs((3, 4), (10, 13))
    packed = bits(mask)
    for wrong in (packed[:2], packed[..., :1], packed[:, :9], packed.int()):
        with pytest.raises(ValueError, match=r"masks of \(10, 13\) pixels are uint8 \(3, 10, 2\), got "):
            frame_sums(log_map, wrong, kind="bce", size=(10, 13))
    with pytest.raises(ValueError, match="mask loss is 'bse'"):
        frame_sums(log_map, packed, kind="bse", size=(10, 13))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="frame_sums backend is 'cuda'; use one of auto, triton, torch"):
        frame_sums(log_map, packed, kind="bce", size=(10, 13), backend="cuda")  # type: ignore[arg-type]
    monkeypatch.setattr(backends, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"frame_sums has no Triton kernel for .*; use backend 'auto' or 'torch'"):
        frame_sums(log_map, packed, kind="bce", size=(10, 13), backend="triton")
    frame_sums(log_map, packed, kind="bce", size=(10, 13))
    assert not caplog.messages, "torch is the natural choice on a CPU"
    monkeypatch.setattr(backends, "INTERPRETED", True)
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    with pytest.raises(ValueError, match=r"for dtype torch\.float64"):
        frame_sums(log_map.double(), packed, kind="bce", size=(10, 13), backend="triton")


# On a device.


@pytest.mark.gpu
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("kind", KINDS)
def test_on_a_device_equals_the_oracle_ten_times_alike(kind, scale):
    log_map, mask = (x.cuda() for x in inputs((17, 31), (480, 854), frames=5))
    got = assert_equals_oracle(log_map, mask, kind, scale)
    for _ in range(10):
        again = sums_and_slopes(log_map, bits(mask), 854, kind, scale, "triton")
        assert all(torch.equal(x, y) for x, y in zip(got, again))


@pytest.mark.gpu
@pytest.mark.parametrize(("grid", "size"), SIZES, ids=str)
def test_on_a_device_sizes(grid, size):
    for kind, scale in (("bce", "none"), ("iou", "minmax"), ("kl", "max")):
        assert_equals_oracle(*(x.cuda() for x in inputs(grid, size, seed=1)), kind, scale)


@pytest.mark.gpu
@pytest.mark.parametrize(("kind", "scale"), itertools.product(KINDS, SCALES))
def test_on_a_device_what_is_not_a_number_stays_none(kind, scale):
    assert_nan_stays(kind, scale, "cuda")


@pytest.mark.gpu
def test_on_a_device_nothing_of_the_masks_size_is_made():
    log_map, mask = (x.cuda() for x in inputs((17, 31), (480, 854), frames=40))
    packed = bits(mask)
    log_map.requires_grad_()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    frame_sums(log_map, packed, kind="bce", size=(480, 854), backend="triton").sum().backward()
    assert torch.cuda.max_memory_allocated() - before < mask.numel() / 4  # a sixteenth of one fp32 tensor of that size
