"""Promise: runs resume bit for bit, on other numbers of ranks to rounding, and not from what is damaged."""

import json
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from mixed import arguments, make_mixed
from processes import TINY, curve, finish, kill, metrics, rank_processes, run, start
from safetensors.torch import load_file
from tiny import make_data

from swim.train.checkpoint import verify
from swim.train.config import load_config
from swim.train.loader import Order


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return make_mixed(tmp_path_factory.mktemp("mixed"))


def test_a_killed_run_resumes_bit_for_bit(mixed, tmp_path):
    options = arguments(mixed, "run.steps=12", "run.save_every=3", "data.packs_per_step=2")
    run([*options, "run.name=whole"], cwd=tmp_path)
    whole = tmp_path / "runs" / "whole"
    process = start([*options, "run.name=killed"], cwd=tmp_path)
    killed = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step_00000003").exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    kill(process)
    process.communicate()
    assert not (killed / "done.json").exists()
    (killed / "metrics.jsonl").open("a").write('{"step": 4, "torn')  # what a crash in mid-write leaves
    # Loader processes hold no position: their number may change in mid-run.
    output = run([*options, "run.name=killed", "data.workers=2"], cwd=tmp_path)
    assert "resuming from" in output
    assert curve(whole) == curve(killed)
    assert (whole / "model" / "model.safetensors").read_bytes() == (killed / "model" / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_ten_kills_of_a_random_rank_leave_the_undisturbed_curve(mixed, tmp_path):
    options = arguments(mixed, "run.steps=100", "run.save_every=2", "data.packs_per_step=2", "launch.ranks=2")
    run([*options, "run.name=whole"], cwd=tmp_path, timeout_s=600)
    whole, killed = tmp_path / "runs" / "whole", tmp_path / "runs" / "killed"
    random, kills = Random(7), 0
    while kills < 10:
        process = start([*options, "run.name=killed"], cwd=tmp_path)
        before = checkpoint_time(killed)
        while process.poll() is None and checkpoint_time(killed) == before:
            time.sleep(0.01)
        time.sleep(random.uniform(0, 0.5))  # a step and its save take about 0.1 s each
        victim = rank_processes("killed").get(random.randrange(2))
        assert victim is not None, process.communicate()[0][-3000:]
        os.kill(victim, signal.SIGKILL)
        code, output = finish(process)
        assert not (killed / "done.json").exists(), "more steps are needed for ten kills"
        assert code != 0, output[-3000:]
        kills += 1
        for path in (killed / "checkpoints").glob("step_*"):
            verify(path)
    output = run([*options, "run.name=killed"], cwd=tmp_path, timeout_s=600)
    assert "resuming from" in output
    assert curve(whole) == curve(killed)
    assert (whole / "model" / "model.safetensors").read_bytes() == (killed / "model" / "model.safetensors").read_bytes()


def checkpoint_time(folder: Path) -> int:
    last = folder / "checkpoints" / "last"
    return last.lstat().st_mtime_ns if last.is_symlink() else 0


@pytest.mark.slow
@pytest.mark.parametrize("stage", [3, 2])
def test_a_run_goes_on_with_another_number_of_ranks(mixed, tmp_path, stage):
    """2 -> 1 -> 2 -> 4 ranks, with a frozen vision tower, against two ranks throughout."""
    engine = json.loads((mixed / "engine.json").read_text())
    engine["zero_optimization"]["stage"] = stage
    (tmp_path / "engine.json").write_text(json.dumps(engine))
    more = [f"deepspeed={tmp_path / 'engine.json'}", "model.freeze=['visual']", "optim.weight_decay=0.1"]
    options = arguments(mixed, "run.steps=35", "data.packs_per_step=4", "run.keep=9", *more)
    run([*options, "run.name=whole", "launch.ranks=2"], cwd=tmp_path, timeout_s=600)
    parts = [(2, 5), (1, 15), (2, 25), (4, 35)]
    for number, end in parts:
        output = run(
            [*options, "run.name=parts", f"launch.ranks={number}", f"run.stop_after={end}"], cwd=tmp_path, timeout_s=600
        )
        assert end == 5 or f"repartitioned for {number}" in output
    whole, changed = (tmp_path / "runs" / name for name in ("whole", "parts"))
    lines = list(zip(metrics(whole), metrics(changed), strict=True))
    worst = max(abs(a[name] - b[name]) for a, b in lines for name in ("loss/text", "loss/mask", "loss/total"))
    print(f"ZeRO-{stage}: largest difference of a loss {worst:.2e}")
    assert worst < 1e-5
    frozen = [
        json.loads((changed / "checkpoints" / f"step_{end:08d}" / "manifest.json").read_text()) for _, end in parts
    ]
    assert len(frozen[0]["frozen"]) > 10
    assert all(manifest["frozen"] == frozen[0]["frozen"] for manifest in frozen)
    base, trained = (load_file(folder / "model.safetensors") for folder in (mixed / "base", changed / "model"))
    assert all(torch.equal(base[name], trained[name]) == ("visual" in name) for name in base)


def test_a_damaged_checkpoint_is_refused_and_another_configuration_too(mixed, tmp_path):
    options = arguments(mixed, "run.steps=4", "data.packs_per_step=2", "run.name=stopped")
    run([*options, "run.stop_after=2"], cwd=tmp_path)
    folder = tmp_path / "runs" / "stopped"
    assert not (folder / "model").exists(), "a run that stopped early has no final model"
    code, output = finish(start([*options, "optim.lr=0.5"], cwd=tmp_path))
    assert code == 2
    assert "another configuration" in output
    assert " was " in output

    # The share of a folder is a part of the order, not of the configuration: folders may move.
    shares = f"data.train=[{mixed / 'clips'}, {{path: {mixed / 'text'}, repeat: 2}}]"
    code, output = finish(start([*options, shares], cwd=tmp_path))
    assert code == 2
    assert f"data.train[1] ({mixed / 'text'}) came 1 times an epoch, now 2. Restore that to resume, or start" in output

    (victim,) = (folder / "checkpoints" / "step_00000002").glob("*rank_1_*optim_states.pt")
    damaged = bytearray(victim.read_bytes())
    damaged[len(damaged) // 2] ^= 1
    victim.write_bytes(damaged)
    code, output = finish(start(options, cwd=tmp_path))
    assert code != 0
    assert f"{victim.name} is not what was written" in output
    assert "delete this folder" in output


def test_a_damaged_sample_is_a_listed_hole_and_the_run_goes_on(tmp_path):
    shards = make_data(tmp_path / "clips", clips=6)
    entry = shards.entries[2]
    offset, size, _ = entry.members["mp4"]
    with (tmp_path / "clips" / entry.shard).open("r+b") as file:
        file.seek(offset + size // 2)
        file.write(b"\xff" * 40)
    options = [*TINY, f"data.train=[{tmp_path / 'clips'}]", "data.tasks=[direction]", "data.packs_per_step=2"]
    run([*options, "run.name=hole", "run.steps=3"], cwd=tmp_path)
    folder = tmp_path / "runs" / "hole"
    lines = [json.loads(line) for line in (folder / "quarantine.jsonl").read_text().splitlines()]
    assert {line["id"] for line in lines} == {f"{entry.key}#{i}" for i in (0, 2, 4)}
    assert all("CRC32" in line["reason"] and line["shard"] == entry.shard for line in lines)
    # The clip's pack keeps its step and its rank: one step has three nouns fewer, no other sample came in its place.
    order = Order(load_config("tiny_cpu", [*options[2:], "run.steps=3"]))
    (step,) = [s for s in range(3) if any(unit.clip == 2 for pack in order.plan(0).step(s) for unit in pack)]
    assert [line["count/nouns"] for line in metrics(folder)] == [3.0 if s == step else 6.0 for s in range(3)]
    assert (folder / "done.json").exists()
    shutil.rmtree(folder)
    code, output = finish(start([*options, "run.name=hole", "run.steps=3", "data.max_bad=2"], cwd=tmp_path))
    assert code != 0
    assert "data.max_bad is 2" in output
    assert "quarantine.jsonl" in output
    assert f"step {step + 1}: 3 conversations could not be read so far" in output
    assert "Most often: 3 x" in output
