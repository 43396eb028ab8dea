"""Promise: every family gets what its stock processor and model would make, and supervision is exact for all."""

import json
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from tiny import family_config, gradients, largest_difference, make_data, requests
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    InternVLProcessor,
    LlavaConfig,
    LlavaOnevisionProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLProcessor,
    Qwen3VLProcessor,
)

from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.train.attention import Capture
from swim.train.batch import BatchOptions, make_batch
from swim.train.config import ConfigError, TokenizerConfig
from swim.train.families import FAMILIES, Clip, family_of
from swim.train.preprocess import CLIP, HALF, IMAGENET
from swim.train.system import Progress, Request, build_system
from swim.train.systems.swim.data import SwimBatch
from swim.train.tokenizer import adopt_family, train_tokenizer

LAYERS = (0, 2)
PROGRESS = Progress(0, 10)
LAYOUTS = {
    "shared": ("data.shared_prefix=true", "data.packed=false"),
    "packed": ("data.shared_prefix=false", "data.packed=true"),
    "packed-shared": ("data.shared_prefix=true", "data.packed=true"),
}
families = pytest.mark.parametrize("model_type", FAMILIES)
QWEN = [name for name in FAMILIES if name.startswith("qwen")]


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return make_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, shards) -> list[Request]:
    """Two clips with three questions each, and between them a record of text alone."""
    turns = [Turn(role="user", text="is a circle round ?"), Turn(role="assistant", text="yes , it is .")]
    conversation = Conversation(task="text", turns=turns)
    folder = tmp_path_factory.mktemp("text")
    with ShardWriter(folder) as writer:
        record = Record(source="test", license="CC0-1.0", media=[], objects=[], conversations=[conversation])
        writer.write("text_0", record, {}, {})
    first, second = requests(shards, [0, 1], [0, 1, 5])
    return [first, Request(ShardSet(folder).read(0), (0,)), second]


def build(shards: ShardSet, model_type: str, *overrides: str) -> Any:
    return build_system(family_config(shards.folder, model_type, "data.tasks=null", *overrides))


def clip_of(system: Any, frames: Sequence[int], *, height: int = 112, width: int = 84, fps: float = 8.0) -> Clip:
    """A clip of noise that holds the given frames of a video."""
    family = system.collator.encoder.family
    noise = np.random.default_rng(len(frames)).integers(0, 256, (len(frames), height, width, 3), dtype=np.uint8)
    pixels, grid = family.pixels(noise, min_pixels=7056, max_pixels=7056)
    step = family.frames_per_step
    of_steps = [list(frames[t * step : (t + 1) * step]) for t in range(grid[0])]
    return Clip("clip", pixels, grid, of_steps, step * (frames[-1] - frames[0]) / (len(frames) - 1) / fps, fps)


def ask(question: str, answer: str = "yes") -> Conversation:
    return Conversation(task="test", turns=[Turn(role="user", text=question), Turn(role="assistant", text=answer)])


def padded(system: Any, rows: Sequence[tuple[Conversation, Clip | None]], **options: Any) -> Any:
    encoder = system.collator.encoder
    encoded = [
        (f"clip#{i}", encoder(conversation, name="clip", clip=clip), clip)
        for i, (conversation, clip) in enumerate(rows)
    ]
    return make_batch(encoded, encoder, BatchOptions(pad_token=encoder.tokenizer.pad_token_id, **options))


# ---- supervision


def total(system: Any, model: nn.Module, batch: SwimBatch) -> Tensor:
    loss = system.loss(model, batch, PROGRESS)
    assert loss["mask"].sum > 0
    return sum(term.weight * term.sum / batch.counts[name] for name, term in loss.items())


def eager_loss_and_maps(system: Any, model: Any, batch: SwimBatch) -> tuple[Tensor, dict[int, Tensor]]:
    """The oracle: full attention matrices of separate rows, cut to each step's visual keys; losses in plain loops."""
    model.set_attn_implementation({"text_config": "eager"})
    output = model(**batch.inputs, use_cache=False, output_attentions=True)
    is_visual = batch.inputs["input_ids"] == system.collator.encoder.family.token_id
    maps: dict[int, list[Tensor]] = {layer: [] for layer in LAYERS}
    losses = []
    for noun, coverages in zip(batch.nouns, batch.coverages):
        clip = batch.clips[noun.conversation]
        visual = is_visual[noun.conversation].nonzero().flatten()[: clip.num_cells]
        of_layers = []
        for layer in LAYERS:
            weights = output.attentions[layer][noun.conversation][:, list(noun.tokens)][..., visual]
            weights = weights.unflatten(-1, (clip.grid[0], -1))
            rows = (weights / weights.sum(-1, keepdim=True)).mean(0)
            maps[layer].append(rows.flatten())
            of_layers.append(rows.mean(0))
        fused = torch.stack(of_layers).mean(0)
        shown = [(step, c) for step, c in zip(fused, coverages) if c is not None and c.any()]
        targets = [(step, torch.tensor(c, dtype=torch.float32).flatten()) for step, c in shown]
        if targets:
            kl = [nn.functional.kl_div(step.log(), c / c.sum(), reduction="sum") for step, c in targets]
            losses.append(torch.stack(kl).mean())
    assert len(losses) == batch.counts["mask"]
    logits = output.logits[batch.label_rows, batch.label_columns[batch.label_slots]]
    text = nn.functional.cross_entropy(logits, batch.labels)
    return text + torch.stack(losses).mean(), {layer: torch.cat(rows) for layer, rows in maps.items()}


@families
def test_maps_and_gradients_equal_eager_attention(shards, mixed, model_type):
    system = build(shards, model_type)
    model, oracle = system.build_model().train(), build(shards, model_type).build_model().train()
    batch = system.collator(mixed)
    assert not batch.holes
    assert len(set(batch.inputs["attention_mask"].sum(1).tolist())) > 1, "the batch must need padding"
    scattered = model_type in ("qwen3_vl", "internvl")
    assert (batch.table.key_index is not None) == scattered, "text stands between the steps of these families alone"
    capture = Capture(batch.table, LAYERS, detach=True)
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, capture=capture)
    loss, want = eager_loss_and_maps(system, oracle, batch)
    assert largest_difference(capture.maps(), {layer: flat.detach() for layer, flat in want.items()}) < 1e-5
    total(system, model, batch).backward()
    loss.backward()
    assert largest_difference(gradients(model), gradients(oracle)) < 1e-5


def outcome(system: Any, model: nn.Module, chosen: Sequence[Request]) -> dict[str, Tensor]:
    """Loss terms, the map of every noun by name, and all gradients."""
    batch = system.collator(chosen)
    assert not batch.holes
    capture = Capture(batch.table, LAYERS, layout=batch.layout, detach=True)
    found = {}
    with torch.no_grad():
        model(**batch.inputs, use_cache=False, capture=capture, logits_to_keep=1)
    owners = [f"{batch.ids[n.conversation]} {n.turn} {n.start} {i}" for n in batch.nouns for i in range(len(n.tokens))]
    for layer, flat in capture.maps().items():
        rows = flat.split(batch.table.map_sizes)
        found |= {f"{owner} layer {layer}": row for owner, row in zip(owners, rows, strict=True)}
    model.zero_grad()
    loss = total(system, model, batch)
    loss.backward()
    return found | {"loss": loss.detach()} | {f"grad {name}": grad for name, grad in gradients(model).items()}


@families
def test_every_layout_equals_separate_sequences(shards, mixed, model_type):
    separate = build(shards, model_type, "data.shared_prefix=false")
    want = outcome(separate, separate.build_model().train(), mixed)
    for layout, options in LAYOUTS.items():
        for checkpointing in (False, True):
            system = build(shards, model_type, *options, f"model.checkpointing={checkpointing}")
            got = outcome(system, system.build_model().train(), mixed)
            assert largest_difference(got, want) < 1e-5, (layout, checkpointing)


@families
def test_twenty_steps_lower_the_mask_loss(shards, model_type):
    system = build(shards, model_type, "data.shared_prefix=true")
    model = system.build_model().train()
    assert system.options.loss == "kl"
    batch = system.collator(requests(shards, [0, 1, 2, 3], [0, 1]))
    optimizer = torch.optim.AdamW(system.param_groups(model), lr=5e-3)
    losses = []
    for step in range(20):
        terms = system.loss(model, batch, Progress(step, 20))
        losses.append(terms["mask"].sum.item() / batch.counts["mask"])
        optimizer.zero_grad()
        sum(term.weight * term.sum / batch.counts[name] for name, term in terms.items()).backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0], losses


@families
def test_the_dummy_clip_runs_the_vision_tower_and_changes_no_loss(shards, model_type):
    system = build(shards, model_type)
    model = system.build_model().train()
    conversations = [ask("which way does the circle move ?", "left"), ask("describe it .", "the red circle moves up .")]
    plain = []
    for conversation in conversations:  # one by one: no padding, no vision, positions made by the model
        encoded = system.collator.encoder(conversation, name="clip", clip=None)
        logits = model(input_ids=torch.tensor(encoded.ids)[None], use_cache=False).logits[0, :-1]
        labels = torch.tensor(encoded.labels)[1:]
        plain.append(nn.functional.cross_entropy(logits, labels, reduction="none")[labels != -100])
    for packed in (False, True):
        batch = padded(system, [(c, None) for c in conversations], packed=packed)
        capture = Capture(batch.table, (), layout=batch.layout)
        logits = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns, capture=capture).logits
        got = nn.functional.cross_entropy(logits[batch.label_rows, batch.label_slots], batch.labels, reduction="none")
        torch.testing.assert_close(got, torch.cat(plain), atol=1e-5, rtol=1e-5)
        model.zero_grad(set_to_none=True)
        got.sum().backward()
        tower = {name: p for name, p in model.named_parameters() if "visual" in name or "vision_tower" in name}
        unused = {name for name, p in tower.items() if p.grad is None}
        assert tower
        # LLaVA-OneVision takes the last layer's output as it is before the tower's closing norm.
        idle = {"model.vision_tower.post_layernorm.weight", "model.vision_tower.post_layernorm.bias"}
        assert unused == (idle if model_type == "llava_onevision" else set()), "the whole tower takes part in backward"


@families
def test_an_empty_batch_runs_through_the_loss(shards, model_type):
    system = build(shards, model_type)
    model = system.build_model().train()
    terms = system.loss(model, system.collator([]), PROGRESS)
    assert {name: term.sum.item() for name, term in terms.items()} == {"text": 0.0, "mask": 0.0}
    sum(term.sum for term in terms.values()).backward()


@families
def test_predictions_are_greedy_answers_and_maps(shards, model_type, monkeypatch):
    """What `generate` says equals a plain loop over full forward passes at the family's own positions."""
    system = build(shards, model_type)
    model = system.build_model().eval()
    generate, made = model.generate, []
    monkeypatch.setattr(model, "generate", lambda **inputs: made.append(generate(**inputs)) or made[-1])
    (request,) = requests(shards, [0], [0, 1, 5])
    predictions = system.predict(model, request)
    assert len(predictions) == 3
    for line in predictions:
        assert isinstance(line["answer"], str)
        assert line["nouns"]
        for noun in line["nouns"]:
            steps = torch.tensor(noun["map"]).flatten(1).sum(1)
            assert len(steps) == noun["grid"][0] == len(noun["frames"])
            torch.testing.assert_close(steps, torch.ones_like(steps))
    family = system.collator.encoder.family
    conversations, _ = system.collator.encode(request)
    longest = max(e.answer_start for _, e, _ in conversations)
    for (_, e, clip), answer in zip(conversations, made[0][:, longest : longest + 4]):
        ids, types = e.ids[: e.answer_start], e.types[: e.answer_start]
        for token in answer.tolist():
            inputs = family.inputs([clip], torch.tensor(types)[None])
            positions = torch.tensor(family.positions(types, clip))
            positions = positions[:, None] if len(positions) > 1 else positions
            with torch.no_grad():
                logits = model(
                    input_ids=torch.tensor(ids)[None], position_ids=positions, use_cache=False, **inputs
                ).logits
            assert logits[0, -1].argmax() == token
            ids, types = np.append(ids, token), np.append(types, 0)


# ---- what the model gets


def stock_replacement(model_type: str, clip: Clip, frames: list[int]) -> str:
    """What the stock processor of the family writes in place of a video."""
    steps, height, width = clip.grid
    grid = {"video_grid_thw": torch.tensor([[steps, 2 * height, 2 * width]])}
    vision = SimpleNamespace(merge_size=2, temporal_patch_size=2)
    tokens = {
        "video_token": "<|video_pad|>",
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
    }
    match model_type:
        case "qwen2_vl":
            return Qwen2VLProcessor.replace_video_token(SimpleNamespace(video_processor=vision, **tokens), grid, 0)
        case "qwen2_5_vl":
            return Qwen2_5_VLProcessor.replace_video_token(SimpleNamespace(video_processor=vision, **tokens), grid, 0)
        case "qwen3_vl":
            times = Qwen3VLProcessor._calculate_timestamps
            processor = SimpleNamespace(
                video_processor=vision, _calculate_timestamps=lambda *given: times(None, *given), **tokens
            )
            metadata = SimpleNamespace(fps=clip.fps, frames_indices=list(frames))
            return Qwen3VLProcessor.replace_video_token(processor, {**grid, "video_metadata": [metadata]}, 0)
        case "llava_onevision":
            processor = SimpleNamespace(video_token="<video>", num_image_tokens=81)
            return LlavaOnevisionProcessor.replace_video_token(processor, {"pixel_values_videos": [clip.pixels]}, 0)
    processor = SimpleNamespace(
        start_image_token="<img>", end_image_token="</img>", image_token="<IMG_CONTEXT>", image_seq_length=16
    )
    return InternVLProcessor.replace_video_token(processor, {"pixel_values_videos": [clip.pixels]}, 0)


@families
@pytest.mark.parametrize("frames", [[0, 3, 5, 7], [1, 2, 4, 6, 9, 30]], ids=len)
def test_tokens_equal_the_stock_template_and_processor(shards, model_type, frames):
    system = build(shards, model_type)
    tokenizer, clip = system.tokenizer, clip_of(system, frames, fps=3.0)
    question = "which way does the circle move ?"
    messages = [
        {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": question}]},
        {"role": "assistant", "content": [{"type": "text", "text": "left"}]},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    placeholder = "<|video_pad|>" if model_type in QWEN else "<video>"
    before, after = rendered.split(placeholder)
    want = tokenizer(before + stock_replacement(model_type, clip, frames) + after, add_special_tokens=False).input_ids
    encoded = system.collator.encoder(ask(question, "left"), name="clip", clip=clip)
    assert encoded.ids.tolist() == want
    assert (encoded.ids[encoded.types == 2] == system.collator.encoder.family.token_id).all()
    assert (encoded.types == 2).sum() == clip.num_cells + (model_type == "llava_onevision")
    assert tokenizer.decode(encoded.ids[encoded.prefix :]).lstrip("\n").startswith(question), "the prefix is the clip"


@pytest.mark.parametrize("model_type", ["qwen3_vl"])
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frames=st.lists(st.integers(0, 5000), min_size=1, max_size=9, unique=True).map(sorted),
    fps=st.sampled_from([1.0, 5.0, 8.0, 12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 60.0]),
)
@example(frames=[1, 2, 4], fps=30.0)
@example(frames=[3, 6], fps=30.0)  # 0.15 s: the mean of the times rounds up, the time of the mean frame down
def test_timestamps_equal_the_stock_processors(qwen3, model_type, frames, fps):
    steps = [frames[i : i + 2] for i in range(0, len(frames), 2)]
    clip = Clip("clip", torch.empty(0), (len(steps), 1, 1), steps, 1.0, fps)
    assert qwen3.text(clip) == stock_replacement(model_type, clip, frames)


@pytest.fixture(scope="module")
def qwen3(shards):
    return build(shards, "qwen3_vl").collator.encoder.family


@families
def test_positions_equal_the_models_own(shards, model_type):
    """Text before and after clips of several lengths and shapes, in rows of different length."""
    system = build(shards, model_type)
    shapes = [([0, 1, 2], 112, 84), ([0, 2, 4, 6, 9, 11], 60, 200), ([3, 5], 150, 90)]
    if model_type == "llava_onevision":  # its clips are one tensor: as many frames in each
        shapes = [(frames[:2], height, width) for frames, height, width in shapes]
    clips = [clip_of(system, frames, height=height, width=width) for frames, height, width in shapes]
    batch = padded(
        system, [(ask("is it there ? " * (1 + i)), clip) for i, clip in enumerate(clips)], shared_prefix=False
    )
    inputs, mask = batch.inputs, batch.inputs["attention_mask"].bool()
    assert not mask.all(), "the batch must need padding"
    if model_type not in QWEN:
        assert torch.equal(inputs["position_ids"][mask], (mask.cumsum(1) - 1)[mask])
        return
    names = {"input_ids", "mm_token_type_ids", "video_grid_thw", "attention_mask", "second_per_grid_ts"}
    model = system.build_model()
    want, _ = model.model.get_rope_index(**{name: inputs[name] for name in names & inputs.keys()})
    assert torch.equal(inputs["position_ids"][:, mask], want[:, mask])


@families
def test_a_visual_token_is_the_place_its_key_says(shards, model_type):
    """A light in one cell of one step changes that key of the clip alone, once patches no longer attend to others."""
    system = build(shards, model_type)
    model, family = system.build_model().eval(), system.collator.encoder.family
    with torch.no_grad():
        mixing = ("attn.proj.weight", "self_attn.out_proj.weight", "attention.projection_layer.weight")
        silenced = [p.zero_() for name, p in model.named_parameters() if name.endswith(mixing)]
    assert len(silenced) == 2, "one for each layer of the tower"
    seen = []
    model.model.language_model.register_forward_pre_hook(
        lambda _module, _args, kwargs: seen.append(kwargs["inputs_embeds"][0]), with_kwargs=True
    )
    side = {"llava_onevision": 63, "internvl": 56}.get(model_type, 84)  # as large as the model wants it: no resize

    def features(lit: tuple[int, int, int] | None) -> tuple[Tensor, tuple[int, int, int]]:
        frames = np.zeros((4, side, side, 3), dtype=np.uint8)
        if lit:
            t, row, column = (lit[0] * family.frames_per_step, 14 * lit[1], 14 * lit[2])
            frames[t : t + family.frames_per_step, row : row + 7, column : column + 7] = 255
        pixels, grid = family.pixels(frames, min_pixels=side**2, max_pixels=side**2)
        steps = [[0] * family.frames_per_step] * grid[0]
        batch = padded(system, [(ask("?"), Clip("clip", pixels, grid, steps, 1.0, 8.0))], scope="full")
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
        visual = batch.inputs["input_ids"][0] == family.token_id
        return seen.pop()[visual][: grid[0] * grid[1] * grid[2]], grid

    dark, (steps, height, width) = features(None)
    for place in [(0, 0, 0), (0, 1, 2), (1, 2, 1), (steps - 1, height - 1, 0), (steps - 1, height - 1, width - 1)]:
        changed = (features(place)[0] - dark).abs().amax(-1) > 1e-5
        t, row, column = place
        assert changed.nonzero().flatten().tolist() == [(t * height + row) * width + column], place


# ---- processor files and refusals


def stored(folder: Any, config: Any, processor: dict[str, Any]) -> Any:
    """The config as it comes from a model's folder with a processor file."""
    config.save_pretrained(folder)
    (folder / "video_preprocessor_config.json").write_text(json.dumps(processor))
    return AutoConfig.from_pretrained(folder)


def colours(family: Any) -> Any:
    return (
        family.normalisation
        if hasattr(family, "normalisation")
        else (family.geometry.image_mean, family.geometry.image_std)
    )


@families
def test_a_saved_model_is_the_same_from_its_folder(shards, mixed, model_type, tmp_path):
    system = build(shards, model_type)
    model = system.build_model()
    model.save_pretrained(tmp_path)
    system.tokenizer.save_pretrained(tmp_path)
    source = (f"model.path={tmp_path}", "model.config=null", "model.tokenizer=null")
    again = build_system(family_config(shards.folder, model_type, "data.tasks=null", *source))
    batch, other = system.collator(mixed), again.collator(mixed)
    assert largest_difference(batch.inputs, other.inputs) == 0
    assert float(abs(total(system, model, batch) - total(again, again.build_model(), other)).detach()) < 1e-6


@families
def test_colours_are_those_of_the_processor_file_else_the_familys(shards, model_type, tmp_path):
    system = build(shards, model_type)
    default = {"qwen3_vl": HALF, "internvl": IMAGENET}.get(model_type, CLIP)
    assert colours(system.collator.encoder.family) == default
    given = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 3, "do_normalize": True}
    config = stored(tmp_path, system.model_config, given)
    assert colours(family_of(config, system.tokenizer)) == ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))


@families
@pytest.mark.parametrize(
    ("processor", "message"),
    [
        ({"resample": 2}, "resample 2; only 3 is implemented"),
        ({"do_normalize": False}, "do_normalize False; only True"),
        ({"do_center_crop": True}, "do_center_crop True; only False"),
        ({"image_mean": [0.5]}, r"image_mean \[0.5\] .* need three values"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_processor_that_prepares_frames_otherwise_is_refused(shards, model_type, tmp_path, processor, message):
    system = build(shards, model_type)
    config = stored(tmp_path, system.model_config, processor)
    with pytest.raises(ValueError, match=message):
        family_of(config, system.tokenizer)


@pytest.mark.parametrize("model_type", ["llava_onevision", "internvl"])
def test_a_processor_of_another_size_than_the_tower_is_refused(shards, model_type, tmp_path):
    system = build(shards, model_type)
    side = system.collator.encoder.family.side
    good = stored(tmp_path, system.model_config, {"size": {"height": side, "width": side}})
    assert family_of(good, system.tokenizer).side == side
    bad = stored(tmp_path, system.model_config, {"size": {"height": 384, "width": 384}})
    with pytest.raises(ValueError, match=f"frames of 384x384 pixels, its vision_config.image_size is {side}"):
        family_of(bad, system.tokenizer)


def test_an_unknown_model_type_is_refused_with_the_known_ones(shards):
    known = "there are: qwen2_vl, qwen2_5_vl, qwen3_vl, llava_onevision, internvl"
    tokenizer = train_tokenizer(TokenizerConfig())
    with pytest.raises(ValueError, match=f"model_type 'llava' has no family adapter; {known}"):
        family_of(LlavaConfig(), tokenizer)
    with pytest.raises(ConfigError, match=f"model.config.model_type: 'qwen4_vl' has no family adapter; {known}"):
        build(shards, "qwen2_vl", "model.config.model_type=qwen4_vl")


@pytest.mark.parametrize(
    ("model_type", "field", "value", "message"),
    [
        (
            "qwen2_vl",
            "vision_config.patch_size",
            [14, 28],
            r"vision_config.patch_size is \[14, 28\]; a positive number",
        ),
        ("qwen3_vl", "vision_config.temporal_patch_size", [2, 4], "vision_config.temporal_patch_size"),
        ("llava_onevision", "vision_config.image_size", [64, 32], "vision_config.image_size"),
        ("internvl", "vision_config.image_size", [64, 32], r"vision_config.image_size is [\[(]64, 32[\])]; a positive"),
        ("llava_onevision", "vision_feature_select_strategy", "default", "is 'default'; only 'full' is implemented"),
        ("internvl", "vision_feature_select_strategy", "full", "is 'full'; only 'default' is implemented"),
        ("internvl", "downsample_ratio", 0.3, "downsample_ratio 0.3 does not divide the 8 patches of a row"),
        ("internvl", "image_token_id", 9999, "the config names token 9999, the tokenizer has"),
        ("qwen2_5_vl", "video_token_id", 9999, "the config names token 9999, the tokenizer has"),
    ],
)
def test_config_fields_that_the_adapter_cannot_serve_are_refused(shards, model_type, field, value, message):
    system = build(shards, model_type)
    *parts, name = field.split(".")
    section = getattr(system.model_config, parts[0]) if parts else system.model_config
    object.__setattr__(section, name, value)
    with pytest.raises(ValueError, match=message):
        family_of(system.model_config, system.tokenizer)


def test_internvl_needs_a_tokenizer_that_frames_images(shards):
    system = build(shards, "internvl")
    tokenizer = train_tokenizer(TokenizerConfig())
    with pytest.raises(ValueError, match=r"the tokenizer has no <img> and </img>"):
        family_of(system.model_config, tokenizer)
    adopt_family(tokenizer, "internvl")
    assert family_of(system.model_config, tokenizer).token == "<IMG_CONTEXT>"


@families
def test_misspelt_fields_of_a_small_model_are_named(shards, model_type):
    for section in ("", "text_config.", "vision_config."):
        with pytest.raises(ConfigError, match=f"model.config.{section}hiden_size: unknown key; did you mean"):
            build(shards, model_type, f"model.config.{section}hiden_size=3")


def test_the_tokenizer_of_qwen_models_keeps_its_ids(shards):
    plain = train_tokenizer(TokenizerConfig())
    for model_type in QWEN:
        assert build(shards, model_type).tokenizer.get_vocab() == plain.get_vocab()
    assert plain.convert_tokens_to_ids(["<|endoftext|>", "<|im_end|>", "<|video_pad|>"]) == [0, 2, 6]
    for model_type in ("llava_onevision", "internvl"):
        vocabulary = build(shards, model_type).tokenizer.get_vocab()
        assert plain.get_vocab().items() <= vocabulary.items()


@families
@pytest.mark.parametrize("layout", LAYOUTS)
def test_beside_a_layout_no_mask_of_the_whole_sequence_is_built(shards, mixed, model_type, layout):
    system = build(shards, model_type, *LAYOUTS[layout])
    model, batch, masks = system.build_model().eval(), system.collator(mixed), []
    text = model.get_decoder().layers[0].self_attn
    text.register_forward_pre_hook(lambda _, __, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True)
    with torch.no_grad():
        model(**batch.inputs, capture=Capture(batch.table, LAYERS, layout=batch.layout, detach=True), use_cache=False)
    assert masks == [None]
