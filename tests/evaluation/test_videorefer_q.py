"""Promise: Bench-Q is scored as published beside a strict reading, by question and by type, and no answer is lost."""

from typing import Any

import pytest
from evaluation_lines import make_file

from swim.evaluation.benchmarks.videorefer_q import SCORED, parse_official, parse_strict, score
from swim.evaluation.scores import Settings, compare_variant

OPTIONS = {"A": "a red cup", "B": "a blue cup", "C": "a dog", "D": "none of these"}


@pytest.mark.parametrize(
    ("answer", "official", "strict"),
    [
        ("(B)", "B", "B"),
        ("B", "B", "B"),
        ("B.", "B", "B"),
        ("B) a blue cup", "B", "B"),
        ("(B) a blue cup", "B", "B"),
        ("b", "B", None),  # the published script does not look at case
        (" B", " ", "B"),  # nor does it strip
        (".B", "B", None),
        ("...", None, None),
        ("A blue cup.", "A", "B"),  # the first character is an article
        ("The answer is B", "T", "B"),
        ("The answer is (C).", "C", "C"),
        ("Option D", "O", "D"),
        ("Answer: A", "A", "A"),
        ("Either (A) or (B)", "A", None),
        ("Not A) but B)", "A", None),
        ("", None, None),
        ("   ", " ", None),
        ("(E)", "E", None),  # no such option
        ("I cannot tell", "I", None),
        ("A man holds it", "A", None),
    ],
)
def test_both_parsers_by_hand(answer: str, official: str | None, strict: str | None) -> None:
    assert parse_official(answer) == official
    assert parse_strict(answer, OPTIONS) == strict


def _question(id: str, answer: str, target: str = "(B)", *, kind: str = "Basic", order: str = "ABCD") -> dict[str, Any]:
    options = "\n".join(f"({letter}) {OPTIONS[of]}" for letter, of in zip("ABCD", order))
    return {
        "id": id,
        "clip": id.split("#")[0],
        "task": f"multiple_choice: {kind}",
        "prompt": f"What is shown?\n{options}",
        "target": target,
        "answer": answer,
        "nouns": [],
    }


LINES = [
    _question("a#0", "(B)"),
    _question("a#1", "The answer is B"),
    _question("a#2", "(A)", kind="Future"),
    _question("b#0", "", kind="Future"),
    _question("b#1", "(B)", kind="Future"),
    {"id": "c#0", "clip": "c", "error": "decoder: truncated"},
]
IDS = [line["id"] for line in LINES] + ["c#1"]
TASKS = {"c#0": "multiple_choice: Basic", "c#1": "multiple_choice: Basic"}


def test_micro_and_macro_averages_count_what_failed() -> None:
    got = score(make_file(LINES, IDS, benchmark="videorefer-bench-q", tasks=TASKS, target=""), Settings(resamples=50))
    assert got["accuracy"]["value"] == pytest.approx(2 / 7)
    assert got["accuracy"]["value_scored_only"] == pytest.approx(2 / 5)
    assert got["accuracy_strict"]["value"] == pytest.approx(3 / 7)
    assert got["accuracy_strict"]["value_scored_only"] == pytest.approx(3 / 4)  # the empty answer is unparsed
    assert got["by_type"]["multiple_choice: Basic"]["accuracy"]["value"] == pytest.approx(1 / 4)
    assert got["macro_accuracy"]["value"] == pytest.approx((1 / 4 + 1 / 3) / 2)
    assert got["macro_accuracy_strict"]["value"] == pytest.approx((2 / 4 + 1 / 3) / 2)
    assert got["macro_accuracy"]["value_scored_only"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    low, high = got["macro_accuracy"]["interval"]
    assert low <= got["macro_accuracy"]["value"] <= high
    assert {k: got["coverage"][k] for k in ("expected", "scored", "failed", "missing", "unparsed_strict")} == {
        "expected": 7, "scored": 5, "failed": 1, "missing": 1, "unparsed_strict": 1,
    }  # fmt: skip
    assert got["coverage"]["empty_answers"] == 1


def test_a_target_that_is_no_letter_is_said_not_guessed() -> None:
    got = score(make_file([_question("a#0", "(B)", "the blue one")], ["a#0"], target=""), Settings())
    assert got["coverage"]["unparsed"] == 1
    assert "names no option" in got["failures"][0]["reason"]


def test_consistency_compares_what_was_chosen_not_its_letter() -> None:
    ids = ["a#0", "a#1", "b#0", "b#1"]
    plain = [_question(id, "(B)") for id in ids]
    # The same text under another letter; the same letter, another text; unparsed; missing.
    shuffled = [
        _question("a#0", "(A)", "(A)", order="BACD"),
        _question("a#1", "(B)", "(A)", order="BACD"),
        _question("b#0", "no idea", "(A)", order="BACD"),
    ]
    settings = Settings(resamples=50)
    arm, variant = (score(make_file(lines, ids, target=""), settings) for lines in (plain, shuffled))
    found = compare_variant(arm, variant, SCORED, settings)
    assert found["consistency"]["value"] == 0.25
    assert found["difference"]["accuracy"]["value"] == pytest.approx(1 / 4 - 1)
