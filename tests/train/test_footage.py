"""Promise: real clips with real masks go from a foreign file to a trained model and a report, hidden objects
included."""

import json
import subprocess
import sys

import pytest
from footage import footage_dir
from processes import environment, metrics, run

from swim.data_tools.shards import ShardSet


def swim(*arguments: str, cwd) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "swim.train.cli", *arguments],
        cwd=cwd,
        env=environment(PYTHONPATH=str(footage_root())),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-1000:]
    return done.stdout


def footage_root():
    from processes import ROOT

    return ROOT


@pytest.mark.slow
def test_footage_trains_and_reports(tmp_path):
    source = footage_dir()
    nl_refer = str(source / "nl_refer_footage.json")
    swim("data", "convert", "nl-refer", nl_refer, "--video-root", str(source), "--out", "shards", cwd=tmp_path)
    shards = ShardSet(tmp_path / "shards")
    conversations = [c for i in range(len(shards)) for c in shards.read(i).record.conversations]
    assert len(shards) == 2, "two videos, four records: records of one video share its sample"
    assert sorted(len(turn.mentions) for c in conversations for turn in c.turns if turn.role == "user") == [1, 1, 1, 2]

    options = [
        *("--config", "tiny_cpu", "run.name=footage", "run.steps=20", "optim.warmup_steps=5", "launch.ranks=2"),
        *("data.train=[shards]", "data.synth=null", "data.tasks=null", "data.clips_per_pack=1"),
        *("data.packs_per_step=2", "data.num_frames=8", "data.min_pixels=3136", "data.max_pixels=9408"),
    ]
    run(options, cwd=tmp_path)
    lines = metrics(tmp_path / "runs" / "footage")
    assert len(lines) == 20
    assert lines[-1]["loss/mask"] < lines[0]["loss/mask"]
    assert lines[-1]["loss/text"] < lines[0]["loss/text"]
    # Five nouns in two packs: the ball's (hidden in most frames), the cups' (twice), the mug's.
    assert {line["count/nouns"] for line in lines} == {5.0}
    assert all(line["count/absent_steps"] > 0 for line in lines), "the ball is hidden in the middle of the clip"

    swim("evaluate", "runs/footage", "--data", "shards", "--out", "report", cwd=tmp_path)
    results = json.loads((tmp_path / "report" / "results.json").read_text())
    assert results["footage"]["coverage"]["scored"] == 4
    assert results["footage"]["coverage"]["steps"]["absent"] > 0
    page = (tmp_path / "report" / "report.html").read_text()
    assert "ball" in page
    assert "data:image/png;base64" in page
