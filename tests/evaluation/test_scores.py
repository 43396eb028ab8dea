"""Promise: a score counts everything that was expected, and scoring needs neither torch nor the model."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from swim.evaluation.alignment import METRICS, WORST
from swim.evaluation.answers import is_correct
from swim.evaluation.scores import compare, score, write_results

IDS = ["a#0", "a#1", "b#0", "c#0"]


Lines = Callable[..., list[dict[str, Any]]]


@pytest.fixture
def lines(noun: Callable[..., dict[str, Any]], line: Callable[..., dict[str, Any]]) -> Lines:
    """Clip a looks at its objects (0 and 1), clip b at column look_b (its object is 1), clip c has no second noun."""
    return lambda look_b=1: [
        line("a#0", [noun("o0", 0, 0)]),
        line("a#1", [noun("o1", 1, 1)], answer="right", task="colour"),
        line("b#0", [noun("o1", 1, look_b), noun("o2", 2, look_b)], answer=" LEFT. "),
        line("c#0", [noun("o1", 3, 3)]),
    ]


def test_scores_of_a_complete_run(lines: Lines) -> None:
    got = score(lines(), expected_ids=IDS)
    assert got["accuracy"]["value"] == 0.75
    assert got["pointing"]["value"] == pytest.approx((1 + 0.5 + 1) / 3)  # clip b: one noun of two
    assert got["mass"]["value"] == got["pointing"]["value"]
    assert got["prevalence"]["value"] == 0.25
    assert got["accuracy_by_task"]["colour"] == {"value": 0.0, "interval": None, "num": 1, "chance": 1.0}
    for metric in ("accuracy", *METRICS):
        low, high = got[metric]["interval"]
        assert low <= got[metric]["value"] <= high
        assert got[metric]["value"] == got[metric]["value_scored_only"]
    assert got["coverage"] == {
        "expected": 4, "predicted": 4, "scored": 4, "failed": 0, "missing": 0, "clips": 3, "annotated_clips": 3,
        "nouns": 5, "steps": {"scored": 10, "absent": 0, "unannotated": 0},
    }  # fmt: skip


def test_the_wrong_noun_baseline_spans_the_conversations_of_a_clip(lines: Lines) -> None:
    wrong = score(lines(), expected_ids=IDS)["baselines"]["wrong_noun"]
    # a: each noun gets the other's map, 0. b: both maps look at o1, so o1 gets 1 and o2 gets 0. c has no other noun.
    assert wrong["metrics"]["pointing"]["value"] == pytest.approx((0 + 0.5) / 2)
    assert (wrong["clips"], wrong["excluded_clips"]) == (2, 1)


def test_failed_and_missing_ids_count_worst(lines: Lines) -> None:
    broken = [*lines()[:2], {"id": "c#0", "clip": "c", "error": "decoder: truncated"}]
    got = score(broken, expected_ids=IDS)
    complete = score(lines()[:2], expected_ids=IDS[:2])
    assert got["accuracy"]["value"] == 0.25
    assert got["accuracy"]["value_scored_only"] == 0.5
    for metric in METRICS:
        whole = complete[metric]["value"]
        assert got[metric]["value"] == pytest.approx((whole + 2 * WORST[metric]) / 3)
        assert got[metric]["value_scored_only"] == pytest.approx(whole)
    assert WORST["nss"] < 0
    assert {k: got["coverage"][k] for k in ("expected", "predicted", "scored", "failed", "missing")} == {
        "expected": 4, "predicted": 3, "scored": 2, "failed": 1, "missing": 1,
    }  # fmt: skip
    assert got["failures"] == [
        {"id": "b#0", "reason": "no prediction"},
        {"id": "c#0", "reason": "decoder: truncated"},
    ]


def test_a_map_with_nan_is_a_failure_not_a_hole(lines: Lines) -> None:
    broken = lines()
    broken[3]["nouns"][0]["map"][0][0][0] = float("nan")
    got = score(broken, expected_ids=IDS)
    assert got["coverage"]["failed"] == 1
    assert got["pointing"]["value"] == pytest.approx((1 + 0.5 + 0) / 3)
    assert "not finite" in got["failures"][0]["reason"]


def test_a_resumed_run_replaces_an_earlier_failure(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "predictions.jsonl"
    appended = [{"id": "a#0", "clip": "a", "error": "out of memory"}, *lines()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in appended))
    assert score(path, expected_ids=IDS) == score(lines(), expected_ids=IDS)


@pytest.mark.parametrize(
    ("line_change", "noun_change", "message"),
    [
        ({"id": "z#0", "clip": "z"}, {}, "not expected"),
        ({"clip": "b"}, {}, "does not belong"),
        ({}, {"map": [[0.5, 0.5]]}, "expected"),
        ({}, {"frames": [[0, 1]]}, "expected"),
        ({}, {"coverage": [[[2.0] * 4] * 2] * 2}, "in \\[0, 1\\]"),
        ({"nouns": [{"text": "circle"}]}, {}, "'map'"),
    ],
)
def test_malformed_predictions_are_refused(
    line_change: dict[str, Any], noun_change: dict[str, Any], message: str, lines: Lines
) -> None:
    changed = lines()
    changed[0]["nouns"][0] |= noun_change
    changed[0] |= line_change
    with pytest.raises(ValueError, match=message):
        score(changed, expected_ids=IDS)


def test_a_torn_line_is_named(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "predictions.jsonl"
    path.write_text(json.dumps(lines()[0]) + '\n{"id": "a#1", "cl')
    with pytest.raises(ValueError, match=r"predictions\.jsonl:2"):
        score(path, expected_ids=IDS)


def test_write_results_compares_the_arms_and_dumps_every_id(tmp_path: Path, lines: Lines) -> None:
    base, other = score(lines(look_b=0), expected_ids=IDS), score(lines(), expected_ids=IDS)
    path = tmp_path / "run" / "results.json"
    written = write_results(
        path, {"sft": base | {"seconds": 12.5}, "supervised": other}, provenance={"seed": 0}, protocol={"layers": [1]}
    )
    assert json.loads(path.read_text()) == written
    assert written["difference"] == compare(base, other)
    assert written["difference"]["pointing"]["value"] == pytest.approx(0.5 / 3)
    assert written["difference"]["accuracy"] == {
        "value": 0.0, "interval": [0.0, 0.0], "excludes_zero": False, "clips": 3,
    }  # fmt: skip
    assert written["sft"]["seconds"] == 12.5
    assert (written["protocol"]["id"], written["protocol"]["layers"]) == ("alignment-grid", [1])
    dump = [json.loads(text) for text in path.with_name("scores.jsonl").read_text().splitlines()]
    assert [(entry["arm"], entry["id"]) for entry in dump] == [(arm, id) for arm in ("sft", "supervised") for id in IDS]
    assert dump[6]["metrics"]["pointing"] == 0.5
    alone = write_results(path, {"any name": other}, provenance={})
    assert "difference" not in alone


def test_arms_over_different_clips_are_not_compared(lines: Lines) -> None:
    with pytest.raises(ValueError, match="different expected ids"):
        compare(score(lines(), expected_ids=IDS), score(lines(), expected_ids=[*IDS, "d#0"]))


@pytest.mark.parametrize(
    ("answer", "target", "correct"),
    [
        ("  The  Left.\n", "the left", True),
        ("STRASSE!", "straße", True),
        ("left", "right", False),
        ("", "", False),
        ("...", "...", False),
        ("left or right", "left", False),
        ("-5", "5", False),
    ],
)
def test_answers_match_after_normalisation_only(answer: str, target: str, correct: bool) -> None:
    assert is_correct(answer, target) is correct


def test_scoring_imports_without_torch_and_the_trainer() -> None:
    check = (
        "import sys, swim.evaluation.scores as s; s.score([], expected_ids=['a#0']);"
        "bad = [m for m in sys.modules if m.split('.')[0] in ('torch', 'transformers', 'matplotlib', 'sklearn')"
        " or m.startswith(('swim.train', 'swim.kernels'))]; assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parents[2], timeout=60)
