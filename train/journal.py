"""Lines about single samples that the ranks of a run write together: quarantine.jsonl and refused.jsonl."""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from swim.train.metrics import append_jsonl, read_jsonl
from swim.train.world import World

QUARANTINE, REFUSED = "quarantine.jsonl", "refused.jsonl"


def write_lines(path: Path, step: int, own: Sequence[dict[str, Any]], world: World) -> None:
    """Append the lines of all ranks, each with its step; a full disk is said."""
    lines = [{"step": step, **line} for of_rank in world.gather(list(own)) for line in of_rank]
    if world.is_main:
        try:
            append_jsonl(path, lines)
        except OSError as error:  # a full disk, which the next checkpoint may outlive
            print(f"step {step}: {len(lines)} lines are missing in {path.name}: {error}", flush=True)


def too_many_bad(folder: Path, most: int, step: int, world: World) -> str | None:
    """What to say, on every rank, once more than `most` conversations are in the quarantine of a run."""
    path = folder / QUARANTINE

    def problem() -> str | None:
        reasons = {line["id"]: line["reason"] for line in read_jsonl(path)}
        if len(reasons) <= most:
            return None
        often = Counter(re.sub(r"\d+", "N", reason) for reason in reasons.values()).most_common(3)
        return (
            f"step {step}: {len(reasons)} conversations could not be read so far, data.max_bad is {most}; see "
            f"{path}, repair the shards or raise the limit, then resume. Most often: "
            + "; ".join(f"{count} x {reason[:200]!r}" for reason, count in often)
        )

    return world.on_main(problem)
