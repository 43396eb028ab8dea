"""Measures noun rows against what they take the place of; `make bench` prints it.

On a CPU the ways take turns, so that a busy machine disturbs all of them alike; only ratios within one run mean
anything. Memory is that of the tensors alive at once beyond the inputs, in forward and backward. On a GPU
(`pytest -m "gpu and bench"`) the Triton kernels meet torch and torch.compile at the paper's shape.
"""

import json
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from swim.kernels.noun_attention import ClipKeys, Row, WorkTable, build_work_table, noun_attention

pytestmark = pytest.mark.bench
RESULTS = Path("benchmarks/results")
ROUNDS = 3
HEADS, KV_HEADS, DIM = 14, 2, 64
GRID, TEXT = (12, 16, 20), 256  # 3840 visual keys and the rows of text behind them
LENGTH = GRID[0] * GRID[1] * GRID[2] + TEXT
LAYERS, SUPERVISED = 28, 6
ROWS = [LENGTH - 60 + n for n in range(5)]
SCALE = DIM**-0.5


class PeakMemory(TorchDispatchMode):
    """Most bytes alive at once of the tensors made under it."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()
        self.known = {x.untyped_storage()._cdata for x in inputs}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self.known:
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return out


def frames(weights: Tensor) -> Tensor:
    """Softmax rows over all keys to the frame scope: each frame's visual keys renormalised."""
    visual = weights[..., : LENGTH - TEXT].unflatten(-1, (GRID[0], -1))
    return (visual / visual.sum(-1, keepdim=True)).flatten(-2)


def repeated(k: Tensor) -> Tensor:
    return k.repeat_interleave(HEADS // KV_HEADS, 1)


def noun_rows(q: Tensor, k: Tensor, table: WorkTable) -> list[Tensor]:
    return [noun_attention(q, k, table, scale=SCALE, backend="torch")]


def eager(q: Tensor, k: Tensor, _: WorkTable) -> list[Tensor]:
    """All rows of the attention matrix, as `output_attentions` has them."""
    scores = q @ repeated(k).mT * SCALE
    weights = (scores + torch.full((LENGTH, LENGTH), -torch.inf).triu(1)).softmax(-1)
    return [frames(weights[0, :, ROWS]).mean(0).flatten()]


def supervised_layers(q: Tensor, k: Tensor, table: WorkTable) -> list[Tensor]:
    return [noun_rows(q, k, table)[0] for _ in range(SUPERVISED)]


def all_text_rows(q: Tensor, k: Tensor, _: WorkTable) -> list[Tensor]:
    """The release's way: all text rows in all layers, kept for every head; the loss reads a few of them."""
    kept = [(q[:, :, -TEXT:] @ repeated(k).mT * SCALE).softmax(-1)[..., : LENGTH - TEXT].contiguous()
            for _ in range(LAYERS)]  # fmt: skip
    rows = [row - (LENGTH - TEXT) for row in ROWS]
    return [frames(weights[0, :, rows]).mean(0).flatten() for weights in kept[:SUPERVISED]]


WAYS = {
    "eager, one layer": (noun_rows, eager),
    "release, all text rows in all layers": (supervised_layers, all_text_rows),
}


def run(way: Any, q: Tensor, k: Tensor, table: WorkTable, weights: Tensor) -> tuple[Tensor, ...]:
    maps = way(q, k, table)
    return maps[0].detach(), *torch.autograd.grad(sum((flat * weights).sum() for flat in maps), (q, k))


def test_noun_rows_against_eager_and_the_release_on_a_cpu():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, h, LENGTH, DIM, generator=generator, requires_grad=True) for h in (HEADS, KV_HEADS))
    table = build_work_table([Row(0, row) for row in ROWS], [ClipKeys(0, 0, GRID)])
    weights = torch.randn(sum(table.map_sizes), generator=generator)
    result: dict[str, Any] = {
        "shape": {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": DIM, "length": LENGTH, "rows": len(ROWS),
                  "supervised_layers": SUPERVISED, "layers": LAYERS, "text_rows": TEXT},
        "machine": f"{platform.machine()}, one thread",
        "versions": {"torch": torch.__version__},
    }  # fmt: skip
    for name, (ours, theirs) in WAYS.items():
        for x, y in zip(run(ours, q, k, table, weights), run(theirs, q, k, table, weights)):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
        peaks = []
        for way in (ours, theirs):
            with PeakMemory(q, k, weights) as memory:
                run(way, q, k, table, weights)
            peaks.append(memory.peak)
        ratios = []
        for _ in range(ROUNDS):
            began = time.perf_counter()
            run(ours, q, k, table, weights)
            middle = time.perf_counter()
            run(theirs, q, k, table, weights)
            ratios.append((time.perf_counter() - middle) / (middle - began))
        result[name] = {
            "time_against_noun_rows": {"median": statistics.median(ratios), "all": ratios},
            "memory_against_noun_rows": peaks[1] / peaks[0],
            "peak_mib": {"noun rows": peaks[0] / 2**20, "theirs": peaks[1] / 2**20},
        }
        print(f"\n{name}: {statistics.median(ratios):.0f} x the time, {peaks[1] / peaks[0]:.0f} x the memory")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "cpu_noun_attention.json").write_text(json.dumps(result, indent=1) + "\n")


@pytest.mark.gpu
def test_triton_against_torch_at_the_papers_shape_on_a_gpu():
    """16 frames of 768 keys, 28 heads over 4, bf16; p20, p50 and p80 of forward and backward, the L2 cache flushed."""
    import triton
    from triton.testing import do_bench

    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "triton": triton.__version__},
    }
    compiled = torch.compile(lambda q, k, table: noun_attention(q, k, table, scale=128**-0.5, backend="torch"))
    ways = {
        "triton": lambda q, k, table: noun_attention(q, k, table, scale=128**-0.5, backend="triton"),
        "torch": lambda q, k, table: noun_attention(q, k, table, scale=128**-0.5, backend="torch"),
        "torch.compile": compiled,
    }
    for num_rows in (1, 2, 5):
        shapes = [(1, 13000, h, 128) for h in (28, 4)]
        q, k = (torch.randn(s, device="cuda", dtype=torch.bfloat16).transpose(1, 2).requires_grad_() for s in shapes)
        rows = [Row(0, 12900 + n) for n in range(num_rows)]
        table = build_work_table(rows, [ClipKeys(0, 20, (16, 24, 32))]).to("cuda")
        weights = torch.randn(sum(table.map_sizes), device="cuda")
        want = ways["torch"](q, k, table)
        for name, way in ways.items():
            torch.testing.assert_close(way(q, k, table), want, atol=1e-5, rtol=1e-3)

            def step(way: Any = way, q: Tensor = q, k: Tensor = k, table: WorkTable = table) -> None:
                torch.autograd.grad((way(q, k, table) * weights).sum(), (q, k))  # noqa: B023

            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            step()
            result[f"{num_rows} rows, {name}"] = {
                "forward_ms": do_bench(lambda: way(q, k, table), quantiles=[0.2, 0.5, 0.8]),  # noqa: B023
                "forward_and_backward_ms": do_bench(step, quantiles=[0.2, 0.5, 0.8]),
                "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            }
            print(f"\n{num_rows} rows, {name}: {result[f'{num_rows} rows, {name}']}")
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / "gpu_noun_attention.json").write_text(json.dumps(result, indent=1) + "\n")
