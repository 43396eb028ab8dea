"""Promise: files are enough. Scores and reports are made by commands in a process that has no torch, and golden
predictions keep their scores."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from evaluation_lines import header, write_file
from processes import ROOT
from typer.testing import CliRunner

from swim.evaluation.predictions import Expected, PredictionsError, header_path, read_header, write_header
from swim.evaluation.stages import _judge_of, load, score_files
from swim.train.cli import app

GOLDEN = Path(__file__).parent / "golden"
SCORES = json.loads((GOLDEN / "scores.json").read_text())
# A process in which these cannot be imported, and that runs several commands.
BLOCKED = """
import json, sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "deepspeed", "triton"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Blocked())
try:
    import torch
except ImportError:
    pass
else:
    raise SystemExit("torch is not blocked")
from swim.train.cli import main
for command in json.loads(sys.argv[1]):
    sys.argv = ["swim", "evaluate", *command]
    try:
        main()
    except SystemExit as end:
        if end.code:
            raise
"""


def _swim(*commands: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", BLOCKED, json.dumps(commands)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of results for every golden file, made by commands without torch."""
    out = tmp_path_factory.mktemp("golden")
    commands = []
    for name in ("alignment", "broken", "bench_q", "bench_d"):
        commands.append(["score", str(GOLDEN / f"{name}.jsonl"), "--out", str(out / name)])
    (out / "bench_d").mkdir()
    shutil.copy(GOLDEN / "bench_d.judge.jsonl", out / "bench_d" / "judge.jsonl")
    commands += [["report", str(out / name)] for name in ("alignment", "broken", "bench_q", "bench_d")]
    commands.append(
        ["judge-check", "--judge-url", "http://localhost:1/v1", "--judge-model", "m", "--judge-dry-run",
         "--judge-price", "2.5", "10", "--out", str(out / "none")]
    )  # fmt: skip
    done = _swim(*commands)
    assert done.returncode == 0, done.stderr
    (out / "said.txt").write_text(done.stdout)
    return out


@pytest.mark.parametrize("name", SCORES)
def test_golden_predictions_keep_their_scores(name: str, scored: Path) -> None:
    results = json.loads((scored / name / "results.json").read_text())
    found = _values(results)
    assert found.keys() == SCORES[name].keys()
    for key, value in SCORES[name].items():
        assert found[key] == pytest.approx(value, abs=1e-6), key


def _values(results: dict[str, Any]) -> dict[str, float | None]:
    """The value of every estimate of the one arm, by its path."""
    arm = next(part for part in results.values() if isinstance(part, dict) and "coverage" in part)
    found: dict[str, float | None] = {}

    def walk(path: str, node: Any) -> None:
        if isinstance(node, dict):
            if "value" in node:
                found[path] = node["value"]
                return
            for key, child in node.items():
                walk(f"{path}/{key}" if path else key, child)
        elif path.startswith(("coverage", "by_layer/heads")) and isinstance(node, int | float):
            found[path] = node

    walk("", arm)
    return found


def test_the_broken_golden_file_has_the_coverage_that_was_put_into_it(scored: Path) -> None:
    coverage = json.loads((scored / "broken" / "results.json").read_text())["broken"]["coverage"]
    # Six ids: scored twice (once replaced), NaN, wrong shape, an error, one more scored, and one cut off.
    assert {k: coverage[k] for k in ("expected", "predicted", "scored", "failed", "unparsed", "missing")} == {
        "expected": 6, "predicted": 5, "scored": 2, "failed": 2, "unparsed": 1, "missing": 1,
    }  # fmt: skip
    assert coverage["duplicate_lines"] == 1
    assert [line.split(":")[0] for line in coverage["broken_lines"]] == ["line 4", "line 8"]


def test_golden_questions_and_descriptions_by_hand(scored: Path) -> None:
    q = json.loads((scored / "bench_q" / "results.json").read_text())["model"]
    # Official: B, C, A right; "A blue cup." is A, the empty one nothing, "(A) or (B)" is A and right; one is missing.
    assert q["accuracy"]["value"] == pytest.approx(4 / 7)
    assert q["accuracy_strict"]["value"] == pytest.approx(4 / 7)  # "A blue cup." instead of "(A) or (B)"
    assert q["macro_accuracy"]["value"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 3)
    d = json.loads((scored / "bench_d" / "results.json").read_text())["model"]
    assert d["temporal_description"]["value"] == pytest.approx((4 + 0) / 5)
    assert d["temporal_description"]["value_scored_only"] == pytest.approx((4 + 0) / 2)
    assert d["coverage"]["unparsed"] == 2  # bold names; "1.5."
    assert d["parsers"]["robust"]["axes"]["appearance_description"]["mean"] == pytest.approx((5 + 1 + 1.5 + 0) / 4)


def test_every_result_says_what_it_is_of(scored: Path) -> None:
    results = json.loads((scored / "alignment" / "results.json").read_text())
    assert (results["protocol"]["id"], results["protocol"]["version"]) == ("alignment-grid", 2)
    about = results["provenance"]["arms"]["tiny"]
    assert {"model", "data", "prompts_sha256", "sampling", "system", "seed", "software", "device"} <= about.keys()
    assert len(about["model"]["weights_sha256"]) == len(about["data"]["sha256"]) == 64
    assert results["protocol"]["predictions"]["tiny"]["decoding"]["strategy"] == "greedy"
    summary = (scored / "alignment" / "summary.md").read_text()
    assert "# alignment-grid, version 2" in summary
    assert "| scored | 6 |" in summary
    broken = (scored / "broken" / "summary.md").read_text()
    assert "4 ids of broken were not scored" in broken
    assert "decoder: truncated" in broken


def test_a_judged_result_names_its_judge_and_arms_have_the_same(scored: Path) -> None:
    results = json.loads((scored / "bench_d" / "results.json").read_text())
    assert results["protocol"]["judge"]["profile"] == "official-text"
    said = "videorefer-bench-d, version 1, judged by judge-1, official-text version 1"
    assert (scored / "bench_d" / "summary.md").read_text().startswith(f"# {said}\n")
    assert said in (scored / "said.txt").read_text()
    assert said in (scored / "bench_d" / "report.html").read_text()
    arms = {name: {"judge": results["model"]["judge"] | {"model": name}} for name in ("one", "two")}
    with pytest.raises(PredictionsError, match=r"different judges, one \(official-text\), two"):
        _judge_of(arms)


def test_reports_are_made_without_data_and_say_so(scored: Path) -> None:
    page = (scored / "alignment" / "report.html").read_text()
    assert "the data was not given" in page
    assert "layer by layer" in page
    assert "GamePoint@100" in page
    for name, words in (("bench_q", "macro accuracy"), ("bench_d", "temporal description")):
        page = (scored / name / "report.html").read_text()
        assert words in page
        assert "default-src 'none'" in page


def test_a_dry_run_says_what_a_judge_would_cost(scored: Path) -> None:
    said = (scored / "said.txt").read_text()
    assert "45 requests, 0 replies are there already" in said
    assert "per million tokens" in said
    assert not (scored / "none").exists()


def test_two_arms_are_compared_by_clip(tmp_path: Path, line: Any, noun: Any) -> None:
    ids = ["a#0", "b#0"]
    base = write_file(tmp_path / "base.jsonl", [line(id, [noun("o0", 0, 3)]) for id in ids], ids, name="base")
    other = write_file(tmp_path / "other.jsonl", [line(id, [noun("o0", 0, 0)]) for id in ids], ids, name="other")
    results = score_files([load(base), load(other)], tmp_path / "out", variants={"synonyms": load(base)})
    assert results["difference"]["pointing"]["value"] == 1
    synonyms = results["other"]["variants"]["synonyms"]
    assert synonyms["difference"]["pointing"]["value"] == -1
    assert synonyms["consistency"]["value"] == 1
    assert "| other, synonyms | value | difference |" in (tmp_path / "out" / "summary.md").read_text()
    with pytest.raises(PredictionsError, match="both arms are named 'base'"):
        score_files([load(base), load(base)], tmp_path)
    with pytest.raises(PredictionsError, match="different benchmarks"):
        score_files([load(base), load(other, benchmark="videorefer-bench-q")], tmp_path)
    with pytest.raises(PredictionsError, match=r"'mevis' is not known; there are: alignment-grid"):
        score_files([load(base, benchmark="mevis")], tmp_path)


@pytest.mark.parametrize(
    "change", [{"provenance": {"data": {"sha256": "2" * 64}}}, {"expected": (Expected("a#0", "a", "direction", "up"),)}]
)
def test_arms_of_other_data_with_the_same_ids_are_not_compared(
    change: dict[str, Any], tmp_path: Path, line: Any, noun: Any
) -> None:
    own = [line("a#0", [noun("o0", 0, 0)])]
    base, other = (write_file(tmp_path / f"{name}.jsonl", own, ["a#0"], name=name) for name in ("base", "other"))
    write_header(base, replace(read_header(base), provenance={"data": {"sha256": "1" * 64}}))
    score_files([load(base), load(other)], tmp_path / "out")
    write_header(other, replace(read_header(other), **change))
    with pytest.raises(PredictionsError, match="predicted on different data"):
        score_files([load(base), load(other)], tmp_path / "out")


def test_a_header_is_needed_and_checked(tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl", [], ["a#0"])
    assert read_header(path) == header(["a#0"])
    for text, problem in (
        ("{", "not the header"),
        ('{"version": 9}', "version 9"),
        ('{"version": 1}', "not the header"),
    ):
        header_path(path).write_text(text)
        with pytest.raises(PredictionsError, match=problem):
            read_header(path)
    write_header(path, header(["a#0", "a#0"]))
    with pytest.raises(PredictionsError, match="listed twice"):
        read_header(path)
    header_path(path).unlink()
    with pytest.raises(PredictionsError, match="--expected"):
        load(path)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"name": 5}, "must be strings"),
        ({"name": ""}, "must be strings"),
        ({"expected": [{"id": "a#0", "clip": "a", "task": None}]}, "must be strings"),
        ({"provenance": None}, "must be objects"),
        ({"protocol": []}, "must be objects"),
        ({"provenance": {"figures": {"seconds": float("nan")}}}, "finite numbers"),
        (b'{"name": "\xe9"}', "not the header"),
    ],
)
def test_a_header_of_other_types_is_one_message_with_the_file(change: Any, problem: str, tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl", [], ["a#0"])
    whole = json.loads(header_path(path).read_text())
    header_path(path).write_bytes(change if isinstance(change, bytes) else json.dumps(whole | change).encode())
    found = CliRunner().invoke(app, ["evaluate", "score", str(path), "--out", str(tmp_path / "out")])
    assert (found.exit_code, found.output.count("\n")) == (2, 1)
    assert problem in found.output
    assert str(path.with_suffix("")) in found.output


def test_a_name_is_shown_as_it_is_and_figures_replace_no_metric(tmp_path: Path, line: Any, noun: Any) -> None:
    path = write_file(tmp_path / "p.jsonl", [line("a#0", [noun("o1", 1, 1)])], ["a#0"], name="run[/b]")
    own = replace(read_header(path), provenance={"figures": {"seconds": 3, "accuracy": 5}})
    write_header(path, own)
    found = CliRunner().invoke(app, ["evaluate", "score", str(path)])
    assert found.exit_code == 0, found.output
    assert "│ run[/b] " in found.output.replace("┃", "│")
    results = json.loads((tmp_path / "results.json").read_text())["run[/b]"]
    assert (results["seconds"], results["accuracy"]["value"]) == (3, 1.0)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"protocol": '])
def test_a_report_of_something_else_says_which_file_it_is(text: str, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text(text)
    found = CliRunner().invoke(app, ["evaluate", "report", str(tmp_path)])
    assert found.exit_code == 2
    assert found.output.startswith(f"error: {tmp_path / 'results.json'}: not what")
