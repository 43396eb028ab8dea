"""Noun rows computed in several ways, all with the same maps and gradients, and the least work that they are.

Shape suffixes as in kernels/noun_attention.py; M = G * N rows that share a kv head.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.measure import Work
from swim.kernels.noun_attention import SPLIT_KEYS, ClipKeys, Row, WorkTable, build_work_table, noun_attention


class Case(NamedTuple):
    """Rows of text that stand behind `segments` softmaxes of equal size; the sizes of Qwen2.5-VL-7B."""

    rows: int
    segments: int
    keys: int
    text: int = 512
    heads: int = 28
    kv_heads: int = 4
    dim: int = 128

    @property
    def length(self) -> int:
        return self.keys + self.text

    @property
    def positions(self) -> list[int]:
        return [self.length - self.rows - 1 + n for n in range(self.rows)]

    def table(self) -> WorkTable:
        # As one row of cells for each step: noun attention knows no height and width.
        rows, grid = [Row(0, position) for position in self.positions], (self.segments, 1, self.keys // self.segments)
        return build_work_table(rows, [ClipKeys(0, 0, grid)], "frame" if self.segments > 1 else "clip")

    def works(self) -> tuple[Work, ...]:
        """Forward: keys and rows read once, the map written. Backward: keys, rows and the map's gradient read,
        gradients written in full size, as autograd takes them; scores once more (no map of a single head is kept), dq,
        dk."""
        scores = self.heads * self.rows * self.keys
        moved = 2 * self.dim * (self.keys * self.kv_heads + self.rows * self.heads) + 4 * self.rows * self.keys
        return (
            Work(moved, 2 * scores * self.dim, scores),
            Work(moved + self.gradient_bytes(), 6 * scores * self.dim, scores),
        )

    def gradient_bytes(self) -> int:
        """Of q and k in full size, 2 bytes an element."""
        return 2 * self.length * (self.heads + self.kv_heads) * self.dim

    def launches(self) -> int:
        """Kernels of the Triton way, forward and backward, with the zeros that both gradients start from."""
        return 6 if self.keys // self.segments <= SPLIT_KEYS else 8


class Problem(NamedTuple):
    case: Case
    q: Tensor  # (1, H, L, D)
    k: Tensor  # (1, K, L, D)
    table: WorkTable
    positions: Tensor
    gradient: Tensor  # of the loss at the flat map

    @property
    def scale(self) -> float:
        return self.case.dim**-0.5

    def double(self) -> "Problem":
        q, k = (x.detach().double().requires_grad_() for x in (self.q, self.k))
        return self._replace(q=q, k=k, gradient=self.gradient.double())


def problem(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> Problem:
    """Random inputs, laid out in memory as a model has them: (1, L, heads, D)."""
    generator = torch.Generator(device).manual_seed(0)
    q, k = (
        torch.randn(1, case.length, heads, case.dim, generator=generator, device=device, dtype=dtype)
        for heads in (case.heads, case.kv_heads)
    )
    q, k = (x.transpose(1, 2).requires_grad_() for x in (q, k))
    gradient = torch.randn(case.rows * case.keys, generator=generator, device=device)
    positions = torch.tensor(case.positions, device=device)
    return Problem(case, q, k, case.table().to(device), positions, gradient)


def operator(p: Problem, backend: str = "torch") -> Tensor:
    return noun_attention(p.q, p.k, p.table, scale=p.scale, backend=backend)  # type: ignore[arg-type]


def gather(p: Problem) -> Tensor:
    """What one writes first: rows and keys picked, keys repeated for every query head, all in the inputs' type."""
    rows = p.q[:, :, p.positions]
    keys = _repeated(p.k[:, :, : p.case.keys], p)
    scores = rows @ keys.mT * p.scale
    weights = scores.unflatten(-1, (p.case.segments, -1)).softmax(-1, dtype=torch.float32)
    return weights.mean(1).flatten()


def grouped(p: Problem) -> Tensor:
    """`gather` without the repeated keys: the rows of all query heads of a kv head side by side."""
    rows_KMD = p.q[0, :, p.positions].reshape(p.case.kv_heads, -1, p.case.dim)
    scores = rows_KMD @ p.k[0, :, : p.case.keys].mT * p.scale
    weights = scores.unflatten(-1, (p.case.segments, -1)).softmax(-1, dtype=torch.float32)
    return weights.view(p.case.heads, -1).mean(0)


def identity_sdpa(p: Problem) -> Tensor:
    """Attention whose values are columns of the identity, `dim` of them in a pass: its output is the weights."""
    segments, dim = p.case.segments, p.case.dim
    size = p.case.keys // segments
    q = p.q[:, :, p.positions].expand(segments, -1, -1, -1)
    k = p.k[0, :, : p.case.keys].unflatten(1, (segments, size)).transpose(0, 1)
    # Every block of the identity's columns is a view of this one.
    ones = torch.zeros(2 * size + dim, dim, dtype=q.dtype, device=q.device)
    ones[size : size + dim] = torch.eye(dim, dtype=q.dtype, device=q.device)
    parts = []
    for first in range(0, size, dim):
        v = ones[size - first : 2 * size - first].expand(segments, p.case.kv_heads, -1, -1)
        out = scaled_dot_product_attention(q, k, v, scale=p.scale, enable_gqa=True)
        parts.append(out.float().mean(1))
    return torch.cat(parts, -1)[..., :size].transpose(0, 1).flatten()


def eager(p: Problem) -> Tensor:
    """All rows of the attention matrix, as `output_attentions` has them."""
    scores = p.q @ _repeated(p.k, p).mT * p.scale
    weights = (scores + torch.full((p.case.length, p.case.length), -torch.inf).triu(1)).softmax(-1)
    return _frames(weights[0, :, p.positions], p)


def all_text_rows(p: Problem, *, layers: int, supervised: int) -> list[Tensor]:
    """The release's way (HumanMLLM/SWIM, 1b97d22): all text rows in all layers, kept for every head; the loss reads a
    few of them."""
    kept = [
        (p.q[:, :, p.case.keys :] @ _repeated(p.k, p).mT * p.scale).softmax(-1)[..., : p.case.keys].contiguous()
        for _ in range(layers)
    ]
    return [_frames(weights[0, :, p.positions - p.case.keys], p) for weights in kept[:supervised]]


def _repeated(k: Tensor, p: Problem) -> Tensor:
    return k.repeat_interleave(p.case.heads // p.case.kv_heads, 1)


def _frames(weights: Tensor, p: Problem) -> Tensor:
    """Softmax rows over all keys to the frame scope: each frame's visual keys renormalised."""
    visual = weights[..., : p.case.keys].unflatten(-1, (p.case.segments, -1))
    return (visual / visual.sum(-1, keepdim=True)).flatten(-2).mean(0).flatten()


Way = Callable[[Problem], Tensor]
# What a GPU compares; the first needs Triton.
GPU_WAYS: dict[str, Way] = {
    "triton": partial(operator, backend="triton"),
    "torch": operator,
    "gather": gather,
    "grouped": grouped,
    "identity SDPA": identity_sdpa,
}


def values_and_gradients(way: Callable[[Problem], Tensor | list[Tensor]], p: Problem) -> tuple[Tensor, ...]:
    """The map, dq and dk; of a list of maps, the first and the gradients of their sum."""
    maps = way(p)
    maps = maps if isinstance(maps, list) else [maps]
    return maps[0].detach(), *torch.autograd.grad(maps, (p.q, p.k), [p.gradient] * len(maps))
