"""A language model as judge of descriptions: (reference, answer) pairs -> judge.jsonl, a line per pair and repeat.

The replies are kept raw, with the model's name and usage as the server gave them; parsing belongs to the profile and is
done anew whenever scores are made. A pair is asked for once: what judge.jsonl or the cache of replies holds is not
asked again, so a run that was killed goes on. There is no fallback: an endpoint that is not there, or answers as
another model, ends the run with LlmError.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from swim.data_tools.llm import Client, ReplyError
from swim.evaluation.judge_profiles import Profile

CHARACTERS_PER_TOKEN = 4  # of English, roughly; for an estimate of cost before any tokenizer is known


@dataclass(frozen=True)
class Pair:
    """What is judged: an answer against its reference; `arm` is whose it is."""

    arm: str
    id: str
    reference: str
    answer: str

    @property
    def digest(self) -> str:
        """SHA-256 of both texts."""
        return hashlib.sha256(json.dumps([self.reference, self.answer]).encode()).hexdigest()


@dataclass(frozen=True)
class Cost:
    """What judging would take, by a rough count of characters."""

    requests: int
    kept: int
    prompt_tokens: int
    reply_tokens: int

    def dollars(self, per_million_in: float, per_million_out: float) -> float:
        """At these prices of a million tokens."""
        return (self.prompt_tokens * per_million_in + self.reply_tokens * per_million_out) / 1e6


def identity(client: Client, profile: Profile) -> dict[str, Any]:
    """Who judges and how; replies of different identities are never mixed."""
    return {
        "model": client.model,
        "url": client.url,
        "profile": profile.name,
        "version": profile.version,
        "prompt_sha256": profile.digest,
        "params": client.params,
    }


def judge(
    pairs: Sequence[Pair], profile: Profile, client: Client, path: Path, *, repeats: int = 1, workers: int = 8
) -> int:
    """Ask for every pair `repeats` times, appending to judge.jsonl at `path`; gives the number of new lines.

    A pair whose request fails by itself gets a line with an error, and is asked again next time. LlmError.
    """
    about = identity(client, profile)
    path.parent.mkdir(parents=True, exist_ok=True)
    _drop_torn(path)
    done = {_key(line) for line in read_judged(path, about) if line["error"] is None}
    # Each once: a variant may have the same answer.
    pairs = list(dict.fromkeys(pairs))
    wanted = [(pair, n) for pair in pairs for n in range(repeats) if (pair.arm, pair.id, pair.digest, n) not in done]
    with path.open("a", encoding="utf-8") as file, ThreadPoolExecutor(max(1, min(workers, len(wanted)))) as pool:
        waiting: set[Future[dict[str, Any]]] = set()
        try:
            # One alone finds out whether the endpoint is there, before all others wait for it.
            for number, (pair, repeat) in enumerate(wanted):
                waiting.add(pool.submit(_ask, pair, repeat, profile, client, about))
                if number == 0 or len(waiting) >= 2 * workers:
                    waiting = _write_done(waiting, file)
            while waiting:
                waiting = _write_done(waiting, file)
        except BaseException:
            client.stop()
            for future in waiting:
                future.cancel()
            raise
    return len(wanted)


def _write_done(waiting: set[Future[dict[str, Any]]], file: Any) -> set[Future[dict[str, Any]]]:
    """Write what is ready, at least one; the rest."""
    done, rest = wait(waiting, return_when="FIRST_COMPLETED")
    failed = None
    for future in done:
        if (error := future.exception()) is not None:
            failed = failed or error
            continue
        # Escaped: a reply may hold half a character, which is no UTF-8.
        file.write(json.dumps(future.result()) + "\n")
    file.flush()
    if failed is not None:
        raise failed
    return rest


def _ask(pair: Pair, repeat: int, profile: Profile, client: Client, about: Mapping[str, Any]) -> dict[str, Any]:
    line = {"id": pair.id, "arm": pair.arm, "pair": pair.digest, "repeat": repeat, "judge": dict(about)}
    messages = profile.messages(pair.reference, pair.answer)
    try:
        # The repeat is a part of the version: the same request is asked anew, and each reply is kept.
        reply = client.complete(messages, profile.schema, version=f"{profile.name}/{profile.version}/{repeat}")
    except ReplyError as error:
        return line | {"model": None, "usage": None, "reply": None, "raw": None, "error": str(error)}
    raw = json.loads(reply.raw)
    return line | {
        "model": raw.get("model"),
        "usage": raw.get("usage"),
        "reply": reply.parsed.text,
        "raw": raw,
        "error": None,
    }


def estimate_cost(pairs: Sequence[Pair], profile: Profile, client: Client, path: Path, *, repeats: int) -> Cost:
    """What `judge` would ask, without asking."""
    pairs = list(dict.fromkeys(pairs))
    about = identity(client, profile)
    done = {_key(line) for line in read_judged(path, about) if line["error"] is None}
    wanted = [(pair, n) for pair in pairs for n in range(repeats) if (pair.arm, pair.id, pair.digest, n) not in done]
    characters = sum(len(m["content"]) for pair, _ in wanted for m in profile.messages(pair.reference, pair.answer))
    return Cost(
        requests=len(wanted),
        kept=len(pairs) * repeats - len(wanted),
        prompt_tokens=characters // CHARACTERS_PER_TOKEN,
        reply_tokens=len(wanted) * profile.reply_tokens,
    )


def read_judged(path: Path, about: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
    """Lines of judge.jsonl by one judge, the last one's unless `about` names another; none without a file."""
    lines: list[dict[str, Any]] = []
    for text in path.read_bytes().split(b"\n") if path.exists() else ():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and {"id", "arm", "pair", "repeat", "judge", "reply", "error"} <= line.keys():
            lines.append(line)
    about = about if about is not None else (lines[-1]["judge"] if lines else None)
    return [line for line in lines if line["judge"] == about]


def _key(line: Mapping[str, Any]) -> tuple[str, str, str, int]:
    return line["arm"], line["id"], line["pair"], line["repeat"]


def _drop_torn(path: Path) -> None:
    """End the file with its last whole line."""
    data = path.read_bytes() if path.exists() else b""
    if data and not data.endswith(b"\n"):
        with path.open("r+b") as file:
            file.truncate(data.rfind(b"\n") + 1)
