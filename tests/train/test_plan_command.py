"""Promise: `swim data plan` says what training will do, without a model, and what is wrong with a recipe."""

import json
from pathlib import Path

import pytest
from tiny import make_data
from typer.testing import CliRunner, Result

from swim.train import stock
from swim.train.cli import app


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["data", "plan", "tiny_cpu", *map(str, arguments)])


@pytest.fixture
def mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setattr(stock.AutoModelForImageTextToText, "from_config", None)
    for name, clips in (("a", 12), ("b", 8)):
        make_data(tmp_path / name, clips=clips, seed=clips)
    train = json.dumps([str(tmp_path / "a"), {"path": str(tmp_path / "b"), "repeat": 2.5}])
    return [f"data.train={train}", "data.synth=null", f"run.output={tmp_path / 'runs'}", "run.steps=12"]


def test_steps_packs_and_shares_are_printed(mixture, tmp_path):
    result = plan(*mixture, "--world-size", 4)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].startswith("counting the tokens of 12 records")
    assert lines[2:5] == [
        "steps     6 an epoch; run.steps 12: 2.00 epochs",
        "packs     11, 2 a step; 250 to 375, on average 364 tokens",
        "tokens    4,000 an epoch; 250 to 750, on average 667 a step",
    ]
    # 32 clips, three in a pack; five full steps of two packs on four ranks, one of one pack.
    assert lines[5] == "ranks     4, 1 micro-batches each a step; 13 dummy packs an epoch"
    assert "2.000 on average, 2.000 at most" in lines[6], "two of four ranks have nothing to do"
    assert lines[7:9] == [
        f"{tmp_path / 'a'}: 12 clips x 1: 12 in packs (37.5%), 36 conversations",
        f"{tmp_path / 'b'}: 8 clips x 2.5: 20 in packs (62.5%), 60 conversations",
    ]
    assert lines[9].startswith("digest ")


def test_a_token_budget_is_filled(mixture):
    by_tokens = ["data.clips_per_pack=null", "data.tokens_per_pack=600", "data.packed=true", "data.packs_per_step=3"]
    result = plan(*mixture, *by_tokens)
    assert result.exit_code == 0, result.output
    assert "packs     8, 3 a step; 83.33% of 600 tokens filled" in result.stdout
    assert "ranks     2, 2 micro-batches each a step; 4 dummy packs an epoch" in result.stdout
    refused = plan(*mixture, *by_tokens, "data.tokens_per_pack=90")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert "data.tokens_per_pack is 90" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_a_bad_recipe_is_one_message(tmp_path):
    for arguments, message in (
        (["data.trian=x"], "did you mean 'train'?"),
        ([f"data.train={tmp_path}"], "no *.tar found"),
        (["data.tokens_per_pack=9"], "set one of them to null"),
        (["nonsense"], "not of the form section.key=value"),
    ):
        result = plan(*arguments)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
