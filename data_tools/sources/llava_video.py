"""LLaVA-Video-178K: `swim data convert llava-video FILE.json ... --video-root LLaVA-Video-178K`.

Input: JSON arrays of `data_source`, `video` (path under the root), `conversations` of {from: human | gpt, value} with
`<image>` or `<video>` where the video goes. Known from a published loader; no real file has been seen.

Decided here: all turns of a row are one conversation, whose task is `data_source`; a path that begins with the name of
the root folder, `LLaVA-Video-178K/...`, is counted from inside it. Rows with `image` are left out. There are no objects
and no masks.

Licence: not stated in what has been seen, so `unknown` unless --license says it; videos have their own.
"""

from swim.data_tools.rows import Row
from swim.data_tools.sources.conversations import part_of
from swim.data_tools.sources.forms import Part, Source, no_images, video_name
from swim.data_tools.video import VideoInfo

FOLDER = "LLaVA-Video-178K/"


def _video(row: Row) -> str:
    row.get("conversations", list, [])
    no_images(row)
    return video_name(row).removeprefix(FOLDER)


def _part(row: Row, info: VideoInfo | None) -> Part:
    return part_of(row, info, task=row.get("data_source", str, "conversation"))


SOURCE = Source("llava-video", "unknown", "*.json", _video, _part)
