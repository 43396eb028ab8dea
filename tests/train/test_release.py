"""Promise: the release recipe is the formula of the code published with arXiv 2605.18018 with its epsilons set to zero,
and those epsilons are why it is not copied: they flatten a product of maps to nothing."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from swim.data_tools.records import Masks, Rle
from swim.data_tools.rle import encode_mask
from swim.kernels.mask_loss import scale_frames
from swim.train import attention
from swim.train.attention import MODEL_KWARG
from swim.train.config import load_config
from swim.train.systems.swim.config import Config, resolve_layers
from swim.train.systems.swim.objective import fuse_layers, swim_loss
from swim.train.systems.swim.targets import build_targets, step_coverages, step_masks


def release_config() -> Config:
    system = load_config("swim_7b_release").system
    return Config(**{key: value for key, value in system.items() if key != "name"})


def release_maps(layers: list[Tensor], grid: tuple[int, int, int], eps: float) -> Tensor:
    """The release's map of one row, (T, h, w) in [0, 1]: product over layers, divided by the sum over the clip, min-max
    of every frame."""
    product = layers[0]
    for layer in layers[1:]:
        product = product * layer
    frames = (product / (product.sum() + eps)).view(grid)
    low, high = frames.amin((1, 2), keepdim=True), frames.amax((1, 2), keepdim=True)
    return (frames - low) / (high - low + eps)


def release_mask_loss(rows: list[list[Tensor]], grid, masks: list[list[list[np.ndarray]]], eps: float = 0.0) -> Tensor:
    """Mean over the pairs of a row (sub-token) and an annotated frame that shows its object."""
    pairs = []
    for layers, steps in zip(rows, masks):
        for scaled, of_step in zip(release_maps(layers, grid, eps), steps):
            for mask in of_step:
                up = nn.functional.interpolate(scaled[None, None], size=mask.shape, mode="bilinear")[0, 0]
                pairs.append(nn.functional.binary_cross_entropy(up, torch.from_numpy(mask).to(up.dtype)))
    return torch.stack(pairs).mean()


def full_softmax_rows(
    num_rows: int, num_keys: int, num_text: int, spread: float, bias: Tensor | float = 0.0
) -> dict[int, Tensor]:
    """Per layer the visual part of softmaxes over all keys, rows one behind the other; `bias` (rows, keys) on them."""
    generator = torch.Generator().manual_seed(0)
    maps = {}
    for layer in (2, 7, 12, 17, 22, 27):
        logits = spread * torch.randn(num_rows, num_keys + num_text, generator=generator, dtype=torch.float64)
        logits[:, :num_keys] += bias
        maps[layer] = logits.softmax(-1)[:, :num_keys].flatten()
    return maps


GRID = (4, 4, 5)
FRAMES = [[0, 1], [4, 5], [8, 9], [12, 13]]


def disc(row: int, column: int, size: tuple[int, int]) -> np.ndarray:
    y, x = np.mgrid[: size[0], : size[1]]
    return ((y + 0.5) / size[0] * 4 - row) ** 2 + ((x + 0.5) / size[1] * 5 - column) ** 2 < 1.7


# Two objects: one named by a word of two tokens, one by a word of one. Frames of a pair count both; others are absent.
OBJECTS: dict[str, dict[int, np.ndarray | None]] = {
    "a": {0: disc(1, 1, (24, 35)), 1: disc(1, 2, (24, 35)), 4: None, 8: disc(3, 4, (24, 35))},
    "b": {5: disc(2, 2, (31, 18)), 12: disc(2, 3, (31, 18)), 13: np.zeros((31, 18), bool)},
}
NOUNS = ["a", "a", "b"]  # `subtokens: each` makes a noun of every sub-token


def test_the_recipe_is_the_releases_formula_with_its_epsilons_at_zero(monkeypatch):
    config = release_config()
    layers = resolve_layers(config.layers, 28)
    num_cells = int(np.prod(GRID))
    rles: Masks = {
        name: {f: None if m is None else Rle(**encode_mask(m)) for f, m in frames.items()}
        for name, frames in OBJECTS.items()
    }
    steps = step_coverages([[noun] for noun in NOUNS], rles, FRAMES, GRID[1:])
    masks = [[step_masks([noun], rles, frames, GRID[1:]) for frames in FRAMES] for noun in NOUNS]
    targets, counts = build_targets(steps, [GRID[1:]] * len(NOUNS), config, masks=masks)
    assert counts["mask"] == 3 + 3 + 2, "pairs of sub-token and frame that shows the object"
    assert counts["absent_steps"] == 2

    # Attention that knows the objects a little: no pixel of a mask is then exactly 0, none outside exactly 1, where the
    # logarithms of both sides end in different clamps.
    bias = torch.tensor(np.array([[np.zeros(GRID[1:]) if c is None else c for c in of_noun] for of_noun in steps]))
    maps = full_softmax_rows(len(NOUNS), num_cells, 30, 0.2, bias.flatten(1))
    maps = {layer: flat.requires_grad_() for layer, flat in maps.items()}

    # A model whose supervised layers see these maps.
    monkeypatch.setattr(attention, "noun_attention", lambda q, *_args, **_options: maps[int(q)])
    logits = torch.randn(1, 4, 11, generator=torch.Generator().manual_seed(1))

    def model(**inputs):
        for layer in range(28):
            if layer in inputs[MODEL_KWARG].layers:
                inputs[MODEL_KWARG].observe(layer, torch.tensor(layer), torch.zeros(()), 1.0, num_kv_heads=1)
        return SimpleNamespace(logits=logits)

    batch = SimpleNamespace(
        inputs={},
        layout=None,
        label_columns=torch.arange(4),
        label_rows=torch.zeros(3, dtype=torch.int64),
        label_slots=torch.tensor([0, 1, 3]),
        labels=torch.tensor([5, 0, 9]),
        label_conversations=torch.zeros(3, dtype=torch.int64),
        table=SimpleNamespace(map_sizes=[num_cells] * len(NOUNS), num_rows=len(NOUNS)),
        nouns=[SimpleNamespace(tokens=(number,)) for number in range(len(NOUNS))],
        targets=targets,
    )
    terms, _ = swim_loss(model, batch, config, layers, measure=False)
    counts["text"] = 3.0
    got = sum(term.weight * term.sum.double() / counts[name] for name, term in terms.items())

    rows = [[maps[layer].view(len(NOUNS), -1)[row] for layer in layers] for row in range(len(NOUNS))]
    shown = [
        [[m for f in frames if (m := OBJECTS[noun].get(f)) is not None and m.any()] for frames in FRAMES]
        for noun in NOUNS
    ]
    mask = release_mask_loss(rows, GRID, shown)
    text = nn.functional.cross_entropy(logits[0, [0, 1, 3]], batch.labels)
    torch.testing.assert_close(terms["mask"].sum / counts["mask"], mask, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(got, 0.05 * text.double() + 1.0 * mask, atol=1e-6, rtol=1e-6)
    got_grads = torch.autograd.grad(got, list(maps.values()))
    want_grads = torch.autograd.grad(mask, list(maps.values()))
    for one, other in zip(got_grads, want_grads):
        assert other.abs().max() > 1e-3
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-6)


@pytest.mark.parametrize("spread", [1.0, 2.0, 3.0])
def test_the_releases_epsilons_flatten_its_map_and_ours_peaks_at_one(spread):
    """16 steps of 750 tokens, about a clip of the release: the product's sum is far below the 1e-6 added to it."""
    config, grid = release_config(), (16, 25, 30)
    num_cells = int(np.prod(grid))
    maps = full_softmax_rows(1, num_cells, 300, spread)
    rows = list(maps.values())
    exact, flattened = release_maps(rows, grid, eps=0.0), release_maps(rows, grid, eps=1e-6)
    (log_map,) = fuse_layers(maps, [num_cells], [1], config.layer_fusion)
    ours = scale_frames((log_map - log_map.logsumexp(0)).view(grid), config.map_scale).exp()
    assert torch.stack(rows).prod(0).sum() < 1e-12
    assert flattened.max() < 1e-6, "a mask of ones cannot be reached, whatever the row looks at"
    assert exact.amax((1, 2)).tolist() == pytest.approx([1.0] * 16)
    assert ours.amax((1, 2)).tolist() == pytest.approx([1.0] * 16)
    torch.testing.assert_close(ours, exact, atol=1e-9, rtol=1e-9)
    # Also in the fp32 that training uses, where the product itself underflows.
    single = {layer: flat.float() for layer, flat in maps.items()}
    (log_map,) = fuse_layers(single, [num_cells], [1], config.layer_fusion)
    ours = scale_frames((log_map - log_map.logsumexp(0)).view(grid), config.map_scale).exp()
    torch.testing.assert_close(ours, exact.float(), atol=1e-4, rtol=0)
