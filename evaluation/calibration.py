"""Is a judge fit to judge? Its grades for a few hand-labelled pairs: order, distance to the labels, spread.

The pairs are ours (judge_calibration.json): three references, each with a perfect answer, a paraphrase, one of a wrong
colour, one about another object and an empty one. The labels are one person's.
"""

import json
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

from swim.evaluation.judge import Pair
from swim.evaluation.judge_profiles import AXES, Profile

FILE = Path(__file__).with_name("judge_calibration.json")
ARM = "calibration"
GAP = 0.5  # answers whose labels differ by less, on the mean of the axes, have no order


def read_calibration(path: Path = FILE) -> list[dict[str, Any]]:
    """The labelled pairs."""
    return [entry | {"id": f"{entry['group']}/{entry['kind']}"} for entry in json.loads(path.read_text("utf-8"))]


def calibration_pairs(entries: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """What the judge is asked."""
    return [Pair(ARM, entry["id"], entry["reference"], entry["answer"]) for entry in entries]


def check(
    entries: Sequence[Mapping[str, Any]], judged: Sequence[Mapping[str, Any]], profile: Profile
) -> dict[str, Any]:
    """Share of pairs in the labelled order (ties half), mean distance to the labels, SD between repeats, unparsed.

    An answer without a grade on an axis counts 0 there, as in the benchmark.
    """
    replies: dict[str, list[Mapping[str, float]]] = {entry["id"]: [] for entry in entries}
    for line in judged:
        if line["arm"] == ARM and line["id"] in replies:
            replies[line["id"]].append(profile.parse(line["reply"]) if line["reply"] is not None else {})
    rows = [_row(entry, replies[entry["id"]]) for entry in entries]
    ordered = [
        _in_order(high, low) if high["label"] > low["label"] else _in_order(low, high)
        for high, low in combinations(rows, 2)
        if high["group"] == low["group"] and abs(high["label"] - low["label"]) >= GAP
    ]
    spreads = [row["sd"] for row in rows if row["sd"] is not None]
    return {
        "rows": rows,
        "ordering": mean(ordered),
        "compared": len(ordered),
        "distance": mean(abs(row["grade"] - row["label"]) for row in rows),
        "sd_between_repeats": mean(spreads) if spreads else None,
        "unparsed": sum(len(scores) < len(AXES) for of_entry in replies.values() for scores in of_entry),
        "replies": sum(map(len, replies.values())),
    }


def _row(entry: Mapping[str, Any], found: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    grades = [[scores[axis] for scores in found if axis in scores] for axis in AXES]
    spreads = [stdev(of) for of in grades if len(of) > 1]
    return {
        "id": entry["id"],
        "group": entry["group"],
        "label": mean(entry["labels"][axis] for axis in AXES),
        "grade": mean(median(of) if of else 0.0 for of in grades),
        "sd": mean(spreads) if spreads else None,
    }


def _in_order(high: Mapping[str, Any], low: Mapping[str, Any]) -> float:
    return float(high["grade"] > low["grade"]) if high["grade"] != low["grade"] else 0.5


def describe(found: Mapping[str, Any]) -> str:
    """The result as lines."""
    lines = [f"{'pair':24} {'label':>6} {'grade':>6} {'SD':>6}"]
    for row in found["rows"]:
        sd = "-" if row["sd"] is None else f"{row['sd']:.2f}"
        lines.append(f"{row['id']:24} {row['label']:6.2f} {row['grade']:6.2f} {sd:>6}")
    sd = found["sd_between_repeats"]
    lines += [
        f"in the labelled order: {found['ordering']:.1%} of {found['compared']} comparisons (chance: 50 %)",
        f"mean distance to the labels: {found['distance']:.2f} of 5",
        f"SD between repeats: {'one reply each' if sd is None else f'{sd:.2f}'}",
        f"replies without a grade on some axis: {found['unparsed']} of {found['replies']}",
    ]
    return "\n".join(lines)
