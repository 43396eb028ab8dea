"""Real runs of launch/train.sh for tests: a hard time limit, the end of the output when something fails, no orphans."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LAUNCHER = ROOT / "launch" / "train.sh"
TINY = (
    "--config",
    "tiny_cpu",
    "data.synth=null",
    "data.tasks=null",
    "data.clips_per_pack=1",
    "system.layers=[1, 3]",
    "optim.warmup_steps=2",
    "log.curves=false",  # a second each
)


def environment(**extra: str) -> dict[str, str]:
    """The environment of a user who activated nothing and set nothing."""
    hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH")
    # Nor those of the SLURM job that the tests may run in; where a cluster's configuration lies is no part of a job.
    kept = {
        k: v for k, v in os.environ.items() if k not in hidden and (not k.startswith("SLURM_") or k == "SLURM_CONF")
    }
    return {**kept, "HF_HUB_OFFLINE": "1", **extra}


def start(
    arguments: Sequence[str], *, cwd: Path, command: Sequence[str] = ("bash", str(LAUNCHER))
) -> subprocess.Popen[str]:
    """Start a launcher in a process group of its own."""
    return subprocess.Popen(
        [*command, *arguments],
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str], *, timeout_s: float = 180) -> tuple[int, str]:
    """Exit code and output; kills the whole group when the limit passes."""
    try:
        output, _ = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        kill(process)
        output, _ = process.communicate()
        raise AssertionError(f"no end after {timeout_s} s; the output ends with:\n{output[-4000:]}") from None
    return process.returncode, output


def kill(process: subprocess.Popen[str]) -> None:
    """SIGKILL to every process of the group, as a dying node would; none need be left of it."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def rank_processes(name: str) -> dict[int, int]:
    """Process id of every rank of the run of this name, by rank; loader processes are none."""
    found: dict[int, tuple[int, int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"run.name={name}".encode() not in (folder / "cmdline").read_bytes().split(b"\0"):
                continue
            variables = dict(line.split(b"=", 1) for line in (folder / "environ").read_bytes().split(b"\0") if line)
            started = int((folder / "stat").read_text().rsplit(")", 1)[1].split()[19])
        except OSError:
            continue
        if b"RANK" in variables:
            rank = int(variables[b"RANK"])
            found[rank] = min(found.get(rank, (started, int(folder.name))), (started, int(folder.name)))
    return {rank: pid for rank, (_, pid) in found.items()}


def run(
    arguments: Sequence[str], *, cwd: Path, command: Sequence[str] = ("bash", str(LAUNCHER)), timeout_s: float = 180
) -> str:
    """Output of a launcher that must succeed."""
    code, output = finish(start(arguments, cwd=cwd, command=command), timeout_s=timeout_s)
    assert code == 0, f"exit code {code}; the output ends with:\n{output[-4000:]}"
    return output


def metrics(folder: Path) -> list[Mapping[str, Any]]:
    """The lines of a run's metrics.jsonl."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def num_steps(folder: Path) -> int:
    """Steps that a run has logged so far."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def curve(folder: Path) -> list[dict[str, Any]]:
    """What two equal runs log alike: all but times and memory."""
    timed = ("step_s", "tokens_per_s", "data_wait", "peak_memory_mib", "tflops", "mfu")
    return [
        {name: value for name, value in line.items() if name not in timed and not name.startswith("time/")}
        for line in metrics(folder)
    ]
