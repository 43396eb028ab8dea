"""Promise: on a real SLURM of two nodes a submitted run that hits its time limit saves, is requeued and ends with the
curve of an undisturbed one; the other forms that SLURM knows train as well."""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from loose_files import write_loose
from processes import LAUNCHER, ROOT, TINY, curve, environment, num_steps, run
from tiny import make_data

from swim.data_tools.shards import ShardSet
from swim.train.heartbeat import read_beats

STEPS = 25
SUBMIT = ROOT / "launch" / "slurm" / "submit.sh"
CLUSTER = ROOT / "tests" / "slurm" / "cluster.sh"
TOOLS = ("slurmctld", "slurmd", "munged", "sbatch")

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(shutil.which(tool, path=f"{os.environ['PATH']}:/usr/sbin") for tool in TOOLS),
        reason="needs root and: apt-get install slurmctld slurmd slurm-client munge",
    ),
]


@pytest.fixture(scope="module", autouse=True)
def cluster(tmp_path_factory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([CLUSTER, "up", folder], check=True)
    os.environ["SLURM_CONF"] = f"{folder}/slurm.conf"
    try:
        yield
    finally:
        del os.environ["SLURM_CONF"]
        subprocess.run([CLUSTER, "down", folder], check=True)


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("clips") / "clips"
    make_data(folder, clips=6)
    # One rank on each of two nodes; two on one where the last word is launch.ranks=2.
    fixed = [f"run.steps={STEPS}", "run.name=run", "data.packs_per_step=2", "launch.ranks=1"]
    return [*TINY[2:], f"data.train=[{folder}]", *fixed]


@pytest.fixture(scope="module")
def undisturbed(options, tmp_path_factory) -> Path:
    cwd = tmp_path_factory.mktemp("undisturbed")
    run(["--config", "tiny_cpu", *options, "launch.ranks=2"], cwd=cwd)
    return cwd / "runs" / "run"


def call(*command: str | Path, cwd: Path, **extra: str) -> str:
    process = subprocess.run(
        command,
        cwd=cwd,
        env=environment(SWIM_PYTHON=sys.executable, **extra),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-4000:]
    return process.stdout


def submit(options: list[str], cwd: Path, *more: str) -> str:
    fixed = ("--profile", "h100", "--nodes", "2", "--gpus", "0")
    return call(SUBMIT, *fixed, *more, "tiny_cpu", *options, cwd=cwd).split()[-1]


def state(job: str) -> str:
    shown = subprocess.run(["scontrol", "show", "job", job], capture_output=True, text=True, check=True).stdout
    return next(word.partition("=")[2] for word in shown.split() if word.startswith("JobState="))


def wait_until(what: Callable[[], object], log: Path, *, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        if time.monotonic() > deadline:
            raise AssertionError(log.read_text()[-4000:] if log.exists() else "the job never began")
        time.sleep(0.1)


def test_a_job_at_its_time_limit_saves_is_requeued_and_ends_with_the_same_curve(options, undisturbed, tmp_path):
    folder = tmp_path / "runs" / "run"
    job = submit(options, tmp_path, "--time", "10", "--grace", "60")
    log = folder / f"slurm-{job}.log"
    wait_until(lambda: num_steps(folder) >= 3, log)
    ranks = [beat.pid for beat in read_beats(folder)]
    # So short a run would be over before SLURM looks at the time, which it does twice a minute: hold it until then.
    # What SLURM signals, it also continues.
    for pid in ranks:
        os.kill(pid, signal.SIGSTOP)
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=2"], check=True)
    wait_until(lambda: "requeue: newest checkpoint" in log.read_text(), log)
    subprocess.run(["scontrol", "update", f"jobid={job}", "timelimit=10"], check=True)
    done = num_steps(folder)
    assert 3 <= done < STEPS
    text = log.read_text()
    assert f"stopped behind step {done} of {STEPS}, saved" in text
    assert "the ranks ended with 75" in text
    assert f"requeue: newest checkpoint step_{done:08d}, before it was none; 0 starts in a row" in text

    wait_until(lambda: state(job) == "COMPLETED", log)
    text = log.read_text()
    assert f"newest checkpoint step_{done:08d}, restart 1" in text, "the log of both starts is one file"
    assert f"step_{done:08d} at step {done}" in text
    assert curve(folder) == curve(undisturbed)
    name = Path("model", "model.safetensors")
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


@pytest.mark.parametrize(
    "command",
    [
        ["sbatch", "--wait", "--nodes=2", "--output=log", str(LAUNCHER)],
        ["srun", "--nodes=2", "--ntasks-per-node=1", str(LAUNCHER)],
        ["salloc", "--nodes=2", "bash", str(LAUNCHER)],
        ["salloc", "--nodes=2", "--ntasks-per-node=1", "DEEPSPEED"],
    ],
    ids=["sbatch", "srun-per-rank", "salloc", "deepspeed-slurm"],
)
def test_forms_of_slurm(options, tmp_path, command):
    if command[-1] == "DEEPSPEED":
        (tmp_path / "hostfile").write_text("n1 slots=1\nn2 slots=1\n")
        deepspeed = [str(Path(sys.executable).parent / "deepspeed"), "--hostfile=hostfile", "--launcher=slurm"]
        # Else it asks the first node for its address by ssh.
        command = [*command[:-1], *deepspeed, "--no_ssh_check", "--master_addr=127.0.0.1", str(LAUNCHER)]
    call(*command, "--config", "tiny_cpu", *options, "run.steps=2", cwd=tmp_path)
    folder = tmp_path / "runs" / "run"
    assert num_steps(folder) == 2
    assert '"ranks": 2' in (folder / "done.json").read_text()


def test_a_cancelled_job_saves_and_is_not_requeued(options, tmp_path):
    folder = tmp_path / "runs" / "run"
    job = submit([*options, "run.steps=4000"], tmp_path, "--time", "10")
    log = folder / f"slurm-{job}.log"
    wait_until(lambda: num_steps(folder) >= 3, log)
    ranks = [beat.pid for beat in read_beats(folder)]
    subprocess.run(["scancel", job], check=True)
    wait_until(lambda: state(job) == "CANCELLED", log)
    assert not [pid for pid in ranks if Path(f"/proc/{pid}").exists()]
    assert "not requeued from here: told to end" in log.read_text()
    assert (folder / "checkpoints" / f"step_{num_steps(folder):08d}" / "manifest.json").exists()


def test_a_job_whose_rank_is_killed_is_requeued_and_ends_with_the_same_model(options, undisturbed, tmp_path):
    folder = tmp_path / "runs" / "run"
    job = submit([*options, "run.save_every=5"], tmp_path, "--time", "10")
    log = folder / f"slurm-{job}.log"
    wait_until((folder / "checkpoints" / "step_00000005").exists, log)
    os.kill(read_beats(folder)[1].pid, signal.SIGKILL)
    wait_until(lambda: state(job) == "COMPLETED", log)
    text = log.read_text()
    assert "the ranks ended with 247" in text
    assert "0 starts in a row without a newer one" in text
    name = Path("model", "model.safetensors")
    assert (folder / name).read_bytes() == (undisturbed / name).read_bytes()


def test_the_doctor_sees_both_nodes(tmp_path):
    # Two ranks on two busy cores may find each other slow, which is exit code 1.
    command = ("srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "swim.train.cli", "doctor")
    process = subprocess.run(
        command, cwd=tmp_path, env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True, timeout=120
    )
    assert "ranks         2 on 2 nodes (cpu), all-reduce of 1 MiB" in process.stdout, process.stderr[-3000:]
    assert process.returncode == int("BAD" in process.stdout)


def test_an_array_converts_all_parts(tmp_path):
    inputs, out = write_loose(tmp_path / "loose", make_data(tmp_path / "clips", clips=4)), tmp_path / "shards"
    script = ROOT / "launch" / "slurm" / "convert.sbatch"
    command = ("sbatch", "--wait", "--array=0-1", "--cpus-per-task=1", script, "jsonl", inputs, "--out", out)
    call(*command, cwd=tmp_path)
    assert len(ShardSet(out)) == 4
    assert len(list(tmp_path.glob("swim-convert-*_[01].log"))) == 2
