"""Measures, on a CPU, a step with shared prefixes against one with separate sequences; `make bench` prints it."""

from functools import partial

import pytest
from tiny import make_batch, make_data, tiny_config

from benchmarks.measure import MIB, PeakMemory, in_turns, ratios, write_result
from swim.train.loop import combine
from swim.train.system import Progress, build_system

pytestmark = pytest.mark.bench
ROUNDS = 15
LAYOUTS = {
    "separate": ["data.shared_prefix=false"],
    "shared prefix": ["data.shared_prefix=true"],
    "shared prefix, packed": ["data.shared_prefix=true", "data.packed=true"],
}


def step(system, model, batch):
    combine(system.loss(model, batch, Progress(0, 1)), batch.counts).backward()
    model.zero_grad()


def test_shared_prefix_step_against_separate_sequences(tmp_path, benchmark):
    """Three clips with three questions each, as in the demo."""
    shards = make_data(tmp_path / "clips", clips=3)
    steps, layouts = {}, {}
    for name, overrides in LAYOUTS.items():
        fixed = ("system.layers=[1, 2, 3]", "system.gradient_every=0")
        system = build_system(tiny_config(shards.folder, *fixed, *overrides))
        batch = make_batch(system, shards, [0, 1, 2], [0, 2, 4])
        steps[name] = partial(step, system, system.build_model().train(), batch)
        steps[name]()
        with PeakMemory() as memory:
            steps[name]()
        layouts[name] = {"tokens": batch.num_tokens, "peak_mib": memory.peak() / MIB}
        layouts[name]["memory"] = layouts[name]["peak_mib"] / layouts["separate"]["peak_mib"]
    seconds = in_turns(benchmark, steps, ROUNDS)
    for name, figures in layouts.items():
        figures |= {"seconds": min(seconds[name]), "time": ratios(seconds[name], seconds["separate"])}
        print(f"\n{name}: {figures}")
    benchmark.extra_info |= layouts
    write_result("cpu_shared_prefix", {"layouts": layouts})
