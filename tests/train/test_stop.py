"""Promise: a run that is asked to end saves, ends with 75 on all ranks and goes on bit for bit when started again; a
rank that gets no further is named and ends the job; nothing outlives its launcher; one folder holds one run."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import LAUNCHER, TINY, curve, finish, kill, num_steps, run, start
from tiny import make_data

from swim.train.heartbeat import Beat, Heartbeat, diagnose, read_beats
from swim.train.metrics import Metrics
from swim.train.prepare import lock_folder
from swim.train.stop import Stopped

STEPS = 25


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    make_data(folder, clips=6)
    return [*TINY, f"data.train=[{folder}]", f"run.steps={STEPS}", "run.name=run", "data.packs_per_step=2"]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    run(options, cwd=cwd)
    return cwd / "runs" / "run"


def wait_until(what: Callable[[], object], process: subprocess.Popen, *, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert process.poll() is None, finish(process)[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_time_a_file_and_usr1_stop_a_run_that_then_goes_on_bit_for_bit(options, undisturbed, tmp_path):
    folder = tmp_path / "runs" / "run"
    code, output = finish(start([*options, "run.max_hours=1e-9"], cwd=tmp_path))
    assert (code, num_steps(folder)) == (75, 1), output[-3000:]
    (folder / "stop").touch()
    code, output = finish(start(options, cwd=tmp_path))
    assert (code, num_steps(folder)) == (75, 2), output[-3000:]
    assert not (folder / "stop").exists(), "else no later start would get anywhere"
    process = start(options, cwd=tmp_path)
    wait_until(lambda: num_steps(folder) >= 4, process)
    os.kill(read_beats(folder)[1].pid, signal.SIGUSR1)  # to one rank: they agree
    code, output = finish(process)
    assert code == 75, output[-3000:]
    done = num_steps(folder)
    assert 4 <= done < STEPS
    assert f"stopped behind step {done} of {STEPS}, saved (SIGUSR1)" in output
    assert not (folder / "done.json").exists()
    output = run(options, cwd=tmp_path)
    assert f"step_{done:08d} at step {done}" in output
    assert curve(folder) == curve(undisturbed)
    name = Path("model", "model.safetensors")
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()
    assert "runs/run is finished" in run(options, cwd=tmp_path)


def test_a_folder_holds_one_run(options, tmp_path):
    folder = tmp_path / "runs" / "run"
    folder.mkdir(parents=True)
    lock_folder(folder)
    code, output = finish(start(options, cwd=tmp_path))
    assert code == 2
    assert f"runs/run belongs to a run that is going on (process {os.getpid()} on" in output
    assert not (folder / "config.yaml").exists()


DEEPSPEED = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", "2", str(LAUNCHER)]


@pytest.mark.parametrize("command", [["bash", str(LAUNCHER)], DEEPSPEED], ids=["bash", "deepspeed"])
def test_term_to_the_outermost_process_leaves_no_orphan(options, tmp_path, command):
    folder = tmp_path / "runs" / "run"
    process = start(options, cwd=tmp_path, command=command)
    try:
        wait_until(lambda: num_steps(folder) >= 2, process)
        beats = read_beats(folder)
        family = [*map(str, (beat.pid for beat in beats)), *workers(beats)]
        assert len(family) == 2 * 3, "each rank has a loader and its parent"
        process.terminate()
        deadline = time.monotonic() + 60
        while alive := [pid for pid in family if Path(f"/proc/{pid}/cmdline").exists()]:
            assert time.monotonic() < deadline, alive
            time.sleep(0.1)
        assert process.wait(timeout=60) != 0
        saved = [path.name for path in (folder / "checkpoints").glob("step_*")]
        assert saved == [f"step_{num_steps(folder):08d}"]
    finally:
        kill(process)
        process.stdout.close()


def workers(beats: list[Beat]) -> list[str]:
    """Process numbers of the children and grandchildren of ranks."""
    found = [str(beat.pid) for beat in beats]
    for pid in found:
        tasks = Path(f"/proc/{pid}/task").glob("*/children")
        found += [child for task in tasks for child in task.read_text().split()]
    return found[len(beats) :]


def test_a_rank_that_hangs_is_named_and_ends_the_job(options, tmp_path):
    folder = tmp_path / "runs" / "run"
    process = start([*options, "guard.hang_s=6", "guard.start_s=120", "data.deadline_s=1"], cwd=tmp_path)
    try:
        wait_until(lambda: num_steps(folder) >= 3, process)
        hung = read_beats(folder)[1].pid
        os.kill(hung, signal.SIGSTOP)
        began = time.monotonic()
        wait_until((folder / "ranks" / "stacks_00000.txt").exists, process, seconds=30)
        assert time.monotonic() - began < 6 + 10
        time.sleep(5)
        os.kill(hung, signal.SIGKILL)  # the launcher would wait long for a stopped process
        code, output = finish(process)
    finally:
        subprocess.run(["pkill", "-KILL", "-g", str(process.pid)], check=False)
    assert code != 0
    assert "rank 0:" in output
    assert "takes longer than 6 s (guard.hang_s)" in output
    assert f"silent: rank 1 on {os.uname().nodename} (process {hung}): step" in output
    assert "train_step" in (folder / "ranks" / "stacks_00000.txt").read_text()


WATCHED = """
import sys, time
from pathlib import Path
from swim.train.heartbeat import Heartbeat

with Heartbeat(Path(sys.argv[1]), 0, 2, limit_s=0.4, start_limit_s=float(sys.argv[2])) as heartbeat:
    heartbeat.phase("data", 1)
    print("on", flush=True)
    time.sleep(1000)
"""


@pytest.mark.parametrize("case", ["stuck file system", "another rank failed"])
def test_a_rank_ends_though_its_files_hang_and_when_another_one_has_failed(tmp_path, case):
    folder = tmp_path / "ranks"
    folder.mkdir()
    if case == "stuck file system":
        os.mkfifo(folder / "rank_00001.json")  # whoever opens it waits for ever
        os.mkfifo(folder / "stacks_00000.txt")
    limit = "0.4" if case == "stuck file system" else "1000"
    process = subprocess.Popen([sys.executable, "-c", WATCHED, tmp_path, limit], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "on\n"
    if case == "another rank failed":
        (folder / "failed.json").write_text('{"rank": 1}')
    output = process.communicate(timeout=60)[0]
    expected = 86 if case == "stuck file system" else 1
    assert process.returncode == expected, output
    assert "rank 0:" in output


@pytest.mark.parametrize(("error", "marked"), [(ValueError, True), (Stopped, False)])
def test_a_rank_that_fails_leaves_a_mark_and_one_that_was_stopped_none(tmp_path, error, marked):
    heartbeat = Heartbeat(tmp_path, 1, 2, limit_s=9, start_limit_s=9)

    def train() -> None:
        with heartbeat:
            heartbeat.phase("forward", 3)
            raise error("x")

    with pytest.raises(error):
        train()
    assert (tmp_path / "ranks" / "failed.json").exists() == marked
    (beat,) = read_beats(tmp_path)
    assert (beat.rank, beat.step, beat.phase) == (1, 3, f"end by {error.__name__}")


def test_a_full_disk_costs_lines_of_the_log_and_not_the_run(capsys):
    names = ("loss/total", "lr", "tokens_per_s", "data_wait", "peak_memory_mib", "holes")
    with Metrics(Path("/dev/full"), start=0, steps=2) as log:
        log.log(1, dict.fromkeys(names, 0.0))
    assert "step 1 is missing in metrics.jsonl" in capsys.readouterr().out


def test_beats_tell_silent_slow_and_ended_ranks_apart(tmp_path):
    def say(rank: int, **fields) -> None:
        beat = {"rank": rank, "host": "n1", "pid": 7, "step": 5, "phase": "forward", "since": 990.0, "written": 999.0}
        (tmp_path / "ranks" / f"rank_{rank:05d}.json").write_text(json.dumps(beat | fields))

    (tmp_path / "ranks").mkdir()
    assert diagnose(tmp_path, now=1000.0) == [f"{tmp_path / 'ranks'}: no rank has written anything"]
    say(0, since=995.0)
    say(1, step=4, since=996.0)
    say(2)
    assert diagnose(tmp_path, 3, now=1000.0) == [
        "furthest behind: rank 1 on n1 (process 7): step 4, forward for 4 s, last heard of 1 s ago"
    ]
    say(1, since=980.0, written=981.0)
    assert diagnose(tmp_path, 3, now=1000.0) == [
        "silent: rank 1 on n1 (process 7): step 5, forward for 20 s, last heard of 19 s ago"
    ]
    say(1, phase="end", written=10.0)
    say(0, phase="end by TrainingError", written=10.0)
    (tmp_path / "ranks" / "rank_00002.json").write_text('{"rank": 2, "ho')
    assert diagnose(tmp_path, 3, now=1000.0) == ["rank 2: has never written anything"]
