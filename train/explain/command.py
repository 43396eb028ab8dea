"""`swim explain`: a model's greedy answer about a video, and where each word of prompt and answer looks, as a page.

One model is in memory at a time; what is read of it is in `look.py`, the page in evaluation/explain_page.py.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from swim.data_tools.all_nouns import marked_nouns, words_of
from swim.data_tools.records import Masks, Rle, rle_problems
from swim.data_tools.reencode import reencode
from swim.data_tools.shards import ShardSet
from swim.data_tools.video import UnsteadyVideo, VideoError, VideoInfo, probe
from swim.evaluation.explain_page import Film, Object, raw_cells, write_page
from swim.train.explain.look import Options, Subject, look
from swim.train.explain.sources import distinct, find_source

CRF = 28  # of the video in the page
NAMELESS = "object"  # of a mask file that names none: what the first noun of the prompt says


@dataclass(frozen=True)
class Explained:
    """Answers by model, what the page says about each model, and bytes of the page and of video and maps inside it."""

    answers: dict[str, str]
    said: list[str]
    sizes: dict[str, int]


def explain(
    subject: Subject, tagged: str, models: Sequence[str], out: Path, *, cells: Path | None, options: Options
) -> Explained:
    """Write the page, and to `cells` the raw maps as JSON.

    ValueError for tags that do not pair up, frames that cannot be decoded, or maps that do not fit the page.
    """
    prompt, nouns, nouns_by = marked_nouns(tagged, options.nouns)
    if not words_of(prompt):
        raise ValueError(f"the prompt {prompt!r} has no words; ask something about the video")
    for path in filter(None, (out, cells)):  # before minutes are spent on what could not be written
        if path.is_dir():
            raise ValueError(f"{path} is a folder; give the name of a file in it")
        path.parent.mkdir(parents=True, exist_ok=True)
    mp4, info, _ = reencode(subject.video, options.side, crf=CRF)
    played = probe(mp4)
    film = Film(subject.name, mp4, played.height, played.width, info.num_frames, played.fps)
    sources = [find_source(name) for name in models]
    views = [look(subject, prompt, nouns, source, options, share=len(models)) for source in sources]
    views = [replace(view, name=name) for view, name in zip(views, distinct([view.name for view in views]))]
    objects = []
    for id, masks in subject.masks.items():
        label = subject.labels.get(id) or (prompt[slice(*nouns[0])] if id == NAMELESS and nouns else id)
        rles = {frame: None if rle is None else rle.model_dump() for frame, rle in masks.items()}
        objects.append(Object(id, label, rles))
    reference = subject.answers.get(prompt)
    sizes = write_page(
        out, prompt=prompt, film=film, views=views, objects=objects, nouns_by=nouns_by, reference=reference
    )
    if cells is not None:
        cells.write_text(json.dumps(raw_cells(views, prompt=prompt, film=film)) + "\n")
    said = [f"{view.name}: {text}" for view in views for text in (view.about_training, *view.left_out)]
    return Explained({view.name: view.answer for view in views}, said, sizes)


def video_subject(video: Path, mask: Path | None) -> Subject:
    """A video file with the masks of a JSON file: a masks layer {object: {frame: RLE or null}}, or one object's frames
    as RLE or {"segmentation": RLE}. ValueError for another form, frames that the video has not got, and masks that are
    damaged or of another shape than its frames."""
    data = video.read_bytes()
    try:
        data, info, frame_map = _steady(data)
    except VideoError as error:
        raise ValueError(f"{video}: {error}") from None
    masks = {} if mask is None else read_masks(mask)
    for id, of in masks.items():
        for frame, rle in of.items():
            for problem, remedy in () if rle is None else rle_problems(rle, info.height, info.width):
                raise ValueError(f"{mask}: mask of {id} in frame {frame}: {problem}; {remedy}")
    if frame_map is not None:
        masks = {id: {n: of[f] for n, f in enumerate(frame_map) if f in of} for id, of in masks.items()}
    if late := [f for frames in masks.values() for f in frames if not 0 <= f < info.num_frames]:
        raise ValueError(f"{mask}: frame {late[0]} has a mask, the video has frames 0 to {info.num_frames - 1}")
    return Subject(video.name, data, info, None, masks, {}, {})


def _steady(data: bytes) -> tuple[bytes, VideoInfo, list[int] | None]:
    try:
        return data, probe(data), None
    except UnsteadyVideo:
        # Its frames have no numbers that all decoders agree on: from here on they are those of the re-encoded one.
        data, _, frame_map = reencode(data)
        return data, probe(data), frame_map


def sample_subject(shards: ShardSet, key: str) -> Subject:
    """The clip of a sample in shards with its masks and labels; KeyError, BadSample or ValueError if it has none."""
    sample = shards.read(key)
    if not sample.record.media or sample.record.media[0].kind != "video":
        raise ValueError(f"{key}: its record has no video; choose another key of {shards.folder}")
    labels = {thing.id: thing.label for thing in sample.record.objects}
    answers = {talk.turns[-2].text: talk.turns[-1].text for talk in sample.record.conversations if len(talk.turns) == 2}
    video = sample.media()
    return Subject(key, video, probe(video), sample.record.source, sample.masks, labels, answers)


def read_masks(path: Path) -> Masks:
    """Masks of a JSON file in one of the forms that `video_subject` takes."""
    try:
        data = json.loads(path.read_text())
        by_object = data if not all(key.isdecimal() for key in data) else {NAMELESS: data}
        return {
            id: {int(frame): _rle(value) for frame, value in sorted(frames.items(), key=lambda item: int(item[0]))}
            for id, frames in by_object.items()
        }
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise ValueError(
            f"{path}: no masks can be read ({type(error).__name__}: {error}); give {{object: {{frame: RLE or null}}}} "
            "as in KEY.masks.json, or {frame: RLE or null}"
        ) from None


def _rle(value: Any) -> Rle | None:
    value = value["segmentation"] if isinstance(value, dict) and "segmentation" in value else value
    return None if value is None else Rle.model_validate(value)
