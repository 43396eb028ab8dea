"""From a conversation to tokens: spans -> tokens -> noun rows and labels.

The chat template is rendered once per shape of conversation, with a private-use mark where each text belongs; the texts
are then set in, so the character span of every mention is known in the rendered string and its tokens follow from the
tokenizer's offset mapping. Nothing searches for words: " dog" and "dog" are different tokens, and a twin earlier in the
prompt would steal the label.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from swim.data_tools.records import Conversation, RecordError

IGNORE = -100
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Noun:
    """A mention whose head owns rows of the batch: its place in the conversation, its objects and its tokens in the
    sequence."""

    row: int  # batch row
    turn: int
    start: int
    end: int
    text: str
    object_ids: tuple[str, ...]
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens: ids, types (0 text, 2 video) and labels (IGNORE outside answers), all (L,) int64."""

    ids: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    nouns: list[Noun]
    answer_start: int  # first token of the last answer: what comes before is the prompt


@dataclass(frozen=True)
class SpecialTokens:
    """Ids that frame a clip in the sequence, from the model's config."""

    video: int
    vision_start: int
    vision_end: int

    @classmethod
    def of(cls, config: Any) -> "SpecialTokens":
        """Read them from a Qwen2.5-VL style model config."""
        return cls(config.video_token_id, config.vision_start_token_id, config.vision_end_token_id)


class ConversationEncoder:
    """Turns a conversation into tokens with labels and noun rows; holds tokenizer and rendered template shapes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no offset mapping (it is not a fast one); load it with use_fast=True")
        self.tokenizer, self.special = tokenizer, special
        self.video_text = str(tokenizer.convert_ids_to_tokens(special.video))
        self._control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._shapes: dict[tuple[Any, ...], str] = {}

    def __call__(self, conversation: Conversation, *, name: str, num_video_tokens: int, row: int = 0) -> Encoded:
        """Encode a conversation about a clip of `num_video_tokens` tokens (0: text only); RecordError names `name`."""
        for number, turn in enumerate(conversation.turns):
            self._refuse_control_tokens(turn.text, f"{name}: turns[{number}].text")
        text, starts = self._render(conversation, with_video=num_video_tokens > 0)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids = np.array(encoding["input_ids"], dtype=np.int64)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64)
        # Composing normalisation (NFC) leaves the accent of a decomposed character to no token; the one before gets it.
        offsets[:-1, 1] = np.maximum(offsets[:-1, 1], offsets[1:, 0])

        def tokens_of(start: int, end: int) -> np.ndarray:
            lo, hi = np.maximum(offsets[:, 0], start), np.minimum(offsets[:, 1], end)
            return np.array([i for i in np.nonzero(lo < hi)[0] if text[lo[i] : hi[i]].strip()], dtype=np.int64)

        labels = np.full_like(ids, IGNORE)
        nouns: list[Noun] = []
        answer_start = len(ids)
        for number, (turn, start) in enumerate(zip(conversation.turns, starts)):
            if turn.role == "assistant":
                answer_start = int(np.searchsorted(offsets[:, 1], start, side="right"))
                answer = np.nonzero((offsets[:, 0] < start + len(turn.text)) & (offsets[:, 1] > start))[0]
                # The end-of-turn token is part of the answer: a model that never learns it never stops.
                answer_end = int(answer[-1]) + 1 if len(answer) else answer_start
                answer_end += answer_end < len(ids) and self._is_control(ids[answer_end])
                labels[answer_start:answer_end] = ids[answer_start:answer_end]
            for mention in turn.mentions:
                if mention.kind == "noun" and mention.object_ids:
                    tokens = tokens_of(start + mention.head[0], start + mention.head[1])
                    head = turn.text[slice(*mention.head)]
                    if not len(tokens):
                        raise RecordError(f"{name}: turns[{number}]: the tokenizer gives no token to the noun {head!r}")
                    nouns.append(
                        Noun(
                            row,
                            number,
                            mention.start,
                            mention.end,
                            head,
                            tuple(mention.object_ids),
                            tuple(map(int, tokens)),
                        )
                    )
        return self._insert_video(Encoded(ids, np.zeros_like(ids), labels, nouns, answer_start), num_video_tokens)

    def _render(self, conversation: Conversation, *, with_video: bool) -> tuple[str, list[int]]:
        shape = (with_video, *(turn.role for turn in conversation.turns))
        if shape not in self._shapes:
            self._shapes[shape] = self._render_shape(shape)
        text = ""
        starts: list[int] = []
        for piece in _MARKS.split(self._shapes[shape])[::2]:
            text += piece
            if len(starts) < len(conversation.turns):
                starts.append(len(text))
                text += conversation.turns[len(starts) - 1].text
        return text, starts

    def _render_shape(self, shape: tuple[Any, ...]) -> str:
        with_video, *roles = shape
        first_user = roles.index("user") if "user" in roles else -1
        messages = [
            {
                "role": role,
                "content": [{"type": "video"}] * (with_video and number == first_user)
                + [{"type": "text", "text": _MARK.format(number)}],
            }
            for number, role in enumerate(roles)
        ]
        rendered = str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False))
        if [int(number) for number in _MARKS.findall(rendered)] != list(range(len(roles))):
            raise ValueError(
                f"the chat template drops, repeats or reorders turns of roles {roles}; give a template that keeps them"
            )
        if rendered.count(self.video_text) != int(with_video):
            raise ValueError(
                f"the chat template writes {rendered.count(self.video_text)} {self.video_text} for {int(with_video)} "
                "video; give a template with one placeholder per video"
            )
        return rendered

    def _insert_video(self, encoded: Encoded, count: int) -> Encoded:
        if count == 0:
            return encoded
        (at,) = np.nonzero(encoded.ids == self.special.video)[0]  # unique: texts hold no control tokens

        def widen(values: np.ndarray, value: int) -> np.ndarray:
            return np.concatenate([values[:at], np.full(count, value, dtype=np.int64), values[at + 1 :]])

        def moved(token: int) -> int:
            return token + count - 1 if token > at else token

        return Encoded(
            ids=widen(encoded.ids, self.special.video),
            types=widen(encoded.types, 2),
            labels=widen(encoded.labels, IGNORE),
            # A noun before the clip sees none of it: causal attention forbids what a loss on it would train.
            nouns=[
                replace(noun, tokens=tuple(map(moved, noun.tokens)))
                for noun in encoded.nouns
                if noun.tokens and min(noun.tokens) > at
            ],
            answer_start=moved(encoded.answer_start),
        )

    def _is_control(self, token: np.int64) -> bool:
        return int(token) in self.tokenizer.added_tokens_decoder

    def _refuse_control_tokens(self, text: str, where: str) -> None:
        # A tokenizer turns "<|im_end|>" inside a text into the real token: it would end the turn or claim a video.
        if found := next((token for token in self._control if token in text), None):
            raise RecordError(
                f"{where}: contains the control token {found!r} at character {text.index(found)}; remove or rewrite it"
            )
        if "\ue000" in text:
            raise RecordError(
                f"{where}: contains the private-use character U+E000 at {text.index(chr(0xE000))}; remove it"
            )
