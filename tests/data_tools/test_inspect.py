"""Promise: the page of `swim data inspect` shows what training will see, whatever the data holds."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import tiny_config
from typer.testing import CliRunner, Result

from swim.data_tools.records import Conversation, Masks, Mention, Turn
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.video import choose_frames
from swim.train.cli import app
from swim.train.systems.swim import inspect
from swim.train.systems.swim.model import SwimSystem
from swim.train.systems.swim.targets import step_coverages

HOSTILE = """"><script>alert('x')</script>{{ 7*7 }}"""
PNG = b"\x89PNG\r\n\x1a\n" + bytes(40)


def _inspect(folder: Path, page: Path, *args: str) -> Result:
    return CliRunner().invoke(app, ["data", "inspect", str(folder), "--recipe", "tiny_cpu", "--out", str(page), *args])


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What would be drawn, instead of pictures."""
    calls: list[dict[str, Any]] = []

    def strip_png(frames: np.ndarray, maps: dict[str, np.ndarray], **options: Any) -> bytes:
        calls.append({"frames": frames, "maps": maps, **options})
        return PNG

    monkeypatch.setattr(inspect, "strip_png", strip_png)
    return calls


def test_the_coverage_shown_is_the_one_that_training_takes(
    synth_folder: Path, tmp_path: Path, drawn: list[dict[str, Any]]
) -> None:
    sample = ShardSet(synth_folder).read(0)
    first, second, third = (thing.id for thing in sample.record.objects)
    frames = sample.masks[first]
    masks: Masks = {
        first: {0: frames[0], 2: frames[2], 7: frames[7]},  # half of step 0 and of step 1
        second: {5: sample.masks[second][5], 7: None},  # nothing in step 0
        third: dict.fromkeys(range(8)),  # looked for, never there
    }
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("a", sample.record, masks, {"mp4": sample.media()})
    for sampling in ("uniform", "annotated"):
        drawn.clear()
        system = SwimSystem(tiny_config(tmp_path / "s", f"data.frame_sampling={sampling}"))
        entry = inspect.inspect_clip(ShardSet(tmp_path / "s"), "a", system)
        annotated = sorted({frame for of_object in masks.values() for frame in of_object})
        chosen = choose_frames(8, 4, annotated if sampling == "annotated" else None)
        assert [len(target.coverages) for target in entry.targets] == [2, 2, 2]
        assert len(drawn) == 3
        for name, strip in zip((first, second, third), drawn):
            (steps,) = step_coverages([[name]], masks, [chosen[:2], chosen[2:]], (6, 6))
            shown = [np.full((6, 6), np.nan) if steps[i // 2] is None else steps[i // 2] for i in range(4)]
            np.testing.assert_array_equal(strip["maps"]["coverage"], shown)
            assert strip["titles"] == [f"step {i // 2} · frame {frame}" for i, frame in enumerate(chosen)]
            states = ["not annotated" if s is None else "" if s.any() else "absent" for s in steps for _ in (0, 1)]
            assert strip["notes"]["coverage"] == states
            of_frames = [masks[name].get(frame, "not annotated") for frame in chosen]
            expected = ["absent" if s is None else s if isinstance(s, str) else "" for s in of_frames]
            assert strip["notes"]["video"] == expected
            assert [mask is not None and mask.any() for mask in strip["masks"]] == [not note for note in expected]
    assert {note for strip in drawn for note in strip["notes"]["coverage"]} == {"", "absent", "not annotated"}


def test_a_page_says_what_a_clip_becomes(synth_folder: Path, tmp_path: Path) -> None:
    result = _inspect(synth_folder, tmp_path / "page.html", "data.tasks=[colour]", "--limit", "1")
    assert (result.exit_code, result.stdout) == (
        0,
        f"1 clips shown, 0 left out (the page says why): {tmp_path / 'page.html'}\n",
    )
    page = (tmp_path / "page.html").read_text()
    record = ShardSet(synth_folder).read(0).record
    heads = [
        turn.text[slice(*mention.head)]
        for conversation in record.conversations
        if conversation.task == "colour"
        for turn in conversation.turns
        for mention in turn.mentions
    ]
    assert re.findall(r'<mark class="row"[^>]*>(.*?)</mark>', page) == heads
    assert len(set(re.findall(r'<mark class="row" style="(--hue: #[0-9a-f]{6})"', page))) == len(set(heads)) > 1
    for said in ("<b>72 visual tokens</b>", "grid 2×6×6", "CC0-1.0", "8 frames of 112×112 at 8/s", "synth_5_000000#1"):
        assert said in page
    others = sum(conversation.task != "colour" for conversation in record.conversations)
    assert f"{others} conversations are left out by data.tasks" in page
    pictures = re.findall(r'<img [^>]*alt="([^"]*)"[^>]*src="data:image/png;base64,', page)
    assert len(pictures) == page.count("<img") == len(set(heads))
    assert all("sampled frames" in alt and "step 1: " in alt for alt in pictures)
    assert "http://" not in page
    assert "https://" not in page
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]


def test_bad_samples_are_lines_of_the_page(synth_folder: Path, tmp_path: Path, drawn: list[dict[str, Any]]) -> None:
    copied = Path(shutil.copytree(synth_folder, tmp_path / "copy"))
    entries = ShardSet(copied).entries
    path = copied / entries[0].shard
    data = bytearray(path.read_bytes())
    data[entries[1].members["mp4"][0] + 50] ^= 1
    data[entries[2].members["json"][0] + 3] ^= 1
    path.write_bytes(data)
    result = _inspect(copied, tmp_path / "page.html", "--limit", "4")
    assert result.exit_code == 1, result.output
    page = (tmp_path / "page.html").read_text()
    assert re.findall("<h2>(.*)</h2>", page) == [f"synth_5_00000{i}" for i in range(4)]
    wrong = re.findall('<p class="wrong">(.*)</p>', page)
    assert {re.split("[#,]", line)[0] for line in wrong} == {"synth_5_000001", "synth_5_000002"}
    assert all("CRC32" in line for line in wrong)
    assert f"2 clips shown, {len(wrong)} left out" in result.stdout
    assert drawn


def test_text_from_data_is_escaped(synth_folder: Path, tmp_path: Path) -> None:
    sample = ShardSet(synth_folder).read(0)
    name = sample.record.objects[0].id
    things = [
        thing.model_copy(update={"label": HOSTILE, "id": HOSTILE if thing.id == name else thing.id})
        for thing in sample.record.objects
    ]
    mention = Mention(start=0, end=len(HOSTILE), head=(0, len(HOSTILE)), object_ids=[HOSTILE])
    blind = Mention(start=0, end=4, head=(0, 4), object_ids=[HOSTILE])
    turns = [
        Turn(role="system", text="find it", mentions=[blind]),
        Turn(role="user", text=HOSTILE, mentions=[mention]),
        Turn(role="assistant", text=HOSTILE),
    ]
    update = {
        "objects": things,
        "source": HOSTILE,
        "license": HOSTILE,
        "conversations": [Conversation(task=HOSTILE, turns=turns)],
    }
    masks = {HOSTILE if key == name else key: frames for key, frames in sample.masks.items()}
    with ShardWriter(tmp_path / "s") as writer:
        writer.write("a", sample.record.model_copy(update=update), masks, {"mp4": sample.media()})
    result = _inspect(tmp_path / "s", tmp_path / "page.html", "data.tasks=null")
    assert result.exit_code == 0, result.output
    page = (tmp_path / "page.html").read_text()
    assert "<script" not in page
    assert page.count("&lt;script") > 8
    assert "{{ 7*7 }}" in page
    assert "stands before the clip and sees none of it" in page


@pytest.mark.parametrize("argument", ["nope", "data.num_frame=3"])
def test_an_unknown_key_is_one_message(synth_folder: Path, tmp_path: Path, argument: str) -> None:
    result = _inspect(synth_folder, tmp_path / "page.html", argument)
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert ("no sample 'nope' among 6" if argument == "nope" else "did you mean 'num_frames'?") in result.stderr
    assert not (tmp_path / "page.html").exists()
