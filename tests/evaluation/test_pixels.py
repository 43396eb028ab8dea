"""Promise: on pixels we measure what the release measures, exactly, with its means and its zeros for empty masks."""

from typing import Any

import numpy as np
import pytest
from evaluation_lines import make_file
from sklearn.metrics import (
    average_precision_score,
    f1_score,
    jaccard_score,
    matthews_corrcoef,
    precision_score,
    recall_score,
    roc_auc_score,
)

from swim.data_tools.rle import encode_mask
from swim.evaluation.benchmarks.alignment import score
from swim.evaluation.detail import encode_maps
from swim.evaluation.pixels import NAMES, line_metrics, pixel_metrics
from swim.evaluation.predictions import Noun, Prediction
from swim.evaluation.scores import Settings


def _upsampled(map_HW: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Pixel by pixel: the cell that holds the pixel's upper left corner."""
    (rows, columns), (height, width) = map_HW.shape, size
    return np.array(
        [[map_HW[int(y * rows / height), int(x * columns / width)] for x in range(width)] for y in range(height)]
    )


RNG = np.random.default_rng(0)
CASES = {
    "distinct": (RNG.random((4, 6)), RNG.random((20, 31)) < 0.2),
    "ties": (RNG.integers(0, 3, (4, 6)).astype(float), RNG.random((20, 30)) < 0.3),
    "constant": (np.full((3, 3), 0.2), np.eye(9, dtype=bool)),
    "whole frame": (RNG.random((3, 3)), np.ones((7, 8), bool)),
    "one pixel": (RNG.random((3, 5)), np.arange(110).reshape(10, 11) == 47),
    "mask smaller than the grid": (RNG.random((8, 8)), RNG.random((5, 5)) < 0.4),
}


@pytest.mark.filterwarnings("ignore")  # what a library says about a mask without a rest
@pytest.mark.parametrize("name", CASES)
def test_pixel_metrics_equal_those_of_scikit_learn_on_the_upsampled_map(name: str) -> None:
    map_HW, mask = CASES[name]
    got = pixel_metrics(map_HW, mask)
    values = _upsampled(map_HW, mask.shape)
    low, high = map_HW.min(), map_HW.max()  # of the map; upsampling to fewer pixels may lose the extremes
    values = ((values - low) / (high - low) if high > low else np.zeros(values.shape)).ravel()
    inside = mask.ravel()
    assert got["AP"] == pytest.approx(average_precision_score(inside, values))
    assert got["AUC"] == pytest.approx(0.5 if inside.all() else roc_auc_score(inside, values))
    above = values > 0.5
    assert got["Precision"] == pytest.approx(precision_score(inside, above, zero_division=0))
    assert got["Precision@0.75"] == pytest.approx(precision_score(inside, values > 0.75, zero_division=0))
    assert got["Recall"] == pytest.approx(recall_score(inside, above))
    assert got["IoU"] == pytest.approx(jaccard_score(inside, above))
    assert got["Dice"] == pytest.approx(f1_score(inside, above))
    assert got["Specificity"] == pytest.approx(0 if inside.all() else (~above[~inside]).mean())
    assert got["MCC"] == pytest.approx(matthews_corrcoef(inside, above))
    varies = values.std() > 1e-9
    assert got["NSS"] == pytest.approx(
        ((values - values.mean()) / values.std())[inside].mean() if varies else 0, abs=1e-9
    )
    correlates = varies and not inside.all()
    assert got["Pearson"] == pytest.approx(np.corrcoef(values, inside)[0, 1] if correlates else 0)
    q = np.maximum(values / values.sum() if values.any() else np.full(len(values), 1 / len(values)), 1e-12)
    assert got["KL"] == pytest.approx(-np.log(inside.sum()) - np.log(q[inside]).mean())
    # The expected share of mask among the top K when pixels of one value come in random order.
    for k, name in [(1, "1"), (50, "50"), (max(1, len(values) * 0.05), "5%")]:
        budget, credit = min(k, len(values)), 0.0
        for value in np.unique(values)[::-1]:
            level = inside[values == value]
            credit += min(max(budget - (values > value).sum(), 0), len(level)) * level.mean()
        assert got[f"GamePoint@{name}"] == pytest.approx(credit / budget)


def test_gamepoint_is_flat_in_k_within_a_cell() -> None:
    # The published numbers are: all of the top 100 pixels lie in one cell.
    map_HW, mask = np.zeros((2, 2)), np.zeros((56, 56), bool)
    map_HW[0, 0], mask[:28, :7] = 1, True
    got = pixel_metrics(map_HW, mask)
    assert [got[f"GamePoint@{k}"] for k in (1, 5, 10, 50, 100)] == [0.25] * 5


def test_an_empty_mask_counts_zero_in_everything() -> None:
    assert set(pixel_metrics(RNG.random((3, 3)), np.zeros((9, 9), bool)).values()) == {0.0}


def _noun(token_maps: np.ndarray, masks: dict[int, np.ndarray]) -> Noun:
    detail: dict[str, Any] = {
        "token_maps": encode_maps(token_maps),
        "masks": {str(frame): encode_mask(mask) for frame, mask in masks.items()},
    }
    shape = token_maps.shape[1:]
    return Noun("x", 0, 0, 1, ("x",), ((0, 1), (2, 3)), np.ones(shape), (None,) * shape[0], detail)


def test_a_failure_counts_worst_on_pixels_too_and_the_published_mean_stands_beside(line: Any, noun: Any) -> None:
    mask = np.zeros((4, 8), bool)
    mask[:, :2] = True
    lines = [line(f"{clip}#0", [noun("o0", 0, 0)]) for clip in "ab"]
    lines[0]["nouns"][0]["detail"] = {
        "token_maps": encode_maps(np.array([lines[0]["nouns"][0]["map"]])),
        "masks": {"0": encode_mask(mask)},
    }
    lines.append({"id": "c#0", "clip": "c", "error": "decoder: truncated"})
    unannotated = line("d#0", [noun("o0", 0, 0)])
    unannotated["nouns"][0]["coverage"] = [None, None]
    got = score(make_file([*lines, unannotated], ["a#0", "b#0", "c#0", "d#0"]), Settings(resamples=20))["pixels"]
    # a is right; b was predicted without what pixels need; c failed; d has nothing to score.
    assert got["GamePoint@1"]["value"] == pytest.approx(1 / 3)
    assert got["GamePoint@1"]["value_scored_only"] == 1
    assert got["KL"]["value"] == pytest.approx((0 + 2 * 12 * np.log(10)) / 3)


def test_means_go_over_tokens_then_frames() -> None:
    left, right = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    mask = np.zeros((2, 4), bool)
    mask[:, :2] = True
    # Step 0: one token looks left, one right; step 1: both left. Frame 1 has no mask, frame 2 an empty one.
    noun = _noun(np.stack([[left, left], [right, left]]), {0: mask, 2: np.zeros((2, 4), bool), 3: mask})
    got = line_metrics(Prediction("a#0", "a", nouns=(noun,)))
    assert got is not None
    assert got["GamePoint@1"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert got["AUC"] == pytest.approx((0.5 + 0 + 1) / 3)
    assert set(got) == set(NAMES)
    assert line_metrics(Prediction("a#0", "a", nouns=())) is None
