"""Conversation files of ms-swift and LLaVA: `swim data convert conversations FILE ... --video-root VIDEOS`.

Input: JSON arrays or JSON Lines (`*.jsonl`), per row either `messages` of {role: system | user | assistant, content:
text} with `videos: [name]` (ms-swift), or `conversations` of {from: system | human | gpt, value} with `video: name` or
`videos: [name]` (LLaVA). `content` may also be a list of {type: text, text} and {type: video, video: name}. Documented
forms; no published file has been seen.

Decided here: `<video>` in a text goes; a row has one video or none (then it is text alone); rows with images or several
videos are left out. There are no objects and no masks; ms-swift's `objects` (boxes of images) are not read.

Licence: what --license says.
"""

from typing import Any

from swim.data_tools.rows import Row
from swim.data_tools.sources.forms import LLAVA, MESSAGES, Part, Source, dialogue, no_images
from swim.data_tools.video import VideoInfo


def video_of(row: Row) -> str | None:
    """Name of the row's video, None if it is text alone; RecordError for images and several videos."""
    messages = row.get("messages", list, [])
    no_images(row)
    content = [turn["content"] for turn in messages if isinstance(turn, dict) and isinstance(turn.get("content"), list)]
    parts = [part for listed in content for part in listed if isinstance(part, dict)]
    if any(part.get("type") == "image" for part in parts):
        raise row.error("messages", "it shows an image: only videos and text can be converted; leave it out")
    names = [row.value["video"]] if row.value.get("video") else list(row.get("videos", list, []))
    names += [part.get("video") for part in parts if part.get("type") == "video"]
    if len(names) > 1 or not all(isinstance(name, str) and name for name in names):
        raise row.error("videos", f"{names!r:.80} is not one file name; give one video per record")
    return names[0] if names else None


def part_of(row: Row, info: VideoInfo | None, *, task: str = "conversation") -> Part:
    """The row's turns as one conversation."""
    del info
    if "messages" not in row.value:
        return Part([{"task": task, "turns": dialogue(row, "conversations", LLAVA)}])
    messages = [_flat(turn) for turn in row.get("messages", list)]
    return Part(
        [{"task": task, "turns": dialogue(Row(row.file, row.number, {"messages": messages}), "messages", MESSAGES)}]
    )


def _flat(turn: Any) -> Any:
    """A turn whose content is a list, with the texts of it."""
    if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
        return turn
    texts = [part["text"] for part in turn["content"] if isinstance(part, dict) and isinstance(part.get("text"), str)]
    return turn | {"content": "\n".join(texts)}


SOURCE = Source("conversations", "unknown", "*.json*", video_of, part_of)
