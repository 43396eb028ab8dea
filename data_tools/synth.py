"""Rendered clips with exact masks: shapes that move over noise, real H.264, questions about them.

Every frame carries its number as a barcode in the top strip, so a test can tell which frame a decoder returned.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from swim.data_tools.records import Conversation, Masks, Media, Mention, Object, Record, Rle, Turn
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.video import encode_video

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 30, 30),
    "green": (30, 180, 40),
    "blue": (40, 60, 230),
    "yellow": (235, 220, 40),
    "purple": (160, 40, 200),
    "cyan": (40, 215, 220),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "star", "cross", "diamond")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TASKS: tuple[str, ...] = ("direction", "colour", "existence", "describe")

POST = 50  # grey of what hides objects in hard clips
BARCODE_BITS = 10
STRIPS = 14  # the barcode's blocks are this part of a side: 8 pixels at 112, one H.264 transform block


@dataclass(frozen=True)
class _Mover:
    colour: str
    shape: str
    direction: str
    radius: float
    centres: np.ndarray  # [frames, 2] as (x, y) in pixels
    shown: np.ndarray  # bool [frames]
    id: str

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class _Scene:
    """Objects, and what makes it hard to tell and to see them."""

    movers: list[_Mover]
    pan: np.ndarray  # int [frames, 2]: where the camera has moved the background, and all upon it
    bar: tuple[int, int] | None = None  # first and last column of a post in front of everything
    attributes: bool = False  # colour words are mentions of their own


def synthesise(
    folder: str | Path,
    *,
    clips: int,
    seed: int,
    size: int = 112,
    frames: int = 8,
    fps: float = 8,
    objects: int = 3,
    hidden: float = 0.1,
    hard: bool = False,
    annotated: float = 1.0,
) -> ShardSet:
    """Write `clips` clips of `frames` x `size` x `size` pixels with `objects` shapes each as shards into `folder`.

    Clip n depends on (seed, n) alone. A share `hidden` of the objects is away for the first or last part of its clip.
    `hard` clips have 3 to 8 smaller objects instead, each with a distractor of its shape or of its colour, a camera
    that pans, a post that hides what is behind it, a third of the objects late or gone early, and colour words as
    mentions of their own. A share `annotated` of the clips, in eighths, has masks. ValueError for sizes that cannot be
    drawn.
    """
    if size < 56 or size % 2:
        raise ValueError(f"size {size}: must be even and at least 56, else the barcode does not survive compression")
    if not 2 <= frames < 1 << BARCODE_BITS:
        raise ValueError(
            f"frames {frames}: must be 2 to {(1 << BARCODE_BITS) - 1}, the barcode has {BARCODE_BITS} bits"
        )
    if not 1 <= objects <= min(len(COLOURS), len(SHAPES)):
        raise ValueError(f"objects {objects}: must be 1 to {min(len(COLOURS), len(SHAPES))}, colours do not repeat")
    with ShardWriter(folder) as writer:
        for number in range(clips):
            rng = np.random.Generator(np.random.Philox(key=[seed, number]))
            if hard:
                scene = _hard_scene(rng, size, frames)
            else:
                scene = _Scene(_draw_movers(rng, size, frames, objects, hidden), np.zeros((frames, 2), int))
            movers = scene.movers
            pixels, masks = _render(rng, scene, size)
            # What is hidden all along is no object of a question; nor is it said to be absent.
            asked = [mover for mover in movers if not hard or sum(map(bool, masks[mover.id].values())) > 1]
            media = Media(member="mp4", kind="video", height=size, width=size, num_frames=frames, fps=fps)
            record = Record(
                source="synth",
                license="CC0-1.0",
                media=[media],
                objects=[Object(id=mover.id, label=mover.name) for mover in movers],
                conversations=list(_conversations(rng, movers, asked, scene.attributes)),
            )
            masks = masks if number * 5 % 8 < 8 * annotated else {}  # spread over the clips, not the first of them
            writer.write(f"synth_{seed}_{number:06d}", record, masks, {"mp4": encode_video(pixels, fps)})
    return ShardSet(folder)


def read_barcode(frame: np.ndarray) -> int:
    """Frame number in the top strip of a synthetic frame uint8 [H, W, 3]."""
    block = frame.shape[0] // STRIPS
    margin = block // 4  # compression blurs the edges
    strip = frame[margin : block - margin, : BARCODE_BITS * block].mean(axis=(0, 2)).reshape(BARCODE_BITS, block)
    bits = strip[:, margin : block - margin].mean(axis=1) > 127
    return int(bits @ (1 << np.arange(BARCODE_BITS)))


def corpus() -> list[str]:
    """Every sentence that a synthetic conversation can hold, for training a small tokenizer."""
    sentences = ["yes", "no", *COLOURS, *DIRECTIONS]
    sentences += [f"what colour is the {shape} ?" for shape in SHAPES]
    for name in (f"{colour} {shape}" for colour in COLOURS for shape in SHAPES):
        sentences += [f"which way does the {name} move ?", f"is there a {name} ?", f"describe the {name} ."]
        sentences += [f"the {name} moves {direction} ." for direction in DIRECTIONS]
    return sentences


def _draw_movers(rng: np.random.Generator, size: int, frames: int, count: int, hidden: float) -> list[_Mover]:
    colours, shapes = rng.permutation(list(COLOURS))[:count], rng.permutation(SHAPES)[:count]
    return [
        _draw_mover(rng, str(colour), str(shape), size, frames, (13, 16), hidden, str(shape))
        for colour, shape in zip(colours, shapes)
    ]


def _draw_mover(
    rng: np.random.Generator,
    colour: str,
    shape: str,
    size: int,
    frames: int,
    radii: tuple[float, float],
    hidden: float,
    id: str,
) -> _Mover:
    direction = str(rng.choice(list(DIRECTIONS)))
    radius = rng.uniform(*radii) * size / 112
    step = np.array(DIRECTIONS[direction])
    low = np.array([radius, size // STRIPS + radius])  # never over the barcode
    room = size - radius - low
    path = step * room * rng.uniform(0.5, 0.8)
    start = low + np.maximum(-path, 0) + rng.uniform(size=2) * (room - abs(path))
    centres = start + np.linspace(0, 1, frames)[:, None] * path
    shown = np.ones(frames, bool)
    if rng.uniform() < hidden:
        away = int(rng.integers(1, max(2, frames // 2 + 1)))
        shown[slice(away) if rng.uniform() < 0.5 else slice(frames - away, None)] = False
    return _Mover(colour, shape, direction, radius, centres, shown, id)


def _hard_scene(rng: np.random.Generator, size: int, frames: int) -> _Scene:
    names: list[tuple[str, str]] = []
    for number in range(int(rng.integers(3, 9))):
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if number:  # a distractor of an earlier one: of its shape, or of its colour
            like = names[rng.integers(number)]
            colour, shape = (colour, like[1]) if rng.uniform() < 0.5 else (like[0], shape)
        while (colour, shape) in names:
            colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        names.append((colour, shape))
    movers = [_draw_mover(rng, *name, size, frames, (9, 13), 0.3, "_".join(name)) for name in names]
    # Below a third of the slowest object's way, so that the answers hold before the background and in the picture.
    drift = rng.uniform(-0.1, 0.1, 2) * size
    pan = np.round(np.linspace(-0.5, 0.5, frames)[:, None] * drift).astype(int)
    first = int(rng.uniform(0.1, 0.75) * size)
    return _Scene(movers, pan, (first, first + int(rng.uniform(0.1, 0.15) * size)), attributes=True)


def _render(rng: np.random.Generator, scene: _Scene, size: int) -> tuple[np.ndarray, Masks]:
    """Frames uint8 [N, size, size, 3] and the visible part of each object; later objects lie on top."""
    movers = scene.movers
    num_frames, block = len(movers[0].shown), size // STRIPS
    coarse = rng.uniform(80, 150, (size // 8 + 1, size // 8 + 1, 3)).repeat(8, 0).repeat(8, 1)[:size, :size]
    background = (coarse + rng.uniform(-15, 15, (size, size, 1))).astype(np.uint8)
    pixels = np.stack([np.roll(background, tuple(by[::-1]), (0, 1)) for by in scene.pan])
    masks: Masks = {mover.id: {} for mover in movers}
    y, x = np.mgrid[:size, :size] + 0.5
    for frame in range(num_frames):
        covered = np.zeros((size, size), bool)
        covered[:block] = True  # what the camera moves up is never over the barcode
        if scene.bar is not None:
            columns = slice(scene.bar[0] + scene.pan[frame, 0], scene.bar[1] + scene.pan[frame, 0])
            covered[:, columns], pixels[frame][:, columns] = True, POST
        for mover in reversed(movers):
            visible = np.zeros_like(covered)
            if mover.shown[frame]:
                centre = mover.centres[frame] + scene.pan[frame]
                visible = (
                    _inside(mover.shape, (x - centre[0]) / mover.radius, (y - centre[1]) / mover.radius) & ~covered
                )
            pixels[frame][visible] = COLOURS[mover.colour]
            covered |= visible
            masks[mover.id][frame] = Rle(**encode_mask(visible)) if visible.any() else None
        bits = frame >> np.arange(BARCODE_BITS) & 1
        pixels[frame, :block, : BARCODE_BITS * block] = (bits * 255).repeat(block)[:, None]
    return pixels, masks


def _inside(shape: str, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    """Which points (u, v) lie in the shape, whose bounding box is [-1, 1] x [-1, 1] or inside it."""
    match shape:
        case "circle":
            return u**2 + v**2 <= 1
        case "square":
            return np.maximum(abs(u), abs(v)) <= 0.9
        case "triangle":
            return (v <= 0.9) & (abs(u) <= (v + 1) / 2)
        case "star":
            angle = np.arctan2(u, -v) % (2 * np.pi / 5) - np.pi / 5
            return np.hypot(u, v) <= 0.45 + 0.55 * (abs(angle) / (np.pi / 5)) ** 1.5
        case "cross":
            return (np.minimum(abs(u), abs(v)) <= 0.35) & (np.maximum(abs(u), abs(v)) <= 1)
        case "diamond":
            return abs(u) + abs(v) <= 1
    raise ValueError(f"unknown shape {shape!r}")


def _conversations(
    rng: np.random.Generator, movers: list[_Mover], asked: list[_Mover], attributes: bool
) -> Iterator[Conversation]:
    def ask(task: str, question: str, answer: str, noun: str, object_ids: list[str]) -> Conversation:
        return _ask(task, question, answer, noun, object_ids, attributes)

    shapes = [mover.shape for mover in movers]
    for mover in asked:
        yield ask("direction", f"which way does the {mover.name} move ?", mover.direction, mover.name, [mover.id])
        if shapes.count(mover.shape) == 1:  # else the question has several answers
            yield ask("colour", f"what colour is the {mover.shape} ?", mover.colour, mover.shape, [mover.id])
    present = asked[rng.integers(len(asked))]
    yield ask("existence", f"is there a {present.name} ?", "yes", present.name, [present.id])
    names = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
    absent = str(rng.choice([name for name in names if name not in {mover.name for mover in movers}]))
    yield ask("existence", f"is there a {absent} ?", "no", absent, [])
    told = asked[rng.integers(len(asked))]
    answer = f"the {told.name} moves {told.direction} ."
    yield ask("describe", f"describe the {told.name} .", answer, told.name, [told.id])


def _ask(
    task: str, question: str, answer: str, noun: str, object_ids: list[str], attributes: bool = False
) -> Conversation:
    """One exchange in which `noun` is mentioned wherever it stands; its last word is the head, the others are
    attributes."""

    def turn(role: str, text: str) -> Turn:
        start, end = text.find(noun), text.find(noun) + len(noun)
        head = (end - len(noun.split()[-1]), end)
        mentions = [Mention(start=start, end=end, head=head, object_ids=object_ids)] if start >= 0 else []
        if mentions and attributes and head[0] > start:
            word = (start, head[0] - 1)
            mentions.append(Mention(start=word[0], end=word[1], head=word, kind="attribute", object_ids=object_ids))
        return Turn(role=role, text=text, mentions=mentions)  # type: ignore[arg-type]

    return Conversation(task=task, turns=[turn("user", question), turn("assistant", answer)])
