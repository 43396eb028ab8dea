"""Each source turns its documented file form into checked samples; the fixtures are of our making."""

import json
import random
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from footage import footage_dir
from pycocotools import mask as coco

from swim.data_tools.cli import SOURCES
from swim.data_tools.convert import SKIPPED_FILE, Summary, convert
from swim.data_tools.rle import decode_counts, decode_mask
from swim.data_tools.shards import Sample, ShardSet
from swim.data_tools.video import encode_video

FIXTURES = Path(__file__).parent / "fixtures"
LEFT, RIGHT = np.zeros((2, 32, 48), bool)
LEFT[4:20, 2:10], RIGHT[8:28, 30:40] = True, True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fixtures with the video they are about: 2 s at 24 frames/s."""
    folder = tmp_path_factory.mktemp("sources")
    shutil.copytree(FIXTURES, folder, dirs_exist_ok=True)
    (folder / "clip.mp4").write_bytes(encode_video(np.full((48, 32, 48, 3), 90, np.uint8), 24))
    shutil.copy(folder / "clip.mp4", folder / "sav_000009.mp4")
    return folder


def _convert(source: str, folder: Path, out: Path, *names: str) -> tuple[Summary, list[Sample], dict[str, str]]:
    inputs = [folder / name for name in names]
    summary = convert(SOURCES[source], inputs, out)
    lines = [json.loads(line) for line in (out / SKIPPED_FILE).read_text().splitlines()]
    shards = ShardSet(out)
    return summary, [shards.read(i) for i in range(len(shards))], {str(line["index"]): line["reason"] for line in lines}


def _said(sample: Sample) -> list[tuple[str, list[str]]]:
    return [(c.task, [turn.text for turn in c.turns]) for c in sample.record.conversations]


def _mentions(sample: Sample) -> list[tuple[str, str, str, list[str]]]:
    return [
        (mention.kind, turn.text[mention.start : mention.end], turn.text[slice(*mention.head)], mention.object_ids)
        for conversation in sample.record.conversations
        for turn in conversation.turns
        for mention in turn.mentions
    ]


def test_nl_refer_bench(folder: Path, tmp_path: Path) -> None:
    _, (sample,), _ = _convert("nl-refer", folder, tmp_path, "nl_refer_bench.json")
    question = "What is the cup doing?\n(A) standing\n(B) flying"
    assert _said(sample) == [("multiple_choice: Basic Questions", [question, "(A) standing"])]
    assert _mentions(sample) == [("noun", "cup", "cup", ["0"])]
    assert sample.record.license == "CC-BY-NC-4.0"


def test_videorefer(folder: Path, tmp_path: Path) -> None:
    names = ("videorefer-detailed-caption.json", "videorefer-short-caption.json", "videorefer-qa.json")
    summary, (sample,), _ = _convert("videorefer", folder, tmp_path, *names)
    assert (summary.kept, summary.skipped) == (3, 3)
    assert _said(sample) == [
        ("detailed_caption", ["Describe object 1 in detail.", "A cup stands on the left."]),
        ("short_caption", ["What is object 3 ?", "A ball."]),
        (
            "qa",
            [
                "Is object 1 left of object 2 ?",
                "Yes, object 1 is left of object 2.",
                "And now ?",
                "object 2 moved.",
            ],
        ),
    ]
    (left,) = (name for name, frames in sample.masks.items() if 24 in frames)
    np.testing.assert_array_equal(decode_mask(sample.masks[left][0]), LEFT)
    assert sorted(sample.masks[left]) == [0, 24], "a null frame and one without segmentation are not annotated"
    assert sample.masks[left][24] is None, "a null segmentation is annotated as absent"
    assert len(sample.record.objects) == 4, "masks of one object in different frames are not taken for one"
    qa = [mention[-1] for mention in _mentions(sample)[2:]]
    assert qa == [qa[0], qa[1], qa[0], qa[1], qa[1]]
    assert qa[0] != qa[1]
    assert set(_mentions(sample)[0][:3]) == {"phrase", "object 1", "object"}
    assert sample.record.license == "Apache-2.0"
    for reason in (
        "annotation: 2 regions in the text but 1 objects; give one for each",
        "masks[0][0]: polygon coordinate 2000.0 is outside 0 to 32; give pixels",
        "masks[0][0]: a polygon of 4 numbers is not x0, y0, x1, y1, x2, y2, ...",
    ):
        assert any(reason in line for line in _reasons(tmp_path)), reason


def _reasons(out: Path) -> list[str]:
    return [json.loads(line)["reason"] for line in (out / SKIPPED_FILE).read_text().splitlines()]


def test_sav(folder: Path, tmp_path: Path) -> None:
    summary, (sample,), _ = _convert("sav", folder, tmp_path, ".")
    assert summary == Summary(clips=1, kept=2, skipped=0)
    assert sorted(sample.masks) == ["auto_0", "manual_0", "manual_1"]
    assert sorted(sample.masks["auto_0"]) == list(range(0, 48, 4)), "6 of 24 frames a second"
    assert sorted(sample.masks["manual_1"]) == [4 * k for k in range(12) if k % 3], "null is not annotated"
    empty = sample.masks["manual_1"][4]
    assert empty is not None
    assert decode_mask(empty).sum() == 0, "an empty mask is annotated as absent"
    np.testing.assert_array_equal(decode_mask(sample.masks["manual_0"][44]), LEFT)
    assert (sample.record.conversations, sample.record.license) == ([], "CC-BY-4.0")


def test_real_sav_masklets_keep_their_areas(tmp_path: Path) -> None:
    real = footage_dir()
    frames = np.zeros((483, 848, 480, 3), np.uint8)
    (tmp_path / "sav_000001.mp4").write_bytes(encode_video(frames, 24))
    del frames
    for kind in ("manual", "auto"):
        shutil.copy(real / f"sav_000001_{kind}.json", tmp_path)
    summary = convert(SOURCES["sav"], [tmp_path], tmp_path / "out")
    assert summary == Summary(clips=1, kept=2, skipped=0)
    sample = ShardSet(tmp_path / "out").read(0)
    num_masks, num_empty = 0, 0
    for kind in ("manual", "auto"):
        masklet = json.loads((real / f"sav_000001_{kind}.json").read_text())["masklet"]
        assert len(masklet) == 121
        for k, listed in enumerate(masklet):
            for i, rle in enumerate(listed):
                area = int(coco.area(rle))
                stored = sample.masks[f"{kind}_{i}"][4 * k]
                assert stored is not None
                assert int(decode_counts(stored.counts)[1::2].sum()) == area
                num_masks, num_empty = num_masks + 1, num_empty + (area == 0)
    assert (num_masks, num_empty) == (121 * 14, 262)
    assert max(sample.masks["manual_0"]) == 480


def test_llava_video(folder: Path, tmp_path: Path) -> None:
    _, (sample,), skipped = _convert("llava-video", folder, tmp_path, "llava_video.json")
    assert _said(sample) == [("0_30_s_academic_v0_1", ["What happens?", "A cup stands.", "Where?", "Left."])]
    assert skipped == {"b": "record 'b', image: 'clip.jpg': only videos and text can be converted; leave it out"}
    assert sample.record.license == "unknown"


def test_conversations(folder: Path, tmp_path: Path) -> None:
    names = ("conversations.json", "conversations.jsonl")
    summary, samples, skipped = _convert("conversations", folder, tmp_path, *names)
    assert (summary.clips, summary.kept, summary.skipped) == (2, 4, 4)
    clip, text = samples
    assert [said for _, said in _said(clip)] == [
        ["Be brief.", "What?", "A cup."],
        ["How many?", "One."],
        ["Which colour?", "Grey."],
    ]
    assert [turn.role for turn in clip.record.conversations[0].turns] == ["system", "user", "assistant"]
    assert (text.record.media, text.key.startswith("text-")) == ([], True)
    for name, reason in {
        "two": r"videos: \['clip.mp4', 'clip.mp4'\] is not one file name",
        "tool": r"messages\[0\]: .*'tool'.* is not .*user \| assistant \| system",
        "image": r"images: .*only videos and text",
        "None": r"record 'record_5', record: it is not JSON; write one object per record",
    }.items():
        assert re.search(reason, skipped[name]), skipped[name]


def test_records_in_lines(folder: Path, tmp_path: Path) -> None:
    summary, samples, skipped = _convert("jsonl", folder, tmp_path, "records.jsonl")
    assert (summary.clips, summary.kept, summary.skipped) == (2, 3, 4)
    clip, text = samples
    assert clip.key.startswith("mine_1-")
    assert (clip.record.source, clip.record.license) == ("mine", "CC0-1.0 AND unknown"), "of both its records"
    assert _mentions(clip) == [("noun", "cup", "cup", ["cup"])]
    assert clip.record.objects[0].boxes == {0: (2, 4, 10, 20)}
    assert clip.record.conversations[0].span == (0, 23)
    np.testing.assert_array_equal(decode_mask(clip.masks["cup"][0]), LEFT)
    np.testing.assert_array_equal(decode_mask(clip.masks["cup"][24]), LEFT, "a polygon")
    assert clip.masks["cup"][40] is None
    assert text.record.media == []
    for name, reason in {
        "frames": r"media\[0\].num_frames: 50, but the video has 48; correct it or leave it out",
        "typo": r"mask: unknown field; there are conversations, key",
        "late": r"masks.cup\[48\]: frame 48 is outside the clip",
        "bomb": r"masks.cup\[0\]: size 100000x150000 is outside 1 to 16384 a side",
    }.items():
        assert re.search(reason, skipped[name]), skipped[name]


def test_boxes_and_spans_follow_the_stored_video(folder: Path, tmp_path: Path) -> None:
    convert(SOURCES["jsonl"], [folder / "records.jsonl"], tmp_path, canonical=16)
    (record,) = (sample.record for sample in map(ShardSet(tmp_path).read, range(2)) if sample.record.media)
    assert (record.media[0].height, record.media[0].width) == (16, 24)
    assert record.objects[0].boxes == {0: (1, 2, 5, 10)}
    assert record.conversations[0].span == (0, 23)


ROWS: dict[str, list[Any]] = {
    "nl-refer": json.loads((FIXTURES / "nl_refer_bench.json").read_text()),
    "videorefer": json.loads((FIXTURES / "videorefer-qa.json").read_text())[:1],
    "sav": [json.loads((FIXTURES / "sav_000009_manual.json").read_text())],
    "llava-video": json.loads((FIXTURES / "llava_video.json").read_text()),
    "conversations": [json.loads(line) for line in (FIXTURES / "conversations.jsonl").read_text().splitlines()[:3]],
    "jsonl": [json.loads(line) for line in (FIXTURES / "records.jsonl").read_text().splitlines()],
}
JUNK: list[Any] = [
    *(None, True, -1, 0, 1e308, float("nan"), 2**70, "", "x", "\ud800", "<ins>", "<object0>", [], {}, [[]], [{}]),
    *({"a": None}, {"counts": [1]}, {"counts": ["a"], "size": [1, 2, 3]}, {"counts": [5], "size": [10**6, 10**6]}),
    *([["a"] * 6], [[1e300] * 8], [[[1]]], {"0": {"segmentation": [[0] * 6]}}),
]


def _damaged(value: Any, draw: random.Random) -> Any:
    """The value with one part of it, anywhere inside, replaced by junk or taken away."""
    if isinstance(value, (dict, list)) and value and draw.random() < 0.85:
        copy: Any = value.copy()
        key = draw.choice(list(value) if isinstance(value, dict) else range(len(value)))
        if draw.random() < 0.8:
            copy[key] = _damaged(value[key], draw)
        else:
            del copy[key]
        return copy
    return draw.choice(JUNK)


@pytest.mark.parametrize("name", SOURCES)
def test_damaged_rows_cost_themselves_alone(name: str, folder: Path, tmp_path: Path) -> None:
    draw = random.Random(0)
    rows = [_damaged(draw.choice(ROWS[name]), draw) for _ in range(300)]
    for video in folder.glob("*.mp4"):
        shutil.copy(video, tmp_path)
    if name == "sav":
        inputs = [tmp_path / f"sav_{i}_manual.json" for i in range(len(rows))]
        for path, row in zip(inputs, rows):
            path.write_text(json.dumps(row))
    else:
        inputs = [tmp_path / "rows.jsonl"]
        inputs[0].write_text("".join(json.dumps(row) + "\n" for row in [*ROWS[name][:1], *rows]))
    summary = convert(SOURCES[name], inputs, tmp_path / "out")
    assert summary.kept + summary.skipped == len(rows) + (name != "sav")
    assert min(summary.kept, summary.skipped) > 10, summary
    shards = ShardSet(tmp_path / "out")
    stored = sum(len(shards.read(i).record.conversations) for i in range(len(shards)))
    assert stored == {"sav": 0, "jsonl": stored}.get(name, summary.kept), "one for each, but where rows are samples"
    assert all(line.startswith("record ") for line in _reasons(tmp_path / "out"))


def test_every_source_says_what_it_reads_and_what_it_decides() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text()
    for name, source in SOURCES.items():
        text = " ".join(__import__(source.part.__module__, fromlist=["SOURCE"]).__doc__.split())
        assert f"swim data convert {name} " in text
        assert "Licence: " in text, name
        assert "Null: " in text or "Decided here: " in text, name
        assert "seen" in text or name == "jsonl", name
        assert f"| `{name}` |" in page, f"{name} is not in the table of docs/data.md"
