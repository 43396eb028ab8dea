"""Mask targets on the token grid: coverage of every cell, and which softmax of which noun carries a loss."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco
from torch import Tensor

from swim.data_tools.records import Masks, Rle
from swim.data_tools.rle import cell_coverage, decode_mask, encode_mask
from swim.kernels.noun_attention import Scope


@dataclass
class Targets:
    """Supervised cells, unit by unit (see kernels/mask_loss.py); cells index the nouns' maps laid one behind the
    other."""

    cells: Tensor  # (Y,) int64
    coverage: Tensor  # (Y,) fp32
    unit_lengths: Tensor  # (U,) int64
    unit_weights: Tensor  # (U,) fp32, 1 / units of the noun


def step_coverage(
    object_ids: Sequence[str], masks: Masks, frames: Sequence[int], grid: tuple[int, int]
) -> np.ndarray | None:
    """Mean coverage (h, w) of the step's annotated frames by the union of the objects; None if no frame is annotated.

    A frame counts as annotated when every one of the objects is; an absent object covers nothing.
    """
    annotated = [f for f in dict.fromkeys(frames) if all(f in masks.get(name, {}) for name in object_ids)]
    if not annotated:
        return None
    total = np.zeros(grid)
    for frame in annotated:
        present = [rle for name in object_ids if (rle := masks[name][frame]) is not None]
        if present:
            total += cell_coverage(_union(present), grid)
    return total / len(annotated)


def _union(rles: Sequence[Rle]) -> Rle:
    if len(rles) == 1:
        return rles[0]
    height, width = max(rle.size for rle in rles)
    if any(rle.size != (height, width) for rle in rles):  # merge would give an empty string
        y, x = np.mgrid[:height, :width]
        masks = [decode_mask(rle)[y * rle.size[0] // height, x * rle.size[1] // width] for rle in rles]
        return Rle(**encode_mask(np.any(masks, axis=0)))
    merged = coco.merge([{"size": list(rle.size), "counts": rle.counts.encode("ascii")} for rle in rles])
    return Rle(size=rles[0].size, counts=merged["counts"].decode("ascii"))


def build_targets(
    coverages: Sequence[Sequence[np.ndarray | None]], cells_per_step: Sequence[int], scope: Scope
) -> tuple[Targets, dict[str, float]]:
    """Loss units of all nouns, with counts: supervised nouns (`mask`), all nouns, and steps absent or not annotated.

    Frame scope: one unit per step that shows the object; an absent step has none, a softmax cannot be zero. Clip scope:
    one unit over all annotated steps, absent ones with target zero. A noun never seen has no unit.
    """
    cells, values, lengths, weights = [], [], [], []
    counts = {"mask": 0.0, "nouns": float(len(coverages)), "absent_steps": 0.0, "unannotated_steps": 0.0}
    first = 0
    for steps, size in zip(coverages, cells_per_step):
        known = [(t, c) for t, c in enumerate(steps) if c is not None]
        shown = [(t, c) for t, c in known if c.any()]
        counts["unannotated_steps"] += len(steps) - len(known)
        counts["absent_steps"] += len(known) - len(shown)
        units = [] if not shown else [[step] for step in shown] if scope == "frame" else [known]
        for unit in units:
            cells += [first + t * size + np.arange(size) for t, _ in unit]
            values += [c.reshape(-1) for _, c in unit]
            lengths.append(size * len(unit))
            weights.append(1 / len(units))
        counts["mask"] += bool(units)
        first += size * len(steps)
    return (
        Targets(
            cells=torch.from_numpy(np.concatenate(cells) if cells else np.zeros(0, dtype=np.int64)),
            coverage=torch.from_numpy(np.concatenate(values) if values else np.zeros(0)).float(),
            unit_lengths=torch.tensor(lengths, dtype=torch.int64),
            unit_weights=torch.tensor(weights, dtype=torch.float32),
        ),
        counts,
    )
