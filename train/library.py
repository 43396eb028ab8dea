"""Attention supervision inside any training loop: three calls, no DeepSpeed, nothing of our trainer.

    swim.register_capture(model)                                      # once
    supervision = swim.describe(model, inputs, nouns, layers="even:6")  # per batch: rows, keys and targets
    output = model(**inputs, **supervision.model_kwargs)
    loss = output.loss + swim.mask_loss(supervision)

`inputs` is what the stock processor of the model gives, padded on either side, one clip in a row. Options are those of
the `system:` section (docs/supervision.md). Cost: that of `train/attention.py`. Describing a batch reads `input_ids`,
which waits for a GPU that holds them: better describe in the collator and move the result with `to`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from swim.data_tools.rle import clip_coverage, encode_mask
from swim.kernels.noun_attention import ClipKeys, Row, build_work_table
from swim.train.attention import MODEL_KWARG, Capture
from swim.train.batch import moved
from swim.train.systems.swim.config import Config, resolve_layers
from swim.train.systems.swim.objective import mask_term
from swim.train.systems.swim.targets import Targets, build_targets


@dataclass(frozen=True)
class NounTarget:
    """A noun of the batch: its row, the columns of its tokens, and for each temporal step the masks (H, W) of the
    step's annotated frames; an empty list says nothing about a step, an empty mask says that the object is absent."""

    row: int
    tokens: Sequence[int]
    masks: Sequence[Sequence[np.ndarray]]


@dataclass(frozen=True)
class Supervision:
    """What one forward call is to capture and what `mask_loss` compares it with."""

    capture: Capture
    options: Config
    targets: Targets
    tokens_per_noun: tuple[int, ...]
    count: float  # supervised nouns, over which `mask_loss` is a mean

    def to(self, device: torch.device | str) -> "Supervision":
        """The same with its tensors on `device`; before the forward call."""
        capture = Capture(self.capture.table.to(device), self.capture.layers)
        return replace(
            self,
            capture=capture,
            targets=moved(self.targets, device),
        )

    @property
    def model_kwargs(self) -> dict[str, Any]:
        """Keyword arguments for the model call."""
        return {MODEL_KWARG: self.capture}


def describe(
    model: nn.Module | Any,
    inputs: Mapping[str, Tensor],
    nouns: Sequence[NounTarget],
    *,
    layers: Sequence[int] | str,
    grids: Mapping[int, tuple[int, int, int]] | None = None,
    **options: Any,
) -> Supervision:
    """Noun rows, visual keys and targets of a padded batch for a model or its config.

    The other options are those of the `system:` section, save weights: those are your loop's. `grids` gives the token
    grid (T, h, w) of the clip in each row; models with `video_grid_thw` need none. Raises ValueError for a noun that
    does not stand behind its row's clip, a grid that does not fit the row's placeholders, or masks that are not one
    list per step.
    """
    if foreign := {"text_weight", "mask_weight", "gradient_every"} & options.keys():
        raise ValueError(f"{', '.join(sorted(foreign))}: not an option here; weigh the terms where you add them")
    config: Any = getattr(model, "config", model)
    chosen = Config.model_validate({"layers": layers, **options})
    grids = _grids(config, inputs) if grids is None else grids
    ordered = sorted(_reduced(nouns, chosen.subtokens), key=lambda noun: noun.row)
    keys: list[ClipKeys] = []
    rows: list[Row] = []
    for row in sorted({noun.row for noun in ordered}):
        if row not in grids:
            raise ValueError(f"row {row} has nouns but no clip: grids names rows {sorted(grids)}")
        visual, real = _columns(config, inputs, row, grids[row])
        for noun in (noun for noun in ordered if noun.row == row):
            for column in _checked(noun, grids[row][0], visual[-1], real[-1]):
                place = column + chosen.row_offset
                end = real[-1] + 1 if chosen.softmax_scope == "full" else place + 1
                rows.append(Row(len(keys), place, ((real[0], end),)))
        keys.append(ClipKeys(row, visual[0], grids[row], visual))
    shapes = [grids[noun.row][1:] for noun in ordered]
    coverages = [[_coverage(step, shape) for step in noun.masks] for noun, shape in zip(ordered, shapes)]
    pixels = [noun.masks for noun in ordered] if chosen.mask_side == "pixel" else None
    targets, counts = build_targets(coverages, shapes, chosen, masks=pixels)
    table = build_work_table(rows, keys, chosen.softmax_scope)
    capture = Capture(table, resolve_layers(chosen.layers, config.get_text_config().num_hidden_layers))
    tokens = tuple(len(noun.tokens) for noun in ordered)
    return Supervision(capture, chosen, targets, tokens, counts["mask"]).to(inputs["input_ids"].device)


def _columns(
    config: Any, inputs: Mapping[str, Tensor], row: int, grid: tuple[int, int, int]
) -> tuple[list[int], list[int]]:
    """Columns of the row's visual tokens, and of all its tokens."""
    token = getattr(config, "video_token_id", None) or config.image_token_id
    ids = inputs["input_ids"][row]
    columns = torch.nonzero(ids == token).flatten().tolist()
    steps, height, width = grid
    # LLaVA-OneVision ends a clip with one more placeholder, for its newline.
    if len(columns) not in (steps * height * width, steps * height * width + 1):
        raise ValueError(
            f"row {row} has {len(columns)} placeholder tokens, its grid is {steps}x{height}x{width}; give one clip per "
            "row and the grid of its merged tokens"
        )
    mask = inputs["attention_mask"][row] if "attention_mask" in inputs else torch.ones_like(ids)
    return columns[: steps * height * width], torch.nonzero(mask).flatten().tolist()


def _checked(noun: NounTarget, steps: int, clip_end: int, row_end: int) -> Sequence[int]:
    if len(noun.masks) != steps:
        raise ValueError(f"a noun of row {noun.row} has masks for {len(noun.masks)} steps, its clip has {steps}")
    # In front of the clip causal attention sees none of it, and what a loss trained there would never be used.
    if not noun.tokens or not clip_end < min(noun.tokens) <= max(noun.tokens) <= row_end:
        raise ValueError(
            f"row {noun.row} has its clip up to column {clip_end} and tokens up to column {row_end}; a noun has tokens "
            f"{list(noun.tokens)}, which must lie between"
        )
    return noun.tokens


def mask_loss(supervision: Supervision) -> Tensor:
    """Mean mask loss of the batch's nouns after the forward call, a scalar; 0 without a gradient when none is
    supervised (`supervision.count` is 0).

    RuntimeError when the maps are missing or carry no gradient in training.
    """
    capture, tokens = supervision.capture, supervision.tokens_per_noun
    total = mask_term(capture.maps(), capture.table.map_sizes, tokens, supervision.targets, supervision.options)
    return total / max(supervision.count, 1.0)


def assert_supervised(loss: Tensor, model: nn.Module) -> None:
    """AssertionError when `loss`, an attention loss alone, trains nothing: no gradient reaches any parameter.

    Costs one more backward pass: call it in the first step. Not for parameters that ZeRO-3 has partitioned.
    """
    value = float(loss.detach())
    if not loss.requires_grad:
        raise AssertionError(
            f"the loss is {value:.4g} but carries no gradient: it would be logged and train nothing. Either the batch "
            "has no supervised noun, or activation checkpointing is reentrant, which does this to captured tensors: "
            'use {"use_reentrant": False}, or attach the loss to the attention output '
            "(examples/reentrant_gradient_loss.py)"
        )
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True, allow_unused=True)
    norms = {name: float(grad.norm()) for (name, _), grad in zip(named, found) if grad is not None}
    if bad := [name for name, norm in norms.items() if not np.isfinite(norm)]:
        raise AssertionError(f"the loss is {value:.4g}, its gradient is not finite at {bad[0]} and {len(bad) - 1} more")
    if not any(norms.values()):
        raise AssertionError(
            f"the loss is {value:.4g}, but its gradient is zero at all {len(named)} trained parameters: the batch may "
            "have no supervised noun, or the attention projections are frozen"
        )


def _reduced(nouns: Sequence[NounTarget], subtokens: str) -> list[NounTarget]:
    if subtokens == "each":
        return [replace(noun, tokens=(token,)) for noun in nouns for token in noun.tokens]
    return [replace(noun, tokens=noun.tokens[-1:]) for noun in nouns] if subtokens == "last" else list(nouns)


def _grids(config: Any, inputs: Mapping[str, Tensor]) -> dict[int, tuple[int, int, int]]:
    if "video_grid_thw" not in inputs:
        raise ValueError("inputs have no video_grid_thw; give grids: {row: (steps, height, width)} in merged tokens")
    merge = config.vision_config.spatial_merge_size
    rows = torch.nonzero((inputs["input_ids"] == config.video_token_id).any(1)).flatten().tolist()
    grids = inputs["video_grid_thw"].tolist()
    if len(rows) != len(grids):
        raise ValueError(f"{len(grids)} clips for {len(rows)} rows with video tokens; give one clip per row")
    return {row: (t, h // merge, w // merge) for row, (t, h, w) in zip(rows, grids)}


def _coverage(masks: Sequence[np.ndarray], grid: tuple[int, int]) -> np.ndarray | None:
    rles = [encode_mask(np.asarray(mask, dtype=bool)) for mask in masks]
    return clip_coverage(rles, grid).mean(axis=0) if rles else None
