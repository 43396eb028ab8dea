"""Promise: shards are the fast path, not a toll gate: a step on JSONL and loose videos is that on converted shards."""

from pathlib import Path

import torch
from loose_files import write_loose
from tiny import gradients, largest_difference, make_data, tiny_config
from typer.testing import CliRunner

from swim.data_tools.convert import convert
from swim.data_tools.shards import ShardSet
from swim.data_tools.sources import jsonl
from swim.train.cli import app
from swim.train.loader import Loader, Order
from swim.train.loop import combine
from swim.train.system import Progress, build_system


def one_step(data: Path, output: Path):
    """Plan of the first epoch, and counts and gradients of its second step."""
    config = tiny_config(data, "data.tasks=null", "data.packs_per_step=2", f"run.output={output}")
    torch.manual_seed(0)
    system = build_system(config)
    order, model = Order(config, system), system.build_model().train()
    batches = next(Loader(order, system.collator).steps(1, 2))
    counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
    for batch in batches:
        assert batch.ids
        assert not batch.holes
        combine(system.loss(model, batch, Progress(1, 2)), counts).backward()
    return order.plan(0), counts, gradients(model)


def test_a_step_on_jsonl_is_that_of_the_converted_shards(tmp_path: Path) -> None:
    mine = write_loose(tmp_path / "loose", make_data(tmp_path / "clips", clips=5))
    convert(jsonl.SOURCE, [mine], tmp_path / "shards")
    (plan, counts, gradient), (other_plan, other_counts, other) = (
        one_step(data, tmp_path / "runs") for data in (mine, tmp_path / "shards")
    )
    for name in ("clips", "unit_bounds", "chosen", "pack_bounds"):
        assert getattr(plan, name).tolist() == getattr(other_plan, name).tolist()
    assert counts == other_counts
    assert max(float(g.abs().max()) for g in gradient.values()) > 1e-3
    assert largest_difference(gradient, other) == 0.0
    assert plan.digest != other_plan.digest, "a run does not resume on the other form, whose samples have other names"


def test_plan_and_inspect_take_jsonl(tmp_path: Path) -> None:
    mine = write_loose(tmp_path / "loose", make_data(tmp_path / "clips", clips=3))
    run = CliRunner()
    common = [f"data.train={mine}", "data.synth=null", f"run.output={tmp_path}"]
    plan = run.invoke(app, ["data", "plan", "tiny_cpu", *common])
    assert plan.exit_code == 0, plan.output
    assert f"{mine}: 3 clips x 1" in plan.stdout
    page = tmp_path / "page.html"
    result = run.invoke(app, ["data", "inspect", str(mine), "--recipe", "tiny_cpu", "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert ShardSet(mine).keys()[0] in page.read_text()
