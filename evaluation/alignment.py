"""Alignment of a noun's attention map with its object's mask, on the cell grid; protocol `alignment-grid`, version 2.

A step is one temporal position of the map, h x w cells. Cell i has attention m_i and mask coverage c_i in [0, 1].

Coverage-weighted metrics. A cell counts as c_i of positive and 1 - c_i of negative weight. This is the exact value of
the pixel metric under nearest upsampling, where all pixels of a cell share m_i and the share c_i of them is mask:
    ap            average precision, sum of recall gains times precision over the distinct values of m (scikit-learn's
                  definition, so cells of equal value enter together)
    ap_lift       ap / prevalence_px: 1 for a constant map
    auc           area under the ROC curve, ties half; 0.5 when no cell has negative weight. Not AUC-Judd
    auc_judd      area under the ROC curve drawn through its two corners and the values found under the mask alone, ties
                  entering together, without jitter; 0.5 when no cell has negative weight
    nss           mean of (m - mean m) / std m over cells, weighted by c; 0 for a constant map
    precision     share of mask among the cells with (m - min m) / (max m - min m) >= 0.75; all cells if m is constant
    gamepoint_P   share of mask among the P % of cells with the highest m, for P = 1, 5, 10; one cell when P % is less,
                  and a level of equal values that does not fit entirely counts with the fraction that does
    mass_px       sum m c / sum m
    kl            sum p log(p / q), natural logarithm, p = c / sum c, q = m / sum m but at least 1e-12. Lower is better
    prevalence_px mean c: what a constant map gets as ap, precision, gamepoint and mass_px

Touch metrics. A cell is inside when the mask covers any of it (c_i > 0):
    pointing      1 if the maximum of m is inside, else 0; if several cells share the maximum, the share that is inside
    mass          sum of m over inside cells / sum m
    prevalence    share of cells inside: what a constant map gets as pointing and mass

Every metric is unchanged when m is multiplied by a positive number, so a map whose softmax runs over the whole clip
needs no renormalisation per step. A step without any attention is scored as a constant map.

Steps that are not annotated and steps whose mask is empty (the object is annotated as absent) are skipped and counted.
The names come from SWIM (arXiv 2605.18018, appendix); that paper evaluates upsampled pixels, where the top K pixels are
an arbitrary choice inside one cell.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from swim.evaluation.predictions import Noun

GAMEPOINT_PERCENT = (1, 5, 10)
PRECISION_THRESHOLD = 0.75
CENTRE_SIGMA = 0.25
KL_FLOOR = 1e-12
METRICS = (
    "pointing",
    "mass",
    "ap",
    "ap_lift",
    "auc",
    "auc_judd",
    "nss",
    "precision",
    *(f"gamepoint_{p}" for p in GAMEPOINT_PERCENT),
    "mass_px",
    "kl",
)
PREVALENCES = ("prevalence", "prevalence_px")
# What a failed prediction counts. NSS has no lower bound; one standard deviation below the mean stands for it. KL is
# highest where a mask of one cell has no attention at all.
WORST: Mapping[str, float] = dict.fromkeys(METRICS, 0.0) | {"nss": -1.0, "kl": -math.log(KL_FLOOR)}


def step_metrics(map_HW: np.ndarray, coverage_HW: np.ndarray) -> dict[str, float]:
    """METRICS and PREVALENCES of one step from attention >= 0 and coverage in [0, 1], not all 0; both [h, w]."""
    coverage = coverage_HW.ravel().astype(np.float64)
    # Every metric depends on the cells only through the levels of equal attention, here from the highest to the lowest.
    value, level, num = np.unique(map_HW.ravel().astype(np.float64), return_inverse=True, return_counts=True)
    value, num = value[::-1], num[::-1].astype(np.float64)
    value = value / value[0] if value[0] > 0 else np.ones(1)
    covered = np.bincount(level, weights=coverage)[::-1]
    inside = np.bincount(level, weights=coverage > 0)[::-1]
    uncovered = num - covered

    attention = value * num
    positive, negative = covered.sum(), uncovered.sum()
    reached = num.cumsum()
    lower_negative = negative - uncovered.cumsum()
    deviation = value - attention.sum() / num.sum()
    std = np.sqrt((num * deviation**2).sum() / num.sum())
    share = coverage[coverage > 0] / positive
    cross = (covered * np.log(np.maximum(value / attention.sum(), KL_FLOOR))).sum() / positive
    ap = (covered * covered.cumsum() / reached).sum() / positive
    top = value >= value[-1] + PRECISION_THRESHOLD * (value[0] - value[-1])
    metrics = {
        "pointing": inside[0] / num[0],
        "mass": (value * inside).sum() / attention.sum(),
        "ap": ap,
        "ap_lift": ap / (positive / num.sum()),
        "auc": (covered * (lower_negative + uncovered / 2)).sum() / (positive * negative) if negative > 0 else 0.5,
        "auc_judd": _auc_judd(covered, uncovered),
        "nss": (covered * deviation).sum() / (positive * std) if len(value) > 1 else 0.0,
        "precision": covered[top].sum() / num[top].sum(),
        "mass_px": (value * covered).sum() / attention.sum(),
        "kl": (share * np.log(share)).sum() - cross,
        "prevalence": inside.sum() / num.sum(),
        "prevalence_px": positive / num.sum(),
    }
    for percent in GAMEPOINT_PERCENT:
        # The first level holds at least one cell, so a budget below one cell already reads as "the top cell".
        budget = num.sum() * percent / 100
        taken = np.clip(budget - (reached - num), 0, num)
        metrics[f"gamepoint_{percent}"] = (taken * covered / num).sum() / budget
    return {name: float(metrics[name]) for name in (*METRICS, *PREVALENCES)}


def _auc_judd(covered: np.ndarray, uncovered: np.ndarray) -> float:
    """AUC-Judd from the weights of each level of attention, highest first."""
    if not uncovered.sum():
        return 0.5
    found = covered > 0
    hits = np.concatenate([[0.0], covered.cumsum()[found] / covered.sum(), [1.0]])
    false_alarms = np.concatenate([[0.0], uncovered.cumsum()[found] / uncovered.sum(), [1.0]])
    return float(np.trapezoid(hits, false_alarms))


def noun_metrics(map_THW: np.ndarray, coverage_T: Sequence[np.ndarray | None]) -> dict[str, float] | None:
    """Mean of `step_metrics` over the steps with a non-empty mask; None when there is no such step."""
    return mean_metrics(
        [
            step_metrics(map_HW, coverage_HW)
            for map_HW, coverage_HW in zip(map_THW, coverage_T)
            if coverage_HW is not None and coverage_HW.any()
        ]
    )


def mean_metrics(
    rows: Sequence[Mapping[str, float]], names: Sequence[str] = (*METRICS, *PREVALENCES)
) -> dict[str, float] | None:
    """Mean of each of `names` over the rows; None without rows."""
    return {name: float(np.mean([row[name] for row in rows])) for name in names} if rows else None


def count_steps(coverage_T: Sequence[np.ndarray | None]) -> dict[str, int]:
    """Numbers of scored, absent (empty mask) and unannotated steps."""
    unannotated = sum(step is None for step in coverage_T)
    absent = sum(step is not None and not step.any() for step in coverage_T)
    return {"scored": len(coverage_T) - absent - unannotated, "absent": absent, "unannotated": unannotated}


def centre_map(height: int, width: int) -> np.ndarray:
    """Gaussian [h, w] at the centre of the grid, sigma a quarter of each side: what looking at the middle is worth."""
    y = (np.arange(height) + 0.5) / height - 0.5
    x = (np.arange(width) + 0.5) / width - 0.5
    return np.exp(-(y[:, None] ** 2 + x[None, :] ** 2) / (2 * CENTRE_SIGMA**2))


def baseline_metrics(noun: Noun, others: Sequence[Noun]) -> dict[str, dict[str, float] | None]:
    """The noun's metrics if its map were constant, a centre Gaussian, its own of another time, or another noun's.

    `wrong_frame` gives each step the map of half a clip before, counted round; None for one step. `wrong_noun` is the
    mean over all nouns of `others`, the clip's, that share no object with this one and have its grid and frames; None
    when there is none.
    """
    shape = noun.map.shape
    wrong = [
        noun_metrics(other.map, noun.coverage)
        for other in others
        if not set(other.object_ids) & set(noun.object_ids) and other.map.shape == shape and other.frames == noun.frames
    ]
    return {
        "uniform": noun_metrics(np.ones(shape), noun.coverage),
        "centre": noun_metrics(np.broadcast_to(centre_map(*shape[1:]), shape), noun.coverage),
        "wrong_frame": noun_metrics(np.roll(noun.map, shape[0] // 2, axis=0), noun.coverage) if shape[0] > 1 else None,
        "wrong_noun": mean_metrics([row for row in wrong if row is not None]),
    }
