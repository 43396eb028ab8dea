"""NL-Refer (SWIM, arXiv 2605.18018): `swim data convert nl-refer FILE.json ... --video-root VIDEOS`.

Input: JSON arrays, the videos apart. Training rows and Bench-D rows: `video`, `conversations` of {from: human | gpt,
value} with `<ins>noun</ins>` tags, `annotation` as a list over objects of {frame: {segmentation: COCO RLE or null}},
and an `index` that names the task. Bench-Q rows: `Question` with tags, `options`, `Answer`, `annotation`, `type`. Known
from the published loaders; no published file has been seen, only one of this form that was made about real footage.

Decided here: the k-th tag, over all turns in order, names the k-th object. `segmentation: null` says that the object
was looked for and is not in that frame; a frame without `segmentation` is not annotated. A row with tags but an empty
`annotation` keeps its text and gets no mentions. Options follow the question, one a line; the task of such a row is
`multiple_choice: TYPE`, without a type `multiple_choice`.

Licence: CC BY-NC 4.0 for the texts; the masks come from VideoRefer-700K (Apache-2.0); videos have their own.
"""

import re
from typing import Any

from swim.data_tools.records import TAG
from swim.data_tools.rows import Row
from swim.data_tools.sources.forms import MEDIA_TAG, Part, Source, dialogue, masks_by_frame, video_name
from swim.data_tools.video import VideoInfo


def split_tags(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Text without `<ins>` tags and the [start, end) of what each pair enclosed; ValueError if they do not pair up."""
    clean, spans, start, position = "", [], None, 0
    for tag in TAG.finditer(text):
        clean += text[position : tag.start()]
        position = tag.end()
        if (tag.group() == "<ins>") != (start is None):
            raise ValueError(f"{tag.group()!r} at character {tag.start()} has no partner")
        if start is None:
            start = len(clean)
            continue
        noun = clean[start:]
        if not noun.strip():
            raise ValueError(f"the tag that ends at character {tag.end()} encloses only {noun!r}")
        spans.append((start + len(noun) - len(noun.lstrip()), start + len(noun.rstrip())))
        start = None
    if start is not None:
        raise ValueError("the last '<ins>' has no '</ins>'")
    return clean + text[position:], spans


def _part(row: Row, info: VideoInfo | None) -> Part:
    assert info is not None
    annotation: list[Any] = row.get("annotation", list, [])
    turns, task = _turns(row)
    num_tags, labels = 0, ["unnamed"] * len(annotation)
    for place, turn in enumerate(turns):
        try:
            turn["text"], spans = split_tags(turn["text"])
        except ValueError as error:
            remedy = "write <ins>noun</ins> with one noun in each pair"
            raise row.error(f"conversations[{place}]", f"{error}; {remedy}") from None
        turn["mentions"] = []
        for start, end in spans:
            if num_tags < len(annotation):
                labels[num_tags] = turn["text"][start:end]
                turn["mentions"].append(
                    {"start": start, "end": end, "head": (start, end), "object_ids": [str(num_tags)]}
                )
            num_tags += 1
    if annotation and num_tags > len(annotation):
        remedy = "give one object per tag, the same masks again for a noun that is tagged twice"
        raise row.error("annotation", f"{num_tags} <ins> tags but {len(annotation)} objects; {remedy}")
    masks = {str(i): masks_by_frame(row, f"annotation[{i}]", frames, info) for i, frames in enumerate(annotation)}
    objects = [{"id": str(i), "label": label} for i, label in enumerate(labels)]
    return Part([{"task": task, "turns": turns}], objects, masks)


def _turns(row: Row) -> tuple[list[dict[str, Any]], str]:
    if "Question" not in row.value:
        task = re.search("detailed_caption|short_caption|qa", row.name)
        return dialogue(row), task.group() if task else "other"
    question = "\n".join([row.get("Question", str), *map(str, row.get("options", list, []))])
    answer, kind = row.get("Answer", str), row.value.get("type")
    return [
        {"role": "user", "text": MEDIA_TAG.sub("", question)},
        {"role": "assistant", "text": answer},
    ], f"multiple_choice: {kind}" if isinstance(kind, str) and kind else "multiple_choice"


SOURCE = Source("nl-refer", "CC-BY-NC-4.0", "*.json", video_name, _part)
