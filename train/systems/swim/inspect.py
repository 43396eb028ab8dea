"""`swim data inspect`: a page of what the recipe makes of clips, before any model is built.

Frames, grid, noun tokens and coverage come from the collator that training uses; nothing is computed a second time
here. The template is in evaluation/inspect.html.jinja. One clip is in memory at a time.
"""

import itertools
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.colors import to_hex

from swim.data_tools.records import Masks, Record, RecordError, Turn
from swim.data_tools.shards import BadSample, Sample, ShardSet
from swim.data_tools.video import VideoError, decode_frames
from swim.evaluation.figures import strip_png
from swim.evaluation.report import MAX_STEPS, Picture, embed, environment
from swim.train.batch import Hole
from swim.train.config import Config
from swim.train.encode import IGNORE
from swim.train.families import Clip
from swim.train.system import Request
from swim.train.systems.swim.data import SwimBatch
from swim.train.systems.swim.model import SwimSystem
from swim.train.systems.swim.targets import step_coverages, step_masks

PALETTE = [to_hex(colour) for colour in colormaps["tab10"].colors]  # type: ignore[attr-defined]
DRAWN_WIDTH = 400  # pixels, about twice what a frame has on the page


@dataclass(frozen=True)
class Target:
    """Objects that a noun names, their coverage (h, w) in each step (None: not annotated), and its pictures."""

    labels: Sequence[str]
    colour: str
    coverages: Sequence[np.ndarray | None]
    strips: Sequence[tuple[Picture, str]]  # with alternative texts

    @property
    def unannotated_steps(self) -> int:
        """Steps without any annotated frame."""
        return sum(coverage is None for coverage in self.coverages)

    @property
    def absent_steps(self) -> int:
        """Steps in whose annotated frames nothing is seen."""
        return sum(coverage is not None and not coverage.any() for coverage in self.coverages)


@dataclass(frozen=True)
class Piece:
    """A part of a turn's text; `note` says what its mentions are, `colour` is that of the target of its noun rows."""

    text: str
    note: str = ""
    colour: str | None = None


@dataclass(frozen=True)
class Talk:
    """A conversation with its text tokens, those of them that are answers, and its turns (role, pieces)."""

    id: str
    task: str
    text_tokens: int
    answer_tokens: int
    turns: Sequence[tuple[str, Sequence[Piece]]]


@dataclass(frozen=True)
class Entry:
    """A clip of the page; with nothing but `holes` if no conversation of it can be used."""

    key: str
    holes: Sequence[Hole]
    place: tuple[str, int] = ("", 0)
    record: Record | None = None
    clip: Clip | None = None
    objects: Sequence[tuple[str, str, int, int, int]] = ()  # id, label, frames present, absent, not annotated
    talks: Sequence[Talk] = ()
    other_tasks: int = 0  # conversations that are left out
    targets: Sequence[Target] = ()
    batch: SwimBatch | None = field(default=None, repr=False)


def write_page(
    samples: Iterable[tuple[ShardSet, str, tuple[int, ...] | None]],
    config: Config,
    out: Path,
    *,
    title: str,
    origin: str,
) -> tuple[int, int]:
    """Write the page about samples by shards, key and conversations (None: all of data.tasks); returns how many clips
    it shows and how many holes it names. `origin` says by a digest what they were taken from."""
    system = SwimSystem(config)
    shown = bad = 0

    def entries() -> Iterator[Entry]:
        nonlocal shown, bad
        for shards, key, conversations in samples:
            entry = inspect_clip(shards, key, system, conversations)
            shown, bad = shown + bool(entry.record), bad + len(entry.holes)
            yield entry

    template = environment().get_template("inspect.html.jinja")
    page = template.stream(
        title=title,
        entries=entries(),
        data=config.data,
        options=system.options,
        family=system.model_config.model_type,
        origin=origin,
    )
    out.parent.mkdir(parents=True, exist_ok=True)
    hidden = out.with_name(f".{out.name}.partial")
    with hidden.open("w", encoding="utf-8") as file:
        file.writelines(page)
    os.replace(hidden, out)
    return shown, bad


def inspect_clip(shards: ShardSet, key: str, system: SwimSystem, wanted: tuple[int, ...] | None = None) -> Entry:
    """What the recipe makes of one sample, of all conversations of data.tasks or of the `wanted`, and the targets of
    their nouns."""
    collator = system.collator
    try:
        sample = shards.read(key)
        tasks = collator.data.tasks
        conversations = sample.record.conversations
        chosen = wanted or tuple(i for i, talk in enumerate(conversations) if tasks is None or talk.task in tasks)
        if not chosen:
            found = sorted({talk.task for talk in conversations})
            raise RecordError(f"no conversation of data.tasks {tasks}, only of {found}; training leaves this clip out")
        encoded, holes = collator.encode(Request(sample, chosen))
        if not encoded:
            return Entry(key, holes)
        batch = collator.assemble(encoded, [sample.masks] * len(encoded), holes)
        clip = encoded[0][2]
        found_targets = {noun.object_ids: steps for noun, steps in zip(batch.nouns, batch.coverages)}
        colours = dict(zip(found_targets, itertools.cycle(PALETTE)))
        labels = {thing.id: f"{thing.label} (id {thing.id})" for thing in sample.record.objects}
        targets = []
        if clip is not None:
            numbers = [frame for step in clip.frames for frame in step]
            frames = _drawn(decode_frames(sample.media(), numbers, decoder=collator.data.decoder))
            for ids, coverages in found_targets.items():
                names = [labels.get(name, name) for name in ids]
                strips = list(_strips(clip, frames, ids, coverages, sample.masks, " and ".join(names)))
                targets.append(Target(names, colours[ids], coverages, strips))
            if not targets:
                targets.append(Target([], "", [], list(_strips(clip, frames, (), None, {}, ""))))
    except BadSample as error:
        return Entry(key, [Hole(key, error.shard, error.offset, error.reason)])
    except (VideoError, RecordError) as error:
        return Entry(key, [Hole(key, *sample.place, str(error))])
    # The tokens of nouns as the loss reads them; several terms of one noun, such as its sub-tokens, are one here.
    tokens: dict[tuple[int, int, int, int, tuple[str, ...]], list[int]] = {}
    for noun in batch.nouns:
        place = (noun.conversation, noun.turn, noun.start, noun.end, noun.object_ids)
        tokens.setdefault(place, []).extend(noun.tokens)
    talks = []
    for number, (name, one, _) in enumerate(encoded):
        conversation = conversations[int(name.rpartition("#")[2])]
        owned = {
            (turn, start, end, ids): [system.tokenizer.decode([token]) for token in one.ids[list(places)]]
            for (at, turn, start, end, ids), places in tokens.items()
            if at == number
        }
        turns = [
            (t.role, list(_pieces(i, t, owned, colours, labels, system.options.words)))
            for i, t in enumerate(conversation.turns)
        ]
        counts = int((one.types == 0).sum()), int((one.labels != IGNORE).sum())
        talks.append(Talk(name, conversation.task, *counts, turns))
    objects = [(thing.id, thing.label, *_annotation(sample, thing.id)) for thing in sample.record.objects]
    others = len(conversations) - len(chosen)
    return Entry(key, holes, sample.place, sample.record, clip, objects, talks, others, targets, batch)


def _strips(
    clip: Clip,
    frames: np.ndarray,
    ids: tuple[str, ...],
    coverages: Sequence[np.ndarray | None] | None,
    masks: Masks,
    name: str,
) -> Iterator[tuple[Picture, str]]:
    """Pictures of the sampled frames with the contour of the objects, over what the loss sees of their step."""
    grid = clip.grid[1:]
    columns = [(step, frame) for step, of_step in enumerate(clip.frames) for frame in of_step]
    per_step = len(clip.frames[0])
    most = max(1, MAX_STEPS // per_step) * per_step  # a step is not torn apart
    for first in range(0, len(columns), most):
        part = columns[first : first + most]
        titles = [f"step {step} · frame {frame}" for step, frame in part]
        drawn: list[np.ndarray | None] = [None] * len(part)
        maps, notes = {}, {}
        alt = f"sampled frames {', '.join(str(frame) for _, frame in part)}"
        if coverages is not None:
            drawn = [next(iter(step_masks(ids, masks, [frame], grid)), None) for _, frame in part]
            maps["coverage"] = np.stack([np.full(grid, np.nan) if (c := coverages[s]) is None else c for s, _ in part])
            (alone,) = step_coverages([ids], masks, [[frame] for _, frame in part], grid)
            notes["video"] = [_state(coverage) for coverage in alone]
            notes["coverage"] = [_state(coverages[step]) for step, _ in part]
            said = {step: _state(coverages[step]) or "seen" for step, _ in part}
            alt += f" with the contour of {name} and its coverage of the patch grid; "
            alt += ", ".join(f"step {step}: {state}" for step, state in said.items())
        some = frames[first : first + most]
        yield embed(strip_png(some, maps, masks=drawn, titles=titles, highest=1.0, notes=notes)), alt


def _state(coverage: np.ndarray | None) -> str:
    return "not annotated" if coverage is None else "" if coverage.any() else "absent"


def _drawn(frames: np.ndarray) -> np.ndarray:
    """Frames thinned to about DRAWN_WIDTH: a page shows them small."""
    stride = max(1, frames.shape[2] // DRAWN_WIDTH)
    return frames[:, ::stride, ::stride]


def _pieces(
    number: int,
    turn: Turn,
    owned: dict[tuple[int, int, int, tuple[str, ...]], list[str]],
    colours: dict[tuple[str, ...], str],
    labels: dict[str, str],
    words: Collection[str],
) -> Iterator[Piece]:
    """The turn's text, cut where heads of mentions start and end, as these may overlap."""
    cuts = sorted({0, len(turn.text), *(at for mention in turn.mentions for at in mention.head)})
    for start, end in itertools.pairwise(cuts):
        notes, colour = [], None
        for mention in turn.mentions:
            if not (mention.head[0] <= start and end <= mention.head[1]):
                continue
            ids = tuple(mention.object_ids)
            named = " and ".join(labels.get(name, name) for name in ids) or "no object"
            if found := owned.get((number, mention.start, mention.end, ids)):
                colour = colours[ids]
                notes.append(f"tokens {found} → {named}")
            else:
                blind = mention.kind in words and ids
                why = "stands before the clip and sees none of it" if blind else "not supervised"
                notes.append(f"{mention.kind} → {named}, {why}")
        yield Piece(turn.text[start:end], "; ".join(notes), colour)


def _annotation(sample: Sample, name: str) -> tuple[int, int, int]:
    """Frames of the stored video in which the object is present, absent, and not annotated."""
    num_frames = sample.record.media[0].num_frames if sample.record.media else 0
    (steps,) = step_coverages([[name]], sample.masks, [[frame] for frame in range(num_frames)], (1, 1))
    states = [_state(step) for step in steps]
    return states.count(""), states.count("absent"), states.count("not annotated")
