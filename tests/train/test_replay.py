"""Promise: `swim data replay` gives, bit for bit, the batches behind a step's loss, or says why it cannot."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import ROOT
from recorded_training import train_recorded
from safetensors.torch import load_file
from tiny import make_data, tiny_config
from typer.testing import CliRunner, Result

from swim.train.cli import app
from swim.train.loader import Loader, Order
from swim.train.replay import batch_tensors, replay
from swim.train.system import build_system


def swim(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "replay", *map(str, arguments)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """Two folders of clips, one sample of them damaged, and a run of 6 steps about them in three parts: killed on two
    ranks in step 3, before any checkpoint, then begun anew on one, killed in step 4, and resumed."""
    folder = tmp_path_factory.mktemp("replay")
    for name, clips in (("a", 7), ("b", 5)):
        shards = make_data(folder / name, clips=clips, seed=clips)
    entry = shards.entries[2]
    with (folder / "b" / entry.shard).open("r+b") as file:
        file.seek(entry.members["mp4"][0] + 100)
        file.write(b"\xff" * 40)
    train = json.dumps([str(folder / "a"), {"path": str(folder / "b"), "repeat": 1.5}])
    options = [f"data.train={train}", f"run.output={folder}", "run.name=run", "run.steps=6", "run.save_every=2"]
    packs = ["data.packed=true", "data.shared_prefix=true", "data.clips_per_pack=null", "data.tokens_per_pack=420"]
    drawn = ["data.packs_per_step=3", "data.max_conversations=4", "data.tasks=null", "optim.warmup_steps=2"]

    def config(*more: str):
        return tiny_config(folder / "a", *options, *packs, *drawn, *more)

    train_recorded(config("run.save_every=0"), folder / "two", ranks=2, kill_in_step=3)
    shutil.copytree(folder / "run", folder / "killed")
    train_recorded(config(), folder / "one", ranks=1, kill_in_step=4)
    train_recorded(config("data.workers=1"), folder / "one", ranks=1)
    return folder


def equal_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    assert a.keys() == b.keys()
    return all(a[k].dtype == b[k].dtype and a[k].shape == b[k].shape and a[k].equal(b[k]) for k in a)


def test_replayed_batches_are_bit_for_bit_those_of_training(trained, tmp_path):
    lines = [json.loads(line) for line in (trained / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    seen = []
    for run, batches, steps, ranks in (("killed", "two", (1, 2, 3), 2), ("run", "one", (1, 2, 3, 4, 5, 6), 1)):
        for step in steps:
            result = swim(trained / run, "--step", step, "--tensors", tmp_path / "t.safetensors", "--json")
            assert result.exit_code == 0, result.output
            told = json.loads(result.stdout)
            assert told["ranks"] == ranks
            made = load_file(tmp_path / "t.safetensors")
            files = [load_file(trained / batches / f"step{step}_rank{rank}.safetensors") for rank in range(ranks)]
            assert equal_bits(made, {name: tensor for file in files for name, tensor in file.items()})
            assert any(name.endswith("inputs.pixel_values_videos") for name in made)
            assert any(".targets.groups." in name for name in made)
            finished = (run, step) != ("killed", 3)
            assert told["differences"] == ([] if finished else None)
            assert (told["logged"] is None) == (not finished)
            if run == "run":
                assert told["logged"] == lines[step - 1]
                assert [hole["id"] for one in told["micro_batches"] for hole in one["holes"]] == [
                    line["id"] for line in told["quarantined"]
                ]
                seen += [len(told["quarantined"])]
    assert sum(seen), "the damaged clip must have come"
    parts = [json.loads(line) for line in (trained / "run" / "parts.jsonl").read_text().splitlines()]
    assert [(part["step"], part["ranks"]) for part in parts] == [(1, 1), (3, 1)]


def test_other_numbers_of_ranks_share_the_same_packs(trained):
    one = replay(trained / "run", 4)
    assert one.differences == []
    for ranks in (2, 3, 4):
        other = replay(trained / "run", 4, num_ranks=ranks)
        assert other.differences is None, "the log is about another number of ranks"
        by_turn = sorted(other.micro_batches, key=lambda m: (m.number, m.rank))
        assert [m.pack for m in by_turn if m.pack] == [m.pack for m in one.micro_batches if m.pack]
        for a, b in zip((m for m in by_turn if m.pack), one.micro_batches):
            assert equal_bits(dict(batch_tensors(a.batch, "x")), dict(batch_tensors(b.batch, "x")))
        alone = replay(trained / "run", 4, num_ranks=ranks, rank=1)
        assert [m.batch.ids for m in alone.micro_batches] == [m.batch.ids for m in other.micro_batches if m.rank == 1]
        # What a run that resumes on so many ranks would read.
        order = Order(one.config, system := build_system(one.config))
        order.resume(one.position)
        with Loader(order, system.collator, rank=1, size=ranks) as loader:
            (batches,) = loader.steps(3, 4)
        assert [batch.ids for batch in batches] == [m.batch.ids for m in alone.micro_batches]


def test_the_report_and_the_page_name_exactly_these_samples(trained, tmp_path):
    step = next(s for s in range(1, 7) if any(m.batch.holes for m in replay(trained / "run", s).micro_batches))
    result = swim(trained / "run", "--step", step, "--out", tmp_path / "page.html")
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"step {step} of 6: step ")
    assert "counts and holes are those of the log" in result.stdout
    logged = json.loads((trained / "run" / "metrics.jsonl").read_text().splitlines()[step - 1])
    assert f"loss/total {logged['loss/total']:.6g}" in result.stdout
    found = replay(trained / "run", step)
    page = (tmp_path / "page.html").read_text()
    for one in found.micro_batches:
        for name in one.batch.ids:
            assert name in result.stdout
            assert f"<h3>{name} " in page
        for hole in one.batch.holes:
            assert f"hole {hole.id}: " in result.stdout
            assert hole.id in page
    assert page.count("<h3>synth") == sum(len(one.batch.ids) for one in found.micro_batches)


def test_changed_data_is_refused_and_damage_is_told(trained, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(trained / "run", moved / "run")
    for name in "ab":
        shutil.copytree(trained / name, moved / name)
    folders = ("--data", moved / "a", "--data", moved / "b")
    assert swim(moved / "run", "--step", 2, *folders).exit_code == 0, "run and folders may move"
    assert swim(moved / "run", "--step", 2, "--data", moved / "a").exit_code == 2
    # Bytes of a video that has been read before: the index knows nothing of it, the log does.
    found = replay(moved / "run", 2, data=[str(moved / "a"), str(moved / "b")])
    _, key, _ = next(unit for unit in found.units() if unit[0].folder == moved / "a")
    shards = found.shards[0]
    entry = next(entry for entry in shards.entries if entry.key == key)
    tar = moved / "a" / entry.shard
    data = bytearray(tar.read_bytes())
    data[entry.members["mp4"][0] + 100] ^= 1
    tar.write_bytes(data)
    result = swim(moved / "run", "--step", 2, *folders)
    assert result.exit_code == 1
    assert "NOT the batches of then" in result.stdout
    assert f"{key}#" in result.stdout
    assert "cannot be read any more" in result.stdout
    make_data(moved / "c", clips=7, seed=8)
    result = swim(moved / "run", "--step", 2, "--data", moved / "c", "--data", moved / "b")
    assert result.exit_code == 2
    assert f"data.train[0] ({moved / 'c'}) has other shards" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--step", 0), "--step 0 is outside 1 to 6"),
        (("--step", 7), "--step 7 is outside 1 to 6"),
        (("--step", 1, "--rank", 1), "--rank 1 is outside 0 to 0; give --world-size"),
    ],
)
def test_what_is_not_there_is_one_message(trained, tmp_path, arguments, said):
    result = swim(trained / "run", *arguments)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "no config.yaml in it" in swim(tmp_path, "--step", 1).stderr


def test_replaying_needs_no_engine():
    """Which would print its own lines between those of --json, and take seconds to load."""
    code = "import sys, swim.train.replay, swim.train.cli; print('deepspeed' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout == "False\n"
