"""Promise: a score counts everything that was expected, and scoring needs neither torch nor the model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_lines import make_file

from swim.evaluation.alignment import METRICS, WORST
from swim.evaluation.answers import is_correct
from swim.evaluation.benchmarks.alignment import PROTOCOL, SCORED
from swim.evaluation.benchmarks.alignment import score as score_file
from swim.evaluation.predictions import PredictionsError
from swim.evaluation.scores import Settings, compare, write_results

IDS = ["a#0", "a#1", "b#0", "c#0"]


Lines = Callable[..., list[dict[str, Any]]]


def score(lines: Any, expected_ids: list[str], **options: Any) -> dict[str, Any]:
    return score_file(make_file(lines, expected_ids, **options), Settings())


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
    assert got["accuracy_by_task"]["colour"] == {
        "value": 0.0, "interval": None, "value_scored_only": 0.0, "num": 1, "num_scored": 1, "chance": 1.0,
    }  # fmt: skip
    for metric in ("accuracy", *METRICS):
        low, high = got[metric]["interval"]
        assert low <= got[metric]["value"] <= high
        assert got[metric]["value"] == got[metric]["value_scored_only"]
    assert got["coverage"] == {
        "expected": 4, "predicted": 4, "scored": 4, "failed": 0, "missing": 0, "clips": 3, "annotated_clips": 3,
        "nouns": 5, "steps": {"scored": 10, "absent": 0, "unannotated": 0}, "unparsed": 0, "unsaid_nouns": 0,
        "lacking_nouns": 0, "duplicate_lines": 0, "broken_lines": [], "broken_details": [],
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


def test_a_resumed_run_replaces_an_earlier_failure_and_it_is_said(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "predictions.jsonl"
    appended = [{"id": "a#0", "clip": "a", "error": "out of memory"}, *lines()]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in appended))
    got, want = score(path, expected_ids=IDS), score(lines(), expected_ids=IDS)
    assert got["coverage"].pop("duplicate_lines") == 1
    want["coverage"].pop("duplicate_lines")
    assert got == want


def test_predictions_of_other_ids_are_refused(lines: Lines) -> None:
    with pytest.raises(PredictionsError, match=r"2 predictions were not expected, first 'b#0'"):
        score(lines(), expected_ids=IDS[:2])


@pytest.mark.parametrize(
    ("line_change", "noun_change", "reason"),
    [
        ({"clip": "b"}, {}, "does not belong"),
        ({"answer": None}, {}, "must be strings"),
        ({"target": "up", "answer": "up"}, {}, "of other data"),
        ({}, {"map": [[0.5, 0.5]]}, "expected"),
        ({}, {"map": "no"}, "could not convert"),
        ({}, {"map": [[[10**400]]]}, "too large"),
        ({}, {"frames": [[0, 1]]}, "expected"),
        ({}, {"coverage": [[[2.0] * 4] * 2] * 2}, "in [0, 1]"),
        ({"nouns": [{"text": "circle"}]}, {}, "'map'"),
        ({"nouns": 5}, {}, "not iterable"),
    ],
)
def test_what_is_no_prediction_is_unparsed_and_counts_worst(
    line_change: dict[str, Any], noun_change: dict[str, Any], reason: str, lines: Lines
) -> None:
    changed = lines()
    changed[0]["nouns"][0] |= noun_change
    changed[0] |= line_change
    got = score(changed, expected_ids=IDS)
    assert (got["coverage"]["unparsed"], got["coverage"]["scored"]) == (1, 3)
    assert got["accuracy"]["value"] == 0.5
    assert reason in got["failures"][0]["reason"]


def test_a_broken_file_scores_with_the_right_coverage(tmp_path: Path, lines: Lines) -> None:
    # Duplicate, NaN, another shape, no JSON, a line without an id, bytes that are no text, one cut off: what is left is
    # scored, and what is lost counts worst.
    good = lines()
    nan = json.loads(json.dumps(good[1]))
    nan["nouns"][0]["map"][0][0][0] = float("nan")
    unparsed = good[2] | {"nouns": [{"text": "circle"}]}
    torn = json.dumps(good[3])[:40]
    parts = [json.dumps(good[0]), json.dumps(nan), json.dumps(good[0]), "{not JSON", '["a"]', '{"clip": "b"}', "7",
             json.dumps(unparsed)]  # fmt: skip
    path = tmp_path / "predictions.jsonl"
    path.write_bytes("\n".join(parts).encode() + b'\n{"id": "\xff"}\n' + torn.encode())
    got = score(path, expected_ids=IDS)
    coverage = got["coverage"]
    assert {kind: coverage[kind] for kind in ("expected", "predicted", "scored", "failed", "unparsed", "missing")} == {
        "expected": 4, "predicted": 3, "scored": 1, "failed": 1, "unparsed": 1, "missing": 1,
    }  # fmt: skip
    assert coverage["duplicate_lines"] == 1
    assert [line.split(":")[0] for line in coverage["broken_lines"]] == [f"line {n}" for n in (4, 5, 6, 7, 9, 10)]
    assert "cut off in mid-write" in coverage["broken_lines"][-1]
    assert (got["accuracy"]["value"], got["accuracy"]["value_scored_only"]) == (0.25, 1.0)
    assert got["pointing"]["value"] == pytest.approx((0.5 + 0 + 0) / 3)  # clip a: one id of two


@pytest.mark.parametrize(
    "detail",
    [
        5, {"layer_maps": "?"}, {"layer_maps": "AAAA", "steps": [0], "layers": [1]}, {"steps": [9], "layer_maps": ""},
        {"layer_maps": "", "steps": [0, 7], "layers": []}, {"token_maps": "", "masks": {"99": {}}},
        {"token_maps": "AAAA", "masks": {"0": {"size": [2, 2], "counts": "x"}}},
    ],
)  # fmt: skip
def test_details_that_cannot_be_read_cost_only_themselves(detail: Any, lines: Lines) -> None:
    changed = lines()
    changed[0]["nouns"][0]["detail"] = detail
    got, want = score(changed, expected_ids=IDS), score(lines(), expected_ids=IDS)
    assert len(got["coverage"]["broken_details"]) == 1
    assert got["pointing"] == want["pointing"]
    assert "by_layer" not in got


def test_odd_types_cost_their_line_at_most(lines: Lines) -> None:
    odd = lines()
    odd[1]["nouns"][0]["object_ids"] = [[1], {}]
    odd[0], odd[2] = ({"id": odd[i]["id"], "clip": odd[i]["clip"], "error": "x", "task": [1]} for i in (0, 2))
    got = score(odd, expected_ids=IDS)
    assert {k: got["coverage"][k] for k in ("scored", "failed", "unparsed")} == {
        "scored": 2,
        "failed": 2,
        "unparsed": 0,
    }
    assert set(got["accuracy_by_task"]) == {"direction", "colour"}


def test_half_a_character_costs_its_line_only(tmp_path: Path, lines: Lines) -> None:
    path = tmp_path / "predictions.jsonl"
    emoji = lines()[1] | {"answer": "\N{DOG FACE}"}
    path.write_text(json.dumps(lines()[0] | {"answer": "\ud800"}) + "\n" + json.dumps(emoji) + "\n")
    got = score(path, expected_ids=IDS)
    assert (got["coverage"]["scored"], got["coverage"]["missing"]) == (1, 3)
    assert len(got["coverage"]["broken_lines"]) == 1


def test_a_noun_that_the_answer_lacks_counts_worst(lines: Lines) -> None:
    said = lines()
    said[0] |= {"unsaid": [{"text": "box", "object_ids": ["o1"]}]}
    got = score(said, expected_ids=IDS)
    assert got["coverage"]["unsaid_nouns"] == 1
    a0 = got["units"][0]["values"]
    assert a0["pointing"] == 0.5
    assert a0["kl"] == pytest.approx((score(lines(), expected_ids=IDS)["units"][0]["values"]["kl"] + WORST["kl"]) / 2)


def test_leaving_out_nouns_raises_no_mean(lines: Lines) -> None:
    """Deleting what a model is bad at must not pay."""
    whole = score(lines(), expected_ids=IDS, nouns=1)
    assert whole["coverage"]["lacking_nouns"] == 0
    without = lines()
    removed = len(without[0].pop("nouns"))
    assert removed
    without[0]["nouns"] = []
    got = score(without, expected_ids=IDS, nouns=1)
    assert got["coverage"]["lacking_nouns"] == 1
    assert got["units"][0]["values"] == {"accuracy": whole["units"][0]["values"]["accuracy"]} | dict(WORST)
    assert got["ap"]["value"] < whole["ap"]["value"]


def test_write_results_compares_the_arms_and_dumps_every_id(tmp_path: Path, lines: Lines) -> None:
    base, other = score(lines(look_b=0), expected_ids=IDS), score(lines(), expected_ids=IDS)
    path = tmp_path / "run" / "results.json"
    written = write_results(
        path,
        {"sft": base | {"seconds": 12.5}, "supervised": other},
        SCORED,
        protocol=PROTOCOL | {"layers": [1]},
        provenance={"seed": 0},
    )
    assert json.loads(path.read_text()) == written
    assert written["difference"] == compare(base, other, SCORED)
    assert written["difference"]["pointing"]["value"] == pytest.approx(0.5 / 3)
    assert written["difference"]["accuracy"] == {
        "value": 0.0, "interval": [0.0, 0.0], "excludes_zero": False, "clips": 3,
    }  # fmt: skip
    assert written["sft"]["seconds"] == 12.5
    assert (written["protocol"]["id"], written["protocol"]["layers"]) == ("alignment-grid", [1])
    assert written["protocol"]["failed_counts_as"]["nss"] == -1
    assert written["protocol"]["bootstrap"] == {"seed": 0, "resamples": 2000}
    dump = [json.loads(text) for text in path.with_name("scores.jsonl").read_text().splitlines()]
    assert [(entry["arm"], entry["id"]) for entry in dump] == [(arm, id) for arm in ("sft", "supervised") for id in IDS]
    # Names of lmms-eval: what its tools look for in a line.
    assert (dump[6]["doc_id"], dump[6]["target"], dump[6]["resps"]) == (2, "left", [[" LEFT. "]])
    assert (dump[6]["filtered_resps"], dump[6]["pointing"], dump[6]["accuracy"]) == ([" LEFT. "], 0.5, 1.0)
    assert dump[2]["doc_hash"] == dump[6]["doc_hash"] != dump[7]["doc_hash"]
    alone = write_results(path, {"any name": other}, SCORED, protocol=PROTOCOL, provenance={})
    assert "difference" not in alone


def test_arms_over_different_clips_are_not_compared(lines: Lines) -> None:
    with pytest.raises(PredictionsError, match="different expected ids"):
        compare(score(lines(), expected_ids=IDS), score(lines(), expected_ids=[*IDS, "d#0"]), SCORED)


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
