"""Benchmarks by protocol id. A further one is a module in benchmarks/ that ends in `BENCHMARK`, and a line here."""

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from swim.evaluation.predictions import PredictionsError
from swim.evaluation.scores import Metric, PredictionFile, Settings

MODULES = {
    "alignment-grid": "alignment",
    "videorefer-bench-d": "videorefer_d",
    "videorefer-bench-q": "videorefer_q",
}


@dataclass(frozen=True)
class Benchmark:
    """What is fixed about a benchmark (`id`, `version`, ...), its metrics, those to print first, and how it scores."""

    protocol: Mapping[str, Any]
    metrics: tuple[Metric, ...]
    headline: tuple[str, ...]
    score: Callable[[PredictionFile, Settings], dict[str, Any]]


def find_benchmark(name: str) -> Benchmark:
    """The benchmark of that protocol id; PredictionsError lists the known ones."""
    if name not in MODULES:
        raise PredictionsError(f"benchmark {name!r} is not known; there are: {', '.join(MODULES)}")
    return cast(Benchmark, importlib.import_module(f"swim.evaluation.benchmarks.{MODULES[name]}").BENCHMARK)
