"""Measures, on a GPU, the Triton operators against torch and torch.compile: forward and backward, memory, and how far
they are from the least that the device needs. Correct before timed; every number is written before any is judged.

Imports torch, triton, numpy, pytest and swim.kernels alone.
"""

import pytest
import torch

from benchmarks import noun_rows, pixel_loss
from benchmarks.targets import LONG, PAPER, missed

pytestmark = [
    pytest.mark.bench,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# By importance: a run that is cut short has the first ones.
ROWS = {
    f"{PAPER}: 5 rows, 16 frames of 768 keys": noun_rows.Case(5, 16, 16 * 768),
    LONG: noun_rows.Case(8, 1, 16384),
    f"{PAPER}: 1 row, 16 frames of 768 keys": noun_rows.Case(1, 16, 16 * 768),
    "shared prefix: 32 rows, 16 frames of 768 keys": noun_rows.Case(32, 16, 16 * 768),
    "shared prefix: 8 rows, 16 frames of 768 keys": noun_rows.Case(8, 16, 16 * 768),
} | {
    f"{rows} rows x {keys:,} keys".replace(",", " "): noun_rows.Case(rows, 1, keys)
    for keys in (60000, 2048, 16384)
    for rows in (32, 8, 1, 64)
    if (rows, keys) != (8, 16384)
}
MOST_IDENTITY_PASSES = 128  # beyond, a single run takes seconds
ROW_LIMITS = {"triton": 2e-2, "torch": 2e-2, "": 5e-2}  # of bf16's gradients; the maps of the first two are far better

PIXELS = {
    "5 nouns x 16 frames to 480 x 854": pixel_loss.Case(5 * 16, (17, 31), (480, 854)),
    "32 nouns x 114 frames to 480 x 854": pixel_loss.Case(32 * 114, (17, 31), (480, 854)),
}
PIXEL_LIMITS = {"": 1e-3}


def row_ways(case: noun_rows.Case) -> dict[str, noun_rows.Way]:
    compiled = torch.compile(noun_rows.grouped, fullgraph=True, dynamic=False)
    ways = noun_rows.GPU_WAYS | {"grouped, compiled": compiled}
    if case.keys // case.segments > MOST_IDENTITY_PASSES * case.dim:
        del ways["identity SDPA"]
    return ways


def pixel_ways(_: pixel_loss.Case) -> dict[str, pixel_loss.Way]:
    compiled = torch.compile(pixel_loss.upsample_and_bce, fullgraph=True, dynamic=False)
    return pixel_loss.GPU_WAYS | {"upsample and BCE, compiled": compiled}


def test_noun_rows_on_a_gpu():
    from benchmarks.device import measure

    result = measure(
        "gpu_noun_rows",
        ROWS,
        row_ways,
        lambda case: noun_rows.problem(case, "cuda", torch.bfloat16),
        noun_rows.values_and_gradients,
        ROW_LIMITS,
    )
    assert not missed({"gpu_noun_rows": result})


def test_pixel_loss_on_a_gpu():
    from benchmarks.device import measure

    result = measure(
        "gpu_pixel_loss",
        PIXELS,
        pixel_ways,
        lambda case: pixel_loss.problem(case, "cuda"),
        pixel_loss.values_and_gradients,
        PIXEL_LIMITS,
    )
    assert not missed({"gpu_pixel_loss": result})
