"""VideoRefer-Bench-Q: multiple choice; protocol `videorefer-bench-q`.

`accuracy` reads answers as the published script does (`parse_official`) and is its micro average, over questions;
`accuracy_strict` reads them with `parse_strict`, where what names no option is `unparsed` and wrong. `macro` of either
is the mean over the types of question.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from swim.data_tools.rewording import letter_of, options_of
from swim.evaluation.answers import normalise
from swim.evaluation.registry import Benchmark
from swim.evaluation.scores import Metric, PredictionFile, Settings, Unit, estimate, make_unit, summarise
from swim.evaluation.statistics import interval_of_macro

SCORED = (Metric("accuracy"), Metric("accuracy_strict"))
PROTOCOL = {
    "id": "videorefer-bench-q",
    "version": 1,
    "aggregation": "micro: mean over questions; macro: mean over types",
    "parsers": "accuracy: official (first '(X)', else first 'X)', else first character); accuracy_strict: strict",
    "prompt": "the question, then its options, one a line; no system prompt but the model's own",
}


def parse_official(answer: str) -> str | None:
    """The letter as VideoRefer's script reads it: first "(X)", else first "X)", else the first character but for full
    stops, in upper case.

    So "The answer is B" is "T", and a leading blank is an answer. The script crashes on an empty one; here it is None.
    """
    for pattern in (r"\(([A-Z])\)", r"([A-Z])\)"):
        if match := re.search(pattern, answer):
            return match[1]
    return answer.replace(".", "")[:1].upper() or None


def parse_strict(answer: str, options: Mapping[str, str]) -> str | None:
    """The letter of the one option that an answer names, else None.

    An answer names an option by its text alone, by its letter alone or before the text ("B", "(B)", "B.", "B) a cup"),
    or in a sentence like "the answer is (B)" or "option B". Two different letters are no answer.
    """
    texts = {normalise(text): letter for letter, text in options.items()}
    if (found := texts.get(normalise(answer))) is not None:
        return found
    letters = "".join(map(re.escape, options)) or "A-Z"
    named = set(re.findall(rf"\(([{letters}])\)", answer))
    if lead := re.match(rf"\s*\(?([{letters}])(?:[).:]|\s*$)", answer):
        named.add(lead[1])
    named |= set(re.findall(rf"(?i:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([{letters}])(?![\w'])", answer))
    return named.pop() if len(named) == 1 else None


def score(file: PredictionFile, settings: Settings) -> dict[str, Any]:
    """An arm: micro and macro accuracy by both parsers, by type, coverage, units."""
    units = []
    for entry, line in file.predictions():
        unit = make_unit(entry, line)
        if line.status == "scored":
            _answer(unit)
        units.append(unit)
    results = summarise(file, units, SCORED, settings)
    results["coverage"] |= {
        "unparsed_strict": sum(unit["status"] == "scored" and unit["strict"] is None for unit in units),
        "empty_answers": sum(unit["status"] == "scored" and not unit["answer"].strip() for unit in units),
    }
    types = sorted({unit["task"] for unit in units})
    by_type = {name: [unit for unit in units if unit["task"] == name] for name in types}
    results["by_type"] = {
        name: {metric.name: estimate(of_type, metric, settings) for metric in SCORED} | {"num": len(of_type)}
        for name, of_type in by_type.items()
    }
    for metric in SCORED:
        results[f"macro_{metric.name}"] = _macro(by_type, metric, settings)
    return results


def _answer(unit: Unit) -> None:
    """Fill in what both parsers read, and whether it is right; `choice` is the text of the option that was meant."""
    options, target = options_of(unit["prompt"]), letter_of(unit["target"])
    official, strict = parse_official(unit["answer"]), parse_strict(unit["answer"], options)
    if target is None:
        unit["status"], unit["reason"] = "unparsed", f"the target {unit['target']!r:.80} names no option"
        return
    unit |= {"parsed": official, "strict": strict, "options": options}
    unit["choice"] = options.get(strict, strict) if strict is not None else None
    unit["values"] = {"accuracy": float(official == target)}
    unit["values"]["accuracy_strict"] = float(strict == target) if strict is not None else None


def _macro(by_type: Mapping[str, Sequence[Unit]], metric: Metric, settings: Settings) -> dict[str, Any]:
    """Mean over types of the mean over questions, with an interval from drawing clips."""
    rows = {
        name: [(unit["clip"], unit["values"].get(metric.name) or metric.worst) for unit in units]
        for name, units in by_type.items()
    }
    only = [estimate(units, metric, settings)["value_scored_only"] for units in by_type.values()]
    found = dict(interval_of_macro(rows, seed=settings.seed, resamples=settings.resamples))
    return found | {"value_scored_only": sum(only) / len(only) if only and all(v is not None for v in only) else None,
                    "num": len(rows), "num_scored": sum(v is not None for v in only)}  # fmt: skip


BENCHMARK = Benchmark(
    protocol=PROTOCOL,
    metrics=SCORED,
    headline=("accuracy", "macro_accuracy", "accuracy_strict", "macro_accuracy_strict"),
    score=score,
)
