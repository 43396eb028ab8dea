"""What `swim explain` shows: a video, words and their attention maps -> one HTML page without requests.

The page holds the video, the maps as bytes and a script of its own (explain.js beside this file). Its policy lets that
script run, by its hash, and nothing else; every string from data is escaped by the template or travels as JSON.

A map of h x w cells at one step is stored as 8-bit square roots of its shares of the step's highest cell, with that
cell in fp32: a cell is wrong by 0.4 % of the highest one at most.
"""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from swim.evaluation.figures import ARM_COLOURS, HEAT
from swim.evaluation.report import environment

SCRIPT = Path(__file__).with_name("explain.js")
LEVELS = 255
MAX_VIEWS = 2


@dataclass(frozen=True)
class Film:
    """The video as the page plays it (MP4), with its size in pixels, frames and frames per second."""

    name: str
    mp4: bytes
    height: int
    width: int
    num_frames: int
    fps: float


@dataclass(frozen=True)
class Object:
    """Something with masks: frame -> COCO RLE, or None where it is annotated as absent."""

    id: str
    label: str
    masks: Mapping[int, Mapping[str, Any] | None]


@dataclass(frozen=True)
class Word:
    """Characters [start, end) of a text; `entry` is its place in the maps, None if the model did not look from it, and
    `num_keys` the mean number of tokens that its tokens see."""

    start: int
    end: int
    noun: bool = False
    entry: int | None = None
    num_keys: float = 1.0


@dataclass(frozen=True)
class View:
    """One model's side: its answer, the words of prompt and answer, and what was kept of their attention.

    `maps` holds per layer fp32 [words + 1, 2 + heads, V]: planes as in train/explain/row_maps.py, the last entry is the
    map that all text tokens share. `coverages` gives per object and step the mask's share of each cell [h, w], None
    where it is not annotated. `own_layers` are those whose attention the run looked at. `about_training` says what the
    model was trained on; `warns` if this video is none of that.
    """

    name: str
    answer: str
    prompt_words: Sequence[Word]
    answer_words: Sequence[Word]
    grid: tuple[int, int, int]
    frames: Sequence[Sequence[int]]
    maps: Mapping[int, np.ndarray]
    heads: Sequence[int]
    num_heads: int
    own_layers: Sequence[int] = ()
    coverages: Mapping[str, Sequence[np.ndarray | None]] = field(default_factory=dict)
    about_training: str = ""
    warns: bool = False
    left_out: Sequence[str] = ()
    provenance: Mapping[str, Any] = field(default_factory=dict)


def write_page(
    out: Path,
    *,
    prompt: str,
    film: Film,
    views: Sequence[View],
    objects: Sequence[Object] = (),
    nouns_by: str = "",
    reference: str | None = None,
) -> dict[str, int]:
    """Write the page for one or two models, with the right answer if one is known; returns the bytes of the page, and
    of video and maps inside it.

    ValueError for another number of models, or for maps that do not fit their grid.
    """
    if not 1 <= len(views) <= MAX_VIEWS:
        raise ValueError(f"one or two models can be shown, not {len(views)}")
    script = SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    packed = [_packed(view, objects) for view in views]
    video = base64.b64encode(film.mp4).decode()
    page = environment().get_template("explain.html.jinja").render(
        title=f"{prompt} · {film.name}",
        prompt=prompt,
        film=film,
        video=video,
        views=views,
        objects=objects,
        nouns_by=nouns_by,
        reference=reference,
        colours=ARM_COLOURS,
        texts=[pieces(prompt, views[0].prompt_words), *(pieces(view.answer, view.answer_words) for view in views)],
        # Not escaped, because it is our own file; its hash in the policy is of these very characters.
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        data={
            "film": {"fps": film.fps, "frames": film.num_frames, "height": film.height, "width": film.width},
            "prompt": prompt,
            "objects": [_masks(thing) for thing in objects],
            "views": packed,
            "heat": _bytes((HEAT_TABLE * LEVELS).round().astype(np.uint8)),
            "colours": ARM_COLOURS,
        },
    )  # fmt: skip
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")
    return {
        "page": len(page.encode()),
        "video": len(video),
        "maps": sum(len(view["cells"]) + len(view["highest"]) for view in packed),
    }


def pieces(text: str, words: Sequence[Word]) -> list[tuple[str, int | None]]:
    """The text cut into words, each with its number, and what stands between them (None)."""
    cut: list[tuple[str, int | None]] = []
    at = 0
    for number, word in enumerate(words):
        cut += [(text[at : word.start], None), (text[word.start : word.end], number)]
        at = word.end
    return [(piece, number) for piece, number in [*cut, (text[at:], None)] if piece]


def pack(maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """uint8 levels [..., V] and highest cells fp32 [...] of maps >= 0 [..., V]; `unpack` is the way back."""
    highest = maps.max(-1)
    share = maps / np.where(highest > 0, highest, 1)[..., None]
    return (np.sqrt(share) * LEVELS).round().astype(np.uint8), highest.astype(np.float32)


def unpack(levels: np.ndarray, highest: np.ndarray) -> np.ndarray:
    """Maps [..., V] as the page reads them."""
    return (levels / np.float32(LEVELS)) ** 2 * highest[..., None]


def raw_cells(views: Sequence[View], *, prompt: str, film: Film) -> dict[str, Any]:
    """Plain data for JSON: of every word that was kept its cells [T][h][w] by layer and plane, to six digits."""
    return {
        "video": film.name,
        "fps": film.fps,
        "prompt": prompt,
        "models": [_raw_view(view, prompt) for view in views],
    }


def _raw_view(view: View, prompt: str) -> dict[str, Any]:
    def cells(entry: int) -> dict[str, Any]:
        return {
            str(layer): {
                name: [[[float(f"{x:.6g}") for x in row] for row in step] for step in plane.reshape(view.grid)]
                for name, plane in zip(plane_names(view.heads), planes[entry])
            }
            for layer, planes in view.maps.items()
        }

    words = [
        {
            "turn": turn,
            "text": text[word.start : word.end],
            "start": word.start,
            "end": word.end,
            "noun": word.noun,
            "tokens_seen": word.num_keys,
            "layers": cells(word.entry),
        }
        for turn, text, of_turn in (("prompt", prompt, view.prompt_words), ("answer", view.answer, view.answer_words))
        for word in of_turn
        if word.entry is not None
    ]
    return {
        "name": view.name,
        "answer": view.answer,
        "grid": list(view.grid),
        "frames": [list(step) for step in view.frames],
        "left_out": list(view.left_out),
        "provenance": dict(view.provenance),
        "words": words,
        "shared": cells(-1),
    }


def plane_names(heads: Sequence[int]) -> list[str]:
    """Names of the planes in their order."""
    return ["mean_within_step", "mean", *(f"head_{head}" for head in heads)]


def _packed(view: View, objects: Sequence[Object]) -> dict[str, Any]:
    steps, height, width = view.grid
    words = sum(word.entry is not None for word in (*view.prompt_words, *view.answer_words))
    shape = (words + 1, 2 + len(view.heads), steps * height * width)
    for layer, planes in view.maps.items():
        if planes.shape != shape:
            raise ValueError(f"{view.name}: the maps of layer {layer} are {planes.shape}, the words need {shape}")
    if len(view.frames) != steps:
        raise ValueError(f"{view.name}: {len(view.frames)} lists of frames for {steps} steps")
    by_step = (len(view.maps), *shape[:2], steps, height * width)
    levels, highest = pack(np.stack([*view.maps.values()]).reshape(by_step))
    return {
        "name": view.name,
        "answer": view.answer,
        "grid": view.grid,
        "frames": view.frames,
        "layers": [*view.maps],
        "own": [layer for layer in view.own_layers if layer in view.maps],
        "heads": view.heads,
        "words": [[_word(word) for word in words] for words in (view.prompt_words, view.answer_words)],
        "cells": _bytes(levels),
        "highest": _bytes(highest),
        "coverage": {thing.id: _coverage(view.coverages.get(thing.id, [None] * steps)) for thing in objects},
        "provenance": dict(view.provenance),
    }  # fmt: skip


def _word(word: Word) -> dict[str, Any]:
    return {"start": word.start, "end": word.end, "noun": word.noun, "entry": word.entry, "keys": word.num_keys}


def _coverage(steps: Sequence[np.ndarray | None]) -> list[str | None]:
    # Upwards: a cell that the mask touches stays touched.
    return [None if c is None else _bytes(np.ceil(np.clip(c, 0, 1) * LEVELS).astype(np.uint8)) for c in steps]


def _masks(thing: Object) -> dict[str, Any]:
    masks = {
        str(f): None if rle is None else {"size": list(rle["size"]), "counts": rle["counts"]}
        for f, rle in thing.masks.items()
    }
    return {"id": thing.id, "label": thing.label, "masks": masks}


def _bytes(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(array.dtype.newbyteorder("<")).tobytes()).decode()


def _heat_table() -> np.ndarray:
    """RGBA [256, 4] in [0, 1]: the report's colours, the more opaque the more attention."""
    share = np.linspace(0, 1, len(HEAT))
    table = HEAT.copy()
    table[:, 3] = 0.95 * share**0.75
    return table


HEAT_TABLE = _heat_table()
