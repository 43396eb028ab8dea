"""Promise: `swim doctor` says what breaks training, on a machine, between ranks and in a run; its exit code agrees."""

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import environment
from tiny import make_data
from typer.testing import CliRunner

from swim.train import doctor
from swim.train.cli import app
from swim.train.doctor import Finding, block, check_data, check_disk, check_machine
from swim.train.doctor_ranks import Timing, judge
from swim.train.doctor_run import check_run
from swim.train.world import find_place, set_place


def bad(findings: list[Finding]) -> dict[str, str]:
    return {finding.name: finding.text for finding in findings if finding.remedy}


def test_a_healthy_machine_is_healthy(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor, "TESTED_MIB", 4)
    make_data(tmp_path / "clips", clips=2)
    found = check_machine(tmp_path / "runs", str(tmp_path / "clips"))
    assert not bad(found)
    names = [finding.name for finding in found]
    wanted = "torch deepspeed transformers decoders GPUs port compiler disk bandwidth fsync clock locks shards"
    assert set(wanted.split()) <= set(names)
    assert not list((tmp_path / "runs").iterdir()), "what was written is removed"
    text = block(found)
    assert text.startswith("swim doctor  ")
    assert "\nok  locks         another process is kept out" in text


def test_what_breaks_training_has_a_remedy(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    assert "disk" in bad(check_disk(tmp_path / "file" / "runs"))
    assert check_data(str(tmp_path / "nowhere")).remedy
    monkeypatch.setattr(doctor, "MIN_FREE_GIB", 1e9)
    monkeypatch.setattr(doctor, "TESTED_MIB", 1)
    monkeypatch.setattr(doctor, "MAX_FSYNC_S", 0.0)
    monkeypatch.setattr(doctor, "_is_kept_out", lambda _: False)
    assert set(bad(check_disk(tmp_path / "runs"))) == {"disk", "fsync", "locks"}
    monkeypatch.setattr(doctor, "MIN_SHM_MIB", 1 << 40)
    monkeypatch.setattr(doctor, "MIN_FILES", resource.getrlimit(resource.RLIMIT_NOFILE)[0] + 1)
    monkeypatch.setenv("MASTER_PORT", "1")
    found = bad(check_machine())
    assert {"/dev/shm", "open files"} <= set(found)


def test_damaged_shards_are_found(tmp_path):
    make_data(tmp_path / "clips", clips=2)
    shard = next((tmp_path / "clips").glob("*.tar"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 3] ^= 255
    shard.write_bytes(data)
    found = check_data(str(tmp_path / "clips"))
    assert "are bad, e.g." in found.remedy
    assert f"swim data check {tmp_path / 'clips'}" in found.remedy


def timings(**slow: dict[str, float]) -> list[Timing]:
    usual = {"compute": 0.01, "copy": 0.001, "reduce": 0.002, "link": 0.003, "clock": 1000.0}
    return [
        Timing(
            2 * node + local, f"n{node}", **{**usual, **slow.get(f"n{node}", {}), **({"link": None} if local else {})}
        )
        for node in range(4)
        for local in range(2)
    ]


def test_the_slow_node_is_named():
    assert not bad(judge(timings(), "cpu"))
    assert not bad(judge(timings(n2={"compute": 0.014}), "cpu"))
    assert bad(judge(timings(n2={"compute": 0.02}), "cpu")) == {"compute": "matrix product 10.00 ms; slow: n2 2.0 x"}
    assert bad(judge(timings(n1={"link": 0.03}), "cpu")) == {"link": "1 MiB to a neighbour 3.00 ms; slow: n1 10.0 x"}
    assert bad(judge(timings(n3={"clock": 1090.0}), "cpu")) == {"clocks": "differ: n3 by 90 s"}
    two = [timing for timing in timings(n1={"copy": 0.002}) if timing.host in ("n0", "n1")]
    assert bad(judge(two, "cpu")) == {"copy": "copy of 16 MiB 1.00 ms; slow: n1 2.0 x"}


def test_two_ranks_are_checked_together(tmp_path):
    command = [sys.executable, "-m", "swim.train.cli", "doctor", "--disk", str(tmp_path)]
    root = {"PYTHONPATH": str(Path(__file__).parents[2]), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29717"}
    processes = [
        subprocess.Popen(
            command,
            env={
                **environment(),
                **root,
                "RANK": str(rank),
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "0",
                "SLURMD_NODENAME": node,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, node in enumerate(("n1", "n2"))
    ]
    first, second = (process.communicate(timeout=120)[0] for process in processes)
    assert "2 on 2 nodes (cpu), all-reduce of 1 MiB" in first
    assert "swim doctor" in first
    assert "swim doctor" not in second, "the first rank speaks for all"
    # Two ranks that share two busy cores may be named as slow; then both exit with 1.
    assert [process.returncode for process in processes] == [int("BAD" in first)] * 2


@pytest.fixture
def run(tmp_path) -> Path:
    (tmp_path / "ranks").mkdir()
    (tmp_path / "config.yaml").touch()
    (tmp_path / "checkpoints" / "step_00000004").mkdir(parents=True)
    (tmp_path / "checkpoints" / ".incoming_00000005").mkdir()
    lines = [{"step": step, "loss/total": 2.5, "step_s": 0.5, "data_wait": 0.1} for step in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    (tmp_path / "quarantine.jsonl").write_text('{"step": 1, "id": "a", "reason": "bad byte 17"}\n' * 2)
    return tmp_path


def say(run: Path, rank: int, **fields) -> None:
    beat = {"rank": rank, "host": f"n{rank}", "pid": 7, "step": 5, "phase": "forward", "since": 990.0, "written": 999.0}
    (run / "ranks" / f"rank_{rank:05d}.json").write_text(json.dumps(beat | fields))


def test_a_run_is_described(run):
    say(run, 0)
    say(run, 1, step=4)
    found = check_run(run, now=1000.0)
    assert not bad(found)
    text = block(found)
    assert "furthest behind: rank 1 on n1 (process 7): step 4" in text
    assert "5, loss 2.5, median of the last 5: 0.5 s a step, 10% of it waiting for data" in text
    assert "step_00000004, 1 kept" in text
    assert "2 lines: 2 x 'bad byte N'" in text
    say(run, 1, written=900.0)
    (run / "ranks" / "stacks_00000.txt").touch()
    assert "silent: rank 1 on n1" in bad(check_run(run, now=1000.0))["run"]
    assert "stacks_00000.txt" in block(check_run(run, now=1000.0))
    say(run, 3)
    assert "rank 2: has never written" in bad(check_run(run, now=1000.0))["run"]


def test_how_a_run_ended(run):
    for rank in (0, 1):
        say(run, rank, phase="end by Stopped", written=10.0)
    assert not bad(check_run(run, now=1000.0))
    say(run, 1, phase="end by TrainingError", written=10.0)
    assert "rank 1 on n1 was the first to end, end by TrainingError" in bad(check_run(run, now=1000.0))["run"]
    (run / "done.json").write_text("{}")
    assert not bad(check_run(run, now=1000.0))


def test_exit_codes_of_the_command(run):
    say(run, 0, written=time.time())
    runner = CliRunner()
    assert runner.invoke(app, ["doctor", str(run)]).exit_code == 0
    say(run, 1, written=time.time() - 3600)
    result = runner.invoke(app, ["doctor", str(run)])
    assert result.exit_code == 1
    assert "BAD run" in result.output
    (run / "config.yaml").unlink()
    assert isinstance(runner.invoke(app, ["doctor", str(run)]).exception, FileNotFoundError)


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1"}, (3, 4, 1)),
        ({"SLURM_STEP_ID": "0", "SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1"}, (5, 8, 1)),
        # A batch script, or an interactive step: alone, whatever its job is.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, (0, 1, 0)),
        ({"SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}, (0, 1, 0)),
        ({"OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0"}, (2, 4, 0)),
    ],
    ids=["alone", "torch", "srun", "batch", "interactive", "openmpi"],
)
def test_where_a_process_is(variables, place, monkeypatch):
    prefixes = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_", "SLURM_", "OMPI_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(prefixes)}
    monkeypatch.setattr(os, "environ", {**clean, **variables})
    assert find_place() == place
    set_place(*place)
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == (str(place[0]), "127.0.0.1")


def test_ranks_of_a_job_meet_at_its_first_node(tmp_path, monkeypatch):
    (tmp_path / "scontrol").write_text(
        '#!/bin/sh\n[ "$2" = node ] && echo " NodeAddr=10.0.0.7 Port=1" || echo "n3\nn4"\n'
    )
    (tmp_path / "scontrol").chmod(0o755)
    job = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "20007", "SLURM_JOB_NODELIST": "n[3-4]"}
    monkeypatch.setattr(os, "environ", job)
    set_place(1, 2, 0)
    # The formula of launch/slurm/job.sh.
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("10.0.0.7", "10007")
