"""What can be wrong, or looks wrong, with one sample: rules beyond the contract that reading a record enforces.

An error would cost training the sample or train it on something false. A warning is a suspicion about texts, masks or
origin, for a look with `swim data inspect`.
"""

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, NamedTuple

import numpy as np

from swim.data_tools.lookalike import HASHED_AT, frame_hash
from swim.data_tools.records import Masks, Mention, Object, Problem, Record, Rle
from swim.data_tools.rle import decode_counts
from swim.data_tools.video import VideoError, check_decoded, decode_frames, open_video, probe, sound_frames

# A step from one annotated frame to the next is a jump if it is larger than this and than 6 robust standard deviations
# beyond the object's usual step; a fast or growing object is its own measure.
AREA_JUMP = 4.0  # times larger or smaller
CENTROID_JUMP = 2.0  # square roots of the object's area, about its widths
JUMP_SPREADS = 6 * 1.4826  # median absolute deviations; 1.4826 of them are the standard deviation of a normal variable
MAX_FPS_ERROR = 0.01  # relative

_FUNCTION_WORDS = """
a an the this that these those some any each every all both no not i you he she it we they me him her us them my your
his its our their who whom whose which what where when why how and or but nor so if of in on at by for from to with
without into onto over under between behind above below near is are was were be been being am do does did has have had
can could will would shall should may might must as than then there here up down out off
"""
FUNCTION_WORDS = frozenset(_FUNCTION_WORDS.split())
GENERIC_LABELS = frozenset(["object", "objects", "thing", "region", "item", "target", "unnamed", "unknown"])
UNKNOWN = frozenset(["", "unknown", "none", "n/a", "na", "null", "?"])
_WORD = re.compile(r"[^\W\d_]+")


class Kind(NamedTuple):
    """A rule: how bad it is to break it, what it asks for, and what to do."""

    level: Literal["error", "warning"]
    limit: str
    remedy: str


KINDS = {
    "unreadable": Kind("error", "bytes and CRC32 as the index says", "copy the shard again"),
    "schema": Kind("error", "record.schema.json", "write it as the schema says"),
    "media": Kind("error", "facts that agree with each other", "correct the record"),
    "objects": Kind("error", "unique ids, boxes inside the clip", "correct the record"),
    "span": Kind("error", "[first, last] inside the clip", "number frames by the stored video"),
    "turns": Kind("error", "user and assistant alternate, text without tags", "correct the conversation"),
    "mention": Kind("error", "spans inside the text, ids of known objects", "give offsets into the clean text"),
    "masks": Kind(
        "error", "frames of the clip, the frame's shape, runs that sum to its pixels", "encode the mask anew"
    ),
    "frame_map": Kind("error", "source frame numbers >= 0 that never go back", "sort the frames, or convert again"),
    "index": Kind("error", "facts of the record", "run 'swim data index'"),
    "video": Kind("error", "every frame decodes, as many and as large as the record says", "re-encode the video"),
    "crash": Kind("error", "decoding ends", "remove the sample, or re-encode its video"),
    "same_video": Kind("error", "a video in one split only", "remove it from one of the folders"),
    "look_alike": Kind("warning", "other pictures than in the other folder", "compare them, and remove one"),
    "same_key": Kind("warning", "a key in one split only", "rename one of them if they are different clips"),
    "member": Kind("warning", "json, layers and the members that media names", "remove it; nothing reads it"),
    "license": Kind("warning", "a known licence", "convert again with --license"),
    "source": Kind("warning", "a known source", "name where it comes from"),
    "fps": Kind("warning", f"within {MAX_FPS_ERROR:.0%} of the record's", "correct the record"),
    "head": Kind("warning", "one whole word that can be a noun", "let the head cover the noun alone"),
    "no_masks": Kind("warning", "masks of at least one of its objects", "annotate it, or leave object_ids empty"),
    "never_seen": Kind("warning", "an object seen in some annotated frame", "look at it; its noun has nothing to find"),
    "label": Kind("warning", "a word in common", "look at it; masks and noun may belong to different objects"),
    "box": Kind("warning", "inside the picture, a pixel of slack", "give pixels of the stored video"),
    "mask_size": Kind("warning", "one size for all masks of an object", "look at it; the smaller ones may be cut"),
    "area_jump": Kind("warning", "", "look at these frames; the mask may be of something else"),
    "centroid_jump": Kind("warning", "", "look at these frames; the mask may be of something else"),
    "tiny_mask": Kind("warning", "", "expect no target there; a larger pixel budget may help"),
}


class Found(NamedTuple):
    """A broken rule; without `limit` and `remedy`, those of its kind hold."""

    kind: str
    field: str
    value: str
    limit: str = ""
    remedy: str = ""


def broken_contract(problem: Problem) -> Found:
    """The finding about a problem that the record's contract names."""
    path, wrong, remedy = problem
    names = re.sub(r"\[.*?\]", "", path).split(".")
    kind = names[0] if names[0] in ("media", "objects", "masks") else "turns"
    kind = "span" if "span" in names else "mention" if "mentions" in names else kind
    return Found("masks" if path.startswith("masks") else kind, path, wrong, remedy=remedy)


class Tube(NamedTuple):
    """An object's annotated frames [N] in order, and of each mask area, x and y of the centroid in pixels [N, 3]; an
    absent object has area 0. `sizes` are those of its masks."""

    frames: np.ndarray
    facts: np.ndarray
    sizes: list[tuple[int, int]]

    @property
    def seen(self) -> np.ndarray:
        """(N,) where the mask covers something."""
        return self.facts[:, 0] > 0


def measure_tubes(masks: Masks) -> dict[str, Tube]:
    """The tubes of objects, from the runs of their masks."""
    tubes = {}
    for name, of_object in masks.items():
        items = sorted(of_object.items())
        facts = np.array([(0, 0, 0) if rle is None else measure_mask(rle) for _, rle in items], float).reshape(-1, 3)
        sizes = sorted({rle.size for _, rle in items if rle is not None})
        tubes[name] = Tube(np.array([frame for frame, _ in items], dtype=np.int64), facts, sizes)
    return tubes


def measure_mask(rle: Rle) -> tuple[int, float, float]:
    """Area in pixels and centroid (x, y) in pixels of a mask; the centroid of nothing is (0, 0)."""
    height = rle.size[0]
    edges = np.cumsum(decode_counts(rle.counts))
    edges = edges[: edges.size // 2 * 2]
    column, row = np.divmod(edges, height)
    sign = np.tile([-1, 1], edges.size // 2)
    # Sums over the pixels before an edge, down the columns: of 1, of x and of y.
    area = int(sign @ edges)
    x = int(sign @ (height * (column * (column - 1) // 2) + column * row))
    y = int(sign @ (column * (height * (height - 1) // 2) + row * (row - 1) // 2))
    return (area, x / area + 0.5, y / area + 0.5) if area else (0, 0.0, 0.0)


def check_record(record: Record, tubes: Mapping[str, Tube]) -> Iterator[Found]:
    """Errors in frame maps, warnings about origin, boxes and nouns."""
    for field in ("license", "source"):
        if (value := getattr(record, field)).strip().lower() in UNKNOWN:
            yield Found(field, field, repr(value))
    for i, media in enumerate(record.media):
        numbers = media.frame_map or []
        if any(later < former for former, later in itertools.pairwise([0, *numbers])):
            at = next(k for k, number in enumerate(numbers) if number < max([0, *numbers[:k]]))
            yield Found("frame_map", f"media[{i}].frame_map[{at}]", str(numbers[at]))
    objects = {thing.id: thing for thing in record.objects}
    for i, thing in enumerate(record.objects):
        for frame, (x0, y0, x1, y1) in thing.boxes.items():
            width, height = record.media[0].width, record.media[0].height
            if min(x0, y0) < -1 or x1 > width + 1 or y1 > height + 1:
                value = f"{(x0, y0, x1, y1)} in {width}x{height} pixels"
                yield Found("box", f"objects[{i}].boxes[{frame}]", value)
                break  # where one is in other units, all are
    for i, conversation in enumerate(record.conversations):
        for j, turn in enumerate(conversation.turns):
            for k, mention in enumerate(turn.mentions):
                if mention.kind == "noun":
                    path = f"conversations[{i}].turns[{j}].mentions[{k}]"
                    yield from _check_noun(path, turn.text, mention, [objects[n] for n in mention.object_ids], tubes)


def _check_noun(
    path: str, text: str, mention: Mention, named: Sequence[Object], tubes: Mapping[str, Tube]
) -> Iterator[Found]:
    start, end = mention.head
    head, whole = text[start:end], text[mention.start : mention.end]
    words = _WORD.findall(head.lower())
    if len(head.split()) != 1 or not words or words[0] in FUNCTION_WORDS or _cuts(text, start) or _cuts(text, end):
        yield Found("head", f"{path}.head", f"{head!r:.80} of {whole!r:.80}")
    own = [tubes[thing.id] for thing in named if thing.id in tubes and len(tubes[thing.id].frames)]
    value = f"{whole!r:.80} -> {[thing.id for thing in named]!r:.80}"
    if named and not own:
        yield Found("no_masks", f"{path}.object_ids", value)
    elif named and not any(tube.seen.any() for tube in own):
        frames = sum(len(tube.frames) for tube in own)
        yield Found("never_seen", f"{path}.object_ids", f"{value}, absent in {frames} frames")
    labels = [thing.label for thing in named if _words(thing.label) - GENERIC_LABELS]
    if labels and not any(_words(label) & _words(whole) for label in labels):
        yield Found("label", f"{path}.object_ids", f"{whole!r:.80}, labels {labels!r:.80}")


def _cuts(text: str, place: int) -> bool:
    # Latin letters only: other scripts write words without spaces between them.
    return 0 < place < len(text) and all(c.isalpha() and c < "\u0250" for c in text[place - 1 : place + 1])


def _words(text: str) -> set[str]:
    """The words of a text, and what they may be the plural of."""
    words = _WORD.findall(text.lower())
    return {form for word in words for form in (word, word.removesuffix("s"), word.removesuffix("es"))}


def check_masks(record: Record, tubes: Mapping[str, Tube], *, cells: int) -> Iterator[Found]:
    """Warnings about each object's masks; one is tiny if its area is below a cell of a grid of `cells` equal cells over
    the picture."""
    for name, tube in tubes.items():
        field, seen, areas = f"masks.{name}", tube.seen, tube.facts[:, 0]
        if len(tube.sizes) > 1:
            yield Found("mask_size", field, f"{len(tube.sizes)} sizes, {tube.sizes[0]} to {tube.sizes[-1]}")
        if len(tube.sizes) != 1:
            continue  # nothing is comparable, or nothing is there
        pixels = tube.sizes[0][0] * tube.sizes[0][1]
        tiny = np.flatnonzero(seen & (areas * cells < pixels))
        if tiny.size:
            least = tiny[np.argmin(areas[tiny])]
            smallest = f"the smallest {areas[least]:.0f} pixels in frame {tube.frames[least]}"
            limit = f"{pixels / cells:.0f} pixels, a cell of {cells}"
            yield Found("tiny_mask", field, f"{tiny.size} of {seen.sum()} masks, {smallest}", limit)
        yield from _jumps(field, tube, areas * cells >= pixels, record.media[0].fps)


def _jumps(field: str, tube: Tube, usable: np.ndarray, fps: float) -> Iterator[Found]:
    # Neighbours within a second: what was away longer, or annotated as absent, may come back anywhere.
    first = np.flatnonzero(usable[:-1] & usable[1:] & (np.diff(tube.frames) <= max(fps, 1)))
    if not first.size:
        return
    here, then = tube.facts[first], tube.facts[first + 1]
    growth = np.abs(np.log(then[:, 0] / here[:, 0]))
    # The object's usual size, or more, is its width: what others hide of it does not shrink it.
    usual = np.median(tube.facts[tube.seen, 0])
    path = np.hypot(*(then[:, 1:] - here[:, 1:]).T) / np.sqrt(np.maximum(usual, np.maximum(here[:, 0], then[:, 0])))
    for kind, steps, least in (("area_jump", growth, np.log(AREA_JUMP)), ("centroid_jump", path, CENTROID_JUMP)):
        middle = np.median(steps)
        limit = max(least, middle + JUMP_SPREADS * np.median(np.abs(steps - middle)))
        beyond = np.flatnonzero(steps > limit)
        if beyond.size:
            worst = beyond[np.argmax(steps[beyond])]
            step, most = np.exp([steps[worst], limit]) if kind == "area_jump" else (steps[worst], limit)
            unit = "times the area" if kind == "area_jump" else "widths"
            place = f"frames {tube.frames[first[worst]]} to {tube.frames[first[worst] + 1]}"
            more = f", {beyond.size} such steps" if beyond.size > 1 else ""
            yield Found(kind, field, f"{step:.3g} {unit}, {place}{more}", f"{most:.3g} {unit}")


def check_video(data: bytes, path: str, stated: tuple[int, int, int, float]) -> tuple[list[Found], bytes | None]:
    """Findings of decoding a whole video that should have `stated` (height, width, frames, fps), and its look
    (`lookalike`)."""
    try:
        info = probe(data)
        at = [int(share * info.num_frames) for share in HASHED_AT]
        looks: list[bytes | None] = [None] * len(at)
        count = 0
        with open_video(data) as (container, stream):
            for count, frame in enumerate(sound_frames(container, stream), 1):
                for i, place in enumerate(at):
                    if place == count - 1:
                        looks[i] = frame_hash(frame)
        check_decoded(count, info.num_frames)
    except VideoError as error:
        return [Found("video", path, str(error))], None
    found = []
    if (info.height, info.width, info.num_frames) != stated[:3]:
        value = f"(height, width, frames) {(info.height, info.width, info.num_frames)}"
        found.append(Found("video", path, value, f"{stated[:3]}, as its record says", "correct the record"))
    if abs(info.fps / stated[3] - 1) > MAX_FPS_ERROR:
        found.append(Found("fps", path, f"{info.fps:.6g}/s", f"{stated[3]:.6g}/s, as its record says"))
    known = [look for look in looks if look is not None]
    return found, b"".join(known) if len(known) == len(looks) else None


def check_picture(data: bytes, path: str, stated: tuple[int, int]) -> list[Found]:
    """Findings of decoding a picture that should have `stated` (height, width)."""
    try:
        shape = decode_frames(data, [0]).shape[1:3]
    except VideoError as error:
        return [Found("video", path, str(error))]
    wrong = Found("video", path, f"(height, width) {shape}", f"{stated}, as its record says", "correct the record")
    return [] if shape == stated else [wrong]
