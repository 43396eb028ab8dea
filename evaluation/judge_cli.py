"""The options of a judge, shared by `swim evaluate score` and `judge-check`, and what these commands do with them."""

import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import typer

from swim.data_tools.llm import Client
from swim.evaluation.judge import Pair, estimate_cost, identity, judge, read_judged
from swim.evaluation.judge_profiles import Profile, find_profile
from swim.evaluation.predictions import PredictionsError

Url = Annotated[str | None, typer.Option("--judge-url", help="OpenAI-compatible: what comes before /chat/completions.")]
ModelName = Annotated[str | None, typer.Option("--judge-model", help="Exactly as the server calls itself in replies.")]
ProfileName = Annotated[str, typer.Option("--judge-profile", help="robust, or official-text with --judge-prompt.")]
Prompt = Annotated[Path | None, typer.Option("--judge-prompt", help="Text file with the official system message.")]
Repeats = Annotated[int, typer.Option("--judge-repeats", min=1, help="Replies per answer; the median counts.")]
Workers = Annotated[int, typer.Option("--judge-workers", min=1, help="Requests at a time.")]
Params = Annotated[list[str] | None, typer.Option("--judge-param", help="NAME=JSON of the request; null removes it.")]
KeyVariable = Annotated[str | None, typer.Option("--judge-key-env", help="Environment variable that holds the key.")]
Cache = Annotated[Path | None, typer.Option("--judge-cache", help="File of raw replies, to share between folders.")]
Timeout = Annotated[float, typer.Option("--judge-timeout", min=0.1, help="Seconds for a reply.")]
Attempts = Annotated[int, typer.Option("--judge-attempts", min=1, help="Of a request, with growing waits between.")]
DryRun = Annotated[bool, typer.Option("--judge-dry-run", help="Ask nothing; print a prompt, tokens and cost.")]
Price = Annotated[
    tuple[float, float] | None, typer.Option("--judge-price", help="Dollars per million tokens, in and out.")
]


@dataclass(frozen=True)
class JudgeOptions:
    """What the command line says about the judge."""

    url: str
    model: str
    profile: Profile
    cache: Path
    repeats: int = 1
    workers: int = 8
    params: Mapping[str, Any] = field(default_factory=dict)
    key: str | None = None
    timeout_s: float = 60
    attempts: int = 6
    backoff_s: float = 1

    def client(self) -> Client:
        """A client that insists on the model's name; nothing is asked yet."""
        return Client(
            self.url,
            self.model,
            cache=self.cache,
            key=self.key,
            params={**self.profile.params, **self.params},
            timeout_s=self.timeout_s,
            attempts=self.attempts,
            backoff_s=self.backoff_s,
            exact_model=True,
            flag="--judge",
        )

    def identity(self) -> dict[str, Any]:
        """Who judges, as judge.jsonl has it."""
        return identity(replace(self, cache=Path(":memory:")).client(), self.profile)


def judge_options(
    url: str | None, model: str | None, profile: str, prompt: Path | None, key_variable: str | None, **others: Any
) -> JudgeOptions | None:
    """The options together; None without a URL. PredictionsError for what is missing or contradicts itself."""
    if url is None:
        if model is not None or prompt is not None or key_variable is not None or profile != "robust":
            raise PredictionsError("--judge-url is missing: give the endpoint of the judge")
        return None
    if model is None:
        raise PredictionsError("--judge-model is missing: name a model that the endpoint serves")
    if key_variable is not None and not os.environ.get(key_variable):
        raise PredictionsError(f"--judge-key-env {key_variable!r}: no such variable is set; export it")
    key = os.environ[key_variable].strip() if key_variable is not None else None
    return JudgeOptions(url, model, find_profile(profile, prompt), key=key, **others)


def read_params(given: Sequence[str]) -> dict[str, Any]:
    """NAME=JSON as values; PredictionsError."""
    found = {}
    for item in given:
        name, equals, value = item.partition("=")
        try:
            found[name] = json.loads(value if equals else "")
        except ValueError:
            raise PredictionsError(f"--judge-param {item!r} is not NAME=JSON, e.g. temperature=0.7") from None
    return found


def ask(pairs: Sequence[Pair], options: JudgeOptions, path: Path) -> None:
    """Have all pairs judged into judge.jsonl at `path`, saying what was asked. LlmError."""
    client = options.client()
    new = judge(pairs, options.profile, client, path, repeats=options.repeats, workers=options.workers)
    asked = {(pair.arm, pair.id, pair.digest) for pair in pairs}
    lines = {
        (line["arm"], line["id"], line["pair"], line["repeat"]): line["error"]
        for line in read_judged(path, options.identity())
        if (line["arm"], line["id"], line["pair"]) in asked
    }
    print(f"{new} asked of {options.model} ({options.profile.name}), {client.num_calls} requests: {path}")
    if failed := [error for error in lines.values() if error is not None]:
        print(
            f"warning: {len(failed)} of {len(lines)} replies did not come and count worst until they do; run again. "
            f"First: {failed[0]:.300}",
            file=sys.stderr,
        )


def dry_run(pairs: Sequence[Pair], options: JudgeOptions, path: Path, price: tuple[float, float] | None) -> None:
    """Print what `ask` would do and cost."""
    # In memory: a dry run leaves no file behind.
    client = replace(options, cache=Path(":memory:")).client()
    cost = estimate_cost(pairs, options.profile, client, path, repeats=options.repeats)
    if pairs:
        for message in options.profile.messages(pairs[0].reference, pairs[0].answer):
            print(f"[{message['role']}]\n{message['content']}\n")
    print(f"parameters: {client.params}")
    print(f"{cost.requests} requests, {cost.kept} replies are there already")
    print(f"about {cost.prompt_tokens} tokens in, {cost.reply_tokens} out (4 characters a token)")
    if price is not None:
        print(f"about ${cost.dollars(*price):.2f} at ${price[0]:g} and ${price[1]:g} per million tokens")
    print("nothing was asked")
