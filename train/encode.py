"""From a conversation to tokens: spans -> tokens -> noun rows and labels.

The chat template is rendered once per shape of conversation, with a private-use mark where each text belongs; the texts
are then set in, so the character span of every mention is known in the rendered string and its tokens follow from the
tokenizer's offset mapping. Nothing searches for words: " dog" and "dog" are different tokens, and a twin earlier in the
prompt would steal the label.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from swim.data_tools.records import Conversation, RecordError
from swim.train.families import Clip, Family

IGNORE = -100
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Noun:
    """A mention whose head owns rows of the batch: its place among the conversations, its objects and its tokens in its
    conversation's sequence."""

    conversation: int  # number in the batch
    turn: int
    start: int
    end: int
    text: str
    object_ids: tuple[str, ...]
    tokens: tuple[int, ...]
    kind: str = "noun"


@dataclass(frozen=True)
class Encoded:
    """One conversation as tokens: ids, types (0 text, 2 visual) and labels (IGNORE outside answers), all (L,) int64."""

    ids: np.ndarray
    types: np.ndarray
    labels: np.ndarray
    nouns: list[Noun]
    answer_start: int  # first token of the last answer: what comes before is the prompt
    prefix: int  # tokens up to the end of the clip, which conversations about it may share; 0 without a clip
    blind_nouns: int  # nouns in front of the clip: they see none of it and own no rows


class ConversationEncoder:
    """Turns a conversation into tokens with labels and rows of the mentions of `kinds`; holds tokenizer and rendered
    template shapes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, family: Family, kinds: Collection[str] = ("noun",)) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no offset mapping (it is not a fast one); load it with use_fast=True")
        self.tokenizer, self.family, self.kinds = tokenizer, family, tuple(kinds)
        self._control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._control_ids = frozenset(tokenizer.added_tokens_decoder)
        self._shapes: dict[tuple[Any, ...], str] = {}

    def __call__(self, conversation: Conversation, *, name: str, clip: Clip | None) -> Encoded:
        """Encode a conversation about `clip` (None: text only); RecordError names `name`."""
        for number, turn in enumerate(conversation.turns):
            self._refuse_control_tokens(turn.text, f"{name}: turns[{number}].text")
        text, starts, clip_end = self._render(conversation, clip)
        ids, offsets = self._tokenize(text)
        # The first token behind the clip and the control tokens that close it.
        prefix = int(np.searchsorted(offsets[:, 0], clip_end)) if clip else 0
        while clip and prefix < len(ids) and self._is_control(ids[prefix]):
            prefix += 1

        def tokens_of(start: int, end: int) -> np.ndarray:
            lo, hi = np.maximum(offsets[:, 0], start), np.minimum(offsets[:, 1], end)
            return np.array([i for i in np.nonzero(lo < hi)[0] if text[lo[i] : hi[i]].strip()], dtype=np.int64)

        widths = np.ones_like(ids)
        if clip:
            widths[ids == self.family.token_id] = self.family.runs(clip)
        moved = np.cumsum(widths) - widths  # place of every token once the runs are as long as they will be
        labels = np.full_like(ids, IGNORE)
        nouns: list[Noun] = []
        blind_nouns = 0
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
                if mention.kind in self.kinds and mention.object_ids:
                    tokens = tokens_of(start + mention.head[0], start + mention.head[1])
                    head = turn.text[slice(*mention.head)]
                    if not len(tokens):
                        raise RecordError(f"{name}: turns[{number}]: the tokenizer gives no token to the noun {head!r}")
                    # A noun before the clip sees none of it: causal attention forbids what a loss on it would train.
                    if tokens[0] < prefix:
                        blind_nouns += 1
                    else:
                        objects = tuple(mention.object_ids)
                        places = tuple(moved[tokens].tolist())
                        nouns.append(Noun(0, number, mention.start, mention.end, head, objects, places, mention.kind))
        end = int(widths.sum())
        return Encoded(
            ids=ids.repeat(widths),
            types=self._types(ids, clip).repeat(widths),
            labels=labels.repeat(widths),
            nouns=nouns,
            answer_start=int(moved[answer_start]) if answer_start < len(ids) else end,
            prefix=int(moved[prefix]) if prefix < len(ids) else end,
            blind_nouns=blind_nouns,
        )

    def clip_tokens(self, clip: Clip) -> tuple[np.ndarray, np.ndarray]:
        """Ids and types of the clip's text alone, framed as the chat template frames it."""
        shape = (True, "user")
        if shape not in self._shapes:
            self._shapes[shape] = self._render_shape(shape)
        text = self._shapes[shape]
        at = text.index(self.family.template)
        ids, _ = self._tokenize(text[:at] + self.family.text(clip) + text[at + len(self.family.template) :])
        first, last = np.nonzero(ids == self.family.token_id)[0][[0, -1]]
        # With the control tokens that touch it, such as those for the start and end of vision.
        first -= first > 0 and self._is_control(ids[first - 1])
        last += last + 1 < len(ids) and self._is_control(ids[last + 1])
        ids = ids[first : last + 1]
        widths = np.ones_like(ids)
        widths[ids == self.family.token_id] = self.family.runs(clip)
        return ids.repeat(widths), self._types(ids, clip).repeat(widths)

    def _types(self, ids: np.ndarray, clip: Clip | None) -> np.ndarray:
        return np.where(ids == self.family.token_id, 2, 0) if clip else np.zeros_like(ids)

    def _tokenize(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        offsets = np.array(encoding["offset_mapping"], dtype=np.int64)
        # Composing normalisation (NFC) leaves the accent of a decomposed character to no token; the one before gets it.
        offsets[:-1, 1] = np.maximum(offsets[:-1, 1], offsets[1:, 0])
        return np.array(encoding["input_ids"], dtype=np.int64), offsets

    def _render(self, conversation: Conversation, clip: Clip | None) -> tuple[str, list[int], int]:
        """Rendered text, the start of every turn's text in it, and the end of the clip's text."""
        shape = (clip is not None, *(turn.role for turn in conversation.turns))
        if shape not in self._shapes:
            self._shapes[shape] = self._render_shape(shape)
        text, clip_end = "", 0
        starts: list[int] = []
        for piece in _MARKS.split(self._shapes[shape])[::2]:
            if clip is not None and (at := piece.find(self.family.template)) >= 0:
                video = self.family.text(clip)
                clip_end = len(text) + at + len(video)
                piece = piece[:at] + video + piece[at + len(self.family.template) :]
            text += piece
            if len(starts) < len(conversation.turns):
                starts.append(len(text))
                text += conversation.turns[len(starts) - 1].text
        return text, starts, clip_end

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
        if (found := rendered.count(self.family.template)) != int(with_video):
            raise ValueError(
                f"the chat template writes {found} {self.family.template} for {int(with_video)} video; give a template "
                "with one placeholder per video"
            )
        return rendered

    def _is_control(self, token: np.int64) -> bool:
        return int(token) in self._control_ids

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
