"""SA-V masklets: `swim data convert sav FOLDER`.

Input: `NAME.mp4` with `NAME_manual.json` and `NAME_auto.json` beside it (or the videos under --video-root), in folders
of any depth. Each JSON is one object: `video_id`, `masklet` as a list over annotated frames of a list over objects of
COCO RLE, annotated at 6 frames/s of a video at 24. The two example files of the SAM 2 repository have been seen; their
video has not.

Decided here: list item k is frame k * s of the video, s being its rate / 6 rounded. Every RLE is there in the seen
files; an empty one says that the object is not in the frame, `null` would say that it was not annotated there. Objects
are `manual_3` and `auto_7`, without names; samples have no conversations.

Licence: CC BY 4.0 (Meta), videos and masks.
"""

from typing import Any

from swim.data_tools.rows import Row
from swim.data_tools.sources.forms import Part, Source, compressed, video_name
from swim.data_tools.video import VideoInfo

ANNOTATED_FPS = 6


def _part(row: Row, info: VideoInfo | None) -> Part:
    assert info is not None
    frames: list[Any] = row.get("masklet", list)
    kind = "auto" if row.file.stem.endswith("_auto") else "manual"
    step = max(1, round(info.fps / ANNOTATED_FPS))
    masks: dict[str, dict[int, Any]] = {}
    for k, listed in enumerate(frames):
        if not isinstance(listed, list):
            raise row.error(f"masklet[{k}]", f"{listed!r:.80} is not a list of masks over objects; correct it")
        for i, mask in enumerate(listed):
            known = masks.setdefault(f"{kind}_{i}", {})
            if mask is not None:
                known[k * step] = compressed(row, f"masklet[{k}][{i}]", mask, info)
    return Part([], [{"id": name, "label": "object"} for name in masks], masks)


def _video(row: Row) -> str:
    return video_name(row, "video_id") + ".mp4"


SOURCE = Source("sav", "CC-BY-4.0", "sav_*.json", _video, _part, whole_files=True)
