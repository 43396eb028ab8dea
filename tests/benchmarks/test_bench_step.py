"""Measures, on a CPU, what supervision adds to a training step; `make bench` prints it. Nothing here passes or fails on
time.

The three kinds of step take turns, so that a busy machine disturbs all of them alike; only ratios within one run mean
anything.
"""

import json
import platform
import resource
import statistics
import time
from pathlib import Path

import pytest
import torch
from tiny import make_batch, make_data, tiny_config

from swim.train.loop import combine
from swim.train.system import Progress, build_system

pytestmark = pytest.mark.bench
ROUNDS = 15
KINDS = {
    "plain": [],  # the stock model and its text loss: nothing is captured
    "mask loss measured, not trained": ["system.mask_weight=0"],
    "supervised": [],
    "supervised, gradient measured": ["system.gradient_every=1"],
}


def text_loss(model, batch):
    """What plain fine-tuning computes, without any of ours."""
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns).logits
    picked = logits[batch.label_rows, batch.label_slots].float()
    return torch.nn.functional.cross_entropy(picked, batch.labels)


def test_supervised_step_against_plain_step(tmp_path):
    shards = make_data(tmp_path / "clips", clips=3)
    steps = {}
    for kind, overrides in KINDS.items():
        system = build_system(
            tiny_config(shards.folder, "system.layers=[1, 2, 3]", "system.gradient_every=0", *overrides)
        )
        steps[kind] = (system, system.build_model().train(), make_batch(system, shards, [0, 1, 2], [0, 2, 4]))
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(ROUNDS + 2):
        for kind, (system, model, batch) in steps.items():
            began = time.perf_counter()
            if kind == "plain":
                text_loss(model, batch).backward()
            else:
                combine(system.loss(model, batch, Progress(0, 1)), batch.counts).backward()
            seconds[kind].append(time.perf_counter() - began)
            model.zero_grad()
            system.after_backward()
    ratios = {
        kind: [a / b for a, b in zip(times[2:], seconds["plain"][2:])]
        for kind, times in seconds.items()
        if kind != "plain"
    }
    result = {
        kind: {"median": statistics.median(r), "quartiles": statistics.quantiles(r, n=4)} for kind, r in ratios.items()
    }
    result["machine"] = f"{platform.machine()}, one thread"
    result["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    Path("benchmarks/results").mkdir(parents=True, exist_ok=True)
    Path("benchmarks/results/cpu_step.json").write_text(json.dumps(result, indent=1) + "\n")
    for kind, r in ratios.items():
        print(f"\n{kind} / plain step: median {statistics.median(r):.3f}, quartiles {statistics.quantiles(r, n=4)}")
