"""Who attends to whom when a row of the batch holds more than one sequence.

A *sequence* is one clip with what is said about it: a prefix (system turn and visual tokens, once) and branches, one
per conversation. The prefix is causal; a branch sees the prefix and, causally, itself, never another branch. A sequence
without branches is plain causal. Several sequences in one row are packed: none sees another.

Given to the base backend in pieces, no L x L mask is ever made: with sdpa one causal call per prefix and one masked
call (branch tokens x sequence) per sequence, with flash attention one varlen call for the whole batch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

Pieces = tuple[int, ...]  # tokens of the prefix, then of each branch


@dataclass(frozen=True)
class Layout:
    """Sequences of every batch row, each as its pieces; what they leave of `length` columns is padding."""

    rows: tuple[tuple[Pieces, ...], ...]
    length: int

    @property
    def num_tokens(self) -> int:
        """Tokens without padding; a shared prefix counts once."""
        return sum(sum(pieces) for row in self.rows for pieces in row)

    @property
    def num_pairs(self) -> int:
        """Pairs of a token and one that it attends to, itself included."""
        whole = [pieces for row in self.rows for pieces in row]
        return sum(n * (n + 1) // 2 for pieces in whole for n in pieces) + sum(p * sum(rest) for p, *rest in whole)

    @property
    def is_padded(self) -> bool:
        """Whether every row is one plain sequence, so that a padding mask says it all."""
        return all(len(row) == 1 and len(row[0]) == 1 for row in self.rows)


def attend(
    base: Callable[..., tuple[Tensor, Any]],
    module: Any,
    q_BHLD: Tensor,
    k_BKLD: Tensor,
    v_BKLD: Tensor,
    layout: Layout,
    *,
    flash: bool,
    cache: dict[Any, Any],
    **kwargs: Any,
) -> Tensor:
    """Attention output (B, L, H, D) of `base` under the layout, zero at padding; `cache` keeps masks between layers.

    Raises ValueError for sliding windows, whose distances a shared prefix would change, and for a wrong length.
    """
    if kwargs.get("sliding_window"):
        raise ValueError(
            f"packed and shared-prefix batches need full attention, the model uses a window of "
            f"{kwargs['sliding_window']}; set data.packed=false and data.shared_prefix=false"
        )
    if q_BHLD.shape[2] != layout.length or len(layout.rows) != q_BHLD.shape[0]:
        raise ValueError(
            f"the layout describes {len(layout.rows)} rows of {layout.length} tokens, the model was given "
            f"{tuple(q_BHLD.shape[:3:2])}"
        )
    # split, not slices: its backward is one concatenation, that of a slice is a tensor of zeros for every slice.
    tokens = [sum(pieces) for row in layout.rows for pieces in row]
    columns = [[*map(sum, row), layout.length - sum(map(sum, row))] for row in layout.rows]
    parts = [[row.split(sizes, 2)[:-1] for row, sizes in zip(x.split(1), columns)] for x in (q_BHLD, k_BKLD, v_BKLD)]
    q, k, v = ([piece for row in part for piece in row] for part in parts)
    pieces = [pieces for row in layout.rows for pieces in row]
    if flash:
        outputs = _flash(base, module, q, k, v, pieces, cache, kwargs).split(tokens, 1)
    else:
        outputs = tuple(_sdpa(base, module, *piece, cache, kwargs) for piece in zip(q, k, v, pieces))
    remaining, rows = list(outputs), []
    for row, sizes in zip(layout.rows, columns):
        own, remaining = remaining[: len(row)], remaining[len(row) :]
        padding = own[0].new_zeros(1, sizes[-1], *own[0].shape[2:])
        rows.append(torch.cat([*own, padding], 1))
    return torch.cat(rows)


def _sdpa(base: Any, module: Any, q: Tensor, k: Tensor, v: Tensor, pieces: Pieces, cache: Any, kwargs: Any) -> Tensor:
    prefix, branches = pieces[0], pieces[1:]
    q_prefix, q_branches = q.split([prefix, sum(branches)], 2)
    outputs = []
    if prefix:
        outputs.append(base(module, q_prefix, k[:, :, :prefix], v[:, :, :prefix], None, is_causal=True, **kwargs)[0])
    if branches:
        if (mask := cache.get((pieces, q.device))) is None:
            mask = cache[pieces, q.device] = branch_mask(pieces).to(q.device)
        outputs.append(base(module, q_branches, k, v, mask, is_causal=False, **kwargs)[0])
    return torch.cat(outputs, 1)


def branch_mask(pieces: Pieces) -> Tensor:
    """Which keys of the sequence every branch token sees: bool (1, 1, tokens of the branches, tokens)."""
    prefix, branches = pieces[0], torch.tensor(pieces[1:])
    branch = torch.arange(len(branches)).repeat_interleave(branches)
    own = branch[:, None] == branch
    causal = torch.ones_like(own).tril()
    return torch.cat([own.new_ones(len(branch), prefix), own & causal], 1)[None, None]


def _flash(
    base: Any,
    module: Any,
    q: list[Tensor],
    k: list[Tensor],
    v: list[Tensor],
    pieces: list[Pieces],
    cache: Any,
    kwargs: Any,
) -> Tensor:
    # Causal varlen attention aligns a short query with the end of its keys (flash-attn 2.1 and later): a branch is
    # then just a sequence whose keys are the prefix and itself.
    if (lengths := cache.get("flash")) is None:
        of_q = [piece for p in pieces for piece in p if piece]
        of_k = [piece + (p[0] if i else 0) for p in pieces for i, piece in enumerate(p) if piece]
        ends = (torch.tensor(list(accumulate(n, initial=0)), dtype=torch.int32) for n in (of_q, of_k))
        lengths = cache["flash"] = dict(
            zip(("cu_seq_lens_q", "cu_seq_lens_k"), (end.to(q[0].device) for end in ends)),
            max_length_q=max(of_q),
            max_length_k=max(of_k),
        )
    queries = torch.cat(q, 2)
    keys, values = (torch.cat([key for x, p in zip(xs, pieces) for key in _with_prefix(x, p)], 2) for xs in (k, v))
    return base(module, queries, keys, values, None, is_causal=True, **lengths, **kwargs)[0]


def _with_prefix(x: Tensor, pieces: Pieces) -> list[Tensor]:
    prefix, *branches = x.split(list(pieces), 2)
    return [prefix, *(part for branch in branches if branch.shape[2] for part in (prefix, branch))]
