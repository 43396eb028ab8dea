"""Promise: the report is one file that opens offline, shows failures, and cannot be made to run code by its data."""

import io
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.image import imread

from swim.evaluation.figures import curves_png, strip_png
from swim.evaluation.report import ArmFiles, write_report
from swim.evaluation.scores import score, write_results

HOSTILE = "<script>alert('x')</script><img src=http://evil.test/a.png>\"' $\\frac"
Build = Callable[..., dict[str, Any]]


class _Page(HTMLParser):
    """The tags, attributes and visible text that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data


def _frames_for(_clip: str, frames: list[int]) -> np.ndarray:
    return np.full((len(frames), 16, 32, 3), 90, np.uint8)


def _mask_for(_clip: str, _object_id: str, frame: int) -> np.ndarray | None:
    return np.arange(32) < np.full((16, 1), 8) if frame % 2 == 0 else None


def _write(folder: Path, arms: dict[str, list[dict[str, Any]]], ids: list[str], **options: Any) -> str:
    files, scores = {}, {}
    for number, (name, lines) in enumerate(arms.items()):
        path = folder / f"{number}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        log = folder / f"{number}.metrics.jsonl"
        log.write_text('{"step": 0, "loss/text": 2.5, "note": "x"}\n{"step": 1, "loss/text": 2.0}\n')
        quarantine = folder / f"{number}.quarantine.jsonl"
        quarantine.write_text(json.dumps({"id": "q#0", "reason": HOSTILE}) + "\n")
        files[name] = ArmFiles(path, log, quarantine)
        scores[name] = score(path, expected_ids=ids, resamples=100) | {"seconds": 10.0 + number}
    results = write_results(folder / "results.json", scores, provenance={HOSTILE: {"a": [1, HOSTILE]}})
    out = folder / "report.html"
    options = {"title": HOSTILE, "frames_for": _frames_for, "mask_for": _mask_for} | options
    write_report(out, results=results, arms=files, **options)
    return out.read_text(encoding="utf-8")


def _hostile_lines(line: Build, noun: Build) -> list[dict[str, Any]]:
    bad = line("a#0", [noun("o0", 0, 0)], answer=HOSTILE, task=HOSTILE)
    bad |= {"prompt": HOSTILE, "target": HOSTILE}
    bad["nouns"][0] |= {"text": HOSTILE[:8], "start": 0, "end": 8}
    return [bad, {"id": "b#0", "clip": "b", "error": HOSTILE}, line("c#0", [noun("o1", 1, 3)])]


def test_data_cannot_inject_markup_or_requests(tmp_path: Path, line: Build, noun: Build) -> None:
    lines = _hostile_lines(line, noun)
    text = _write(tmp_path, {HOSTILE: lines, "b": lines}, ["a#0", "b#0", "c#0"])
    page = _Page(text)
    assert "script" not in page.tags
    assert "link" not in page.tags
    for name, value in page.attributes:
        assert not name.startswith("on")
        if name in ("src", "href"):
            assert (value or "").startswith("data:image/png;base64,")
    assert not re.search(r"url\(|@import", text)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    # Escaped, not dropped: title, prompt, answer, failure, quarantine and provenance are all readable.
    assert page.text.count(HOSTILE) >= 6


def test_page_states_the_numbers_the_failures_and_the_examples(tmp_path: Path, line: Build, noun: Build) -> None:
    ids = ["a#0", "b#0", "c#0", "d#0"]
    base = [line(id, [noun("o0", 0, 3)], answer="right") for id in ids]
    base[1] = {"id": "b#0", "clip": "b", "error": "decoder: truncated"}
    other = [line(id, [noun("o0", 0, 0)]) for id in ids[:3]]
    page = _Page(_write(tmp_path, {"sft": base, "supervised": other}, ids, title="Demo", num_examples=2, num_worst=1))
    assert "in 75 % of the steps, in sft in 0 %: a difference of +75 points" in page.text
    assert "75 % of the answers are right against 0 %" in page.text
    assert "count as worst: 1 of 4 (sft), 1 of 4 (supervised)" in page.text
    assert page.text.count("decoder: truncated") == 2  # in the example of clip b and in the list of failures
    assert "no prediction" in page.text
    # Training curves, the first two clips although the baseline failed on the second, and the worst noun.
    assert page.tags.count("img") == 4
    cards = re.findall(r"([abcd]#0) · direction", page.text)
    assert cards[:2] == ["a#0", "b#0"]
    assert page.tags.count("mark") == 3


def test_single_arm_of_any_name(tmp_path: Path, line: Build, noun: Build) -> None:
    page = _Page(_write(tmp_path, {"lora r8": [line("a#0", [noun("o0", 0, 0)])]}, ["a#0"], title="One"))
    assert "In lora r8, the maximum" in page.text
    assert "in 100 % of the steps. A uniform map would reach 25 %." in page.text
    assert "difference" not in page.text


def test_unreadable_frames_and_unannotated_nouns_do_not_stop_the_report(
    tmp_path: Path, line: Build, noun: Build
) -> None:
    def broken(_clip: str, _frames: list[int]) -> np.ndarray:
        raise OSError("moov atom not found")

    lines = [line("a#0", [noun("o0", 0, 0) | {"coverage": [None, None]}])]
    page = _Page(_write(tmp_path, {"arm": lines}, ["a#0"], title="None", frames_for=broken))
    assert "No annotated noun could be scored" in page.text
    assert "moov atom not found" in page.text


def test_worst_nouns_come_from_the_last_arm(tmp_path: Path, line: Build, noun: Build) -> None:
    ids = ["a#0", "b#0", "c#0"]
    base = [line(id, [noun("o0", 0, look)]) for id, look in zip(ids, (3, 0, 0))]
    other = [line(id, [noun("o0", 0, look)]) for id, look in zip(ids, (0, 0, 3))]
    page = _Page(_write(tmp_path, {"x": base, "y": other}, ids, title="T", num_examples=0, num_worst=1))
    assert re.findall(r"([abc]#0) · direction", page.text) == ["c#0"]


def _strip_pixels(maps: dict[str, np.ndarray], mask: np.ndarray | None = None) -> np.ndarray:
    """A strip of one grey 16 x 16 frame as floats [height, width, 4]."""
    frames = np.full((1, 16, 16, 3), 128, np.uint8)
    png = strip_png(frames, maps, masks=[mask], titles=["$\\frac"], uniform=0.25)
    return imread(io.BytesIO(png))


def _cell_colours(pixels: np.ndarray, row: int, num_rows: int) -> np.ndarray:
    """Colours [2, 2, 9, 3] at nine points of each cell of a 2 x 2 map, from the strip's geometry in inches."""
    height, width = 0.26 + num_rows * 2.26 + 0.08, 0.95 + 2.26 + 0.95
    y = (0.26 + row * 2.26 + 2.2 * np.array([[0.1, 0.25, 0.4], [0.6, 0.75, 0.9]])) / height * pixels.shape[0]
    x = (0.95 + 2.2 * np.array([[0.1, 0.25, 0.4], [0.6, 0.75, 0.9]])) / width * pixels.shape[1]
    points = pixels[y.astype(int)[:, None, :, None], x.astype(int)[None, :, None, :], :3]
    return points.reshape(2, 2, 9, 3)


def test_strip_draws_each_cell_as_one_flat_square() -> None:
    map_HW = np.array([[0.1, 0.2], [0.3, 0.4]])
    colours = _cell_colours(_strip_pixels({"a": map_HW[None]}), 1, 2)
    assert (colours == colours[:, :, :1]).all()
    assert (np.diff(colours[:, :, 0].mean(axis=-1).ravel()) > 0.02).all()  # brighter means more


def test_strip_has_one_colour_scale_for_all_arms() -> None:
    weak, strong = np.full((1, 2, 2), 0.25), np.full((1, 2, 2), 0.9)
    beside_weak = _cell_colours(_strip_pixels({"a": weak, "b": weak}), 1, 3)
    pixels = _strip_pixels({"a": weak, "b": strong})
    assert (_cell_colours(pixels, 1, 3) < beside_weak - 0.1).any()
    np.testing.assert_array_equal(_cell_colours(pixels, 2, 3), beside_weak)  # both are the maximum of their scale


def test_strip_draws_the_mask_on_every_row() -> None:
    mask = np.zeros((32, 32), bool)
    mask[8:24, :16] = True  # at its own size, touching the edge
    maps = {"a": np.full((1, 2, 2), 0.25)}
    changed = (_strip_pixels(maps, mask) != _strip_pixels(maps)).any(axis=(1, 2))
    half = len(changed) // 2
    assert changed[:half].any()
    assert changed[half:].any()


@pytest.mark.parametrize("rows", [[], [{"step": 0, "unknown": 1.0}], [{"step": 3}]])
def test_logs_without_known_curves_give_no_picture(rows: list[dict[str, float]]) -> None:
    assert curves_png({"a": rows}) is None
