"""What foreign file forms share: how a row becomes a record, turns of a dialogue, masks by frame."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from swim.data_tools.records import RecordError
from swim.data_tools.rle import encode_counts, encode_polygons
from swim.data_tools.rows import Row
from swim.data_tools.video import VideoInfo

Form = tuple[str, str, dict[str, str]]
LLAVA: Form = ("from", "value", {"human": "user", "gpt": "assistant", "system": "system"})
MESSAGES: Form = ("role", "content", {"user": "user", "assistant": "assistant", "system": "system"})
MEDIA_TAG = re.compile(r"<(video|image)>\n?")
NAMED = re.compile(r"^record (?:'.*?'|\".*?\"), ")


@dataclass(frozen=True)
class Part:
    """What one row says about one clip, as JSON values of a record; frames and pixels are those of the source video.

    `hint` begins the sample's key, `source` and `license` are given by rows that name their own.
    """

    conversations: list[Any]
    objects: list[Any] = field(default_factory=list)
    masks: dict[str, Any] = field(default_factory=dict)
    hint: str | None = None
    source: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class Source:
    """A file form: which files of a folder, which video a row is about (None: text alone), what it says about it.

    With `whole_files` every file is one row. Both functions raise RecordError for a row that is not of the form.
    """

    name: str
    license: str
    pattern: str
    video: Callable[[Row], str | None]
    part: Callable[[Row, VideoInfo | None], Part]
    whole_files: bool = False


def record_values(
    row: Row, part: Part, media: list[dict[str, Any]], *, source: Source, license: str | None = None
) -> dict[str, Any]:
    """JSON values of the record of one row; RecordError for text that is no Unicode."""
    values = {
        "source": part.source or source.name,
        "license": license or part.license or source.license,
        "media": media,
        "objects": part.objects,
        "conversations": part.conversations,
    }
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise row.error("text", f"{error.object[error.start]!r} is half a character; write valid Unicode") from None
    return values


def slug(name: str) -> str:
    """A name as a key can hold it."""
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64] or "_"


def skip_line(row: Row, video: str | None, error: RecordError) -> dict[str, Any]:
    """What is listed about a row that is left out."""
    reason = str(error)
    named = re.match(NAMED.pattern + r"([\w.\[\] ]+): ", reason)
    own = row.name if row.name != f"record_{row.number}" else None
    place = {"file": row.file.name, "number": row.number, "index": own, "video": video}
    return {**place, "field": named[1] if named else None, "reason": reason}


def dialogue(row: Row, field: str = "conversations", form: Form = LLAVA) -> list[dict[str, Any]]:
    """Turns {role, text} of a list in the form LLAVA or MESSAGES, without the places where media go."""
    who, what, roles = form
    turns = []
    for place, turn in enumerate(row.get(field, list, [])):
        role, text = (turn.get(who), turn.get(what)) if isinstance(turn, dict) else (None, None)
        if not isinstance(role, str) or role not in roles or not isinstance(text, str):
            problem = f"{turn!r:.80} is not {{{who!r}: {' | '.join(roles)}, {what!r}: text}}"
            raise row.error(f"{field}[{place}]", f"{problem}; correct it")
        turns.append({"role": roles[role], "text": MEDIA_TAG.sub("", text).strip()})
    return turns


def masks_by_frame(row: Row, where: str, frames: Any, info: VideoInfo) -> dict[int, Any]:
    """Masks of one object from {frame: {segmentation: RLE, polygons or null}}; frames without one are left out."""
    if not isinstance(frames, dict):
        raise row.error(where, f"{frames!r:.80} is not {{frame: {{segmentation: RLE}}}}; correct it")
    masks: dict[int, Any] = {}
    for frame, value in frames.items():
        if not (frame.isascii() and frame.isdecimal() and len(frame) < 10):
            raise row.error(where, f"{frame!r:.80} is not a frame number; number frames from 0")
        if not isinstance(value, dict):
            raise row.error(f"{where}[{frame}]", f"{value!r:.80} is not {{segmentation: RLE}}; correct it")
        if "segmentation" in value:
            masks[int(frame)] = compressed(row, f"{where}[{frame}]", value["segmentation"], info)
    return masks


def compressed(row: Row, where: str, mask: Any, info: VideoInfo) -> Any:
    """A mask as compressed RLE; what is neither runs nor polygons is left for the record's own check.

    Runs without a size and polygons, which never have one, are in pixels of the video.
    """
    try:
        if isinstance(mask, Mapping) and isinstance(mask.get("counts"), list):
            size = mask.get("size", [info.height, info.width])
            if not isinstance(size, list) or len(size) != 2:
                raise ValueError(f"size {size!r:.40} is not [height, width]; correct it")
            return encode_counts((size[0], size[1]), mask["counts"])
        if isinstance(mask, list):
            polygons = mask if all(isinstance(polygon, list) for polygon in mask) else [mask]
            return encode_polygons((info.height, info.width), polygons)
    except (ValueError, TypeError, OverflowError) as error:
        raise row.error(where, str(error)) from None
    return mask


def no_images(row: Row) -> None:
    """RecordError for a row about images."""
    for name in ("image", "images"):
        if row.value.get(name):
            raise row.error(name, f"{row.value[name]!r:.80}: only videos and text can be converted; leave it out")


def video_name(row: Row, field: str = "video") -> str:
    """The file name in a field; RecordError if there is none."""
    row.get(field, object)  # the row is an object
    found = row.value.get(field)
    if not isinstance(found, str) or not found:
        raise row.error("video", f"{found!r:.80} is not a file name; name the clip's video")
    return found
