"""Measures, on a CPU, what supervision adds to the time and memory of a training step of the tiny model; `make bench`
prints it. Nothing here passes or fails on time."""

from functools import partial
from typing import Any

import pytest
import torch
from tiny import make_batch, make_data, tiny_config

from benchmarks.measure import MIB, PeakMemory, in_turns, ratios, write_result
from swim.train.loop import combine
from swim.train.system import Progress, build_system

pytestmark = pytest.mark.bench
ROUNDS = 31
KINDS = {
    "plain": [],  # the stock model and its text loss: nothing is captured
    "mask loss measured, not trained": ["system.mask_weight=0"],
    "supervised": [],
    "supervised, pixel side": ["system.mask_side=pixel", "system.loss=bce"],
    "supervised, gradient measured": ["system.gradient_every=1"],
}


def text_loss(model, batch):
    """What plain fine-tuning computes, without any of ours."""
    logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns).logits
    picked = logits[batch.label_rows, batch.label_slots].float()
    return torch.nn.functional.cross_entropy(picked, batch.labels)


def step(kind, system, model, batch):
    if kind == "plain":
        text_loss(model, batch).backward()
    else:
        combine(system.loss(model, batch, Progress(0, 1)), batch.counts).backward()
    model.zero_grad()
    system.after_backward()


def test_supervised_step_against_plain_step(tmp_path, benchmark):
    shards = make_data(tmp_path / "clips", clips=3)
    steps, kinds = {}, {}
    for kind, overrides in KINDS.items():
        fixed = ("system.layers=[1, 2, 3]", "system.gradient_every=0")
        system = build_system(tiny_config(shards.folder, *fixed, *overrides))
        batch = make_batch(system, shards, [0, 1, 2], [0, 2, 4])
        steps[kind] = partial(step, kind, system, system.build_model().train(), batch)
        steps[kind]()
        with PeakMemory() as memory:
            steps[kind]()
        figures: dict[str, Any] = {"peak_mib": memory.peak() / MIB}
        kinds[kind] = figures
        figures["memory"] = figures["peak_mib"] / kinds["plain"]["peak_mib"]
    seconds = in_turns(benchmark, steps, ROUNDS)
    for kind, figures in kinds.items():
        figures |= {"seconds": min(seconds[kind]), "time": ratios(seconds[kind], seconds["plain"])}
        print(f"\n{kind}: {figures}")
    benchmark.extra_info |= kinds
    write_result("cpu_step", {"kinds": kinds})
