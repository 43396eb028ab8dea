"""Mask targets: what every annotated step or frame of every noun should look like, and which of them are judged
together."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as coco
from torch import Tensor

from swim.data_tools.records import Masks, Rle
from swim.data_tools.rle import clip_coverage, decode_mask, encode_mask
from swim.train.systems.swim.config import Config


@dataclass
class FrameGroup:
    """Frames of one token grid and one mask size (see kernels/mask_loss.py)."""

    starts: Tensor  # (N,) int64, first cell of each frame's step in the nouns' maps laid one behind the other
    target: Tensor  # (N, h, w) fp32 coverage, or (N, H, ceil(W / 8)) uint8, the bits of masks
    grid: tuple[int, int]
    size: tuple[int, int] | None  # (H, W) of the masks; None: coverage of the grid itself


@dataclass
class Targets:
    """All supervised frames in groups, and how they form units."""

    groups: dict[str, FrameGroup]
    order: Tensor  # (F,) int64, frames of the groups laid one behind the other, unit by unit
    unit_lengths: Tensor  # (U,) int64, frames of each unit
    unit_weights: Tensor  # (U,) fp32


def step_coverages(
    nouns: Sequence[Sequence[str]], masks: Masks, steps: Sequence[Sequence[int]], grid: tuple[int, int]
) -> list[tuple[np.ndarray | None, ...]]:
    """For every noun, given by its object ids, the mean coverage (h, w) of each step's annotated frames by the union of
    its objects; None where no frame of the step is annotated.

    A frame counts as annotated when every one of the objects is; an absent object covers nothing.
    """
    annotated = [[_annotated(ids, masks, frames) for frames in steps] for ids in nouns]
    united = [
        (noun, step, rle)
        for noun, of_noun in enumerate(annotated)
        for step, frames in enumerate(of_noun)
        for frame in frames
        if (rle := _union_at(nouns[noun], masks, frame)) is not None
    ]
    totals = np.zeros((len(nouns), len(steps), *grid))
    # All masks of the clip at once: most of the time for one alone is numpy's own.
    for (noun, step, _), coverage in zip(united, clip_coverage([rle for *_, rle in united], grid)):
        totals[noun, step] += coverage / len(annotated[noun][step])
    return [tuple(total[t] if found else None for t, found in enumerate(of)) for total, of in zip(totals, annotated)]


def step_masks(
    object_ids: Sequence[str], masks: Masks, frames: Sequence[int], grid: tuple[int, int]
) -> list[np.ndarray]:
    """Bool mask [H, W] of the union of the objects in each annotated frame of the step, at the masks' own size.

    Where nothing is seen and no mask gives a size, the size is that of the objects' other masks, else the token grid.
    """
    united = [_union_at(object_ids, masks, frame) for frame in _annotated(object_ids, masks, frames)]
    sizes = (rle.size for name in object_ids for rle in masks.get(name, {}).values() if rle is not None)
    size = next(sizes, grid)
    return [np.zeros(size, dtype=bool) if rle is None else decode_mask(rle) for rle in united]


def _annotated(object_ids: Sequence[str], masks: Masks, frames: Sequence[int]) -> list[int]:
    # Each once: a short clip ends in repetitions of its last frame.
    return [f for f in dict.fromkeys(frames) if all(f in masks.get(name, {}) for name in object_ids)]


def _union_at(object_ids: Sequence[str], masks: Masks, frame: int) -> Rle | None:
    present = [rle for name in object_ids if (rle := masks[name][frame]) is not None]
    return _union(present) if present else None


def _union(rles: Sequence[Rle]) -> Rle:
    if len(rles) == 1:
        return rles[0]
    height, width = (max(sides) for sides in zip(*(rle.size for rle in rles)))
    if any(rle.size != (height, width) for rle in rles):  # merge would give an empty string
        y, x = np.mgrid[:height, :width]
        masks = [decode_mask(rle)[y * rle.size[0] // height, x * rle.size[1] // width] for rle in rles]
        return Rle(**encode_mask(np.any(masks, axis=0)))
    merged = coco.merge([{"size": list(rle.size), "counts": rle.counts.encode("ascii")} for rle in rles])
    return Rle(size=rles[0].size, counts=merged["counts"].decode("ascii"))


def build_targets(
    coverages: Sequence[Sequence[np.ndarray | None]],
    grids: Sequence[tuple[int, int]],
    config: Config,
    *,
    masks: Sequence[Sequence[Sequence[np.ndarray]]] | None = None,
) -> tuple[Targets, dict[str, float]]:
    """Frames and units of all nouns, from the coverage of every step and, on the pixel side, the `masks` of its frames.

    Counts: `mask`, by which the sum of the losses is divided; nouns, those that carry a loss, and steps in which the
    object is absent or not annotated. A noun never seen has no unit of kl, which needs a target that is a distribution.
    """
    wide = config.softmax_scope != "frame"
    # Absent: zero is a target only where the loss can go there. The softmax of a frame cannot, nor can a map whose
    # every step is scaled to peak at 1, and dice and iou are constant, without a gradient, for an empty mask.
    zero_is_a_target = wide and config.map_scale == "none" and config.loss in ("kl", "bce", "focal")
    counts = dict.fromkeys(("mask", "supervised_nouns", "absent_steps", "unannotated_steps"), 0.0)
    counts["nouns"] = float(len(coverages))
    groups: dict[str, list[_Frame]] = {}
    units: list[list[_Frame]] = []
    weights: list[float] = []
    first = 0
    for number, (steps, grid) in enumerate(zip(coverages, grids)):
        judged = [[] if c is None else [c] for c in steps] if masks is None else masks[number]
        size = grid[0] * grid[1]
        frames = [_Frame(first + t * size, c, grid) for t, of_step in enumerate(judged) for c in of_step]
        first += size * len(steps)
        shown = [frame for frame in frames if frame.target.any()]
        kept = frames if zero_is_a_target else shown
        together = config.loss == "kl" and wide
        of_noun = [[frame] for frame in kept] if not together else [kept] if shown else []
        units += of_noun
        weights += [1.0 if config.loss_mean == "unit" else 1 / len(of_noun) for _ in of_noun]
        for unit in of_noun:
            for frame in unit:
                groups.setdefault(frame.group, []).append(frame)
        counts["mask"] += len(of_noun) if config.loss_mean == "unit" else bool(of_noun)
        counts["supervised_nouns"] += bool(of_noun)
        counts["absent_steps"] += sum(c is not None and not c.any() for c in steps)
        counts["unannotated_steps"] += sum(c is None for c in steps)
    place = {id(frame): i for i, frame in enumerate(frame for group in groups.values() for frame in group)}
    targets = Targets(
        groups={name: _stack(frames) for name, frames in groups.items()},
        order=torch.tensor([place[id(frame)] for unit in units for frame in unit], dtype=torch.int64),
        unit_lengths=torch.tensor([len(unit) for unit in units], dtype=torch.int64),
        unit_weights=torch.tensor(weights, dtype=torch.float32),
    )
    return targets, counts


@dataclass(frozen=True, eq=False)
class _Frame:
    start: int
    target: np.ndarray
    grid: tuple[int, int]

    @property
    def group(self) -> str:
        return f"{self.grid} {self.target.shape} {self.target.dtype}"


def _stack(frames: Sequence[_Frame]) -> FrameGroup:
    first = frames[0].target
    pixels = first.dtype == bool
    # Bits, an eighth of the bytes from the loader to the device; rows start on a byte, as the kernel reads them.
    stacked = [np.packbits(f.target, axis=-1, bitorder="little") if pixels else np.float32(f.target) for f in frames]
    return FrameGroup(
        starts=torch.tensor([frame.start for frame in frames], dtype=torch.int64),
        target=torch.from_numpy(np.stack(stacked)),
        grid=frames[0].grid,
        size=(first.shape[0], first.shape[1]) if pixels else None,
    )
