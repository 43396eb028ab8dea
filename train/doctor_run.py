"""How is a run? `swim doctor RUN` reads its folder and names the silent or slowest rank; it writes nothing."""

import json
import re
import statistics
import time
from collections import Counter
from pathlib import Path

from swim.train.doctor import Finding
from swim.train.heartbeat import FOLDER, diagnose, read_beats

_LAST = 20  # steps
_CHECKPOINT = re.compile(r"step_\d{8}")
_GOOD_ENDS = ("end", "end by Stopped")


def check_run(folder: Path, *, now: float | None = None) -> list[Finding]:
    """The state of a run; a finding with a remedy if ranks are silent or have failed. FileNotFoundError if there is no
    run in the folder."""
    if not (folder / "config.yaml").exists():
        raise FileNotFoundError(f"{folder} holds no run (no config.yaml); name a run folder, runs/NAME by default")
    now = time.time() if now is None else now
    checkpoints = sorted(p.name for p in (folder / "checkpoints").glob("step_*") if _CHECKPOINT.fullmatch(p.name))
    newest = f"{checkpoints[-1]}, {len(checkpoints)} kept" if checkpoints else "none yet"
    steps = _steps(folder)
    found = [_progress(steps), *_slow(steps), Finding("checkpoint", newest)]
    for name in ("quarantine", "refused"):
        found += _lines(folder / f"{name}.jsonl", name)
    dumps = [path.name for kind in ("stacks_*", "collectives_*") for path in sorted((folder / FOLDER).glob(kind))]
    if dumps:
        found.append(Finding("dumps", f"{len(dumps)} in {folder / FOLDER}: {', '.join(dumps[:4])}"))
    if (folder / "done.json").exists():
        return [Finding("run", f"{folder} is finished: {(folder / 'done.json').read_text().strip()}"), *found]
    return [_ranks(folder, now), *found]


def _ranks(folder: Path, now: float) -> Finding:
    beats = read_beats(folder)
    ends = [beat for beat in beats if beat.phase.startswith("end")]
    failed = [beat for beat in ends if beat.phase not in _GOOD_ENDS]
    # Numbers without a file between others: a rank that never came.
    said = diagnose(folder, max((beat.rank for beat in beats), default=-1) + 1, now=now)
    text = f"{folder}: {len(beats)} ranks; {'; '.join(said[:8])}" + (
        f"; and {len(said) - 8} more" if len(said) > 8 else ""
    )
    if failed:
        first = min(failed, key=lambda beat: beat.since)
        text = f"{folder}: rank {first.rank} on {first.host} was the first to end, {first.phase}, at step {first.step}"
        return Finding("run", text, "its log says why; start the same command again to go on")
    if any(not line.startswith("furthest behind") for line in said):
        remedy = "look at the nodes of these ranks; if the job is gone, start the same command again: it resumes"
        return Finding("run", text, remedy)
    if beats and len(ends) == len(beats):
        return Finding("run", f"{folder}: ended early and saved; start the same command again to go on")
    return Finding("run", text)


def _steps(folder: Path) -> list[dict]:
    """The last lines of metrics.jsonl."""
    path = folder / "metrics.jsonl"
    lines = [_parsed(line) for line in path.read_text().splitlines()[-_LAST:]] if path.exists() else []
    return [line for line in lines if "step_s" in line]


def _progress(steps: list[dict]) -> Finding:
    if not steps:
        return Finding("steps", "none yet")
    median = statistics.median(line["step_s"] for line in steps)
    wait = statistics.mean(line.get("data_wait", 0.0) for line in steps)
    last = steps[-1]
    text = f"{last.get('step')}, loss {last.get('loss/total', float('nan')):.4g}, median of the last {len(steps)}: "
    return Finding("steps", f"{text}{median:.3g} s a step, {wait:.0%} of it waiting for data")


def _slow(steps: list[dict]) -> list[Finding]:
    """The rank that is the slowest most often, and by how much; ranks that are alike take turns."""
    steps = [line for line in steps if "time/slowest_rank" in line]
    if not steps:
        return []
    (rank, times), *_ = Counter(int(line["time/slowest_rank"]) for line in steps).most_common(1)
    own = [line for line in steps if line["time/slowest_rank"] == rank]
    factor = statistics.median(line["time/rank_max"] / max(line["time/rank_p50"], 1e-9) for line in own)
    text = f"rank {rank} was the slowest in {times} of the last {len(steps)} steps, {factor:.2f} x the median rank's"
    return [Finding("ranks", f"{text} own time")]


def _lines(path: Path, name: str) -> list[Finding]:
    if not path.exists():
        return []
    reasons = Counter(re.sub(r"\d+", "N", str(_parsed(line).get("reason"))) for line in path.read_text().splitlines())
    often = "; ".join(f"{count} x {reason[:100]!r}" for reason, count in reasons.most_common(3))
    return [Finding(name, f"{sum(reasons.values())} lines{': ' if often else ''}{often}")]


def _parsed(line: str) -> dict:
    # The last line of a run that was killed may be half written.
    try:
        return dict(json.loads(line))
    except ValueError:
        return {}
