"""Promise: what a run says about itself is true, is said once, and changes nothing in the run."""

import json
import re
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import curve, metrics
from recorded_training import train_recorded
from tiny import ALL_TASKS, family_config, make_batch, make_data, requests, tiny_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swim.data_tools.shards import ShardSet
from swim.evaluation.alignment import METRICS, PREVALENCES
from swim.evaluation.benchmarks.alignment import score
from swim.evaluation.predictions import Expected, Header, read_lines
from swim.evaluation.scores import PredictionFile, Settings
from swim.train.config import Config, ConfigError, LogConfig, load_config
from swim.train.doctor_run import check_run
from swim.train.flops import StepFlops, peak_flops
from swim.train.metrics import Metrics
from swim.train.probe import summarise
from swim.train.scaling import DEVICES, device_of
from swim.train.sinks import check_sinks
from swim.train.skew import OwnTime, Skew
from swim.train.sources import Sources
from swim.train.system import Progress, build_system

ENGINE = {
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False},
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
    "zero_allow_untested_optimizer": True,
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return make_data(tmp_path_factory.mktemp("observe") / "clips", clips=4)


# --- operations


@pytest.mark.parametrize(
    ("family", "frozen", "tolerance"),
    [
        ("qwen2_vl", [], 0),
        ("qwen2_5_vl", [], 0),
        ("qwen2_5_vl", ["visual"], 0),
        ("qwen3_vl", ["visual", "embed_tokens"], 0),
        ("llava_onevision", ["vision_tower"], 0),
        ("internvl", [], 0.006),  # the class token of each frame is not counted
    ],
)
def test_operations_are_those_that_torch_counts(shards, family, frozen, tolerance):
    system = build_system(family_config(shards.folder, family, f"model.freeze={json.dumps(frozen)}"))
    model = system.build_model().train()
    batch = make_batch(system, shards, [0], [0])
    found = StepFlops(model, system.model_config)
    causal = found.of(batch)
    # The plain attention that the counter sees computes the pairs above the diagonal as well.
    whole = found.of(replace(batch, num_pairs=batch.num_tokens**2))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counted:
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns).logits
        torch.nn.functional.cross_entropy(logits[0], batch.labels).backward()
    assert whole == pytest.approx(counted.get_total_flops(), rel=tolerance, abs=0)
    assert 0.7 * whole < causal < whole


def test_pairs_of_a_shared_prefix_are_those_that_attend(shards):
    for layout in ("data.shared_prefix=true", "data.packed=true"):
        system = build_system(tiny_config(shards.folder, ALL_TASKS, layout))
        batch = make_batch(system, shards, [0, 1])
        assert batch.layout is not None
        pairs = 0
        for row in batch.layout.rows:
            for prefix, *branches in row:
                pairs += sum(range(1, prefix + 1)) + sum(prefix + i for n in branches for i in range(1, n + 1))
        assert batch.num_pairs == pairs


def test_the_peak_is_the_data_sheets_or_unknown():
    assert device_of("NVIDIA H100 80GB HBM3") is DEVICES["H100"]
    assert device_of("NVIDIA H100 PCIe") is DEVICES["H100-PCIE"]
    assert device_of("NVIDIA A100-SXM4-40GB") is DEVICES["A100-40"]
    assert device_of("Tesla V100-SXM2-16GB") is None
    assert peak_flops(torch.device("cpu"), "bfloat16") != peak_flops(torch.device("cpu"), "bfloat16"), "not a number"


# --- loss by source


def of_source(request, source: str):
    sample = request.sample
    return replace(request, sample=replace(sample, record=sample.record.model_copy(update={"source": source})))


@pytest.mark.parametrize("options", [("data.shared_prefix=true",), ("data.packed=true",), ()], ids=str)
def test_losses_of_sources_add_up_to_the_loss_and_are_those_of_their_own_samples(shards, options):
    """Two ranks, played one after the other; the second meets a source that the first never has."""
    system = build_system(tiny_config(shards.folder, ALL_TASKS, *options))
    model = system.build_model().train()
    named = [of_source(r, s) for r, s in zip(requests(shards, [0, 1, 2, 3]), ("web", "panda", "web", "web/b"))]
    held = [[system.collator(named[:2])], [system.collator(named[2:]), system.collator([])]]  # one pack is a dummy
    ranks = [Sources(), Sources()]
    said = [rank.announce(batches) for rank, batches in zip(ranks, held)]
    counts = {name: said[0][name] + said[1][name] for name in said[0]}
    world = SimpleNamespace(gather=lambda _: [rank._own for rank in ranks])
    totals: dict[str, float] = {}
    for rank, batches in zip(ranks, held):
        rank.agree(counts, world)
        assert rank.names == ["panda", "web", "web/b"]
        losses = [system.loss(model, batch, Progress(0, 1)) for batch in batches]
        for name, value in rank.slots(batches, losses).items():
            totals[name] = totals.get(name, 0.0) + value
        for loss in losses:
            totals["text"] = totals.get("text", 0.0) + float(loss["text"].sum.detach())
    got = ranks[0].numbers(totals)
    assert set(got) == {f"{kind}/text/{name}" for kind in ("loss", "count") for name in ("panda", "web", "web/b")}
    assert sum(got[f"count/text/{name}"] for name in ranks[0].names) == sum(b.counts["text"] for bs in held for b in bs)
    added = sum(got[f"loss/text/{name}"] * got[f"count/text/{name}"] for name in ranks[0].names)
    assert added == pytest.approx(totals["text"], rel=1e-6)
    for name, alone in (("panda", named[1:2]), ("web", [named[0], named[2]]), ("web/b", named[3:])):
        batch = system.collator(alone)
        term = system.loss(model, batch, Progress(0, 1))["text"]
        assert got[f"loss/text/{name}"] == pytest.approx(float(term.sum.detach()) / batch.counts["text"], rel=1e-5)
    assert ranks[0].announce(held[1]) == {"sources/new": 0.0}, "names are gathered once"


# --- slow ranks


def test_own_time_is_that_inside_linear_layers_and_no_other():
    class Slow(torch.nn.Linear):
        def forward(self, x):
            time.sleep(0.02)
            return super().forward(x)

    class Waits(torch.nn.Module):
        def forward(self, x):
            time.sleep(0.1)  # for others
            return x

    model = torch.nn.Sequential(Slow(2, 2), Waits(), torch.nn.Linear(2, 2))
    own = OwnTime(model, torch.device("cpu"))
    model(torch.zeros(1, 2))
    assert 0.02 < own.take() < 0.07
    assert own.take() == 0
    own.close()
    model(torch.zeros(1, 2))
    assert own.take() == 0


def test_own_time_on_a_gpu_is_read_from_events_when_the_step_is_over(monkeypatch):
    """The events are stand-ins: no GPU is needed, and none is tested."""

    class Event:
        clock = 0.0
        waited = 0

        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            Event.clock += 3.0
            self.at = Event.clock

        def elapsed_time(self, later: "Event") -> float:
            assert Event.waited, "events are read behind a synchronisation"
            return later.at - self.at

        def synchronize(self) -> None:
            Event.waited += 1

    monkeypatch.setattr(torch.cuda, "Event", Event)
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU(), torch.nn.Linear(2, 2))
    own = OwnTime(model, torch.device("cuda"))
    model(torch.zeros(1, 2))
    assert own.take() == pytest.approx(2 * 3e-3)
    assert (own.take(), Event.waited) == (0, 1)


def test_the_slowest_rank_is_named_in_the_log_and_by_the_doctor(tmp_path):
    ranks = [Skew(rank, 4) for rank in range(4)]
    slots = [rank.slots(seconds) for rank, seconds in zip(ranks, (1.0, 1.1, 3.0, 0.9))]
    totals = {name: sum(slot[name] for slot in slots) for name in slots[0]}
    assert ranks[1].numbers(totals, 4.0) == ranks[0].numbers(totals, 4.0)
    got = ranks[0].numbers(totals, 6.0)
    assert got["time/slowest_rank"] == 2
    assert (got["time/rank_p50"], got["time/rank_max"]) == (pytest.approx(1.05), 3.0)
    assert (got["time/step_p50"], got["time/step_max"]) == (5.0, 6.0)
    assert got["time/rank_p50"] < got["time/rank_p95"] < 3.0
    (tmp_path / "config.yaml").touch()
    line = json.dumps({"step": 1, "step_s": 4.0, **got})
    (tmp_path / "metrics.jsonl").write_text(f"{line}\n{line}\n")
    (found,) = (finding for finding in check_run(tmp_path) if finding.name == "ranks")
    assert found.text.startswith("rank 2 was the slowest in 2 of the last 2 steps, 2.86 x the median")


# --- sinks

STEP = {"loss/total": 1.0, "lr": 0.1, "tokens_per_s": 1.0, "data_wait": 0.0, "peak_memory_mib": 1.0, "holes": 0.0}


def logged(config: Config, first: int, last: int) -> None:
    config.run.folder.mkdir(parents=True, exist_ok=True)
    with Metrics(config.run.folder / "metrics.jsonl", start=first - 1, steps=9, config=config) as log:
        for step in range(first, last + 1):
            log.log(step, STEP | {"loss/total": float(step), "mfu": float("nan")})


def test_tensorboard_has_every_step_of_a_resumed_run_once(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = load_config("tiny_cpu", [f"run.output={tmp_path}", "log.tensorboard=true"])
    logged(config, 1, 5)
    logged(config, 4, 7)  # killed behind step 5, resumed from 3
    events = EventAccumulator(str(config.run.folder / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("loss/total")] == [1, 2, 3, 4, 5, 6, 7]
    assert "mfu" not in events.Tags()["scalars"], "what is no number is left out"


def test_a_resumed_run_goes_on_under_its_id_of_weights_and_biases(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = load_config("tiny_cpu", [f"run.output={tmp_path}", "log.wandb={project: swim, mode: offline}"])
    logged(config, 1, 2)
    logged(config, 3, 4)
    name = (config.run.folder / "wandb_id.txt").read_text()
    parts = sorted(path.name for path in (config.run.folder / "wandb").glob("offline-run-*"))
    assert parts
    # Two parts of one second are told apart by a number behind the id.
    assert all(re.fullmatch(rf"offline-run-\w+-{name}(-\d+)?", part) for part in parts)


def test_a_sink_that_fails_is_said_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys):
    from torch.utils.tensorboard import SummaryWriter

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SummaryWriter, "add_scalar", full)
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks = ["log.tensorboard=true", "log.wandb={project: swim}"]
    logged(load_config("tiny_cpu", [f"run.output={tmp_path}", *sinks]), 1, 3)
    said = capsys.readouterr().out
    assert said.count("log.tensorboard failed and is left out from here on: OSError: [Errno 28] No space") == 1
    assert said.count("log.wandb failed") == 1
    assert [line["step"] for line in metrics(tmp_path / "tiny")] == [1, 2, 3]


def test_a_missing_package_is_named_with_its_extra_before_training(monkeypatch):
    monkeypatch.setattr("swim.train.sinks.find_spec", lambda _: None)
    check_sinks(LogConfig.model_validate({}))
    for asked in ({"tensorboard": True}, {"wandb": {"project": "swim"}}):
        with pytest.raises(ConfigError, match=r"pip install 'swim-train\[track\]'"):
            check_sinks(LogConfig.model_validate(asked))


# --- the probe


def test_the_probe_measures_what_evaluation_does(shards):
    """The layout is the run's, and what it trains on (one token, pixel masks) is not what is measured."""
    options = ("data.shared_prefix=true", "data.packed=true", "system.subtokens=last", "system.mask_side=pixel")
    system = build_system(tiny_config(shards.folder, ALL_TASKS, *options, "system.loss=bce"))
    model = system.build_model().eval()
    rows = {}
    for request in requests(shards, [0, 1, 2, 3]):
        rows |= system.probe(model, system.probe_collator([request]))
    assert system.probe(model, system.probe_collator([])) == {}, "a dummy pack counts nothing"
    found = summarise([(dict(list(rows.items())[:3]), 0), (dict(list(rows.items())[3:]), 2)])
    lines = [line for request in requests(shards, [0, 1, 2, 3]) for line in system.predict(model, request)]
    expected = tuple(Expected(line["id"], line["clip"], line["task"], line["target"]) for line in lines)
    file = PredictionFile(Header("probe", "alignment-grid", expected), read_lines(lines))
    wanted = score(file, Settings(resamples=2))
    for name in (*METRICS, *PREVALENCES):
        assert found[f"probe/{name}"] == pytest.approx(wanted[name]["value"], abs=2e-5), name
    assert (found["probe/clips"], found["probe/holes"]) == (4, 2)
    assert found["probe/mass"] != pytest.approx(found["probe/prevalence"], abs=1e-4)


@pytest.fixture(scope="module")
def runs(shards, tmp_path_factory) -> Path:
    """A run of two ranks with dropout, and the same one stopped, resumed, and looked at in every way."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "engine.json").write_text(json.dumps(ENGINE))
    held_out = make_data(folder / "held_out", clips=3, seed=77)  # rank 1 has a dummy pack
    common = [
        f"run.output={folder}",
        "run.steps=6",
        "data.packs_per_step=2",
        "data.clips_per_pack=1",
        "model.lora={rank: 4, dropout: 0.2}",
        f"deepspeed={folder / 'engine.json'}",
    ]
    watched = [
        f"probe={{data: {held_out.folder}, every: 2, clips: 3}}",
        "profile={start: 2, steps: 3, ranks: [1]}",
        "log.tensorboard=true",
    ]
    train_recorded(
        tiny_config(shards.folder, *common, "run.name=plain", "log.curves=false"), folder / "plain_b", ranks=2
    )
    for stop in ("run.stop_after=3", "run.stop_after=null"):
        config = tiny_config(shards.folder, *common, *watched, "run.name=watched", stop)
        train_recorded(config, folder / "watched_b", ranks=2)
    return folder


def test_looking_at_a_run_changes_no_bit_of_it(runs):
    plain, watched = runs / "plain", runs / "watched"
    lines = curve(watched)
    assert [line["step"] for line in lines if "probe/mass" in line] == [2, 4, 6]
    assert all(line["probe/clips"] == 3 for line in lines if "probe/mass" in line)
    values = [line["probe/mass"] for line in lines if "probe/mass" in line]
    assert len({*values}) == 3, "the model learns"
    unprobed = [{k: v for k, v in line.items() if not k.startswith("probe/")} for line in lines]
    assert unprobed == curve(plain)
    model = Path("model", "model.safetensors")
    assert (plain / model).read_bytes() == (watched / model).read_bytes()


def test_a_profile_covers_its_window_and_no_more(runs):
    names = {path.name.split(".")[0]: path for path in (runs / "watched" / "profile").iterdir()}
    assert set(names) == {"rank_00001_steps_2-3", "rank_00001_steps_4-4"}, "cut by the end of the first part"
    table = (runs / "watched" / "profile" / "rank_00001_steps_2-3.txt").read_text()
    assert "aten::" in table
    assert "step 3" in table
    assert "step 4" not in table
    assert not (runs / "plain" / "profile").exists()


def test_every_run_ends_with_a_picture_of_its_curves(runs):
    assert (runs / "watched" / "training_curves.png").read_bytes().startswith(b"\x89PNG")
    assert not (runs / "plain" / "training_curves.png").exists(), "log.curves=false"


def test_what_is_logged_of_a_run_is_consistent(runs):
    for line in metrics(runs / "watched"):
        assert line["mfu"] is None, "no data sheet gives a CPU's peak"
        assert line["tflops"] > 0
        assert line["time/slowest_rank"] in (0, 1)
        assert 0 < line["time/rank_p50"] <= line["time/rank_p95"] <= line["time/rank_max"] < line["time/step_max"]
        assert line["loss/text/synth"] == pytest.approx(line["loss/text"], rel=1e-6)
        assert line["count/text/synth"] == line["count/text"]
