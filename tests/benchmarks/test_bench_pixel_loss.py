"""Measures, on a CPU, the pixel side's BCE in plain torch against upsampling and BCE on tensors of full size: time, and
memory of forward and backward. `make bench` prints it."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.measure import MIB, PeakMemory, in_turns, ratios, write_result
from benchmarks.pixel_loss import Case, operator, problem, upsample_and_bce, values_and_gradients

pytestmark = pytest.mark.bench
ROUNDS = 5
CASES = {
    "5 nouns x 4 frames, 24 x 32 cells to 240 x 427": Case(20, (24, 32), (240, 427)),
    "5 nouns x 16 frames, 17 x 31 cells to 480 x 854": Case(80, (17, 31), (480, 854)),
}
WAYS = {"mask loss": operator, "upsample and BCE": upsample_and_bce}


@pytest.fixture(scope="module")
def shapes():
    """Results by shape, written after each."""
    return {}


@pytest.mark.parametrize("shape", CASES)
def test_pixel_loss_against_upsampling_on_a_cpu(shape, shapes, benchmark):
    p = problem(CASES[shape])
    want: list[torch.Tensor] = []
    ways: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        got = values_and_gradients(way, p)
        want = want or list(got)
        for x, y in zip(got, want):
            assert (x - y).norm() <= 1e-5 * y.norm(), name
        with PeakMemory() as memory:
            values_and_gradients(way, p)
        ways[name] = {"peak_mib": memory.peak() / MIB}
        ways[name]["memory"] = ways[name]["peak_mib"] / ways["mask loss"]["peak_mib"]
    seconds = in_turns(benchmark, {name: partial(values_and_gradients, way, p) for name, way in WAYS.items()}, ROUNDS)
    for name, figures in ways.items():
        figures |= {"seconds": min(seconds[name]), "time": ratios(seconds[name], seconds["mask loss"])}
        print(f"\n{shape}, {name}: {figures}")
    shapes[shape] = {"ways": ways}
    benchmark.extra_info |= shapes[shape]
    write_result("cpu_pixel_loss", {"shapes": shapes})
