"""A quiet profiler, and a stand-in for pytest-benchmark's fixture on machines that lack it: it runs the rounds, and
prints no table."""

import os
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read when torch is imported

if find_spec("pytest_benchmark") is None:

    class Rounds:
        def __init__(self) -> None:
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, target: Callable[[], object], *, rounds: int, warmup_rounds: int) -> None:
            for _ in range(warmup_rounds + rounds):
                target()

    @pytest.fixture
    def benchmark() -> Rounds:
        return Rounds()
