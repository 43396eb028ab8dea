"""Our tasks for lmms-eval: where they lie, and its samples as predictions that `swim evaluate` scores.

`lmms_tasks/` is a folder for `--include_path`; it runs in lmms-eval's own environment and imports nothing of this
package. Alignment is no task there: lmms-eval sees answers, not attention.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from swim.evaluation.predictions import Expected, Header, PredictionsError, write_header

TASKS = Path(__file__).resolve().parent / "lmms_tasks"


def lmms_path() -> None:
    """Print the folder of our lmms-eval tasks, for --include_path."""
    print(TASKS)


def lmms_predictions(
    samples: Annotated[Path, typer.Argument(help="..._samples_videorefer_bench_*.jsonl, from --log_samples.")],
    out: Annotated[Path, typer.Option(help="predictions.jsonl to write.")],
) -> None:
    """Write what lmms-eval logged about our tasks as predictions, a line per sample, and their header."""
    lines = list(predictions_of(samples))
    out.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # lmms-eval logs every sample, so these ids are all that were asked.
    benchmark = "videorefer-bench-q" if "_bench_q" in samples.name else "videorefer-bench-d"
    expected = tuple(Expected(line["id"], line["clip"], line["task"], line["target"]) for line in lines)
    provenance = {"lmms_eval": samples.name, "model": {"path": "see lmms-eval's own results file"}}
    write_header(out, Header(out.stem, benchmark, expected, {}, provenance))
    print(f"{len(lines)} predictions for {benchmark}: {out}")


def predictions_of(samples: Path) -> Iterator[dict[str, Any]]:
    """Predictions from a samples file of lmms-eval, in its order; ValueError for one that is not of our tasks."""
    # Not splitlines: an answer may hold a line separator, which ends no line here.
    for number, text in enumerate(samples.read_bytes().rstrip(b"\n").split(b"\n"), start=1):
        try:
            sample = json.loads(text)
            parts = [part for part in sample.values() if isinstance(part, dict)]
            unit = next(part for part in parts if {"id", "video"} <= part.keys())
            answers = sample["filtered_resps"]
        except (ValueError, AttributeError, KeyError, IndexError, StopIteration):
            raise PredictionsError(
                f"{samples}:{number}: no id and video in it; give the samples of a videorefer_bench task"
            ) from None
        yield {
            "id": f"{unit['video']}#{unit['id']}",
            "clip": unit["video"],
            "task": unit.get("type", "description"),
            "prompt": sample["input"],
            "target": sample["target"],
            "answer": answers[0] if isinstance(answers, list) else answers,
            "nouns": [],
        }
