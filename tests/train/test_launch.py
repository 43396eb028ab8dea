"""Promise: the README's launch lines work as typed, with the ranks they say, and a mistake gives one clear line."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import LAUNCHER, ROOT, environment, finish, metrics, run, start
from tiny import make_data


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    make_data(folder / "clips", clips=4)
    return [f"data.train=[{folder / 'clips'}]", "data.synth=null", "run.steps=1", "data.clips_per_pack=1"]


def deepspeed() -> list[str]:
    # The console script of the environment these tests run in.
    return [str(Path(sys.executable).parent / "deepspeed")]


@pytest.mark.parametrize(
    ("command", "ranks"),
    [
        (["bash", str(LAUNCHER)], 2),
        pytest.param([str(LAUNCHER)], 2, marks=pytest.mark.slow),  # the same bash, found by the kernel
        ([*deepspeed(), str(LAUNCHER)], 1),
        ([*deepspeed(), "--num_gpus", "2", "--no_python", str(LAUNCHER)], 2),
    ],
    ids=["bash", "executable", "deepspeed", "deepspeed-no-python"],
)
def test_forms_of_launching(options, command, ranks, tmp_path):
    output = run(["--config", "tiny_cpu", *options, "run.name=a b"], cwd=tmp_path, command=command)
    folder = tmp_path / "runs" / "a b"
    assert "stock transformers folder" in output
    assert len(metrics(folder)) == 1
    assert f'"ranks": {ranks}' in (folder / "done.json").read_text()


def test_a_run_that_is_asked_to_end_says_so_by_its_exit_code_in_every_form(options, tmp_path):
    # The form by bash: test_stop.py; those of SLURM: test_slurm.py.
    (tmp_path / "runs" / "asked").mkdir(parents=True)
    (tmp_path / "runs" / "asked" / "stop").touch()
    arguments = ["--config", "tiny_cpu", *options, "run.steps=3", "run.name=asked"]
    code, output = finish(start(arguments, cwd=tmp_path, command=[*deepspeed(), "--no_python", str(LAUNCHER)]))
    assert code == 75, output[-3000:]
    assert "stopped behind step 1 of 3, saved" in output


def test_without_arguments_it_is_the_tiny_recipe():
    asked = subprocess.run(
        [sys.executable, "-m", "swim.train", "--placement"], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    assert asked.stdout.split()[0] == "2", asked.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run.step=3"], "run.step: unknown key; did you mean 'steps'?"),
        (["system.layer=[1]"], "system.layer: unknown key; did you mean 'layers'?"),
        (["--config", "tiny_gpu"], "tiny_gpu: no such recipe; give a YAML file or one of:"),
        (["--confg", "tiny_cpu"], "unknown argument '--confg'"),
        (["run.steps"], "unknown argument 'run.steps'"),
        (["optim.lr=fast"], "optim.lr: Input should be a valid number"),
    ],
)
def test_mistakes_end_before_any_rank_starts(arguments, message, tmp_path):
    code, output = finish(start(arguments, cwd=tmp_path), timeout_s=60)
    assert code != 0
    assert message in output
    assert "Traceback" not in output
    assert "WORLD INFO" not in output, "a rank was started"


def test_starts_without_a_compiler(options, tmp_path):
    empty = tmp_path / "bin"
    empty.mkdir()
    for tool in ("bash", "env", "dirname", "readlink"):
        (empty / tool).symlink_to(subprocess.check_output(["which", tool], text=True).strip())
    process = subprocess.run(
        ["bash", str(LAUNCHER), *options, "run.name=bare", "launch.ranks=1"],
        cwd=tmp_path,
        env={**environment(), "PATH": str(empty), "SWIM_PYTHON": sys.executable},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert (tmp_path / "runs" / "bare" / "done.json").exists()


def test_missing_data_names_the_folder_and_the_remedy(tmp_path):
    code, output = finish(start(["data.synth=null", "data.train=[nowhere]"], cwd=tmp_path), timeout_s=120)
    assert code == 2
    assert "error: nowhere: no *.tar found" in output
