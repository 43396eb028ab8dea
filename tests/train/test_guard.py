"""Promise: a step that goes wrong on one rank changes nothing on any, is written with its samples, and the run goes on
or ends as the recipe says."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from processes import ROOT, TINY, environment, metrics
from tiny import make_data

from swim.data_tools.shards import ShardSet
from swim.train.__main__ import free_port
from swim.train.config import GuardConfig, load_config
from swim.train.guard import Guard
from swim.train.loader import Order

DRIVER = Path(__file__).resolve().parent.parent / "faulty_train.py"


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    make_data(folder, clips=6)
    return folder


def train(faults: dict, clips: Path, cwd: Path, *overrides: str, ranks: int = 1) -> tuple[list[int], str]:
    """Exit codes of all ranks of a run with faults, and the output of the first."""
    port = str(free_port())
    options = [*TINY, f"data.train=[{clips}]", "run.name=run", "data.packs_per_step=2", *overrides]
    processes = [
        subprocess.Popen(
            [sys.executable, str(DRIVER), json.dumps(faults), *options],
            cwd=cwd,
            env=environment(
                RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=port
            )
            | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(ranks)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    return [process.returncode for process in processes], outputs[0]


def weights(folder: Path, rank: int = 0) -> list[float]:
    return [json.loads(line)["sum"] for line in (folder / f"weights_{rank}.jsonl").read_text().splitlines()]


def refused(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "refused.jsonl").read_text().splitlines()]


ENGINES = {
    "zero3": ({"stage": 3, "stage3_param_persistence_threshold": 0}, "float32", 2),
    "zero2-bf16": ({"stage": 2}, "bfloat16", 1),
    "zero1": ({"stage": 1}, "float32", 1),
}


@pytest.mark.parametrize("kind", ENGINES)
def test_a_fault_of_one_rank_changes_nothing_on_any_and_the_run_goes_on(clips, tmp_path, kind):
    zero, dtype, ranks = ENGINES[kind]
    engine = tmp_path / "engine.json"
    adam = {"type": "AdamW", "params": {"torch_adam": True}}
    engine.write_text(json.dumps({"zero_optimization": zero, "optimizer": adam, "zero_allow_untested_optimizer": True}))
    faults = {2: "nan_loss", 3: "nan_gradient", 6: 1000.0}
    guard = ["guard.spike=skip", "guard.spike_window=3"]
    options = ["run.steps=8", f"deepspeed={engine}", f"model.dtype={dtype}", *guard]
    codes, output = train(faults, clips, tmp_path, *options, ranks=ranks)
    assert codes == [0] * ranks, output[-3000:]
    folder = tmp_path / "runs" / "run"
    order, shards = Order(load_config(folder / "config.yaml")), ShardSet(clips)
    reasons = {2: "the loss is not finite", 3: "the gradient is not finite", 6: "is a spike: the limit is"}
    for step, reason in reasons.items():
        lines = [line for line in refused(folder) if line["step"] == step + 1]
        assert len(lines) == ranks
        assert all(reason in line["reason"] for line in lines)
        units = [unit for pack in order.packs(step, 0, 1) for unit in pack]
        ids = {f"{shards.entries[unit.clip].key}#{i}" for unit in units for i in unit.conversations}
        assert {name for line in lines for name in line["ids"]} == ids
    assert len(refused(folder)) == len(faults) * ranks
    assert [line["refused"] for line in metrics(folder)] == [float(step in faults) for step in range(8)]
    assert metrics(folder)[2]["loss/text"] is None
    assert all(math.isfinite(line["loss/total"]) for step, line in enumerate(metrics(folder)) if step != 2)
    for rank in range(ranks):
        sums = weights(folder, rank)
        changed = [sums[step] != sums[step - 1] for step in range(1, 8)]
        assert changed == [step not in faults for step in range(1, 8)]
    assert (folder / "done.json").exists()


def test_rewind_goes_back_to_the_last_checkpoint_and_passes_over_the_packs(clips, tmp_path):
    options = ["guard.spike=rewind", "guard.spike_window=2", "run.save_every=3", "run.steps=7"]
    codes, output = train({4: 1000.0}, clips, tmp_path, *options)
    assert codes == [0], output[-3000:]
    folder = tmp_path / "runs" / "run"
    sums = weights(folder)
    assert sums[4] == sums[2], "saved behind step 2"
    assert len({*sums[:4], *sums[5:]}) == 6
    assert "step 5: back to the weights of runs/run/checkpoints/step_00000003" in output
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6, 7]


@pytest.mark.parametrize(
    ("faults", "options", "last", "message"),
    [
        ({4: 1000.0}, ["guard.spike=stop", "guard.spike_window=2"], 4, "is a spike"),
        ({1: "nan_loss", 2: "nan_loss"}, ["guard.max_refused=2"], 2, "2 steps in a row changed nothing"),
        ({4: 1000.0}, ["guard.spike=rewind", "guard.spike_window=2"], 4, "no checkpoint was saved yet"),
    ],
    ids=["spike-stop", "many-refused", "rewind-to-nothing"],
)
def test_a_run_that_ends_is_saved_and_goes_on_behind_the_faults(clips, tmp_path, faults, options, last, message):
    codes, output = train(faults, clips, tmp_path, "run.steps=6", *options)
    assert codes == [2]
    assert "Traceback" not in output
    assert message in output
    folder = tmp_path / "runs" / "run"
    assert [path.name for path in (folder / "checkpoints").glob("step_*")] == [f"step_{last + 1:08d}"]
    codes, output = train({}, clips, tmp_path, "run.steps=6", *options)
    assert codes == [0], output[-3000:]
    assert f"at step {last + 1}" in output
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4, 5, 6]


def judge(**fields) -> Guard:
    return Guard(GuardConfig(spike="skip", spike_window=5, **fields))


def test_a_spike_is_far_above_the_median_of_a_full_window():
    guard = judge(spike_deviations=10)
    for loss in (2.0, 1.9, 2.1, 2.05):
        assert guard.verdict(1e9) is None, "no window, no spike"
        guard.note(loss, applied=True)
    guard.note(1.95, applied=True)
    limit = 2.0 + 10 * 1.4826 * 0.05
    assert guard.limit() == pytest.approx(limit)
    assert guard.verdict(limit + 1e-6).spike
    assert guard.verdict(limit - 1e-6) is None
    assert guard.verdict(float("-inf")).reason == "the loss is not finite"
    guard.note(1e9, applied=False)
    assert guard.refused == 1
    assert guard.limit() == pytest.approx(limit), "what was refused is no measure for the next"
    again = Guard(guard.config, **guard.state)
    assert again.limit() == guard.limit()
    assert again.refused == 1, "a resumed run goes on counting"


def test_a_loss_that_stands_still_has_room():
    guard = judge(spike_deviations=10)
    for _ in range(5):
        guard.note(2.0, applied=True)
    assert guard.verdict(2.0 * 1.009) is None
    assert guard.verdict(2.0 * 1.011).spike


def test_without_a_policy_only_what_is_not_finite_is_refused():
    guard = Guard(GuardConfig(spike_window=2), [1.0, 1.0])
    assert guard.verdict(1e30) is None
    assert guard.verdict(float("nan")) is not None
