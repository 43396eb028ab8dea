"""Measures, on a CPU, noun rows in plain torch against what they take the place of: time, and memory of forward and
backward. `make bench` prints it."""

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.measure import MIB, PeakMemory, in_turns, ratios, write_result
from benchmarks.noun_rows import (
    Case,
    all_text_rows,
    eager,
    gather,
    grouped,
    identity_sdpa,
    operator,
    problem,
    values_and_gradients,
)
from benchmarks.targets import missed

pytestmark = pytest.mark.bench
ROUNDS = 5
CASE = Case(rows=5, segments=12, keys=3840, text=256, heads=14, kv_heads=2, dim=64)
LAYERS, SUPERVISED = 28, 6
OURS, OUR_LAYERS = "noun rows, one layer", f"noun rows, {SUPERVISED} layers"
RELEASE = f"release: {CASE.text} text rows, {LAYERS} layers"
WAYS = {
    OURS: operator,
    "gather, repeated keys": gather,
    "gather, grouped": grouped,
    "identity SDPA": identity_sdpa,
    "eager, one layer": eager,
    OUR_LAYERS: lambda p: [operator(p) for _ in range(SUPERVISED)],
    RELEASE: partial(all_text_rows, layers=LAYERS, supervised=SUPERVISED),
}
AGAINST = {name: OUR_LAYERS if name in (OUR_LAYERS, RELEASE) else OURS for name in WAYS}


def test_noun_rows_against_gather_eager_and_the_release_on_a_cpu(benchmark):
    p = problem(CASE)
    want: dict[str, tuple[torch.Tensor, ...]] = {}
    ways: dict[str, dict[str, Any]] = {}
    for name, way in WAYS.items():
        got = values_and_gradients(way, p)  # correct before anything is measured
        for x, y in zip(got, want.setdefault(AGAINST[name], got)):
            torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-3)
        with PeakMemory() as memory:
            flat, dq, dk = values_and_gradients(way, p)
        base = ways.get(AGAINST[name], {})
        peak, beyond = memory.peak() / MIB, memory.peak(dq, dk) / MIB
        ways[name] = {
            "against": AGAINST[name],
            "peak_mib": peak,
            "peak_beyond_gradients_mib": beyond,
            "memory": peak / base.get("peak_mib", peak),
            "memory_beyond_gradients": beyond / base.get("peak_beyond_gradients_mib", beyond),
        }
        del got, flat, dq, dk
    seconds = in_turns(benchmark, {name: partial(values_and_gradients, way, p) for name, way in WAYS.items()}, ROUNDS)
    for name, way in ways.items():
        way |= {"seconds": min(seconds[name]), "time": ratios(seconds[name], seconds[AGAINST[name]])}
        print(f"\n{name}: {way}")
    result = {"shape": CASE._asdict() | {"layers": LAYERS, "supervised_layers": SUPERVISED}, "ways": ways}
    benchmark.extra_info |= result
    write_result("cpu_noun_rows", result)
    # A busy machine may miss a target of time; memory is the same on any.
    assert not [target for target in missed({"cpu_noun_rows": result}) if "memory" in target.name]
