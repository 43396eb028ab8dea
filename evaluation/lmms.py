"""Our tasks for lmms-eval: where they lie, and its samples as predictions that `swim evaluate` scores.

`lmms_tasks/` is a folder for `--include_path`; it runs in lmms-eval's own environment and imports nothing of this
package. Alignment is no task there: lmms-eval sees answers, not attention.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

TASKS = Path(__file__).resolve().parent / "lmms_tasks"


def lmms_path() -> None:
    """Print the folder of our lmms-eval tasks, for --include_path."""
    print(TASKS)


def lmms_predictions(
    samples: Annotated[Path, typer.Argument(help="..._samples_videorefer_bench_*.jsonl, from --log_samples.")],
    out: Annotated[Path, typer.Option(help="predictions.jsonl to write.")],
) -> None:
    """Write what lmms-eval logged about our tasks as predictions, a line per sample."""
    lines = [json.dumps(line) for line in predictions_of(samples)]
    out.write_text("".join(line + "\n" for line in lines))
    print(f"{len(lines)} predictions: {out}")


def predictions_of(samples: Path) -> Iterator[dict[str, Any]]:
    """Predictions from a samples file of lmms-eval, in its order; ValueError for one that is not of our tasks."""
    for number, text in enumerate(samples.read_text().splitlines(), start=1):
        sample = json.loads(text)
        parts = [part for part in sample.values() if isinstance(part, dict)]
        unit = next((part for part in parts if {"id", "video"} <= part.keys()), None)
        if unit is None:
            raise ValueError(f"{samples}:{number}: no id and video in it; give the samples of a videorefer_bench task")
        answers = sample["filtered_resps"]
        yield {
            "id": unit["id"],
            "clip": unit["video"],
            "task": unit.get("type", "description"),
            "prompt": sample["input"],
            "target": sample["target"],
            "answer": answers[0] if isinstance(answers, list) else answers,
            "nouns": [],
        }
