"""Measures, on a CPU, a step with shared prefixes against one with separate sequences; `make bench` prints it.

The kinds of step take turns, so that a busy machine disturbs all of them alike; only ratios within one run mean
anything.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import pytest
from tiny import make_batch, make_data, tiny_config

from swim.train.loop import combine
from swim.train.system import Progress, build_system

pytestmark = pytest.mark.bench
ROUNDS = 15
LAYOUTS = {
    "separate": ["data.shared_prefix=false"],
    "shared prefix": ["data.shared_prefix=true"],
    "shared prefix, packed": ["data.shared_prefix=true", "data.packed=true"],
}


def test_shared_prefix_step_against_separate_sequences(tmp_path):
    """Three clips with three questions each, as in the demo."""
    shards = make_data(tmp_path / "clips", clips=3)
    steps = {}
    for name, overrides in LAYOUTS.items():
        system = build_system(
            tiny_config(shards.folder, "system.layers=[1, 2, 3]", "system.gradient_every=0", *overrides)
        )
        steps[name] = (system, system.build_model().train(), make_batch(system, shards, [0, 1, 2], [0, 2, 4]))
    seconds: dict[str, list[float]] = {name: [] for name in LAYOUTS}
    for _ in range(ROUNDS + 2):
        for name, (system, model, batch) in steps.items():
            began = time.perf_counter()
            combine(system.loss(model, batch, Progress(0, 1)), batch.counts).backward()
            seconds[name].append(time.perf_counter() - began)
            model.zero_grad()
    result: dict[str, object] = {"machine": f"{platform.machine()}, one thread"}
    for name, (_, _, batch) in steps.items():
        ratios = [a / b for a, b in zip(seconds[name][2:], seconds["separate"][2:])]
        quartiles = statistics.quantiles(ratios, n=4)
        result[name] = {
            "tokens": batch.num_tokens,
            "time_against_separate": {"median": quartiles[1], "quartiles": quartiles},
        }
        print(f"\n{name}: {batch.num_tokens} tokens, time against separate {quartiles[1]:.2f} {quartiles}")
    Path("benchmarks/results").mkdir(parents=True, exist_ok=True)
    Path("benchmarks/results/cpu_shared_prefix.json").write_text(json.dumps(result, indent=1) + "\n")
