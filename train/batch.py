"""From records to one padded batch: spans -> tokens -> noun rows, positions, labels.

The chat template is rendered once per shape of conversation, with a private-use mark where each text belongs; the texts
are then set in, so the character span of every mention is known in the rendered string and its tokens follow from the
tokenizer's offset mapping. Nothing searches for words: " dog" and "dog" are different tokens, and a twin earlier in the
prompt would steal the label. Everything here is picklable CPU work for loader workers; the model is not needed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from swim.data_tools.records import Conversation, RecordError
from swim.kernels.noun_attention import ClipKeys, Scope, WorkTable, build_work_table
from swim.train.preprocess import Geometry

IGNORE = -100
_MARK = "\ue000{}\ue001"
_MARKS = re.compile("\ue000(\\d+)\ue001")


@dataclass(frozen=True)
class Clip:
    """One decoded clip: patch rows (T*H*W, values), token grid (T, h, w), the stored frames behind each temporal
    step."""

    key: str
    patches: Tensor
    grid: tuple[int, int, int]
    frames: list[list[int]]
    seconds_per_step: float


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
    """Turns a conversation into tokens with labels and noun rows; holds the tokenizer and the rendered template
    shapes."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, special: SpecialTokens) -> None:
        if not tokenizer.is_fast:
            raise ValueError("the tokenizer has no offset mapping (it is not a fast one); load it with use_fast=True")
        self.tokenizer, self.special = tokenizer, special
        self.video_text = str(tokenizer.convert_ids_to_tokens(special.video))
        self._control = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._shapes: dict[tuple[Any, ...], str] = {}

    def __call__(self, conversation: Conversation, *, name: str, num_video_tokens: int, row: int = 0) -> Encoded:
        """Encode one conversation about a clip of `num_video_tokens` tokens (0: text only); RecordError names
        `name`."""
        for number, turn in enumerate(conversation.turns):
            self._refuse_control_tokens(turn.text, f"{name}: turns[{number}].text")
        text, starts = self._render(conversation, with_video=num_video_tokens > 0)
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids, offsets = (
            np.array(encoding["input_ids"], dtype=np.int64),
            np.array(encoding["offset_mapping"], dtype=np.int64),
        )
        # Composing normalisation (NFC) leaves the accent of a decomposed character to no token: the token before gets
        # it.
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


def mrope_positions(
    types: np.ndarray, clips: Sequence[tuple[tuple[int, int, int], float]], tokens_per_second: float
) -> np.ndarray:
    """Multimodal RoPE positions (3, L) of one sequence: text counts on, a clip (grid, seconds per step) spans time,
    row, column.

    After a clip, text goes on at the clip's start plus the longer side of its grid. Source: Qwen2.5-VL (arXiv
    2502.13923), 2.1.
    """
    positions = np.empty((3, len(types)), dtype=np.int64)
    remaining, at, position = list(clips), 0, 0
    while at < len(types):
        if types[at] == 0:
            end = at + int(np.argmax(types[at:] != 0)) if (types[at:] != 0).any() else len(types)
            positions[:, at:end] = position + np.arange(end - at)
            position += end - at
        else:
            (steps, height, width), seconds = remaining.pop(0)
            end = at + steps * height * width
            # float32 as in the model, which truncates the product: float64 would differ at exact multiples.
            time = (
                np.arange(steps, dtype=np.float32) * np.float32(np.float32(seconds) * np.float32(tokens_per_second))
            ).astype(np.int64)
            grid = np.stack(np.meshgrid(time, np.arange(height), np.arange(width), indexing="ij"))
            positions[:, at:end] = position + grid.reshape(3, -1)
            position += max(height, width)
        at = end
    return positions


@dataclass(frozen=True)
class Hole:
    """A unit that could not be made into rows: it keeps its place in the order and carries no loss."""

    id: str
    shard: str
    offset: int
    reason: str


@dataclass
class Batch:
    """One micro-batch: model inputs, answer labels, noun rows, counts for step-wide means, and who is in it."""

    inputs: dict[str, Tensor]
    label_columns: Tensor  # (C,) sequence columns whose logits are needed (`logits_to_keep`)
    label_rows: Tensor  # (A,) batch row of each answer token
    label_slots: Tensor  # (A,) its place in label_columns
    labels: Tensor  # (A,) the answer tokens
    table: WorkTable
    nouns: list[Noun]
    clips: list[Clip | None]  # per batch row
    ids: list[str]  # per batch row, KEY#conversation
    prompt_lengths: list[int]  # per batch row
    counts: dict[str, float]
    holes: list[Hole] = field(default_factory=list)

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.inputs["attention_mask"].sum())

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return _moved(self, device)


def _moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
    return value


def pad_batch(
    rows: Sequence[tuple[str, Encoded, Clip | None]],
    *,
    special: SpecialTokens,
    geometry: Geometry,
    scope: Scope,
    pad_token: int,
    holes: Sequence[Hole] = (),
) -> Batch:
    """Right-pad encoded conversations (id, tokens, clip) into one batch; without any clip, a one-token dummy clip is
    appended.

    The dummy stands behind the last token of row 0, where causal attention hides it from every label; it makes the
    vision tower run on every rank in every micro-batch, as ZeRO-3's collectives need. With no rows at all the batch is
    such a dummy alone.
    """
    encoded = [e for _, e, _ in rows] or [
        Encoded(np.array([pad_token]), np.array([0]), np.array([IGNORE]), nouns=[], answer_start=1)
    ]
    clips: list[Clip | None] = [clip for _, _, clip in rows] or [None]
    pixels = [clip.patches for clip in clips if clip is not None]
    grids = [clip.grid for clip in clips if clip is not None]
    clips_of_row = [[(clip.grid, clip.seconds_per_step)] if clip is not None else [] for clip in clips]
    if not pixels:
        tail = np.array([special.vision_start, special.video, special.vision_end])
        first = encoded[0]
        encoded[0] = replace(
            first,
            ids=np.concatenate([first.ids, tail]),
            types=np.concatenate([first.types, np.array([0, 2, 0])]),
            labels=np.concatenate([first.labels, np.full(3, IGNORE)]),
        )
        clips_of_row[0] = [((1, 1, 1), 1.0)]
        grids = [(1, 1, 1)]
        pixels = [torch.zeros(geometry.merge_size**2, geometry.patch_values)]

    shape = (len(encoded), max(len(e.ids) for e in encoded))
    ids, types, mask = np.full(shape, pad_token), np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    labels, positions = np.full(shape, IGNORE), np.zeros((3, *shape), dtype=np.int64)
    keys: list[ClipKeys] = []
    noun_rows: list[tuple[int, int]] = []
    nouns: list[Noun] = []
    for row, e in enumerate(encoded):
        length = len(e.ids)
        ids[row, :length], types[row, :length], mask[row, :length], labels[row, :length] = e.ids, e.types, 1, e.labels
        positions[:, row, :length] = mrope_positions(e.types, clips_of_row[row], geometry.tokens_per_second)
        if (clip := clips[row]) is not None:
            nouns += [replace(noun, row=row) for noun in e.nouns]
            noun_rows += [(len(keys), token) for noun in e.nouns for token in noun.tokens]
            keys.append(ClipKeys(row, int(np.argmax(e.types == 2)), clip.grid))

    # Logits are taken only where a label is predicted: at 152 000 tokens of vocabulary they are the largest tensor of a
    # step.
    label_rows, label_positions = np.nonzero(labels != IGNORE)
    columns, slots = np.unique(label_positions - 1, return_inverse=True)
    merge = geometry.merge_size
    return Batch(
        inputs={
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(mask),
            "position_ids": torch.from_numpy(positions),
            "mm_token_type_ids": torch.from_numpy(types).int(),
            "pixel_values_videos": torch.cat(pixels),
            "video_grid_thw": torch.tensor([(t, h * merge, w * merge) for t, h, w in grids]),
        },
        label_columns=torch.from_numpy(columns) if len(columns) else torch.zeros(1, dtype=torch.int64),
        label_rows=torch.from_numpy(label_rows),
        label_slots=torch.from_numpy(slots.reshape(-1)),
        labels=torch.from_numpy(labels[label_rows, label_positions]),
        table=build_work_table(noun_rows, keys, scope),
        nouns=nouns,
        # Without the pixels, which are among the inputs: a batch crosses from the loader's process to the trainer's.
        clips=[clip and replace(clip, patches=clip.patches[:0]) for clip in clips],
        ids=[name for name, _, _ in rows],
        prompt_lengths=[e.answer_start for e in encoded],
        counts={"text": float(len(label_rows))},
        holes=list(holes),
    )
