"""A conversion gives the same bytes whoever makes which shard and wherever it stops, and accounts for every row."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from processes import ROOT, environment
from typer.testing import CliRunner

from swim.data_tools import convert as engine
from swim.data_tools.cli import app
from swim.data_tools.convert import DONE_FOLDER, SKIPPED_FILE, Summary, convert
from swim.data_tools.records import Record, Rle
from swim.data_tools.rle import decode_mask, encode_mask
from swim.data_tools.shards import ShardError, ShardSet
from swim.data_tools.sources.nl_refer import SOURCE
from swim.data_tools.video import VideoInfo, encode_video

MASK = np.zeros((32, 48), bool)
MASK[4:20, 2:10] = True
NUM_CLIPS = 12


def _row(video: str, number: int, **changes: Any) -> dict[str, Any]:
    rle = encode_mask(MASK)
    turns = [{"from": "human", "value": f"where is the <ins>cup</ins> {number} ?"}, {"from": "gpt", "value": "here ."}]
    annotation = [{"0": {"segmentation": rle}, "5": {"segmentation": None}}]
    return {"index": f"qa_{number}", "video": video, "conversations": turns, "annotation": annotation} | changes


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve videos, three rows about each, not in order, some of them bad."""
    folder = tmp_path_factory.mktemp("clips")
    rng = np.random.default_rng(0)
    (folder / "videos").mkdir()
    for number in range(NUM_CLIPS):
        video = encode_video(rng.integers(0, 255, (6, 32, 48, 3), np.uint8), 6)
        (folder / "videos" / f"v{number}.mp4").write_bytes(video)
    rows = [_row(f"v{(7 * i) % NUM_CLIPS}.mp4", i) for i in range(3 * NUM_CLIPS)]
    rows[::10] = [row | {"conversations": []} for row in rows[::10]]
    rows += [_row("missing.mp4", 100), _row("../../etc/hostname", 101)]
    (folder / "a.json").write_text(json.dumps(rows[:20]))
    (folder / "b.json").write_text(json.dumps(rows[20:]))
    return folder


def _convert(clips: Path, out: Path, **options: Any) -> Summary:
    # Three clips of about 20 KB in a shard.
    return convert(
        SOURCE,
        [clips / "a.json", clips / "b.json"],
        out,
        **{"video_root": clips / "videos", "max_bytes": 70_000} | options,
    )


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_of_a_video_meet_from_several_files(clips: Path, tmp_path: Path) -> None:
    summary = _convert(clips, tmp_path / "out")
    assert (summary.clips, summary.kept, summary.skipped) == (NUM_CLIPS, 32, 6)
    shards = ShardSet(tmp_path / "out")
    assert [entry.key.rpartition("-")[0] for entry in shards.entries] == [f"v{7 * i % 12}" for i in range(NUM_CLIPS)]
    assert len({entry.shard for entry in shards.entries}) == 3
    assert all(path.stat().st_size < 80_000 for path in (tmp_path / "out").glob("*.tar"))
    asked = Counter(turn.text for i in range(12) for c in shards.read(i).record.conversations for turn in c.turns[:1])
    assert asked == Counter(f"where is the cup {i} ?" for i in range(36) if i % 10)
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_every_row_left_out_is_listed_with_place_field_and_reason(clips: Path, tmp_path: Path) -> None:
    summary = _convert(clips, tmp_path / "out")
    lines = [json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()]
    places = {(line["file"], line["number"], line["index"]) for line in lines}
    assert places == {
        ("a.json", 0, "qa_0"),
        ("a.json", 10, "qa_10"),
        ("b.json", 0, "qa_20"),
        ("b.json", 10, "qa_30"),
        ("b.json", 16, "qa_100"),
        ("b.json", 17, "qa_101"),
    }
    assert {line["index"]: line["field"] for line in lines} == {
        "qa_0": "conversations[0].turns",
        "qa_10": "conversations[0].turns",
        "qa_20": "conversations[0].turns",
        "qa_30": "conversations[0].turns",
        "qa_100": "video",
        "qa_101": "video",
    }
    assert sorted(summary.reasons.values()) == [1, 1, 4], "records of one kind are counted together"
    assert summary.reasons.most_common(1)[0][0].startswith("conversations[N].turns: ")


def test_jobs_and_parts_do_not_change_a_byte(clips: Path, tmp_path: Path) -> None:
    alone = _convert(clips, tmp_path / "alone")
    assert _convert(clips, tmp_path / "many", jobs=3) == alone
    assert _bytes(tmp_path / "many") == _bytes(tmp_path / "alone")
    sums = [_convert(clips, tmp_path / "parts", part=(i, 3)) for i in (2, 0, 1)]
    assert _bytes(tmp_path / "parts") == _bytes(tmp_path / "alone")
    assert (sum(s.kept for s in sums), sum(s.skipped for s in sums)) == (alone.kept, alone.skipped)
    assert _convert(clips, tmp_path / "parts", part=(50, 99)) == Summary(0, 0, 0), "more parts than shards are fine"


def test_finished_shards_are_not_made_again(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _convert(clips, tmp_path)
    before = _bytes(tmp_path)
    monkeypatch.setattr(engine, "_make", lambda *_: pytest.fail("nothing is left to do"))
    assert _convert(clips, tmp_path) == first
    monkeypatch.undo()
    (tmp_path / "shard-000001.tar").unlink()
    made: list[int] = []
    make = engine._make
    monkeypatch.setattr(engine, "_make", lambda run, shard: made.append(shard.number) or make(run, shard))
    assert _convert(clips, tmp_path) == first
    assert made == [1], "only the one that is missing"
    assert _bytes(tmp_path) == before


def test_other_input_or_options_are_refused_unless_overwritten(clips: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    _convert(clips, out)
    before = _bytes(out)
    with pytest.raises(
        ShardError, match=r"license was None and is now 'MIT'\) already exists; write to an empty folder"
    ):
        _convert(clips, out, license="MIT")
    with pytest.raises(ShardError, match=r"max_bytes was 70000 and is now 140000"):
        _convert(clips, out, max_bytes=140_000)
    assert _bytes(out) == before
    _convert(clips, out, max_bytes=140_000, overwrite=True)
    _convert(clips, tmp_path / "fresh", max_bytes=140_000)
    assert _bytes(out) == _bytes(tmp_path / "fresh"), "nothing of the smaller shards stays"


def test_a_video_that_came_late_makes_its_shard_anew(clips: Path, tmp_path: Path) -> None:
    for name in ("v0.mp4", "v1.mp4"):
        (tmp_path / name).write_bytes((clips / "videos" / name).read_bytes())
    (tmp_path / "rows.json").write_text(json.dumps([_row("v0.mp4", 0), _row("late.mp4", 1), _row("v1.mp4", 2)]))
    inputs, out = [tmp_path / "rows.json"], tmp_path / "out"
    assert convert(SOURCE, inputs, out, max_bytes=30_000).skipped == 1
    (tmp_path / "late.mp4").write_bytes((clips / "videos" / "v2.mp4").read_bytes())
    with pytest.raises(ShardError, match=r"shard-\d+.tar, made from other records or videos, already exists"):
        convert(SOURCE, inputs, out, max_bytes=30_000)
    assert convert(SOURCE, inputs, out, max_bytes=30_000, overwrite=True) == Summary(3, 3, 0)
    assert len(ShardSet(out)) == 3


def test_two_runs_at_once_share_the_work(clips: Path, tmp_path: Path) -> None:
    env = environment(PYTHONPATH=str(ROOT))
    commands = [_command(clips, tmp_path / "out", "--canonical", "16") for _ in range(2)]
    runs = [
        subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for command in commands
    ]
    assert [run.wait(timeout=120) for run in runs] == [0, 0]
    assert len(ShardSet(tmp_path / "out")) == NUM_CLIPS
    assert not list((tmp_path / "out").rglob("*.partial"))


def test_a_folder_of_other_shards_is_left_alone(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "shard-000000.tar").write_bytes(b"mine")
    with pytest.raises(ShardError, match=r"not of a conversion, already exists; write to an empty folder"):
        _convert(clips, tmp_path, overwrite=True)
    assert _bytes(tmp_path) == {"shard-000000.tar": b"mine"}


def _command(clips: Path, out: Path, *flags: str) -> list[str]:
    code = f"from swim.data_tools import cli, convert; convert._CLIP_OVERHEAD = {1 << 18}; cli.app()"
    inputs = [str(clips / "a.json"), str(clips / "b.json")]
    options = ["--video-root", str(clips / "videos"), "--out", str(out), "--max-shard-size", "1", *flags]
    return [sys.executable, "-c", code, "convert", "nl-refer", *inputs, *options]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_killed_conversion_goes_on_to_the_same_bytes(clips: Path, tmp_path: Path, jobs: str) -> None:
    env = environment(PYTHONPATH=str(ROOT))
    # Three clips are a shard; the kill comes when one is written and the next is re-encoded.
    flags = ("--canonical", "16", "--jobs", jobs)
    subprocess.run(_command(clips, tmp_path / "whole", *flags), env=env, check=True, timeout=120)
    out = tmp_path / "killed"
    num_kills = 0
    for num_marks in (0, 1, 2):
        process = subprocess.Popen(_command(clips, out, *flags), env=env, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (
            len(list((out / DONE_FOLDER).glob("*.json"))) >= num_marks and list(out.glob(".shard-*.partial"))
        ):
            time.sleep(0.001)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)  # the parent alone: its workers must notice
            num_kills += process.wait() == -signal.SIGKILL
        for path in out.glob("*.tar"):
            assert path.with_suffix(".index.jsonl").is_file(), "what has the name of a shard is complete"
        if list(out.glob("*.tar")):
            ShardSet(out)
    assert num_kills >= 2
    subprocess.run(_command(clips, out, *flags), env=env, check=True, timeout=120)
    assert _bytes(out) == _bytes(tmp_path / "whole")


def test_workers_end_with_their_parent(clips: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        _command(clips, tmp_path / "out", "--jobs", "2"),
        env=environment(PYTHONPATH=str(ROOT)),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    while process.poll() is None and not list((tmp_path / "out" / DONE_FOLDER).glob("*.json")):
        time.sleep(0.001)
    process.kill()
    process.wait()
    deadline = time.monotonic() + 20
    while _alive(process.pid):
        assert time.monotonic() < deadline, "workers outlive their parent"
        time.sleep(0.1)


def _alive(leader: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, group = path.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(group) == leader and state != "Z":
            found.append(int(path.parent.name))
    return found


def test_a_worker_that_dies_is_named_and_finished_shards_stay(clips: Path, tmp_path: Path) -> None:
    dying = tmp_path / "dying_source.py"
    dying.write_text(
        "import dataclasses, os\n"
        "from swim.data_tools.sources.nl_refer import SOURCE\n"
        "def part(row, info):\n"
        "    if row.name == 'qa_8':\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return SOURCE.part(row, info)\n"
        "DYING = dataclasses.replace(SOURCE, part=part)\n"
        "if __name__ == '__main__':\n"
        "    import sys\n"
        "    from pathlib import Path\n"
        "    from dying_source import DYING\n"
        "    from swim.data_tools.convert import convert\n"
        "    clips, out = map(Path, sys.argv[1:])\n"
        "    convert(DYING, [clips / 'a.json'], out, video_root=clips / 'videos', max_bytes=30000, jobs=2)\n"
    )
    env = environment(PYTHONPATH=f"{ROOT}:{tmp_path}")
    done = subprocess.run(
        [sys.executable, str(dying), str(clips), str(tmp_path / "out")],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 1
    assert re.search(r"ShardError: a process died while it made one of shard-.*finished shards are kept", done.stderr)
    assert list((tmp_path / "out" / DONE_FOLDER).glob("*.json"))


def test_an_input_that_changes_meanwhile_is_noticed(
    clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "v0.mp4").write_bytes((clips / "videos" / "v0.mp4").read_bytes())
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([_row("v0.mp4", 1)]))
    prepare = engine._prepare

    def change(*args: Any) -> Any:
        path.write_text(json.dumps([_row("v0.mp4", 2)]))
        return prepare(*args)

    monkeypatch.setattr(engine, "_prepare", change)
    with pytest.raises(ShardError, match=r"rows.json: changed while it was converted; run again"):
        convert(SOURCE, [path], tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))


def test_canonical_video_keeps_masks_on_their_frames(clips: Path, tmp_path: Path) -> None:
    summary = _convert(clips, tmp_path, canonical=16)
    assert summary.kept == 32
    sample = ShardSet(tmp_path).read(0)
    (media,) = sample.record.media
    assert (media.height, media.width, media.num_frames, media.frame_map) == (16, 24, 6, [0, 1, 2, 3, 4, 5])
    (mask,) = {rle for frames in sample.masks.values() for rle in frames.values() if rle is not None}
    np.testing.assert_array_equal(decode_mask(mask), MASK, "masks keep their own size")
    assert CliRunner().invoke(app, ["validate", "--deep", str(tmp_path)]).exit_code == 0


def test_masks_boxes_and_spans_move_with_the_frames() -> None:
    stored = VideoInfo(16, 24, 5, 5)
    source = VideoInfo(32, 48, 4, 4)
    # Frame 1 of the source is shown by no stored frame, frame 0 by two, frame 3 by two.
    clip = engine._Clip(b"", "mp4", stored, source, [0, 0, 2, 3, 3])
    mask = Rle(**encode_mask(MASK))
    turns = [{"role": "user", "text": "a"}, {"role": "assistant", "text": "b"}]
    spans = [(0, 0), (1, 2), (2, 3), (1, 1)]
    record = Record.model_validate(
        {
            "source": "s",
            "license": "l",
            "media": [{"member": "mp4", "kind": "video", **vars(source)}],
            "objects": [{"id": "a", "label": "a", "boxes": {0: (2, 4, 10, 20), 1: (0, 0, 1, 1)}}],
            "conversations": [{"task": "t", "turns": turns, "span": span} for span in spans],
        }
    )
    moved, masks = engine._restate(record, {"a": {0: mask, 1: mask, 2: None, 3: mask}}, clip)
    assert masks == {"a": {0: mask, 1: mask, 2: None, 3: mask, 4: mask}}
    assert moved.objects[0].boxes == {0: (1, 2, 5, 10), 1: (1, 2, 5, 10)}
    assert [conversation.span for conversation in moved.conversations] == [(0, 1), (2, 2), (2, 4), (1, 2)]
    assert moved.media[0].frame_map == [0, 0, 2, 3, 3]
    assert (moved.media[0].height, moved.media[0].num_frames) == (16, 5)


def test_a_video_that_grows_goes_to_a_further_tar(clips: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _convert(clips, tmp_path / "one", max_bytes=1 << 20)
    grown = (clips / "videos" / "v0.mp4").read_bytes() + bytes(200_000)
    info = VideoInfo(32, 48, 6, 6)
    clip = engine._Clip(grown, "mp4", info, info, None)
    monkeypatch.setattr(engine, "_load", lambda *_: clip)
    # The video that was missing is there too.
    assert _convert(clips, tmp_path / "out", max_bytes=1 << 20).clips == whole.clips + 1
    names = sorted(path.name for path in (tmp_path / "out").glob("*.tar"))
    assert names == ["shard-000000.1.tar", "shard-000000.2.tar", "shard-000000.3.tar", "shard-000000.tar"]
    assert all((tmp_path / "out" / name).stat().st_size <= 1.1 * (1 << 20) for name in names)
    assert len(ShardSet(tmp_path / "out")) == whole.clips + 1
    mark = json.loads((tmp_path / "out" / DONE_FOLDER / "000000.json").read_text())
    assert sorted(mark["shards"]) == names


HOSTILE: dict[str, tuple[str, str]] = {
    "parent": ("../v0.mp4", "lies outside"),
    "absolute": ("/etc/hostname", "lies outside"),
    "device": ("/dev/zero", "lies outside"),
    "link out": ("out.mp4", "leads outside"),
    "link to a device": ("zero.mp4", "leads outside"),
    "fifo": ("fifo.mp4", "is no regular file"),
    "folder": ("folder.mp4", "is no regular file"),
    "itself": (".", "lies outside"),
    "nul": ("a\0.mp4", "lies outside"),
    "surrogate": ("a\ud800.mp4", "cannot be read"),
    "long": ("a" * 5000, "cannot be read"),
    "url": ("https://example.org/v.mp4", "cannot be read"),
    "pipe": ("pipe:cat /etc/passwd", "cannot be read"),
    "playlist": ("list.mp4", "cannot be read as video"),
    "empty": ("empty.mp4", "cannot be read as video"),
    "cut off": ("cut.mp4", "cannot be read as video|announces"),
}


def test_hostile_names_and_files_are_refused_with_a_reason(clips: Path, tmp_path: Path) -> None:
    root = tmp_path / "videos"
    root.mkdir()
    good = (clips / "videos" / "v0.mp4").read_bytes()
    (root / "good.mp4").write_bytes(good)
    (root / "out.mp4").symlink_to(clips / "videos" / "v0.mp4")
    (root / "zero.mp4").symlink_to("/dev/zero")
    os.mkfifo(root / "fifo.mp4")
    (root / "folder.mp4").mkdir()
    (root / "list.mp4").write_text("ffconcat version 1.0\nfile '/etc/hostname'\n")
    (root / "empty.mp4").touch()
    (root / "cut.mp4").write_bytes(good[: len(good) // 2])
    rows = [_row(name, i) for i, (name, _) in enumerate(HOSTILE.values())]
    (tmp_path / "rows.json").write_text(json.dumps([*rows, _row("good.mp4", 99), 7, None, [], "text", {}]))
    summary = convert(SOURCE, [tmp_path / "rows.json"], tmp_path / "out", video_root=root)
    assert (summary.kept, summary.skipped) == (1, len(HOSTILE) + 5)
    lines = [json.loads(line) for line in (tmp_path / "out" / SKIPPED_FILE).read_text().splitlines()]
    reasons = {line["number"]: line["reason"] for line in lines}
    for number, (name, (_, reason)) in enumerate(HOSTILE.items()):
        assert re.search(reason, reasons[number]), (name, reasons[number])
        assert reasons[number].startswith(f"record 'qa_{number}', video: ")
    assert len(reasons) == summary.skipped


def test_the_command_says_what_is_wrong_in_one_message(clips: Path, tmp_path: Path) -> None:
    def run(*args: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["convert", *map(str, args), "--out", str(tmp_path / "out")])
        return result.exit_code, result.stderr

    for args, message in [
        (("nl_refer", clips), "error: no source 'nl_refer'; there are nl-refer"),
        (("nl-refer", tmp_path / "none.json"), "none.json: no such file; give the files of a nl-refer set"),
        (("nl-refer", tmp_path), "no file '*.json' in it; give the files of a nl-refer set"),
        (
            ("nl-refer", clips, "--part", "3/3"),
            "error: --part '3/3' is not I/N with I from 0 to N - 1, e.g. 0/8 to 7/8",
        ),
        (("nl-refer", clips, "--part", "x"), "error: --part 'x' is not I/N"),
    ]:
        code, stderr = run(*args)
        assert code == 2, args
        assert message in stderr
        assert stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()
    code, stderr = run("nl-refer", clips, "--video-root", clips / "videos")
    assert code == 0
    assert stderr == "shard-000000.tar: 12 clips, 32 records kept, 6 skipped\n"


@pytest.mark.slow
def test_memory_does_not_grow_with_the_file(clips: Path, tmp_path: Path) -> None:
    text = "a" * 20_000
    with (tmp_path / "rows.json").open("w") as file:
        file.write("[")
        for i in range(10_000):
            row = _row(f"v{i % 1000}.mp4", i) | {"unused": text}
            file.write((", " if i else "") + json.dumps(row))
        file.write("]")
    for i in range(1000):
        (tmp_path / f"v{i}.mp4").symlink_to(tmp_path / "v.mp4")
    (tmp_path / "v.mp4").write_bytes((clips / "videos" / "v0.mp4").read_bytes())
    size = (tmp_path / "rows.json").stat().st_size
    assert size > 200e6
    code = (
        "import re, sys\nfrom pathlib import Path\n"
        "from swim.data_tools.convert import convert\nfrom swim.data_tools.sources.nl_refer import SOURCE\n"
        "folder = Path(sys.argv[1])\n"
        "def peak(): return int(re.search(r'VmHWM:\\s*(\\d+)', Path('/proc/self/status').read_text())[1])\n"
        "convert(SOURCE, [folder / 'small.json'], folder / 'small', max_bytes=1 << 20)\n"
        "before = peak()\n"
        "done = convert(SOURCE, [folder / 'rows.json'], folder / 'out', max_bytes=1 << 20)\n"
        "print(done.kept, peak() - before)\n"
    )
    (tmp_path / "small.json").write_text(json.dumps([_row("v.mp4", 0)]))
    env = environment(PYTHONPATH=str(ROOT))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-2000:]
    kept, growth = map(int, done.stdout.split())
    print(f"{size / 1e6:.0f} MB of JSON, memory grew by {growth / 1024:.1f} MiB")
    assert kept == 10_000
    assert growth * 1024 < size / 4
