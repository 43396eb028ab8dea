"""The record: one clip with everything said about it, as pydantic models and one function that checks all of it.

`KEY.json` is a `Record`, `KEY.masks.json` is `Masks`. Text is clean: what a sentence talks about is given by character
spans into it, never by searching for a word. Frame numbers, in spans, boxes and masks, are those of the stored video,
which is the first media item.
"""

import difflib
import json
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from swim.data_tools.rle import MAX_MASK_SIDE, decode_counts

MAX_JSON_BYTES = 64 << 20
KEY_PATTERN = re.compile(r"[A-Za-z0-9_-]{1,80}")  # no dot: a tar member is KEY.suffix, split at the first dot
MEMBER_PATTERN = re.compile(r"[a-z0-9_]+(\.[a-z0-9_]+)*")
TAG = re.compile(r"</?ins>")

Count = Annotated[int, Field(ge=1)]
Frame = Annotated[int, Field(ge=0)]


Problem = tuple[str, str, str]
"""Field path, what is wrong there, remedy."""


class RecordError(ValueError):
    """A record breaks its contract; the message names record, field, value, limit and remedy."""

    problem: Problem | None = None

    @classmethod
    def at(cls, key: str, problem: Problem) -> "RecordError":
        """The error about record `key` that says this, and keeps it as `problem`."""
        path, wrong, remedy = problem
        error = cls(f"record {key!r}, {path}: {wrong}; {remedy}")
        error.problem = problem
        return error


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Rle(_Model):
    """A mask as COCO compressed RLE: `size` [H, W] in pixels of its own, `counts` as ASCII."""

    size: tuple[int, int]
    counts: str


class Mention(_Model):
    """Characters [start, end) of a turn's text that name objects; `head` [start, end) is the noun inside them."""

    start: Frame
    end: Frame
    head: tuple[int, int]
    kind: Literal["noun", "phrase", "attribute", "action"] = "noun"
    object_ids: list[str] = []


class Turn(_Model):
    """One utterance with its mentions."""

    role: Literal["system", "user", "assistant"]
    text: str
    mentions: list[Mention] = []


class Conversation(_Model):
    """Turns about frames `span` [first, last] of the clip, or about all of it where `span` is None."""

    task: str
    span: tuple[int, int] | None = None
    turns: list[Turn] = Field(min_length=1)


class Media(_Model):
    """A stored medium: tar member `KEY.<member>` or a loose file at `path`; sizes in pixels, `fps` in 1/s.

    `frame_map[i]` is the source's frame number of stored frame i.
    """

    member: Annotated[str, Field(max_length=19)] | None = None  # KEY.member fits the 100 characters of a tar name
    path: str | None = None
    kind: Literal["video", "image", "frames"]
    height: Count
    width: Count
    num_frames: Count
    fps: Annotated[float, Field(gt=0)]
    frame_map: list[int] | None = None

    @model_validator(mode="after")
    def _one_place(self) -> "Media":
        if (self.member is None) == (self.path is None):
            raise ValueError("give exactly one of 'member' and 'path'")
        if self.member is not None and (
            not MEMBER_PATTERN.fullmatch(self.member) or self.member.split(".")[-1] == "json"
        ):
            raise ValueError(f"member {self.member!r} is not a media suffix such as 'mp4' or '1.jpg'")
        return self


class Object(_Model):
    """Something visible that mentions and masks refer to; `boxes` frame -> (x0, y0, x1, y1) in pixels."""

    id: str
    label: str
    boxes: dict[int, tuple[float, float, float, float]] = {}


class Record(_Model):
    """One clip with everything said about it."""

    version: Literal[1] = 1
    source: str
    license: str
    media: list[Media]
    objects: list[Object]
    conversations: list[Conversation]


Masks = dict[str, dict[int, Rle | None]]
"""Object id -> frame -> mask; a missing frame is not annotated, None or zero area is annotated as absent."""

_RECORD = TypeAdapter(Record)
_MASKS: TypeAdapter[Masks] = TypeAdapter(Masks)
_T = TypeVar("_T")
_MODEL_AT: dict[str, type[BaseModel]] = {
    "media": Media,
    "objects": Object,
    "conversations": Conversation,
    "turns": Turn,
    "mentions": Mention,
}


def parse_sample(
    key: str, record_json: bytes | dict[str, Any], masks_json: bytes | dict[str, Any] | None
) -> tuple[Record, Masks]:
    """Record and masks of one sample, checked field by field and against each other; RecordError otherwise."""
    record, masks = parse_fields(key, record_json, masks_json)
    for problem in problems(record, masks):
        raise RecordError.at(key, problem)
    return record, masks


def parse_fields(
    key: str, record_json: bytes | dict[str, Any], masks_json: bytes | dict[str, Any] | None
) -> tuple[Record, Masks]:
    """Record and masks whose fields have the right form, not yet checked against each other; RecordError otherwise."""
    if not KEY_PATTERN.fullmatch(key):
        raise RecordError.at(key, ("key", f"{key!r} is not 1 to 80 of A-Z a-z 0-9 _ -", "rename it (no dots)"))
    record = _validate(key, "", _RECORD, record_json)
    return record, _validate(key, "masks", _MASKS, masks_json if masks_json is not None else {})


def masks_json(masks: Masks) -> bytes:
    """The JSON of a masks layer."""
    return _MASKS.dump_json(masks)


def record_schema() -> str:
    """JSON Schema of `KEY.json`, with that of the masks layer as `$defs/Masks`; `record.schema.json` holds it."""
    inputs = [("record", "validation", _RECORD), ("masks", "validation", _MASKS)]
    refs, schema = TypeAdapter.json_schemas(inputs, title="Record")  # type: ignore[arg-type]
    schema["$defs"]["Masks"] = refs["masks", "validation"]
    return json.dumps(schema | refs["record", "validation"], indent=2, sort_keys=True) + "\n"


def _validate(key: str, where: str, adapter: TypeAdapter[_T], data: bytes | dict[str, Any]) -> _T:
    if isinstance(data, bytes) and len(data) > MAX_JSON_BYTES:
        problem = f"{len(data)} bytes, the limit is {MAX_JSON_BYTES}"
        raise RecordError.at(key, (where or "JSON", problem, "split the clip"))
    try:
        return adapter.validate_json(data) if isinstance(data, bytes) else adapter.validate_python(data)
    except ValidationError as error:
        errors = error.errors(include_url=False)
        # A misspelt key comes with the complaint that the right one is missing.
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        loc = first["loc"]
        path = _path(((where,) if where else ()) + loc) or "JSON"
        if first["type"] == "extra_forbidden":
            fields = [name for name in loc[:-1] if name in _MODEL_AT]
            model: type[BaseModel] = Rle if where else _MODEL_AT[str(fields[-1])] if fields else Record
            near = difflib.get_close_matches(str(loc[-1]), model.model_fields, n=1, cutoff=0)
            remedy = f"did you mean {near[0]!r}? ({model.__name__} has {', '.join(model.model_fields)})"
            raise RecordError.at(key, (path, f"unknown key {loc[-1]!r}", remedy)) from None
        value = f"{first['input']!r:.80}" if first["type"] != "json_invalid" else f"{data!r:.80}"
        problem = f"{first['msg']}, got {value}"
        raise RecordError.at(key, (path, problem, "write it as record.schema.json says")) from None


def _path(loc: tuple[str | int, ...]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in loc).lstrip(".")


def problems(record: Record, masks: Masks) -> Iterator[Problem]:
    """Everything wrong that a look at one field alone cannot find."""
    num_frames = record.media[0].num_frames if record.media else 0
    in_clip = f"the stored clip has frames 0 to {num_frames - 1}" if num_frames else "the record has no media"
    frame_remedy = f"{in_clip}, number frames by the stored video"
    for i, media in enumerate(record.media):
        if media.frame_map is not None and len(media.frame_map) != media.num_frames:
            problem = f"{len(media.frame_map)} entries for {media.num_frames} frames"
            yield f"media[{i}].frame_map", problem, "give one source frame number per stored frame"
    ids = [thing.id for thing in record.objects]
    for i, thing in enumerate(record.objects):
        if thing.id in ids[:i]:
            yield f"objects[{i}].id", f"{thing.id!r} is already the id of another object", "object ids are unique"
        for frame, (x0, y0, x1, y1) in thing.boxes.items():
            if not 0 <= frame < num_frames:
                yield f"objects[{i}].boxes", f"frame {frame} is outside the clip", frame_remedy
            if x0 > x1 or y0 > y1:
                box = (x0, y0, x1, y1)
                yield f"objects[{i}].boxes[{frame}]", f"{box} ends before it starts", "write [x0, y0, x1, y1]"
    for i, conversation in enumerate(record.conversations):
        path = f"conversations[{i}]"
        span = conversation.span
        if span is not None and not 0 <= span[0] <= span[1] < num_frames:
            yield f"{path}.span", f"{list(span)} is not a [first, last] inside the clip", frame_remedy
        yield from _turn_problems(path, conversation.turns)
        for j, turn in enumerate(conversation.turns):
            if TAG.search(turn.text):
                problem = f"the text holds a tag ({turn.text[:60]!r})"
                yield f"{path}.turns[{j}].text", problem, "strip tags and give mentions instead"
            for k, mention in enumerate(turn.mentions):
                yield from _mention_problems(f"{path}.turns[{j}].mentions[{k}]", mention, turn.text, ids)
    for name, frames in masks.items():
        if name not in ids:
            yield f"masks.{name}", f"object id {name!r} is not among objects {ids}", "list it under 'objects'"
        for frame, rle in frames.items():
            if not 0 <= frame < num_frames:
                yield f"masks.{name}[{frame}]", f"frame {frame} is outside the clip", frame_remedy
            elif rle is not None:
                for problem, remedy in rle_problems(rle, record.media[0].height, record.media[0].width):
                    yield f"masks.{name}[{frame}]", problem, remedy


def _turn_problems(path: str, turns: list[Turn]) -> Iterator[Problem]:
    first = 1 if turns[0].role == "system" else 0
    for j, turn in enumerate(turns[first:], first):
        due = "user" if (j - first) % 2 == 0 else "assistant"
        if turn.role != due:
            yield f"{path}.turns[{j}].role", f"{turn.role!r} where {due!r} is due", "user and assistant alternate"
    if turns[-1].role != "assistant":
        yield f"{path}.turns[{len(turns) - 1}].role", f"the last turn is {turns[-1].role!r}", "end with the assistant"


def _mention_problems(path: str, mention: Mention, text: str, ids: list[str]) -> Iterator[Problem]:
    start, end = mention.start, mention.end
    if not start < end <= len(text):
        problem = f"characters {start} to {end} do not lie inside the text, which has {len(text)}"
        yield path, problem, "give offsets into the clean text, end exclusive"
    head_start, head_end = mention.head
    if not start <= head_start <= head_end <= end:
        problem = f"[{head_start}, {head_end}] does not lie inside the mention [{start}, {end}]"
        yield f"{path}.head", problem, "give offsets into the text, as for the mention"
    elif not text[head_start:head_end].strip():
        problem = f"[{head_start}, {head_end}] covers only {text[head_start:head_end]!r}"
        yield f"{path}.head", problem, "let the head cover at least one character that is no space"
    for name in mention.object_ids:
        if name not in ids:
            problem = f"object id {name!r} is not among objects {ids}"
            yield f"{path}.object_ids", problem, "list it under 'objects', or leave object_ids empty"


def rle_problems(rle: Rle, media_height: int, media_width: int) -> Iterator[tuple[str, str]]:
    """What is wrong with a mask of media of that size in pixels, each with a remedy."""
    height, width = rle.size
    if not (1 <= height <= MAX_MASK_SIDE and 1 <= width <= MAX_MASK_SIDE):
        yield f"size {height}x{width} is outside 1 to {MAX_MASK_SIDE} a side", "give size as [height, width]"
        return
    # A mask may have a size of its own but not another shape; the slack is for sides rounded to even numbers, be they
    # those of the mask or those of the media.
    slack = 2 * max(media_width + media_height, width + height)
    if abs(height * media_width - width * media_height) > slack:
        problem = f"size {height}x{width} has another shape than the media's {media_height}x{media_width}"
        yield problem, "give size as [height, width] of the frame as it is stored"
        return
    if len(rle.counts) > 7 * (height * width + 1):
        yield f"{len(rle.counts)} characters of RLE for {height}x{width} pixels", "encode the mask again"
        return
    try:
        total = int(decode_counts(rle.counts).sum())
    except ValueError as error:
        yield str(error), "encode the mask again as COCO compressed RLE"
        return
    if total != height * width:
        problem = f"the runs sum to {total}, but {height} x {width} is {height * width}"
        yield problem, "size and counts belong to different masks; encode it again"
