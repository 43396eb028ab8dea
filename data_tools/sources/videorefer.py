"""VideoRefer-700K, all three parts: `swim data convert videorefer FILE.json ... --video-root VIDEOS`.

Input: JSON arrays (detailed captions, short captions, QA) of `video`, `conversations` of {from: human | gpt, value}
with `<region>` or `<objectN><region>` for an object, and `annotation`, in later files `masks`: a list over objects of
{frame: {segmentation: COCO RLE, runs without a size, polygons or null}}. Known from the published loaders; no real file
has been seen.

Decided here: the k-th `<region>`, over all turns in order, is the k-th object; an `<objectN>` seen before is the same
object again. Each becomes a mention of the phrase "object N" (k + 1 where there is no N), of the kind `phrase`: nothing
in that text tells objects apart, so it is not for attention supervision. `segmentation: null` says that the object is
not in that frame; a frame that is null or lacks `segmentation` is not annotated. The task comes from the file's name:
detailed_caption, short_caption or qa.

Licence: Apache-2.0 for texts and masks; videos have their own (Panda-70M, MeViS, Ref-YouTube-VOS, A2D).
"""

import re
from typing import Any

from swim.data_tools.rows import Row
from swim.data_tools.sources.forms import Part, Source, dialogue, masks_by_frame, video_name
from swim.data_tools.video import VideoInfo

PLACE = re.compile(r"<object(\d{1,6})>(?:\s*<region>)?|<region>")


def _part(row: Row, info: VideoInfo | None) -> Part:
    assert info is not None
    field = "annotation" if row.value.get("annotation") is not None else "masks"
    annotation: list[Any] = row.get(field, list, [])
    turns, labels, number_of = dialogue(row), list[str](), dict[str, int]()
    for turn in turns:
        clean, mentions, position = "", [], 0
        for place in PLACE.finditer(turn["text"]):
            known = number_of.get(place[1]) if place[1] else None
            number = len(labels) if known is None else known
            if known is None:
                labels.append(f"object {place[1] or number + 1}")
                number_of.update({place[1]: number} if place[1] else {})
            clean += turn["text"][position : place.start()]
            start, position = len(clean), place.end()
            clean += labels[number]
            head = (start, start + len("object"))
            ids = [str(number)]
            mentions.append({"start": start, "end": len(clean), "head": head, "kind": "phrase", "object_ids": ids})
        turn |= {"text": clean + turn["text"][position:], "mentions": mentions}
    if len(labels) > len(annotation):
        raise row.error(field, f"{len(labels)} regions in the text but {len(annotation)} objects; give one for each")
    labels += [f"object {number + 1}" for number in range(len(labels), len(annotation))]
    masks = {}
    for number, frames in enumerate(annotation):
        if isinstance(frames, dict):
            frames = {frame: mask for frame, mask in frames.items() if mask is not None}
        masks[str(number)] = masks_by_frame(row, f"{field}[{number}]", frames, info)
    task = re.search("detailed|short|qa", row.file.name.lower())
    name = {"detailed": "detailed_caption", "short": "short_caption", "qa": "qa"}[task.group()] if task else "other"
    objects = [{"id": str(number), "label": label} for number, label in enumerate(labels)]
    return Part([{"task": name, "turns": turns}], objects, masks)


SOURCE = Source("videorefer", "Apache-2.0", "*.json", video_name, _part)
