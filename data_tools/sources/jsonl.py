"""Our own records with loose videos: `swim data convert jsonl FILE.jsonl ...`, or trained on as they are (loose.py).

Input: one JSON object a line, the fields of a record (docs/data.md) and its masks: `media` with one {path} or just
`video: path`, or neither for text alone; `conversations`; `objects` and `masks` {object id: {frame: RLE, polygons or
null}}; `source` and `license` (in --license's stead); `key`, with which the sample's key begins. Sizes, frames and rate
of the video need not be said; where they are, they must be right.

Null: the object was looked for and is not in that frame. A frame that is missing is not annotated.

Licence: what the line or --license says.
"""

from typing import Any

from swim.data_tools.rows import Row
from swim.data_tools.sources.forms import Part, Source, compressed, video_name
from swim.data_tools.video import VideoInfo

FIELDS = ("conversations", "key", "license", "masks", "media", "objects", "source", "version", "video")


def _medium(row: Row) -> dict[str, Any] | None:
    listed = row.get("media", list, [])
    if len(listed) > 1 or not all(isinstance(item, dict) for item in listed):
        raise row.error("media", f"{listed!r:.80} is not one {{path: video}}; give one video per record")
    return listed[0] if listed else None


def _video(row: Row) -> str | None:
    medium = _medium(row)
    if medium is None and row.value.get("video") is None:
        return None
    return video_name(
        row if medium is None else Row(row.file, row.number, row.value | medium), "path" if medium else "video"
    )


def _part(row: Row, info: VideoInfo | None) -> Part:
    medium = _medium(row) or {}
    facts = {"path": medium.get("path"), "kind": "video", **(vars(info) if info else {})}
    for given, known, where in ((row.value, FIELDS, ""), (medium, facts, "media[0].")):
        for name in given:
            if name not in known:
                raise row.error(f"{where}{name}", f"unknown field; there are {', '.join(known)}")
    for name, said in medium.items():
        if said != facts[name]:
            problem = f"{said!r:.40}, but the video has {facts[name]}"
            raise row.error(f"media[0].{name}", f"{problem}; correct it or leave it out")
    if row.get("version", int, 1) != 1:
        raise row.error("version", f"{row.value['version']} is not 1; write the record in the form of version 1")
    masks: dict[str, Any] = {}
    for name, frames in row.get("masks", dict, {}).items():
        if not isinstance(frames, dict) or info is None:
            raise row.error(f"masks.{name}", f"{frames!r:.80} is not {{frame: RLE}} of a video; correct it")
        masks[name] = {i: compressed(row, f"masks.{name}[{i}]", mask, info) for i, mask in frames.items()}
    texts = {name: row.value.get(name) and row.get(name, str) for name in ("key", "source", "license")}
    return Part(
        row.get("conversations", list),
        row.get("objects", list, []),
        masks,
        hint=texts["key"],
        source=texts["source"],
        license=texts["license"],
    )


SOURCE = Source("jsonl", "unknown", "*.jsonl", _video, _part)
