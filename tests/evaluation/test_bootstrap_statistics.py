"""Promise: intervals are honest about clips, the unit that was drawn."""

import numpy as np
import pytest

from swim.evaluation.statistics import cluster_bootstrap, paired_difference


def _width(values: dict[str, list[float]]) -> float:
    interval = cluster_bootstrap(values, seed=0)["interval"]
    assert interval is not None
    return interval[1] - interval[0]


def test_value_is_the_mean_over_all_values() -> None:
    assert cluster_bootstrap({"a": [1.0], "b": [0.0, 0.0]}, seed=0)["value"] == pytest.approx(1 / 3)


def test_interval_weighs_clips_by_their_questions_like_the_value() -> None:
    short = {f"short{i}": [1.0] for i in range(10)}
    got = cluster_bootstrap(short | {f"long{i}": [0.0] * 19 for i in range(10)}, seed=0)
    assert got["value"] == pytest.approx(0.05)
    assert got["interval"] is not None
    assert 0 < got["interval"][0] < 0.05 < got["interval"][1] < 0.2  # not around 0.5, the mean of the clips' means


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for trial in range(200):
        values = {str(clip): [float(value)] for clip, value in enumerate(rng.normal(0.3, 1, 40))}
        low, high = cluster_bootstrap(values, seed=trial, resamples=400)["interval"] or (0, 0)
        hits += low <= 0.3 <= high
    assert 0.88 <= hits / 200 <= 0.99


def test_repeating_the_questions_of_a_clip_adds_no_certainty() -> None:
    rng = np.random.default_rng(0)
    once = {str(clip): [float(value)] for clip, value in enumerate(rng.random(30))}
    tenfold = {clip: values * 10 for clip, values in once.items()}
    as_if_independent = {f"{clip}-{i}": values for clip, values in once.items() for i in range(10)}
    assert _width(tenfold) == pytest.approx(_width(once))
    assert _width(as_if_independent) < 0.5 * _width(once)


def test_pairing_removes_what_clips_have_in_common() -> None:
    rng = np.random.default_rng(0)
    difficulty = rng.random(30)
    base = {str(clip): [float(value)] for clip, value in enumerate(difficulty)}
    better = {str(clip): [float(value) + 0.05] for clip, value in enumerate(difficulty)}
    got = paired_difference(better, base, seed=0)
    assert got["value"] == pytest.approx(0.05)
    assert got["interval"] == pytest.approx([0.05, 0.05])
    assert got["excludes_zero"] is True
    shuffled = dict(zip(base, rng.permutation(list(better.values())).tolist()))
    assert paired_difference(shuffled, base, seed=0)["excludes_zero"] is False
    assert paired_difference(base, better, seed=0)["value"] == pytest.approx(-0.05)


def test_only_common_clips_are_compared() -> None:
    got = paired_difference({"a": [1.0], "b": [1.0], "c": [9.0]}, {"a": [0.0], "b": [0.0], "d": [9.0]}, seed=0)
    assert (got["value"], got["clips"]) == (1.0, 2)


def test_too_few_clips_give_no_interval() -> None:
    assert cluster_bootstrap({"a": [0.2, 0.4]}, seed=0) == {"value": pytest.approx(0.3), "interval": None}
    assert cluster_bootstrap({}, seed=0) == {"value": None, "interval": None}
    assert paired_difference({"a": [1.0]}, {"a": [0.0]}, seed=0)["excludes_zero"] is None


def test_intervals_repeat_with_the_seed() -> None:
    values = {str(clip): [clip % 3 / 2] for clip in range(12)}
    assert cluster_bootstrap(values, seed=3) == cluster_bootstrap(values, seed=3) != cluster_bootstrap(values, seed=4)
