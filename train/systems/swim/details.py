"""What predictions keep of noun maps beside their mean: layers, heads, tokens, masks; and nouns of a generated answer.

Only noun rows are ever computed, and heads leave the device as they come: memory is rows x visual keys x heads of the
kept layers on the CPU, and rows x visual keys on the device, however many layers the model has.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim.data_tools.records import Masks, Mention, Record, Turn
from swim.data_tools.rle import encode_mask
from swim.evaluation.detail import encode_maps, kept_steps
from swim.kernels.noun_attention import noun_attention
from swim.train.attention import Capture
from swim.train.system import Detail
from swim.train.systems.swim.data import SwimBatch
from swim.train.systems.swim.targets import step_masks


class HeadCapture(Capture):
    """A capture that also keeps the map of every head: `heads`, layer -> fp32 (H, sum of row sizes) on the CPU."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.heads: dict[int, Tensor] = {}

    def observe(self, layer: int, q_BHLD: Tensor, k_BKLD: Tensor, scale: float, *, num_kv_heads: int) -> None:
        """Compute the maps of `layer`, the heads' one by one."""
        super().observe(layer, q_BHLD, k_BKLD, scale, num_kv_heads=num_kv_heads)
        per_key = q_BHLD.shape[1] // k_BKLD.shape[1]
        heads = [
            noun_attention(
                q_BHLD[:, h : h + 1].detach(),
                k_BKLD[:, h // per_key : h // per_key + 1].detach(),
                self.table,
                scale=scale,
                backend=self.backend,
            ).cpu()
            for h in range(q_BHLD.shape[1])
        ]
        self.heads[layer] = torch.stack(heads)


def noun_details(
    capture: Capture,
    batch: SwimBatch,
    masks: Masks,
    keep: frozenset[Detail],
    *,
    kept: Sequence[int],
    supervised: Sequence[int],
) -> list[dict[str, Any]]:
    """{"detail": ...} of each noun as `swim.evaluation.detail` reads it, {} where nothing is kept."""
    if not keep:
        return [{} for _ in batch.nouns]
    maps, tokens = capture.maps(), [len(noun.tokens) for noun in batch.nouns]
    by_layer = _by_noun(torch.stack([maps[layer].cpu() for layer in kept]), batch.table.map_sizes, tokens)
    heads = None
    if isinstance(capture, HeadCapture):
        stacked = torch.stack([capture.heads[layer] for layer in kept])
        heads = _by_noun(stacked.flatten(0, 1), batch.table.map_sizes, tokens)
    mean = torch.stack([maps[layer] for layer in supervised]).mean(0, keepdim=True).cpu()
    by_token = _by_noun(mean, batch.table.map_sizes, tokens)
    details = []
    for number, noun in enumerate(batch.nouns):
        clip = batch.clips[noun.conversation]
        assert clip is not None
        detail: dict[str, Any] = {}
        if keep & {"layers", "heads"}:
            own = None if heads is None else heads[number]
            detail |= _layer_maps(by_layer[number], own, clip.grid, batch.coverages[number], kept)
        if "pixels" in keep:
            detail["token_maps"] = encode_maps(by_token[number][:, 0].reshape(-1, *clip.grid))
            detail["masks"] = _masks(noun.object_ids, masks, clip.frames, clip.grid[1:])
        details.append({"detail": detail})
    return details


def _by_noun(rows_NP: Tensor, row_sizes: Sequence[int], tokens: Sequence[int]) -> list[np.ndarray]:
    """For each noun [tokens, N, P] of maps (N, sum of row sizes) of which it has as many rows as tokens."""
    rows = iter(rows_NP.split(list(row_sizes), dim=1))
    return [np.stack([next(rows).numpy() for _ in range(num)]) for num in tokens]


def _layer_maps(
    of_layers: np.ndarray,
    of_heads: np.ndarray | None,
    grid: tuple[int, int, int],
    coverage: Sequence[np.ndarray | None],
    layers: Sequence[int],
) -> dict[str, Any]:
    """Maps of the annotated steps, of as many as the size allows; the mean over the noun's tokens."""
    num = len(layers) if of_heads is None else of_heads.shape[1]
    steps = kept_steps([step is not None and bool(step.any()) for step in coverage], num * grid[1] * grid[2] * 2)
    detail: dict[str, Any] = {"steps": steps, "layers": list(layers)}
    detail["layer_maps"] = encode_maps(of_layers.mean(0).reshape(-1, *grid)[:, steps])
    if of_heads is not None:
        detail["heads"] = of_heads.shape[1] // len(layers)
        detail["head_maps"] = encode_maps(of_heads.mean(0).reshape(-1, *grid)[:, steps])
    return detail


def _masks(
    object_ids: Sequence[str], masks: Masks, frames: Sequence[Sequence[int]], grid: tuple[int, int]
) -> dict[str, Any]:
    """The objects' union in every annotated frame."""
    found = {}
    for frame in dict.fromkeys(frame for of_step in frames for frame in of_step):
        for mask in step_masks(object_ids, masks, [frame], grid):
            found[str(frame)] = encode_mask(mask)
    return found


def with_answers(record: Record, answers: Mapping[str, str]) -> tuple[Record, dict[str, list[dict[str, Any]]]]:
    """The record with answers (by id) in place of its targets, and by id the nouns of the target that they lack.

    A noun of the target is looked for as a whole word, in any case; the k-th mention of a noun is its k-th occurrence.
    """
    conversations, unsaid = list(record.conversations), {}
    for name, answer in answers.items():
        number = int(name.rsplit("#", 1)[1])
        target = conversations[number].turns[-1]
        mentions, unsaid[name] = _find_mentions(target, answer)
        turn = Turn(role=target.role, text=answer, mentions=mentions)
        turns = [*conversations[number].turns[:-1], turn]
        conversations[number] = conversations[number].model_copy(update={"turns": turns})
    return record.model_copy(update={"conversations": conversations}), unsaid


def _find_mentions(target: Turn, answer: str) -> tuple[list[Mention], list[dict[str, Any]]]:
    mentions, lacking, seen = [], [], dict[str, int]()
    for mention in target.mentions:
        noun = target.text[slice(*mention.head)]
        places = [match.span() for match in re.finditer(rf"(?<!\w){re.escape(noun)}(?!\w)", answer, re.IGNORECASE)]
        number = seen.get(noun.lower(), 0)
        seen[noun.lower()] = number + 1
        if number < len(places):
            start, end = places[number]
            found = Mention(start=start, end=end, head=(start, end), kind=mention.kind, object_ids=mention.object_ids)
            mentions.append(found)
        else:
            lacking.append({"text": noun, "object_ids": mention.object_ids})
    return mentions, lacking
