"""Promise: every ablation cell is a valid recipe that differs in what it says, and the page has the right intervals."""

import json
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.ablation_page import METRICS, difference, write_page
from benchmarks.ablations import BASE, DEFAULT, FACTORS, SFT, cells, finished
from swim.train.config import load_config
from swim.train.systems.swim.config import Config


def made(cell: str, seed: int, value: float, steps: int = 5) -> dict:
    words = {kind: {"entropy": 0.5, "mass_px": value} for kind in ("noun", "attribute")}
    return {"cell": cell, "seed": seed, "steps": steps, "scores": dict.fromkeys(METRICS, value), "words": words}


def test_every_cell_is_a_recipe_of_its_own() -> None:
    seen = []
    for name, overrides in cells().items():
        config = load_config("tiny_cpu", ["data.synth=null", "data.max_conversations=3", *overrides])
        Config.model_validate({key: value for key, value in config.system.items() if key != "name"})
        assert config not in seen, f"{name} is another cell again"
        seen.append(config)
    assert list(cells())[:3] == [DEFAULT, BASE, SFT]
    assert len(FACTORS) == 10


def test_intervals_are_those_of_a_paired_t_test() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.5, 0.1, (2, 5))
    of_one = {seed: made("a", seed, value) for seed, value in enumerate(one)}
    of_other = {seed: made("b", seed, value) for seed, value in enumerate(other)}
    mean, half, seeds = difference(of_one, of_other | {9: made("b", 9, 7.0)}, "mass")
    interval = ttest_rel(one, other).confidence_interval(0.95)
    assert (mean - half, mean + half) == pytest.approx((interval.low, interval.high))
    assert seeds == 5
    assert difference({0: of_one[0]}, of_other, "mass") is None, "one seed has no spread"


def test_the_page_claims_no_more_than_its_seeds_allow(tmp_path: Path) -> None:
    loss = "loss (default kl)/bce"
    found = [made(cell, seed, value + seed / 100) for seed in range(3) for cell, value in ((DEFAULT, 0.6), (SFT, 0.2))]
    found += [made(loss, 0, 0.3), made(loss, 1, 0.29)]
    result = tmp_path / "ablations.json"
    result.write_text(json.dumps({"command": "x", "steps": 5, "cells": found}))
    write_page(result, tmp_path)
    page = (tmp_path / "ablations.md").read_text()
    assert "| bce | 2 | 0.29 (0.29 to 0.30)" in page
    assert "No claim about answers: it takes 5 seeds" in page
    assert "kl (the default) puts the most attention on the object: mass 0.61" in page
    assert "**-0.40 [-0.40, -0.40]**" in page, "no spread at all: the interval excludes zero"
    more = [made(cell, seed, value) for seed, value in enumerate((0.1, 0.9, 0.2, 0.8, 0.5)) for cell in (DEFAULT, SFT)]
    result.write_text(json.dumps({"command": "x", "steps": 5, "cells": more}))
    write_page(result, tmp_path)
    assert "the interval includes zero, so no claim" in (tmp_path / "ablations.md").read_text()
    drawn = (tmp_path / "ablations.svg").read_bytes()
    write_page(result, tmp_path)
    assert (tmp_path / "ablations.svg").read_bytes() == drawn


def test_what_is_finished_is_not_run_again(tmp_path: Path) -> None:
    result = tmp_path / "ablations.json"
    assert finished(result, 5) == {}
    result.write_text(json.dumps({"cells": [made(DEFAULT, 0, 0.5), made(DEFAULT, 1, 0.5, steps=6)]}))
    assert set(finished(result, 5)) == {(DEFAULT, 0)}, "runs of other lengths are other runs"
