"""`swim demo`: the same tiny model trained twice, as plain fine-tuning and with noun-attention supervision, then
compared.

Both arms are real runs of launch/train.sh (DeepSpeed ZeRO-3, two processes) that differ in `system.mask_weight` alone.
Nothing is chosen: the held-out clips are the first of another seed's, and every figure comes from the files the runs
wrote.
"""

import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from swim import __version__
from swim.data_tools.rle import decode_mask
from swim.data_tools.shards import Sample, ShardSet
from swim.data_tools.synth import synthesise
from swim.data_tools.video import decode_frames

LAUNCHER = Path(__file__).resolve().parent.parent / "launch" / "train.sh"
ARMS: dict[str, list[str]] = {"sft": ["system.mask_weight=0"], "supervised": []}
HELD_OUT_SEED = 1_000_003  # clips depend on (seed, number): no training clip is among these
HELD_OUT_CLIPS = 64
MARKER = ".swim-demo"
HEADLINE = ("accuracy", "pointing", "mass", "ap", "auc", "nss")


class DemoError(RuntimeError):
    """A part of the demo failed; the message names the command and its log."""


def launch(arguments: Sequence[str], log: Path | None = None) -> int:
    """Run launch/train.sh with `arguments`; output goes to `log` if given. Returns the exit code."""
    command = ["bash", str(LAUNCHER), *arguments]
    # The Python that runs this command; but a job of its own, whatever job the command itself is part of.
    place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    environment = {name: value for name, value in os.environ.items() if name not in place}
    environment |= {"SWIM_PYTHON": sys.executable}
    if log is None:
        return subprocess.run(command, env=environment).returncode
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as file:
        return subprocess.run(command, env=environment, stdout=file, stderr=subprocess.STDOUT).returncode


def run_demo(out: Path, *, seed: int, short: bool = False) -> dict[str, Any]:
    """Render, train both arms, predict, score, report into `out`; returns the results. DemoError if a run fails."""
    began = time.perf_counter()
    _clear(out)
    data = out / "data" / "held_out"
    synthesise(data, clips=4 if short else HELD_OUT_CLIPS, seed=HELD_OUT_SEED)
    # JSON is YAML: paths with blanks or commas stay what they are.
    folder, train = json.dumps(str(out)), json.dumps([str(out / "data" / "train")])
    common = [f"run.output={folder}", f"run.seed={seed}", f"data.train={train}"]
    if short:
        common += ["run.steps=6", "optim.warmup_steps=2", "data.synth.clips=12"]
    for arm, overrides in ARMS.items():
        print(f"training {arm} (log: {out / arm}.log)", flush=True)
        log = out / f"{arm}.log"
        code = launch(["--config", "tiny_cpu", f"run.name={arm}", *common, *overrides], log)
        if code or not (out / arm / "done.json").exists():
            tail = "\n".join(log.read_text().splitlines()[-15:])
            raise DemoError(f"training {arm} failed with exit code {code}; the end of {log}:\n{tail}")
    results = evaluate_runs({arm: out / arm for arm in ARMS}, data, out)
    print_results(results)
    print(f"report: {out / 'report.html'}  ({time.perf_counter() - began:.0f} s in all)", flush=True)
    return results


def _clear(out: Path) -> None:
    """Remove an earlier demo; refuse any other folder that holds something."""
    marker = out / MARKER
    if out.exists() and any(out.iterdir()) and not marker.exists():
        raise DemoError(f"{out} holds files that no demo made; give --out an empty or new folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    marker.touch()


def evaluate_runs(runs: Mapping[str, Path], data: str | Path, out: Path) -> dict[str, Any]:
    """Predict and score every run over the shards in `data`; writes results.json, scores.jsonl and report.html into
    `out`."""
    from swim.evaluation.report import ArmFiles, write_report
    from swim.evaluation.scores import score, write_results
    from swim.train.predict import load_run, predict

    scored, files = {}, {}
    for arm, run in runs.items():
        predictions, ids = predict(run, data)
        scored[arm] = {**score(predictions, expected_ids=ids), **json.loads((run / "done.json").read_text())}
        files[arm] = ArmFiles(
            predictions=predictions, metrics=run / "metrics.jsonl", quarantine=run / "quarantine.jsonl"
        )
    systems = {arm: load_run(run).system for arm, run in runs.items()}
    protocol = {"systems": systems, "answers": "greedy, normalised exact match", "maps": "teacher-forced"}
    results = write_results(out / "results.json", scored, provenance=provenance(runs, data), protocol=protocol)
    frames_for, mask_for = _readers(data)
    write_report(
        out / "report.html",
        title="Noun-attention supervision",
        results=results,
        arms=files,
        frames_for=frames_for,
        mask_for=mask_for,
    )
    return results


def provenance(runs: Mapping[str, Path], data: str | Path) -> dict[str, Any]:
    """What a reader needs to repeat the figures: versions, code, data digest, weights' hashes, machine."""
    from swim.train.predict import weights_digest

    root = LAUNCHER.parent.parent
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "swim": __version__,
        "commit": git.stdout.strip() or "not a git checkout",
        **{name: version(name) for name in ("torch", "transformers", "deepspeed", "numpy")},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "held_out": ShardSet(data).digest[:16],
        "weights": {arm: weights_digest(run)[:16] for arm, run in runs.items()},
    }


def print_results(results: Mapping[str, Any]) -> None:
    """The headline metrics of every arm with 95 % intervals, and their difference, as a table."""
    from rich.console import Console
    from rich.table import Table

    arms = [
        name for name, part in results.items() if isinstance(part, dict) and "accuracy" in part and name != "difference"
    ]
    table = Table("metric", *arms, *(["difference"] if "difference" in results else []))
    for metric in HEADLINE:
        cells = [_estimate(results[arm][metric]) for arm in arms]
        if "difference" in results:
            cells.append(_estimate(results["difference"][metric], sign="+"))
        table.add_row(metric, *cells)
    for figure in ("seconds", "peak_memory_mib"):
        table.add_row(figure, *(f"{results[arm][figure]:.0f}" for arm in arms))
    Console(width=110).print(table)


def write_table(path: Path, folders: Mapping[int, Path]) -> None:
    """Markdown page with the headline metrics of every seed and their spread, from the results.json of each folder."""
    results = {seed: json.loads((folder / "results.json").read_text()) for seed, folder in folders.items()}
    seeds = " ".join(f"--seed {seed}" for seed in folders)
    lines = [
        "# What the demo shows, over seeds",
        "",
        f"Made by `swim demo {seeds} --table {path}`; nothing here is written by hand. One row per seed of model and",
        "order; values with 95 % intervals (bootstrap over held-out clips); `difference` is supervised minus sft,",
        "paired by clip.",
        "",
        "| seed | metric | sft | supervised | difference |",
        "| --- | --- | --- | --- | --- |",
    ]
    for seed, result in results.items():
        for metric in HEADLINE:
            cells = [_estimate(result[arm][metric]) for arm in ARMS]
            lines.append(
                f"| {seed} | {metric} | {' | '.join(cells)} | {_estimate(result['difference'][metric], sign='+')} |"
            )
    lines += ["", "| metric over seeds | sft: min, mean, max | supervised: min, mean, max |", "| --- | --- | --- |"]
    for metric in (*HEADLINE, "seconds", "peak_memory_mib"):
        cells = []
        for arm in ARMS:
            found = [result[arm][metric] for result in results.values()]
            values = [value["value"] if isinstance(value, dict) else value for value in found]
            digits = 3 if isinstance(found[0], dict) else 0
            cells.append(", ".join(f"{x:.{digits}f}" for x in (min(values), float(np.mean(values)), max(values))))
        lines.append(f"| {metric} | {' | '.join(cells)} |")
    path.write_text("\n".join(lines) + "\n")


def _estimate(estimate: Mapping[str, Any], sign: str = "") -> str:
    if estimate["value"] is None:
        return "-"  # nothing to score, such as a data set without masks
    value = f"{estimate['value']:{sign}.3f}"
    if estimate["interval"] is None:
        return value  # one clip has no spread
    low, high = estimate["interval"]
    return f"{value} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _readers(
    data: str | Path,
) -> tuple[Callable[[str, list[int]], np.ndarray], Callable[[str, str, int], np.ndarray | None]]:
    shards = ShardSet(data)

    @cache
    def sample(clip: str) -> Sample:
        return shards.read(clip)

    def frames_for(clip: str, frames: list[int]) -> np.ndarray:
        return decode_frames(sample(clip).media(), frames)

    def mask_for(clip: str, object_id: str, frame: int) -> np.ndarray | None:
        rle = sample(clip).masks.get(object_id, {}).get(frame)
        return decode_mask(rle) if rle is not None else None

    return frames_for, mask_for
