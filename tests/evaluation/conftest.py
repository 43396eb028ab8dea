"""Small predictions of known scores."""

from collections.abc import Callable
from typing import Any

import pytest

Build = Callable[..., dict[str, Any]]


def _noun(object_id: str, x: int, look: int, *, width: int = 4, steps: int = 2) -> dict[str, Any]:
    """A noun "circle" at 13:19 whose object fills column x of a 2 x width grid and whose map lies on column `look`."""
    column = lambda at, value: [[value if i == at else 0.0 for i in range(width)] for _ in range(2)]  # noqa: E731
    return {
        "text": "circle",
        "turn": 0,
        "start": 13,
        "end": 19,
        "object_ids": [object_id],
        "frames": [[2 * step, 2 * step + 1] for step in range(steps)],
        "map": [column(look, 0.5)] * steps,
        "coverage": [column(x, 1.0)] * steps,
    }


def _line(id: str, nouns: list[dict[str, Any]], *, answer: str = "left", task: str = "direction") -> dict[str, Any]:
    """A prediction whose target is "left"."""
    return {
        "id": id,
        "clip": id.split("#")[0],
        "task": task,
        "prompt": "Where is the circle going?",
        "target": "left",
        "answer": answer,
        "nouns": nouns,
    }


@pytest.fixture
def noun() -> Build:
    return _noun


@pytest.fixture
def line() -> Build:
    return _line
