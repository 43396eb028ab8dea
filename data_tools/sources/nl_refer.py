"""NL-Refer JSON files (SWIM, arXiv 2605.18018) to shards.

What the file form leaves open is decided here. The k-th `<ins>` tag, over all turns in order, names the k-th object of
`annotation`. `segmentation: null` says that the object was looked for and is not in that frame; a frame without
`segmentation` is not annotated. A record with tags but an empty `annotation` keeps its text and gets no mentions.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pycocotools import mask as coco
from rich.console import Console
from rich.progress import track

from swim.data_tools.records import MAX_MASK_SIDE, TAG, Record, RecordError, parse_sample
from swim.data_tools.shards import ShardWriter
from swim.data_tools.video import VideoError, VideoInfo, probe

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}
SKIPPED_FILE = "skipped.jsonl"


@dataclass(frozen=True)
class Summary:
    """What a conversion did: samples written, records in them, records listed in `skipped.jsonl`."""

    clips: int
    kept: int
    skipped: int


def convert_nl_refer(
    json_path: str | Path,
    video_root: str | Path,
    out: str | Path,
    *,
    license: str = "unknown",
    max_bytes: int = 1 << 30,
) -> Summary:
    """Write the records of an NL-Refer JSON array as shards into `out`, one sample per video, bytes unchanged.

    Bad records and unreadable videos are left out and listed with their reason in `out/skipped.jsonl`; RecordError if
    the file is not such an array, ShardError if `out` holds shards already.
    """
    clips = _group_by_video(Path(json_path))
    console = Console(stderr=True)
    num_clips, kept, skipped = 0, 0, 0
    with ShardWriter(out, max_bytes=max_bytes) as writer, Path(out, SKIPPED_FILE).open("w") as report:
        for video, rows in track(clips.items(), "converting", console=console, disable=not console.is_terminal):
            good: list[tuple[Record, dict[str, Any]]] = []
            found: tuple[bytes, VideoInfo] | None = None
            for number, row in rows:
                try:
                    found = found or _read_video(number, row, Path(video_root))
                    good.append(_convert(number, row, found[1], Path(video), license))
                except RecordError as error:
                    line = {"number": number, "index": row.get("index"), "video": video, "reason": str(error)}
                    report.write(json.dumps(line) + "\n")
                    skipped += 1
            if found and good:
                key = f"{_slug(Path(video).stem)}-{hashlib.sha256(video.encode()).hexdigest()[:8]}"
                record, masks = parse_sample(key, *_merge(good))
                writer.write(key, record, masks, {str(record.media[0].member): found[0]})
                num_clips, kept = num_clips + 1, kept + len(good)
    return Summary(num_clips, kept, skipped)


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


def _group_by_video(json_path: Path) -> dict[str, list[tuple[int, dict[str, Any]]]]:
    try:
        rows = json.loads(json_path.read_bytes())
    except ValueError as error:
        raise RecordError(f"{json_path}: not JSON ({error}); give one JSON array of records") from error
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise RecordError(f"{json_path}: holds {type(rows).__name__}; give one JSON array of records")
    clips: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for number, row in enumerate(rows):
        clips.setdefault(str(row.get("video", "")), []).append((number, row))
    return clips


def _read_video(number: int, row: Mapping[str, Any], root: Path) -> tuple[bytes, VideoInfo]:
    name = _name(number, row)
    if not isinstance(row.get("video"), str) or not row["video"]:
        raise RecordError(f"record {name!r}, video: {row.get('video')!r} is not a file name; name the clip's video")
    path = root / row["video"]
    if not path.resolve().is_relative_to(root.resolve()):
        raise RecordError(f"record {name!r}, video: {row['video']!r} lies outside {root}; choose another --video-root")
    try:
        data = path.read_bytes()
        return data, probe(data)
    except OSError as error:
        raise RecordError(f"record {name!r}, video: {path} cannot be read ({error}); check --video-root") from error
    except VideoError as error:
        raise RecordError(f"record {name!r}, video: {path}: {error}") from error


def _convert(
    number: int, row: Mapping[str, Any], info: VideoInfo, video: Path, licence: str
) -> tuple[Record, dict[str, Any]]:
    """One checked record about one clip, and its masks layer as JSON values."""
    name = _name(number, row)
    annotation, exchange = row.get("annotation") or [], row.get("conversations") or []
    if not isinstance(annotation, list) or not isinstance(exchange, list):
        kinds = f"{type(annotation).__name__} and {type(exchange).__name__}"
        raise RecordError(f"record {name!r}, annotation and conversations: {kinds} where both are lists; correct it")
    turns, num_tags = [], 0
    labels = ["unnamed"] * len(annotation)
    for place, turn in enumerate(exchange):
        if not isinstance(turn, dict) or turn.get("from") not in ROLES or not isinstance(turn.get("value"), str):
            problem = f"{turn!r:.80} is not {{'from': {' | '.join(ROLES)}, 'value': text}}"
            raise RecordError(f"record {name!r}, conversations[{place}]: {problem}; correct it")
        try:
            text, spans = split_tags(re.sub(r"<(video|image)>\n?", "", turn["value"]).strip())
        except ValueError as error:
            remedy = "write <ins>noun</ins> with one noun in each pair"
            raise RecordError(f"record {name!r}, conversations[{place}]: {error}; {remedy}") from None
        mentions = []
        for span in spans:
            if num_tags < len(annotation):
                labels[num_tags] = text[slice(*span)]
                mentions.append({"start": span[0], "end": span[1], "head": span, "object_ids": [str(num_tags)]})
            num_tags += 1
        turns.append({"role": ROLES[turn["from"]], "text": text, "mentions": mentions})
    if annotation and num_tags > len(annotation):
        remedy = "give one object per tag, the same masks again for a noun that is tagged twice"
        raise RecordError(f"record {name!r}, annotation: {num_tags} <ins> tags but {len(annotation)} objects; {remedy}")
    task = re.search("detailed_caption|short_caption|qa", name)
    media = {"member": video.suffix[1:].lower() or "mp4", "kind": "video", **vars(info)}
    values = {
        "version": 1,
        "source": "nl-refer",
        "license": licence,
        "media": [media],
        "objects": [{"id": str(i), "label": label} for i, label in enumerate(labels)],
        "conversations": [{"task": task.group() if task else "other", "turns": turns}],
    }
    masks = {str(i): _masks(f"record {name!r}, annotation[{i}]", frames) for i, frames in enumerate(annotation)}
    return parse_sample(_slug(name), values, masks)[0], masks


def _masks(where: str, frames: Any) -> dict[int, dict[str, Any] | None]:
    if not isinstance(frames, dict):
        raise RecordError(f"{where}: {frames!r:.80} is not {{frame: {{segmentation: RLE}}}}; correct it")
    masks: dict[int, dict[str, Any] | None] = {}
    for frame, value in frames.items():
        if not frame.isdecimal():
            raise RecordError(f"{where}: {frame!r} is not a frame number; number frames from 0")
        if not isinstance(value, dict):
            raise RecordError(f"{where}[{frame}]: {value!r:.80} is not {{segmentation: RLE}}; correct it")
        if "segmentation" in value:
            masks[int(frame)] = _compressed(f"{where}[{frame}]", value["segmentation"])
    return masks


def _compressed(where: str, rle: Any) -> Any:
    """RLE with `counts` as a string; lists are compressed, anything else is left for the record's own check."""
    if not isinstance(rle, dict) or not isinstance(rle.get("counts"), list):
        return rle
    runs: list[Any] = rle["counts"]
    size: Any = rle.get("size")
    numbers = [*runs, *size] if isinstance(size, list) and len(size) == 2 else [None]
    if not all(isinstance(number, int) and 0 <= number <= MAX_MASK_SIDE**2 for number in numbers):
        problem = f"size {size!r:.40} or counts {runs!r:.40} hold other things than pixel numbers"
        raise RecordError(f"{where}: {problem}; encode the mask again")
    # Checked here, as the encoder trusts its input.
    if sum(runs) != size[0] * size[1]:
        problem = f"the runs sum to {sum(runs)}, but {size[0]} x {size[1]} is {size[0] * size[1]}"
        raise RecordError(f"{where}: {problem}; size and counts belong to different masks, encode it again")
    return {"size": size, "counts": coco.frPyObjects(rle, *size)["counts"].decode("ascii")}


def _merge(parts: Iterable[tuple[Record, dict[str, Any]]]) -> tuple[dict[str, Any], dict[str, Any]]:
    """One sample of all records about a clip; objects with the same masks become one."""
    merged: dict[str, Any] = {}
    masks: dict[str, Any] = {}
    objects: list[dict[str, Any]] = []
    for record, part_masks in parts:
        new_id = {}
        for thing in record.objects:
            frames = part_masks[thing.id]
            # Two objects that are never visible have equal masks too, but nothing says that they are the same.
            same = next((i for i, known in masks.items() if known == frames and any(frames.values())), None)
            new_id[thing.id] = same or str(len(objects))
            if same is None:
                masks[new_id[thing.id]] = frames
                objects.append({"id": new_id[thing.id], "label": thing.label})
        values = record.model_dump()
        for turn in values["conversations"][0]["turns"]:
            for mention in turn["mentions"]:
                mention["object_ids"] = [new_id[name] for name in mention["object_ids"]]
        merged = merged or values | {"conversations": []}
        merged["conversations"] += values["conversations"]
    return merged | {"objects": objects}, masks


def _name(number: int, row: Mapping[str, Any]) -> str:
    return str(row.get("index") or f"record_{number}")


def _slug(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", name)[:64] or "_"
