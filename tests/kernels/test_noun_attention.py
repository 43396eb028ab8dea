"""Promise: maps and gradients are those of the formula, row by row and head by head, for any rows and keys."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from swim.kernels.noun_attention import ClipKeys, Row, WorkTable, build_work_table, noun_attention

SCALE = 0.3
LENGTH = 60
# Two clips in batch row 1 (one of a single key), one in row 0, and one in row 2 that no row looks at.
CLIPS = [ClipKeys(1, 5, (3, 2, 4)), ClipKeys(1, 40, (1, 1, 1)), ClipKeys(2, 2, (2, 2, 2)), ClipKeys(0, 7, (4, 3, 2))]
ROWS = [Row(*row) for row in [(0, 58), (0, 30), (0, 30), (1, 59), (3, 50), (3, 35), (3, 3)]]
# Softmax ranges for the wider scopes: one or two, with visual keys inside, outside and between them.
RANGES = [
    ((3, 59),),
    ((0, 20), (28, 31)),
    ((5, 29), (30, 31)),
    ((40, 60),),
    ((0, 51),),
    ((8, 9), (12, 36)),
    ((0, 30), (40, 60)),
]
WIDE = [row._replace(ranges=ranges) for row, ranges in zip(ROWS, RANGES)]


def scattered(clip: ClipKeys) -> ClipKeys:
    """The same clip with its keys anywhere in the sequence, out of order."""
    num_keys = clip.grid[0] * clip.grid[1] * clip.grid[2]
    places = torch.randperm(LENGTH, generator=torch.Generator().manual_seed(num_keys))[:num_keys]
    return clip._replace(positions=places.tolist())


def inputs(groups: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    kv_heads, dim = 2, 16
    q = 2 * torch.randn(3, kv_heads * groups, LENGTH, dim, generator=generator)
    k = 2 * torch.randn(3, kv_heads, LENGTH, dim, generator=generator)
    return q.to(dtype), k.to(dtype)


def naive(q: Tensor, k: Tensor, rows: Sequence[tuple[int, int]], clips: Sequence[ClipKeys], scope: str) -> list[Tensor]:
    """The formula as it is written, in float64: for each row, segment and head one softmax."""
    q, k = q.double(), k.double()
    group = q.shape[1] // k.shape[1]
    maps = []
    for number, position, ranges in rows:
        clip = clips[number]
        steps, height, width = clip.grid
        size = height * width
        places = clip.positions if clip.positions is not None else range(clip.start, clip.start + steps * size)
        segments = (
            [list(places)[t * size : (t + 1) * size] for t in range(steps)] if scope == "frame" else [list(places)]
        )
        if scope in ("causal", "full"):
            segments = [[j for lo, hi in ranges for j in range(lo, hi)]]
        weight = {j: torch.zeros((), dtype=torch.float64) for j in places}  # 0 where the softmax does not reach
        for segment in segments:
            total = 0
            for head in range(q.shape[1]):
                scores = [
                    SCALE * (q[clip.batch, head, position] * k[clip.batch, head // group, j]).sum() for j in segment
                ]
                total = total + torch.stack(scores).softmax(0)
            weight |= {j: value / q.shape[1] for j, value in zip(segment, total)}
        maps.append(torch.stack([weight[j] for j in places]))
    return maps


@pytest.mark.parametrize("keys", ["contiguous", "scattered", "mixed"])
@pytest.mark.parametrize("scope", ["frame", "clip", "causal", "full"])
@pytest.mark.parametrize(
    ("groups", "dtype"), [(1, torch.float32), (2, torch.float32), (7, torch.float32), (2, torch.float64)]
)
def test_maps_and_gradients_equal_the_formula(groups, dtype, scope, keys):
    moved = {"contiguous": [], "scattered": [0, 1, 2, 3], "mixed": [0]}[keys]
    clips = [scattered(clip) if i in moved else clip for i, clip in enumerate(CLIPS)]
    table = build_work_table(WIDE, clips, scope)
    q, k = (x.requires_grad_() for x in inputs(groups, dtype))
    want = naive(q, k, WIDE, clips, scope)
    got = noun_attention(q, k, table, scale=SCALE)
    assert got.dtype == dtype
    tolerance = {"atol": 1e-6, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 1e-12, "rtol": 1e-12}
    assert table.map_sizes == [len(row) for row in want]
    want = torch.cat(want)
    torch.testing.assert_close(got, want.to(dtype), **tolerance)
    # Weights that differ from cell to cell: the gradient of a softmax's plain sum is zero.
    weights = torch.randn(len(got), generator=torch.Generator().manual_seed(1))
    want_grads = torch.autograd.grad((want * weights).sum(), (q, k))
    got_grads = torch.autograd.grad((got * weights).sum(), (q, k))
    for got_grad, want_grad in zip(got_grads, want_grads):
        assert want_grad.abs().max() > 1e-2
        tolerance["atol"] = max(tolerance["atol"], 1e-5) if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(got_grad, want_grad.to(dtype), **tolerance)


@pytest.mark.parametrize("scope", ["frame", "clip", "causal", "full"])
def test_gradients_equal_finite_differences(scope):
    clips = [ClipKeys(1, 1, (2, 1, 2)), ClipKeys(0, 2, (2, 1, 3), [9, 2, 3, 11, 5, 7]), ClipKeys(1, 6, (1, 2, 2))]
    ranges = ((0, 4), (6, 10))
    rows = [Row(0, 11, ranges), Row(0, 5, ranges), Row(1, 1, ranges), Row(1, 1, ((0, 12),)), Row(2, 11, ranges)]
    table = build_work_table(rows, clips, scope)
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, h, 12, 3, generator=generator, dtype=torch.float64, requires_grad=True) for h in (4, 2))
    assert torch.autograd.gradcheck(lambda q, k: noun_attention(q, k, table, scale=SCALE), (q, k))


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_every_segment_is_a_distribution(scope):
    flat = noun_attention(*inputs(2), build_work_table(ROWS, CLIPS, scope), scale=SCALE)
    maps = flat.split(build_work_table(ROWS, CLIPS, scope).map_sizes)
    for (number, *_), row in zip(ROWS, maps):
        sums = row.view(CLIPS[number].grid[0] if scope == "frame" else 1, -1).sum(1)
        torch.testing.assert_close(sums, torch.ones_like(sums))


def test_a_single_key_gets_everything_and_passes_no_gradient():
    q, k = (x.requires_grad_() for x in inputs(2))
    flat = noun_attention(q, k, build_work_table([Row(0, 59)], [CLIPS[1]]), scale=SCALE)
    assert flat.tolist() == [1.0]
    (grad,) = torch.autograd.grad(flat.sum(), q)
    assert grad.abs().max() == 0


@pytest.mark.parametrize("clips", [[], CLIPS])
def test_no_rows_give_an_empty_map(clips):
    table = build_work_table([], clips)
    flat = noun_attention(*inputs(2), table, scale=SCALE)
    assert (flat.shape, flat.dtype, table.num_rows, table.map_sizes) == ((0,), torch.float32, 0, [])


def test_half_precision_inputs_cost_the_map_nothing():
    """Scores are taken in fp32: the only error is that of rounding q and k themselves."""
    q, k = inputs(7, torch.bfloat16)
    flat = noun_attention(q, k, build_work_table(ROWS, CLIPS), scale=SCALE)
    assert flat.dtype == torch.float32
    want = torch.cat(naive(q, k, ROWS, CLIPS, "frame")).float()
    torch.testing.assert_close(flat, want, atol=1e-5, rtol=1e-5)


def test_large_scores_stay_finite():
    q, k = (100 * x.requires_grad_() for x in inputs(2))
    flat = noun_attention(q, k, build_work_table(ROWS, CLIPS), scale=SCALE)
    grads = torch.autograd.grad(flat.square().sum(), (q, k))
    assert all(torch.isfinite(x).all() for x in (flat, *grads))


def test_strides_do_not_matter():
    """Attention backends hand over views: (B, L, H, D) seen as (B, H, L, D)."""
    table = build_work_table(ROWS, CLIPS)
    q, k = inputs(2)
    views = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k)]
    assert not any(view.is_contiguous() for view in views)
    torch.testing.assert_close(
        noun_attention(*views, table, scale=SCALE), noun_attention(q, k, table, scale=SCALE), atol=0, rtol=0
    )


def test_rows_look_at_their_own_clip_alone():
    q, k = inputs(2)
    table = build_work_table(ROWS, CLIPS)
    before = noun_attention(q, k, table, scale=SCALE)
    changed = k.clone()
    changed[2] += 1  # another batch row
    changed[1, :, 29:40] += 1  # behind clip 0, before clip 1
    changed[0, :, :7] += 1
    assert torch.equal(noun_attention(q, changed, table, scale=SCALE), before)


def test_a_table_moves_as_a_whole():
    for clips in (CLIPS, [scattered(CLIPS[0])]):
        rows = ROWS if clips is CLIPS else ROWS[:2]
        moved = build_work_table(rows, clips).to("meta")
        assert isinstance(moved, WorkTable)
        tensors = [value for value in vars(moved).values() if isinstance(value, Tensor)]
        assert len(tensors) == (5 if clips is CLIPS else 6)
        assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_errors_name_what_is_wrong():
    q, k = inputs(2)
    table = build_work_table(ROWS, CLIPS)
    with pytest.raises(
        ValueError, match=r"rows must be sorted by clip and name one of 4 clips, got clips \[1, 0\]; sort"
    ):
        build_work_table([Row(1, 3), Row(0, 3)], CLIPS)
    with pytest.raises(ValueError, match=r"name one of 4 clips, got clips \[0, 4\]"):
        build_work_table([Row(0, 3), Row(4, 3)], CLIPS)
    with pytest.raises(ValueError, match=r"got clips \[-1\]"):
        build_work_table([Row(-1, 3)], CLIPS)
    with pytest.raises(ValueError, match=r"clip 1 has a 3x2x4 grid but 3 key positions; give 24"):
        build_work_table([], [CLIPS[1], CLIPS[0]._replace(positions=[1, 2, 3])])
    with pytest.raises(ValueError, match=r"softmax scope is 'video'; use one of frame, clip, causal, full"):
        build_work_table(ROWS, CLIPS, "video")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"scope 'full' needs one or two key ranges for every row, got Row\(clip=0"):
        build_work_table(ROWS, CLIPS, "full")
    with pytest.raises(ValueError, match=r"backend is 'cuda'; use one of auto, triton, torch"):
        noun_attention(q, k, table, scale=SCALE, backend="cuda")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"3 query heads are not a multiple of 2 kv heads"):
        noun_attention(q[:, :3], k, table, scale=SCALE)


def test_rows_and_keys_must_be_in_q_and_k():
    """A kernel would read beyond them."""
    q, k = torch.randn(2, 4, 40, 8), torch.randn(2, 2, 40, 8)
    clip = ClipKeys(1, 5, (2, 3, 4))
    for rows, clips in [
        ([Row(0, 40)], [clip]),
        ([Row(0, 3)], [clip._replace(batch=2)]),
        ([Row(0, 3)], [clip._replace(start=17)]),
        ([Row(0, 3)], [clip._replace(positions=[*range(23), 40])]),
        ([Row(0, 3, ((0, 41),))], [clip]),
    ]:
        table = build_work_table(rows, clips, "causal" if rows[0].ranges else "frame")
        with pytest.raises(
            ValueError, match=r"\(2, 40\) batch rows and columns are too small for a table of \([23], \d+\)"
        ):
            noun_attention(q, k, table, scale=1.0)
    table = build_work_table([Row(0, 39)], [clip._replace(start=16)])
    assert noun_attention(q, k, table, scale=1.0).shape == (24,)
    for other in (k[:1], k[:, :, :39], k[..., :4]):
        with pytest.raises(ValueError, match="may differ in their heads alone"):
            noun_attention(q, other, table, scale=1.0)
    with pytest.raises(ValueError, match=r"on cpu, cpu and meta; bring them together, the table by table\.to"):
        noun_attention(q, k, table.to("meta"), scale=1.0)
    for rows, clips in [
        ([Row(0, -1)], [clip]),
        ([Row(0, 1)], [clip._replace(batch=-1)]),
        ([Row(0, 1)], [clip._replace(start=-1)]),
        ([Row(0, 1, ((-1, 3),))], [clip]),
    ]:
        with pytest.raises(ValueError, match="-1 is the smallest batch row or column of rows, ranges and keys"):
            build_work_table(rows, clips, "causal" if rows[0].ranges else "frame")


def test_maps_are_fp32_under_autocast():
    q, k = torch.randn(1, 4, 40, 8), torch.randn(1, 2, 40, 8)
    table = build_work_table([Row(0, 39)], [ClipKeys(0, 5, (2, 3, 4))])
    want = noun_attention(q, k, table, scale=1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(noun_attention(q, k, table, scale=1.0), want)
