"""Writers of referring expressions: what is known about one object in, 'the brown dog' and its noun 'dog' out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

from pydantic import BaseModel, model_validator

from swim.data_tools.llm import Client, Messages, ReplyError
from swim.data_tools.nouns import GENERIC, Chunker, NoNounError

TARGET, OTHER = "<target>", "<other>"
PROMPT_VERSION = "refer-1"
MAX_CHARS = 80
MAX_CONTEXT_CHARS = 4000  # of dialogues other than the object's own
CAPTION_TASKS = ("detailed_caption", "short_caption", "describe")


class GiveUp(ValueError):  # noqa: N818 - what a writer does, not a fault of the program
    """A writer cannot name an object; the message says why."""


@dataclass(frozen=True)
class Dialogue:
    """Turns (role, text) of one conversation, with TARGET for the object; `alone`: no other object is named in it."""

    task: str
    turns: tuple[tuple[str, str], ...]
    alone: bool


@dataclass(frozen=True)
class Subject:
    """What a writer may know about an object: its label, if that says something, and dialogues, its own one first."""

    label: str | None
    dialogues: tuple[Dialogue, ...]


class Expression(BaseModel, extra="forbid", frozen=True):
    """A noun phrase that begins with 'the', and the noun in it that says what the object is."""

    expression: str
    head: str

    @model_validator(mode="after")
    def _noun_inside(self) -> Self:
        text = self.expression
        if not text and not self.head:
            return self  # how a model says that it cannot know
        if not re.fullmatch(rf"the [^\s<>{{}}\[\]][^\n<>{{}}\[\]]{{0,{MAX_CHARS}}}(?<![\s.,;:!?])", text):
            raise ValueError(
                f"expression is not one phrase of 'the' and at most {MAX_CHARS} characters without a full stop"
            )
        if not re.search(r"[^\W\d_]", self.head) or self._find() is None:
            raise ValueError(f"head {self.head!r} is not a word of the expression, as it is written there")
        if self.head.casefold() in GENERIC:
            raise ValueError(f"head {self.head!r} does not say what the object is")
        return self

    def _find(self) -> re.Match[str] | None:
        return re.search(rf"(?<![\w-]){re.escape(self.head)}(?![\w-])", self.expression)

    @property
    def span(self) -> tuple[int, int]:
        """[start, end) of the head in the expression."""
        found = self._find()
        assert found is not None
        return found.span()


class Writer(Protocol):
    """Writes expressions; `about` says how, as JSON values, `jobs` how many may be asked for at a time."""

    about: dict[str, Any]
    jobs: int

    def write(self, subject: Subject, taken: Sequence[str] = ()) -> Expression:
        """An expression for an object that is none of `taken`; GiveUp if there is none."""

    def stop(self) -> None:
        """Let calls that are under way end soon."""


_CAPTION_ASKED = re.compile(
    r"\b(?:describe|caption|identify|descriptions? of|details? (?:of|about|on)|what (?:is|are)|who is)\s+(?:the\s+)?"
    rf"{TARGET}\s*(?:[.?!]|in (?:\w+ )?(?:detail|video|clip|scene)|$)",
    re.IGNORECASE,
)
_SAID_TO_BE = re.compile(rf"{TARGET} (?:is|was) (?=(?:a|an|the|one|two|three)\b)", re.IGNORECASE)


class RuleWriter:
    """Takes the phrase that a label, a caption of the object alone or '<target> is a ...' begins with.

    When that is taken, what follows it in the text is added: 'the man wearing a red shirt'.
    """

    def __init__(self, name: str, chunker: Chunker) -> None:
        self.about: dict[str, Any] = {"writer": "rules", "chunker": name}
        self.jobs = 1
        self._chunker = chunker

    def write(self, subject: Subject, taken: Sequence[str] = ()) -> Expression:
        """The first expression that the rules are sure of; GiveUp with what stood against each text."""
        reasons: list[str] = []
        for text in _evidence(subject):
            try:
                phrase = self._chunker(text, bool(taken))
                return Expression(expression=f"the {phrase.text}", head=phrase.noun)
            except NoNounError as error:
                reasons.append(f"{text[:60]!r}: {error}")
            except ValueError:
                reasons.append(f"{text[:60]!r}: its phrase is longer than {MAX_CHARS} characters")
        raise GiveUp("; ".join(dict.fromkeys(reasons)) or "no text says what it is")

    def stop(self) -> None:
        """Nothing waits here."""


def _evidence(subject: Subject) -> list[str]:
    """Texts that begin with what the object is."""
    texts = [subject.label] if subject.label else []
    for dialogue in subject.dialogues:
        asked = dialogue.task in CAPTION_TASKS
        for role, text in dialogue.turns:
            if role != "assistant":
                asked = dialogue.task in CAPTION_TASKS or bool(_CAPTION_ASKED.search(text))
                continue
            if dialogue.alone and asked:
                texts.append(text.replace(TARGET, "the object"))
            said = _SAID_TO_BE.search(text)
            if said:
                texts.append(text[said.end() :])
    return texts


_SYSTEM = f"""You name one object of a video for a question about it. In the texts the object is written {TARGET}, any \
other object {OTHER}. Write a short English referring expression that can replace {TARGET}, such as "the brown dog": \
it begins with "the", has two to eight words, and says what the object is and, if needed, how it looks or where it is. \
Use only what the texts say. Do not give away what a question asks for, nor what the object does. "head" is the one \
noun of the expression that says what the object is ("dog"), spelled as in the expression. If the texts do not say \
what it is, leave both empty. Reply with JSON only: {{"expression": "the brown dog", "head": "dog"}}"""


class LlmWriter:
    """Asks a language model, once per object of a conversation, and once more where two objects got one name."""

    def __init__(self, client: Client, *, jobs: int = 1) -> None:
        self.about: dict[str, Any] = {
            "writer": "llm",
            "model": client.model,
            "prompt": PROMPT_VERSION,
            "params": client.params,
        }
        self.client, self.jobs = client, jobs

    def messages(self, subject: Subject, taken: Sequence[str] = ()) -> Messages:
        """The prompt about an object."""
        lines = [f"Label: {subject.label}"] if subject.label else []
        for i, dialogue in enumerate(subject.dialogues):
            lines.append("" if i == 0 else "\nFrom another text about the same object:")
            lines += [f"{role}: {text}" for role, text in dialogue.turns]
        if taken:
            lines.append(f"\nAnother object has the same name. Do not use: {'; '.join(taken)}")
        return [{"role": "system", "content": _SYSTEM}, {"role": "user", "content": "\n".join(lines).strip()}]

    def write(self, subject: Subject, taken: Sequence[str] = ()) -> Expression:
        """The model's expression; GiveUp if it has none or its reply cannot be used, LlmError without an endpoint."""
        try:
            reply = self.client.complete(self.messages(subject, taken), Expression, version=PROMPT_VERSION)
        except ReplyError as error:
            raise GiveUp(f"no usable reply: {error}") from None
        if not reply.parsed.expression:
            raise GiveUp("the model says that the texts do not tell what it is")
        return reply.parsed

    def stop(self) -> None:
        """Let calls that wait for another attempt end."""
        self.client.stop()
