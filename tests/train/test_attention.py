"""Promise: captured maps and their gradients equal those of eager attention, and a map without a gradient is an
error."""

import pytest
import torch
from tiny import gradients, largest_difference, make_batch, make_data, requests, tiny_config
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from swim.kernels.noun_attention import noun_attention
from swim.train.attention import Capture, enable_checkpointing, register_capture
from swim.train.loop import combine
from swim.train.system import Progress, Request, build_system
from swim.train.systems.swim.data import SwimBatch
from swim.train.systems.swim.objective import noun_maps

LAYERS = (1, 3)
PROGRESS = Progress(0, 10)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


def build(shards, *overrides):
    system = build_system(tiny_config(shards.folder, "data.tasks=null", *overrides))
    return system, system.build_model().train()


def eager_maps(model: nn.Module, batch: SwimBatch, segments_of_clip) -> dict[int, torch.Tensor]:
    """The oracle: rows of the full attention matrix, cut to each segment's keys and renormalised, averaged over
    heads."""
    text = model.config.get_text_config()
    keep = text._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    output = model(**batch.inputs, use_cache=False, output_attentions=True)
    model.set_attn_implementation({"text_config": keep})
    maps = {}
    for layer in LAYERS:
        rows = []
        for noun in batch.nouns:
            clip = batch.clips[noun.conversation]
            visual = torch.nonzero(batch.inputs["mm_token_type_ids"][noun.conversation] == 2).flatten()
            for token in noun.tokens:
                weights = output.attentions[layer][noun.conversation, :, token, visual]
                weights = weights.reshape(len(weights), segments_of_clip(clip), -1)
                rows.append((weights / weights.sum(-1, keepdim=True)).mean(0).flatten())
        maps[layer] = torch.cat(rows)
    return maps, output


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_maps_equal_eager_attention(shards, scope):
    system, model = build(shards, f"system.softmax_scope={scope}")
    batch = make_batch(system, shards, [0, 1, 2])
    lengths = batch.inputs["attention_mask"].sum(1)
    assert len(set(lengths.tolist())) > 1, "the batch must need padding"
    assert any(noun.turn == 1 for noun in batch.nouns), "a noun of an answer must be among the rows"
    capture = Capture(batch.table, LAYERS)
    output = model(**batch.inputs, use_cache=False, capture=capture)
    got = capture.maps()
    want, eager = eager_maps(model, batch, (lambda clip: clip.grid[0]) if scope == "frame" else (lambda _: 1))
    mask = batch.inputs["attention_mask"].bool()
    torch.testing.assert_close(output.logits[mask], eager.logits[mask], atol=1e-4, rtol=1e-4)
    for layer in LAYERS:
        assert got[layer].dtype == torch.float32
        torch.testing.assert_close(got[layer], want[layer], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [0, -1])
def test_causal_scope_is_eager_attention_itself(shards, offset):
    system, model = build(shards, "system.softmax_scope=causal", f"system.row_offset={offset}")
    batch = make_batch(system, shards, [0, 1, 2])
    capture = Capture(batch.table, LAYERS)
    model(**batch.inputs, use_cache=False, capture=capture)
    got = capture.maps()
    model.set_attn_implementation({"text_config": "eager"})
    attentions = model(**batch.inputs, use_cache=False, output_attentions=True).attentions
    for layer in LAYERS:
        rows = []
        for noun in batch.nouns:
            visual = batch.inputs["mm_token_type_ids"][noun.conversation] == 2
            rows += [attentions[layer][noun.conversation, :, t + offset, visual].mean(0) for t in noun.tokens]
        torch.testing.assert_close(got[layer], torch.cat(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("offset", [0, -1])
def test_full_scope_is_the_softmax_over_all_tokens_of_the_conversation(shards, offset, monkeypatch):
    system, model = build(shards, "system.softmax_scope=full", f"system.row_offset={offset}")
    batch = make_batch(system, shards, [0, 1, 2])
    seen = []

    def spy(q, k, table, *, scale, **options):
        seen.append((q.detach(), k.detach(), scale))
        return noun_attention(q, k, table, scale=scale, **options)

    monkeypatch.setattr("swim.train.attention.noun_attention", spy)
    capture = Capture(batch.table, LAYERS)
    model(**batch.inputs, use_cache=False, capture=capture)
    for flat, (q, k, scale) in zip(capture.maps().values(), seen, strict=True):
        rows = []
        for noun in batch.nouns:
            row = noun.conversation
            real, visual = batch.inputs["attention_mask"][row].bool(), batch.inputs["mm_token_type_ids"][row] == 2
            for token in noun.tokens:
                scores = torch.einsum("hd,hld->hl", q[row, :, token + offset], k[row].repeat_interleave(2, 0)) * scale
                weights = scores.masked_fill(~real, -torch.inf).softmax(-1)  # later tokens too, padding never
                rows.append(weights[:, visual].mean(0))
        torch.testing.assert_close(flat, torch.cat(rows), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True, 2])
@pytest.mark.parametrize("loss", ["kl", "bce"])
def test_gradients_of_text_and_mask_loss_equal_those_through_eager_attention(shards, checkpointing, loss):
    system, model = build(shards, f"system.loss={loss}", f"model.checkpointing={checkpointing}")
    batch = make_batch(system, shards, [0, 1])

    def total(loss):
        return sum(term.weight * term.sum / batch.counts[name] for name, term in loss.items())

    total(system.loss(model, batch, PROGRESS)).backward()
    got = gradients(model)
    model.zero_grad()

    _, plain = build(shards)
    plain.load_state_dict(model.state_dict())
    maps, output = eager_maps(plain, batch, lambda clip: clip.grid[0])
    flat = torch.cat(noun_maps(maps, batch))
    want_mask = oracle_mask_loss(flat, batch, loss)
    labels = torch.full_like(batch.inputs["input_ids"], -100)
    labels[batch.label_rows, batch.label_columns[batch.label_slots] + 1] = batch.labels
    text = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="mean")
    (text + want_mask).backward()
    want = gradients(plain)
    assert largest_difference(got, want) < 1e-5
    # The comparison means something only if the mask loss moves the gradients by far more than the tolerance.
    plain.zero_grad()
    maps, output = eager_maps(plain, batch, lambda clip: clip.grid[0])
    nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()
    assert largest_difference(gradients(plain), want) > 1e-3


def oracle_mask_loss(flat: torch.Tensor, batch: SwimBatch, kind: str) -> torch.Tensor:
    """Mean over nouns of the mean over their steps that show the object, in a plain loop."""
    losses, start = [], 0
    for noun, coverages in zip(batch.nouns, batch.coverages):
        steps, height, width = batch.clips[noun.conversation].grid
        noun_map = flat[start : start + steps * height * width].view(steps, height, width)
        start += steps * height * width
        of_steps = []
        for step, coverage in zip(noun_map, coverages):
            if coverage is None or not coverage.any():
                continue
            target = torch.tensor(coverage, dtype=torch.float32)
            if kind == "bce":
                of_steps.append(nn.functional.binary_cross_entropy(step, target))
            else:
                target = target / target.sum()
                of_steps.append(nn.functional.kl_div(step.log(), target, reduction="sum"))
        if of_steps:
            losses.append(torch.stack(of_steps).mean())
    assert len(losses) == batch.counts["mask"]
    return torch.stack(losses).mean()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mask_loss_alone_reaches_every_supervised_layer(shards, checkpointing):
    system, model = build(shards, "system.text_weight=0", f"model.checkpointing={checkpointing}")
    batch = make_batch(system, shards, [0])
    term = system.loss(model, batch, PROGRESS)["mask"]
    term.sum.backward()
    for layer in LAYERS:
        attention = model.model.language_model.layers[layer].self_attn
        assert attention.q_proj.weight.grad.norm() > 0
        assert attention.k_proj.weight.grad.norm() > 0
    measured = system.after_backward()
    assert set(measured) == {f"mask_grad/{side}{layer}" for side in "qk" for layer in LAYERS}
    assert all(value > 0 for value in measured.values())
    assert system.after_backward() == {}, "measured once, reported once"


def test_nothing_is_passed_back_through_a_frozen_tower_and_what_is_trained_has_the_same_gradients(shards):
    frozen = ("model.freeze=['visual', 'embed_tokens']", "system.gradient_every=0")
    found = {}
    for checkpointing in (False, True):
        torch.manual_seed(0)
        system, model = build(shards, *frozen, f"model.checkpointing={checkpointing}")
        outputs = []
        model.model.visual.register_forward_hook(lambda *call, to=outputs: to.append(call[-1].pooler_output))
        loss = system.loss(model, make_batch(system, shards, [0, 1]), PROGRESS)
        sum(term.sum for term in loss.values()).backward()
        assert [output.requires_grad for output in outputs] == [False]
        found[checkpointing] = gradients(model)
    assert largest_difference(found[False], found[True]) < 1e-6
    assert max(float(gradient.abs().max()) for gradient in found[True].values()) > 1e-3


@pytest.mark.parametrize("every", [1, 2, 3])
def test_every_nth_layer_is_recomputed_and_gradients_are_those_without(shards, every):
    """The layers that transformers itself would take; supervised layers 1 and 3 are among those recomputed, and not."""
    found = {}
    for checkpointing in (False, every):
        system, model = build(shards, f"model.checkpointing={checkpointing}")
        batch = make_batch(system, shards, [0, 1])
        terms = system.loss(model, batch, PROGRESS)
        assert terms["mask"].sum.requires_grad
        combine(terms, batch.counts).backward()
        found[checkpointing] = gradients(model)
    assert largest_difference(found[False], found[every]) < 1e-6
    layers = [m for m in model.modules() if isinstance(m, GradientCheckpointingLayer)]
    flags = [layer.gradient_checkpointing for layer in layers]
    assert sum(flags) == -(-len(flags) // every)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(every_n_layers=every)
        assert [layer.gradient_checkpointing for layer in layers] == flags


def test_reentrant_checkpointing_is_an_error_not_a_silent_zero(shards):
    system, model = build(shards)
    enable_checkpointing(model, reentrant=True)
    with pytest.raises(RuntimeError, match=r"layers \[1, 3\] carry no gradient.*use_reentrant"):
        system.loss(model, make_batch(system, shards, [0]), PROGRESS)


def test_plain_fine_tuning_measures_the_mask_loss_but_is_not_moved_by_it(shards):
    system, model = build(shards, "system.mask_weight=0")
    batch = make_batch(system, shards, [0])
    loss = system.loss(model, batch, PROGRESS)
    assert loss["mask"].sum > 0
    assert not loss["mask"].sum.requires_grad


def test_a_model_without_the_capture_function_is_named_as_the_cause(shards):
    system, model = build(shards)
    model.set_attn_implementation({"text_config": "sdpa"})
    with pytest.raises(RuntimeError, match="register_capture"):
        system.loss(model, make_batch(system, shards, [0]), PROGRESS)


def test_left_padding_is_masked_under_the_registered_name(shards):
    # Right padding is hidden by causal attention anyway; prompts of unequal length are padded on the left to generate.
    system, model = build(shards)
    model.eval()
    (request,) = requests(shards, [0])
    together = system.predict(model, request)
    alone = [system.predict(model, Request(request.sample, (i,)))[0] for i in request.conversations]
    assert [line["answer"] for line in together] == [line["answer"] for line in alone]
    assert len({line["answer"] for line in alone}) > 1, "answers must be able to differ"
    conversations, _ = system.collator.encode(request)
    assert len({e.answer_start for _, e, _ in conversations}) > 1, "prompts must differ in length"
    _, shortest, clip = min(conversations, key=lambda item: item[1].answer_start)
    types = torch.from_numpy(shortest.types[: shortest.answer_start])[None]
    prompt = torch.from_numpy(shortest.ids[: shortest.answer_start])[None]
    positions = system.collator.encoder.family.positions(types[0].numpy(), clip)
    positions = torch.from_numpy(positions)[:, None]
    visual = system.collator.encoder.family.inputs([clip], types)
    del visual["mm_token_type_ids"]  # positions are given
    pad = torch.full((1, 7), system.collator.options.pad_token)
    plain = model(input_ids=prompt, position_ids=positions, attention_mask=torch.ones_like(prompt), **visual).logits
    padded = model(
        input_ids=torch.cat([pad, prompt], 1),
        position_ids=torch.cat([torch.zeros(3, 1, 7, dtype=torch.int64), positions], 2),
        attention_mask=torch.cat([torch.zeros_like(pad), torch.ones_like(prompt)], 1),
        **visual,
    ).logits[:, 7:]
    torch.testing.assert_close(padded, plain, atol=1e-4, rtol=1e-4)


def test_eager_cannot_be_wrapped(shards):
    _, model = build(shards)
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match="load the model with 'sdpa'"):
        register_capture(model)
