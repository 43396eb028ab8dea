"""VideoRefer-Bench-Q and -D as lmms-eval calls them; standard library only: lmms-eval has an environment of its own.

A line of videorefer_bench_q.jsonl: {id, video, Question, type, options: ["(A) ...", ...], Answer}; of
videorefer_bench_d.jsonl: {id, video, Question, caption}. `video` is a path from the folder lmms-eval runs in, or a
whole one. The parsers are those of `swim evaluate score`, so that both score alike (tests/evaluation/test_lmms.py).
"""

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any


def doc_to_visual(doc: Mapping[str, Any]) -> list[str]:
    """The clip's path; FileNotFoundError instead of an answer without a video."""
    path = os.path.abspath(doc["video"])
    if not os.path.exists(path):
        raise FileNotFoundError(
            f"sample {doc['id']}: no video {path}; run lmms-eval in the folder that video paths start from"
        )
    return [path]


def question_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The question, then its options, one a line."""
    return _framed("\n".join([doc["Question"], *doc["options"]]), lmms_eval_specific_kwargs)


def description_text(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Mapping[str, str] | None = None) -> str:
    """The request for a description."""
    return _framed(doc["Question"], lmms_eval_specific_kwargs)


def question_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What each metric aggregates: score, video and type; an answer that names no option is wrong."""
    answer, target = results[0], parse_official(doc["Answer"])
    if target is None:
        raise ValueError(f"sample {doc['id']}: the Answer {doc['Answer']!r} names no option")
    strict = parse_strict(answer, options_of(doc["options"]))
    official, exact = float(parse_official(answer) == target), float(strict == target)
    unit = {"id": doc["id"], "video": doc["video"], "type": doc["type"]}
    return {
        "accuracy": unit | {"score": official},
        "macro_accuracy": unit | {"score": official},
        "accuracy_strict": unit | {"score": exact},
        "macro_accuracy_strict": unit | {"score": exact},
        "unparsed_strict": unit | {"score": float(strict is None)},
    }


def description_results(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Whether there is a description; the samples file keeps it for the judge."""
    unit = {"id": doc["id"], "video": doc["video"]}
    return {"answered": unit | {"score": float(bool(results[0].strip()))}}


def mean_score(units: Sequence[Mapping[str, Any]]) -> float:
    """Mean over questions."""
    return sum(unit["score"] for unit in units) / len(units)


def macro_score(units: Sequence[Mapping[str, Any]]) -> float:
    """Mean over types of the mean over their questions."""
    by_type: dict[str, list[Mapping[str, Any]]] = {}
    for unit in units:
        by_type.setdefault(unit["type"], []).append(unit)
    return sum(map(mean_score, by_type.values())) / len(by_type)


def options_of(options: Sequence[str]) -> dict[str, str]:
    """Letter -> text of options such as "(A) a cup"."""
    return {option[1]: option[3:].strip() for option in options if re.match(r"\([A-Z]\)", option)}


def parse_official(answer: str) -> str | None:
    """The letter as the published script reads it: first "(X)", else first "X)", else the first character but for full
    stops, in upper case, so that "The answer is B" is "T"; None for an empty answer, on which the script crashes."""
    for pattern in (r"\(([A-Z])\)", r"([A-Z])\)"):
        if match := re.search(pattern, answer):
            return match[1]
    return answer.replace(".", "")[:1].upper() or None


def parse_strict(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer names by its text, by its letter, or in a sentence like "the answer
    is (B)"; None for none or for two different ones."""
    texts = {_normalised(text): letter for letter, text in options.items()}
    if (found := texts.get(_normalised(answer))) is not None:
        return found
    letters = "".join(map(re.escape, options)) or "A-Z"
    named = set(re.findall(rf"\(([{letters}])\)", answer))
    if lead := re.match(rf"\s*\(?([{letters}])(?:[).:]|\s*$)", answer):
        named.add(lead[1])
    named |= set(re.findall(rf"(?i:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([{letters}])(?![\w'])", answer))
    return named.pop() if len(named) == 1 else None


def _normalised(text: str) -> str:
    return " ".join(text.casefold().split()).rstrip(".,;:!?。！？ ")


def _framed(text: str, words: Mapping[str, str] | None) -> str:
    words = words or {}
    return f"{words.get('pre_prompt', '')}{text}{words.get('post_prompt', '')}"
