"""`swim data bench` compares ways that give the same, and its cores follow from what it prints."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from swim.data_tools import bench
from swim.train.cli import app

SMALL = {"MASKS": {"small": (72, 128)}, "NUM_PACKED": 4000, "NUM_PLANNED": 8000}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(bench, name, value)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(app, ["data", "bench", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_cores_are_cpu_time_over_the_time_of_a_step(synth_folder: Path) -> None:
    recipe = ["--recipe", "tiny_cpu", "data.num_frames=6", "--limit", 2]
    found = json.loads(run(synth_folder, *recipe, "--step-seconds", 0.5, "--samples-per-step", 8, "--json"))
    of_recipe = found["recipe"]
    spent = sum(of_recipe["seconds"].values())
    assert spent > 0
    assert of_recipe["cores"] == pytest.approx(8 * spent / 0.5)
    assert of_recipe["step_seconds_are"] == "given"
    assert found["masks"]["small"]["ratio"] > 0
    assert found["reads"]["at random"] > found["reads"]["at random, checked"] > 0
    assert found["decoders"]["stored"]["pyav"] > 0
    assert 0.9 < found["packs"]["fill"] <= 1
    assert 1 <= found["packs"]["balance"] < 1.2


def test_the_table_says_what_is_missing_and_what_is_assumed(
    synth_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = bench.importlib.util.find_spec
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: None if name == "webdataset" else find(name))

    def missing(decoder: str) -> None:
        if decoder != "pyav":
            raise bench.DecoderMissing

    monkeypatch.setattr(bench, "check_decoder", missing)
    table = run(synth_folder, "--recipe", "tiny_cpu", "--limit", 1)
    for said in (
        "webdataset is not installed",
        "canonical, decord",
        "not installed",
        "CPU cores per GPU",
        "(assumed: ",
    ):
        assert said in table
