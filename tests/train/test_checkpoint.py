"""Promise: what has the name of a checkpoint is whole, whatever happens while it is written, and any number of ranks
can go on from it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from checkpoint_ranks import STATE, build_small, join, save_on_ranks, train_small, weights
from faults import CREATING, Disk, Killed

from swim.train import checkpoint, loop
from swim.train.__main__ import free_port
from swim.train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint, verify
from swim.train.config import load_config
from swim.train.guard import Guard
from swim.train.world import World


@pytest.fixture(scope="module")
def world():
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "MASTER_ADDR"):
            patch.setenv(name, "")  # noted, so that it is taken back, whatever joining a world leaves there
            patch.delenv(name)
        patch.setattr(checkpoint, "stock_description", lambda _: {})
        joined = join(0, 1, port)
        yield joined
        joined.close()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    """Checkpoints that two ranks have written."""
    out = tmp_path_factory.mktemp("two_ranks")
    port = free_port()
    torch.multiprocessing.spawn(save_on_ranks, (2, port, out), nprocs=2)
    return out


@pytest.fixture(scope="module")
def steps(world, tmp_path_factory):
    """An engine, the checkpoints 1 and 2 of a run in a folder, where 3 and 4 are kept, and the weights of each."""
    folder = tmp_path_factory.mktemp("steps")
    engine, known = build_small(), {}
    for step in range(1, 5):
        train_small(engine, step, step + 1)
        known[step] = weights(engine)
        where = folder / ("run" if step < 3 else "later")
        save_checkpoint(engine, where, step, STATE, world, score=10.0 - step, keep=2)
    return engine, folder, known


def save(steps, folder: Path, step: int, world) -> None:
    engine, source, _ = steps
    load_checkpoint(engine, source / "later" / f"step_{step:08d}", world)
    save_checkpoint(engine, folder, step, STATE, world, score=10.0 - step, keep=2)


def check(steps, folder: Path, world, newest: set[int]) -> None:
    """What has a name is whole and what it says; links lead to such; the newest is one of these."""
    engine, _, known = steps
    named = sorted(folder.glob("step_*"))
    for path in named:
        assert verify(path)["step"] == int(path.name[-8:])
    for link in ("last", "best"):
        assert (folder / link).resolve() in [path.resolve() for path in named]
    latest = latest_checkpoint(folder)
    step = int(latest.name[-8:])
    assert step in newest
    load_checkpoint(engine, latest, world)
    found = weights(engine)
    assert all(torch.equal(found[name], known[step][name]) for name in found)


def attempt(steps, folder: Path, world, fatal: int, *, full: bool) -> tuple[Disk, str]:
    """A third save with a fault at this operation, in a fresh folder with two checkpoints."""
    engine, source, _ = steps
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(source / "run", folder, symlinks=True)
    load_checkpoint(engine, source / "later" / "step_00000003", world)
    disk, message = Disk(folder, fatal, full=full), ""
    try:
        with disk.watched():
            save_checkpoint(engine, folder, 3, STATE, world, score=7.0, keep=2)
    except Killed:
        assert not full
    except CheckpointError as error:
        message = str(error)
    return disk, message


def test_what_the_guard_remembers_is_kept_and_older_checkpoints_load(steps, world, tmp_path):
    engine, _, _ = steps
    guard = Guard(load_config("tiny_cpu").guard, [2.0, 1.0], refused=2)
    path = save_checkpoint(engine, tmp_path, 3, STATE, world, guard=guard.state)
    assert Guard(guard.config, **load_checkpoint(engine, path, world)[1]).state == guard.state
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"guard": [2.0, 1.0]}))
    assert Guard(guard.config, **load_checkpoint(engine, path, world)[1]).state == guard.state | {"refused": 0}


def test_a_kill_at_any_operation_of_a_save_leaves_whole_checkpoints_only(steps, world, tmp_path):
    folder, seen, fatal = tmp_path / "run", set(), 0
    while True:
        disk, _ = attempt(steps, folder, world, fatal, full=False)
        check(steps, folder, world, {2, 3})
        assert (folder / "step_00000002").exists()
        if not disk.failed:
            break
        seen.add(disk.operations[fatal])
        save(steps, folder, 4, world)
        check(steps, folder, world, {4})
        assert not [path for path in folder.iterdir() if path.name.startswith(".")]
        fatal += 1
    assert seen == {"open", "write", "fsync", "mkdir", "replace", "symlink", "unlink", "rmdir"}
    assert sorted(path.name for path in folder.glob("step_*")) == ["step_00000002", "step_00000003"]


def test_a_full_disk_at_any_operation_is_a_clear_error_and_older_checkpoints_stay(steps, world, tmp_path):
    folder, seen, fatal = tmp_path / "run", set(), 0
    while True:
        disk, message = attempt(steps, folder, world, fatal, full=True)
        check(steps, folder, world, {2, 3})
        if not disk.failed:
            break
        seen.add(disk.operations[fatal])
        assert "No space left on device" in message
        assert str(folder / "step_00000003") in message
        assert "bytes are needed" in message
        assert (folder / "step_00000001").exists()
        assert not list(folder.glob(".incoming_*"))
        save(steps, folder, 4, world)
        check(steps, folder, world, {4})
        fatal += 1
    assert seen == set(CREATING)


def test_the_newest_stay_and_the_best_one(world, tmp_path):
    engine = build_small()
    for step, score in enumerate([5.0, 1.0, 4.0, 3.0, None, float("nan"), 2.0], start=1):
        save_checkpoint(engine, tmp_path, step, STATE, world, score=score, keep=2)
    names = ["step_00000002", "step_00000006", "step_00000007"]
    assert sorted(path.name for path in tmp_path.glob("step_*")) == names
    assert [(tmp_path / link).readlink().name for link in ("best", "last")] == [names[0], names[2]]


def test_every_file_has_its_size_and_hash_and_the_code_that_wrote_it(steps):
    _, source, _ = steps
    path = source / "run" / "step_00000002"
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {file.name for file in path.iterdir()} - {"manifest.json"}
    assert all(entry["size"] == (path / name).stat().st_size for name, entry in manifest["files"].items())
    assert manifest["versions"].keys() == {"swim", "torch", "deepspeed", "transformers", "python", "commit"}
    assert manifest["frozen"].keys() == {"eye.weight"}


@pytest.mark.parametrize("damage", ["remove", "flip", "cut", "no manifest", "torn manifest"])
def test_a_damaged_newest_checkpoint_is_not_passed_over(steps, world, tmp_path, damage):
    engine, source, _ = steps
    shutil.copytree(source / "run", tmp_path / "run", symlinks=True)
    path = tmp_path / "run" / "step_00000002"
    victim = next(path.glob("*optim_states.pt")) if "manifest" not in damage else path / "manifest.json"
    data = bytearray(victim.read_bytes())
    if damage in ("remove", "no manifest"):
        victim.unlink()
    elif damage == "flip":
        data[len(data) // 2] ^= 1
        victim.write_bytes(data)
    else:
        victim.write_bytes(data[: len(data) // 2])
    assert latest_checkpoint(tmp_path / "run") == path
    with pytest.raises(CheckpointError, match=rf"{victim.name}.*delete this folder to resume from the one before"):
        load_checkpoint(engine, path, world)


def test_a_state_file_that_runs_code_is_refused(steps, world, tmp_path):
    engine, source, _ = steps
    shutil.copytree(source / "run" / "step_00000002", tmp_path / "step_00000002")

    class Payload:
        def __reduce__(self):
            return Path.touch, (tmp_path / "ran",)

    victim = next(tmp_path.glob("*/*optim_states.pt"))
    torch.save({"optimizer_state_dict": Payload()}, victim)
    manifest = json.loads((tmp_path / "step_00000002" / "manifest.json").read_text())
    manifest["files"][victim.name] = checkpoint_entry(victim)
    (tmp_path / "step_00000002" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(Exception, match=r"(?i)weights.?only"):
        load_checkpoint(engine, tmp_path / "step_00000002", world)
    assert not (tmp_path / "ran").exists()


def checkpoint_entry(path: Path) -> dict[str, object]:
    import hashlib

    return {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


@pytest.mark.parametrize(("stage", "persistent"), [(1, False), (2, False), (3, False), (3, True)])
def test_one_rank_goes_on_where_two_were(two_ranks, world, stage, persistent):
    """Frozen weights too, which this engine has other values of."""
    expected = torch.load(two_ranks / "expected.pt")[stage]
    engine = build_small(stage, seed=1, persistent=persistent)
    load_checkpoint(engine, two_ranks / f"stage{stage}" / "last", world)
    found = weights(engine)
    assert all(torch.equal(found[name], expected["weights"][name]) for name in found)
    assert train_small(engine, 3, 8) == pytest.approx(expected["losses"], abs=1e-6)
    load_checkpoint(engine, two_ranks / f"stage{stage}" / "last", world)
    assert train_small(engine, 3, 8) == pytest.approx(expected["losses"], abs=1e-6), "also an engine in mid-run"


def test_a_full_disk_on_one_rank_is_an_error_on_all(two_ranks):
    messages = {(two_ranks / f"error_{rank}").read_text() for rank in (0, 1)}
    assert len(messages) == 1
    assert "No space left on device" in messages.pop()


def test_a_frozen_weight_that_is_not_what_it_was_is_named(two_ranks, world, tmp_path):
    shutil.copytree((two_ranks / "stage3" / "last").resolve(), tmp_path / "step_00000003")
    path = tmp_path / "step_00000003" / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["frozen"]["eye.weight"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"frozen parameter eye\.weight"):
        load_checkpoint(build_small(), path.parent, world)


def test_a_run_outlives_two_failed_saves_but_no_third_and_no_failed_last_one(monkeypatch, capsys):
    config = load_config("tiny_cpu", ["run.save_every=2"])
    run = SimpleNamespace(config=config, heartbeat=Mock(), guard=Guard(config.guard, [9.0, 1.0, 3.0]), engine=None)
    run.order, run.world, run.failed_saves = Mock(), World(0, 1, torch.device("cpu")), 0
    outcomes = iter([True, True, False, True, True, True])
    scores = []

    def save(*_, score, **__):
        scores.append(score)
        if next(outcomes, True):
            raise CheckpointError("no space")

    monkeypatch.setattr(loop, "save_checkpoint", save)
    for step in range(5):
        loop._save(run, step, last=False)
    assert capsys.readouterr().out.count("no space; going on") == 4
    with pytest.raises(CheckpointError):
        loop._save(run, 5, last=False)
    run.failed_saves = 0
    with pytest.raises(CheckpointError):
        loop._save(run, 6, last=True)
    assert set(scores) == {2.0}, "the mean of the losses since the checkpoint before"
