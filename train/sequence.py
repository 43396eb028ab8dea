"""Sequence parallelism for long videos: the n ranks of a group hold one micro-batch together (Ulysses, arXiv
2309.14509).

Embeddings and vision tower see the whole sequence on every rank. From there on a rank holds L / n of the L columns;
only inside attention it holds H / n of the H query heads instead, over all columns. A rank's gradients are those of its
own columns and heads: added up over the ranks they are those of one rank that holds everything.

Cost per layer and forward pass: four all-to-alls, in which a rank sends `sent_by_layer` numbers; the backward pass
sends as many again. K kv heads that n does not divide are sent in c = n / gcd(K, n) copies, so that each is where its
query heads are.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import gcd
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from swim.train.batch import Batch
from swim.train.config import ConfigError

SomeBatch = TypeVar("SomeBatch", bound=Batch)


def check_sequence(size: int, model_config: Any) -> None:
    """ConfigError when the text model of a transformers config cannot be divided among `size` ranks."""
    text = model_config.get_text_config()
    heads = text.num_attention_heads
    if heads % size:
        possible = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"parallel.sequence: {size} ranks cannot share the {heads} attention heads of this model; use one of: "
            f"{possible}"
        )
    if size > 1 and "sliding_attention" in (getattr(text, "layer_types", None) or ()):
        raise ConfigError(
            f"parallel.sequence: {size}, but layers of this model attend through a sliding window, which is not "
            "implemented there; set parallel.sequence=1"
        )


def sent_by_layer(length: int, heads: int, kv_heads: int, head_dim: int, size: int) -> int:
    """Numbers that a rank sends in one layer's forward pass, for each row of `length` columns."""
    return 2 * (heads + kv_heads * _copies(kv_heads, size)) * head_dim * length * (size - 1) // size**2


def agreed(steps: Iterator[list[SomeBatch]], group: ProcessGroup) -> Iterator[list[SomeBatch]]:
    """The micro-batches of every step, the same on all ranks of the group: a sample that failed on one rank alone would
    leave them sequences of different lengths, so all then take what the first one read."""
    for batches in steps:
        read: list[Any] = [None] * group.size()
        torch.distributed.all_gather_object(read, [(batch.ids, batch.layout) for batch in batches], group=group)
        whole: list[Any] = [batches]
        if any(one != read[0] for one in read):
            torch.distributed.broadcast_object_list(whole, group=group, group_src=0)
        yield whole[0]


def own_columns(length: int, group: ProcessGroup) -> slice:
    """This rank's of `length` columns; ValueError when the group does not divide them."""
    size, rank = group.size(), group.rank()
    if length % size:
        raise ValueError(f"{length} columns do not divide among {size} ranks; make batches with BatchOptions.sequence")
    return slice(length // size * rank, length // size * (rank + 1))


def own_inputs(inputs: dict[str, Any], group: ProcessGroup) -> dict[str, Any]:
    """Keyword arguments of a text model, on this rank's columns: embeddings (B, L, D), positions (..., L) and the
    features that Qwen3-VL adds to visual columns behind its first layers (DeepStack, arXiv 2406.04334)."""
    embeds = inputs["inputs_embeds"]
    own = own_columns(embeds.shape[1], group)
    inputs = inputs | {
        # Copied, so that the whole does not stay in memory for this part of it.
        "inputs_embeds": embeds[:, own].clone(),
        "position_ids": inputs["position_ids"][..., own],
        # All ones, which transformers drops: the layout says who attends to whom.
        "attention_mask": embeds.new_ones(len(embeds), own.stop - own.start, dtype=torch.long),
    }
    if inputs.get("deepstack_visual_embeds") is not None:
        visual = inputs["visual_pos_masks"]
        here = torch.zeros_like(visual)
        here[:, own] = True
        inputs["visual_pos_masks"] = visual[:, own]
        inputs["deepstack_visual_embeds"] = [features[here[visual]] for features in inputs["deepstack_visual_embeds"]]
    return inputs


def own_labels(batch: SomeBatch, group: ProcessGroup) -> SomeBatch:
    """The batch with the labels that this rank's columns predict; `label_columns` count from its first and are never
    none."""
    assert batch.layout is not None
    own = own_columns(batch.layout.length, group)
    columns = batch.label_columns
    here = (columns >= own.start) & (columns < own.stop)
    labelled = here[batch.label_slots]
    kept = columns[here] - own.start
    return replace(
        batch,
        label_columns=kept if len(kept) else columns.new_zeros(1),
        label_rows=batch.label_rows[labelled],
        label_slots=batch.label_slots[labelled] - (columns < own.start).sum(),
        labels=batch.labels[labelled],
        label_conversations=batch.label_conversations[labelled],
    )


def gather_columns(x_BHlD: Tensor, group: ProcessGroup) -> Tensor:
    """All columns of this rank's heads (B, H c / n, L, D), from all heads of its columns (B, H, L / n, D)."""
    copies = _copies(x_BHlD.shape[1], group.size())
    return _AllToAll.apply(x_BHlD.repeat_interleave(copies, 1) if copies > 1 else x_BHlD, 1, 2, group)


def gather_heads(x_BLhD: Tensor, group: ProcessGroup) -> Tensor:
    """All heads of this rank's columns (B, L / n, H, D), from all columns of its heads (B, L, H / n, D)."""
    return _AllToAll.apply(x_BLhD, 1, 2, group)


def add_copies(grad_BhLD: Tensor, num_heads: int, group: ProcessGroup) -> Tensor:
    """Gradient at this rank's columns of all heads (B, `num_heads`, L / n, D), from what `gather_columns` gave it."""
    return _all_to_all(grad_BhLD, 2, 1, group).unflatten(1, (num_heads, -1)).sum(2)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, split: int, join: int, group: ProcessGroup) -> Tensor:
        ctx.back = join, split, group
        return _all_to_all(x, split, join, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grad, *ctx.back), None, None, None


def _all_to_all(x: Tensor, split: int, join: int, group: ProcessGroup) -> Tensor:
    """Part r of dimension `split` goes to rank r; what comes is joined along dimension `join`, in the ranks' order."""
    sent = torch.stack(x.chunk(group.size(), split))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return torch.cat(received.unbind(), join)


def _copies(heads: int, size: int) -> int:
    return size // gcd(heads, size)
