"""Placeholders become expressions with marked nouns; nothing is asked twice, lost or leaked unnoticed."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ROOT, environment
from stub_llm import MODEL, Answer, Stub, completion, serve
from typer.testing import CliRunner, Result

from swim.data_tools import refer as engine
from swim.data_tools.cli import app
from swim.data_tools.expressions import LlmWriter, RuleWriter
from swim.data_tools.llm import Client, LlmError
from swim.data_tools.nouns import find_chunker
from swim.data_tools.records import Conversation, Record, parse_sample
from swim.data_tools.refer import leakage, rewrite
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.video import encode_video

RULES = RuleWriter(*find_chunker("built-in"))
KEY = "sk-verySecret-123"


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def turn(role: str, text: str, others: tuple[tuple[str, str], ...] = ()) -> dict[str, Any]:
    """A turn with a mention for every 'object N', and for further (text, object id)."""
    mentions = [
        {"start": m.start(), "end": m.end(), "head": (m.start(), m.start() + 6), "kind": "phrase", "object_ids": [m[1]]}
        for m in re.finditer(r"object (\d+)", text)
    ]
    for noun, name in others:
        start = text.index(noun)
        span = (start, start + len(noun))
        mentions.append({"start": start, "end": span[1], "head": span, "object_ids": [name]})
    return {"role": role, "text": text, "mentions": mentions}


def talk(*texts: str, task: str = "detailed_caption") -> dict[str, Any]:
    turns = [turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts)]
    return {"task": task, "turns": turns}


def record(*conversations: dict[str, Any], labels: dict[str, str] | None = None, **changes: Any) -> Record:
    used = {name for c in conversations for t in c["turns"] for m in t["mentions"] for name in m["object_ids"]}
    objects = [{"id": name, "label": (labels or {}).get(name, f"object {name}")} for name in sorted(used)]
    values = {"source": "videorefer", "license": "Apache-2.0", "media": [], "objects": objects}
    return parse_sample("k", {**values, "conversations": list(conversations), **changes}, None)[0]


def said(conversation: Conversation) -> list[tuple[str, list[tuple[str, str, str, list[str]]]]]:
    return [
        (t.text, [(m.kind, t.text[m.start : m.end], t.text[slice(*m.head)], m.object_ids) for m in t.mentions])
        for t in conversation.turns
    ]


def one(found: Record, **options: Any) -> Conversation:
    """The only conversation that a rewritten record has."""
    outcome = rewrite("k", found, RULES, **options)
    assert outcome.record is not None, outcome.skipped
    parse_sample("k", outcome.record.model_dump(), None)
    (conversation,) = outcome.record.conversations
    return conversation


def why(found: Record, **options: Any) -> str:
    """Why the only conversation of a record is left out."""
    outcome = rewrite("k", found, RULES, **options)
    assert outcome.record is None
    (line,) = outcome.skipped
    assert {"key", "conversation", "task", "reason"} == set(line)
    return str(line["reason"])


def test_a_placeholder_becomes_an_expression_and_its_noun_a_mention() -> None:
    found = record(
        talk("Describe the object 1 in detail.", "A brown dog runs. Then object 1 barks, and Object 1 sleeps.")
    )
    conversation = one(found)
    dog = ("noun", "the brown dog", "dog", ["1"])
    assert said(conversation) == [
        ("Describe the brown dog in detail.", [dog]),
        ("A brown dog runs. Then the brown dog barks, and Object 1 sleeps.", [dog]),
    ], "the article before a placeholder goes with it; what is no mention stays"
    outcome = rewrite("k", found, RULES)
    assert outcome.record is not None
    assert (outcome.record.source, outcome.record.license) == ("videorefer+refer", "Apache-2.0")
    assert [thing.label for thing in outcome.record.objects] == ["dog"]


def test_sentences_begin_with_a_capital_and_other_mentions_move() -> None:
    turns = [
        turn(
            "user",
            "object 1 and a cup: is object 1's box left of this object 2 ? object 2 is there.",
            (("a cup", "3"),),
        ),
        turn("assistant", "The box. object 1 has it", (("box", "4"),)),
    ]
    labels = {"1": "young girl", "2": "red ball"}
    first, second = said(one(record({"task": "qa", "turns": turns}, labels=labels)))
    assert first[0] == "The young girl and a cup: is the young girl's box left of the red ball ? The red ball is there."
    assert [(text, head) for _, text, head, _ in first[1]] == [
        ("The young girl", "girl"),
        ("a cup", "a cup"),
        ("the young girl", "girl"),
        ("the red ball", "ball"),
        ("The red ball", "ball"),
    ]
    assert second[0] == "The box. The young girl has it"
    assert second[1] == [("noun", "box", "box", ["4"]), ("noun", "The young girl", "girl", ["1"])]


def test_what_is_no_placeholder_stays() -> None:
    text = turn("user", "Is the dog here ?", (("the dog", "1"),))
    text["mentions"][0]["kind"] = "phrase"
    plain = {"task": "qa", "turns": [text, turn("assistant", "Yes.")]}
    outcome = rewrite("k", record(plain), RULES)
    assert outcome.record == record(plain)
    assert (outcome.unchanged, outcome.report, outcome.skipped) == (1, [], [])
    empty = record(labels={}, objects=[{"id": "a", "label": "a"}])
    assert rewrite("k", empty, RULES).record == empty, "a clip without conversations too"


def test_rules_take_only_what_says_what_the_object_is() -> None:
    question = talk("What is object 1 holding ?", "A cup.", task="qa")
    assert why(record(question)) == "no expression: no text says what it is"
    assert said(one(record(question)))[0] if False else True
    described = talk("What is object 1 ?", "A man in a hat.", task="qa")
    outcome = rewrite("k", record(question, described), RULES)
    assert outcome.record is not None
    assert outcome.record.conversations[0].turns[0].text == "What is the man holding ?", (
        "another text of the clip helps"
    )
    two = talk("Is object 1 left of object 2 ?", "Yes, object 1 is a dog and object 2 is a cat on a sofa.", task="qa")
    assert one(record(two)).turns[0].text == "Is the dog left of the cat ?"
    assert why(record(talk("Describe object 1.", "It runs."))) == (
        "no expression: 'It runs.': no noun is found before 'It'"
    )


def test_two_objects_never_share_an_expression() -> None:
    question = talk("Is object 1 left of object 2 ?", "Yes.", task="qa")
    first = talk("Describe object 1.", "A man wearing a red shirt walks.")
    second = talk("Describe object 2.", "A man with a dog sits.")
    outcome = rewrite("k", record(question, first, second), RULES)
    assert outcome.record is not None
    texts = [c.turns[0].text for c in outcome.record.conversations]
    assert texts == [
        "Is the man wearing a red shirt left of the man with a dog ?",
        "Describe the man.",
        "Describe the man.",
    ]
    outcome = rewrite("k", record(question, first, talk("Describe object 2.", "A man walks.")), RULES)
    (line,) = outcome.skipped
    assert line["reason"] == "no expression: 'A man walks.': nothing that would tell it apart follows the noun"
    outcome = rewrite(
        "k", record(question, first, talk("Describe object 2.", "A man wearing a red shirt sits.")), RULES
    )
    (line,) = outcome.skipped
    assert line["reason"] == ("objects '1', '2' are both called 'the man wearing a red shirt', after another try")
    assert line["conversation"] == 0


def test_leakage_is_the_share_of_answer_words_in_the_prompt() -> None:
    assert leakage(["Describe the brown dog."], ["A brown dog runs on the beach."]) == 0.5
    assert leakage(["Dogs ?"], ["The dog's DOG, and dogs."]) == 1.0
    assert leakage(["Is it so ?"], ["Yes."]) == 0.0
    assert leakage([], []) == 0.0
    found = record(talk("Describe object 1.", "A brown dog runs. object 1 barks."))
    (line,) = rewrite("k", found, RULES).report
    # brown, dog, run, bark: the placeholder's own words are no answer, before or after.
    assert (line["leak"], line["leak_before"]) == (0.5, 0.0)
    assert why(found, max_leak=0.4) == "0.50 of the answer's words are in the prompt, the limit is 0.4"
    assert one(found, max_leak=0.5)


def test_a_withheld_answer_is_not_seen() -> None:
    caption = talk("Describe object 1.", "A brown dog runs.")
    other = talk("What is object 1 ?", "An animal with a tail.", task="qa")
    same = talk("Caption object 1.", "a Brown dog  runs.", task="short_caption")
    subject = engine.subjects(record(caption, other, same), 0, withhold_answer=True)["1"]
    texts = [text for dialogue in subject.dialogues for _, text in dialogue.turns]
    assert texts == ["Describe <target>.", "What is <target> ?", "An animal with a tail.", "Caption <target>."]
    assert "A brown dog runs." in str(engine.subjects(record(caption, other, same), 0)["1"])
    assert why(record(caption), withhold_answer=True) == "no expression: no text says what it is"
    assert one(record(caption, labels={"1": "dog"}), withhold_answer=True).turns[0].text == "Describe the dog."


def test_a_mention_across_a_placeholder_is_a_reason() -> None:
    turns = [turn("user", "Is object 1 here ?", (("Is object", "1"),)), turn("assistant", "Yes.")]
    found = record({"task": "qa", "turns": turns}, labels={"1": "dog"})
    assert why(found) == "mention 'Is object' overlaps the placeholder 'object 1'"


NUM_CLIPS = 12
NAMES = ["dog", "cat", "cup", "car", "boy", "bus", "fox", "hat", "pig", "van", "owl", "bee"]


@pytest.fixture
def folder(synth_folder: Path, tmp_path: Path) -> Path:
    """Twelve clips in four shards, each with a caption, and one with a question of another kind."""
    video = ShardSet(synth_folder).read(0)
    made = tmp_path / "in"
    for shard in range(4):
        with ShardWriter(made, number=shard) as writer:
            for i in range(3 * shard, 3 * shard + 3):
                caption = talk("Describe object 1.", f"A {NAMES[i]} moves to the left.")
                found = record(caption, media=[item.model_dump() for item in video.record.media])
                writer.write(f"clip{i}", found, {}, {"mp4": video.media()})
    return made


def _run(*args: object) -> Result:
    return CliRunner().invoke(app, ["refer", *(str(arg) for arg in args)])


def _bytes(out: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in out.rglob("*")
        if path.is_file() and path.name != "replies.sqlite"
    }


def _name(body: dict[str, Any]) -> Answer:
    """What a good model says: the noun of the caption in the prompt."""
    prompt = body["messages"][1]["content"]
    noun = re.findall(r"assistant: An? (\w+)", prompt)[0]
    return completion(json.dumps({"expression": f"the {noun}", "head": noun}))


@pytest.fixture
def stub() -> Iterator[Stub]:
    with serve(_name) as server:
        yield server


def _llm(stub: Stub, folder: Path, out: Path, *flags: object) -> Result:
    return _run(folder, "--out", out, "--llm-url", stub.url, "--llm-model", MODEL, "--llm-attempts", 2, *flags)


def _prompts(out: Path) -> list[str]:
    shards = ShardSet(out)
    return [c.turns[0].text for i in range(len(shards)) for c in shards.read(i).record.conversations]


def test_rules_rewrite_a_folder(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = _run(folder, "--out", out, "--chunker", "built-in", "--strict")
    assert result.exit_code == 0, result.stderr
    assert (
        "12 conversations rewritten, 0 without a placeholder kept as they are, 0 skipped; 12 clips in" in result.stdout
    )
    assert "answer words in the prompt: mean 33.3% (with placeholders 0.0%), 95th percentile 33.3%" in result.stdout
    assert "   30 to  40 %      12  ####" in result.stdout
    assert _prompts(out) == [f"Describe the {name}." for name in NAMES]
    assert "12 samples, 0 of them with errors" in CliRunner().invoke(app, ["validate", "--deep", str(out)]).stdout
    assert ShardSet(out).read(3).media() == ShardSet(folder).read(3).media()
    report = [json.loads(line) for line in (out / engine.REPORT_FILE).read_text().splitlines()]
    assert report[0] == {
        "key": "clip0",
        "conversation": 0,
        "task": "detailed_caption",
        "expressions": {"1": {"expression": "the dog", "head": "dog"}},
        "leak": 0.3333,
        "leak_before": 0.0,
    }
    about = json.loads((out / engine.ABOUT_FILE).read_text())
    assert (about["writer"], about["chunker"], about["input"]) == ("rules", "built-in 1", ShardSet(folder).digest)
    assert json.loads((out / engine.SUMMARY_FILE).read_text())["leakage"]["histogram"][3] == 12


def test_what_is_left_out_is_listed_and_counted(folder: Path, tmp_path: Path) -> None:
    shards = ShardSet(folder)
    path = folder / shards.entries[0].shard
    data = bytearray(path.read_bytes())
    for number, member in ((0, "json"), (1, "mp4")):
        data[shards.entries[number].members[member][0] + 40] ^= 1
    path.write_bytes(data)
    result = _run(folder, "--out", tmp_path / "out", "--chunker", "built-in")
    assert result.exit_code == 0, result.stderr
    assert "10 conversations rewritten" in result.stdout
    assert "2 skipped; 10 clips" in result.stdout
    lines = [json.loads(line) for line in (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()]
    assert [line["key"] for line in lines] == ["clip0", "clip1"]
    assert all("has CRC32" in line["reason"] for line in lines)
    assert _run(folder, "--out", tmp_path / "out", "--chunker", "built-in", "--strict").exit_code == 1
    nothing = _run(folder, "--out", tmp_path / "none", "--chunker", "built-in", "--max-leak", 0.1)
    assert nothing.exit_code == 1
    assert "  11 x N of the answer's words are in the prompt, the limit is N" in nothing.stdout
    assert not list((tmp_path / "none").glob("*.tar"))


def test_a_model_rewrites_a_folder_and_is_asked_once(folder: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "out"
    result = _llm(stub, folder, out)
    assert result.exit_code == 0, result.stderr
    assert (
        "written by writer llm, model stub-7b, prompt refer-1, params {'temperature': 0, 'max_tokens': 256}"
        in result.stdout
    )
    assert "13 requests" in result.stdout
    assert _prompts(out) == [f"Describe the {name}." for name in NAMES]
    assert len(stub.asked) == NUM_CLIPS
    before, times = _bytes(out), [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))]
    assert "0 requests" in _llm(stub, folder, out).stdout
    elsewhere = _llm(stub, folder, tmp_path / "b", "--max-leak", 0.9, "--llm-cache", out / "replies.sqlite")
    assert "0 requests" in elsewhere.stdout
    assert len(stub.bodies) == NUM_CLIPS + 1
    assert _bytes(out) == before
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.tar"))] == times, "finished shards stay as they are"
    assert _prompts(tmp_path / "b") == _prompts(out)


def test_other_options_in_the_same_folder_are_refused(folder: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "out"
    assert _llm(stub, folder, out).exit_code == 0
    refused = _llm(stub, folder, out, "--max-leak", 0.9)
    assert refused.exit_code == 2
    assert (
        "another run (max_leak was 1.0 and is now 0.9) already wrote here; write to an empty folder" in refused.stderr
    )
    assert _run(folder, "--out", folder).exit_code == 2, "nor over the input"
    assert len(ShardSet(folder)) == NUM_CLIPS


def test_jobs_are_really_at_the_same_time_and_change_nothing(folder: Path, tmp_path: Path, stub: Stub) -> None:
    assert _llm(stub, folder, tmp_path / "alone", "--jobs", 1).exit_code == 0
    # A shard has three clips: none of them is answered before all three are asked.
    barrier = threading.Barrier(3, timeout=20)

    def together(body: dict[str, Any]) -> Answer:
        barrier.wait()
        return _name(body)

    stub.answer = together
    result = _llm(stub, folder, tmp_path / "many", "--jobs", 3)
    assert result.exit_code == 0, result.stderr
    assert _bytes(tmp_path / "many") == _bytes(tmp_path / "alone")


BAD = {
    "a head that is not there": (
        '{"expression": "the dog", "head": "cat"}',
        "head 'cat' is not a word of the expression",
    ),
    "half a word as head": ('{"expression": "the dogs", "head": "dog"}', "head 'dog' is not a word of the expression"),
    "the end of a word as head": ('{"expression": "the hotdog", "head": "dog"}', "head 'dog' is not a word of the"),
    "no article": ('{"expression": "dog", "head": "dog"}', "expression is not one phrase of 'the' and at most 80"),
    "a sentence": ('{"expression": "the dog.", "head": "dog"}', "expression is not one phrase"),
    "a placeholder": ('{"expression": "the <target>", "head": "target"}', "expression is not one phrase"),
    "two lines": ('{"expression": "the dog\\nand cat", "head": "dog"}', "expression is not one phrase"),
    "nothing said": (
        '{"expression": "the red object", "head": "object"}',
        "head 'object' does not say what the object is",
    ),
    "no idea": ('{"expression": "", "head": ""}', "the model says that the texts do not tell what it is"),
    "an essay": (json.dumps({"expression": "the " + "very " * 30 + "dog", "head": "dog"}), "at most 80 characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_replies_cost_their_conversation_and_say_why(name: str, folder: Path, tmp_path: Path, stub: Stub) -> None:
    text, reason = BAD[name]
    stub.answer = lambda body: completion(text) if "A dog" in body["messages"][1]["content"] else _name(body)
    result = _llm(stub, folder, tmp_path / "out")
    assert result.exit_code == 0, result.stderr
    assert _prompts(tmp_path / "out") == [f"Describe the {name}." for name in NAMES[1:]]
    (line,) = (tmp_path / "out" / "skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["key"] == "clip0"
    assert reason in json.loads(line)["reason"]


def test_two_objects_of_one_name_are_asked_about_once_more(tmp_path: Path, stub: Stub) -> None:
    question = talk("Is object 1 left of object 2 ?", "Yes.", task="qa")
    with ShardWriter(tmp_path / "two") as writer:
        writer.write("a", record(question), {}, {})

    def answer(body: dict[str, Any]) -> Answer:
        prompt = body["messages"][1]["content"]
        which = "red" if "Is <target>" in prompt else "blue"
        said = f"the {which} man" if "Do not use: the man" in prompt else "the man"
        return completion(json.dumps({"expression": said, "head": "man"}))

    stub.answer = answer
    assert _llm(stub, tmp_path / "two", tmp_path / "out").exit_code == 0
    assert _prompts(tmp_path / "out") == ["Is the red man left of the blue man ?"]
    assert len(stub.asked) == 4
    stub.answer = lambda _: completion('{"expression": "the man", "head": "man"}')
    assert _llm(stub, tmp_path / "two", tmp_path / "same").exit_code == 1
    assert "are both called 'the man', after another try" in (tmp_path / "same" / "skipped.jsonl").read_text()


def test_a_server_that_dies_halfway_costs_no_reply(folder: Path, tmp_path: Path, stub: Stub) -> None:
    good: list[str] = []

    def dying(body: dict[str, Any]) -> Answer | None:
        if len(good) >= 7:
            return None
        good.append(body["messages"][1]["content"])
        return _name(body)

    dying.pings = True  # type: ignore[attr-defined]
    stub.answer = lambda body: (
        completion('{"ok": true}') if len(body["messages"]) == 1 and len(good) < 7 else dying(body)
    )
    stub.answer.pings = True  # type: ignore[attr-defined]
    out = tmp_path / "out"
    died = _llm(stub, folder, out, "--jobs", 2)
    assert died.exit_code == 2
    assert died.stderr.splitlines()[-1].startswith("error: http://127.0.0.1:")
    assert "no answer" in died.stderr
    assert len(ShardSet(out)) == 6, "finished shards are there, no half one"
    assert not list(out.glob(".shard*"))
    stub.answer = _name
    stub.bodies.clear()
    done = _llm(stub, folder, out, "--jobs", 2)
    assert done.exit_code == 0, done.stderr
    again = [body["messages"][1]["content"] for body in stub.asked]
    assert not set(again) & set(good)
    assert len(again) + len(good) == NUM_CLIPS
    assert _prompts(out) == [f"Describe the {name}." for name in NAMES]


def _command(*args: object) -> list[str]:
    return [sys.executable, "-c", "from swim.data_tools import cli; cli.app()", "refer", *map(str, args)]


@pytest.mark.parametrize("num_before", [2, 7])
def test_a_killed_run_goes_on_to_the_same_bytes(num_before: int, folder: Path, tmp_path: Path, stub: Stub) -> None:
    assert _llm(stub, folder, tmp_path / "whole").exit_code == 0
    stub.bodies.clear()
    reached = threading.Event()

    def slow(body: dict[str, Any]) -> Answer:
        if len(stub.asked) > num_before:
            reached.set()
            time.sleep(60)
        return _name(body)

    stub.answer = slow
    out = tmp_path / "killed"
    args = (folder, "--out", out, "--llm-url", stub.url, "--llm-model", MODEL, "--llm-key-env", "STUB_KEY", "--jobs", 1)
    env = environment(PYTHONPATH=str(ROOT), STUB_KEY=KEY, NO_PROXY="127.0.0.1")
    process = subprocess.Popen(_command(*args), env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert reached.wait(60)
    os.kill(process.pid, signal.SIGKILL)
    output = b"".join(process.communicate())
    assert process.returncode == -signal.SIGKILL
    for path in out.glob("*.tar"):
        assert path.with_suffix(".index.jsonl").is_file(), "what has the name of a shard is complete"
    stub.answer = _name
    stub.bodies.clear()
    done = subprocess.run(_command(*args), env=env, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert len(stub.asked) == NUM_CLIPS - num_before, "what was answered is not asked again"
    assert _bytes(out) == _bytes(tmp_path / "whole")
    assert {headers["Authorization"] for headers in stub.headers[-3:]} == {f"Bearer {KEY}"}
    assert KEY.encode() not in output + done.stdout + done.stderr
    assert all(KEY.encode() not in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_two_runs_at_once_do_not_mix(folder: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "out"
    refused: list[str] = []

    def meanwhile(body: dict[str, Any]) -> Answer:
        if not refused:
            refused.append("")
            env = environment(PYTHONPATH=str(ROOT), NO_PROXY="127.0.0.1")
            command = _command(folder, "--out", out, "--llm-url", stub.url, "--llm-model", MODEL, "--jobs", 1)
            refused[0] = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60).stderr
        return _name(body)

    stub.answer = meanwhile
    assert _llm(stub, folder, out, "--jobs", 1).exit_code == 0
    assert "another run writes here now; wait for it, or write elsewhere" in refused[0]


def test_a_dry_run_asks_and_writes_nothing(folder: Path, tmp_path: Path, stub: Stub) -> None:
    out = tmp_path / "out"
    result = _llm(stub, folder, out, "--dry-run")
    assert result.exit_code == 0, result.stderr
    assert "12 expressions in 12 conversations of 12 clips" in result.stdout
    assert re.search(r"0 replies are kept, 12 requests to make, about \d{4} tokens of prompts", result.stdout)
    assert "user: Describe <target>.\nassistant: A dog moves to the left." in result.stdout
    assert stub.bodies == []
    assert not out.exists()
    _llm(stub, folder, out)
    assert "12 replies are kept, 0 requests to make" in _llm(stub, folder, out, "--dry-run").stdout
    withheld = _llm(stub, folder, out, "--dry-run", "--withhold-answer").stdout
    assert "0 replies are kept" in withheld
    assert "A dog moves" not in withheld


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "--out is missing: name a folder for the new shards, or give --dry-run"),
        (("--out", "o", "--llm-url", "http://h/v1"), "--llm-model is missing"),
        (("--out", "o", "--llm-url", "h", "--llm-model", "m"), "URL 'h' is not http(s)://HOST"),
        (
            ("--out", "o", "--llm-url", "http://h/v1", "--llm-model", "m", "--llm-key-env", "NOPE"),
            "no such variable is set",
        ),
        (("--out", "o", "--llm-url", "http://h/v1", "--llm-model", "m", "--llm-param", "x"), "'x' is not NAME=JSON"),
        (("--out", "o", "--chunker", "x"), "chunker 'x': there are auto, spacy, built-in"),
    ],
)
def test_what_cannot_work_is_one_message(
    flags: tuple[str, ...], message: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = _run(folder, *flags)
    assert result.exit_code == 2
    assert message in result.stderr
    assert result.stderr.count("\n") == 1
    assert not (tmp_path / "o").exists() or flags[-2] == "--llm-param"


def test_nobody_waits_for_an_endpoint_that_is_given_up(folder: Path, tmp_path: Path, stub: Stub) -> None:
    def answer(body: dict[str, Any]) -> Answer:
        if "A dog" in body["messages"][1]["content"]:
            while len(stub.asked) < 2:
                time.sleep(0.01)
            time.sleep(0.2)
            return 401, {}, "the key has expired"
        return 500, {}, ""

    stub.answer = answer
    client = Client(stub.url, MODEL, cache=tmp_path / "replies.sqlite", backoff_s=1000)
    start = time.monotonic()
    with pytest.raises(LlmError, match="the key has expired"):
        list(engine.rewritten(ShardSet(folder), range(3), LlmWriter(client, jobs=3)))
    assert time.monotonic() - start < 30, "the others waited for their next attempts"


def test_loose_videos_become_members(folder: Path, tmp_path: Path) -> None:
    video = ShardSet(folder).read(0)
    loose = [video.record.media[0].model_copy(update={"member": None, "path": "clip.MP4"}).model_dump()]
    with ShardWriter(tmp_path / "loose") as writer:
        writer.write("a", record(talk("Describe object 1.", "A dog."), media=loose), {}, {})
    (tmp_path / "loose" / "clip.MP4").write_bytes(video.media())
    assert _run(tmp_path / "loose", "--out", tmp_path / "out").exit_code == 0
    sample = ShardSet(tmp_path / "out").read("a")
    assert (sample.record.media[0].member, sample.media()) == ("0.mp4", video.media())


def test_the_output_of_the_data_page_is_real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "data.md").read_text()
    (block,) = re.findall(r"```\n(\$ swim data convert videorefer.*?)```", page, re.DOTALL)
    for path in (Path(__file__).parent / "fixtures").glob("videorefer*"):
        shutil.copy(path, tmp_path)
    (tmp_path / "clip.mp4").write_bytes(encode_video(np.full((48, 32, 48, 3), 90, np.uint8), 24))
    monkeypatch.chdir(tmp_path)
    for command, output in re.findall(r"\$ swim data (.*)\n((?:[^$].*\n)+)", block):
        result = CliRunner().invoke(app, command.split())
        assert (result.exit_code, result.stdout) == (0, output), command
