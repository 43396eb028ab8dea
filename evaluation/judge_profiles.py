"""How a judge is asked and read: profiles `robust` (our words, JSON) and `official-text` (VideoRefer-Bench-D's way).

`official-text` needs the benchmark's own system prompt, which is not ours to ship: what VideoRefer's GPT script reads,
videorefer/eval/videorefer_bench_d/system.txt in the repository DAMO-NLP-SG/VideoRefer, now the folder VideoRefer of
alibaba-damo-academy/PixelRefer. Its parser is described in `parse_official`.
"""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import BaseModel

from swim.data_tools.llm import Text
from swim.evaluation.predictions import PredictionsError

AXES = {
    "subject_correspondence": "Subject Correspondence",
    "appearance_description": "Appearance Description",
    "temporal_description": "Temporal Description",
    "hallucination_detection": "Hallucination Detection",
}
LOWEST, HIGHEST = 0, 5
Axis = str
Scores = dict[Axis, float]
Grade = Literal[0, 1, 2, 3, 4, 5]

ROBUST_PROMPT = """\
You grade a description of one object in a video. You do not see the video: a reference description is all that is \
known, and it is right. Give four integer grades from 0 (worst) to 5 (best):
- subject_correspondence: is it about the same object as the reference? 5: clearly the same; 0: another object.
- appearance_description: do colour, shape, clothing, texture agree with the reference? Details that the reference \
does not have neither raise nor lower this grade.
- temporal_description: do the object's actions, movement and changes over time agree with the reference?
- hallucination_detection: how free is it of claims that contradict the reference or are made up? 5: free of them.
An empty description, or one that says nothing about any object, gets 0 on every scale.
Different words for the same thing are as good as the same words. Reply with this JSON and nothing else:
{"subject_correspondence": 0, "appearance_description": 0, "temporal_description": 0, "hallucination_detection": 0}"""
USER_TEMPLATE = "Reference description: {reference}\nDescription to grade: {answer}"
OFFICIAL_TEMPLATE = "##Correct answer: {reference}\n##Predicted answer: {answer}\n"
TEMPLATE_MARK = "\n--- user ---\n"


class Grades(BaseModel, extra="forbid"):
    """What `robust` asks for, where the endpoint can be held to it."""

    subject_correspondence: Grade
    appearance_description: Grade
    temporal_description: Grade
    hallucination_detection: Grade


class RobustText(Text):
    """A reply that should be `Grades`."""

    form: ClassVar[type[BaseModel] | None] = Grades


@dataclass(frozen=True)
class Profile:
    """A way to ask and to read; `params` are the decoding that it fixes unless the user says otherwise."""

    name: str
    version: int
    system: str
    template: str
    schema: type[Text]
    params: Mapping[str, object]
    parse: Callable[[str], Scores]
    reply_tokens: int

    @property
    def digest(self) -> str:
        """SHA-256 of system text and template."""
        return hashlib.sha256(json.dumps([self.system, self.template]).encode()).hexdigest()

    def messages(self, reference: str, answer: str) -> list[dict[str, str]]:
        """System and user message for a pair."""
        # Not str.format: references hold braces, too.
        user = re.sub(
            r"\{(reference|answer)\}", lambda m: {"reference": reference, "answer": answer}[m[1]], self.template
        )
        return [{"role": "system", "content": self.system}, {"role": "user", "content": user}]


def find_profile(name: str, prompt: Path | None) -> Profile:
    """The profile of that name, `official-text` with the system text in the file `prompt`; PredictionsError.

    Behind a line `--- user ---` the file may also hold the user message, with {reference} and {answer} in it.
    """
    if name == "robust":
        if prompt is not None:
            raise PredictionsError("--judge-prompt belongs to the profile official-text; robust has its own, versioned")
        decoding = {"temperature": 0, "max_tokens": 256}
        return Profile(name, 1, ROBUST_PROMPT, USER_TEMPLATE, RobustText, decoding, parse_robust, 60)
    if name != "official-text":
        raise PredictionsError(f"--judge-profile {name!r} is not one of: robust, official-text")
    if prompt is None:
        raise PredictionsError(
            "the profile official-text needs --judge-prompt FILE, the benchmark's system.txt, which is not ours to "
            "ship; docs/evaluation.md says where it is"
        )
    system, mark, template = prompt.read_text(encoding="utf-8").partition(TEMPLATE_MARK)
    decoding = {"temperature": 0, "max_tokens": 800}
    template = template.strip() if mark else OFFICIAL_TEMPLATE
    if not {"{reference}", "{answer}"} <= set(re.findall(r"\{\w+\}", template)):
        raise PredictionsError(f"{prompt}: the user message must hold {{reference}} and {{answer}}")
    return Profile(name, 1, system, template, Text, decoding, parse_official, 200)


def parse_official(text: str) -> Scores:
    """Grades as VideoRefer-Bench-D's script reads them, its failures included; {} where it drops the sample.

    It takes every "number. name: number" with space behind the dot and the colon, and keeps what is named exactly like
    an axis. So a name in bold is another name, and its axis is silently missing; a colon inside the bold, or without a
    space behind it, hides the number; "3.5." is no number and costs the whole sample; numbered phrases of an
    explanation are read, too. "4/5" and "4." are 4. Nothing checks the range.
    """
    found = {}
    for name, number in re.findall(r"\d+\.\s+([^\n]*?):\s+([\d.]+)", text):
        try:
            found[name] = float(number)
        except ValueError:
            return {}
    return {axis: found[title] for axis, title in AXES.items() if title in found}


def parse_robust(text: str) -> Scores:
    """Grades from JSON, alone or within other text, or else from lines with an axis's name and a number behind it.

    Names may be in bold, in any case, with spaces or underscores. A grade outside 0 to 5 is none.
    """
    found: dict[str, float] = {}
    text = text.rpartition("</think>")[2]  # what a judge tried out is no grade
    for match in re.finditer(r"\{[^{}]*\}", text):
        try:
            value = json.loads(match[0])
        except (ValueError, RecursionError):
            continue
        numbers = {name: _number(given) for name, given in value.items()}
        found |= {_axis(name): number for name, number in numbers.items() if number is not None}
        if found.keys() & AXES.keys():
            break
    else:
        for axis in AXES:
            name = axis.replace("_", r"[\s_]+")
            lead = rf"{name}[\s*_\"'`)]*(?:\([^()\n]*\))?[\s*_\"'`)]*[:=\-–][\s*_\"'`(]*"
            # Not the 0 of "0-5", nor the 1 of "1e1".
            grade = re.search(lead + r"(\d+(?:\.\d+)?)(?!\.?\d|\s*[-–]\s*\d|e\d)", text, re.IGNORECASE | re.ASCII)
            if grade:
                found[axis] = float(grade[1])
    good = {axis: found[axis] for axis in AXES if axis in found}
    return {axis: float(grade) for axis, grade in good.items() if LOWEST <= grade <= HIGHEST}


def _number(given: object) -> float | None:
    if isinstance(given, str) and re.fullmatch(r"\d+(?:\.\d+)?", given.strip()):
        return float(given)
    return given if isinstance(given, int | float) and not isinstance(given, bool) else None


def _axis(name: str) -> str:
    return "_".join(name.strip("*_ ").lower().split())
