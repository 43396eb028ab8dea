"""SWIM's objective: answer cross-entropy plus the mask loss of noun attention (arXiv 2605.18018, Eq. 5-7).

    total = text_weight * sum_tokens CE / tokens + mask_weight * sum_nouns L(mean_layers A, coverage) / nouns

Both means are over the whole optimizer step: this module returns sums, the loop divides by counts.
"""

from collections.abc import Mapping
from itertools import accumulate

import torch
from torch import Tensor, nn

from swim.kernels.mask_loss import mask_loss
from swim.train.attention import MODEL_KWARG, Capture
from swim.train.system import Term
from swim.train.systems.swim.config import Config
from swim.train.systems.swim.data import SwimBatch


def noun_maps(maps: Mapping[int, Tensor], batch: SwimBatch) -> list[Tensor]:
    """One flat map (T * h * w,) per noun: mean over layers (Eq. 6), then over the noun's tokens."""
    rows = torch.stack(list(maps.values())).mean(0).split(batch.table.map_sizes)
    starts = accumulate((len(noun.tokens) for noun in batch.nouns), initial=0)
    return [
        torch.stack(rows[start : start + len(noun.tokens)]).mean(0) if len(noun.tokens) > 1 else rows[start]
        for start, noun in zip(starts, batch.nouns)
    ]


def swim_loss(model: nn.Module, batch: SwimBatch, config: Config, *, measure: bool) -> tuple[dict[str, Term], Capture]:
    """Text and mask terms of one micro-batch; `measure` notes the mask loss's gradient norms in the returned
    Capture."""
    supervise = config.mask_weight > 0
    capture = Capture(batch.table, tuple(config.layers), detach=not supervise, measure=measure and supervise)
    output = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns, **{MODEL_KWARG: capture})
    logits = output.logits[batch.label_rows, batch.label_slots].float()
    text = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
    # A batch without labels still goes through backward, where ZeRO-3's collectives are: keep it tied to the graph.
    text = text + 0.0 * output.logits.float().sum() if not len(batch.labels) else text
    targets = batch.targets
    assert targets is not None
    flat = capture.maps()
    if len(targets.cells):
        mask_map = torch.cat(noun_maps(flat, batch))[targets.cells]
        mask = mask_loss(mask_map, targets.coverage, targets.unit_lengths, targets.unit_weights, kind=config.loss)
    else:
        mask = text.new_zeros(())
    return {"text": Term(text, config.text_weight), "mask": Term(mask, config.mask_weight)}, capture
