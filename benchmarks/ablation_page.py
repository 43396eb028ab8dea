"""docs/ablations.md and docs/ablations.svg from benchmarks/results/ablations.json and from nothing else.

python benchmarks/ablation_page.py
"""

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from scipy.stats import t as student

METRICS = ("pointing", "mass", "ap", "auc", "nss", "accuracy")
JUDGED = ("pointing", "mass")
MIN_SEEDS = 5  # fewer carry no claim about answers
# Cells that differ from the default in more than their factor are compared with the one that differs in the rest.
REFERENCES = {
    "sub-tokens (words of several tokens)/each": "sub-tokens (words of several tokens)/mean",
    "sub-tokens (words of several tokens)/last": "sub-tokens (words of several tokens)/mean",
    "prompts (default paired: they differ in the noun alone)/unpaired sft": "sft, no mask loss",
}
DEFAULT = "default"
Seeds = Mapping[int, Mapping[str, Any]]

HEAD = """# Ablations: what binds attention to an object

Drawn by `benchmarks/ablation_page.py` from `benchmarks/results/ablations.json`, which `{command}` made;
nothing here is written by hand. A model of one million parameters, {steps} steps on hard synthetic clips (3 to 8
objects, distractors of the same shape or colour, a post that occludes, a moving camera, late objects), one thing
changed at a time; held-out clips, protocol alignment-grid. Means over seeds, with the lowest and the highest.
*Difference*: to the default cell, paired by seed, with the 95 % t-interval over seeds; in bold where it excludes zero.
It says which options bind attention in a small model at equal steps, not what they do to a 7B model's answers.

![pointing and attention mass of every cell](ablations.svg)
"""


def write_page(result: Path, folder: Path) -> None:
    """Write ablations.md and ablations.svg into `folder`."""
    data = json.loads(result.read_text())
    cells: dict[str, dict[int, dict[str, Any]]] = {}
    for found in data["cells"]:
        cells.setdefault(found["cell"], {})[found["seed"]] = found
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablations.md").write_text("\n".join(_lines(data, cells)) + "\n")
    _draw(cells, folder / "ablations.svg")


def difference(of_cell: Seeds, of_reference: Seeds, metric: str) -> tuple[float, float, int] | None:
    """Mean over common seeds of cell minus reference, half the width of its 95 % t-interval, and the number of seeds;
    None below two seeds."""
    common = sorted(set(of_cell) & set(of_reference))
    values = [of_cell[seed]["scores"][metric] - of_reference[seed]["scores"][metric] for seed in common]
    if len(values) < 2:
        return None
    half = float(student.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.fmean(values), half, len(values)


def _lines(data: Mapping[str, Any], cells: Mapping[str, Seeds]) -> Iterator[str]:
    yield HEAD.format(command=data["command"], steps=data["steps"])
    factors = dict.fromkeys(name.rpartition("/")[0] for name in cells)
    for factor in factors:
        yield from ("", f"## {factor[:1].upper()}{factor[1:]}" if factor else "## Default and controls", "")
        yield f"| cell | seeds | {' | '.join(METRICS)} | {' | '.join(f'difference in {m}' for m in JUDGED)} |"
        yield "| --- | --- |" + " --- |" * (len(METRICS) + len(JUDGED))
        for name, of_cell in cells.items():
            if name.rpartition("/")[0] == factor:
                yield _row(name, of_cell, cells)
    yield from _words(cells)
    yield from _conclusions(cells)


def _row(name: str, of_cell: Seeds, cells: Mapping[str, Seeds]) -> str:
    spread = [_spread([found["scores"][metric] for found in of_cell.values()]) for metric in METRICS]
    reference = REFERENCES.get(name, DEFAULT)
    differences = []
    for metric in JUDGED:
        found = difference(of_cell, cells.get(reference, {}), metric) if name != reference else None
        differences.append(_signed(found))
    label = name.rpartition("/")[2] + (f" (against {reference.rpartition('/')[2]})" if reference != DEFAULT else "")
    return f"| {label} | {len(of_cell)} | {' | '.join(spread)} | {' | '.join(differences)} |"


def _words(cells: Mapping[str, Seeds]) -> Iterator[str]:
    yield from (
        "",
        "## Kinds of words",
        "",
        "The paper finds attribute words sharp and nouns diffuse. Entropy of a word's map over the cells of a step",
        "(1: uniform), and the share of its attention on the mask, before training, after plain fine-tuning and after",
        "supervision of nouns, of attributes and of both:",
        "",
        "| cell | noun entropy | attribute entropy | noun mass | attribute mass |",
        "| --- | --- | --- | --- | --- |",
    )
    for name, of_cell in cells.items():
        if "/" in name and not name.startswith("supervised words"):
            continue
        values = [
            _spread([found["words"][kind][figure] for found in of_cell.values()])
            for figure in ("entropy", "mass_px")
            for kind in ("noun", "attribute")
        ]
        yield f"| {name.rpartition('/')[2]} | {' | '.join(values)} |"


def _conclusions(cells: Mapping[str, Seeds]) -> Iterator[str]:
    losses = {n: c for n, c in cells.items() if n.startswith("loss") or n == DEFAULT}
    means = {n: statistics.fmean(f["scores"]["mass"] for f in c.values()) for n, c in losses.items()}
    best = max(means, key=lambda name: means[name])
    yield from ("", "## What follows", "")
    label = "kl (the default)" if best == DEFAULT else best.rpartition("/")[2]
    yield f"- Of the losses, {label} puts the most attention on the object: mass {means[best]:.2f}."
    found = difference(cells.get(DEFAULT, {}), cells.get("sft, no mask loss", {}), "accuracy")
    if found is None or found[2] < MIN_SEEDS:
        yield f"- No claim about answers: it takes {MIN_SEEDS} seeds of default and plain fine-tuning."
        return
    low, high = found[0] - found[1], found[0] + found[1]
    said = "the interval includes zero, so no claim" if low <= 0 <= high else "the interval excludes zero"
    yield (
        f"- Answers, default minus plain fine-tuning over {found[2]} seeds: {found[0]:+.3f} [{low:+.3f}, {high:+.3f}];"
        f" {said}."
    )


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.fmean(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def _signed(found: tuple[float, float, int] | None) -> str:
    if found is None:
        return "-"
    mean, half, _ = found
    text = f"{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]"
    return f"**{text}**" if abs(mean) > half else text


def _draw(cells: Mapping[str, Seeds], path: Path) -> None:
    """Dots for seeds and a bar for their mean, a row for every cell; the line is the default's mean."""
    figure = Figure(figsize=(10, 0.27 * len(cells) + 1), layout="constrained")
    rows = list(cells)[::-1]
    for axes, metric in zip(figure.subplots(1, len(JUDGED), sharey=True), JUDGED):
        for row, name in enumerate(rows):
            values = [found["scores"][metric] for found in cells[name].values()]
            axes.barh(row, statistics.fmean(values), color="#56b4e9" if name != DEFAULT else "#e69f00", height=0.7)
            axes.plot(values, [row] * len(values), "o", color="#222222", markersize=3)
        if DEFAULT in cells:
            axes.axvline(
                statistics.fmean(f["scores"][metric] for f in cells[DEFAULT].values()), color="#e69f00", linewidth=1
            )
        axes.set(xlabel=metric, xlim=(0, 1), ylim=(-0.6, len(rows) - 0.4))
        axes.set_yticks(range(len(rows)), [name.replace("/", ": ") for name in rows], fontsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    # The same results give the same file: without the date, and with names that are not drawn at random.
    with rc_context({"svg.hashsalt": "ablations"}):
        figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    write_page(Path("benchmarks/results/ablations.json"), Path("docs"))
