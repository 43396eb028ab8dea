"""Promise: what `swim estimate` says before a run is what the run then holds and sends, and its ways to fit do fit."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from live_memory import Live
from processes import ROOT
from tiny import family_config, make_batch, make_data, tiny_config
from typer.testing import CliRunner

from swim.train import stock
from swim.train.__main__ import free_port
from swim.train.cli import app
from swim.train.config import ConfigError, load_config
from swim.train.estimate import describe, estimate, meta_model, parse_gpus, scaling, walk
from swim.train.loop import combine
from swim.train.memory import Pack, Tracer, Zero, map_bytes, model_states, parameters_of
from swim.train.scaling import DEVICES, Work, hiding_tokens, predict, traffic, ulysses_bytes
from swim.train.system import Progress, build_system

SHARED = "data.shared_prefix=true"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


def engine_json(folder: Path, name: str, **zero: object) -> str:
    """A DeepSpeed file; small models are treated as large ones: nothing is kept gathered or fetched ahead."""
    fields = {"overlap_comm": False, "reduce_bucket_size": 300000, **zero}
    if zero["stage"] == 3:
        fields |= {"stage3_param_persistence_threshold": 1000, "stage3_prefetch_bucket_size": 0}
        fields |= {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 0}
    adam = {"type": "AdamW", "params": {"torch_adam": True}}
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"zero_optimization": fields, "optimizer": adam, "zero_allow_untested_optimizer": True}))
    return f"deepspeed={path}"


def live(folder: Path, configs: list, world: int) -> list[list[dict]]:
    """For every configuration and rank, what tests/live_states.py finds."""
    (folder / "cases.json").write_text(json.dumps([config.model_dump(mode="json") for config in configs]))
    port = str(free_port())
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    ranks = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", ROOT / "tests" / "live_states.py", folder / "cases.json"],
            env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank)}
            | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    for process in ranks:
        output, _ = process.communicate(timeout=300)
        assert process.returncode == 0, output[-3000:]
    return [
        [json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in range(world)]
        for number in range(len(configs))
    ]


def compare(folder: Path, shards, cases: list[list[str]], world: int) -> None:
    """States and collectives of every case, predicted and found."""
    common = [SHARED, "data.packs_per_step=2", "data.clips_per_pack=1", "run.steps=3", "data.tasks=null"]
    configs = [tiny_config(shards.folder, *common, f"run.output={folder / 'runs'}", *case) for case in cases]
    for case, config, found in zip(cases, configs, live(folder, configs, world)):
        model = meta_model(config, build_system(config).model_config)
        parameters = parameters_of(model)
        element = 2 if config.model.dtype == "bfloat16" else 4
        zero = Zero.of(json.loads(Path(config.deepspeed).read_text()))
        want = model_states(parameters, zero, world, element=element)
        flows = config.model.checkpointing or not (config.model.freeze or config.model.lora)
        sent = traffic(
            parameters,
            zero,
            world,
            element=element,
            vision_flows=flows,
            embedding_flows=flows or not config.model.lora,
        )
        for rank in found:
            held = [rank[name] for name in ("weights", "gradients", "optimizer")]
            if want.host:  # one memory here: what is on the host cannot be told from the rest
                assert sum(held) + rank["host gradients"] == want.kept + want.host, case
            else:
                assert held == [want.weights, want.gradients, want.optimizer], case
            if world > 1 and not config.model.lora:
                carried, near = rank["sent"][-1], sent.near(rank["micro_batches"])
                assert sum(carried.values()) == sent.of_step(rank["micro_batches"]), (case, rank["sent"], sent)
                assert near == (carried[f"all_gather_into_tensor of {zero.hpz}"] if zero.hpz > 1 else 0), case


def test_states_and_collectives_are_those_of_engines_on_two_ranks(shards, tmp_path):
    z2, z3 = (engine_json(tmp_path, f"z{stage}", stage=stage) for stage in (2, 3))
    bf16 = "model.dtype=bfloat16"
    cases = [[z3], [z3, bf16, "model.freeze=[visual]"], [z2, bf16, "model.lora={rank: 4}"]]
    compare(tmp_path, shards, cases, 2)


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 4])
def test_states_and_collectives_are_those_of_engines(shards, tmp_path, world):
    z2, z3 = (engine_json(tmp_path, f"z{stage}", stage=stage) for stage in (2, 3))
    bf16, checkpointing = "model.dtype=bfloat16", "model.checkpointing"
    cases = [[z3, bf16], [z3, f"{checkpointing}=true"], [z3, f"{checkpointing}=2"]]
    cases += [[z3, bf16, "model.lora={rank: 4}"], [z2], [z2, bf16]]
    host = {"device": "cpu"}
    cases.append([engine_json(tmp_path, "off", stage=3, offload_optimizer=host, offload_param=host), bf16])
    if world == 4:  # two nodes of two; the last, its groups of ranks stay with the process
        cases.append([engine_json(tmp_path, "hpz", stage=3, zero_hpz_partition_size=2), bf16, "model.freeze=[visual]"])
    compare(tmp_path, shards, cases, world)


class Kept(torch.autograd.graph.saved_tensors_hooks):
    """Bytes of storages that autograd keeps, weights aside."""

    def __init__(self, model):
        self.weights = {t.untyped_storage()._cdata for t in [*model.parameters(), *model.buffers()]}
        self.storages = {}
        super().__init__(self.add, lambda x: x)

    def add(self, x):
        if (storage := x.untyped_storage())._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return x

    @property
    def bytes(self):
        return sum(storage.nbytes() for storage in self.storages.values())


@pytest.mark.parametrize("checkpointing", [False, True, 2, 3])
@pytest.mark.parametrize(
    "options",
    [
        [SHARED],
        [],
        ["data.packed=true", SHARED, "model.freeze=[visual]", "model.dtype=bfloat16", "system.softmax_scope=clip"],
        ["model.lora={rank: 4}", "data.num_frames=8"],
    ],
    ids=["shared", "padded", "packed", "lora"],
)
def test_activations_and_maps_are_those_of_a_real_step(shards, options, checkpointing):
    config = tiny_config(shards.folder, f"model.checkpointing={checkpointing}", *options)
    system = build_system(config)
    model = system.build_model().train()
    batch = make_batch(system, shards, [0, 1])
    captures = []
    forward = model.forward
    model.forward = lambda **kwargs: captures.append(kwargs["capture"]) or forward(**kwargs)
    kept = Kept(model)
    with kept:
        system.loss(model, batch, Progress(1, 10))
    tracer = Tracer(meta_model(config, system.model_config), system.layers, flash=False, triton=False)
    found = tracer.activations(Pack.of(batch, system.model_config))
    assert found.kept == pytest.approx(kept.bytes, rel=0.15)
    assert map_bytes(batch.table, system.layers) == sum(m.nbytes for m in captures[0].maps().values())
    # Of six layers, two of the vision tower first, every third spares the last.
    assert bool(found.recomputed) == (checkpointing is True)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl", "llava_onevision", "internvl"])
def test_activations_of_every_family(shards, family, checkpointing):
    config = family_config(shards.folder, family, SHARED, f"model.checkpointing={checkpointing}")
    system = build_system(config)
    model = system.build_model().train()
    batch = make_batch(system, shards, [0, 1])
    kept = Kept(model)
    with kept:
        system.loss(model, batch, Progress(1, 10))
    tracer = Tracer(meta_model(config, system.model_config), system.layers, flash=False, triton=False)
    found = tracer.activations(Pack.of(batch, system.model_config)).kept
    # What LLaVA's pooling of projected features keeps is not counted.
    assert found == pytest.approx(kept.bytes, rel=0.25 if family == "llava_onevision" else 0.15)


@pytest.mark.parametrize("checkpointing", [False, True, 2, 5])
@pytest.mark.parametrize(
    "options",
    [[SHARED], [SHARED, "data.packed=true", "model.freeze=[visual]", "model.dtype=bfloat16"], []],
    ids=["shared", "packed", "padded"],
)
def test_the_peak_is_that_of_a_real_step(shards, options, checkpointing):
    config = tiny_config(shards.folder, f"model.checkpointing={checkpointing}", *options)
    system = build_system(config)
    model = system.build_model().train()
    batch = make_batch(system, shards, [0, 1])
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if p.requires_grad else None
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    live = Live([*model.parameters(), *model.buffers(), *gradients, *batch.inputs.values()])
    with live:
        combine(system.loss(model, batch, Progress(1, 10)), batch.counts).backward()
    tracer = Tracer(meta_model(config, system.model_config), system.layers, flash=False, triton=False)
    assert tracer.activations(Pack.of(batch, system.model_config)).peak == pytest.approx(live.peak, rel=0.15)


def test_triton_keeps_less_than_torch(shards):
    config = tiny_config(shards.folder)
    system = build_system(config)
    pack = Pack.of(make_batch(system, shards, [0, 1]), system.model_config)
    torch_, triton = (
        Tracer(meta_model(config, system.model_config), system.layers, flash=False, triton=triton)
        .activations(pack)
        .supervision
        for triton in (False, True)
    )
    assert map_bytes(pack.table, system.layers) <= triton < torch_


def test_the_verdict_is_monotone_in_memory_and_its_ways_fit(shards, tmp_path):
    options = [SHARED, f"run.output={tmp_path}", "data.clips_per_pack=2", engine_json(tmp_path, "z2", stage=2)]
    config = tiny_config(shards.folder, *options)
    need = estimate(config, "2xH100").need
    found = [estimate(config, "2xH100", memory=int(need * share)) for share in (0.3, 0.7, 0.999, 1.0, 2.0)]
    assert [one.fits for one in found] == [False, False, False, True, True]
    assert all(bool(one.ways) != one.fits for one in found)
    changes = {"model.checkpointing=true", "data.clips_per_pack=1"}
    ways = {way.change: way for one in found for way in one.ways}
    assert changes & ways.keys()
    for change in changes & ways.keys():
        changed = estimate(tiny_config(shards.folder, *options, change), "2xH100")
        assert changed.need < need
        if change.startswith("model"):
            assert changed.need == ways[change].need
    for one in found:
        assert [(not way.same_result, way.slowdown) for way in one.ways] == sorted(
            (not way.same_result, way.slowdown) for way in one.ways
        )


def test_packs_come_from_the_plan_or_are_given(shards, tmp_path):
    config = tiny_config(shards.folder, SHARED, f"run.output={tmp_path}")
    packs = estimate(config, None, ranks=2).packs
    assert list(packs) == ["p50", "p95", "max"]
    peaks = [held.peak for _, held, _ in packs.values()]
    assert peaks == sorted(peaks)
    absent = tiny_config(tmp_path / "absent", SHARED)
    with pytest.raises(ConfigError, match="without data give --tokens"):
        estimate(absent, None)
    small, large = (estimate(absent, None, tokens=tokens) for tokens in (512, 1024))
    assert small.need < large.need
    assert json.loads(json.dumps(describe(large)))["packs"]["given"]["tokens"] == 1024


def test_a_bad_device_is_one_message():
    assert parse_gpus("16xa100-40") == (16, "A100-40")
    for text in ("H100", "8xK80", "0xH100"):
        with pytest.raises(ConfigError, match="COUNTxDEVICE"):
            parse_gpus(text)


def test_the_command_prints_a_verdict_and_exits_by_it(shards, tmp_path):
    arguments = ["estimate", "tiny_cpu", f"data.train=[{shards.folder}]", "data.synth=null", "--gpus", "2xH100"]
    arguments += [f"run.output={tmp_path}"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "fits:" in result.stdout
    assert "not measured" in result.stdout
    result = CliRunner().invoke(app, [*arguments, "--memory", "0.001", "--json"])
    assert result.exit_code == 1
    found = json.loads(result.stdout[result.stdout.index("{") :])
    assert found["fits"] is False
    assert "error: --gpus" in CliRunner().invoke(app, [*arguments[:4], "--gpus", "K80"]).stderr


def test_a_dry_run_walks_the_packs_of_all_ranks(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(stock.AutoModelForImageTextToText, "from_pretrained", None)
    config = tiny_config(shards.folder, SHARED, f"run.output={tmp_path}", "data.packs_per_step=4")
    text, ready = walk(config, 2)
    assert ready, text
    assert "batch of 4 = 1 x 2 x 2" in text
    text, ready = walk(config, 64)
    assert not ready
    assert "ranks never have a pack: data.packs_per_step is 4" in text
    bad = tmp_path / "bad.json"
    bad.write_text(json.dumps({"zero_optimization": {"stage": 7}}))
    text, ready = walk(tiny_config(shards.folder, f"run.output={tmp_path}", f"deepspeed={bad}"), 2)
    assert not ready
    assert "bad.json" in text


def test_the_training_program_has_a_dry_run(shards, tmp_path):
    def run(*words: str) -> SimpleNamespace:
        command = [sys.executable, "-m", "swim.train", *words, f"data.train=[{shards.folder}]", "data.synth=null"]
        return subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    done = run("--dry-run", "--world-size", "2")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "ready"
    assert not (tmp_path / "runs" / "tiny").exists(), "nothing is written into the run folder"
    assert run("--world-size=2").returncode != 0


def test_the_scaling_page_is_current(tmp_path):
    from benchmarks.qwen import Shape

    Shape().config().save_pretrained(tmp_path)
    config = load_config("swim_7b", [f"model.path={tmp_path}"])
    page = scaling(config, "swim_7b")
    assert page == (ROOT / "docs" / "scaling.md").read_text(), "stale: run make scaling"


def test_the_cost_model_behaves():
    parts = {"vision_flops": 3e12, "head_flops": 1e11, "layer_bytes": 466 * 10**6, "vision_bytes": 10**9}
    shape = {"heads": 28, "kv_heads": 4, "head_dim": 128, "element": 2, "head_bytes": 2 * 10**9}
    large = Work(14000, 28, 7e12, layer_passes=4, vision_passes=1, **parts, **shape)
    small = replace(large, tokens=1000, layer_flops=5e11)
    device = DEVICES["H100"]
    for work in (large, small):
        times = [predict(work, device, world, world).seconds for world in (8, 64, 512, 4096)]
        assert times == sorted(times), "as many packs as ranks: more ranks only add communication"
        assert all(
            predict(work, device, world, world, strategy="hpz").seconds <= predict(work, device, world, world).seconds
            for world in (8, 64, 512, 4096)
        )
    assert hiding_tokens(large, device, 8) < hiding_tokens(large, device, 1024)
    assert predict(large, device, 64, 8, strategy="sequence").seconds < predict(large, device, 64, 8).seconds
    ways = {
        degree: ulysses_bytes(4096, heads=8, kv_heads=4, head_dim=64, element=2, degree=degree) for degree in (1, 2, 8)
    }
    assert ways == {1: 0, 2: 2 * 64 * 2048 * 24, 8: 2 * 64 * 512 * 32}
