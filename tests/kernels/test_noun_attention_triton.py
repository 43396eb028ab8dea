"""Promise: the Triton kernels compute what the reference computes, for any rows and keys, twice alike; they keep and
take next to no memory; and the operator behaves as torch's own under compile, fake tensors and checkpointing.

Values and gradients are checked in Triton's interpreter, on CPU tensors (`test_interpreted_*`, see interpreter.py). It
says nothing of bf16's rounding or of a real device: those are the tests marked `gpu`.
"""

import logging
import re
from dataclasses import replace

import pytest
import torch
from interpreter import interpreted, needs_triton, not_interpreted, run_interpreted
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from swim.kernels import backend as backends
from swim.kernels import noun_attention as module
from swim.kernels.backend import choose_triton
from swim.kernels.noun_attention import ClipKeys, Row, WorkTable, build_work_table, noun_attention

LENGTH = 90
CLIPS = [ClipKeys(1, 5, (3, 2, 4)), ClipKeys(1, 40, (1, 1, 1)), ClipKeys(2, 2, (2, 2, 2)), ClipKeys(0, 7, (4, 3, 2))]
ROWS = [Row(*row) for row in [(0, 58), (0, 30), (0, 30), (1, 59), (3, 50), (3, 35), (3, 3)]]
WIDE = [row._replace(ranges=((3, 61), (70, 75))) for row in ROWS]


def inputs(heads: int, kv_heads: int, dim: int, *, batch: int = 3, length: int = LENGTH, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, heads, length, dim, generator=generator)
    k = torch.randn(batch, kv_heads, length, dim, generator=generator)
    return q.to(dtype), k.to(dtype)


def values_and_gradients(q: Tensor, k: Tensor, table: WorkTable, backend: str, scale: float) -> tuple[Tensor, ...]:
    q, k = q.detach().requires_grad_(), k.detach().requires_grad_()
    flat = noun_attention(q, k, table, scale=scale, backend=backend)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(len(flat), generator=generator, dtype=torch.float64).to(flat)
    if not flat.requires_grad:  # the reference, of nothing
        return flat, torch.zeros_like(q), torch.zeros_like(k)
    return flat.detach(), *torch.autograd.grad((flat * weights).sum(), (q, k))


def assert_equals_oracle(q: Tensor, k: Tensor, table: WorkTable, tolerances=(1e-6, 1e-5, 1e-5), scale=None):
    """Triton against the reference in float64, by relative error."""
    scale = scale or 1.5 * q.shape[-1] ** -0.5
    got = values_and_gradients(q, k, table, "triton", scale)
    want = values_and_gradients(q.double(), k.double(), table, "torch", scale)
    assert [x.dtype for x in got] == [torch.float32, q.dtype, k.dtype]
    for name, x, y, tolerance in zip(("map", "dq", "dk"), got, want, tolerances):
        error = (x.double() - y).norm()
        # A single key has no gradient at all: then rounding is all there is.
        assert error <= tolerance * max(float(y.norm()), 0.01 * len(got[0]) ** 0.5), (name, float(error / y.norm()))
    return got


@needs_triton
@not_interpreted
def test_the_kernels_in_the_interpreter():
    run_interpreted(__file__)


def problem(draw, st, scope: str):
    """Tensors, rows and clips, drawn by hypothesis: up to three clips in up to two batch rows, one behind the other."""
    rows, clips = [], []
    ends = [0, 0]
    for number in range(draw(st.integers(1, 3))):
        batch = draw(st.integers(0, 1))
        grid = draw(st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)))
        num_keys, gap = grid[0] * grid[1] * grid[2], draw(st.integers(0, 3))
        start = ends[batch] + gap
        positions = None
        if draw(st.booleans()):
            spread = draw(st.integers(1, 2))
            positions = list(range(start, start + num_keys * spread, spread))
            positions = draw(st.permutations(positions)) if num_keys < 20 else positions[::-1]
        end = (max(positions) if positions else start + num_keys - 1) + 1 + draw(st.integers(1, 4))
        for _ in range(draw(st.integers(0 if rows else 1, 5))):
            lo, cut = draw(st.integers(ends[batch], end - 1)), draw(st.integers(ends[batch], end))
            ranges = ((lo, draw(st.integers(lo + 1, end))), (min(cut, lo), lo))[: draw(st.integers(1, 2))]
            rows.append(Row(number, draw(st.integers(0, end - 1)), ranges if scope in ("causal", "full") else ()))
        clips.append(ClipKeys(batch, start, grid, positions))
        ends[batch] = end
    group, kv_heads = draw(st.sampled_from([(1, 3), (2, 2), (7, 2), (8, 1)]))
    dim = draw(st.sampled_from([16, 64, 80, 96, 128, 256]))
    q, k = inputs(group * kv_heads, kv_heads, dim, batch=2, length=max(ends), seed=draw(st.integers(0, 99)))
    layout = draw(st.sampled_from(["heads first", "tokens first", "sliced"]))
    if layout == "tokens first":
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    elif layout == "sliced":  # as out of one fused projection, with every other feature of a wider head
        both = torch.zeros(2, max(ends), (group + 1) * kv_heads, 2 * dim)
        both[..., ::2] = torch.cat([q, k], 1).transpose(1, 2)
        q, k = both.transpose(1, 2)[..., ::2].split([group * kv_heads, kv_heads], 1)
    return q, k, rows, clips


@interpreted
@pytest.mark.parametrize("scope", ["frame", "clip", "causal", "full"])
def test_interpreted_any_rows_and_keys(scope):
    """Also with segments cut into splits of a few keys, and with dq in two parts at most."""
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies

    @hypothesis.settings(
        max_examples=2, deadline=None, derandomize=True, suppress_health_check=list(hypothesis.HealthCheck)
    )
    @hypothesis.given(st.data(), st.sampled_from([(1024, 16), (32, 16), (32, 2)]))
    def check(data, limits):
        q, k, rows, clips = problem(data.draw, st, scope)
        kept = module.SPLIT_KEYS, module.MAX_SPLITS
        module.SPLIT_KEYS, module.MAX_SPLITS = limits
        table = build_work_table(rows, clips, scope)
        module.SPLIT_KEYS, module.MAX_SPLITS = kept
        assert table.unfit is None
        torch.use_deterministic_algorithms(True)  # fills new tensors with NaN: every element must be written
        assert q.new_empty(3, dtype=torch.float32).isnan().all()
        got = assert_equals_oracle(q, k, table)
        torch.use_deterministic_algorithms(False)
        assert all(
            torch.equal(x, y)
            for x, y in zip(got, values_and_gradients(q, k, table, "triton", 1.5 * q.shape[-1] ** -0.5))
        )

    check()


@interpreted
@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (16, 2, 80), (4, 4, 64), (16, 1, 256)])
def test_interpreted_head_shapes_of_real_models(heads, kv_heads, dim, scope):
    q, k = inputs(heads, kv_heads, dim)
    assert_equals_oracle(q, k, build_work_table(ROWS, CLIPS, scope))


@interpreted
@pytest.mark.parametrize(
    ("dtype", "tolerances"),
    # The interpreter truncates what it casts to bf16, and computes in fp32: only the returned gradients are rounded.
    [(torch.float16, (1e-6, 5e-4, 5e-4)), (torch.bfloat16, (1e-6, 8e-3, 8e-3))],
)
def test_interpreted_half_precision(dtype, tolerances):
    q, k = inputs(14, 2, 64, dtype=dtype)
    assert_equals_oracle(q, k, build_work_table(ROWS, CLIPS), tolerances)


@interpreted
def test_interpreted_a_frame_of_768_keys_and_a_clip_of_more_than_a_program_takes():
    q, k = inputs(14, 2, 64, batch=1, length=1600)
    rows, clips = [Row(0, 1590), Row(0, 1591)], [ClipKeys(0, 3, (2, 24, 32))]
    for scope, splits in (("frame", 1), ("clip", 2)):
        table = build_work_table(rows, clips, scope)
        assert table.sizes[-2] == splits
        assert_equals_oracle(q, k, table)


@interpreted
def test_interpreted_more_frames_than_a_row_has_parts_of_dq():
    q, k = inputs(4, 2, 16)
    table = build_work_table([Row(0, 80), Row(0, 81), Row(1, 85)], [ClipKeys(0, 3, (37, 1, 2)), CLIPS[0]])
    assert (table.sizes[2], table.sizes[-1]) == (2 * 16 + 3, 2)
    assert_equals_oracle(q, k, table)


@interpreted
@pytest.mark.parametrize(
    ("rows", "clips"),
    [
        ([], []),
        ([], CLIPS),
        ([Row(0, 3)], [ClipKeys(0, 0, (0, 2, 2))]),
        ([Row(0, 3), Row(1, 3)], [ClipKeys(0, 0, (0, 2, 2)), ClipKeys(0, 0, (1, 1, 2))]),
        ([Row(0, 3)], [ClipKeys(0, 5, (1, 1, 1))]),
        ([Row(0, 3)], [ClipKeys(0, 5, (4, 1, 1))]),
    ],
    ids=["nothing", "no rows", "no keys", "one clip without keys", "one key", "one key a frame"],
)
def test_interpreted_little_or_nothing(rows, clips):
    q, k = inputs(4, 2, 16)
    assert_equals_oracle(q, k, build_work_table(rows, clips))


@interpreted
def test_interpreted_large_scores_and_large_gradients_stay_finite():
    q, k = (100 * x for x in inputs(4, 2, 64))
    got = values_and_gradients(q, k, build_work_table(ROWS, CLIPS), "triton", 0.3)
    assert all(torch.isfinite(x).all() for x in got)


@interpreted
@pytest.mark.parametrize("scope", ["frame", "clip", "causal"])
def test_interpreted_an_offset_of_the_gradient_costs_less_than_bf16(scope):
    """The softmax takes no notice of it, rounding does."""
    q, k = inputs(14, 2, 64)
    table = build_work_table([row for row in WIDE if row.clip != 1], CLIPS, scope)
    generator = torch.Generator().manual_seed(1)
    offset = 1000 + torch.randn(sum(table.map_sizes), generator=generator)
    grads = []
    for backend, dtype in (("triton", torch.float32), ("torch", torch.float64)):
        q, k = (x.to(dtype).detach().requires_grad_() for x in (q, k))
        flat = noun_attention(q, k, table, scale=0.2, backend=backend)
        grads.append(torch.autograd.grad(flat, (q, k), offset.to(dtype)))
    for got, want in zip(*grads):
        assert (got.double() - want).norm() <= 1e-3 * want.norm()


@interpreted
@pytest.mark.parametrize("scope", ["frame", "clip", "causal", "full"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_interpreted_what_is_not_finite_is_seen(scope, value):
    """A key that has gone wrong makes the whole of its segment's maps NaN, as it does in torch."""
    table = build_work_table(WIDE[:3], CLIPS[:1], scope)
    q, k = inputs(4, 2, 16)
    k[1, 0, 20] = value
    got, want = (noun_attention(q, k, table, scale=0.2, backend=backend) for backend in ("triton", "torch"))
    assert torch.equal(got.isnan(), want.isnan())
    assert want.isnan().any()


@interpreted
def test_interpreted_a_row_that_sees_nothing_has_a_map_of_zeros():
    rows = [Row(0, 58, ((5, 5),)), Row(0, 30, ((5, 30),)), Row(0, 31, ((60, 80),))]
    q, k = inputs(4, 2, 16)
    flat, *_ = assert_equals_oracle(q, k, build_work_table(rows, CLIPS[:1], "causal"))
    assert [bool(row.any()) for row in flat.split(24)] == [False, True, False]


@interpreted
@pytest.mark.parametrize("compiled", [False, True])
def test_interpreted_checkpointing(compiled):
    table = build_work_table(ROWS, CLIPS)
    q, k = (x.requires_grad_() for x in inputs(4, 2, 16))

    def layer(q: Tensor, k: Tensor) -> Tensor:
        return noun_attention(2 * q, k + 1, table, scale=0.2, backend="triton").square()

    run = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
    want = torch.autograd.grad(layer(q, k).sum(), (q, k))
    got = torch.autograd.grad(checkpoint(run, q, k, use_reentrant=False).sum(), (q, k))
    assert all(torch.equal(x, y) for x, y in zip(got, want))


# The operator, with the reference on a CPU in the kernels' place.


@pytest.fixture
def operator(monkeypatch):
    """`noun_attention` through the operator."""
    monkeypatch.setattr(module, "unsupported", lambda *_: None)
    return lambda q, k, table: noun_attention(q, k, table, scale=0.3, backend="triton")


def op_arguments(q: Tensor, k: Tensor, table: WorkTable) -> tuple:
    return q, k, table.tensors, list(table.sizes), 0.3


def on_a_device(table: WorkTable) -> WorkTable:
    """The table with fake tensors on a GPU, which torch without CUDA can make but not copy to."""
    tensors = {name: value for name, value in vars(table).items() if isinstance(value, Tensor)}
    return replace(table, **{n: torch.empty(t.shape, dtype=t.dtype, device="cuda") for n, t in tensors.items()})


@pytest.mark.parametrize("scope", ["frame", "clip", "causal"])
def test_the_operator_equals_the_reference(operator, scope):
    table = build_work_table(WIDE, CLIPS, scope)
    for q, k in (inputs(4, 2, 16), [x.double() for x in inputs(4, 2, 16)]):
        q, k = q.requires_grad_(), k.requires_grad_()
        got, want = operator(q, k, table), noun_attention(q, k, table, scale=0.3, backend="torch")
        assert torch.equal(got, want)
        for x, y in zip(*(torch.autograd.grad(flat.square().sum(), (q, k)) for flat in (got, want))):
            assert torch.equal(x, y)


@pytest.mark.parametrize("scope", ["frame", "causal"])
@pytest.mark.parametrize("tokens_first", [False, True])
def test_opcheck(scope, tokens_first):
    table = build_work_table(WIDE, CLIPS, scope)
    q, k = inputs(4, 2, 16)
    if tokens_first:  # as models hand them over
        q, k = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k))
    q, k = q.requires_grad_(), k.requires_grad_()
    arguments = op_arguments(q, k, table)
    flat, stats = torch.ops.swim.noun_attention(*arguments)
    torch.library.opcheck(torch.ops.swim.noun_attention.default, arguments)
    q, k = q.detach(), k.detach()
    torch.library.opcheck(
        torch.ops.swim.noun_attention_backward.default,
        (flat.detach(), q, k, stats.detach(), *op_arguments(q, k, table)[2:]),
    )


@pytest.mark.parametrize("backend", ["auto", "operator"])
def test_compiles_as_one_graph(backend, operator):
    table = build_work_table(ROWS, CLIPS)
    q, k = (x.requires_grad_() for x in inputs(4, 2, 16))
    call = operator if backend == "operator" else lambda q, k, table: noun_attention(q, k, table, scale=0.3)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    got, want = (torch.autograd.grad(f(q, k, table).square().sum(), (q, k)) for f in (compiled, call))
    for x, y in zip(got, want):
        torch.testing.assert_close(x, y)


def test_fake_tensors_of_a_device_give_shapes(operator):
    table = build_work_table(ROWS, CLIPS)
    with FakeTensorMode():
        table = on_a_device(table)
        # Without gradients, which crash torch in a build without CUDA; the operator of the backward pass by itself.
        q, k = (torch.empty(3, LENGTH, h, 16, dtype=torch.bfloat16, device="cuda").transpose(1, 2) for h in (4, 2))
        flat = operator(q, k, table)
        _, stats = torch.ops.swim.noun_attention(*op_arguments(q, k, table))
        grads = torch.ops.swim.noun_attention_backward(flat, q, k, stats, *op_arguments(q, k, table)[2:])
    assert (flat.shape, flat.dtype, flat.device.type) == ((sum(table.map_sizes),), torch.float32, "cuda")
    for x, y in zip(grads, (q, k)):
        assert (x.shape, x.dtype, x.device, x.stride()) == (y.shape, y.dtype, y.device, y.stride())


@not_interpreted
def test_what_triton_cannot_do_is_named(monkeypatch, caplog):
    table = build_work_table(ROWS, CLIPS)
    q, k = inputs(4, 2, 16)
    noun_attention(q, k, table, scale=1.0)
    assert not caplog.messages, "torch is the natural choice on a CPU"
    for installed, reason in ((False, "Triton is not installed"), (True, "tensors on device 'cpu'")):
        monkeypatch.setattr(backends, "HAS_TRITON", installed)
        with pytest.raises(ValueError, match=f"no Triton kernel for {reason}; use backend 'auto' or 'torch'"):
            noun_attention(q, k, table, scale=1.0, backend="triton")
    monkeypatch.setattr(backends, "INTERPRETED", True)
    scattered = [CLIPS[0]._replace(positions=[*range(23), 50]), *CLIPS[1:]]
    double = [scattered[0]._replace(positions=[*range(23), 3]), *CLIPS[1:]]
    for reason, (rows, clips, scope), shape, dtype in [
        ("dtypes torch.float64 and torch.float32", (ROWS, CLIPS, "frame"), (4, 2, 16), torch.float64),
        ("head_dim 257 above 256", (ROWS, CLIPS, "frame"), (4, 2, 257), torch.float32),
        ("65 query heads per kv head, more than 64", (ROWS, CLIPS, "frame"), (65, 1, 16), torch.float32),
        ("clips whose keys interleave", (ROWS, scattered, "frame"), (4, 2, 16), torch.float32),
        ("a key that stands twice in a clip", (ROWS, double, "frame"), (4, 2, 16), torch.float32),
        ("a key that stands twice in a clip", (WIDE, double, "full"), (4, 2, 16), torch.float32),
        ("clips whose keys interleave", (WIDE, CLIPS, "causal"), (4, 2, 16), torch.float32),
    ]:
        q, k = inputs(*shape)
        with pytest.raises(ValueError, match=re.escape(reason)):
            noun_attention(q.to(dtype), k, build_work_table(rows, clips, scope), scale=1.0, backend="triton")


def test_auto_falls_back_with_one_line(monkeypatch, caplog):
    table = build_work_table(ROWS, CLIPS)
    monkeypatch.setattr(backends, "_logged", set())
    monkeypatch.setattr(backends, "HAS_TRITON", True)
    monkeypatch.setattr(module, "noun_attention_reference", lambda *_: "torch")
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        table = on_a_device(table)
        q, k = (torch.empty(3, h, LENGTH, 16, dtype=torch.float64, device="cuda") for h in (4, 2))
        assert [noun_attention(q, k, table, scale=1.0) for _ in range(3)] == ["torch"] * 3
    assert caplog.messages == ["noun_attention runs in torch, not in Triton: dtypes torch.float64 and torch.float64"]


def test_a_compiled_model_says_so_too(monkeypatch, caplog):
    monkeypatch.setattr(backends, "_logged", set())
    run = torch.compile(lambda x: x + choose_triton("rows", "auto", x, "a reason"), backend="eager", fullgraph=True)
    with FakeTensorMode(), caplog.at_level(logging.WARNING):
        x = torch.empty(3, device="cuda")
        run(x), run(x)
    assert caplog.messages == ["rows runs in torch, not in Triton: a reason"]


# Memory, of meta tensors: their sizes are those of real ones.


class Alive(TorchDispatchMode):
    """Most bytes alive at once of the tensors made under it."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def saved_bytes(q: Tensor, k: Tensor, table: WorkTable, backend: str) -> int:
    """Bytes that autograd keeps for the backward pass, beyond q and k."""
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.untyped_storage()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        noun_attention(q, k, table, scale=1.0, backend=backend)  # type: ignore[arg-type]
    known = {x.untyped_storage()._cdata for x in (q, k)}
    return sum(storage.nbytes() for place, storage in kept.items() if place not in known)


@needs_triton
@not_interpreted
@pytest.mark.parametrize("scope", ["frame", "clip", "full"])
def test_memory_at_32_rows_and_60_000_keys(monkeypatch, scope):
    from triton.runtime import jit

    from swim.kernels import noun_attention_triton

    rows = [Row(0, 61_000 + n, ((0, 62_000),)) for n in range(32)]
    table = build_work_table(rows, [ClipKeys(0, 10, (60, 25, 40))], scope).to("meta")
    q, k = (torch.empty(1, 62_000, h, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2) for h in (28, 4))
    q, k = q.requires_grad_(), k.requires_grad_()
    monkeypatch.setattr(module, "unsupported", lambda *_: None)
    monkeypatch.setattr(noun_attention_triton, "_arch", lambda: 90)
    monkeypatch.setattr(jit.JITFunction, "run", lambda *_, **__: None)  # launches: what counts is made around them

    def torch_way():
        flat = noun_attention(q, k, table, scale=1.0, backend="torch")
        return flat, *torch.autograd.grad(flat.sum(), (q, k))

    @torch.no_grad()
    def triton_way():
        optional, options = (table.key_index, table.row_ranges), {"sizes": table.sizes, "scale": 1.0}
        flat, stats = noun_attention_triton.forward(q, k, table.items, table.row_position, *optional, **options)
        tensors = (table.items, table.row_batch, table.row_position, table.row_parts, *optional)
        return flat, *noun_attention_triton.backward(flat, q, k, stats, *tensors, **options)

    mega = {}
    for backend, run in (("torch", torch_way), ("triton", triton_way)):
        with Alive(q, k) as memory:
            sizes = [x.untyped_storage().nbytes() for x in run()]
        figures = (saved_bytes(q, k, table, backend), memory.peak - sum(sizes), *sizes)
        mega[backend] = [size / 1e6 for size in figures]
        names = ("saved", "peak beyond what follows", "maps", "dq", "dk")
        print(scope, backend, *(f"{name}: {size:.2f}" for name, size in zip(names, mega[backend])), "MB")
    saved, extra, maps, *_ = mega["triton"]
    assert saved + maps <= 8
    assert extra <= 8
    assert mega["torch"][0] >= 100
    assert mega["torch"][2:] == mega["triton"][2:]


# On a device. Not run so far: no machine with one was at hand.

gpu = pytest.mark.gpu
BF16, FP16 = torch.bfloat16, torch.float16


def plain(q: Tensor, k: Tensor, rows: list[Row], clip: ClipKeys, segments: int, scale: float) -> Tensor:
    """Rows, product, softmax, mean, everything in the inputs' type: what one would write first."""
    keys = clip.grid[0] * clip.grid[1] * clip.grid[2]
    picked = q[clip.batch, :, [row.position for row in rows]]
    visual = k[clip.batch, :, clip.start : clip.start + keys].repeat_interleave(q.shape[1] // k.shape[1], 0)
    weights = (picked @ visual.mT * scale).unflatten(-1, (segments, -1)).softmax(-1).flatten(-2)
    return weights.mean(0).flatten().float()


@gpu
@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize(
    ("num_rows", "grid", "scope"),
    [
        (1, (16, 24, 32), "frame"),
        (5, (16, 24, 32), "frame"),
        (32, (16, 24, 32), "frame"),
        (8, (16, 32, 32), "clip"),
        (4, (40, 12, 16), "frame"),
    ],
)
def test_on_a_device_half_precision_is_as_exact_as_torch(num_rows, grid, scope, dtype):
    length = grid[0] * grid[1] * grid[2] + 2000
    q, k = (x.cuda() for x in inputs(28, 4, 128, batch=1, length=length, dtype=dtype))
    rows, clip = [Row(0, length - 1 - n) for n in range(num_rows)], ClipKeys(0, 20, grid)
    scale, table = 128**-0.5, build_work_table(rows, [clip], scope).to("cuda")
    got = values_and_gradients(q, k, table, "triton", scale)
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(got, values_and_gradients(q, k, table, "triton", scale)))
    want = values_and_gradients(q.double(), k.double(), table, "torch", scale)
    q, k = q.requires_grad_(), k.requires_grad_()
    flat = plain(q, k, rows, clip, grid[0] if scope == "frame" else 1, scale)
    weights = torch.randn(len(flat), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(flat)
    torch_way = (flat.detach(), *torch.autograd.grad((flat * weights).sum(), (q, k)))
    for x, other, y, floor in zip(got, torch_way, want, (1e-6, 1e-4, 1e-4)):
        error, allowed = ((z.double() - y).norm() / y.norm() for z in (x, other))
        assert error <= 2 * allowed + floor


@gpu
@pytest.mark.parametrize("scope", ["frame", "clip", "causal"])
@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(28, 4, 128), (4, 4, 80), (16, 2, 256), (64, 1, 64)])
def test_on_a_device_fp32_equals_the_oracle(heads, kv_heads, dim, scope):
    q, k = (x.cuda() for x in inputs(heads, kv_heads, dim))
    rows = [row for row in WIDE if row.clip != 1]
    assert_equals_oracle(q, k, build_work_table(rows, CLIPS, scope).to("cuda"), (2e-6, 1e-5, 1e-5))


@gpu
@pytest.mark.parametrize("scope", ["frame", "causal"])
def test_on_a_device_scattered_keys_compile_and_checkpointing(scope):
    clips = [CLIPS[0]._replace(positions=[*range(5, 40, 3), *range(6, 42, 3)][:24]), *CLIPS[2:]]
    rows = [Row(*row, ((3, 61), (70, 75))) for row in [(0, 58), (0, 30), (0, 30), (2, 50)]]
    table = build_work_table(rows, clips, scope).to("cuda")
    q, k = (x.cuda() for x in inputs(14, 2, 64))
    want = assert_equals_oracle(q, k, table, (2e-6, 1e-5, 1e-5), scale=0.2)

    def layer(q: Tensor, k: Tensor) -> Tensor:
        return noun_attention(q, k, table, scale=0.2, backend="triton")

    q, k = q.requires_grad_(), k.requires_grad_()
    weights = torch.randn(len(want[0]), generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(want[0])
    for run in (torch.compile(layer, fullgraph=True), lambda q, k: checkpoint(layer, q, k, use_reentrant=False)):
        grads = torch.autograd.grad((run(q, k) * weights).sum(), (q, k))
        assert all(torch.equal(x, y) for x, y in zip(grads, want[1:]))
