"""Every reply is paid for once, every failure ends in one of two errors, and only the server sees the key."""

import email.utils
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from stub_llm import MODEL, Answer, completion, is_ping, serve

from swim.data_tools.llm import Client, LlmError, ReplyError

KEY = "sk-verySecret-123"


class Word(BaseModel, extra="forbid"):
    word: str


GOOD = completion('{"word": "cup"}')


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def client(url: str, folder: Path, **options: Any) -> Client:
    return Client(url, MODEL, cache=folder / "replies.sqlite", **{"backoff_s": 0.01, "timeout_s": 5} | options)


def ask(client: Client, text: str = "what ?", version: str = "1") -> str:
    return client.complete(
        [{"role": "user", "content": "Say."}, {"role": "user", "content": text}], Word, version=version
    ).parsed.word


def rows(folder: Path) -> list[tuple[int, str]]:
    with closing(sqlite3.connect(folder / "replies.sqlite")) as store:
        return list(store.execute("SELECT good, raw FROM replies"))


def test_a_reply_is_asked_for_once_whatever_process_asks(tmp_path: Path) -> None:
    with serve(lambda _: GOOD) as stub:
        first = client(stub.url, tmp_path)
        assert ask(first) == ask(first) == "cup"
        assert ask(client(stub.url, tmp_path)) == "cup"
        assert len(stub.asked) == 1
        assert first.num_calls == 2, "one of them is the ping"
        form = stub.asked[0]["response_format"]["json_schema"]
        assert (form["name"], form["strict"], form["schema"]["additionalProperties"]) == ("Word", True, False)
        assert rows(tmp_path) == [(1, GOOD[2])], "the raw reply is kept"
        ask(first, version="2")
        ask(first, "which ?")
        ask(client(stub.url, tmp_path, params={"temperature": 1}))
        assert len(stub.asked) == 4, "prompt version, prompt and parameters make another request"
        assert [body.get("temperature") for body in stub.asked] == [0, 0, 0, 1]
        ask(client(stub.url, tmp_path, params={"temperature": None, "seed": 3}))
        assert (stub.asked[-1].get("temperature"), stub.asked[-1]["seed"]) == (None, 3)
    assert ask(client(stub.url, tmp_path)) == "cup", "what is kept needs no server"


def _sequence(*answers: Answer | None) -> Any:
    left = list(answers)
    return lambda _: left.pop(0)


HICCUPS = {
    "429": (429, {}, "slow down"),
    "500": (500, {}, "oops"),
    "503": (503, {"Retry-After": "0"}, ""),
    "dropped": None,
}


@pytest.mark.parametrize("name", HICCUPS)
def test_passing_failures_are_tried_again(name: str, tmp_path: Path) -> None:
    with serve(_sequence(HICCUPS[name], HICCUPS[name], GOOD)) as stub:
        assert ask(client(stub.url, tmp_path)) == "cup"
        assert len(stub.asked) == 3


def test_retry_after_is_honoured_in_seconds_and_as_a_date(tmp_path: Path) -> None:
    times: list[float] = []

    def answer(_: Any) -> Answer:
        times.append(time.time())
        date = email.utils.formatdate(time.time() + 2, usegmt=True)
        return [(429, {"Retry-After": "0.4"}, ""), (429, {"Retry-After": date}, ""), GOOD][len(times) - 1]

    with serve(answer) as stub:
        ask(client(stub.url, tmp_path))
    assert times[1] - times[0] >= 0.4
    assert times[2] - times[1] >= 0.9, "a date has whole seconds"
    limit = "asks to wait 3600 s, the limit is 120 s; run again then"
    with serve(lambda _: (429, {"Retry-After": "3600"}, "")) as stub, pytest.raises(LlmError, match=limit):
        ask(client(stub.url, tmp_path), "another ?")


def test_a_silent_server_counts_as_a_failed_attempt(tmp_path: Path) -> None:
    release = threading.Event()
    calls: list[int] = []

    def answer(_: Any) -> Answer:
        calls.append(1)
        if len(calls) == 1:
            release.wait(10)
        return GOOD

    with serve(answer) as stub:
        assert ask(client(stub.url, tmp_path, timeout_s=0.3)) == "cup"
        release.set()
    assert len(calls) == 2


def test_one_request_that_always_fails_costs_only_itself(tmp_path: Path) -> None:
    def answer(body: Any) -> Answer:
        text = body["messages"][-1]["content"]
        return {"poison": (500, {}, "oops"), "filtered": (400, {}, "content policy")}.get(text, GOOD)

    with serve(answer) as stub:
        asking = client(stub.url, tmp_path, attempts=3)
        with pytest.raises(
            ReplyError, match="answers others, but not this request: status 500, 'oops', after 3 attempts"
        ):
            ask(asking, "poison")
        with pytest.raises(ReplyError, match=r"not this request: status 400, 'content policy'$"):
            ask(asking, "filtered")
        assert ask(asking) == "cup"
        assert len(stub.asked) == 5


def test_an_endpoint_that_dies_is_another_matter(tmp_path: Path) -> None:
    with serve(lambda _: GOOD) as stub:
        asking = client(stub.url, tmp_path, attempts=2)
        assert ask(asking) == "cup"
    with pytest.raises(
        LlmError, match=r"127\.0\.0\.1.*no answer \(.*refused.*; start the server, or correct --llm-url"
    ):
        ask(asking, "another ?")
    assert ask(asking) == "cup"


INVALID = {
    "prose": (completion("A cup, I think."), "Invalid JSON"),
    "another schema": (completion('{"noun": "cup"}'), "word: Field required"),
    "more than asked": (completion('{"word": "cup", "why": 1}'), "why: Extra inputs"),
    "cut off": (completion('{"word": "cu', finish="length"), "cut off at 12 characters; raise max_tokens"),
    "refusal": (completion(None), "no text in the reply"),
    "not JSON": ((200, {}, "<html>"), "no text in the reply '<html>'"),
    "JSON of another form": ((200, {}, '{"choices": []}'), "no text in the reply"),
    "half a character": (completion('{"word": "\\ud800"}'), "got"),
    "nested": ((200, {}, "[" * 100_000), "no text in the reply"),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_reply_is_asked_for_once_more_and_kept_aside(name: str, tmp_path: Path) -> None:
    answer, problem = INVALID[name]
    with serve(_sequence(answer, GOOD, answer, answer)) as stub:
        asking = client(stub.url, tmp_path)
        assert ask(asking) == "cup"
        again = stub.asked[1]["messages"][-1]["content"]
        assert again.startswith("That was not valid: ")
        assert ask(asking) == "cup", "what is kept aside is not taken for the reply"
        with pytest.raises(ReplyError) as caught:
            ask(asking, "another ?")
        assert problem in str(caught.value)
        assert problem.split("'")[0] in again
    assert [good for good, _ in rows(tmp_path)] == [0, 1, 0, 0]
    assert rows(tmp_path)[0][1] == answer[2]


def test_fenced_json_is_read(tmp_path: Path) -> None:
    with serve(lambda _: completion('```json\n{"word": "cup"}\n```')) as stub:
        assert ask(client(stub.url, tmp_path)) == "cup"


def _on_ping(answer: Any) -> Any:
    def both(body: Any) -> Answer:
        return answer(body) if is_ping(body) else GOOD

    both.pings = True  # type: ignore[attr-defined]
    return both


PREFLIGHT = {
    "key": ((401, {}, "no key"), "status 401, 'no key'; name the variable that holds the key with --llm-key-env"),
    "model": ((404, {}, "no model"), "status 404, 'no model'; correct --llm-url .* or --llm-model"),
    "redirect": ((302, {"Location": "http://elsewhere/"}, ""), "redirects are not followed: give the final --llm-url"),
    "parameter": ((400, {}, "max_tokens ?"), "status 400, 'max_tokens \\?'; correct --llm-model or --llm-param"),
    "prose": (completion("Sure!"), "Invalid JSON.*got 'Sure!'; correct --llm-model or --llm-param"),
    "another model": (completion('{"ok": true}', model="other"), "asked for model 'stub-7b' and answered as 'other'"),
}


@pytest.mark.parametrize("name", PREFLIGHT)
def test_what_cannot_work_is_found_before_the_first_request(name: str, tmp_path: Path) -> None:
    answer, problem = PREFLIGHT[name]
    with serve(_on_ping(lambda _: answer)) as stub:
        with pytest.raises(LlmError, match=problem):
            ask(client(stub.url, tmp_path))
        assert stub.asked == []
    with pytest.raises(LlmError, match="no answer"):
        ask(client(stub.url, tmp_path, backoff_s=60))  # nobody waits for a server that is not there


@pytest.mark.parametrize(
    "url", ["localhost:8000/v1", "ftp://host/v1", "http://user:secret@host/v1", "http://host/v1?a=b", ""]
)
def test_an_address_that_is_none_is_refused(url: str, tmp_path: Path) -> None:
    with pytest.raises(LlmError, match=r"is not http\(s\)://HOST"):
        client(url, tmp_path)


def test_a_server_without_structured_output_is_named_loudly(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: Any) -> Answer:
        if "response_format" in body:
            return 400, {}, "response_format is not supported"
        return completion('{"ok": true}')

    with serve(_on_ping(answer)) as stub:
        assert ask(client(stub.url, tmp_path)) == "cup"
        assert "response_format" not in stub.asked[0]
    warning = capsys.readouterr().err
    assert "refuses structured output (status 400, 'response_format is not supported')" in warning


def test_a_snapshot_is_the_model_another_name_is_not(tmp_path: Path) -> None:
    with serve(
        _sequence(completion('{"word": "cup"}', model=MODEL + "-2026-01-01"), completion("{}", model="b"))
    ) as stub:
        asking = client(stub.url, tmp_path)
        assert ask(asking) == "cup"
        with pytest.raises(LlmError, match="answered as 'b'; ask by that name"):
            ask(asking, "another ?")


def test_the_key_reaches_the_server_and_nothing_else(tmp_path: Path) -> None:
    def echo(body: Any) -> Answer:
        text = body["messages"][-1]["content"]
        return (400, {}, f"bad key Bearer {KEY}") if text == "bad" else completion(f'{{"word": "{KEY}"}}')

    with serve(echo) as stub:
        asking = client(stub.url, tmp_path, key=KEY)
        assert ask(asking) == "[key]"
        with pytest.raises(ReplyError) as caught:
            ask(asking, "bad")
    assert {headers["Authorization"] for headers in stub.headers} == {f"Bearer {KEY}"}
    assert KEY not in str(caught.value)
    assert all(KEY.encode() not in path.read_bytes() for path in tmp_path.iterdir())
    with pytest.raises(LlmError) as refused:
        client(stub.url, tmp_path, key="two words")
    assert "two words" not in str(refused.value)


def test_requests_run_at_the_same_time(tmp_path: Path) -> None:
    # Nobody gets an answer before all four have asked.
    barrier = threading.Barrier(4, timeout=20)

    def answer(_: Any) -> Answer:
        barrier.wait()
        return GOOD

    with serve(answer) as stub, ThreadPoolExecutor(4) as pool:
        asking = client(stub.url, tmp_path, timeout_s=30)
        assert set(pool.map(lambda i: ask(asking, f"what {i} ?"), range(4))) == {"cup"}
        assert len(stub.asked) == 4
        assert len(stub.bodies) == 5, "one ping for all"


def test_stopping_ends_a_wait(tmp_path: Path) -> None:
    with serve(lambda _: (500, {}, "")) as stub:
        asking = client(stub.url, tmp_path, backoff_s=60)
        threading.Timer(0.2, asking.stop).start()
        with pytest.raises(LlmError, match="stopped"):
            ask(asking)


def test_a_cache_that_is_none_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "replies.sqlite").write_text("text, and much of it " * 99)
    with pytest.raises(
        LlmError, match=r"replies\.sqlite: cannot be used as the cache of replies \(.*; name another file"
    ):
        client("http://localhost/v1", tmp_path)
