"""From encoded conversations to one batch: rows, positions, labels, noun rows and the table of keys they look at.

Conversations about one clip become one sequence: what stands up to the end of the clip once, then a branch for each
(`layout.py`), every token at the position it would have alone. Sequences lie in rows of their own, right-padded, or all
in one row, packed. Cost: a clip's visual tokens and its vision pass are paid once, however many questions. Everything
here is picklable CPU work for loader workers; the model is not needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from swim.kernels.noun_attention import ClipKeys, Row, Scope, WorkTable, build_work_table
from swim.train.encode import IGNORE, ConversationEncoder, Encoded, Noun
from swim.train.families import Clip
from swim.train.layout import Layout


@dataclass(frozen=True)
class Hole:
    """A unit that could not be made into rows: it keeps its place in the order and carries no loss."""

    id: str
    shard: str
    offset: int
    reason: str


@dataclass(frozen=True)
class BatchOptions:
    """How conversations become rows of tokens, and noun tokens query rows."""

    pad_token: int
    packed: bool = False  # all sequences in one row
    shared_prefix: bool = True  # conversations about a clip share its tokens
    scope: Scope = "frame"
    row_offset: int = 0  # -1: the query that predicts the noun token instead of its own
    sequence: int = 1  # ranks that divide the columns: padded to a multiple of it, and always with a layout


@dataclass
class Batch:
    """One micro-batch: model inputs, answer labels, noun rows, counts for step-wide means, and who is in it."""

    inputs: dict[str, Tensor]
    layout: Layout | None  # None: rows of one plain sequence each, described by the attention mask alone
    label_columns: Tensor  # (C,) sequence columns whose logits are needed (`logits_to_keep`)
    label_rows: Tensor  # (A,) batch row of each answer token
    label_slots: Tensor  # (A,) place in label_columns of the column that predicts it
    labels: Tensor  # (A,) the answer tokens
    label_conversations: Tensor  # (A,) whose they are
    table: WorkTable
    nouns: list[Noun]
    clips: list[Clip | None]  # per conversation
    ids: list[str]  # per conversation, KEY#conversation
    num_tokens: int  # without padding; a shared prefix counts once
    num_pairs: int  # of a token and one that it attends to, itself included
    counts: dict[str, float]
    holes: list[Hole] = field(default_factory=list)
    sources: list[str] = field(default_factory=list)  # per conversation, that of its record

    def to(self, device: torch.device | str) -> Self:
        """The batch with every tensor on `device`."""
        return moved(self, device)

    def pinned(self) -> Self:
        """The batch with every tensor in page-locked memory, from which a GPU copies while it computes."""
        return with_tensors(self, Tensor.pin_memory)


def moved(value: Any, device: torch.device | str) -> Any:
    """Copy of a tensor, or of a dictionary or dataclass of such, on `device`."""
    return with_tensors(value, lambda tensor: tensor.to(device, non_blocking=True))


def with_tensors(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Copy of a tensor, or of a dictionary or dataclass of such, with `change` applied; anything else as it is."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: with_tensors(item, change) for key, item in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: with_tensors(getattr(value, f.name), change) for f in fields(value)})
    return value


@dataclass(frozen=True)
class _Place:
    """Where the tokens of a conversation lie: its sequence's row and first column, and its branch."""

    row: int
    start: int
    prefix: int  # tokens shared with the other branches; all of them for a plain sequence
    branch: int  # first column of the branch

    def column(self, token: int) -> int:
        return self.start + token if token < self.prefix else self.branch + token - self.prefix

    def ranges(self, end: int) -> tuple[tuple[int, int], ...]:
        """Columns of tokens [0, end)."""
        shared = (self.start, self.start + min(end, self.prefix))
        return (shared, (self.branch, self.branch + end - self.prefix)) if end > self.prefix else (shared,)


def make_batch(
    conversations: Sequence[tuple[str, Encoded, Clip | None]],
    encoder: ConversationEncoder,
    options: BatchOptions,
    *,
    holes: Sequence[Hole] = (),
) -> Batch:
    """One batch of encoded conversations (id, tokens, clip); without any clip, a dummy clip is appended.

    The dummy stands behind the last token of the first conversation, where causal attention hides it from every label;
    it makes the vision tower run on every rank in every micro-batch, as ZeRO-3's collectives need. With no
    conversations at all the batch is such a dummy alone.
    """
    nothing = Encoded(np.array([options.pad_token]), np.array([0]), np.array([IGNORE]), [], 1, prefix=0, blind_nouns=0)
    encoded = [e for _, e, _ in conversations] or [nothing]
    clips: list[Clip | None] = [clip for _, _, clip in conversations] or [None]
    groups = _groups(encoded, clips, options.shared_prefix)
    shown = [clips[group[0]] for group in groups]
    if not any(shown):
        shown[0] = encoder.family.dummy()
        encoded[0] = _with_dummy(encoded[0], shown[0], encoder)

    rows, places = _lay_out(encoded, groups, packed=options.packed)
    layout = Layout(tuple(tuple(_pieces(encoded, groups[g]) for g in row) for row in rows), 0)
    longest = max(sum(map(sum, row)) for row in layout.rows)
    layout = replace(layout, length=-(-longest // options.sequence) * options.sequence)
    shape = (len(rows), layout.length)
    ids, types = np.full(shape, options.pad_token), np.zeros(shape, dtype=np.int64)
    positions: np.ndarray | None = None
    clip_of = [clip for clip, group in zip(shown, groups) for _ in group]
    for e, place, clip in zip(encoded, places, clip_of):
        own = encoder.family.positions(e.types, clip)
        positions = np.zeros((len(own), *shape), dtype=np.int64) if positions is None else positions
        for start, end in ((0, place.prefix), (place.prefix, len(e.ids))):
            columns = slice(place.column(start), place.column(start) + end - start)
            ids[place.row, columns], types[place.row, columns] = e.ids[start:end], e.types[start:end]
            positions[:, place.row, columns] = own[:, start:end]

    assert positions is not None
    token_types = torch.from_numpy(types)
    inputs = {
        "input_ids": torch.from_numpy(ids),
        "position_ids": torch.from_numpy(positions if len(positions) > 1 else positions[0]),
        **encoder.family.inputs([clip for row in rows for g in row if (clip := shown[g]) is not None], token_types),
    }
    lengths = torch.tensor([sum(map(sum, row)) for row in layout.rows])
    mask = torch.arange(layout.length) < lengths[:, None]
    # Beside a layout all ones, which transformers drops; without any it takes restarting positions for packed sequences
    # and builds an L x L mask, which `attend` has no use for.
    inputs["attention_mask"] = (mask if layout.is_padded else torch.ones_like(mask)).long()
    table, nouns = _noun_rows(encoded, clips, groups, places, options)
    labels = _labels(encoded, places)
    return Batch(
        inputs=inputs,
        layout=None if layout.is_padded and options.sequence == 1 else layout,
        **labels,
        table=table,
        nouns=nouns,
        # Without the pixels, which are among the inputs: a batch crosses from the loader's process to the trainer's.
        clips=[clip and replace(clip, pixels=torch.empty(0)) for clip in clips],
        ids=[name for name, _, _ in conversations],
        num_tokens=layout.num_tokens,
        num_pairs=layout.num_pairs,
        counts={"text": float(len(labels["labels"])), "blind_nouns": float(_num_blind(encoded, clips))},
        holes=list(holes),
        sources=[],
    )


def _groups(encoded: Sequence[Encoded], clips: Sequence[Clip | None], shared: bool) -> list[list[int]]:
    """Conversations by sequence: neighbours about the same clip that are equal up to its end."""
    groups: list[list[int]] = []
    last = None
    for number, (e, clip) in enumerate(zip(encoded, clips)):
        key = (id(clip), e.ids[: e.prefix].tobytes()) if shared and clip is not None else None
        if key is not None and key == last:
            groups[-1].append(number)
        else:
            groups.append([number])
        last = key
    return groups


def _pieces(encoded: Sequence[Encoded], group: Sequence[int]) -> tuple[int, ...]:
    if len(group) == 1:
        return (len(encoded[group[0]].ids),)
    prefix = encoded[group[0]].prefix
    return (prefix, *(len(encoded[number].ids) - prefix for number in group))


def _lay_out(
    encoded: Sequence[Encoded], groups: Sequence[Sequence[int]], *, packed: bool
) -> tuple[list[list[int]], list[_Place]]:
    """Groups of every row, and the place of every conversation."""
    rows = [list(range(len(groups)))] if packed else [[g] for g in range(len(groups))]
    places: list[_Place] = []
    for row, of_row in enumerate(rows):
        start = 0
        for g in of_row:
            prefix, *branches = _pieces(encoded, groups[g])
            branch = start + prefix
            for length in branches or [0]:
                places.append(_Place(row, start, prefix, branch))
                branch += length
            start = branch
    return rows, places


def _noun_rows(
    encoded: Sequence[Encoded],
    clips: Sequence[Clip | None],
    groups: Sequence[Sequence[int]],
    places: Sequence[_Place],
    options: BatchOptions,
) -> tuple[WorkTable, list[Noun]]:
    """Work table and nouns; a clip's key columns are the first T x h x w placeholders of its sequence."""
    keys: list[ClipKeys] = []
    rows: list[Row] = []
    nouns: list[Noun] = []
    for group in groups:
        clip, place = clips[group[0]], places[group[0]]
        if clip is None:
            continue
        visual = np.nonzero(encoded[group[0]].types)[0][: clip.num_cells]
        columns = (place.start + visual).tolist()
        contiguous = columns[-1] - columns[0] + 1 == len(columns)
        for number in group:
            e = encoded[number]
            for noun in e.nouns:
                nouns.append(replace(noun, conversation=number))
                for token in (token + options.row_offset for token in noun.tokens):
                    end = len(e.ids) if options.scope == "full" else token + 1
                    rows.append(Row(len(keys), places[number].column(token), places[number].ranges(end)))
        keys.append(ClipKeys(place.row, columns[0], clip.grid, None if contiguous else columns))
    return build_work_table(rows, keys, options.scope), nouns


def _num_blind(encoded: Sequence[Encoded], clips: Sequence[Clip | None]) -> int:
    """Nouns that own no rows: those in front of their clip, and all of a conversation without one."""
    return sum(e.blind_nouns + (len(e.nouns) if clip is None else 0) for e, clip in zip(encoded, clips))


def _labels(encoded: Sequence[Encoded], places: Sequence[_Place]) -> dict[str, Tensor]:
    """Answer tokens with the row and column that predict them."""
    # Logits are taken only where a label is predicted: with a vocabulary of 152 000 they are a step's largest tensor.
    found = [
        (place.row, place.column(int(token) - 1), e.labels[token], number)
        for number, (e, place) in enumerate(zip(encoded, places))
        for token in np.nonzero(e.labels != IGNORE)[0]
    ]
    rows, predicting, labels, conversations = np.array(found, dtype=np.int64).reshape(-1, 4).T
    columns, slots = np.unique(predicting, return_inverse=True)
    return {
        "label_columns": torch.from_numpy(columns) if len(columns) else torch.zeros(1, dtype=torch.int64),
        "label_rows": torch.from_numpy(rows.copy()),
        "label_slots": torch.from_numpy(slots.reshape(-1)),
        "labels": torch.from_numpy(labels.copy()),
        "label_conversations": torch.from_numpy(conversations.copy()),
    }


def _with_dummy(encoded: Encoded, clip: Clip | None, encoder: ConversationEncoder) -> Encoded:
    assert clip is not None
    ids, types = encoder.clip_tokens(clip)
    return replace(
        encoded,
        ids=np.concatenate([encoded.ids, ids]),
        types=np.concatenate([encoded.types, types]),
        labels=np.concatenate([encoded.labels, np.full(len(ids), IGNORE)]),
    )
