"""Promise: packed and shared-prefix batches compute what separate padded sequences do: loss, maps and gradients."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny import gradients, largest_difference, make_data, requests, tiny_config
from torch import Tensor
from transformers import modeling_flash_attention_utils
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swim.data_tools.records import Conversation, Mention, Record, Turn
from swim.data_tools.shards import Sample, ShardSet, ShardWriter
from swim.train.attention import Capture, register_capture
from swim.train.layout import Layout, attend, branch_mask
from swim.train.system import Progress, Request, build_system
from swim.train.systems.swim.data import SwimBatch

LAYERS = (1, 3)
SEPARATE = ("data.shared_prefix=false", "data.packed=false")
LAYOUTS = {
    "shared": ("data.shared_prefix=true", "data.packed=false"),
    "packed": ("data.shared_prefix=false", "data.packed=true"),
    "packed-shared": ("data.shared_prefix=true", "data.packed=true"),
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> ShardSet:
    return make_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory, shards) -> list[Request]:
    """Clips with all their questions, a text-only record, a clip without masks and one prompt with eight nouns."""
    several, unmasked, crowded = (shards.read(clip) for clip in (0, 1, 2))
    words = [o.label.split()[-1] for o in crowded.record.objects]
    ids = [o.id for o in crowded.record.objects]
    text = " ".join(words[i % len(words)] for i in range(8)) + " ?"
    starts = [sum(len(words[j % len(words)]) + 1 for j in range(i)) for i in range(8)]
    mentions = [
        Mention(start=s, end=s + len(words[i % len(words)]), head=(s, s + len(words[i % len(words)])), object_ids=[o])
        for i, (s, o) in enumerate(zip(starts, (ids * 8)[:8]))
    ]
    turns = [Turn(role="user", text=text, mentions=mentions), Turn(role="assistant", text="up")]
    many = Conversation(task="many", turns=turns)
    crowded_record = crowded.record.model_copy(update={"conversations": [*crowded.record.conversations, many]})
    folder = tmp_path_factory.mktemp("text")
    with ShardWriter(folder) as writer:
        turns = [Turn(role="user", text="is a circle round ?"), Turn(role="assistant", text="yes , it is .")]
        record = Record(
            source="test",
            license="CC0-1.0",
            media=[],
            objects=[],
            conversations=[Conversation(task="text", turns=turns)] * 2,
        )
        writer.write("text_0", record, {}, {})
    text_only = ShardSet(folder).read(0)

    def all_of(sample: Sample) -> Request:
        return Request(sample, tuple(range(len(sample.record.conversations))))

    return [
        all_of(several),
        all_of(text_only),
        all_of(replace(unmasked, masks={})),
        all_of(replace(crowded, record=crowded_record)),
    ]


def build(shards: ShardSet, *overrides: str):
    return build_system(tiny_config(shards.folder, "data.tasks=null", *overrides))


def outcome(system, model, chosen: Sequence[Request]) -> tuple[SwimBatch, dict[str, Tensor]]:
    """Loss terms, the map of every noun by name, and all gradients of their sum."""
    batch = system.collator(chosen)
    assert not batch.holes, batch.holes
    found: dict[str, Tensor] = {}
    capture = Capture(batch.table, LAYERS, layout=batch.layout)
    output = model(**batch.inputs, use_cache=False, capture=capture, logits_to_keep=batch.label_columns)
    losses = torch.nn.functional.cross_entropy(
        output.logits[batch.label_rows, batch.label_slots], batch.labels, reduction="none"
    )
    found["tokens"] = losses.detach()
    starts = [sum(len(n.tokens) for n in batch.nouns[:i]) for i in range(len(batch.nouns))]
    for layer, flat in capture.maps().items():
        rows = flat.split(batch.table.map_sizes)
        for start, noun in zip(starts, batch.nouns):
            for i in range(len(noun.tokens)):
                name = f"{batch.ids[noun.conversation]} {noun.turn} {noun.start} {i} layer {layer}"
                found[name] = rows[start + i].detach()
    model.zero_grad()
    loss = system.loss(model, batch, Progress(0, 10))
    assert loss["mask"].sum > 0
    sum(term.weight * term.sum / batch.counts[name] for name, term in loss.items()).backward()
    found |= {name: term.sum.detach() / batch.counts[name] for name, term in loss.items()}
    return batch, found | {f"grad {name}": grad for name, grad in gradients(model).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
def test_every_layout_equals_separate_sequences(shards, mixed, layout, checkpointing):
    separate, system = build(shards, *SEPARATE), build(shards, *LAYOUTS[layout], f"model.checkpointing={checkpointing}")
    oracle, model = separate.build_model().train(), system.build_model().train()
    model.load_state_dict(oracle.state_dict())
    plain, want = outcome(separate, oracle, mixed)
    batch, got = outcome(system, model, mixed)
    assert batch.layout is not None and plain.layout is None  # noqa: PT018
    assert len(batch.inputs["input_ids"]) == (1 if "packed" in layout else 5)
    assert (batch.num_tokens < 0.55 * plain.num_tokens) == ("shared" in layout)
    assert largest_difference(got, want) < 1e-5
    last = len(batch.ids) - 1
    assert sum(noun.conversation == last for noun in batch.nouns) == 8


@pytest.mark.parametrize("options", [["causal", 0], ["full", 0], ["full", -1], ["causal", -1], ["clip", -1]], ids=str)
def test_scopes_and_row_offsets_do_not_depend_on_the_layout(shards, mixed, options):
    scope, offset = options
    overrides = (f"system.softmax_scope={scope}", f"system.row_offset={offset}")
    separate, system = build(shards, *SEPARATE, *overrides), build(shards, *LAYOUTS["packed-shared"], *overrides)
    oracle = separate.build_model().train()
    want, got = (outcome(s, oracle, mixed)[1] for s in (separate, system))
    assert largest_difference(got, want) < 1e-5


def test_a_prefix_is_shared_only_by_conversations_that_are_equal_up_to_the_clips_end(shards):
    sample = shards.read(0)
    first, *_ = sample.record.conversations
    polite = Conversation(task="x", turns=[Turn(role="system", text="be brief"), *first.turns])
    record = sample.record.model_copy(update={"conversations": [first, first, polite, polite, first]})
    batch = build(shards, *LAYOUTS["shared"]).collator([Request(replace(sample, record=record), (0, 1, 2, 3, 4))])
    assert batch.layout is not None
    assert [len(row[0]) - 1 for row in batch.layout.rows] == [2, 2, 0], "branches of each sequence"


def test_a_clip_is_decoded_and_encoded_once_for_all_its_questions(shards):
    (request,) = requests(shards, [0])
    count = len(request.conversations)
    shared, separate = (build(shards, *o).collator([request]) for o in (LAYOUTS["shared"], SEPARATE))
    assert count > 2
    assert separate.inputs["pixel_values_videos"].shape[0] == count * shared.inputs["pixel_values_videos"].shape[0]
    (grid,) = {clip.grid for clip in separate.clips if clip}
    visual = grid[0] * grid[1] * grid[2]
    saved = (count - 1) * (separate.num_tokens - sum(branch for branch in shared.layout.rows[0][0][1:])) // count
    assert separate.num_tokens - shared.num_tokens == saved >= (count - 1) * visual


def test_predictions_do_not_depend_on_the_layout(shards):
    (request,) = requests(shards, [3])
    separate, shared = build(shards, *SEPARATE), build(shards, *LAYOUTS["shared"])
    model = separate.build_model().eval()
    for want, got in zip(separate.predict(model, request), shared.predict(model, request), strict=True):
        assert got["answer"] == want["answer"]
        for one, other in zip(got["nouns"], want["nouns"], strict=True):
            torch.testing.assert_close(torch.tensor(one["map"]), torch.tensor(other["map"]), atol=1e-5, rtol=1e-5)


def test_the_branch_mask_is_the_rule_token_by_token():
    pieces = (3, 2, 1, 4)
    mask = branch_mask(pieces)[0, 0]
    owner = [0] * 3 + [1] * 2 + [2] + [3] * 4
    for i in range(7):
        for j in range(10):
            query = 3 + i
            assert mask[i, j] == (j <= query and owner[j] in (0, owner[query])), (query, j)


def torch_varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, *, causal, softmax_scale, max_seqlen_q, max_seqlen_k, **_):
    """What flash_attn_varlen_func promises, in torch: causal means aligned at the last key."""
    assert causal and max_seqlen_q <= max_seqlen_k  # noqa: PT018
    outputs = []
    for a, b, c, d in zip(cu_seqlens_q, cu_seqlens_q[1:], cu_seqlens_k, cu_seqlens_k[1:]):
        group = q.shape[1] // k.shape[1]
        qs, ks, vs = q[a:b].transpose(0, 1), k[c:d].transpose(0, 1), v[c:d].transpose(0, 1)
        scores = qs @ ks.repeat_interleave(group, 0).mT * softmax_scale
        allowed = torch.ones(b - a, d - c, dtype=torch.bool).tril(int((d - c) - (b - a)))
        weights = scores.masked_fill(~allowed, -torch.inf).softmax(-1)
        outputs.append((weights @ vs.repeat_interleave(group, 0)).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_flash_path_makes_one_varlen_call_and_equals_separate_sequences(shards, mixed, layout, monkeypatch):
    """Through transformers' own flash function; only the kernel itself is replaced, by its documented meaning."""
    asked = []

    def kernels(implementation, *_, **__):
        asked.append(implementation)
        return None, torch_varlen, None, None, None

    monkeypatch.setattr(modeling_flash_attention_utils, "_lazy_imports", kernels)
    monkeypatch.setattr(modeling_flash_attention_utils, "_loaded_implementation", None)
    separate, system = build(shards, *SEPARATE), build(shards, *LAYOUTS[layout])
    oracle, model = separate.build_model().train(), system.build_model().train()
    model.load_state_dict(oracle.state_dict())
    model.config.get_text_config()._attn_implementation_internal = "flash_attention_2"
    assert register_capture(model) == "swim_flash_attention_2"
    want, got = outcome(separate, oracle, mixed)[1], outcome(system, model, mixed)[1]
    assert set(asked) == {"flash_attention_2"}, "the kernels are asked for by the base's name, not by ours"
    assert largest_difference(got, want) < 1e-5


def test_what_a_layout_cannot_describe_is_refused():
    layout, q = Layout((((4, 2),),), 6), torch.zeros(1, 2, 6, 8)
    base = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(ValueError, match=r"a window of 128; set data.packed=false and data.shared_prefix=false"):
        attend(base, None, q, q, q, layout, flash=False, cache={}, sliding_window=128)
    with pytest.raises(ValueError, match=r"1 rows of 6 tokens, the model was given \(1, 5\)"):
        attend(base, None, q[:, :, :5], q, q, layout, flash=False, cache={})
