"""The paper's questions, answered small: which loss, fusion, layers, weight, softmax, sub-token rule, prompts, amount
of masks and kind of word bind attention to an object.

    python benchmarks/ablations.py [--steps 300] [--seeds 0 1 2] [--claim-seeds 0 1 2 3 4] [--jobs 2]
    python benchmarks/ablations.py --preset ci

In: recipes/tiny_cpu.yaml on hard synthetic clips, one override at a time. Every cell is a real run of launch/train.sh
on one rank and seed, scored on held-out clips: alignment by protocol alignment-grid, answers, and entropy and mass of
the maps per kind of word. Out: benchmarks/results/ablations.json, and from it docs/ablations.md and docs/ablations.svg
(benchmarks/ablation_page.py). What that file or the folder of runs holds is not run again. About 75 seconds of one core
a cell.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.ablation_page import write_page
from swim.data_tools.files import write_whole
from swim.data_tools.synth import synthesise
from swim.train.demo import HELD_OUT_SEED, launch

DEFAULT, BASE, SFT = "default", "base, untrained", "sft, no mask loss"
METRICS = ("pointing", "mass", "ap", "auc", "nss", "accuracy")
PEAK = "system.map_scale=max"  # losses that compare a map with a mask of ones cannot fit a softmax over cells
PIECES = "model.tokenizer={corpus: synth, vocab_size: 300}"  # words of several tokens
UNPAIRED = ["data.max_conversations=1", "data.clips_per_pack=9"]  # as many questions a step, each on another clip
# Factor -> cell -> overrides of the default cell; the default itself stands in its factor by the name DEFAULT.
FACTORS: dict[str, dict[str, list[str]]] = {
    "controls": {BASE: ["run.steps=1", "optim.warmup_steps=0", "optim.lr=1e-30"], SFT: ["system.mask_weight=0"]},
    "loss (default kl)": {
        "kl, peak 1": [PEAK],
        "bce": ["system.loss=bce"],
        **{f"{loss}, peak 1": [f"system.loss={loss}", PEAK] for loss in ("bce", "dice", "focal", "iou")},
    },
    "layer fusion (default mean)": {name: [f"system.layer_fusion={name}"] for name in ("sum", "max", "product")},
    "layers (default the last three of four)": {
        "first": ["system.layers=[0]"],
        "middle two": ["system.layers=[1, 2]"],
        "last": ["system.layers=last:1"],
        "even two": ["system.layers=even:2"],
        "all four": ["system.layers=all"],
    },
    "mask weight (default 0.2)": {f"{weight:g}": [f"system.mask_weight={weight}"] for weight in (0.05, 0.5, 1)},
    "softmax scope (default frame)": {name: [f"system.softmax_scope={name}"] for name in ("clip", "causal", "full")},
    "sub-tokens (words of several tokens)": {
        name: [PIECES, f"system.subtokens={name}"] for name in ("mean", "each", "last")
    },
    "prompts (default paired: they differ in the noun alone)": {
        "unpaired": UNPAIRED,
        "unpaired sft": [*UNPAIRED, "system.mask_weight=0"],
    },
    "clips with masks (default all)": {share: [f"data.train=[train_{share}]"] for share in ("1of8", "1of4", "1of2")},
    "supervised words (default nouns)": {
        "attributes": ["system.words=[attribute]"],
        "nouns and attributes": ["system.words=[noun, attribute]"],
    },
}
PRESETS = {
    "ci": (DEFAULT, SFT, "loss (default kl)/bce", "layers (default the last three of four)/last"),
}


def cells() -> dict[str, list[str]]:
    """Overrides by cell, named FACTOR/CELL; the default and its controls come first."""
    found = {DEFAULT: [], **FACTORS["controls"]}
    for factor, of_factor in FACTORS.items():
        if factor != "controls":
            found |= {f"{factor}/{name}": overrides for name, overrides in of_factor.items()}
    return found


def render(out: Path, clips: int, held_out: int) -> None:
    """Hard clips to train on, with masks for all or for a share of them, and others to score on."""
    for share in (1.0, 0.5, 0.25, 0.125):
        name = "train" if share == 1 else f"train_1of{round(1 / share)}"
        if not any((out / name).glob("*.tar")):
            synthesise(out / name, clips=clips, seed=1, hard=True, annotated=share)
    if not any((out / "held_out").glob("*.tar")):
        synthesise(out / "held_out", clips=held_out, seed=HELD_OUT_SEED, hard=True)


def run_cell(job: tuple[str, int], *, out: Path, steps: int) -> dict[str, Any]:
    """Train and score one cell with one seed, or read what a call that was stopped had found."""
    cell, seed = job
    name = f"{''.join(c if c.isalnum() else '_' for c in cell)}_seed{seed}_steps{steps}"
    result = out / name / "ablation.json"
    if result.exists():
        return json.loads(result.read_text())
    print(f"training {cell}, seed {seed}", flush=True)
    common = ["launch.ranks=1", f"run.steps={steps}", f"run.seed={seed}", f"run.output={out}", f"run.name={name}"]
    data = ["data.synth=null", f"data.train=[{out / 'train'}]", "data.max_conversations=3"]
    own = [text.replace("[train_", f"[{out}/train_") for text in cells()[cell]]
    warmup = [f"optim.warmup_steps={min(50, steps // 6)}"]
    code = launch(["--config", "tiny_cpu", *common, *data, *warmup, *own], out / f"{name}.log")
    if code or not (out / name / "done.json").exists():
        raise RuntimeError(f"{cell}, seed {seed}: training ended with exit code {code}; see {out / name}.log")
    found = look(out / name, out / "held_out") | {"cell": cell, "seed": seed, "steps": steps}
    write_whole(result, json.dumps(found))
    return found


def look(run: Path, data: Path) -> dict[str, Any]:
    """Metrics by clip of a finished run's nouns, and normalised entropy and mass of its maps per kind of word."""
    import torch

    from swim.data_tools.shards import ShardSet
    from swim.evaluation.alignment import noun_metrics
    from swim.evaluation.benchmarks.alignment import score
    from swim.evaluation.predictions import Expected, Header, read_lines
    from swim.evaluation.scores import PredictionFile, Settings
    from swim.train.predict import load_run
    from swim.train.system import Request
    from swim.train.systems.swim.model import SwimSystem

    torch.set_num_threads(1)
    system = SwimSystem(load_run(run), looked_at=("noun", "attribute"))
    model, shards = system.build_model().eval(), ShardSet(data)
    lines: list[dict[str, Any]] = []
    for number in range(len(shards)):
        sample = shards.read(number)
        chosen = [i for i, talk in enumerate(sample.record.conversations) if talk.task == "direction"]
        lines += system.predict(model, Request(sample, tuple(chosen)))
    words: dict[str, dict[str, list[float]]] = {}
    for kind in ("noun", "attribute"):
        of_kind = [line | {"nouns": [noun for noun in line["nouns"] if noun["kind"] == kind]} for line in lines]
        expected = tuple(Expected(line["id"], line["clip"], line["task"], line["target"]) for line in lines)
        file = PredictionFile(Header(run.name, "alignment-grid", expected), read_lines(of_kind))
        if kind == "noun":
            scores = score(file, Settings())
        masses, entropies = [], []
        for _, line in file.predictions():
            for noun in line.nouns:
                found = noun_metrics(noun.map, noun.coverage)
                masses += [] if found is None else [found["mass_px"]]
                steps = noun.map / noun.map.sum((1, 2), keepdims=True)
                cells_of_step = steps[0].size
                entropies.append(float(-(steps * np.log(steps + 1e-30)).sum((1, 2)).mean() / np.log(cells_of_step)))
        words[kind] = {"mass_px": float(np.mean(masses)), "entropy": float(np.mean(entropies))}
    return {"scores": {metric: scores[metric]["value"] for metric in METRICS}, "words": words}


def main(arguments: Sequence[str] | None = None) -> Path:
    """Run what is missing and write result file and page; returns the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=sorted(PRESETS), help="few cells, steps and clips: checks the path")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--claim-seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="of default and sft")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    options = parser.parse_args(arguments)
    names, clips, held_out, folder = list(cells()), 1000, 48, Path("benchmarks/results")
    if options.preset:
        names, clips, held_out, folder = list(PRESETS[options.preset]), 24, 4, options.out
        options.steps, options.seeds, options.claim_seeds = 6, [0, 1], [0, 1]
    out = options.out.resolve()
    render(out, clips, held_out)
    # Seeds first: what is stopped early has every cell with fewer seeds.
    every = sorted({*options.seeds, *options.claim_seeds})
    jobs = [
        (name, seed)
        for seed in every
        for name in names
        if seed in (options.claim_seeds if name in (DEFAULT, SFT) else options.seeds)
    ]
    command = " ".join(["python benchmarks/ablations.py", *(sys.argv[1:] if arguments is None else arguments)])
    result = folder / "ablations.json"
    done = {} if options.preset else finished(result, options.steps)
    with ProcessPoolExecutor(options.jobs) as pool:
        missing = [job for job in jobs if job not in done]
        running = {pool.submit(run_cell, job, out=out, steps=options.steps): job for job in missing}
        for ended in as_completed(running):
            done[running[ended]] = ended.result()
            # In the order of the cells, whichever ended first.
            found = [done[job] for job in sorted(done, key=lambda job: (list(cells()).index(job[0]), job[1]))]
            whole = {"command": command, "steps": options.steps, "cells": found}
            write_whole(result, json.dumps(whole, indent=1) + "\n")
    write_page(result, options.out if options.preset else Path("docs"))
    return result


def finished(result: Path, steps: int) -> dict[tuple[str, int], dict[str, Any]]:
    """What the result file of an earlier call, stopped or not, holds of runs of so many steps."""
    if not result.exists():
        return {}
    known = json.loads(result.read_text())["cells"]
    return {(found["cell"], found["seed"]): found for found in known if found["steps"] == steps}


if __name__ == "__main__":
    main()
