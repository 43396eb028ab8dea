"""JSONL files beside loose videos are data sets like shards: indexed once, read by offset, never left."""

import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from loose_files import write_loose
from typer.testing import CliRunner

from swim.data_tools import loose
from swim.data_tools.cli import app
from swim.data_tools.convert import convert
from swim.data_tools.index import index_name
from swim.data_tools.loose import index_jsonl
from swim.data_tools.shards import BadSample, ShardError, ShardSet
from swim.data_tools.sources import jsonl

RUN = CliRunner()


@pytest.fixture
def mine(synth_folder: Path, tmp_path: Path) -> Path:
    return write_loose(tmp_path / "loose", ShardSet(synth_folder))


def test_a_jsonl_file_reads_like_the_shards_of_its_samples(mine: Path, synth_folder: Path, capfd) -> None:
    stored, found = ShardSet(synth_folder), ShardSet(mine)
    assert "indexed" in capfd.readouterr().err
    assert found.keys() == stored.keys()
    for name, value in vars(found.facts).items():
        assert value.tolist() == getattr(stored.facts, name).tolist()
    for i in range(len(stored)):
        a, b = stored.read(i), found.read(i)
        assert (a.masks, a.media(), a.record.conversations) == (b.masks, b.media(), b.record.conversations)
        assert found.entries[i].conversations == stored.entries[i].conversations
        assert b.place == ("mine.jsonl", found.entries[i].members["line"][0])
    assert found.read(2, masks=False).masks == {}
    again = ShardSet(mine.parent, cache=mine.parent / "cache")
    assert again.digest == found.digest, "a folder without tars is that of its JSONL files"
    assert capfd.readouterr().err == "", "indexed once"
    assert pickle.loads(pickle.dumps(again)).read(5).media() == stored.read(5).media()


@pytest.mark.parametrize("command", [["validate", "--deep"], ["show"], ["stats", "--json"]])
def test_data_commands_take_jsonl(mine: Path, command: list[str]) -> None:
    result = RUN.invoke(app, [command[0], str(mine), *command[1:]])
    assert result.exit_code == 0, result.output
    if command[0] == "stats":
        videos = sum(path.stat().st_size for path in mine.parent.glob("clips/*"))
        assert json.loads(result.stdout)["bytes"] == videos + mine.stat().st_size


def test_converted_lines_are_the_same_samples(mine: Path, tmp_path: Path) -> None:
    convert(jsonl.SOURCE, [mine], tmp_path / "out")
    shards, found = ShardSet(tmp_path / "out"), ShardSet(mine)
    for i in range(len(found)):
        a, b = shards.read(i), found.read(i)
        # Converting makes one object of equal masks, else nothing of a line changes.
        assert [c.task for c in a.record.conversations] == [c.task for c in b.record.conversations]
        assert (a.record.license, a.media()) == (b.record.license, b.media())


def test_bad_lines_are_listed_and_left_out(mine: Path, tmp_path: Path, capfd) -> None:
    good = [json.loads(line) for line in mine.read_text().splitlines()]
    os.mkfifo(mine.parent / "fifo.mp4")
    (tmp_path / "secret.mp4").write_bytes((mine.parent / good[0]["video"]).read_bytes())
    (mine.parent / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    (mine.parent / "page.mp4").write_text("<html>")
    inside = str((mine.parent / good[0]["video"]).resolve())
    hostile = ["../secret.mp4", str(tmp_path / "secret.mp4"), inside, "/dev/zero", "fifo.mp4", "link.mp4", "clips"]
    hostile += ["pipe:cat secret.mp4", "https://x/y.mp4", "a\0b.mp4", "none.mp4", "."]
    lines = [json.dumps(good[0] | {"video": name, "key": f"bad{i}"}) for i, name in enumerate(hostile)]
    lines += [json.dumps(good[1] | {"video": "page.mp4"}), "{", "[]", '{"video": 3}', json.dumps(good[2] | {"x": 1})]
    lines += [json.dumps(good[2] | {"masks": {"ghost": {"0": None}}}), "[" * 100_000]
    mine.write_text("\n".join([*lines, *map(json.dumps, good)]))
    shards = ShardSet(mine)
    assert shards.keys() == [line["key"] for line in good]
    assert f"{len(good)} records, {len(lines)} skipped" in capfd.readouterr().err
    listed = [json.loads(line) for line in (mine.parent / "mine.skipped.jsonl").read_text().splitlines()]
    assert [line["number"] for line in listed] == list(range(len(lines)))
    assert all("is not a file inside" in line["reason"] for line in listed[: len(hostile)])
    reasons = [line["reason"] for line in listed[len(hostile) :]]
    words = ("cannot be read as video", "not JSON", "not a JSON object", "file name", "x:", "ghost", "not JSON")
    for reason, word in zip(reasons, words):
        assert word in reason
    mine.write_text("\n".join(lines))
    with pytest.raises(ShardError, match=r"no line can be used .*is not a file inside.*see mine.skipped.jsonl"):
        ShardSet(mine)


def test_keys_come_from_lines_and_are_unique(mine: Path) -> None:
    lines = [json.loads(line) for line in mine.read_text().splitlines()]
    for line, key in zip(lines, ["cup", "cup", "a cup.", None, "", "cup-000001"]):
        line["key"] = key
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    keys = ["cup", "cup-000001", "a_cup_", "mine-000003", "mine-000004", "cup-000001-000005"]
    assert ShardSet(mine).keys() == keys


def test_a_changed_line_or_video_is_found(mine: Path, capfd) -> None:
    shards = ShardSet(mine)
    digest, text = shards.digest, mine.read_bytes()
    mine.write_bytes(text.replace(b"colour", b"color!"))  # as long as before
    with pytest.raises(BadSample, match=r"member 'line' has CRC32 .*run 'swim data index .*mine.jsonl'"):
        shards.read(1)
    changed = ShardSet(mine)
    assert changed.digest != digest, "the next one to open it makes a new index"
    assert changed.read(1)
    mine.write_bytes(text)
    assert ShardSet(mine).digest == digest
    capfd.readouterr()
    os.utime(mine)
    assert ShardSet(mine).digest == digest
    assert "indexing" not in capfd.readouterr().err, "a copy with another time is compared, not indexed"
    video = mine.parent / "clips" / f"{shards.keys()[2]}.mp4"
    data = bytearray(video.read_bytes())
    data[len(data) // 2] ^= 1
    for broken, reason in [(data, "has CRC32"), (data[:-9], "ends after"), (bytes(data) + b"x", "has more than")]:
        video.write_bytes(broken)
        with pytest.raises(BadSample, match=rf"media\[0\] {reason}.*run 'swim data index .*mine.jsonl' if") as caught:
            ShardSet(mine).read(2).media()
        assert caught.value.shard == "mine.jsonl"
    video.unlink()
    with pytest.raises(BadSample, match="is not a file inside"):
        ShardSet(mine).read(2).media()
    assert ShardSet(mine).read(3).media()


def test_a_folder_that_cannot_be_written_needs_an_index(mine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError("read-only file system")

    monkeypatch.setattr(loose, "write_index", refuse)
    with pytest.raises(ShardError, match=r"cannot be made \(read-only.*run 'swim data index .*mine.jsonl' where"):
        ShardSet(mine)


def test_the_index_of_a_tar_is_not_overwritten(mine: Path, synth_folder: Path) -> None:
    for path in synth_folder.iterdir():
        (mine.parent / path.name).write_bytes(path.read_bytes())
    assert ShardSet(mine.parent).digest == ShardSet(synth_folder).digest, "shards are the fast path"
    os.rename(mine, mine.with_name("shard-000000.jsonl"))
    with pytest.raises(ShardError, match=r"shard-000000.tar beside it would have the same index; rename"):
        ShardSet(mine.with_name("shard-000000.jsonl"))
    assert ShardSet(mine.parent).digest == ShardSet(synth_folder).digest


def _wait_and_open(path: Path, barrier: Any, found: Any) -> None:
    barrier.wait()
    found.put(ShardSet(path).digest)


def test_openers_at_the_same_time_make_one_index(mine: Path, capfd) -> None:
    context = multiprocessing.get_context("fork")
    barrier, found = context.Barrier(4), context.Queue()
    openers = [context.Process(target=_wait_and_open, args=(mine, barrier, found)) for _ in range(4)]
    for opener in openers:
        opener.start()
    digests = {found.get(timeout=60) for _ in openers}
    for opener in openers:
        opener.join()
    assert digests == {ShardSet(mine).digest}
    assert capfd.readouterr().err.count("indexing ") == 1


@pytest.fixture
def slow_indexer(mine: Path) -> Iterator[subprocess.Popen[str]]:
    code = (
        "import sys, time; from pathlib import Path; from swim.data_tools import loose, shards\n"
        "look = loose._look\n"
        "def slow(*args):\n    print('looking', flush=True); time.sleep(0.5); return look(*args)\n"
        "loose._look = slow; shards.ShardSet(Path(sys.argv[1]))\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(mine)], stdout=subprocess.PIPE, text=True) as process:
        yield process
        process.kill()


def test_a_killed_indexer_leaves_no_index(mine: Path, slow_indexer: subprocess.Popen[str]) -> None:
    assert slow_indexer.stdout is not None
    assert slow_indexer.stdout.readline() == "looking\n"
    index = mine.with_name(index_name(mine.name))
    deadline = time.monotonic() + 30
    while not list(mine.parent.glob(".mine.index.jsonl.*.partial")) and time.monotonic() < deadline:
        time.sleep(0.01)
    slow_indexer.send_signal(signal.SIGKILL)
    slow_indexer.wait()
    assert not index.exists()
    assert len(ShardSet(mine)) == 6, "the dead one's lock is gone"
    assert not list(mine.parent.glob(".*.partial"))


def test_an_index_is_made_anew_by_command(mine: Path) -> None:
    digest = ShardSet(mine).digest
    index = mine.with_name(index_name(mine.name))
    good = index.read_bytes()
    index.write_bytes(good[:200])
    result = RUN.invoke(app, ["index", str(mine)])
    assert result.exit_code == 0, result.output
    assert index.read_bytes() == good
    assert ShardSet(mine).digest == digest
    assert index_jsonl(mine, jobs=1) == index
    assert index.read_bytes() == good, "whatever the number of threads"


def test_text_alone_and_several_files(tmp_path: Path) -> None:
    turns = [{"role": "user", "text": "why ?"}, {"role": "assistant", "text": "so ."}]
    line = json.dumps({"conversations": [{"task": "text", "turns": turns}]})
    (tmp_path / "a.jsonl").write_text(f"{line}\n\n{line}\n")
    (tmp_path / "b.jsonl").write_text(f"\ufeff{line}")
    (tmp_path / "skipped.jsonl").write_text("of a conversion")
    shards = ShardSet(tmp_path)
    assert shards.keys() == ["a-000000", "a-000001", "b-000000"]
    assert [shards.read(i).record.media for i in range(3)] == [[]] * 3
    assert shards.facts.shards.tolist() == [0, 0, 1]
