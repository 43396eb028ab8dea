"""Promise: what the SLURM scripts decide, without SLURM: submit.sh checks before it submits, a job is requeued exactly
when that can help, a part of a conversion gets its number. Stand-ins on PATH take the place of SLURM."""

import base64
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from processes import LAUNCHER, ROOT, environment

SLURM = ROOT / "launch" / "slurm"
STAND_INS = {
    "sbatch": 'echo "$@" >> "$CALLS/sbatch"',
    # What node.sh would be given; then the end that a test asks for.
    "srun": """printf "%s\\n" "$@" > "$CALLS/srun"
env > "$CALLS/environment"
if [ -e "$CALLS/hook" ]; then . "$CALLS/hook"; fi
exit "${END:-0}\"""",
    "scontrol": """case "$1 $2" in
  "show hostnames") printf "n1\\nn2\\n" ;;
  "show node") echo "   NodeAddr=10.0.0.7 NodeHostName=$3 Port=1" ;;
  "show job") printf "   Command=%s\\n   WorkDir=/\\n" "$SCRIPT" "$SCRIPT" ;;
  requeue*) echo "$2" >> "$CALLS/requeue" ;;
esac""",
}
# Stands in for the program as well: what the job asks it is known.
PYTHON = """case "$*" in
  -c*) exit 0 ;;
  *--placement*) echo "$*" > "$CALLS/placement"; echo "2 4711 $RUN" ;;
  *doctor*) echo "doctor was asked about ${@: -1}" ;;
  *) printf "%s\\n" "$@" ;;
esac"""


class Stage:
    """A folder of stand-ins, what they were called with, and a run folder."""

    def __init__(self, folder: Path) -> None:
        self.bin, self.calls, self.run = folder / "bin", folder / "calls", folder / "a run"
        for path in (self.bin, self.calls, self.run):
            path.mkdir()
        for name, text in {**STAND_INS, "python": PYTHON}.items():
            (self.bin / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
            (self.bin / name).chmod(0o755)

    def __call__(self, script: Path, *arguments: str, real: bool = False, **extra: str) -> tuple[int, str]:
        fixed = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "CALLS": str(self.calls),
            "RUN": str(self.run),
            "SWIM_PYTHON": sys.executable if real else str(self.bin / "python"),
        }
        process = subprocess.run(
            ["bash", str(script), *arguments],
            cwd=self.run.parent,
            env={**environment(), **fixed, **extra},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
        )
        return process.returncode, process.stdout

    def called(self, name: str) -> list[str]:
        path = self.calls / name
        return path.read_text().splitlines() if path.exists() else []

    def job(self, end: int, **extra: str) -> tuple[int, str]:
        """What a batch job does whose ranks end with this code."""
        fixed = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]", "ENVIRONMENT": "BATCH", "END": str(end)}
        return self(LAUNCHER, "--config", "tiny_cpu", "run.name=a b", **{**fixed, **extra})

    def save(self, step: int) -> None:
        (self.run / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


@pytest.fixture
def stage(tmp_path) -> Stage:
    return Stage(tmp_path)


SUBMIT = ("--profile", "h100", "--nodes", "4", "--time", "24:00:00")


def test_submit_checks_the_recipe_and_prints_what_it_would_do(stage):
    options = ("--partition", "big", "--account=lab", "--gpus=4", "--grace", "600", "--dry-run")
    code, output = stage(SLURM / "submit.sh", *SUBMIT, *options, "tiny_cpu", "run.name=a b", real=True)
    assert code == 0, output
    line = (
        "sbatch --nodes=4 --time=24:00:00 --partition=big --account=lab --gpus-per-node=4 --signal=USR1@600 "
        rf"--job-name=a\ b --output=runs/a\ b/slurm-%j.log {SLURM}/h100.sbatch --config tiny_cpu run.name=a\ b"
    )
    assert output.strip() == line
    assert not stage.called("sbatch")
    assert not (stage.run.parent / "runs").exists(), "a dry run leaves nothing behind"


def test_submit_submits(stage):
    code, output = stage(SLURM / "submit.sh", *SUBMIT, "tiny_cpu", "run.steps=3")
    assert code == 0, output
    assert stage.called("placement") == ["-m swim.train --placement --config tiny_cpu run.steps=3"]
    (line,) = stage.called("sbatch")
    assert line.startswith("--nodes=4 --time=24:00:00 --job-name=a run ")
    assert line.endswith("h100.sbatch --config tiny_cpu run.steps=3")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*SUBMIT, "tiny_cpu", "run.step=3"], "run.step: unknown key; did you mean 'steps'?"),
        ([*SUBMIT], "RECIPE is missing"),
        (
            ["--profile", "b200", *SUBMIT[2:], "tiny_cpu"],
            "--profile b200 is neither a file nor one of: a100.sbatch h100",
        ),
        ([*SUBMIT[:2], "--nodes", "0", "--time", "1", "tiny_cpu"], "--nodes '0' is not a number from 1 on"),
        ([*SUBMIT, "--nodse", "2", "tiny_cpu"], "unknown option --nodse"),
        ([*SUBMIT, "--gpus"], "--gpus needs a value"),
    ],
)
def test_submit_refuses_mistakes(stage, arguments, message):
    code, output = stage(SLURM / "submit.sh", *arguments, real=True)
    assert code == 2, output
    assert message in output
    assert not stage.called("sbatch")


def test_a_job_starts_a_launcher_on_every_node(stage):
    stage.job(0)
    called, given = stage.called("srun"), dict(x.split("=", 1) for x in stage.called("environment") if "=" in x)
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1"} <= set(called)
    assert called[-5:] == ["bash", f"{SLURM}/node.sh", "--config", "tiny_cpu", "run.name=a b"]
    assert json.loads(base64.urlsafe_b64decode(given["SWIM_WORLD"])) == {"n1": [0, 1], "n2": [0, 1]}
    assert (given["MASTER_ADDR"], given["MASTER_PORT"]) == ("10.0.0.7", "14242")
    assert given["TORCH_FR_DUMP_TEMP_FILE"] == f"{stage.run}/ranks/collectives_"
    # The launcher takes the shell's place, with USR1 ignored.
    code, output = stage(SLURM / "node.sh", "run.steps=3", **{**given, "SLURM_NODEID": "1", "END": "0"})
    assert code == 0, output
    words = output.splitlines()
    assert words[:2] == ["-m", "deepspeed.launcher.launch"]
    assert words[words.index("--node_rank") + 1] == "1"
    assert words[-1] == "run.steps=3"


def test_the_scripts_find_the_repository_from_the_copy_that_sbatch_makes(stage):
    for name in ("slurm/h100.sbatch", "slurm/a100.sbatch", "train.sh"):
        original = ROOT / "launch" / name
        copy = stage.calls / "slurm_script"
        copy.write_text(original.read_text())
        fixed = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NODELIST": "n[1-2]", "SCRIPT": f"{original} run.name=a b x=1"}
        code, output = stage(copy, "run.name=a b", "x=1", **fixed)
        assert code == 1, output
        assert "0 starts" not in output
        assert f"no {stage.run}/done.json" in output
        assert stage.called("srun")[-3:] == [f"{SLURM}/node.sh", "run.name=a b", "x=1"]


@pytest.mark.parametrize(
    ("end", "code", "requeued", "said"),
    [
        (75, 75, True, "requeue: newest checkpoint none, before it was none; 1 starts in a row"),
        (247, 247, True, "doctor was asked about"),
        (2, 2, False, "the ranks ended with 2"),
        (0, 1, False, "done.json: the run is not finished"),
    ],
)
def test_a_job_is_requeued_when_that_can_help(stage, end, code, requeued, said):
    found, output = stage.job(end)
    assert found == code, output
    assert stage.called("requeue") == (["4242"] if requeued else [])
    assert said in output


def test_done_counts_and_not_the_exit_code(stage):
    (stage.run / "done.json").touch()
    assert stage.job(247)[0] == 0
    assert not stage.called("requeue")


def test_a_cancelled_job_is_not_requeued(stage):
    (stage.calls / "hook").write_text("kill -TERM $PPID\n")
    code, output = stage.job(75)
    assert (code, stage.called("requeue")) == (143, [])
    assert "not requeued from here: told to end" in output


def test_an_allocation_without_a_batch_job_is_not_requeued(stage):
    code, output = stage.job(75, ENVIRONMENT="")
    assert (code, stage.called("requeue")) == (75, [])
    assert "run the same command again to go on" in output


def test_a_job_without_progress_is_given_up(stage):
    stage.save(5)
    for count in (1, 2):
        assert f"{count} starts in a row" in stage.job(75)[1]
    (stage.calls / "hook").write_text(
        'mkdir -p "$RUN/checkpoints/step_00000009" "$RUN/checkpoints/.incoming_00000011"\n'
    )
    assert "newest checkpoint step_00000009, before it was step_00000005; 0 starts" in stage.job(75)[1]
    (stage.calls / "hook").unlink()
    for _ in range(2):
        stage.job(86)
    assert len(stage.called("requeue")) == 5
    code, output = stage.job(86)
    assert code == 86
    assert "not requeued: 3 starts in a row ended without a newer checkpoint than step_00000009" in output
    assert len(stage.called("requeue")) == 5
    assert "1 starts in a row" in stage.job(75, SLURM_JOB_ID="4243")[1], "submitted anew, it is tried anew"


def test_a_task_of_an_array_converts_its_part(stage):
    array = {
        "SLURM_JOB_ID": "4250",
        "SLURM_ARRAY_TASK_ID": "2",
        "SLURM_ARRAY_TASK_COUNT": "4",
        "SLURM_CPUS_PER_TASK": "8",
    }
    script = SLURM / "convert.sbatch"
    given = ("sav", "a b.json", "--out", "shards")
    fixed = {**array, "SCRIPT": f"{script} {' '.join(given)}"}
    code, output = stage(script, *given, **fixed, SLURM_ARRAY_TASK_MIN="0", SLURM_ARRAY_TASK_MAX="3")
    assert code == 0, output
    wanted = ["-m", "swim.train.cli", "data", "convert", *given, "--jobs", "8", "--part", "2/4"]
    assert output.splitlines() == wanted
    code, output = stage(script, *given, **fixed, SLURM_ARRAY_TASK_MIN="1", SLURM_ARRAY_TASK_MAX="4")
    assert code == 2
    assert "submit with --array=0-LAST; got numbers 1 to 4" in output
