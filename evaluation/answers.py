"""Accuracy of freely generated answers by normalised exact match."""

from collections import Counter
from collections.abc import Iterable

SENTENCE_END = ".,;:!?。！？"


def normalise(text: str) -> str:
    """Text without case, surrounding or repeated white space and trailing sentence punctuation."""
    return " ".join(text.casefold().split()).rstrip(SENTENCE_END + " ")


def is_correct(answer: str, target: str) -> bool:
    """Whether the normalised answer equals the normalised target; an empty answer is wrong."""
    return normalise(answer) != "" and normalise(answer) == normalise(target)


def chance_level(targets: Iterable[str]) -> float | None:
    """Accuracy of always giving the most frequent target; None without targets."""
    counts = Counter(map(normalise, targets))
    return max(counts.values()) / counts.total() if counts else None
