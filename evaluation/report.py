"""results.json, predictions and training logs -> one HTML page without requests: what supervision did, where it fails.

Words and layout are in the templates beside this file, pictures in figures.py; here is what the page is filled with.
Every string from data is escaped by the template, and the page's own policy forbids every request, so it opens offline.
"""

import base64
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import numpy as np

from swim.evaluation.alignment import noun_metrics
from swim.evaluation.answers import is_correct
from swim.evaluation.figures import ARM_COLOURS, DPI, SMOOTHED_SHARE, curves_png, strip_png
from swim.evaluation.predictions import Noun, Prediction, clip_of, read_predictions

FramesFor = Callable[[str, list[int]], np.ndarray]
MaskFor = Callable[[str, str, int], np.ndarray | None]

NUM_WORST = 3
MAX_STEPS = 8
# Label and definition of each row of the score table, in its order; the exact forms are in alignment.py.
DEFINITIONS: dict[str, tuple[str, str]] = {
    "accuracy": (
        "accuracy",
        "share of freely generated answers that equal the target but for case, space, punctuation",
    ),
    "pointing": (
        "pointing",
        "1 if the mask touches the cell with the highest m; the share of such cells if several tie",
    ),
    "mass": ("attention mass", "share of the attention on cells that the mask touches"),
    "mass_px": ("attention mass, pixels", "sum of m c over sum of m: the share of the attention on the mask itself"),
    "ap": (
        "AP",
        "average precision; a cell counts as c positive and 1 − c negative. A constant map gets the mean of c",
    ),
    "ap_lift": ("AP lift", "AP over the mean of c; 1 for a constant map"),
    "auc": ("ROC-AUC", "area under the ROC curve, same weights; 0.5 for a constant map. This is not AUC-Judd"),
    "auc_judd": ("AUC-Judd", "area under the ROC curve drawn through the values under the mask alone"),
    "nss": ("NSS", "mean of the standardised map, weighted by c; 0 for a constant map"),
    "precision": ("precision at 0.75", "share of mask among cells with min-max scaled attention of at least 0.75"),
    "gamepoint_1": (
        "GamePoint@1\N{NO-BREAK SPACE}%",
        "share of mask among the 1 % of cells with the highest m, at least one cell",
    ),
    "gamepoint_5": ("GamePoint@5\N{NO-BREAK SPACE}%", "the same for 5 % of the cells"),
    "gamepoint_10": ("GamePoint@10\N{NO-BREAK SPACE}%", "the same for 10 % of the cells"),
    "kl": ("KL, lower is better", "of the normalised mask from the normalised map, in nats"),
}


@dataclass(frozen=True)
class ArmFiles:
    """Files of one run: predictions.jsonl, and the training log and quarantine list, which may be absent."""

    predictions: Path
    metrics: Path
    quarantine: Path


@dataclass(frozen=True)
class Picture:
    """A PNG as the page embeds it, with its size in CSS pixels."""

    base64: str
    width: int
    height: int


@dataclass(frozen=True)
class Answer:
    """What one arm said to the prompt and how its noun's map scored; `problem` says why there is no prediction."""

    arm: str
    text: str
    right: bool
    metrics: Mapping[str, float] | None
    problem: str | None


@dataclass(frozen=True)
class Card:
    """One noun of one conversation with the answers and maps of all arms.

    `prompt` and `target` are split before and after the noun; without a `picture`, `problem` says why.
    """

    id: str
    task: str
    noun: str
    prompt: tuple[str, str, str]
    target: tuple[str, str, str]
    answers: Sequence[Answer] = field(default_factory=list)
    picture: Picture | None = None
    problem: str | None = None


def write_report(
    out: Path,
    *,
    title: str,
    results: Mapping[str, Any],
    arms: Mapping[str, ArmFiles],
    frames_for: FramesFor,
    mask_for: MaskFor,
    num_examples: int = 6,
) -> None:
    """Write the page for one or two arms, the first being the baseline, of a result of `scores.write_results`.

    `frames_for(clip, frames)` gives uint8 [N, H, W, 3], `mask_for(clip, object_id, frame)` bool [H, W] or None; frames
    are numbers of the stored video. A clip that they cannot read is shown as such. Raises ValueError if `results` is
    not about these arms or a line of a file is broken, FileNotFoundError without predictions.
    """
    if not 1 <= len(arms) <= 2:
        raise ValueError(f"one or two arms can be reported, not {len(arms)}")
    if missing := {*arms, *(["difference"] if len(arms) == 2 else [])} - set(results):
        raise ValueError(f"results lack {sorted(missing)}; give what write_results returned for {list(arms)}")
    predictions = {name: read_predictions(files.predictions) for name, files in arms.items()}
    curves = curves_png({name: read_jsonl(files.metrics) for name, files in arms.items()})

    def cards(chosen: Sequence[tuple[str, int]]) -> Iterator[Card]:
        return (make_card(id, number, predictions, frames_for, mask_for) for id, number in chosen)

    page = environment().get_template("report.html.jinja").render(
        title=title,
        results=results,
        arms=arms,
        tasks={task: known for name in arms for task, known in results[name]["accuracy_by_task"].items()},
        definitions=DEFINITIONS,
        colours=ARM_COLOURS,
        curves=curves and embed(curves),
        smoothed=SMOOTHED_SHARE,
        examples=list(cards(first_nouns(predictions, num_examples))),
        worst=list(cards(worst_nouns(list(predictions.values())[-1], NUM_WORST))),
        quarantine={name: read_jsonl(files.quarantine) for name, files in arms.items()},
    )  # fmt: skip
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page, encoding="utf-8")


def write_benchmark_report(
    out: Path,
    *,
    title: str,
    results: Mapping[str, Any],
    scores: Path,
    headline: Sequence[str],
    num_examples: int = 24,
) -> None:
    """Write the page of a benchmark without maps from its results.json and scores.jsonl."""
    arms = [name for name, part in results.items() if isinstance(part, dict) and "coverage" in part]
    page = (
        environment()
        .get_template("benchmark.html.jinja")
        .render(
            title=title,
            results=results,
            arms=arms,
            headline=headline,
            examples=read_jsonl(scores)[:num_examples],
        )
    )
    out.write_text(page, encoding="utf-8")


def first_nouns(predictions: Mapping[str, Mapping[str, Prediction]], num: int) -> list[tuple[str, int]]:
    """(id, 0) of the first conversation with a noun, in any arm, of each of the first `num` clips that have one."""
    first: dict[str, str] = {}
    for id in dict.fromkeys(id for lines in predictions.values() for id in lines):
        if any(id in lines and lines[id].nouns for lines in predictions.values()):
            first.setdefault(clip_of(id), id)
    return [(id, 0) for id in first.values()][:num]


def worst_nouns(lines: Mapping[str, Prediction], num: int) -> list[tuple[str, int]]:
    """(id, noun number) of the nouns with the lowest pointing, then the lowest mass."""
    ranked = [
        (metrics["pointing"], metrics["mass"], id, number)
        for id, line in lines.items()
        for number, noun in enumerate(line.nouns)
        if (metrics := noun_metrics(noun.map, noun.coverage))
    ]
    return [(id, number) for *_, id, number in sorted(ranked)[:num]]


def make_card(
    id: str,
    number: int,
    predictions: Mapping[str, Mapping[str, Prediction]],
    frames_for: FramesFor,
    mask_for: MaskFor,
) -> Card:
    """Noun `number` of the conversation in all arms; at least one of them has it."""
    nouns = {name: lines[id].nouns[number] for name, lines in predictions.items()
             if id in lines and number < len(lines[id].nouns)}  # fmt: skip
    arm, noun = next(iter(nouns.items()))
    line = predictions[arm][id]
    picture, problem = None, None
    try:
        picture = embed(noun_strip(line.clip, nouns, frames_for, mask_for))
    # What the readers raise is their own; one unreadable clip must not cost the page.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
    in_prompt = noun.turn == 0 or noun.text not in line.target[noun.start : noun.end]
    return Card(
        id,
        line.task,
        noun.text,
        prompt=_split(line.prompt, noun, marked=in_prompt),
        target=_split(line.target, noun, marked=not in_prompt),
        answers=[_answer(name, lines.get(id), nouns.get(name)) for name, lines in predictions.items()],
        picture=picture,
        problem=problem,
    )


def noun_strip(clip: str, nouns: Mapping[str, Noun], frames_for: FramesFor, mask_for: MaskFor) -> bytes:
    """PNG of one noun's maps by arm over the clip's steps, at most MAX_STEPS of them, evenly spread."""
    noun = next(iter(nouns.values()))
    if any(other.map.shape != noun.map.shape for other in nouns.values()):
        raise ValueError(f"the arms have maps of different shape: {[other.map.shape for other in nouns.values()]}")
    steps = np.linspace(0, len(noun.frames) - 1, min(len(noun.frames), MAX_STEPS)).round().astype(int)
    chosen = [_annotated_frame(clip, noun, step, mask_for) for step in steps]
    numbers = [frame for frame, _ in chosen]
    frames = frames_for(clip, numbers)
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[0] != len(numbers) or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [{len(numbers)}, H, W, 3], not {frames.dtype} {list(frames.shape)}")
    return strip_png(
        frames,
        {name: noun.map[steps] for name, noun in nouns.items()},
        masks=[mask for _, mask in chosen],
        titles=[f"frame {number}" for number in numbers],
        uniform=float(noun.map.mean()),
    )


def embed(png: bytes) -> Picture:
    """The picture at its natural size: inches at 96 CSS pixels each."""
    width, height = (int.from_bytes(png[at : at + 4], "big") for at in (16, 20))
    return Picture(base64.b64encode(png).decode(), round(width * 96 / DPI), round(height * 96 / DPI))


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Objects of a JSON-lines file, none if there is no file; ValueError naming a broken line."""
    lines = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines() if path.exists() else [], start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{path}:{number}: not a JSON line ({error}); delete it if a killed run left it"
            ) from error
        if not isinstance(line, dict):
            raise ValueError(f"{path}:{number}: a JSON object is expected, not {text[:40]!r}")
        lines.append(line)
    return lines


def _annotated_frame(clip: str, noun: Noun, step: int, mask_for: MaskFor) -> tuple[int, np.ndarray | None]:
    """The step's last frame with a mask of the noun's objects, and their union; its last frame if none has one."""
    for frame in reversed(noun.frames[step]):
        masks = [mask_for(clip, object_id, frame) for object_id in noun.object_ids]
        if found := [mask for mask in masks if mask is not None]:
            return frame, np.logical_or.reduce(found)
    return noun.frames[step][-1], None


def _split(text: str, noun: Noun, *, marked: bool) -> tuple[str, str, str]:
    start, end = (noun.start, noun.end) if marked else (len(text), len(text))
    return text[:start], text[start:end], text[end:]


def _answer(arm: str, line: Prediction | None, noun: Noun | None) -> Answer:
    if line is None or line.error is not None:
        return Answer(arm, "", False, None, line.error if line else "no prediction")
    metrics = noun_metrics(noun.map, noun.coverage) if noun else None
    return Answer(arm, line.answer, is_correct(line.answer, line.target), metrics, None)


def environment() -> jinja2.Environment:
    """Templates of this folder; they escape every string and refuse to leave out a value that is missing."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = _number
    environment.filters["percent"] = lambda value: (
        _number(None if value is None else 100 * value, ".1f") + "\N{NO-BREAK SPACE}%"
    )
    return environment


def _number(value: float | None, form: str = ".3f") -> str:
    return "–" if value is None else format(value, form).replace("-", "−")
