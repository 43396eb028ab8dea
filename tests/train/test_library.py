"""Promise: three calls supervise any stock model in any loop, equal to our trainer, and a dead loss is an error."""

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from tiny import family_config, gradients, largest_difference, make_batch, make_data, tiny_config

import swim
from swim.data_tools.rle import decode_mask
from swim.train.attention import enable_checkpointing
from swim.train.families import FAMILIES
from swim.train.system import Progress, build_system

LAYERS = [1, 3]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


def build(shards, *overrides):
    system = build_system(tiny_config(shards.folder, "data.tasks=null", *overrides))
    return system, system.build_model().train()


def noun_targets(shards, batch):
    """The batch's nouns as an outsider describes them: columns, and boolean masks of every step's annotated frames."""
    found = []
    for noun in batch.nouns:
        key, _ = batch.ids[noun.conversation].split("#")
        sample = shards.read([entry.key for entry in shards.entries].index(key))
        (name,) = noun.object_ids
        steps = []
        for frames in batch.clips[noun.conversation].frames:
            known = [frame for frame in frames if frame in sample.masks[name]]
            rles = [sample.masks[name][frame] for frame in known]
            size = next(rle.size for rle in sample.masks[name].values() if rle is not None)
            steps.append([np.zeros(size, bool) if rle is None else decode_mask(rle) for rle in rles])
        found.append(swim.NounTarget(noun.conversation, noun.tokens, steps))
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"softmax_scope": "causal", "loss": "bce", "mask_side": "pixel"},
        {"softmax_scope": "full", "row_offset": -1, "subtokens": "each", "loss_mean": "unit"},
        {"subtokens": "last", "loss": "dice", "map_scale": "max"},
    ],
    ids=str,
)
def test_the_three_calls_equal_the_trainer(shards, options):
    overrides = [f"system.{name}={value}" for name, value in options.items()]
    system, model = build(shards, *overrides)
    batch = make_batch(system, shards, [0, 1, 2])
    term = system.loss(model, batch, Progress(0, 10))["mask"]
    (term.sum / batch.counts["mask"]).backward()
    want = gradients(model)
    model.zero_grad()
    each = options.get("subtokens") == "each"
    plain = make_batch(build(shards)[0], shards, [0, 1, 2]) if each or options.get("subtokens") else batch
    supervision = swim.describe(model, batch.inputs, noun_targets(shards, plain), layers=LAYERS, **options)
    assert supervision.count == batch.counts["mask"]
    model(**batch.inputs, use_cache=False, **supervision.model_kwargs)
    loss = swim.mask_loss(supervision)
    swim.assert_supervised(loss, model)
    loss.backward()
    torch.testing.assert_close(loss, term.sum / batch.counts["mask"], atol=1e-6, rtol=1e-5)
    assert largest_difference(gradients(model), want) < 1e-6


def left_padded(inputs):
    """The same batch with its padding in front, as processors pad prompts for generation."""
    mask = inputs["attention_mask"]
    lengths = mask.sum(1).tolist()
    assert len(set(lengths)) > 1, "rows must differ in length"

    def turn(values):
        rows = [torch.cat([row[n:], row[:n]]) for row, n in zip(values, lengths)]
        return torch.stack(rows)

    moved = {name: turn(inputs[name]) for name in ("input_ids", "attention_mask")}
    if "mm_token_type_ids" in inputs:
        moved["mm_token_type_ids"] = turn(inputs["mm_token_type_ids"])
    positions = inputs["position_ids"]
    moved["position_ids"] = torch.stack([turn(p) for p in positions]) if positions.ndim == 3 else turn(positions)
    return {**inputs, **moved}, [mask.shape[1] - n for n in lengths]


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("scope", ["frame", "causal", "full"])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_any_family_and_padding_equal_the_trainer(shards, model_type, scope, padding):
    """Keys need not be contiguous, and families without video_grid_thw are told their grids."""
    system = build_system(family_config(shards.folder, model_type, "data.tasks=null", f"system.softmax_scope={scope}"))
    model = system.build_model().train()
    batch = make_batch(system, shards, [0, 1], [0, 1, 5])
    term = system.loss(model, batch, Progress(0, 10))["mask"]
    nouns, inputs, shifts = noun_targets(shards, batch), batch.inputs, [0] * len(batch.ids)
    if padding == "left":
        inputs, shifts = left_padded(batch.inputs)
    moved = [replace(noun, tokens=[token + shifts[noun.row] for token in noun.tokens]) for noun in nouns]
    grids = {row: clip.grid for row, clip in enumerate(batch.clips)}
    if "video_grid_thw" not in inputs:
        with pytest.raises(ValueError, match="give grids"):
            swim.describe(model, inputs, moved, layers=system.layers)
    given = None if "video_grid_thw" in inputs else grids
    supervision = swim.describe(model.config, inputs, moved, layers=system.layers, grids=given, softmax_scope=scope)
    model(**inputs, use_cache=False, **supervision.model_kwargs)
    torch.testing.assert_close(swim.mask_loss(supervision), term.sum / batch.counts["mask"], atol=1e-5, rtol=1e-5)


def test_a_capture_is_for_one_forward_call(shards):
    system, model = build(shards)
    batch = make_batch(system, shards, [0])
    enable_checkpointing(model)
    supervision = swim.describe(model, batch.inputs, noun_targets(shards, batch), layers=LAYERS)
    model(**batch.inputs, use_cache=False, **supervision.model_kwargs)
    swim.assert_supervised(swim.mask_loss(supervision), model)
    swim.mask_loss(supervision).backward()  # read twice, and recomputed in the backward pass
    with pytest.raises(RuntimeError, match="make a new one for every forward call"):
        model(**batch.inputs, use_cache=False, **supervision.model_kwargs)


def test_a_supervision_moves_as_a_whole(shards):
    system, model = build(shards)
    batch = make_batch(system, shards, [0])
    supervision = swim.describe(
        model, batch.inputs, noun_targets(shards, batch), layers=LAYERS, softmax_scope="causal"
    ).to("meta")
    table = [value for value in vars(supervision.capture.table).values() if isinstance(value, torch.Tensor)]
    groups = [value for group in supervision.targets.groups.values() for value in vars(group).values()]
    tensors = [*table, *vars(supervision.targets).values(), *groups]
    tensors = [value for value in tensors if isinstance(value, torch.Tensor)]
    assert len(tensors) >= 8
    assert {tensor.device.type for tensor in tensors} == {"meta"}


def test_assert_supervised_tells_a_loss_that_trains_nothing(shards):
    system, model = build(shards)
    batch = make_batch(system, shards, [0])

    def mask_loss(model):
        supervision = swim.describe(model, batch.inputs, noun_targets(shards, batch), layers=LAYERS)
        model(**batch.inputs, use_cache=False, **supervision.model_kwargs)
        return swim.mask_loss(supervision)

    swim.assert_supervised(mask_loss(model), model)
    alive = mask_loss(model)
    with pytest.raises(
        AssertionError, match=r"no gradient: it would be logged.*no supervised noun.*use_reentrant.*examples/"
    ):
        swim.assert_supervised(alive.detach(), model)
    with pytest.raises(AssertionError, match=r"gradient is zero at all \d+ trained parameters"):
        swim.assert_supervised(alive * 0, model)
    with pytest.raises(AssertionError, match="gradient is not finite at"):
        swim.assert_supervised(alive * torch.inf, model)
    enable_checkpointing(model)
    swim.assert_supervised(mask_loss(model), model)
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(RuntimeError, match="carry no gradient"):
        mask_loss(model)


def test_what_does_not_fit_is_named(shards):
    system, model = build(shards)
    batch = make_batch(system, shards, [0])
    noun, *_ = noun_targets(shards, batch)
    steps, height, width = batch.clips[0].grid
    cases = {
        r"row 99 has nouns but no clip": [swim.NounTarget(99, [3], noun.masks)],
        r"masks for 1 steps, its clip has \d": [swim.NounTarget(0, noun.tokens, noun.masks[:1])],
        r"tokens up to column \d+; a noun has tokens \[5000\]": [swim.NounTarget(0, [5000], noun.masks)],
        r"its clip up to column \d+ .* a noun has tokens \[1\]": [swim.NounTarget(0, [1], noun.masks)],
        r"a noun has tokens \[\]": [swim.NounTarget(0, [], noun.masks)],
    }
    for message, nouns in cases.items():
        with pytest.raises(ValueError, match=message):
            swim.describe(model, batch.inputs, nouns, layers=LAYERS)
    with pytest.raises(ValueError, match=rf"row 0 has {steps * height * width} placeholder tokens, its grid is 9x"):
        swim.describe(model, batch.inputs, [noun], layers=LAYERS, grids={0: (9, height, width)})
    with pytest.raises(ValueError, match="softmax_scope"):
        swim.describe(model, batch.inputs, [noun], layers=LAYERS, softmax_scope="video")
    with pytest.raises(ValueError, match="mask_weight: not an option here"):
        swim.describe(model, batch.inputs, [noun], layers=LAYERS, mask_weight=0.5)


def test_the_library_imports_no_deepspeed():
    code = (
        "import sys, swim; assert 'torch' not in sys.modules;"
        "swim.register_capture, swim.describe, swim.mask_loss, swim.assert_supervised;"
        "assert 'torch' in sys.modules; found = [m for m in sys.modules if m.split('.')[0] == 'deepspeed'];"
        "assert not found, found"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
