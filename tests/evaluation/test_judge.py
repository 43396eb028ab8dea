"""Promise: a judge is the one that was asked for, pays each reply once, and what it says is read as documented."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from evaluation_lines import make_file, write_file
from processes import ROOT
from stub_llm import MODEL, Answer, Stub, completion, is_ping, serve
from typer.testing import CliRunner

from swim.data_tools.llm import Client, LlmError
from swim.evaluation.benchmarks.videorefer_d import pairs_of, score
from swim.evaluation.calibration import check, read_calibration
from swim.evaluation.judge import Pair, estimate_cost, identity, judge, read_judged
from swim.evaluation.judge_profiles import AXES, Profile, find_profile, parse_official, parse_robust
from swim.evaluation.predictions import PredictionsError
from swim.evaluation.scores import Settings
from swim.train.cli import app

NAMES = list(AXES.values())
PAIRS = [Pair("run", f"{clip}#0", f"A cup, {clip}.", "A brown cup.") for clip in "abcd"]
KINDS = ("perfect", "paraphrase", "wrong_colour", "wrong_object", "empty")


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def grades(*values: float) -> str:
    return json.dumps(dict(zip(AXES, values)))


def numbered(*values: object, form: str = "{n}. {name}: {value}") -> str:
    return "\n".join(form.format(n=i + 1, name=n, value=v) for i, (n, v) in enumerate(zip(NAMES, values)))


def client(stub: Stub, folder: Path, **options: Any) -> Client:
    options = {"backoff_s": 0.01, "timeout_s": 5, "exact_model": True, "flag": "--judge"} | options
    return Client(stub.url, MODEL, cache=folder / "cache.sqlite", **options)


ROBUST = find_profile("robust", None)


@pytest.mark.parametrize(
    ("text", "official", "robust"),
    [
        (numbered(5, 4, 3, 2), [5, 4, 3, 2], [5, 4, 3, 2]),
        (numbered("5/5", "4.", 3, 2), [5, 4, 3, 2], [5, 4, 3, 2]),
        # The known failures, all of them: a bold name is another key, a colon inside the bold hides the number, "3.5."
        # is no number and drops the sample.
        (numbered(5, 4, 3, 2, form="{n}. **{name}**: {value}"), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, 4, 3, 2, form="{n}. **{name}:** {value}"), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, "3.5.", 3, 2), [None] * 4, [5, 3.5, 3, 2]),
        (f"1. **{NAMES[0]}**: 5\n" + "\n".join(numbered(5, 4, 3, 2).splitlines()[1:]), [None, 4, 3, 2], [5, 4, 3, 2]),
        # A numbered phrase of an explanation is read, too; it names no axis, unless it does.
        (numbered(5, 4, 3, 2) + "\nSteps: 1. cups seen: 9", [5, 4, 3, 2], [5, 4, 3, 2]),
        (f"Note 1. the {NAMES[0]} is off.: 3.5.\n" + numbered(5, 4, 3, 2), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, 4, 3, 2, form="{n}. {name}:{value}"), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, 4, 3, 2, form="{n}. {name} : {value}"), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, 4, 3, 2, form="{n}. {name}:\n{value}"), [5, 4, 3, 2], [5, 4, 3, 2]),
        (numbered(7, 4, 3, 2), [7, 4, 3, 2], [None, 4, 3, 2]),
        (grades(5, 4, 3, 2), [None] * 4, [5, 4, 3, 2]),
        (f"Here it is:\n```json\n{grades(5, 4, 3, 2)}\n```", [None] * 4, [5, 4, 3, 2]),
        (grades(5, 4, -1, 99), [None] * 4, [5, 4, None, None]),
        (json.dumps({**dict.fromkeys(AXES, 3), "temporal_description": "two"}), [None] * 4, [3, 3, None, 3]),
        (json.dumps(dict.fromkeys(AXES, True)), [None] * 4, [None] * 4),
        ("", [None] * 4, [None] * 4),
        ("The description is good.", [None] * 4, [None] * 4),
        (f"<think>Perhaps {grades(0, 0, 0, 0)}?</think>{grades(5, 4, 3, 2)}", [None] * 4, [5, 4, 3, 2]),
        (grades("5", 4, 3, 2), [None] * 4, [5, 4, 3, 2]),
        (numbered(5, 4, 3, 2, form="{n}. {name} (0-5): {value}"), [None] * 4, [5, 4, 3, 2]),
        # A scale is no grade.
        (numbered(5, 4, 3, 2, form="{name}: 0-5, I give {value}"), [None] * 4, [None] * 4),
        (numbered(5, 4, 3, 2, form="{name}: 0.5-5, I give {value}"), [None] * 4, [None] * 4),
    ],
)
def test_the_official_parser_fails_as_published_and_the_robust_one_recovers(
    text: str, official: list[float | None], robust: list[float | None]
) -> None:
    assert [parse_official(text).get(axis) for axis in AXES] == official
    assert [parse_robust(text).get(axis) for axis in AXES] == robust


def test_replies_are_kept_raw_with_model_and_usage_and_asked_for_once(tmp_path: Path) -> None:
    status, headers, body = completion(grades(5, 4, 3, 2))
    body = json.dumps(json.loads(body) | {"usage": {"prompt_tokens": 90, "completion_tokens": 30}})
    path = tmp_path / "judge.jsonl"
    with serve(lambda _: (status, headers, body)) as stub:
        assert judge(PAIRS, ROBUST, client(stub, tmp_path), path, repeats=2, workers=3) == 8
        assert judge(PAIRS, ROBUST, client(stub, tmp_path), path, repeats=2) == 0
        assert len(stub.asked) == 8
        request = stub.asked[0]
        assert [m["role"] for m in request["messages"]] == ["system", "user"]
        assert request["response_format"]["json_schema"]["name"] == "Grades"
        # Another answer, another prompt, other parameters are other requests.
        changed = [Pair("run", "a#0", "A cup, a.", "A dog.")]
        assert judge(changed, ROBUST, client(stub, tmp_path), path) == 1
        assert judge(PAIRS, ROBUST, client(stub, tmp_path, params={"temperature": 1}), path) == 4
        about = identity(client(stub, tmp_path), ROBUST)
        lines = read_judged(path, about)
    assert {line["model"] for line in lines} == {MODEL}
    assert lines[0]["raw"] == json.loads(body)
    assert lines[0]["usage"]["prompt_tokens"] == 90
    assert sorted((line["id"], line["repeat"]) for line in lines if line["pair"] == PAIRS[0].digest) == [
        ("a#0", 0), ("a#0", 1),
    ]  # fmt: skip


def test_the_cache_serves_another_folder_without_a_server(tmp_path: Path) -> None:
    with serve(lambda _: completion(grades(1, 1, 1, 1))) as stub:
        judge(PAIRS, ROBUST, client(stub, tmp_path), tmp_path / "a.jsonl")
    judge(PAIRS, ROBUST, client(stub, tmp_path), tmp_path / "b.jsonl")
    assert len(read_judged(tmp_path / "b.jsonl")) == 4


@pytest.mark.parametrize("trouble", [(429, {}, "slow down"), (503, {"Retry-After": "0"}, ""), None])
def test_passing_failures_cost_nothing(trouble: Answer | None, tmp_path: Path) -> None:
    seen: set[str] = set()

    def answer(body: dict[str, Any]) -> Answer | None:
        text = body["messages"][1]["content"]
        if text not in seen:
            seen.add(text)
            return trouble
        return completion(grades(5, 5, 5, 5))

    with serve(answer) as stub:
        judge(PAIRS, ROBUST, client(stub, tmp_path), tmp_path / "judge.jsonl")
    assert [line["error"] for line in read_judged(tmp_path / "judge.jsonl")] == [None] * 4


def test_a_reply_that_never_comes_is_that_pair_s_failure_alone(tmp_path: Path) -> None:
    release = threading.Event()

    def answer(body: dict[str, Any]) -> Answer:
        if "cup, b" in body["messages"][1]["content"]:
            release.wait(20)
        return completion(grades(5, 5, 5, 5))

    path = tmp_path / "judge.jsonl"
    with serve(answer) as stub:
        judge(PAIRS, ROBUST, client(stub, tmp_path, timeout_s=0.3, attempts=2), path)
        found = {line["id"]: line["error"] for line in read_judged(path)}
        assert "timed out" in (found.pop("b#0") or "")
        assert set(found.values()) == {None}
        release.set()
        assert judge(PAIRS, ROBUST, client(stub, tmp_path), path) == 1, "the failure alone is asked again"
    assert read_judged(path)[-1]["error"] is None


@pytest.mark.parametrize("body", ["<html>", '{"choices": []}', '{"choices": [{"message": ', "[1]", "\ufffd"])
def test_a_malformed_reply_is_that_pair_s_failure_alone(body: str, tmp_path: Path) -> None:
    def answer(request: dict[str, Any]) -> Answer:
        return (200, {}, body) if "cup, b" in request["messages"][1]["content"] else completion(grades(5, 5, 5, 5))

    with serve(answer) as stub:
        judge(PAIRS, ROBUST, client(stub, tmp_path), tmp_path / "judge.jsonl")
    found = {line["id"]: line["error"] for line in read_judged(tmp_path / "judge.jsonl")}
    assert "no text in the reply" in (found.pop("b#0") or "")
    assert set(found.values()) == {None}


@pytest.mark.parametrize(
    "odd",
    [
        {"usage": "many"},
        {"usage": {"prompt_tokens": "12", "completion_tokens": float("nan")}},
        {"system_fingerprint": "\ud83d"},
        {"content": "\ud83d" + grades(5, 5, 5, 5)},
        {"content": '{"subject_correspondence": 1' + "0" * 400 + "}"},
        {"content": '{"a": ' + "[" * 100_000 + "}"},
    ],
    ids=["usage", "tokens", "half a character", "half a character in the text", "huge grade", "deep"],
)
def test_whatever_a_server_says_scores_can_be_written(odd: dict[str, Any], tmp_path: Path) -> None:
    """One strange reply is no reason to lose the others, or to ask for it for ever."""

    def answer(request: dict[str, Any]) -> Answer:
        if "answer b" not in request["messages"][1]["content"]:
            return completion(grades(5, 5, 5, 5))
        status, headers, text = completion(odd.get("content", grades(5, 5, 5, 5)))
        return status, headers, json.dumps(json.loads(text) | odd)

    ids = ["a#0", "b#0"]
    path = write_file(
        tmp_path / "p.jsonl", [_described(id, f"answer {id[0]}") for id in ids], ids, benchmark="videorefer-bench-d",
        target=TARGET,
    )  # fmt: skip
    with serve(answer) as stub:
        options = ["--judge-url", stub.url, "--judge-model", MODEL, "--judge-attempts", "1"]
        found = CliRunner().invoke(app, ["evaluate", "score", str(path), *options])
    assert found.exit_code == 0, (found.output, found.exception)
    average = json.loads((tmp_path / "results.json").read_text())["run"]["average"]
    assert average["value"] == (2.5 if "content" in odd else 5)


def test_judge_failures_are_said_and_leave_no_trace_once_asked_again(tmp_path: Path) -> None:
    path = write_file(
        tmp_path / "p.jsonl", [_described("a#0"), _described("b#0", "x")], ["a#0", "b#0"],
        benchmark="videorefer-bench-d", target=TARGET,
    )  # fmt: skip
    with serve(lambda _: (500, {}, "boom")) as stub:
        options = ["--judge-url", stub.url, "--judge-model", MODEL, "--judge-attempts", "1"]
        found = CliRunner().invoke(app, ["evaluate", "score", str(path), *options])
        assert "2 of 2 replies did not come" in found.output
        stub.answer = lambda _: completion(grades(5, 5, 5, 5))
        found = CliRunner().invoke(app, ["evaluate", "score", str(path), *options])
    assert "did not come" not in found.output
    results = json.loads((tmp_path / "results.json").read_text())["run"]
    assert (results["judge"]["replies"], results["judge"]["errors"]) == (2, 0)
    assert results["parsers"]["robust"]["replies_without_grades"] == 0


@pytest.mark.parametrize(
    "option",
    [["--judge-dry-run"], ["--judge-profile", "official-text"], ["--judge-key-env", "KEY"], ["--judge-param", "a=1"]],
    ids=lambda option: option[0],
)
def test_judge_options_without_a_judge_are_not_ignored(option: list[str], tmp_path: Path) -> None:
    path = write_file(tmp_path / "p.jsonl", [], ["a#0"], benchmark="videorefer-bench-d")
    found = CliRunner().invoke(app, ["evaluate", "score", str(path), *option])
    assert (found.exit_code, "--judge-url is missing" in found.output) == (2, True)


def test_the_same_answer_of_a_variant_is_asked_for_once(tmp_path: Path) -> None:
    with serve(lambda _: completion(grades(5, 5, 5, 5))) as stub:
        assert judge([*PAIRS, *PAIRS], ROBUST, client(stub, tmp_path), tmp_path / "judge.jsonl") == 4
        assert (
            estimate_cost([*PAIRS, *PAIRS], ROBUST, client(stub, tmp_path), tmp_path / "no.jsonl", repeats=1).requests
            == 4
        )


def _everything(body: Answer | None) -> Callable[[dict[str, Any]], Answer | None]:
    def answer(_: dict[str, Any]) -> Answer | None:
        return body

    answer.pings = True  # type: ignore[attr-defined]
    return answer


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (_everything(completion(grades(5, 5, 5, 5), model="gpt-5-nano")), "answered as 'gpt-5-nano'"),
        # A dated snapshot is another model, too, for who wants to be able to say which one judged.
        (_everything(completion(grades(5, 5, 5, 5), model=f"{MODEL}-2026-01-01")), "answered as 'stub-7b-2026-01-01'"),
        (_everything((401, {}, "who are you?")), "--judge-key-env"),
        (_everything((404, {}, "no such model")), "--judge-url"),
        (_everything((200, {}, "<html>a login page</html>")), "no text in the reply"),
        (_everything(None), "--judge-url"),
    ],
)
def test_there_is_no_fallback(answer: Any, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "judge.jsonl"
    with serve(answer) as stub, pytest.raises(LlmError, match=problem):
        judge(PAIRS, ROBUST, client(stub, tmp_path), path)
    assert read_judged(path) == []


def test_a_model_that_changes_in_between_ends_the_run_and_keeps_what_is_there(tmp_path: Path) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        return completion(grades(5, 5, 5, 5), model="other" if "cup, c" in body["messages"][1]["content"] else MODEL)

    path = tmp_path / "judge.jsonl"
    with serve(answer) as stub, pytest.raises(LlmError, match="answered as 'other'"):
        judge(PAIRS, ROBUST, client(stub, tmp_path), path, workers=1)
    assert [line["id"] for line in read_judged(path)] == ["a#0", "b#0"]


def test_a_server_without_schemas_is_asked_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if "response_format" in body:
            return 400, {}, "response_format is not supported"
        # A model too small to do as it is told in the first request can still be heard in the others.
        return completion("hello" if is_ping(body) else numbered(5, 4, 3, 2))

    answer.pings = True  # type: ignore[attr-defined]
    with serve(answer) as stub:
        judge(PAIRS, ROBUST, client(stub, tmp_path), tmp_path / "judge.jsonl")
    assert "refuses structured output" in capsys.readouterr().err
    assert parse_robust(read_judged(tmp_path / "judge.jsonl")[0]["reply"]) == dict(zip(AXES, (5, 4, 3, 2)))


def test_the_official_prompt_is_the_users(tmp_path: Path) -> None:
    with pytest.raises(PredictionsError, match="needs --judge-prompt FILE"):
        find_profile("official-text", None)
    with pytest.raises(PredictionsError, match="belongs to the profile official-text"):
        find_profile("robust", tmp_path)
    with pytest.raises(PredictionsError, match="not one of: robust, official-text"):
        find_profile("gpt", None)
    (tmp_path / "prompt.txt").write_text("Grade {it}.\n")
    profile = find_profile("official-text", tmp_path / "prompt.txt")
    assert profile.messages("{answer} in braces", "B") == [
        {"role": "system", "content": "Grade {it}.\n"},
        {"role": "user", "content": "##Correct answer: {answer} in braces\n##Predicted answer: B\n"},
    ]
    assert profile.params["max_tokens"] == 800
    (tmp_path / "own.txt").write_text("Grade.\n--- user ---\nTruth={reference}; said={answer}")
    own = find_profile("official-text", tmp_path / "own.txt")
    assert own.messages("A", "B")[1]["content"] == "Truth=A; said=B"
    assert own.digest != profile.digest
    (tmp_path / "bad.txt").write_text("Grade.\n--- user ---\nTruth={reference}")
    with pytest.raises(PredictionsError, match="must hold"):
        find_profile("official-text", tmp_path / "bad.txt")


TARGET = "A brown cup is lifted."


def _described(id: str, answer: str = "A brown cup.") -> dict[str, Any]:
    return {
        "id": id, "clip": id.split("#")[0], "task": "detailed_caption", "prompt": "Describe the cup.",
        "target": TARGET, "answer": answer, "nouns": [],
    }  # fmt: skip


IDS = ["a#0", "b#0", "c#0", "d#0", "e#0"]


def _judged(folder: Path, replies: dict[str, list[str]], profile: Profile) -> dict[str, Any]:
    """Scores of four described clips, of which one failed and one is missing, with these replies by clip."""
    lines = [_described(f"{clip}#0", f"answer {clip}") for clip in replies]
    lines.append({"id": "d#0", "clip": "d", "error": "decoder: truncated"})
    file = make_file(lines, IDS, benchmark="videorefer-bench-d", target=TARGET)
    left = {clip: list(of) for clip, of in replies.items()}

    def answer(body: dict[str, Any]) -> Answer:
        clip = body["messages"][1]["content"].split("answer ")[-1][0]
        return completion(left[clip].pop(0))

    with serve(answer) as stub:
        made = client(stub, folder, params=profile.params)
        judge(pairs_of(file), profile, made, folder / "judge.jsonl", repeats=len(replies["a"]), workers=1)
    return score(file, Settings(resamples=50, judge=folder / "judge.jsonl"))


def test_bench_d_counts_what_has_no_grade_and_says_n_per_axis(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("Grade.")
    official = find_profile("official-text", tmp_path / "prompt.txt")
    bold_first = f"1. **{NAMES[0]}**: 5\n" + "\n".join(numbered(0, 4, 3, 2).splitlines()[1:])
    got = _judged(
        tmp_path, {"a": [numbered(4, 4, 4, 4)], "b": [bold_first], "c": [numbered("3.5.", 4, 3, 2)]}, official
    )
    first, second = list(AXES)[:2]
    # Published: over what was parsed, each axis with an n of its own. Ours: what is lost counts 0.
    assert (got[first]["value_scored_only"], got[first]["num_scored"]) == (4.0, 1)
    assert (got[second]["value_scored_only"], got[second]["num_scored"]) == (4.0, 2)
    assert got[first]["value"] == pytest.approx(4 / 5)
    assert got[second]["value"] == pytest.approx(8 / 5)
    assert got["average"]["value"] == pytest.approx((4 + (4 + 3 + 2) / 4) / 5)
    assert got["average"]["value_scored_only"] == pytest.approx((4 + 4 + 3.5 + 3) / 4)
    assert {k: got["coverage"][k] for k in ("expected", "scored", "failed", "unparsed", "missing")} == {
        "expected": 5, "scored": 2, "failed": 1, "unparsed": 1, "missing": 1,
    }  # fmt: skip
    parsers = got["parsers"]
    assert [parsers["official-text"]["axes"][axis]["n"] for axis in AXES] == [1, 2, 2, 2]
    assert [parsers["robust"]["axes"][axis]["n"] for axis in AXES] == [3, 3, 3, 3]
    assert parsers["robust"]["axes"][first]["mean"] == pytest.approx((4 + 5 + 3.5) / 3)
    assert (got["judge"]["profile"], got["judge"]["replies"]) == ("official-text", 3)


def test_repeats_give_a_median_and_a_spread(tmp_path: Path) -> None:
    replies = {"a": [grades(5, 0, 3, 3), grades(1, 0, 3, 3), grades(4, 6, 3, 3)], "b": [grades(2, 2, 2, 2)] * 3,
               "c": ["?", "?", "?"]}  # fmt: skip
    got = _judged(tmp_path, replies, ROBUST)
    a, b, c = got["units"][:3]
    assert [a["values"][axis] for axis in AXES] == [4, 0, 3, 3]  # 6 is out of range: the median of the two others
    assert a["judge_sd"] == pytest.approx((((5 - 10 / 3) ** 2 + (1 - 10 / 3) ** 2 + (4 - 10 / 3) ** 2) / 2) ** 0.5 / 4)
    assert b["judge_sd"] == 0
    assert (c["status"], c["values"]) == ("unparsed", {})
    assert got["judge"]["repeats"] == 3
    assert got["judge"]["sd_between_repeats"] == pytest.approx(a["judge_sd"] / 2)


def test_replies_of_two_judges_are_never_mixed(tmp_path: Path) -> None:
    lines = [_described(id) for id in IDS]
    file, path = make_file(lines, IDS, benchmark="videorefer-bench-d", target=TARGET), tmp_path / "judge.jsonl"
    with serve(lambda body: completion(grades(*[5 - body["temperature"] * 4] * 4))) as stub:
        cold, warm = (client(stub, tmp_path, params={"temperature": t}) for t in (0, 1))
        for made in (cold, warm, cold):
            judge(pairs_of(file), ROBUST, made, path)
    found = {
        t: score(file, Settings(resamples=50, judge=path, judged_by=identity(made, ROBUST)))["average"]["value"]
        for t, made in (("cold", cold), ("warm", warm))
    }
    assert found == {"cold": 5, "warm": 1}


def test_answers_without_replies_are_refused(tmp_path: Path) -> None:
    _judged(tmp_path, {"a": [grades(1, 1, 1, 1)], "b": [grades(1, 1, 1, 1)], "c": [grades(1, 1, 1, 1)]}, ROBUST)
    changed = make_file([_described("a#0", "another answer")], ["a#0"], benchmark="videorefer-bench-d", target=TARGET)
    with pytest.raises(PredictionsError, match=r"no reply about 1 of 1 answers .* give --judge-url"):
        score(changed, Settings(judge=tmp_path / "judge.jsonl"))


def test_cost_is_known_before_anything_is_asked(tmp_path: Path) -> None:
    with serve(lambda _: completion(grades(5, 5, 5, 5))) as stub:
        made = client(stub, tmp_path)
        path = tmp_path / "judge.jsonl"
        cost = estimate_cost(PAIRS, ROBUST, made, path, repeats=2)
        characters = sum(len(m["content"]) for pair in PAIRS for m in ROBUST.messages(pair.reference, pair.answer))
        assert (cost.requests, cost.kept, cost.prompt_tokens) == (8, 0, 2 * characters // 4)
        assert cost.dollars(2, 10) == pytest.approx((cost.prompt_tokens * 2 + cost.reply_tokens * 10) / 1e6)
        assert stub.bodies == []
        judge(PAIRS, ROBUST, made, path)
        assert estimate_cost(PAIRS, ROBUST, made, path, repeats=2).requests == 4


def _grader(order: list[str]) -> Callable[[dict[str, Any]], Answer]:
    """A judge that gives 5 to the first of the kinds, 0 to the last."""
    kind_of = {(entry["reference"], entry["answer"]): entry["kind"] for entry in read_calibration()}

    def answer(body: dict[str, Any]) -> Answer:
        text = body["messages"][1]["content"]
        kind = next(k for (ref, ans), k in kind_of.items() if text == ROBUST.messages(ref, ans)[1]["content"])
        return completion(grades(*[max(0, 5 - order.index(kind))] * 4))

    return answer


@pytest.mark.parametrize(("order", "ordering"), [(list(KINDS), 1.0), (list(KINDS)[::-1], 0.0)])
def test_calibration_tells_a_good_judge_from_a_bad_one(order: list[str], ordering: float, tmp_path: Path) -> None:
    entries = read_calibration()
    assert len(entries) == 15
    assert {entry["kind"] for entry in entries} == set(KINDS)
    pairs = [Pair("calibration", entry["id"], entry["reference"], entry["answer"]) for entry in entries]
    with serve(_grader(order)) as stub:
        judge(pairs, ROBUST, client(stub, tmp_path), tmp_path / "judge.jsonl")
    found = check(entries, read_judged(tmp_path / "judge.jsonl"), ROBUST)
    # Perfect and paraphrase are labelled alike, wrong object and empty almost: these have no order.
    assert (found["ordering"], found["compared"], found["unparsed"]) == (ordering, 24, 0)


def test_a_judge_that_says_nothing_is_at_chance() -> None:
    found = check(read_calibration(), [], ROBUST)
    assert (found["ordering"], found["distance"] > 2) == (0.5, True)


def _score_command(path: Path, url: str, *more: str) -> list[str]:
    return [sys.executable, "-m", "swim.train.cli", "evaluate", "score", str(path), "--judge-url", url,
            "--judge-model", MODEL, *more]  # fmt: skip


def test_a_judge_that_was_killed_goes_on_where_it_was(tmp_path: Path) -> None:
    # All different: what is asked twice is asked once.
    lines = [_described(id, f"A brown cup, {id}.") for id in IDS]
    path = write_file(tmp_path / "predictions.jsonl", lines, IDS, benchmark="videorefer-bench-d", target=TARGET)
    environment = os.environ | {"NO_PROXY": "127.0.0.1"}

    def slowly(_: dict[str, Any]) -> Answer:
        time.sleep(0.4)
        return completion(grades(5, 4, 3, 2))

    with serve(slowly) as stub:
        command = _score_command(path, stub.url, "--judge-workers", "1")
        first = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT
        )
        judged = tmp_path / "judge.jsonl"
        deadline = time.monotonic() + 60
        while not (judged.exists() and judged.read_bytes().count(b"\n") >= 2):
            assert time.monotonic() < deadline
            assert first.poll() is None
            time.sleep(0.05)
        first.send_signal(signal.SIGKILL)
        first.wait()
        assert judged.read_bytes().count(b"\n") < 5
        with judged.open("ab") as file:
            file.write(b'{"id": "cut off')
        again = CliRunner().invoke(app, command[3:])
        assert again.exit_code == 0, again.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["run"]["coverage"]["scored"] == 5
    assert results["run"]["average"]["value"] == pytest.approx(3.5)
    assert len(read_judged(judged)) == 5
    # What the first had begun may be asked a second time; what it had ended may not.
    assert len(stub.asked) <= 5 + 2
