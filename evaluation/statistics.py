"""Percentile bootstrap clustered by clip: the questions of one clip are not independent, so whole clips are drawn."""

from collections.abc import Mapping, Sequence
from typing import TypedDict

import numpy as np


class Estimate(TypedDict):
    """A mean and its 95 % interval; value None without data, interval None with fewer than two clips."""

    value: float | None
    interval: list[float] | None


class Difference(Estimate):
    """An estimate of a difference; `excludes_zero` is None where the interval is."""

    excludes_zero: bool | None
    clips: int


def cluster_bootstrap(
    values_by_cluster: Mapping[str, Sequence[float]], *, seed: int, resamples: int = 2000
) -> Estimate:
    """Mean over all values with its 95 % percentile interval from drawing clusters with replacement."""
    sums, counts = _sums(values_by_cluster, sorted(values_by_cluster))
    if not len(counts):
        return {"value": None, "interval": None}
    draws = _draws(len(counts), seed, resamples)
    means = sums[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return {"value": float(sums.sum() / counts.sum()), "interval": _interval(means, len(counts))}


def paired_difference(
    a_by_cluster: Mapping[str, Sequence[float]],
    b_by_cluster: Mapping[str, Sequence[float]],
    *,
    seed: int,
    resamples: int = 2000,
) -> Difference:
    """Mean of a minus mean of b over the clusters both have, with the 95 % interval from drawing the same clusters."""
    common = sorted(set(a_by_cluster) & set(b_by_cluster))
    (a_sums, a_counts), (b_sums, b_counts) = _sums(a_by_cluster, common), _sums(b_by_cluster, common)
    if not common:
        return {"value": None, "interval": None, "excludes_zero": None, "clips": 0}
    draws = _draws(len(common), seed, resamples)
    differences = a_sums[draws].sum(axis=1) / a_counts[draws].sum(axis=1) - b_sums[draws].sum(axis=1) / b_counts[
        draws
    ].sum(axis=1)
    interval = _interval(differences, len(common))
    return {
        "value": float(a_sums.sum() / a_counts.sum() - b_sums.sum() / b_counts.sum()),
        "interval": interval,
        "excludes_zero": None if interval is None else interval[0] > 0 or interval[1] < 0,
        "clips": len(common),
    }


def interval_of_macro(
    rows_by_group: Mapping[str, Sequence[tuple[str, float]]], *, seed: int, resamples: int = 2000
) -> Estimate:
    """Mean over groups of the mean over their (cluster, value) rows, with the 95 % interval from drawing clusters.

    A group that a draw does not meet is left out of that draw's mean.
    """
    groups = [rows for rows in rows_by_group.values() if rows]
    clusters = sorted({cluster for rows in groups for cluster, _ in rows})
    if not clusters:
        return {"value": None, "interval": None}
    place = {cluster: i for i, cluster in enumerate(clusters)}
    sums, counts = np.zeros((len(groups), len(clusters))), np.zeros((len(groups), len(clusters)))
    for number, rows in enumerate(groups):
        for cluster, value in rows:
            sums[number, place[cluster]] += value
            counts[number, place[cluster]] += 1
    drawn = np.stack([np.bincount(draw, minlength=len(clusters)) for draw in _draws(len(clusters), seed, resamples)])
    totals, num = drawn @ sums.T, drawn @ counts.T
    means = np.divide(totals, num, out=np.full(totals.shape, np.nan), where=num > 0)
    value = float(np.mean(sums.sum(1) / counts.sum(1)))
    return {"value": value, "interval": _interval(np.nanmean(means, axis=1), len(clusters))}


def _sums(values_by_cluster: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    values = [values_by_cluster[cluster] for cluster in clusters]
    return np.array([sum(v) for v in values], dtype=np.float64), np.array([len(v) for v in values], dtype=np.float64)


def _draws(num_clusters: int, seed: int, resamples: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(num_clusters, size=(resamples, num_clusters))


def _interval(statistics: np.ndarray, num_clusters: int) -> list[float] | None:
    # One cluster always draws itself: an interval of width zero would claim certainty.
    return np.percentile(statistics, (2.5, 97.5)).tolist() if num_clusters > 1 else None
