"""Promise: every noun of a conversation owns exactly the tokens of its head and every label is an answer token.

What the model gets (ids, positions, pixels) is what the stock template, tokenizer and model would have made.
"""

import pickle
import re
import unicodedata
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from qwen_vocabulary import CONTROL_TOKENS, oracle, write_tokenizer
from tiny import make_batch, make_data, tiny_config
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen2_5_VLConfig

from swim.data_tools.records import Conversation, Mention, RecordError, Turn
from swim.train.batch import BatchOptions
from swim.train.batch import make_batch as assemble
from swim.train.config import TokenizerConfig
from swim.train.encode import IGNORE, ConversationEncoder, Encoded
from swim.train.families import Clip, Qwen25VL
from swim.train.system import Progress, build_system
from swim.train.tokenizer import control_token_fields, train_tokenizer


def family_of(tokenizer: PreTrainedTokenizerFast) -> Qwen25VL:
    vision = {"patch_size": 7, "spatial_merge_size": 2, "temporal_patch_size": 2, "tokens_per_second": 2}
    return Qwen25VL(Qwen2_5_VLConfig(vision_config=vision, **control_token_fields(tokenizer)), tokenizer)


def clip_of(grid: tuple[int, int, int], seconds: float = 1.0) -> Clip:
    steps, height, width = grid
    pixels = torch.randn(4 * steps * height * width, 3 * 2 * 7 * 7)
    return Clip("clip", pixels, grid, [[2 * t, 2 * t + 1] for t in range(steps)], seconds, fps=2 / seconds)


SIX = clip_of((1, 2, 3))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    folder = tmp_path_factory.mktemp("qwen")
    write_tokenizer(folder)
    return AutoTokenizer.from_pretrained(folder)  # as a user gets it: through the files


@pytest.fixture(scope="module")
def demo() -> PreTrainedTokenizerFast:
    return train_tokenizer(TokenizerConfig())


@pytest.fixture(params=["demo", "qwen"])
def encoder(request: pytest.FixtureRequest) -> ConversationEncoder:
    tokenizer = request.getfixturevalue(request.param)
    return ConversationEncoder(tokenizer, family_of(tokenizer))


@pytest.fixture
def qwen_encoder(qwen: PreTrainedTokenizerFast) -> ConversationEncoder:
    return ConversationEncoder(qwen, family_of(qwen))


def say(role: Any, marked: str) -> Turn:
    """A turn from text with mentions marked: `[head]`, or `{mention with its [head]}`."""
    text, mentions, start, head = "", [], None, None
    for piece in re.split(r"([\[\]{}])", marked):
        match piece:
            case "{":
                start = len(text)
            case "[":
                head = len(text)
            case "]":
                span = (head, len(text))
                if start is None:
                    mentions.append(Mention(start=span[0], end=span[1], head=span, object_ids=["a"]))
            case "}":
                mentions.append(Mention(start=start, end=len(text), head=span, object_ids=["a"]))
                start = None
            case _:
                text += piece
    return Turn(role=role, text=text, mentions=mentions)


def talk(*turns: Turn) -> Conversation:
    return Conversation(task="test", turns=list(turns))


def ask(question: str, answer: str = "yes") -> Conversation:
    return talk(say("user", question), say("assistant", answer))


# ---- oracles that share nothing with the encoder: the stock template on the real texts, bytes instead of offsets


def stock_text(tokenizer: PreTrainedTokenizerFast, texts: list[str], roles: list[str], with_video: bool) -> str:
    first = roles.index("user")
    messages = [
        {
            "role": role,
            "content": [{"type": "video"}] * (with_video and i == first) + [{"type": "text", "text": text}],
        }
        for i, (role, text) in enumerate(zip(roles, texts))
    ]
    return tokenizer.apply_chat_template(messages, tokenize=False)


def text_starts(tokenizer: PreTrainedTokenizerFast, texts: list[str], roles: list[str], with_video: bool) -> list[int]:
    """Where each text starts: rendered once more with a character of its own in front."""
    starts = []
    for i in range(len(texts)):
        marked = [("\x01" + text) if i == j else text for j, text in enumerate(texts)]
        starts.append(stock_text(tokenizer, marked, roles, with_video).index("\x01"))
    return starts


def byte_spans(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> list[tuple[int, int]]:
    """The bytes of each token: byte-level tokens have one letter per byte, control tokens stand for themselves."""
    control, spans, at = tokenizer.get_added_vocab(), [], 0
    for token in tokenizer.convert_ids_to_tokens(ids):
        size = len(token.encode() if token in control else token)
        spans.append((at, at + size))
        at += size
    return spans


def check(encoder: ConversationEncoder, conversation: Conversation, clip: Clip | None = SIX) -> Encoded:
    """The encoding of a conversation in normal form (NFC), with ids, labels and rows compared to the byte oracle."""
    tokenizer, with_video = encoder.tokenizer, clip is not None
    num_video_tokens = clip.num_cells if clip else 0
    texts, roles = [t.text for t in conversation.turns], [t.role for t in conversation.turns]
    rendered = stock_text(tokenizer, texts, roles, with_video)
    starts = text_starts(tokenizer, texts, roles, with_video)
    ids = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    spans = byte_spans(tokenizer, ids)
    assert spans[-1][1] == len(rendered.encode()), "the oracle needs text that normalisation leaves alone"

    def bytes_at(character: int) -> int:
        return len(rendered[:character].encode())

    labels, rows = [IGNORE] * len(ids), []
    for turn, start in zip(conversation.turns, starts):
        if turn.role == "assistant":
            end = bytes_at(start + len(turn.text) + len("<|im_end|>"))
            for i, (lo, hi) in enumerate(spans):
                if hi > bytes_at(start) and lo < end:
                    labels[i] = ids[i]
        for mention in turn.mentions:
            solid = [c for c in range(start + mention.head[0], start + mention.head[1]) if rendered[c].strip()]
            rows.append(
                [i for i, (lo, hi) in enumerate(spans) if any(bytes_at(c) < hi and lo < bytes_at(c + 1) for c in solid)]
            )
    types = [0] * len(ids)
    if with_video:
        at = ids.index(encoder.family.token_id)
        shift = num_video_tokens - 1
        ids[at : at + 1] = [encoder.family.token_id] * num_video_tokens
        labels[at : at + 1] = [IGNORE] * num_video_tokens
        types[at : at + 1] = [2] * num_video_tokens
        rows = [[token + shift if token > at else token for token in row] for row in rows]

    encoded = encoder(conversation, name="clip#0", clip=clip)
    assert encoded.ids.tolist() == ids
    assert encoded.types.tolist() == types
    assert encoded.labels.tolist() == labels
    assert [list(noun.tokens) for noun in encoded.nouns] == rows
    return encoded


def words(encoder: ConversationEncoder, encoded: Encoded) -> list[list[str]]:
    """What stands in each noun's rows, token by token (Ġ is a leading space)."""
    return [encoder.tokenizer.convert_ids_to_tokens(encoded.ids[list(noun.tokens)].tolist()) for noun in encoded.nouns]


# ---- the vocabulary itself


def test_the_converted_vocabulary_is_qwens(qwen):
    for text in [
        "Describe this image.",
        "dog",
        " dog",
        " zebra",
        "it's, THEY'LL  see\n\n  12345 things",
        "naïve café, Ångström",
        "cafe\u0301",  # in decomposed form
        "斑马在草地上跑，狗呢？",
        "シマウマ 얼룩말 حمار зебра",
        "🦓👩‍👩‍👧🏳️‍🌈 end",
        "\u3000\u00a0 tabs\t\tand\r\nbreaks \n",
        "def f(x):\n    return x  # ok",
    ]:
        assert qwen(text)["input_ids"] == oracle().encode(text, allowed_special=set()), text
    assert qwen("Describe this image.")["input_ids"] == [74785, 419, 2168, 13]
    assert qwen.convert_tokens_to_ids(list(CONTROL_TOKENS)) == list(range(151643, 151657))


# ---- spans to rows


def test_a_word_at_the_start_and_one_after_a_space_are_different_tokens_and_both_get_their_row(qwen_encoder):
    encoded = check(qwen_encoder, ask("[dog] and a [dog]"))
    assert words(qwen_encoder, encoded) == [["dog"], ["Ġdog"]]
    first, second = (encoded.ids[noun.tokens[0]] for noun in encoded.nouns)
    assert [first] == oracle().encode("dog")
    assert [second] == oracle().encode(" dog")
    assert first != second


def test_a_noun_of_several_tokens_gets_several_rows(qwen_encoder):
    encoded = check(qwen_encoder, ask("where does the [zebra] run ?"))
    (noun,) = encoded.nouns
    assert encoded.ids[list(noun.tokens)].tolist() == oracle().encode(" zebra")
    assert len(noun.tokens) == 2


def test_an_untagged_twin_does_not_steal_the_rows(encoder):
    conversation = talk(
        say("system", "You see a circle . Name the circle ."),
        say("user", "is the circle left of the [circle] ?"),
        say("assistant", "the circle is left ."),
    )
    encoded = check(encoder, conversation)
    (noun,) = encoded.nouns
    twins = [i for i, token in enumerate(encoded.ids) if token == encoded.ids[noun.tokens[-1]]]
    assert len(twins) == 5, "the noun stands in the prompt five times"
    assert noun.tokens[-1] == twins[3]


def test_a_twin_in_the_system_turn_that_the_template_adds_does_not_steal(qwen_encoder):
    encoded = check(qwen_encoder, ask("where is the [assistant] ?"))
    header = qwen_encoder.tokenizer.decode(encoded.ids[: encoded.nouns[0].tokens[0]])
    assert "You are a helpful assistant." in header


def test_every_place_a_noun_can_stand_in(encoder):
    check(encoder, ask("what moves ?", "the [circle] moves , then a [star] ."))
    check(encoder, ask("[circle]", "[star]"))
    check(encoder, ask('the "[circle]", (the [star]); the [circle]\'s side -- [star]/[cross].'))
    check(encoder, ask("follow {the big red [circle] on the left} with {a [star] in it}"))
    check(encoder, ask("line one\n[circle]\n\n[star]\ttab  [cross]   end\n"))
    check(encoder, ask("the [two word head] and { [ spaces around ] }"))
    check(encoder, ask("the [circle] ?"), clip=None)


def test_cjk_nouns(qwen_encoder):
    encoded = check(qwen_encoder, ask("[斑马]在[草地]上跑，[狗]呢？", "[シマウマ]と[얼룩말]"))
    spelled = [qwen_encoder.tokenizer.decode(encoded.ids[list(noun.tokens)]) for noun in encoded.nouns]
    # 草地上 is one token of the vocabulary, and the head lies in it.
    assert [text.strip() for text in spelled] == ["斑马", "草地上", "狗", "シマウマ", "얼룩말"]


def test_all_byte_tokens_of_one_character_are_rows(encoder):
    encoded = check(encoder, ask("the [🦓] and [👩‍👩‍👧] , [🦓🦓] 🦓", "a [🦓]"))
    assert all(len(noun.tokens) > 1 for noun in encoded.nouns)
    assert encoder.tokenizer.decode(encoded.ids[list(encoded.nouns[0].tokens)]).strip() == "🦓"


def test_a_noun_in_decomposed_form_keeps_its_accents(qwen_encoder):
    """macOS writes é as e + U+0301; the tokenizer composes them, and its offsets leave the accent to no token."""
    composed, decomposed = (unicodedata.normalize(form, "un [café] noir , [한국] , [ẹ́]") for form in ("NFC", "NFD"))
    want = check(qwen_encoder, ask(composed))
    got = qwen_encoder(ask(decomposed), name="clip#0", clip=SIX)
    assert got.ids.tolist() == want.ids.tolist()
    assert [noun.tokens for noun in got.nouns] == [noun.tokens for noun in want.nouns]
    # An accent alone is a head, too: its token is the one that it was composed into.
    text = unicodedata.normalize("NFD", "café noir")
    accent = Mention(start=4, end=5, head=(4, 5), object_ids=["a"])
    alone = talk(Turn(role="user", text=text, mentions=[accent]), say("assistant", "oui"))
    encoded = qwen_encoder(alone, name="clip#0", clip=SIX)
    assert words(qwen_encoder, encoded) == [["fÃ©"]]


def test_mentions_that_are_no_nouns_or_have_no_object_own_no_rows(encoder):
    head = {"start": 4, "end": 10, "head": (4, 10)}
    mentions = [Mention(**head, object_ids=[]), Mention(**head, kind="action", object_ids=["a"])]
    turns = [Turn(role="user", text="the circle ?", mentions=mentions), say("assistant", "yes")]
    assert encoder(talk(*turns), name="clip#0", clip=SIX).nouns == []


# Text without control characters (also those of the marks); everything else, unassigned code points included, may come.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\ue000")
KNOWN = ["dog", "zebra", "circle", "斑马", "🦓", "e\u0301", "\u1112\u1161\u11ab", "\u0301", "\n", ".", "'s", "\u3000"]
WORDS = st.lists(st.one_of(st.text(CHARACTERS, min_size=1, max_size=4), st.sampled_from(KNOWN)), min_size=1, max_size=8)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(words=WORDS, glue=st.sampled_from([" ", "", ", ", "\n"]), span=st.tuples(st.floats(0, 1), st.floats(0, 1)))
@example(words=["cafe\u0301"], glue=" ", span=(0.9, 1.0))
def test_rows_cover_exactly_the_heads_characters(encoder, words, glue, span):
    text = glue.join(words)
    start, end = sorted(round(part * len(text)) for part in span)
    assume(text[start:end].strip())
    mention = Mention(start=start, end=end, head=(start, end), object_ids=["a"])
    turns = [Turn(role="user", text=text, mentions=[mention]), say("assistant", "yes")]
    encoded = encoder(talk(*turns), name="clip#0", clip=None)
    (noun,) = encoded.nouns

    rendered = stock_text(encoder.tokenizer, [text, "yes"], ["user", "assistant"], False)
    first = text_starts(encoder.tokenizer, [text, "yes"], ["user", "assistant"], False)[0]
    offsets = encoder.tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    # A character that composition swallowed belongs to the token before it.
    ends = [max(hi, follower) for (_, hi), (follower, _) in zip(offsets, [*offsets[1:], (0, 0)])]
    solid = {c for c in range(first + start, first + end) if rendered[c].strip()}
    covered = set()
    for token in noun.tokens:
        of_token = set(range(offsets[token][0], ends[token]))
        assert of_token & solid, "a row lies outside the head"
        covered |= of_token
    assert solid <= covered, "a character of the head has no row"


# ---- labels


def test_labels_are_the_answers_and_their_end_in_every_assistant_turn(encoder):
    turns = [
        say("system", "Answer ."),
        say("user", "what colour is the [circle] ?"),
        say("assistant", "red ."),
        say("user", "and the [star] ?"),
        say("assistant", "the [star] is blue ,\nnot red ."),
    ]
    encoded = check(encoder, talk(*turns))
    is_label = encoded.labels != IGNORE
    assert (encoded.labels[is_label] == encoded.ids[is_label]).all()
    runs = np.flatnonzero(np.diff(np.concatenate([[False], is_label, [False]]).astype(int)))
    answers = [encoder.tokenizer.decode(encoded.ids[first:last]) for first, last in runs.reshape(-1, 2)]
    assert answers == ["red .<|im_end|>", "the star is blue ,\nnot red .<|im_end|>"]
    prompt = encoder.tokenizer.decode(encoded.ids[: encoded.answer_start])
    assert prompt.endswith("and the star ?<|im_end|>\n<|im_start|>assistant\n"), (
        "the prompt is what generation starts from"
    )


def test_an_empty_answer_teaches_to_stop(encoder):
    encoded = check(encoder, ask("say nothing", ""))
    assert encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE]) == "<|im_end|>"
    assert encoder.tokenizer.decode(encoded.ids[: encoded.answer_start]).endswith("<|im_start|>assistant\n")


@pytest.mark.parametrize("answer", [" leading", "trailing  ", "two\n\nlines\n", "  ", "😀"])
def test_odd_answers_are_labelled_whole(encoder, answer):
    encoded = check(encoder, ask("?", answer))
    assert encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE]) == answer + "<|im_end|>"


def test_a_token_that_header_and_answer_share_is_predicted_not_given(qwen_encoder):
    """Qwen has one token for three line breaks; cutting it would train on ids that no tokenizer gives."""
    encoded = check(qwen_encoder, ask("?", "\n\nyes"))
    labelled = qwen_encoder.tokenizer.decode(encoded.labels[encoded.labels != IGNORE])
    assert labelled == "\n\n\nyes<|im_end|>"
    assert qwen_encoder.tokenizer.decode(encoded.ids[: encoded.answer_start]).endswith("<|im_start|>assistant")


# ---- what is refused


def test_a_control_token_inside_a_text_is_refused_by_name(encoder):
    for control in ("<|im_end|>", "<|video_pad|>", "<|endoftext|>"):
        with pytest.raises(
            RecordError, match=rf"clip_7#2: turns\[1\]\.text: contains .*{re.escape(control)}.* 4; remove"
        ):
            encoder(ask("?", f"yes {control}"), name="clip_7#2", clip=SIX)
    with pytest.raises(RecordError, match=r"turns\[0\]\.text: contains the private-use character U\+E000 at 2"):
        encoder(ask("a \ue000 b"), name="clip_7#2", clip=SIX)


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m.role != 'system' %}{{ m.role }}{{ m.content[-1].text }}{% endfor %}",
        "{% for m in messages | reverse %}{{ m.role }}{{ m.content[-1].text }}{% endfor %}",
        "{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{{ m.content[-1].text }}{% endfor %}",
    ],
    ids=["drops", "reorders", "repeats"],
)
def test_a_template_that_loses_turns_is_refused(template):
    tokenizer = train_tokenizer(TokenizerConfig())
    tokenizer.chat_template = template
    encoder = ConversationEncoder(tokenizer, family_of(tokenizer))
    turns = [say("system", "s"), say("user", "u"), say("assistant", "a")]
    with pytest.raises(ValueError, match=r"drops, repeats or reorders turns of roles \['system', 'user', 'assist"):
        encoder(talk(*turns), name="clip#0", clip=None)


def test_a_template_without_a_place_for_the_video_is_refused():
    tokenizer = train_tokenizer(TokenizerConfig())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}{{ m.content[-1].text }}{% endfor %}"
    encoder = ConversationEncoder(tokenizer, family_of(tokenizer))
    with pytest.raises(ValueError, match=r"writes 0 <\|video_pad\|> for 1 video"):
        encoder(ask("u"), name="clip#0", clip=SIX)


def test_a_tokenizer_without_offsets_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ValueError, match="no offset mapping"):
        ConversationEncoder(Slow(), None)  # type: ignore[arg-type]


# ---- positions


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


@pytest.fixture(scope="module")
def system(shards):
    return build_system(tiny_config(shards.folder, "data.tasks=null"))


@pytest.fixture(scope="module")
def model(system):
    return system.build_model().eval()


def padded(encoder: ConversationEncoder, *rows: tuple[Conversation, Clip | None]):
    encoded = [
        (f"clip#{i}", encoder(conversation, name="clip", clip=clip), clip)
        for i, (conversation, clip) in enumerate(rows)
    ]
    return assemble(encoded, encoder, BatchOptions(pad_token=encoder.tokenizer.pad_token_id))


def test_positions_equal_the_models_own(system, model):
    """Text before and after the clip, several grids, rows of different length, steps of a fraction of a second."""
    cases = [
        ((2, 3, 5), 1.0),
        ((4, 2, 2), 0.25),
        ((3, 5, 1), 0.7),
        ((8, 1, 1), 1 / 3),
        ((1, 4, 4), 2.0),
        ((6, 2, 3), 1.9),  # 5 x 3.8 is 19 in float32 and a little less in float64
    ]
    conversations = [ask("is the [circle] there ? " * (1 + i)) for i in range(len(cases))]
    batch = padded(system.collator.encoder, *((c, clip_of(*case)) for c, case in zip(conversations, cases)))
    inputs, mask = batch.inputs, batch.inputs["attention_mask"].bool()
    want, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=torch.tensor([seconds for _, seconds in cases]),
        attention_mask=inputs["attention_mask"],
    )
    assert not mask.all(), "the batch must need padding"
    assert torch.equal(inputs["position_ids"][:, mask], want[:, mask])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    grid=st.tuples(st.integers(1, 40), st.integers(1, 4), st.integers(1, 4)),
    seconds=st.one_of(st.floats(0.01, 8), st.integers(1, 60).map(lambda fps: 2 / fps)),
    before=st.integers(0, 3),
    after=st.integers(0, 3),
)
@example(grid=(6, 1, 1), seconds=1.9, before=0, after=0)
def test_positions_equal_the_models_own_for_any_rate(system, model, grid, seconds, before, after):
    size = int(np.prod(grid))
    types = np.array([0] * before + [2] * size + [0] * after)
    merged = torch.tensor([[grid[0], 2 * grid[1], 2 * grid[2]]])
    want, _ = model.model.get_rope_index(
        torch.zeros(1, len(types), dtype=torch.int64),
        torch.tensor(types)[None].int(),
        video_grid_thw=merged,
        second_per_grid_ts=torch.tensor([seconds]),
    )
    clip = Clip("clip", torch.empty(0), grid, [[0]] * grid[0], seconds, fps=1.0)
    got = system.collator.encoder.family.positions(types, clip)
    assert got.tolist() == want[:, 0].tolist()


# ---- the padded batch


def test_the_dummy_clip_changes_no_loss_of_a_text_only_batch(system, model):
    conversations = [ask("which way does the circle move ?", "left"), ask("describe it .", "the red circle moves up .")]
    batch = padded(system.collator.encoder, *((c, None) for c in conversations))
    assert batch.inputs["pixel_values_videos"].shape == (4, 3 * 2 * 7 * 7)
    assert (batch.inputs["input_ids"] == system.collator.encoder.family.token_id).sum() == 1
    got = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns).logits
    got = torch.nn.functional.cross_entropy(got[batch.label_rows, batch.label_slots], batch.labels, reduction="none")
    plain = []
    for conversation in conversations:  # one by one: no padding, no vision, positions made by the model
        encoded = system.collator.encoder(conversation, name="clip#0", clip=None)
        logits = model(input_ids=torch.tensor(encoded.ids)[None], use_cache=False).logits[0, :-1]
        labels = torch.tensor(encoded.labels)[1:]
        plain.append(torch.nn.functional.cross_entropy(logits, labels, reduction="none")[labels != IGNORE])
    torch.testing.assert_close(got, torch.cat(plain), atol=1e-5, rtol=1e-5)


def test_a_batch_mixes_text_only_rows_and_clips(system, model):
    text, video = ask("which way does the [circle] move ?", "left"), ask("is there a [star] ?")
    batch = padded(system.collator.encoder, (text, None), (video, clip_of((2, 2, 3), 0.5)))
    assert [noun.conversation for noun in batch.nouns] == [1], "without a clip there is nothing to look at"
    is_video = batch.inputs["input_ids"] == system.collator.encoder.family.token_id
    assert is_video.sum(1).tolist() == [0, 12], "a real clip needs no dummy"
    ((row, first_key, num_keys),) = batch.table.clip_keys
    assert [row] * num_keys == is_video.nonzero()[:, 0].tolist()
    assert list(range(first_key, first_key + num_keys)) == is_video.nonzero()[:, 1].tolist()
    assert batch.table.row_batch.tolist() == [1] * len(batch.nouns[0].tokens)
    assert batch.table.row_position.tolist() == list(batch.nouns[0].tokens)
    alone = padded(system.collator.encoder, (text, None))
    with torch.no_grad():
        logits = [model(**b.inputs, use_cache=False).logits[0] for b in (batch, alone)]
    length = len(system.collator.encoder(text, name="clip", clip=None).ids)
    torch.testing.assert_close(logits[0][:length], logits[1][:length], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("text_only", [False, True])
def test_label_columns_pick_the_logits_that_predict_each_label(system, model, shards, text_only):
    if text_only:
        batch = padded(system.collator.encoder, (ask("?", "the red circle moves up ."), None), (ask("is it ?"), None))
    else:
        batch = make_batch(system, shards, [0, 1])
    with torch.no_grad():
        full = model(**batch.inputs, use_cache=False).logits
        kept = model(**batch.inputs, use_cache=False, logits_to_keep=batch.label_columns).logits
    assert kept.shape[1] == len(set(batch.label_columns.tolist())) < full.shape[1]
    picked = kept[batch.label_rows, batch.label_slots]
    decode = system.tokenizer.decode
    row_answers = {row: [] for row in range(len(batch.ids))}
    for row, slot, label, logits in zip(batch.label_rows, batch.label_slots, batch.labels, picked):
        column = int(batch.label_columns[slot])
        assert batch.inputs["input_ids"][row, column + 1] == label, "the logits at a column predict the next one"
        torch.testing.assert_close(logits, full[row, column], atol=1e-6, rtol=1e-6)
        row_answers[int(row)].append(int(label))
    assert all(decode(answer).endswith("<|im_end|>") for answer in row_answers.values())
    assert batch.counts["text"] == len(batch.labels) == sum(map(len, row_answers.values()))


def test_an_empty_batch_runs_through_the_loss_and_backward(system):
    """A rank whose samples were all unreadable takes part in every collective of the step, with zero weight."""
    model = system.build_model().train()
    batch = system.collator([])
    assert batch.ids == [] and batch.nouns == [] and batch.num_tokens == 4  # noqa: PT018
    assert {name: count for name, count in batch.counts.items() if count} == {}
    terms = system.loss(model, batch, Progress(0, 10))
    assert {name: term.sum.item() for name, term in terms.items()} == {"text": 0.0, "mask": 0.0}
    sum(term.weight * term.sum for term in terms.values()).backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert grads, "backward reached the parameters"
    assert all(float(grad.abs().max()) == 0 for grad in grads)
    assert model.model.visual.patch_embed.proj.weight.grad is not None, "the vision tower ran"


@dataclass
class _Parts:
    """Every tensor inside a batch, by its path."""

    found: dict[str, Tensor]

    def visit(self, path: str, value: Any) -> "_Parts":
        if isinstance(value, Tensor):
            self.found[path] = value
        elif isinstance(value, dict):
            for key, item in value.items():
                self.visit(f"{path}.{key}", item)
        elif is_dataclass(value):
            for field in fields(value):
                self.visit(f"{path}.{field.name}", getattr(value, field.name))
        return self


def test_a_batch_survives_pickling(system, shards):
    batch = make_batch(system, shards, [0, 1])
    again = pickle.loads(pickle.dumps(batch))
    want, got = (_Parts({}).visit("batch", b).found for b in (batch, again))
    assert want.keys() == got.keys()
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert (again.nouns, again.ids, again.counts) == (batch.nouns, batch.ids, batch.counts)
    pickle.loads(pickle.dumps(system.collator))  # travels to spawned loader workers


def test_moving_a_batch_moves_every_tensor(system, shards):
    batch = make_batch(system, shards, [0, 1])
    assert type(batch.to("cpu")) is type(batch)
    moved = _Parts({}).visit("batch", batch.to(torch.device("meta"))).found
    expected = {"targets.unit_weights", "table.row_position", "inputs.input_ids", "labels"}
    assert {f"batch.{name}" for name in expected} <= moved.keys()
    assert {name for name, tensor in moved.items() if tensor.device.type != "meta"} == set()
    stayed = _Parts({}).visit("batch", batch).found
    assert {tensor.device.type for tensor in stayed.values()} == {"cpu"}, "the original stays where it was"
