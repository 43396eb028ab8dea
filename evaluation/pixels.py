"""Alignment as the release of SWIM measures it, on upsampled pixels; protocol `alignment-pixels`, version 1.

Known from the release's scripts (arXiv 2605.18018, appendix). The map of each token of a noun is scaled to [0, 1] over
the step (min-max), upsampled to the mask's own size by nearest neighbour, and every pixel counts. Means: tokens, then
frames, then clips. A frame whose mask is empty counts 0 in every metric.

    GamePoint@K       share of mask among the K pixels of the highest values, K = 1, 5, 10, 50, 100
    GamePoint@P%      the same for P % of the pixels, P = 1, 5, 10
    AP, AUC, NSS      over the pixels; AUC is the ROC's
    Precision, Recall, IoU, Dice, Specificity, MCC      of the pixels above 0.5; Precision@0.75 of those above 0.75
    Pearson           correlation of map and mask
    KL                of the mask from the map, natural logarithm, map at least 1e-12

Nearest upsampling gives all pixels of a cell one value, so that the top K pixels are an arbitrary choice inside a cell:
here pixels of one value count with the fraction that fits, the mean over all choices. Other differences from the
release: a map comes from the whole clip, not from each frame as an image; a frame without annotation is left out (the
release scores it against the mask before it); Spearman and Kendall are not computed.

Exact and cheap: all pixels of a cell are alike, so a cell counts with its number of pixels and how many of them are
mask.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from swim.data_tools.rle import decode_mask
from swim.evaluation.alignment import KL_FLOOR, WORST
from swim.evaluation.detail import decode_maps
from swim.evaluation.predictions import Noun, Prediction
from swim.evaluation.scores import Metric

PROTOCOL = {"id": "alignment-pixels", "version": 1, "aggregation": "tokens -> frames -> clip -> mean over clips"}
GAMEPOINT_PIXELS = (1, 5, 10, 50, 100)
GAMEPOINT_PERCENT = (1, 5, 10)
NAMES = (
    *(f"GamePoint@{k}" for k in GAMEPOINT_PIXELS),
    *(f"GamePoint@{p}%" for p in GAMEPOINT_PERCENT),
    "AP", "AUC", "NSS", "Precision", "Precision@0.75", "Recall", "IoU", "Dice", "Specificity", "MCC", "Pearson", "KL",
)  # fmt: skip
PIXEL_METRICS = tuple(
    Metric(
        name, worst={"NSS": WORST["nss"], "KL": WORST["kl"], "MCC": -1.0, "Pearson": -1.0}.get(name, 0.0), per_clip=True
    )
    for name in NAMES
)


def pixel_metrics(map_HW: np.ndarray, mask: np.ndarray) -> dict[str, float]:
    """NAMES of one frame from attention [h, w] and the mask [H, W] of bools; all 0 for an empty mask."""
    if not mask.any():
        return dict.fromkeys(NAMES, 0.0)
    value, pixels, inside = _levels(map_HW, mask)
    outside, total = pixels - inside, pixels.sum()
    positive, negative = inside.sum(), total - inside.sum()
    reached = pixels.cumsum()
    found = {
        f"GamePoint@{name}": float((np.clip(budget - (reached - pixels), 0, pixels) * inside / pixels).sum() / budget)
        for name, budget in (
            *((str(k), min(k, total)) for k in GAMEPOINT_PIXELS),
            *((f"{p}%", max(1.0, total * p / 100)) for p in GAMEPOINT_PERCENT),
        )
    }
    deviation = value - (value * pixels).sum() / total
    std = np.sqrt((pixels * deviation**2).sum() / total)
    lower = negative - outside.cumsum()
    attention = (value * pixels).sum()
    share = value / attention if attention > 0 else np.full(len(value), 1 / total)
    covariance = (inside * deviation).sum() / total
    spread = np.sqrt(positive * negative) / total
    found |= {
        "AP": (inside * inside.cumsum() / reached).sum() / positive,
        "AUC": (inside * (lower + outside / 2)).sum() / (positive * negative) if negative else 0.5,
        "NSS": (inside * deviation).sum() / (positive * std) if len(value) > 1 else 0.0,
        "Pearson": covariance / (std * spread) if len(value) > 1 and negative else 0.0,
        "KL": -np.log(positive) - (inside * np.log(np.maximum(share, KL_FLOOR))).sum() / positive,
        **_binary(value, inside, outside),
    }
    return {name: float(found[name]) for name in NAMES}


def _levels(map_HW: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Distinct values scaled to [0, 1], highest first, with their numbers of pixels and of mask pixels."""
    (height, width), (rows, columns) = mask.shape, map_HW.shape
    # The cell of a pixel under nearest upsampling, as torch.nn.functional.interpolate has it.
    y, x = np.arange(height) * rows // height, np.arange(width) * columns // width
    cell = (y[:, None] * columns + x).ravel()
    pixels = np.bincount(cell, minlength=rows * columns).astype(np.float64)
    inside = np.bincount(cell, weights=mask.ravel(), minlength=rows * columns)
    low, high = float(map_HW.min()), float(map_HW.max())
    scaled = (map_HW.ravel().astype(np.float64) - low) / (high - low) if high > low else np.zeros(rows * columns)
    value, level = np.unique(scaled[pixels > 0], return_inverse=True)
    num = np.bincount(level, weights=pixels[pixels > 0])
    covered = np.bincount(level, weights=inside[pixels > 0])
    return value[::-1], num[::-1], covered[::-1]


def _binary(value: np.ndarray, inside: np.ndarray, outside: np.ndarray) -> dict[str, float]:
    above = value > 0.5
    hit, false_alarm = inside[above].sum(), outside[above].sum()
    miss, rest = inside.sum() - hit, outside.sum() - false_alarm
    high_hit, high = inside[value > 0.75].sum(), (inside + outside)[value > 0.75].sum()
    sides = (hit + false_alarm) * (hit + miss) * (rest + false_alarm) * (rest + miss)
    return {
        "Precision": hit / (hit + false_alarm) if hit + false_alarm else 0.0,
        "Precision@0.75": high_hit / high if high else 0.0,
        "Recall": hit / (hit + miss),
        "IoU": hit / (hit + miss + false_alarm),
        "Dice": 2 * hit / (2 * hit + miss + false_alarm),
        "Specificity": rest / (rest + false_alarm) if rest + false_alarm else 0.0,
        "MCC": (hit * rest - false_alarm * miss) / np.sqrt(sides) if sides else 0.0,
    }


def line_metrics(line: Prediction) -> dict[str, float] | None:
    """Mean over frames, of the mean over tokens; None for a line without token maps and masks."""
    frames: dict[int, list[dict[str, float]]] = {}
    for noun in line.nouns:
        for frame, row in _token_rows(noun):
            frames.setdefault(frame, []).append(row)
    if not frames:
        return None
    means = [{name: float(np.mean([row[name] for row in rows])) for name in NAMES} for rows in frames.values()]
    return {name: float(np.mean([row[name] for row in means])) for name in NAMES}


def _token_rows(noun: Noun) -> Iterator[tuple[int, dict[str, float]]]:
    detail: Mapping[str, Any] = noun.detail or {}
    if "token_maps" not in detail or "masks" not in detail:
        return
    maps = decode_maps(detail["token_maps"], (-1, *noun.map.shape))
    step_of = {frame: step for step, frames in enumerate(noun.frames) for frame in frames}
    for frame, rle in detail["masks"].items():
        mask = decode_mask(rle)
        for of_token in maps:
            yield int(frame), pixel_metrics(of_token[step_of[int(frame)]], mask)
