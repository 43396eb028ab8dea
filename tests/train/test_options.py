"""Promise: every option of the objective is its formula, in value and gradient; what no formula fits is refused; no map
makes a number that is not finite; every recipe is complete."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from processes import ROOT
from torch import Tensor

from swim.data_tools.records import Masks, Rle
from swim.data_tools.rle import encode_mask
from swim.train.config import ConfigError, engine_file, load_config
from swim.train.systems.swim.config import Config, resolve_layers
from swim.train.systems.swim.objective import mask_term
from swim.train.systems.swim.targets import Targets, build_targets, step_coverages, step_masks

LAYERS = (2, 5, 9)


# ---- nouns made by hand


@dataclass
class Noun:
    """A noun with its clip: tokens, cells (h, w), stored frames of every step, masks of its objects by frame."""

    num_tokens: int
    grid: tuple[int, int]
    steps: list[list[int]]
    objects: dict[str, dict[int, np.ndarray | None]]

    @property
    def num_cells(self) -> int:
        return len(self.steps) * self.grid[0] * self.grid[1]


def blob(seed: int, size: tuple[int, int]) -> np.ndarray:
    mask = np.random.default_rng(seed).random(size) > 0.6
    mask[0, 0] = True
    return mask


# Three tokens; a step of two masks of different sizes, one half annotated and half absent, one not annotated, one whose
# second frame repeats its first, one absent. One token, a union of two objects. One never seen. One never annotated.
# One whose frames share grid and sizes with the first noun's, but not their weight.
NOUNS = [
    Noun(
        3,
        (2, 3),
        [[0, 1], [2, 3], [4, 5], [6, 6], [7, 8]],
        {
            "a": {
                0: blob(0, (6, 9)), 1: blob(1, (8, 6)), 2: None, 3: blob(2, (6, 9)), 6: blob(3, (6, 9)),
                7: None, 8: np.zeros((6, 9), bool),
            }
        },
    ),
    Noun(
        1,
        (3, 2),
        [[0, 3], [5, 7]],
        {
            "b": {0: blob(4, (6, 4)), 3: blob(5, (6, 4)), 5: None, 7: blob(6, (9, 6))},
            "c": {0: blob(7, (6, 4)), 5: blob(8, (6, 4)), 7: None},
        },
    ),
    Noun(2, (2, 2), [[0, 1], [2, 3]], {"d": {0: None, 1: None, 3: None}}),
    Noun(1, (2, 3), [[0, 1]], {"e": {9: blob(9, (6, 9))}}),
    Noun(1, (2, 3), [[0, 1], [2, 3]], {"f": {0: blob(10, (6, 9)), 1: blob(11, (8, 6))}}),
]  # fmt: skip


def row_maps(seed: int, floor: float = 0.0, dtype: torch.dtype = torch.float64) -> dict[int, Tensor]:
    """Per layer the flat maps of all rows: positive, of uneven size, none near 1."""
    generator = torch.Generator().manual_seed(seed)
    total = sum(noun.num_tokens * noun.num_cells for noun in NOUNS)
    maps = {layer: 0.9 * torch.rand(total, generator=generator, dtype=dtype) ** 3 + floor for layer in LAYERS}
    return {layer: flat.requires_grad_() for layer, flat in maps.items()}


def facts(config: Config, nouns: list[Noun] = NOUNS) -> tuple[list[int], list[int], Targets, dict[str, float]]:
    """What a batch hands to the objective: row sizes, tokens per noun, targets and counts."""
    coverages, masks = [], []
    for noun in nouns:
        rles: Masks = {
            name: {f: None if m is None else Rle(**encode_mask(m)) for f, m in frames.items()}
            for name, frames in noun.objects.items()
        }
        names = list(rles)
        coverages += step_coverages([names], rles, noun.steps, noun.grid)
        masks.append([step_masks(names, rles, frames, noun.grid) for frames in noun.steps])
    pixels = masks if config.mask_side == "pixel" else None
    targets, counts = build_targets(coverages, [noun.grid for noun in nouns], config, masks=pixels)
    row_sizes = [noun.num_cells for noun in nouns for _ in range(noun.num_tokens)]
    return row_sizes, [noun.num_tokens for noun in nouns], targets, counts


# ---- the restatement: loops over rows, layers, frames and cells


def fused_cells(maps: dict[int, Tensor], first: int, noun: Noun, config: Config) -> list[Tensor]:
    cells = []
    for cell in range(noun.num_cells):
        of_layers = []
        for flat in maps.values():
            tokens = [flat[first + token * noun.num_cells + cell] for token in range(noun.num_tokens)]
            of_layers.append(sum(tokens) / len(tokens))
        fused = of_layers[0]
        for value in of_layers[1:]:
            if config.layer_fusion == "product":
                fused = fused * value
            elif config.layer_fusion == "max":
                fused = value if value > fused else fused
            else:
                fused = fused + value
        cells.append(fused / len(of_layers) if config.layer_fusion == "mean" else fused)
    if config.fused_norm == "clip":
        total = sum(cells)
        cells = [cell / total for cell in cells]
    return cells


def scaled_step(cells: list[Tensor], config: Config) -> list[Tensor]:
    low, high = min(cells), max(cells)
    if config.map_scale == "minmax":
        return [(cell - low) / (high - low) for cell in cells]
    return [cell / high for cell in cells] if config.map_scale == "max" else cells


def pixel_value(cells: list[Tensor], grid: tuple[int, int], size: tuple[int, int], y: int, x: int) -> Tensor:
    """Bilinear, corners not aligned: cell centres lie at (i + 1/2) of a cell's height."""
    (height, width), places = grid, []
    for pixel, num_in, num_out in ((y, height, size[0]), (x, width, size[1])):
        at = min(max((pixel + 0.5) * num_in / num_out - 0.5, 0), num_in - 1)
        low = int(at)
        places.append([(low, 1 - (at - low)), (min(low + 1, num_in - 1), at - low)])
    return sum(cells[i * width + j] * (a * b) for i, a in places[0] for j, b in places[1])


def frames_of(cells: list[Tensor], noun: Noun, config: Config) -> Iterator[tuple[list[Tensor], list[float]]]:
    """Map and target of every annotated step, or of every annotated frame on the pixel side."""
    height, width = noun.grid
    for step, frames in enumerate(noun.steps):
        own = scaled_step(cells[step * height * width : (step + 1) * height * width], config)
        seen: list[np.ndarray] = []
        for frame in sorted(set(frames)):
            if all(frame in masks for masks in noun.objects.values()):
                present = [m for masks in noun.objects.values() if (m := masks[frame]) is not None]
                sizes = [m.shape for masks in noun.objects.values() for m in masks.values() if m is not None]
                seen.append(np.any(present, axis=0) if present else np.zeros(sizes[0] if sizes else noun.grid, bool))
        if config.mask_side == "pixel":
            for mask in seen:
                points = list(itertools.product(*map(range, mask.shape)))
                yield [pixel_value(own, noun.grid, mask.shape, *p) for p in points], [float(mask[p]) for p in points]
        elif seen:
            shares = []
            for i, j in itertools.product(range(height), range(width)):
                blocks = [np.array_split(np.array_split(m, height, 0)[i], width, 1)[j] for m in seen]
                shares.append(float(np.mean([block.mean() for block in blocks])))
            yield own, shares


def unit_loss(m: list[Tensor], c: list[float], kind: str) -> Tensor:
    cells = range(len(m))
    if kind == "kl":
        total, mass = sum(c), sum(m)
        return sum(c[j] / total * (np.log(c[j] / total) - (m[j] / mass).log()) for j in cells if c[j] > 0)
    if kind in ("dice", "iou"):
        both = sum(m[j] * c[j] for j in cells)
        either = sum(m) + sum(c)
        return 1 - 2 * both / either if kind == "dice" else 1 - both / (either - both)
    total = 0.0
    for j in cells:
        # The two documented clamps: scaled maps contain exact zeros and ones.
        log_m, log_rest = m[j].clamp(min=1e-30).log(), (1 - m[j]).clamp(min=2.0**-20).log()
        if kind == "bce":
            total = total - c[j] * log_m - (1 - c[j]) * log_rest
        else:
            total = total - c[j] * 0.25 * (1 - m[j]) ** 2 * log_m - (1 - c[j]) * 0.75 * m[j] ** 2 * log_rest
    return total / len(m)


def restated(maps: dict[int, Tensor], config: Config) -> Tensor:
    """Mean mask loss over the nouns, or units, that carry one."""
    wide = config.softmax_scope != "frame"
    first, nouns, all_units = 0, [], []
    for noun in NOUNS:
        frames = list(frames_of(fused_cells(maps, first, noun, config), noun, config))
        first += noun.num_tokens * noun.num_cells
        shown = [frame for frame in frames if any(frame[1])]
        absent_too = wide and config.map_scale == "none" and config.loss not in ("dice", "iou")
        judged = frames if absent_too else shown
        if config.loss == "kl" and wide:
            joined = [m for cells, _ in judged for m in cells], [c for _, target in judged for c in target]
            judged = [joined] if shown else []
        losses = [unit_loss(m, c, config.loss) for m, c in judged]
        all_units += losses
        if losses:
            nouns.append(sum(losses) / len(losses))
    return sum(all_units) / len(all_units) if config.loss_mean == "unit" else sum(nouns) / len(nouns)


def recipe_options(name: str) -> dict[str, Any]:
    fields = load_config(name).system
    return {key: value for key, value in fields.items() if key not in ("name", "layers")}


BCE = {"loss": "bce"}
OPTIONS = [
    {},
    *[{"softmax_scope": scope} for scope in ("clip", "causal", "full")],
    *[{"layer_fusion": fusion} for fusion in ("sum", "max", "product")],
    {"layer_fusion": "max", **BCE},
    {"layer_fusion": "product", "softmax_scope": "clip"},
    {"fused_norm": "clip", **BCE},
    *[{"fused_norm": "clip", "layer_fusion": fusion, **BCE} for fusion in ("sum", "product")],
    {"map_scale": "max"},
    {"map_scale": "max", "softmax_scope": "clip"},
    *[{"map_scale": scale, **BCE} for scale in ("max", "minmax")],
    {"map_scale": "minmax", "layer_fusion": "product", "loss": "iou"},
    {"mask_side": "pixel"},
    {"mask_side": "pixel", "softmax_scope": "clip"},
    {"mask_side": "pixel", "softmax_scope": "clip", "layer_fusion": "product"},
    *[{"loss": kind} for kind in ("bce", "dice", "focal", "iou")],
    *[{"loss": kind, "softmax_scope": "clip"} for kind in ("bce", "dice", "focal", "iou")],
    *[{"loss": kind, "mask_side": "pixel", "map_scale": "minmax"} for kind in ("bce", "dice", "focal", "iou")],
    {"loss": "bce", "mask_side": "pixel", "softmax_scope": "full"},
    {"loss_mean": "unit"},
    {"loss_mean": "unit", "softmax_scope": "clip"},
    {"loss_mean": "unit", **BCE},
    pytest.param(recipe_options("swim_7b"), id="swim_7b"),
    pytest.param(recipe_options("swim_7b_paper"), id="swim_7b_paper"),
    pytest.param(recipe_options("swim_7b_release"), id="swim_7b_release"),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()) or "default")
def test_value_and_gradient_equal_the_restatement(options):
    config = Config(layers=list(LAYERS), **options)
    maps = row_maps(0)
    row_sizes, tokens, targets, counts = facts(config)
    got = mask_term(maps, row_sizes, tokens, targets, config) / counts["mask"]
    want = restated(maps, config)
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-6)
    got_grads = torch.autograd.grad(got, list(maps.values()))
    want_grads = torch.autograd.grad(want, list(maps.values()))
    assert all(grad.abs().max() > 1e-4 for grad in want_grads), "every layer must be moved"
    for one, other in zip(got_grads, want_grads):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-6)


def test_the_options_differ_on_these_nouns():
    """The comparison above would not see an option that changes nothing: no two of these agree."""
    maps = row_maps(0)
    singles = [option for option in OPTIONS if isinstance(option, dict)]
    # Three scopes differ in the maps alone; absent steps say nothing to dice and iou in any scope; a factor is nothing
    # to kl and to normalised maps; and here every noun has one unit of wide kl.
    same = [{"softmax_scope": "causal"}, {"softmax_scope": "full"}, {"map_scale": "max"}, {"layer_fusion": "sum"}]
    same += [{"loss": kind, "softmax_scope": "clip"} for kind in ("dice", "iou")]
    same += [{"fused_norm": "clip", "layer_fusion": "sum", **BCE}, {"loss_mean": "unit", "softmax_scope": "clip"}]
    values = {}
    for option in (option for option in singles if option not in same):
        config = Config(layers=list(LAYERS), **option)
        row_sizes, tokens, targets, counts = facts(config)
        loss = mask_term(maps, row_sizes, tokens, targets, config) / counts["mask"]
        values["-".join(option.values())] = loss.item()
    ordered = sorted(values.items(), key=lambda item: item[1])
    for (name, low), (other, high) in itertools.pairwise(ordered):
        assert high - low > 1e-5, f"{name} and {other} give the same value"


# ---- numbers


def valid_configs() -> Iterator[Config]:
    names = ("layer_fusion", "fused_norm", "map_scale", "mask_side", "loss", "softmax_scope")
    choices = [
        ("mean", "sum", "max", "product"),
        ("none", "clip"),
        ("none", "minmax", "max"),
        ("grid", "pixel"),
        ("kl", "bce", "dice", "focal", "iou"),
        ("frame", "clip"),
    ]
    for values in itertools.product(*choices):
        try:
            yield Config(layers=list(LAYERS), **dict(zip(names, values)))
        except ValueError:
            continue


@pytest.mark.parametrize("content", ["constant", "zero", "one", "tiny", "one hot"])
def test_no_map_makes_a_number_that_is_not_finite(content):
    total = sum(noun.num_tokens * noun.num_cells for noun in NOUNS)
    values = {"constant": 1 / 6, "zero": 0.0, "one": 1.0, "tiny": 1e-38, "one hot": 0.0}
    flat = torch.full((total,), values[content])
    if content == "one hot":
        flat[::6] = 1.0
    configs = list(valid_configs())
    assert len(configs) > 200
    for config in configs:
        maps = {layer: flat.clone().requires_grad_() for layer in LAYERS}
        row_sizes, tokens, targets, _ = facts(config)
        loss = mask_term(maps, row_sizes, tokens, targets, config)
        grads = torch.autograd.grad(loss, list(maps.values()))
        assert torch.isfinite(loss), config
        assert all(torch.isfinite(grad).all() for grad in grads), config


def test_a_product_of_layers_never_underflows():
    """Maps of 1e-8 in six layers multiply to 1e-48, which fp32 has not got: values and gradients are those of fp64."""
    generator = torch.Generator().manual_seed(1)
    total = sum(noun.num_tokens * noun.num_cells for noun in NOUNS)
    exact = {layer: 1e-8 * (torch.rand(total, generator=generator, dtype=torch.float64) + 0.1) for layer in range(6)}
    for options in ({}, {"softmax_scope": "clip"}, {"mask_side": "pixel"}, {"map_scale": "minmax", **BCE}):
        config = Config(layers=list(range(6)), layer_fusion="product", **options)
        row_sizes, tokens, targets, _ = facts(config)
        losses, grads = [], []
        for dtype in (torch.float32, torch.float64):
            maps = {layer: flat.to(dtype).requires_grad_() for layer, flat in exact.items()}
            losses.append(mask_term(maps, row_sizes, tokens, targets, config))
            grads.append(torch.autograd.grad(losses[-1], maps[0])[0])
        assert losses[0].dtype == torch.float32
        torch.testing.assert_close(losses[0], losses[1].float(), rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(grads[0], grads[1].float(), rtol=1e-2, atol=1e-4 * grads[1].abs().max().item())
        assert grads[1].abs().max() > 0


def test_min_max_of_a_constant_map_is_zero_and_moves_nothing():
    config = Config(layers=list(LAYERS), map_scale="minmax", loss="bce")
    row_sizes, tokens, targets, _ = facts(config)
    total = sum(noun.num_tokens * noun.num_cells for noun in NOUNS)
    flat = {layer: torch.full((total,), 0.25).requires_grad_() for layer in LAYERS}
    loss = mask_term(flat, row_sizes, tokens, targets, config)
    assert not any(grad.any() for grad in torch.autograd.grad(loss, list(flat.values())))
    # Nor does a map that is constant but for rounding; a difference of 1e-4 of the peak does.
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(total, generator=generator)
    for size, moves in ((1e-7, False), (1e-4, True)):
        near = {layer: (0.25 + size * noise).requires_grad_() for layer in LAYERS}
        loss = mask_term(near, row_sizes, tokens, targets, config)
        assert [bool(grad.any()) for grad in torch.autograd.grad(loss, list(near.values()))] == [moves] * 3


@pytest.mark.parametrize("side", ["grid", "pixel"])
@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_kl_is_zero_at_its_target(side, scope):
    """One cell per pixel, so that the upsampled map can be the mask; both sides then have the same target."""
    mask = blob(0, (4, 5))
    noun = Noun(2, (4, 5), [[0], [1], [2]], {"a": {0: mask, 1: None, 2: ~mask}})
    config = Config(layers=[0, 1], mask_side=side, softmax_scope=scope)
    target = torch.tensor(np.concatenate([mask / mask.sum(), 0 * mask, ~mask / (~mask).sum()]).ravel())
    weight = [mask.sum(), 0, (~mask).sum()] if scope == "clip" else [1, 1, 1]
    target = target * torch.tensor(weight).repeat_interleave(20)
    maps = {layer: target.repeat(2).requires_grad_() for layer in (0, 1)}
    row_sizes, tokens, targets, _ = facts(config, [noun])
    loss = mask_term(maps, row_sizes, tokens, targets, config)
    assert abs(loss.item()) < 1e-12
    off = {layer: (flat + 0.01).detach() for layer, flat in maps.items()}
    assert mask_term(off, row_sizes, tokens, targets, config) > 1e-3


def test_no_unit_is_a_zero():
    config = Config(layers=list(LAYERS))
    nouns = [NOUNS[2], NOUNS[3]]  # never seen, never annotated
    row_sizes, tokens, targets, counts = facts(config, nouns)
    loss = mask_term({0: torch.rand(sum(row_sizes))}, row_sizes, tokens, targets, config)
    assert (loss.item(), counts["mask"]) == (0, 0)


# ---- what is refused


@pytest.mark.parametrize("fusion", ["sum", "product"])
@pytest.mark.parametrize("kind", ["bce", "dice", "focal", "iou"])
def test_a_fusion_that_is_no_probability_needs_a_scale(fusion, kind):
    with pytest.raises(ValueError, match=f"layer_fusion '{fusion}' with system.loss '{kind}' needs a scale.*map_scale"):
        Config(layers=[0], layer_fusion=fusion, loss=kind)
    for remedy in ({"map_scale": "minmax"}, {"map_scale": "max"}, {"fused_norm": "clip"}):
        assert Config(layers=[0], layer_fusion=fusion, loss=kind, **remedy).layer_fusion == fusion
    assert Config(layers=[0], layer_fusion=fusion).loss == "kl"


def test_kl_of_a_map_with_an_exact_zero_is_refused():
    with pytest.raises(ValueError, match=r"map_scale 'minmax' makes the smallest cell exactly 0.*'kl' is infinite"):
        Config(layers=[0], map_scale="minmax")


def test_a_run_that_trains_nothing_is_refused():
    with pytest.raises(ValueError, match="both 0"):
        Config(layers=[0], text_weight=0, mask_weight=0)


NO_LAYERS = ["even", "even:0", "even:-1", "first:3", "all:2", "[]", "3", "[1, x]", "[true]", "{}"]


@pytest.mark.parametrize("value", NO_LAYERS)
def test_layers_that_are_no_layers_are_named(value):
    with pytest.raises(ConfigError, match=r"system\.layers: neither a list of layer numbers nor one of 'even:N'"):
        load_config("tiny_cpu", [f"system.layers={value}"])


@pytest.mark.parametrize(
    ("rule", "num_layers", "layers"),
    [
        ("even:6", 28, (2, 7, 12, 17, 22, 27)),  # the paper's
        ("even:6", 36, (5, 11, 17, 23, 29, 35)),
        ("even:3", 4, (1, 2, 3)),
        ("even:4", 4, (0, 1, 2, 3)),
        ("even:2", 3, (0, 2)),
        ("even:1", 28, (27,)),
        ("last:3", 28, (25, 26, 27)),
        ("last:1", 1, (0,)),
        ("all", 3, (0, 1, 2)),
        ([3, 0], 4, (3, 0)),
    ],
)
def test_rules_name_layers(rule, num_layers, layers):
    assert resolve_layers(Config(layers=rule).layers, num_layers) == layers


def test_even_layers_are_even_and_end_at_the_last_for_every_depth():
    for num_layers in range(1, 81):
        for count in range(1, num_layers + 1):
            layers = resolve_layers(f"even:{count}", num_layers)
            assert len(layers) == count
            assert layers[-1] == num_layers - 1
            assert layers[0] >= 0
            assert len({b - a for a, b in itertools.pairwise(layers)}) <= 1


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ("even:5", "'even:5' wants more layers than the 4"),
        ("last:5", "'last:5' wants more layers than the 4"),
        ([1, 4], r"\[4\] are not layers of this model; it has 0 to 3"),
        ([-1], r"\[-1\] are not layers"),
        ([1, 2, 1], r"\[1\] are named more than once"),
        ("odd:2", "'odd:2' is no rule; use 'even:N'"),
    ],
)
def test_layers_a_model_has_not_got_are_named(layers, message):
    with pytest.raises(ConfigError, match=message):
        resolve_layers(layers, 4)


# ---- recipes


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_recipe_is_complete(path):
    config = load_config(path)
    assert engine_file(config).is_file()
    depth = {"Qwen/Qwen2.5-VL-7B-Instruct": 28, "Qwen/Qwen3-VL-8B-Instruct": 36, None: 4}[config.model.path]
    layers = resolve_layers(config.system["layers"], depth)
    assert len(layers) == (6 if config.model.path else 3)
    if config.model.path is not None:
        assert path.read_text().partition("run:")[0].count("Not run") == 1
        assert config.run.steps * config.data.packs_per_step * config.data.clips_per_pack >= 235_000
