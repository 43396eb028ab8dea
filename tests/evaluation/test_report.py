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
from evaluation_lines import make_file
from matplotlib.image import imread

from swim.evaluation.alignment import METRICS
from swim.evaluation.benchmarks.alignment import PROTOCOL, SCORED, score
from swim.evaluation.figures import _panels, curves_png, smooth, strip_figure, strip_png
from swim.evaluation.report import DEFINITIONS, ArmFiles, read_jsonl, write_report
from swim.evaluation.scores import Settings, write_results
from swim.evaluation.stages import report, score_files

HOSTILE = "<script>alert(1)</script><img src=http://evil.test/a.png>\"' $\\frac {{ 7 * 7 }}"
Build = Callable[..., dict[str, Any]]


class _Page(HTMLParser):
    """The tags, attributes and visible text that a browser would see."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.text = ""
        self.feed(text)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.text += data

    def cards(self) -> list[str]:
        return re.findall(r"([abcd]#0) · direction", self.text)


def _frames_for(_clip: str, frames: list[int]) -> np.ndarray:
    return np.full((len(frames), 16, 32, 3), 90, np.uint8)


def _mask_for(_clip: str, _object_id: str, frame: int) -> np.ndarray | None:
    return np.arange(32) < np.full((16, 1), 8) if frame % 2 == 0 else None


def _write(folder: Path, arms: dict[str, list[dict[str, Any]]], ids: list[str], **options: Any) -> str:
    """Text of the report over `arms`, without training logs and quarantine unless a test wrote them."""
    files, scores = {}, {}
    for number, (name, lines) in enumerate(arms.items()):
        paths = [folder / f"{number}.{part}.jsonl" for part in ("predictions", "metrics", "quarantine")]
        paths[0].write_text("".join(json.dumps(line) + "\n" for line in lines))
        files[name] = ArmFiles(*paths)
        scores[name] = score(make_file(paths[0], ids), Settings(resamples=100)) | {"seconds": 10.0 + number}
    results = write_results(
        folder / "results.json", scores, SCORED, protocol=PROTOCOL, provenance={HOSTILE: {"a": [1, HOSTILE]}}
    )
    options = {"title": "Demo", "frames_for": _frames_for, "mask_for": _mask_for, "results": results} | options
    write_report(folder / "report.html", arms=files, **options)
    return (folder / "report.html").read_text(encoding="utf-8")


def test_data_cannot_inject_markup_or_requests(tmp_path: Path, line: Build, noun: Build) -> None:
    hostile_key = '<script>alert("key")</script>'
    bad = line(f"{hostile_key}#0", [noun("o0", 0, 0)], answer=HOSTILE, task=HOSTILE)
    bad |= {"prompt": HOSTILE, "target": HOSTILE}
    bad["nouns"][0] |= {"text": HOSTILE[:8], "start": 0, "end": 8}
    lines = [bad, {"id": "b#0", "clip": "b", "error": HOSTILE}, line("c#0", [noun("o1", 1, 3)])]
    (tmp_path / "0.quarantine.jsonl").write_text(json.dumps({"id": hostile_key, "reason": HOSTILE, HOSTILE: 1}) + "\n")
    (tmp_path / "0.metrics.jsonl").write_text('{"step": 1, "loss/text": 2.5}\n{"step": 2, "loss/text": 2.0}\n')

    text = _write(tmp_path, {HOSTILE: lines, "b": lines}, [line["id"] for line in lines], title=HOSTILE)
    page = _Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    assert not any(name.startswith("on") for name, _ in page.attributes)
    links = [value or "" for name, value in page.attributes if name in ("src", "href", "srcset", "action")]
    assert links
    assert all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"url\(|@import", text)
    assert ("content", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in page.attributes
    # Escaped, not dropped: title, answer, target, failure, quarantine and provenance can all be read.
    assert page.text.count(HOSTILE) >= 10
    assert hostile_key in page.text


def test_the_page_of_a_benchmark_escapes_its_data(tmp_path: Path) -> None:
    ids = ["a#0", "b#0"]
    question = {
        "id": "a#0",
        "clip": "a",
        "task": HOSTILE,
        "prompt": HOSTILE,
        "target": "(A)",
        "answer": HOSTILE,
        "nouns": [],
    }
    lines = [question, {"id": "b#0", "clip": "b", "error": HOSTILE}]
    score_files([make_file(lines, ids, benchmark="videorefer-bench-q", name=HOSTILE)], tmp_path)
    page = _Page(report(tmp_path).read_text(encoding="utf-8"))
    assert not {"script", "link", "iframe", "object", "base", "img"} & set(page.tags)
    assert not any(name.startswith("on") or name in ("src", "href") for name, _ in page.attributes)
    assert page.text.count(HOSTILE) >= 4


def test_page_states_the_numbers_the_failures_and_the_examples(tmp_path: Path, line: Build, noun: Build) -> None:
    ids = ["a#0", "b#0", "c#0", "d#0"]
    base = [line(id, [noun("o0", 0, 3)], answer="right") for id in ids]
    base[1] = {"id": "b#0", "clip": "b", "error": "decoder: truncated"}
    other = [line(id, [noun("o0", 0, 0)]) for id in ids[:3]]
    page = _Page(_write(tmp_path, {"sft": base, "supervised": other}, ids, num_examples=2))
    assert "in 75.0 % of the annotated steps, in sft in 0.0 % (+75.0 points, 95 % interval" in page.text
    assert "75.0 % of its answers are right, against 0.0 % (+75.0 points" in page.text
    assert "1 of 4 ids have no usable prediction in sft and count as worst." in page.text
    assert page.text.count("decoder: truncated") == 3  # example of clip b, worst noun of clip b, list of failures
    assert "d#0no prediction" in page.text
    # The first two clips although the baseline failed on the second; then the worst nouns, which tie, by id.
    assert page.cards() == ["a#0", "b#0", "a#0", "b#0", "c#0"]
    assert page.tags.count("img") == 5
    assert page.tags.count("mark") == 5
    assert "no sample was quarantined" in page.text
    assert "No training log was found" in page.text


def test_an_accuracy_difference_that_may_be_zero_is_said_to_show_nothing(
    tmp_path: Path, line: Build, noun: Build
) -> None:
    ids = ["a#0", "b#0", "c#0"]
    arms = {
        name: [line(id, [noun("o0", 0, 0)], answer="left" if at == right else "up") for at, id in enumerate(ids)]
        for name, right in (("sft", 0), ("supervised", 1))
    }
    assert (
        "the interval includes zero, so no difference in accuracy is shown" in _Page(_write(tmp_path, arms, ids)).text
    )


def test_single_arm_of_any_name(tmp_path: Path, line: Build, noun: Build) -> None:
    page = _Page(_write(tmp_path, {"lora r8": [line("a#0", [noun("o0", 0, 0)])]}, ["a#0"]))
    assert "In lora r8, the maximum" in page.text
    assert "in 100.0 % of the annotated steps. A map that knows nothing reaches 25.0 %." in page.text
    assert "difference" not in page.text


@pytest.mark.parametrize(
    ("frames_for", "reason"),
    [
        (lambda _clip, _frames: (_ for _ in ()).throw(OSError("moov atom not found")), "OSError: moov atom not found"),
        (lambda _clip, frames: np.zeros((len(frames), 4, 4), np.uint8), "frames must be uint8 [2, H, W, 3], not uint8"),
    ],
)
def test_unreadable_frames_and_unannotated_nouns_do_not_stop_the_report(
    tmp_path: Path, line: Build, noun: Build, frames_for: Callable[..., np.ndarray], reason: str
) -> None:
    lines = [line("a#0", [noun("o0", 0, 0) | {"coverage": [None, None]}])]
    page = _Page(_write(tmp_path, {"arm": lines}, ["a#0"], frames_for=frames_for))
    assert "No annotated noun could be scored" in page.text
    assert reason in page.text


def test_wrong_inputs_are_named(tmp_path: Path, line: Build, noun: Build) -> None:
    lines = [line("a#0", [noun("o0", 0, 0)])]
    with pytest.raises(ValueError, match=r"results lack \['arm'\]"):
        _write(tmp_path, {"arm": lines}, ["a#0"], results={"other": {}})
    (tmp_path / "0.metrics.jsonl").write_text('{"step": 1}\n{"step": ')
    with pytest.raises(ValueError, match=r"0\.metrics\.jsonl:2: not a JSON line"):
        _write(tmp_path, {"arm": lines}, ["a#0"])
    (tmp_path / "list").write_text("[1]\n")
    with pytest.raises(ValueError, match="list:1: a JSON object is expected"):
        read_jsonl(tmp_path / "list")


def test_worst_nouns_come_from_the_last_arm(tmp_path: Path, line: Build, noun: Build) -> None:
    ids = ["a#0", "b#0", "c#0", "d#0"]
    base = [line(id, [noun("o0", 0, look)]) for id, look in zip(ids, (3, 0, 0, 0))]
    other = [line(id, [noun("o0", 0, look)]) for id, look in zip(ids, (0, 3, 0, 3))]
    assert _Page(_write(tmp_path, {"x": base, "y": other}, ids, num_examples=0)).cards() == ["b#0", "d#0", "a#0"]


def test_every_metric_has_a_definition() -> None:
    assert set(DEFINITIONS) == {"accuracy", *METRICS}


def _cells(maps: dict[str, np.ndarray], arm: int, mask: np.ndarray | None = None) -> np.ndarray:
    """Colours [2, 2, 9, 3] at nine points of each cell of the 2 x 2 map of one arm, drawn over one grey frame."""
    options: dict[str, Any] = {"masks": [mask], "titles": ["$\\frac"], "uniform": 0.25}
    frames = np.full((1, 16, 16, 3), 128, np.uint8)
    pixels = imread(io.BytesIO(strip_png(frames, maps, **options)))
    box = strip_figure(frames, maps, **options).axes[1 + arm].get_position()
    inside = np.array([[0.1, 0.25, 0.4], [0.6, 0.75, 0.9]])
    y = ((1 - box.y1 + inside * box.height) * pixels.shape[0]).astype(int)
    x = ((box.x0 + inside * box.width) * pixels.shape[1]).astype(int)
    return pixels[y[:, None, :, None], x[None, :, None, :], :3].reshape(2, 2, 9, 3)


def test_strip_draws_each_cell_as_one_flat_square() -> None:
    colours = _cells({"a": np.array([[[0.1, 0.2], [0.3, 0.4]]])}, 0)
    assert (colours == colours[:, :, :1]).all()
    assert (np.diff((colours[:, :, 0] @ [0.3, 0.6, 0.1]).ravel()) > 0.02).all()  # brighter means more


def test_strip_has_one_colour_scale_for_all_arms() -> None:
    weak, strong = np.full((1, 2, 2), 0.25), np.full((1, 2, 2), 0.9)
    beside_weak = _cells({"a": weak, "b": weak}, 0)
    maps = {"a": weak, "b": strong}
    assert (_cells(maps, 0) < beside_weak - 0.1).any()
    np.testing.assert_array_equal(_cells(maps, 1), beside_weak)  # both are the maximum of their scale


def test_no_attention_leaves_the_frame_as_it_is() -> None:
    colours = _cells({"a": np.array([[[0.0, 0.0], [0.0, 1.0]]])}, 0)
    assert np.ptp(colours[0, 0, 0]) == 0  # grey
    assert np.ptp(colours[1, 1, 0]) > 0.3


def test_maps_without_attention_and_an_arm_called_video_are_drawn() -> None:
    frames = np.zeros((1, 8, 8, 3), np.uint8)
    options: dict[str, Any] = {"masks": [None], "titles": ["frame 0"]}
    dark = strip_png(frames, {"video": np.zeros((1, 2, 2))}, uniform=0.0, **options)
    assert dark != strip_png(frames, {"video": np.ones((1, 2, 2))}, uniform=1.0, **options)


def test_a_map_of_nan_is_hatched_and_notes_are_drawn() -> None:
    frames = np.full((1, 8, 8, 3), 128, np.uint8)
    options: dict[str, Any] = {"masks": [None], "titles": ["frame 0"], "highest": 1.0}
    nothing, unknown = ({"coverage": np.full((1, 2, 2), value)} for value in (0.0, np.nan))
    assert [len(strip_figure(frames, maps, **options).axes[1].patches) for maps in (nothing, unknown)] == [0, 1]
    assert strip_png(frames, nothing, **options) != strip_png(frames, unknown, **options)
    noted = strip_figure(frames, nothing, **options, notes={"coverage": ["$absent"]})
    assert [[text.get_text() for text in axes.texts][1:] for axes in noted.axes[:2]] == [[], ["$absent"]]
    assert len(strip_figure(frames, {}, **options).axes) == 1  # nothing to scale


def test_strip_draws_the_mask_at_its_own_size() -> None:
    mask = np.zeros((32, 32), bool)
    mask[:, 13:] = True  # its left border runs at 0.4 of the width and the rest touches the edge of the frame
    maps = {"a": np.full((1, 2, 2), 0.25)}
    changed = (_cells(maps, 0, mask) != _cells(maps, 0)).any(axis=(0, 2, 3))
    assert changed.tolist() == [True, False]


def test_curves_leave_out_what_was_not_logged() -> None:
    assert curves_png({"a": [], "b": [{"step": 0, "unknown": 1.0}]}) is None
    text = [{"step": step, "loss/text": 1.0} for step in range(3)]
    gradients = [row | {"mask_grad/q1": 0.1, "mask_grad/q10": 0.2, "mask_grad/k1": 0.1} for row in text]
    heights = [imread(io.BytesIO(curves_png({"a": text, "b": rows}) or b"")).shape[0] for rows in (text, gradients)]
    assert heights[1] == pytest.approx(2 * heights[0], abs=2)


def test_curves_show_the_probe_and_sources_if_there_are_several() -> None:
    text = [{"step": step, "loss/text": 1.0} for step in range(3)]
    of_one = [row | {"loss/text/web": 1.0, "count/text/web": 5.0} for row in text]
    of_two = [row | {"loss/text/a": 2.0, "count/text/a": 9.0} for row in of_one]
    probed = [row | {"probe/pointing": 0.5, "probe/mass": 0.2} for row in of_two]
    titles = [[title for title, lines in _panels({"a": rows}) if any(line.points.size for line in lines)]
              for rows in (of_one, of_two, probed)]  # fmt: skip
    assert titles[0] == ["text loss"]
    assert titles[1] == ["text loss", "text loss by source, a"]
    assert set(titles[2]) - set(titles[1]) == {"pointing on the probe set", "attention mass on the probe set"}
    (lines,) = (lines for title, lines in _panels({"a": of_two}) if "source" in title)
    assert [line.name for line in lines] == ["a", "web"], "the largest first"
    many = [row | {f"{kind}/text/s{n}": 1.0 for n in range(9) for kind in ("loss", "count")} for row in text]
    assert any(title.endswith("the 8 largest of 9") for title, _ in _panels({"a": many}))


def test_smoothing_keeps_a_constant_and_the_length() -> None:
    assert smooth(np.full(200, 3.0)) == pytest.approx(np.full(200, 3.0))
    assert smooth(np.array([1.0, 5.0])).tolist() == [1.0, 5.0]
    assert smooth(np.eye(1, 200, 100)[0]).sum() == pytest.approx(1)
