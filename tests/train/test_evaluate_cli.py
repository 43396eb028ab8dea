"""Promise: `swim evaluate RUN --data D` works beside its stages, and what is asked wrongly is said in one line."""

import json
from pathlib import Path

import pytest
from evaluation_lines import write_file
from typer.testing import CliRunner

from swim.train import cli


@pytest.fixture
def asked(monkeypatch):
    """What the one-shot form was asked to do, instead of doing it."""
    calls = []
    monkeypatch.setattr("swim.train.demo.evaluate_runs", lambda *args: calls.append(args) or {})
    monkeypatch.setattr(cli, "print_results", lambda _: None)
    return calls


def invoke(*arguments):
    return CliRunner().invoke(cli.app, ["evaluate", *map(str, arguments)])


@pytest.mark.parametrize(
    "arguments",
    [
        ("runs/a", "runs/b", "--data", "d"),
        ("--data", "d", "runs/a", "runs/b"),
        ("run", "runs/a", "runs/b", "--data", "d"),
    ],
)
def test_a_first_word_that_is_no_stage_is_a_run(arguments, asked):
    assert invoke(*arguments).exit_code == 0
    assert asked == [({"a": Path("runs/a"), "b": Path("runs/b")}, "d", Path("runs/b"))]


def test_a_run_of_a_stage_s_name_is_given_with_its_folder(asked, tmp_path):
    assert invoke("./score", "--data", "d").exit_code == 0
    assert list(asked[0][0]) == ["score"]
    found = invoke("score", tmp_path / "p.jsonl")
    assert found.exit_code == 2
    assert "p.meta.json is missing" in found.stderr
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (("predict", "{folder}", "--data", "d"), "neither a run (config.yaml) nor a model folder"),
        (("predict", "{folder}/run", "--data", "d", "--keep", "everything"), "not one of: layers, heads, pixels"),
        (("score", "{folder}/p.jsonl", "--judge-url", "http://localhost:1/v1"), "--judge-model is missing"),
        (("score", "{folder}/p.jsonl", "--judge-model", "m"), "--judge-url is missing"),
        (("score", "{folder}/p.jsonl", "--judge-url", "http://localhost:1/v1", "--judge-model", "m"),
         "only videorefer-bench-d has a judge"),
        (("score", "{folder}/p.jsonl", "--names", "a,b"), "2 names for 1 files"),
        (("score", "{folder}/p.jsonl", "--benchmark", "mevis"), "there are: alignment-grid, videorefer-bench-d"),
        (("score", "{folder}/p.jsonl", "--judge-param", "temperature"), "not NAME=JSON"),
        (("judge-check",), "--judge-url is missing"),
        (("judge-check", "--judge-url", "http://localhost:1/v1", "--judge-model", "m", "--judge-key-env", "NO_KEY"),
         "no such variable is set"),
        (("report", "{folder}"), "`swim evaluate score` writes it"),
    ],
)  # fmt: skip
def test_what_is_asked_wrongly_is_one_line(arguments, problem, tmp_path):
    write_file(tmp_path / "p.jsonl", [], [], name="n")
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text((Path(__file__).parents[2] / "recipes" / "tiny_cpu.yaml").read_text())
    (run / "done.json").write_text("{}")
    found = invoke(*(argument.format(folder=tmp_path) for argument in arguments))
    assert found.exit_code == 2
    assert problem in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_nothing_expected_is_scored_as_nothing(tmp_path):
    write_file(tmp_path / "p.jsonl", [], [], name="n")
    assert invoke("score", tmp_path / "p.jsonl").exit_code == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["n"]["accuracy"]["value"] is None
