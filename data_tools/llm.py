"""Structured replies from any OpenAI-compatible endpoint, each paid for once.

A reply is JSON that a pydantic model accepts. What was asked and answered is kept in an SQLite file, by the SHA-256 of
model, prompt version, messages, parameters and schema; a run that is killed asks nothing twice. The file holds raw
replies, refused ones too, and never the key.
"""

import email.utils
import hashlib
import http.client
import json
import random
import re
import sqlite3
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from pydantic import BaseModel, ValidationError

Messages = Sequence[Mapping[str, str]]
PARAMS: dict[str, Any] = {"temperature": 0, "max_tokens": 256}
MAX_REPLY_BYTES = 1 << 20
MAX_WAIT_S = 120.0
_AGAIN = {408, 409, 425, 429}  # and 5xx: the same request may succeed later

_M = TypeVar("_M", bound=BaseModel)


class LlmError(ValueError):
    """The endpoint cannot be used, or no longer; what it has answered so far is kept."""


class ReplyError(ValueError):
    """One request got no usable reply, while the endpoint answers others."""


class _Failed(Exception):  # noqa: N818 - how one request ended, never seen outside
    """A request ended with an HTTP status, None if nothing came back."""

    def __init__(self, status: int | None, problem: str) -> None:
        super().__init__(problem)
        self.status = status


@dataclass(frozen=True)
class Reply(Generic[_M]):
    """A reply as its schema reads it, and the body as it came."""

    parsed: _M
    raw: str


class Text(BaseModel):
    """A reply that is taken as it comes; a subclass may name the `form` that is asked for, if the endpoint can."""

    form: ClassVar[type[BaseModel] | None] = None
    text: str


class _Ping(BaseModel, extra="forbid"):
    ok: bool


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """The key is for this host, not for one that it names."""


class Client:
    """Chat completions of one model; safe to use from many threads.

    `url` is the part before /chat/completions, `key` goes into the Authorization header and nowhere else, `params` are
    added to PARAMS (None removes one). A request is tried `attempts` times; what fails for good is LlmError where the
    endpoint fails, ReplyError where it is the request. With `exact_model` a reply that names another model is LlmError.
    `flag` begins the names of the options in messages.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        cache: str | Path,
        key: str | None = None,
        params: Mapping[str, Any] | None = None,
        timeout_s: float = 60,
        attempts: int = 6,
        backoff_s: float = 1,
        exact_model: bool = False,
        flag: str = "--llm",
    ) -> None:
        if not re.match(r"https?://[^/@\s]+(/[^\s?#]*)?$", url):
            raise LlmError(f"URL {url!r} is not http(s)://HOST[:PORT]/PATH, e.g. http://localhost:8000/v1")
        if key is not None and not re.fullmatch(r"[!-~]+", key):
            raise LlmError(
                f"the key, of {len(key)} characters, is empty or holds spaces or control characters; correct it"
            )
        self.url, self.model = url.rstrip("/").removesuffix("/chat/completions"), model
        self.params = {name: value for name, value in {**PARAMS, **(params or {})}.items() if value is not None}
        self.timeout_s, self.attempts, self.backoff_s = timeout_s, attempts, backoff_s
        self.num_calls, self.structured = 0, True
        self._key, self._exact_model, self._flag = key, exact_model, flag
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._ready, self._strict, self._stopped = False, True, threading.Event()
        self._lock, self._first = threading.Lock(), threading.Lock()
        Path(cache).parent.mkdir(parents=True, exist_ok=True)
        try:
            self._store = sqlite3.connect(cache, timeout=60, isolation_level=None, check_same_thread=False)
            self._store.execute("CREATE TABLE IF NOT EXISTS replies (hash TEXT, good INT, request TEXT, raw TEXT)")
            self._store.execute("CREATE INDEX IF NOT EXISTS by_hash ON replies (hash)")
        except sqlite3.Error as error:
            raise LlmError(f"{cache}: cannot be used as the cache of replies ({error}); name another file") from None

    def cached(self, messages: Messages, schema: type[_M], *, version: str) -> Reply[_M] | None:
        """The kept reply to a request, None if it was not asked yet."""
        return self._kept(self.request_hash(messages, schema, version=version), schema)

    def complete(self, messages: Messages, schema: type[_M], *, version: str) -> Reply[_M]:
        """The reply to messages of {role, content}, asked for once more with the reason if `schema` refuses it.

        `version` names the prompt. Before the first request of all, a small one finds out whether the endpoint is
        there, takes the key, knows the model and keeps to a schema. LlmError, ReplyError.
        """
        digest = self.request_hash(messages, schema, version=version)
        kept = self._kept(digest, schema)
        if kept is not None:
            return kept
        with self._first:
            if not self._ready:
                self._strict = not issubclass(schema, Text)
                self._preflight()
        body = self._body(messages, schema)
        for last in (False, True):
            raw = self._ask(body)
            try:
                reply = Reply(self._parse(raw, schema), raw)
            except ReplyError as error:
                self._keep(digest, 0, body, raw)
                if last:
                    raise
                wrong = [{"role": "assistant", "content": _content(raw)}] if _content(raw) else []
                again = {"role": "user", "content": f"That was not valid: {error}. Reply with the corrected JSON only."}
                body = {**body, "messages": [*messages, *wrong, again]}
                continue
            self._keep(digest, 1, body, raw)
            return reply
        raise AssertionError

    def stop(self) -> None:
        """Let requests that wait for their next attempt end with LlmError."""
        self._stopped.set()

    def request_hash(self, messages: Messages, schema: type[BaseModel], *, version: str) -> str:
        """What a reply is kept by."""
        form = _form(schema)
        asked = [self.model, version, list(messages), self.params, form and form.model_json_schema()]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()

    def _kept(self, digest: str, schema: type[_M]) -> Reply[_M] | None:
        with self._lock:
            found = self._store.execute("SELECT raw FROM replies WHERE hash = ? AND good", (digest,)).fetchone()
        return Reply(self._parse(found[0], schema), found[0]) if found else None

    def _keep(self, digest: str, good: int, body: Mapping[str, Any], raw: str) -> None:
        try:
            with self._lock:
                self._store.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", (digest, good, json.dumps(body), raw))
        except sqlite3.Error as error:
            raise LlmError(
                f"the cache of replies cannot be written ({error}); make room or name another file"
            ) from None

    def _body(self, messages: Messages, schema: type[BaseModel]) -> dict[str, Any]:
        body: dict[str, Any] = {"model": self.model, "messages": list(messages), **self.params}
        if self.structured and (form := _form(schema)) is not None:
            named = {"name": form.__name__.strip("_"), "strict": True, "schema": form.model_json_schema()}
            body["response_format"] = {"type": "json_schema", "json_schema": named}
        return body

    def _preflight(self) -> None:
        ping = [{"role": "user", "content": 'Reply with the JSON {"ok": true} and nothing else.'}]
        try:
            try:
                raw = self._send(self._body(ping, _Ping), preflight=True)
            except _Failed as refused:
                if refused.status not in (400, 415, 422, 501):
                    raise
                self.structured = False
                try:
                    raw = self._send(self._body(ping, _Ping), preflight=True)
                except _Failed:
                    raise refused from None
                problem = f"{self.url} refuses structured output ({refused})"
                print(f"warning: {problem}; replies are asked for in the prompt alone, and checked", file=sys.stderr)
            self._parse(raw, _Ping if self._strict else Text)
        except (_Failed, ReplyError) as error:
            status = error.status if isinstance(error, _Failed) else 200
            raise LlmError(f"{self.url}, model {self.model!r}: {error}; {_remedy(status, self._flag)}") from None
        self._ready = True

    def _ask(self, body: Mapping[str, Any]) -> str:
        try:
            return self._send(body)
        except _Failed as error:
            status, problem = error.status, str(error)
        if status in (401, 403, 404) or (status is not None and 300 <= status < 400):
            raise LlmError(f"{self.url}, model {self.model!r}: {problem}; {_remedy(status, self._flag)}")
        if status is None or status in _AGAIN or status >= 500:
            self._preflight()  # is it the endpoint that fails, or this request?
        raise ReplyError(f"the endpoint answers others, but not this request: {problem}")

    def _send(self, body: Mapping[str, Any], *, preflight: bool = False) -> str:
        """Body of the reply; _Failed after the last attempt, or at once where another would not help."""
        for attempt in range(1, self.attempts + 1):
            status, wait, text = self._post(json.dumps(body).encode())
            if status == 200:
                return text
            hopeless = status is not None and status not in _AGAIN and status < 500
            if hopeless or attempt == self.attempts or (preflight and status is None):
                said = f"{text.strip()[:300]!r}"
                problem = f"status {status}, {said}" if status is not None else f"no answer ({text})"
                raise _Failed(status, problem + (f", after {attempt} attempts" if attempt > 1 else ""))
            if wait is not None and wait > MAX_WAIT_S:
                raise LlmError(f"{self.url} asks to wait {wait:.0f} s, the limit is {MAX_WAIT_S:.0f} s; run again then")
            # Jitter, so that the requests which failed together do not come back together.
            delay = min(self.backoff_s * 2 ** (attempt - 1), MAX_WAIT_S) * random.uniform(0.5, 1)
            if self._stopped.wait(max(delay, wait or 0)):
                break
        raise LlmError("stopped")

    def _post(self, body: bytes) -> tuple[int | None, float | None, str]:
        """(status, seconds to wait, text); the status is None if nothing came back, the text then says why."""
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        request = urllib.request.Request(f"{self.url}/chat/completions", body, headers)
        with self._lock:
            self.num_calls += 1
        try:
            try:
                response = self._opener.open(request, timeout=self.timeout_s)
            except urllib.error.HTTPError as error:
                response = error  # a reply like any other
            with response:
                status, wait = response.status, _seconds(response.headers.get("Retry-After"))
                data = response.read(MAX_REPLY_BYTES)
        except (OSError, http.client.HTTPException) as error:
            return None, None, str(getattr(error, "reason", None) or error or type(error).__name__)
        text = data.decode(errors="replace")
        # A server may quote what it was sent.
        return status, wait, text.replace(self._key, "[key]") if self._key else text

    def _parse(self, raw: str, schema: type[_M]) -> _M:
        content = _content(raw)
        reply = _reply(raw)
        named = reply.get("model")
        # A name may stand for its dated snapshot, but who counts on the very model wants to be told.
        wrong = isinstance(named, str) and not named.lower().startswith(self.model.lower())
        if wrong or (self._exact_model and content and named != self.model):
            raise LlmError(f"{self.url} was asked for model {self.model!r} and answered as {named!r}; ask by that name")
        if not content:
            raise ReplyError(f"no text in the reply {raw[:200]!r}")
        if reply["choices"][0].get("finish_reason") == "length":
            raise ReplyError(f"cut off at {len(content)} characters; raise max_tokens")
        if issubclass(schema, Text):
            if content.encode(errors="replace").decode() != content:  # half a character, which no file could hold
                raise ReplyError(f"no valid Unicode, got {content[:200]!r}")
            return schema(text=content)
        fenced = re.fullmatch(r"\s*```(?:json)?\s*(.*?)\s*```\s*", content, re.DOTALL)
        try:
            return schema.model_validate_json(fenced[1] if fenced else content)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise ReplyError(f"{where + ': ' if where else ''}{first['msg']}, got {content[:200]!r}") from None
        except ValueError:
            raise ReplyError(f"no valid Unicode, got {content[:200]!r}") from None


def _form(schema: type[BaseModel]) -> type[BaseModel] | None:
    return schema.form if issubclass(schema, Text) else schema


def _reply(raw: str) -> dict[str, Any]:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _content(raw: str) -> str | None:
    """The text of a reply's first choice, if it has the form of one."""
    try:
        content = _reply(raw)["choices"][0]["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return None
    return content if isinstance(content, str) else None


def _seconds(retry_after: str | None) -> float | None:
    """A Retry-After header, seconds or a date, in seconds from now."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(retry_after).timestamp() - time.time())
    except ValueError:
        return None


def _remedy(status: int | None, flag: str) -> str:
    if status is None:
        return f"start the server, or correct {flag}-url"
    if status in (401, 403):
        return f"name the variable that holds the key with {flag}-key-env"
    if 300 <= status < 400:
        return f"redirects are not followed: give the final {flag}-url"
    if status == 404:
        return f"correct {flag}-url (the part before /chat/completions) or {flag}-model"
    if status == 429 or status >= 500:
        return "run again later; what was answered is kept"
    return f"correct {flag}-model or {flag}-param"
