"""SWIM's objective: answer cross-entropy plus the mask loss of noun attention (arXiv 2605.18018, Eq. 5-7).

    total = text_weight * sum_tokens CE / tokens + mask_weight * sum_units w L(map, target) / count
    map   = scale_frame( normalise_clip( fuse_layers( mean_tokens A ) ) )

The count is that of nouns (w shares each among its units) or of units (w = 1), see `targets.build_targets`. Both means
are over the whole optimizer step: this module returns sums, the loop divides by counts. Maps are logarithms from the
fusion on: a product of layers never underflows, and every scaling is a difference.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from swim.kernels.mask_loss import MIN_PROBABILITY, frame_sums, mask_loss
from swim.train.attention import MODEL_KWARG, Capture
from swim.train.sequence import own_labels
from swim.train.system import Term
from swim.train.systems.swim.config import Config, Fusion
from swim.train.systems.swim.data import SwimBatch
from swim.train.systems.swim.targets import Targets


def noun_maps(maps: Mapping[int, Tensor], batch: SwimBatch) -> list[Tensor]:
    """One flat map (T * h * w,) per noun, for predictions: mean over its tokens and the layers, whatever is trained."""
    tokens = [len(noun.tokens) for noun in batch.nouns]
    return [log_map.exp() for log_map in fuse_layers(maps, batch.table.map_sizes, tokens, "mean")]


def fuse_layers(
    maps: Mapping[int, Tensor], row_sizes: Sequence[int], tokens_per_noun: Sequence[int], fusion: Fusion
) -> list[Tensor]:
    """Logarithm (T * h * w,) of each noun's map: mean over its tokens in every layer, then the layers fused (Eq. 6).

    `maps` holds per layer the rows' maps one behind the other (sum of row sizes,), a noun's rows side by side.
    """
    rows = torch.stack(list(maps.values())).split(list(row_sizes), dim=1)
    starts = accumulate(tokens_per_noun, initial=0)
    fused = []
    for start, tokens in zip(starts, tokens_per_noun):
        layers_SP = torch.stack(rows[start : start + tokens]).mean(0) if tokens > 1 else rows[start]
        if fusion == "product":
            fused.append(layers_SP.clamp_min(MIN_PROBABILITY).log().sum(0))
            continue
        reduced_P = {"mean": layers_SP.mean, "sum": layers_SP.sum, "max": layers_SP.amax}[fusion](0)
        fused.append(reduced_P.clamp_min(MIN_PROBABILITY).log())
    return fused


def mask_term(
    maps: Mapping[int, Tensor],
    row_sizes: Sequence[int],
    tokens_per_noun: Sequence[int],
    targets: Targets,
    config: Config,
) -> Tensor:
    """Weighted sum of all units' losses from the flat maps of every layer; a zero without gradient when there are no
    units."""
    if not targets.groups:
        return next(iter(maps.values())).new_zeros(())
    log_maps = fuse_layers(maps, row_sizes, tokens_per_noun, config.layer_fusion)
    if config.fused_norm == "clip":
        log_maps = [log_map - log_map.logsumexp(0) for log_map in log_maps]
    flat = torch.cat(log_maps)
    sums = []
    for group in targets.groups.values():
        height, width = group.grid
        cells = group.starts[:, None] + torch.arange(height * width, device=flat.device)
        log_map_NYX = flat[cells].unflatten(1, (height, width))
        sums.append(
            frame_sums(
                log_map_NYX,
                group.target,
                kind=config.loss,
                size=group.size,
                scale=config.map_scale,
                backend=config.backend,
            )
        )
    return mask_loss(torch.cat(sums)[targets.order], targets.unit_lengths, targets.unit_weights, kind=config.loss)


def swim_loss(
    model: nn.Module,
    batch: SwimBatch,
    config: Config,
    layers: tuple[int, ...],
    *,
    measure: bool,
    group: ProcessGroup | None = None,
) -> tuple[dict[str, Term], Capture]:
    """Text and mask terms of one micro-batch; `measure` notes the mask loss's gradient norms in the returned Capture.

    Over the ranks of a `group` that hold the micro-batch together, terms and gradients are to be added up.
    """
    if group is not None:
        batch = own_labels(batch, group)
    supervise = config.mask_weight > 0
    capture = Capture(
        batch.table,
        layers,
        layout=batch.layout,
        detach=not supervise,
        measure=measure and supervise,
        backend=config.backend,
        group=group,
    )
    output = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns, **{MODEL_KWARG: capture})
    logits = output.logits[batch.label_rows, batch.label_slots].float()
    text_A = nn.functional.cross_entropy(logits, batch.labels, reduction="none")
    text = text_A.sum()
    # A batch without labels still goes through backward, where ZeRO-3's collectives are: keep it tied to the graph.
    text = text + 0.0 * output.logits.float().sum() if not len(batch.labels) else text
    assert batch.targets is not None
    tokens = [len(noun.tokens) for noun in batch.nouns]
    mask = mask_term(capture.maps(), batch.table.map_sizes, tokens, batch.targets, config)
    if group is not None and group.rank() > 0:
        # Every rank has the same maps and the whole value, which counts once; its gradient is this rank's share.
        mask = mask - mask.detach()
    by_token = Term(text, config.text_weight, text_A.detach(), batch.label_conversations)
    return {"text": by_token, "mask": Term(mask, config.mask_weight)}, capture
