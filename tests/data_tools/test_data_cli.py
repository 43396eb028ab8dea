"""The data commands do what they print, and their exit codes tell scripts what happened."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from swim.data_tools.cli import app
from swim.data_tools.records import record_schema
from swim.data_tools.shards import ShardSet


def _run(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


@pytest.fixture
def copied(synth_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synth_folder, tmp_path / "copy"))


def test_synth_then_validate_then_show(tmp_path: Path) -> None:
    made = _run("synth", tmp_path / "s", "--clips", 2, "--seed", 3, "--frames", 4)
    assert made.exit_code == 0, made.output
    assert "2 clips in" in made.stdout
    checked = _run("validate", tmp_path / "s", "--deep")
    assert checked.exit_code == 0
    assert "2 samples, 0 of them with errors" in checked.stdout
    shown = _run("show", tmp_path / "s", "synth_3_000001")
    assert shown.exit_code == 0
    sample = ShardSet(tmp_path / "s").read(1)
    for said in ("synth_3_000001", "4 frames of 112x112 at 8/s", sample.record.conversations[0].turns[0].text):
        assert said in shown.stdout
    assert _run("show", tmp_path / "s").stdout.startswith("synth_3_000000")


def test_show_does_not_pass_control_characters_on(tmp_path: Path) -> None:
    rows = [{"video": "a.mp4", "conversations": [{"from": "human", "value": "\x1b[2J"}, {"from": "gpt", "value": "b"}]}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    _run("synth", tmp_path / "s", "--clips", 1)
    (tmp_path / "a.mp4").write_bytes(ShardSet(tmp_path / "s").read(0).media())
    args = ("--video-root", tmp_path, "--out", tmp_path / "out")
    assert _run("convert", "nl-refer", tmp_path / "rows.json", *args).exit_code == 0
    shown = _run("show", tmp_path / "out").stdout
    assert r"user: '\x1b[2J'" in shown
    assert "\x1b" not in shown


def test_reasons_do_not_pass_control_characters_on(tmp_path: Path) -> None:
    row = {"conversations": [], "\x1b[2J": 1, "video": None}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n" + json.dumps({"\ud800": 1, "conversations": []}))
    result = _run("convert", "jsonl", tmp_path / "rows.jsonl", "--out", tmp_path / "out")
    assert result.exit_code == 1, result.exception
    assert r"1 x \x1b[NJ: unknown field" in result.stdout
    assert r"1 x \ud800: unknown field" in result.stdout


def test_index_repairs_a_folder_without_indices(copied: Path) -> None:
    digest = ShardSet(copied).digest
    for path in copied.glob("*.jsonl"):
        path.unlink()
    refused = _run("validate", copied)
    assert refused.exit_code == 2
    assert refused.stderr.startswith("error: ")
    assert f"run 'swim data index {copied}'" in refused.stderr
    assert _run("index", copied).exit_code == 0
    assert ShardSet(copied).digest == digest
    assert _run("index", copied.parent).exit_code == 2


def test_damage_and_wrong_facts_are_listed_and_counted(copied: Path) -> None:
    entries = ShardSet(copied).entries
    path = copied / entries[0].shard
    data = bytearray(path.read_bytes())
    data[entries[1].members["mp4"][0] + 50] ^= 1
    path.write_bytes(data)
    damaged = _run("validate", copied, "--deep")
    assert damaged.exit_code == 1
    assert "error unreadable: 1\n  'synth_5_000001' in " in damaged.stdout
    assert "CRC32" in damaged.stdout
    assert damaged.stdout.endswith("6 samples, 1 of them with errors; errors: 1, warnings: 0\n")
    path.write_bytes(bytes(data).replace(b'"num_frames":8', b'"num_frames":9'))
    assert _run("index", copied).exit_code == 0
    wrong = _run("validate", copied, "--deep")
    assert wrong.exit_code == 1
    assert "(height, width, frames) (112, 112, 8); wanted (112, 112, 9), as its record says" in wrong.stdout


def test_convert_counts_skipped_records(synth_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(ShardSet(synth_folder).read(0).media())
    turns = [{"from": "human", "value": "what ?"}, {"from": "gpt", "value": "that ."}]
    good, bad = {"video": "a.mp4", "conversations": turns}, {"video": "b.mp4", "conversations": turns}

    def convert(out: str, rows: list[dict[str, object]], *flags: str) -> Result:
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        source = tmp_path / "rows.json"
        return _run("convert", "nl-refer", source, "--video-root", tmp_path, "--out", tmp_path / out, *flags)

    kept = convert("a", [good, bad])
    assert kept.exit_code == 0
    assert "1 records kept in 1 clips, 1 skipped" in kept.stdout
    assert "skipped.jsonl" in kept.stdout
    assert convert("b", [good, bad], "--strict").exit_code == 1
    assert convert("c", [good], "--strict").exit_code == 0
    assert convert("d", [bad]).exit_code == 1
    again = convert("a", [good])
    assert again.exit_code == 2
    assert "already exists; write to an empty folder" in again.stderr


def test_errors_are_one_message(tmp_path: Path) -> None:
    for args in (("synth", tmp_path, "--size", 7), ("show", tmp_path), ("validate", tmp_path / "none")):
        result = _run(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1
    _run("synth", tmp_path / "s", "--clips", 1)
    assert "no sample 'nope' among 1; the first is 'synth_0_000000'" in _run("show", tmp_path / "s", "nope").stderr


def test_schema_prints_the_schema() -> None:
    assert _run("schema").stdout == record_schema()


def test_the_example_of_the_data_page_runs(synth_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "clip.mp4").write_bytes(ShardSet(synth_folder).read(0).media())
    monkeypatch.chdir(tmp_path)
    for code in blocks:
        exec(compile(code, "docs/data.md", "exec"), {})
    assert "errors: 0" in _run("validate", "shards/mine", "--deep").stdout
    assert "errors: 0" in _run("validate", "shards/mine", "--deep", "--layer", "shards/mine_v2").stdout


def test_the_line_of_the_data_page_converts(synth_folder: Path, tmp_path: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    (line,) = re.findall(r"```json\n(.*?)```", page, re.DOTALL)
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "cup.mp4").write_bytes(ShardSet(synth_folder).read(0).media())
    (tmp_path / "mine.jsonl").write_text(json.dumps(json.loads(line)) + "\n")
    assert _run("validate", tmp_path / "mine.jsonl", "--deep").exit_code == 0
    assert _run("convert", "jsonl", tmp_path / "mine.jsonl", "--out", tmp_path / "out", "--strict").exit_code == 0
    sample = ShardSet(tmp_path / "out").read(0)
    assert sample.masks["cup"][5] is None
    assert sample.masks["cup"][0] is not None
    assert _run("validate", tmp_path / "out", "--deep").exit_code == 0


def test_data_tools_need_neither_torch_nor_the_trainer() -> None:
    code = (
        "import sys, swim.data_tools.cli, swim.data_tools.plan\n"
        "print([name for name in sys.modules if name == 'torch' or name.startswith(('swim.train', 'swim.kernels'))])"
    )
    root = Path(__file__).parents[2]
    found = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"
