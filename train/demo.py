"""`swim demo`: the same tiny model trained twice, as plain fine-tuning and with noun-attention supervision, then
compared.

Both arms are real runs of launch/train.sh (DeepSpeed ZeRO-3, two processes) that differ in `system.mask_weight` alone.
Nothing is chosen: the held-out clips are the first of another seed's, and every figure comes from the files the runs
wrote.
"""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from swim.data_tools.synth import synthesise
from swim.evaluation.cli import print_results
from swim.evaluation.stages import show

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
    """Predict and score every run over the shards in `data`; writes results.json, scores.jsonl, summary.md and
    report.html into `out`."""
    from swim.evaluation.stages import load, report, score_files
    from swim.train.predict import predict

    files = []
    for arm, run in runs.items():
        file = load(predict(run, data)[0])
        files.append(replace(file, header=replace(file.header, name=arm)))
    results = score_files(files, out)
    report(out, data)
    return results


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
            cells = [show(result[arm][metric]) for arm in ARMS]
            lines.append(
                f"| {seed} | {metric} | {' | '.join(cells)} | {show(result['difference'][metric], sign='+')} |"
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
