"""What a CUDA device can do and how long work takes on it: ceilings, clocks, memory. Needs Triton.

Times are quantiles in microseconds, by device events, with the L2 cache flushed before each run. A *replayed* time is
that of a CUDA graph, so without the host; an *eager* one has whatever the host adds.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.testing import do_bench

from benchmarks.measure import MIB, Ceilings, floor_us, write_result

QUANTILES = (0.2, 0.5, 0.8)
SPECIAL_ROUNDS, SPECIAL_BLOCK, PROGRAMS_PER_SM = 64, 1024, 32


@triton.jit
def _special(x, NAME: tl.constexpr):
    # tl.log2 and a division are sequences of several instructions.
    return tl.inline_asm_elementwise(NAME + ".approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)


@triton.jit
def special_kernel(out, ROUNDS: tl.constexpr, BLOCK: tl.constexpr):
    """A chain of 2 x 8 x ROUNDS logarithms and reciprocals for each element, towards 0.5."""
    place = tl.arange(0, BLOCK)
    x = 1.0 + place.to(tl.float32) / BLOCK
    for _ in range(ROUNDS):
        for _ in tl.static_range(8):
            x = _special(_special(x, "lg2") + 3.0, "rcp")
    tl.store(out + tl.program_id(0) * BLOCK + place, x)


def measure_ceilings() -> Ceilings:
    """Bytes copied, operations of a large bf16 product and special functions in a second."""
    a, b = torch.randn(2, 2**28, device="cuda")
    copied = 2 * a.nbytes / _seconds(lambda: a.copy_(b))
    a, b = torch.randn(2, 8192, 8192, device="cuda", dtype=torch.bfloat16)
    product = 2 * 8192**3 / _seconds(lambda: a @ b)
    programs = PROGRAMS_PER_SM * torch.cuda.get_device_properties(0).multi_processor_count
    out = torch.empty(programs * SPECIAL_BLOCK, device="cuda")
    chain = _seconds(lambda: special_kernel[(programs,)](out, SPECIAL_ROUNDS, SPECIAL_BLOCK, num_warps=4))
    torch.testing.assert_close(out, torch.full_like(out, 0.5), atol=1e-3, rtol=0)
    return Ceilings(copied, product, 16 * SPECIAL_ROUNDS * out.numel() / chain)


def _seconds(run: Callable[[], object]) -> float:
    return do_bench(run, return_mode="median") / 1e3


def eager_us(run: Callable[[], object]) -> list[float]:
    return [1e3 * ms for ms in do_bench(run, quantiles=QUANTILES)]


def replayed_us(run: Callable[[], object]) -> list[float]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return eager_us(graph.replay)


def launch_us(launches: int) -> list[float]:
    """Replayed time of that many kernels with nothing to do."""
    x = torch.zeros(1, device="cuda")
    return replayed_us(lambda: [x.add_(1) for _ in range(launches)])


def measure(
    name: str,
    cases: Mapping[str, Any],
    ways_of: Callable[[Any], Mapping[str, Callable[[Any], Tensor]]],
    problem_of: Callable[[Any], Any],
    values_and_gradients: Callable[[Any, Any], tuple[Tensor, ...]],
    limits: Mapping[str, float],
) -> dict[str, Any]:
    """Floor of every case, and errors, memory and times of every way, written after each case. A way that is wrong
    (relative error above its limit, or that of "") or fails is not timed, and says so under "failed"."""
    ceilings = measure_ceilings()
    result: dict[str, Any] = {"ceilings": ceilings._asdict(), "shapes": {}}
    for title, case in cases.items():
        torch.compiler.reset()  # it stops compiling after a few shapes
        problem, ways = problem_of(case), ways_of(case)
        want = values_and_gradients(ways["torch"], problem.double())
        result["shapes"][title] = {
            "case": case._asdict(),
            "floor_us": floor_us(case.works(), ceilings),
            "launches": case.launches(),
            "launch_us": launch_us(case.launches()),
            "ways": {
                way: _figures(run, problem, values_and_gradients, want, limits.get(way, limits[""]))
                for way, run in ways.items()
            },
        }
        write_result(name, result)
        print(f"\n{title}: {result['shapes'][title]}", flush=True)
    return result


def _figures(
    way: Any, problem: Any, values_and_gradients: Any, want: tuple[Tensor, ...], limit: float
) -> dict[str, Any]:
    figures: dict[str, Any] = {}

    def step() -> tuple[Tensor, ...]:
        return values_and_gradients(way, problem)

    try:
        torch.cuda.empty_cache()  # graphs keep their own
        # Freed at once: what a way leaves unwritten is then likely a NaN.
        torch.full((64 * MIB,), torch.nan, device=want[0].device)
        got = step()
        figures["errors"] = [float((x.double() - y).norm() / y.norm()) for x, y in zip(got, want)]
        if not all(error <= limit for error in figures["errors"]):
            return figures | {"failed": "wrong"}
        figures["bit_equal"] = all(all(map(torch.equal, got, step())) for _ in range(9))
        gradients = sum(x.nbytes for x in got[1:])
        del got
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        values = way(problem)
        figures["kept_mib"] = (torch.cuda.memory_allocated() - before - values.nbytes) / MIB
        del values
        step()
        figures["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / MIB
        figures["gradients_mib"] = gradients / MIB
        figures["eager_step_us"] = eager_us(step)
        torch.cuda.empty_cache()
        figures["forward_us"] = replayed_us(lambda: way(problem))
        figures["step_us"] = replayed_us(step)
    except Exception as error:  # the other ways are measured all the same
        figures["failed"] = "out of memory" if isinstance(error, torch.OutOfMemoryError) else repr(error)[:300]
    return figures
