"""Promise: ranks that hold a micro-batch together compute what one rank does: loss, every gradient, logged norms."""

import json
import math
import multiprocessing
from pathlib import Path

import pytest
import torch
from processes import curve, metrics
from sequence_ranks import train_on_ranks
from tiny import family_config, gradients, largest_difference, make_data, tiny_config

from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardWriter
from swim.kernels.noun_attention import build_work_table
from swim.train.__main__ import free_port
from swim.train.attention import Capture
from swim.train.config import Config, ConfigError, load_config
from swim.train.families import FAMILIES
from swim.train.loader import Loader, Order
from swim.train.loop import combine
from swim.train.plan_report import plan_report
from swim.train.replay import replay
from swim.train.system import Progress, build_system

SHARED, PACKED = ("data.shared_prefix=true",), ("data.shared_prefix=true", "data.packed=true")
TWO, FOUR = "parallel.sequence=2", "parallel.sequence=4"
# name -> base model, overrides; on two ranks and on four
RUNS = {
    2: {
        "frame": ("qwen2_5_vl", [TWO, *SHARED]),
        "causal-packed-checkpointed": (
            "qwen2_5_vl",
            [TWO, *PACKED, "system.softmax_scope=causal", "model.checkpointing=true"],
        ),
        "separate": ("qwen2_5_vl", [TWO, "data.clips_per_pack=3", "data.packs_per_step=1"]),
        "one-kv-head": ("one-kv-head", [TWO, *PACKED, "model.checkpointing=true"]),
        **{name: (name, [TWO, *SHARED]) for name in FAMILIES if name != "qwen2_5_vl"},
    },
    4: {
        "two-by-two": ("qwen2_5_vl", [TWO, *PACKED, "model.checkpointing=true"]),
        "four": ("qwen2_5_vl", [FOUR, *SHARED, "system.softmax_scope=causal"]),
    },
}
CASES = [(size, name) for size, runs in RUNS.items() for name in runs]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Clips with different numbers of nouns, records without a clip, and a saved model of every kind."""
    folder = tmp_path_factory.mktemp("sequence")
    make_data(folder / "clips", clips=4)
    with ShardWriter(folder / "text") as writer:
        for number in range(2):
            turns = [Turn(role="user", text="is a circle round ?"), Turn(role="assistant", text="yes , it is .")]
            conversation = Conversation(task="text", turns=turns)
            record = Record(source="test", license="CC0-1.0", media=[], objects=[], conversations=[conversation])
            writer.write(f"text_{number}", record, {}, {})
    for name in (*FAMILIES, "one-kv-head"):
        family = family_config(folder / "clips", name if name in FAMILIES else "qwen2_5_vl")
        fields = family.model.config
        assert fields is not None
        if name not in FAMILIES:
            fields["text_config"]["num_key_value_heads"] = 1
        system = build_system(family)
        system.build_model().save_pretrained(folder / name)
        system.tokenizer.save_pretrained(folder / name)
    # Every parameter is partitioned, none is kept whole on each rank for being small.
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}
    adam = {"type": "AdamW", "params": {"torch_adam": True, "eps": 1e-6}}
    (folder / "engine.json").write_text(json.dumps({"zero_optimization": zero, "optimizer": adam}))
    return folder


def config(data: Path, out: Path, name: str, base: str, *overrides: str) -> Config:
    """Three packs a step, of which one has no clip: on two groups the second fills up with a dummy pack."""
    return tiny_config(
        data / "clips",
        f"data.train=[{data / 'clips'}, {data / 'text'}]",
        f"model.path={data / base}",
        "model.config=null",
        "model.tokenizer=null",
        f"deepspeed={data / 'engine.json'}",
        "system.layers=[0, 2]",
        "system.gradient_every=1",
        "data.tasks=null",
        "data.workers=0",
        "data.clips_per_pack=1",
        "data.packs_per_step=3",
        "optim.warmup_steps=0",
        "run.steps=1",
        "run.seed=4",
        f"run.output={out}",
        f"run.name={name}",
        *overrides,
    )


def start(size: int, configs: list[Config], out: Path) -> None:
    # One process imports everything, and is then copied. (Python 3.11 looks for these on PYTHONPATH, not on sys.path.)
    multiprocessing.set_forkserver_preload(["swim.train.loop", "swim.train.systems.swim.model"])
    port = free_port()
    arguments = (size, port, configs, out)
    torch.multiprocessing.start_processes(train_on_ranks, arguments, nprocs=size, start_method="forkserver")


@pytest.fixture(scope="module")
def outcomes(data, tmp_path_factory) -> Path:
    """All runs of this page, in one start of two and one of four processes."""
    out = tmp_path_factory.mktemp("runs")
    for size, runs in RUNS.items():
        configs = [config(data, out, name, base, *overrides) for name, (base, overrides) in runs.items()]
        if size == 2:
            parts = ["run.steps=3", TWO, *PACKED]
            configs += [
                config(data, out, "whole", "qwen2_5_vl", *parts),
                config(data, out, "parted", "qwen2_5_vl", *parts, "run.stop_after=1"),
                config(data, out, "parted", "qwen2_5_vl", *parts),
                config(data, out, "regrouped", "qwen2_5_vl", *parts, "run.stop_after=1"),
                config(data, out, "regrouped", "qwen2_5_vl", *parts, "parallel.sequence=1"),
                config(data, out, "refused", "qwen2_5_vl", FOUR),
            ]
        start(size, configs, out)
    return out


def one_rank(chosen: Config) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """What the metrics of the first step have to say and its gradients: one process, no engine."""
    system = build_system(chosen)
    model = system.build_model().train()
    batches = next(Loader(Order(chosen), system.collator).steps(0, 1))
    assert chosen.data.packs_per_step == 1 or any(not any(batch.clips) for batch in batches), "a pack without a clip"
    counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
    values = {f"count/{name}": count for name, count in counts.items()}
    sums = dict.fromkeys(("text", "mask"), 0.0)
    for batch in batches:
        loss = system.loss(model, batch, Progress(0, 1))
        combine(loss, counts).backward()
        for name, term in loss.items():
            sums[name] += float(term.sum.detach())
    values |= {f"loss/{name}": total / counts[name] for name, total in sums.items()}
    values |= {name: math.sqrt(square) for name, square in system.after_backward().items()}
    found = gradients(model)
    norm = torch.stack([grad.norm() for grad in found.values()]).norm()
    return values | {"grad_norm": float(norm)}, found


@pytest.mark.parametrize(("size", "name"), CASES, ids=[f"{size}-{name}" for size, name in CASES])
def test_ranks_that_share_a_micro_batch_equal_one_rank(data, outcomes, size, name):
    base, overrides = RUNS[size][name]
    alone = config(data, outcomes, name, base, *overrides, "parallel.sequence=1")
    want, oracle = one_rank(alone)
    (line,) = metrics(outcomes / name)
    assert {key for key in line if key.startswith("mask_grad/")} == {f"mask_grad/{x}{n}" for x in "qk" for n in (0, 2)}
    for key, value in want.items():
        assert line[key] == pytest.approx(value, rel=1e-5, abs=1e-6), key
    assert line["loss/mask"] > 0.1
    assert line["loss/text"] > 0.1
    got = torch.load(outcomes / f"{name}.pt", weights_only=True)
    assert max(float(grad.abs().max()) for grad in oracle.values()) > 1e-2
    assert largest_difference(got, oracle) < 1e-5


def test_a_run_resumes_bit_for_bit_and_in_other_groups_alike(outcomes):
    whole, parted = (
        [{k: v for k, v in line.items() if k != "count/tokens"} for line in curve(outcomes / name)]  # of dummy packs
        for name in ("whole", "parted")
    )
    assert len(whole) == 3
    assert whole == parted
    models = [(outcomes / name / "model" / "model.safetensors").read_bytes() for name in ("whole", "parted")]
    assert models[0] == models[1]
    for one, other in zip(whole, metrics(outcomes / "regrouped"), strict=True):
        assert {key: other[key] for key in one} == pytest.approx(one, rel=1e-4, abs=1e-6)


def test_what_does_not_divide_is_refused(data, outcomes):
    assert (outcomes / "refused.txt").read_text() == (
        "parallel.sequence: 2 ranks do not divide into groups of 4; start a multiple of 4 ranks, or change "
        "parallel.sequence"
    )
    with pytest.raises(
        ConfigError, match=r"3 ranks cannot share the 4 attention heads of this model; use one of: 1, 2, 4"
    ):
        build_system(config(data, outcomes, "x", "qwen2_5_vl", "parallel.sequence=3"))
    window = '{"use_sliding_window": true, "max_window_layers": 1, "sliding_window": 64}'
    inline = load_config(
        "tiny_cpu", [f"model.config.text_config.{k}={v}" for k, v in json.loads(window).items()] + [TWO]
    )
    with pytest.raises(ConfigError, match="sliding window"):
        build_system(inline)
    with pytest.raises(ValueError, match=r"need its layout: make it with BatchOptions.sequence"):
        Capture(build_work_table([], []), (0,), group=torch.distributed.GroupMember.NON_GROUP_MEMBER)
    with pytest.raises(ValueError, match="3 ranks do not divide into groups of 2"):
        plan_report(config(data, outcomes, "x", "qwen2_5_vl", TWO), 3)


def test_columns_divide_and_the_padding_says_nothing(data, outcomes):
    shapes = []
    for overrides in (SHARED, PACKED, ()):
        plain, padded = (
            build_system(config(data, outcomes, "x", "qwen2_5_vl", "data.clips_per_pack=3", sequence, *overrides))
            for sequence in ("parallel.sequence=1", FOUR)
        )
        order = Order(plain.config, plain)
        for a, b in zip(*(next(Loader(order, system.collator).steps(0, 1)) for system in (plain, padded))):
            length, longer = (batch.inputs["input_ids"].shape[1] for batch in (a, b))
            assert longer % 4 == 0
            assert b.layout is not None
            assert b.layout.length == longer < length + 4
            assert b.layout.num_tokens == a.num_tokens == b.num_tokens
            assert torch.equal(b.inputs["input_ids"][:, :length], a.inputs["input_ids"])
            assert torch.equal(b.inputs["position_ids"][..., :length], a.inputs["position_ids"])
            shapes.append(longer - length)
    assert any(shapes)


def test_groups_count_as_readers(data, outcomes):
    found = replay(outcomes / "two-by-two", 1)
    assert (found.num_ranks, found.differences) == (2, [])
    report = plan_report(config(data, outcomes, "x", "qwen2_5_vl", TWO), 4)
    assert "ranks     4, 2 micro-batches each a step" in report
