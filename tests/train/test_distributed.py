"""Promise: two ZeRO-3 processes compute what one plain torch loop does, whatever the ranks hold; runs resume bit for
bit."""

import json
import math
import os
import shutil
import signal
import time
from pathlib import Path
from random import Random

import pytest
import torch
from processes import TINY, curve, finish, kill, metrics, rank_processes, run, start
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import family_config, largest_difference, make_data
from transformers import AutoModelForImageTextToText

from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardWriter
from swim.train.checkpoint import verify
from swim.train.config import load_config
from swim.train.loader import Loader, Order
from swim.train.loop import combine, learning_rate
from swim.train.system import Progress, build_system

# A key's bias has no gradient but rounding; Adam's own epsilon of 1e-8 would make steps of full length out of it.
EPSILON = 1e-6
# Every parameter is partitioned, none is kept whole on each rank for being small.
PARTITION_ALL = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    """Clips with very different numbers of nouns, and records without any clip."""
    folder = tmp_path_factory.mktemp("mixed")
    make_data(folder / "clips", clips=6)
    with ShardWriter(folder / "text") as writer:
        for number in range(6):
            turns = [Turn(role="user", text="is a circle round ?"), Turn(role="assistant", text="yes")]
            record = Record(
                source="test",
                license="CC0-1.0",
                media=[],
                objects=[],
                conversations=[Conversation(task="text", turns=turns)],
            )
            writer.write(f"text_{number}", record, {}, {})
    base = load_config("tiny_cpu", ["data.synth=null"])
    system = build_system(base)
    system.build_model().save_pretrained(folder / "base")
    system.tokenizer.save_pretrained(folder / "base")
    for model_type in ("qwen2_vl", "qwen3_vl"):
        system = build_system(family_config(folder, model_type))
        system.build_model().save_pretrained(folder / model_type)
        system.tokenizer.save_pretrained(folder / model_type)
    adam = {"torch_adam": True, "eps": EPSILON}
    engine = {"zero_optimization": PARTITION_ALL, "optimizer": {"type": "AdamW", "params": adam}}
    (folder / "engine.json").write_text(json.dumps(engine))
    return folder


def arguments(mixed: Path, *overrides: str) -> list[str]:
    folders = f"data.train=[{mixed / 'clips'}, {mixed / 'text'}]"
    return [*TINY, folders, f"deepspeed={mixed / 'engine.json'}", *from_base(mixed), *overrides]


def from_base(mixed: Path) -> list[str]:
    # Loaded, not drawn: random numbers are drawn in another order when parameters are partitioned as they are made.
    return [f"model.path={mixed / 'base'}", "model.config=null", "model.tokenizer=null"]


@pytest.mark.parametrize(
    ("base", "layout"),
    [
        ("base", ()),
        ("base", ("data.packed=true", "model.checkpointing=true")),
        pytest.param("qwen2_vl", ("system.layers=[0, 2]",), marks=pytest.mark.slow),
        pytest.param("qwen3_vl", ("system.layers=[0, 2]",), marks=pytest.mark.slow),
    ],
    ids=["shared", "packed-checkpointed", "qwen2_vl", "qwen3_vl"],
)
def test_two_ranks_equal_a_plain_torch_loop(mixed, tmp_path, base, layout):
    """The ranks share prefixes; the plain loop has one padded sequence for every conversation."""
    # Three packs on two ranks: rank 1 fills its second micro-batch with a dummy pack.
    options = arguments(
        mixed,
        "run.name=two",
        "run.steps=5",
        "data.packs_per_step=3",
        "run.seed=4",
        "optim.lr=2e-4",
        "system.gradient_every=0",
        *layout,
        f"model.path={mixed / base}",
    )
    run(options, cwd=tmp_path)

    config = load_config("tiny_cpu", [*options[2:], "data.shared_prefix=false", "data.packed=false"])
    order, system = Order(config), build_system(config)
    nouns_by_rank = [
        [sum(b.counts["mask"] for b in load_step(order, system, step, rank, 2)) for rank in (0, 1)] for step in range(4)
    ]
    assert any(0 in nouns and max(nouns) > 0 for nouns in nouns_by_rank), (
        f"one rank must be text-only once: {nouns_by_rank}"
    )
    assert any(0 < nouns[0] != nouns[1] > 0 for nouns in nouns_by_rank), f"uneven nouns must occur: {nouns_by_rank}"

    model = system.build_model().train()
    optimizer = torch.optim.AdamW(system.param_groups(model), lr=config.optim.lr, betas=config.optim.betas, eps=EPSILON)
    for step, line in enumerate(metrics(tmp_path / "runs" / "two")):
        batches = load_step(order, system, step, 0, 1)
        counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
        sums = dict.fromkeys(("text", "mask"), 0.0)
        for batch in batches:
            loss = system.loss(model, batch, Progress(step, 5))
            combine(loss, counts).backward()
            for name, term in loss.items():
                sums[name] += float(term.sum.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        for name in sums:
            assert line[f"loss/{name}"] == pytest.approx(sums[name] / max(counts[name], 1), abs=2e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert line["count/mask"] == counts["mask"]
    files = [folder / "model.safetensors" for folder in (mixed / base, tmp_path / "runs" / "two" / "model")]
    with safe_open(files[0], "pt") as before, safe_open(files[1], "pt") as saved:
        assert before.keys() == saved.keys(), "the names of the base's own file"
    trained = parameters(stock(tmp_path / "runs" / "two" / "model"))
    assert largest_difference(parameters(model), trained) < 1e-5
    assert largest_difference(parameters(stock(mixed / base)), trained) > 5e-4, "training must move the weights"


@pytest.mark.slow
def test_one_to_four_ranks_train_alike(mixed, tmp_path):
    """Real runs with a token budget and a mixture: five packs a step, dealt out unevenly."""
    shares = f"data.train=[{mixed / 'clips'}, {{path: {mixed / 'text'}, repeat: 1.5}}]"
    budget = ["data.clips_per_pack=null", "data.tokens_per_pack=420", "data.packed=true", "data.packs_per_step=5"]
    options = arguments(mixed, shares, *budget, "run.steps=3", "run.seed=4", "optim.lr=2e-4")
    for ranks in range(1, 5):
        run([*options, f"run.name=ranks{ranks}", f"launch.ranks={ranks}"], cwd=tmp_path, timeout_s=400)
    one, *others = (tmp_path / "runs" / f"ranks{ranks}" for ranks in range(1, 5))
    for other in others:
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert {k: v for k, v in a.items() if k.startswith("count/")} | {"count/tokens": 0} == {
                k: v for k, v in b.items() if k.startswith("count/")
            } | {"count/tokens": 0}, "but for the tokens of dummy packs"
            for name in ("loss/text", "loss/mask", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6)
        trained = [parameters(stock(folder / "model")) for folder in (one, other)]
        assert largest_difference(*trained) < 1e-6
    assert largest_difference(parameters(stock(mixed / "base")), trained[0]) > 1e-4, "training must move the weights"


def stock(folder: Path) -> torch.nn.Module:
    """The model as any user of transformers loads it; nothing may be missing or unexpected."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_step(order, system, step, rank, size):
    return next(Loader(order, system.collator, rank=rank, size=size).steps(step, step + 1))


def test_the_mask_loss_alone_trains_every_supervised_layer_under_zero3_and_checkpointing(mixed, tmp_path):
    only_mask = [
        "system.text_weight=0",
        "system.gradient_every=1",
        "model.checkpointing=true",
        "data.tasks=[direction]",
    ]
    options = [
        *TINY,
        f"data.train=[{mixed / 'clips'}]",
        f"deepspeed={mixed / 'engine.json'}",
        *from_base(mixed),
        *only_mask,
    ]
    run([*options, "run.name=mask", "run.steps=3", "data.packs_per_step=2"], cwd=tmp_path)
    for line in metrics(tmp_path / "runs" / "mask"):
        for name in ("q1", "k1", "q3", "k3"):
            assert line[f"mask_grad/{name}"] > 0
        assert line["grad_norm"] > 0
        assert math.isfinite(line["loss/mask"])
    before, after = parameters(stock(mixed / "base")), parameters(stock(tmp_path / "runs" / "mask" / "model"))
    for layer in (1, 3):
        for side in "qk":
            name = f"model.language_model.layers.{layer}.self_attn.{side}_proj.weight"
            assert (before[name] - after[name]).abs().max() > 1e-5
    # Nothing flows from the maps to what lies above them: the head moves only by the text loss.
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


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


def test_order_does_not_depend_on_the_number_of_ranks(mixed):
    config = load_config("tiny_cpu", [*arguments(mixed, "data.packs_per_step=5")[2:]])
    order = Order(config)
    for step in range(3):
        alone = order.packs(step, 0, 1)
        for size in (2, 3, 8):
            ranks = [order.packs(step, rank, size) for rank in range(size)]
            assert len({len(packs) for packs in ranks}) == 1
            interleaved = [packs[i] for i in range(len(ranks[0])) for packs in ranks]
            assert [pack for pack in interleaved if pack is not None] == [pack for pack in alone if pack is not None]
