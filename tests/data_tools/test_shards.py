"""Shards are deterministic and complete or nameless, and damage in any byte is found when it is read."""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from swim.data_tools import storage
from swim.data_tools.index import Lines
from swim.data_tools.records import Conversation, Media, Record, RecordError, Turn
from swim.data_tools.shards import BadSample, Sample, ShardError, ShardSet, ShardWriter, index_shard
from swim.data_tools.synth import synthesise

TURNS = [Turn(role="user", text="what ?"), Turn(role="assistant", text="that .")]
MEDIA = Media(member="mp4", kind="video", height=8, width=8, num_frames=2, fps=1)


def _record(media: Media = MEDIA) -> Record:
    conversations = [Conversation(task="ask", turns=TURNS)]
    return Record(source="test", license="CC0-1.0", media=[media], objects=[], conversations=conversations)


@pytest.fixture
def copied(synth_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(synth_folder, tmp_path / "copy"))


def test_samples_come_back_by_number_and_key(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        for i in range(5):
            writer.write(f"clip{i}", _record(), {}, {"mp4": bytes([i]) * 100})
    shards = ShardSet(tmp_path)
    assert shards.keys() == [f"clip{i}" for i in range(5)]
    for which in (3, "clip3"):
        sample = shards.read(which)
        assert (sample.key, sample.record, sample.masks, sample.media()) == ("clip3", _record(), {}, b"\x03" * 100)
    assert shards.read_member(4, "mp4") == b"\x04" * 100
    with pytest.raises(KeyError):
        shards.read("clip9")


def test_the_index_holds_the_facts_to_plan_with(synth_folder: Path) -> None:
    shards = ShardSet(synth_folder)
    for number, entry in enumerate(shards.entries):
        sample = shards.read(number)
        assert (entry.height, entry.width, entry.num_frames, entry.fps) == (112, 112, 8, 8)
        assert [facts.task for facts in entry.conversations] == [item.task for item in sample.record.conversations]
        by_task = {facts.task: facts for facts in entry.conversations}
        assert (by_task["describe"].num_mentions, by_task["describe"].num_mask_objects) == (2, 1)
        absent = [facts.num_mask_objects for facts in entry.conversations if facts.task == "existence"]
        assert absent == [1, 0]
        spoken = sum(len(turn.text) for turn in sample.record.conversations[0].turns)
        assert entry.conversations[0].num_chars == spoken


def test_equal_samples_give_equal_bytes_and_digests(synth_folder: Path, copied: Path, tmp_path: Path) -> None:
    again = tmp_path / "again"
    assert synthesise(again, clips=6, seed=5, hidden=0.5).digest == ShardSet(synth_folder).digest
    for path in sorted(synth_folder.iterdir()):
        assert (again / path.name).read_bytes() == path.read_bytes()
    assert ShardSet(copied).digest == ShardSet(synth_folder).digest, "the folder's name does not count"
    assert synthesise(tmp_path / "other", clips=6, seed=6).digest != ShardSet(synth_folder).digest


def test_an_index_built_from_the_tar_is_the_same(copied: Path) -> None:
    (path,) = copied.glob("*.tar")
    index = path.with_suffix(".index.jsonl")
    written = index.read_bytes()
    index.unlink()
    assert index_shard(path) == index
    assert index.read_bytes() == written


def test_shards_split_at_max_bytes(tmp_path: Path) -> None:
    with ShardWriter(tmp_path, prefix="part", max_bytes=30_000) as writer:
        for i in range(7):
            writer.write(f"clip{i}", _record(), {}, {"mp4": bytes([i]) * 10_000})
    assert [path.name for path in sorted(tmp_path.glob("*.tar"))] == [f"part-00000{i}.tar" for i in range(4)]
    shards = ShardSet(tmp_path)
    assert [shards.read(i).media()[0] for i in range(7)] == list(range(7))


def test_a_half_written_shard_has_no_name(tmp_path: Path) -> None:
    def stop_in_the_second_shard() -> None:
        with ShardWriter(tmp_path, max_bytes=15_000) as writer:
            for i in range(2):
                writer.write(f"clip{i}", _record(), {}, {"mp4": bytes(10_000)})
                assert not list(tmp_path.glob("shard-000001*"))
            raise RuntimeError("out of power")

    with pytest.raises(RuntimeError, match="out of power"):
        stop_in_the_second_shard()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shard-000000.index.jsonl", "shard-000000.tar"]
    assert ShardSet(tmp_path).keys() == ["clip0"]


def test_the_writer_refuses_what_cannot_be_read_back(tmp_path: Path) -> None:
    with ShardWriter(tmp_path) as writer:
        writer.write("a", _record(), {}, {"mp4": b"x"})
        with pytest.raises(RecordError, match=r"record 'a', key: it was written before; keys are unique"):
            writer.write("a", _record(), {}, {"mp4": b"x"})
        with pytest.raises(RecordError, match=r"record 'b.c', key: .*no dots"):
            writer.write("b.c", _record(), {}, {"mp4": b"x"})
        with pytest.raises(RecordError, match=r"record 'b', media: bytes were given for \['jpg'\], .*names \['mp4'\]"):
            writer.write("b", _record(), {}, {"jpg": b"x"})
        with pytest.raises(RecordError, match=r"record 'b', masks.ball: object id 'ball' is not among"):
            writer.write("b", _record(), {"ball": {0: None}}, {"mp4": b"x"})
    assert ShardSet(tmp_path).keys() == ["a"]
    with pytest.raises(ShardError, match=r"shard-000000.tar already exists; write to an empty folder"):
        ShardWriter(tmp_path)


@pytest.mark.parametrize("member", ["json", "masks.json", "mp4"])
def test_a_flipped_bit_is_found(copied: Path, member: str) -> None:
    entry = ShardSet(copied).entries[2]
    offset, size, _ = entry.members[member]
    with (copied / entry.shard).open("r+b") as file:
        file.seek(offset + size // 2)
        byte = file.read(1)[0]
        file.seek(-1, io.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    shards = ShardSet(copied)
    with pytest.raises(BadSample, match=rf"'{entry.key}' .*at byte {offset}: .*CRC32 .*copy the shard again") as caught:
        shards.read(2).media()
    assert (caught.value.key, caught.value.shard, caught.value.offset) == (entry.key, entry.shard, offset)
    assert shards.read(3).media(), "only the damaged sample is lost"


def test_invalid_records_and_short_reads_are_bad_samples(copied: Path) -> None:
    shards = ShardSet(copied)
    shards.entries = list(shards.entries)  # an index that says something else
    entry = shards.entries[1]
    entry.members["json"] = entry.members["masks.json"]
    with pytest.raises(BadSample, match=r"record 'synth_5_000001', .*: (Field required|unknown key)"):
        shards.read(1)
    os.truncate(copied / entry.shard, shards.entries[4].members["mp4"][0] + 10)
    with pytest.raises(BadSample, match=r"member 'mp4' ends after 10 of \d+ bytes; copy the shard again"):
        shards.read(4).media()
    (copied / entry.shard).unlink()
    with pytest.raises(BadSample, match=r"member 'json' cannot be read: .*No such file"):
        ShardSet.read(pickle.loads(pickle.dumps(shards)), 0)


def test_incomplete_folders_are_refused(copied: Path, tmp_path: Path) -> None:
    with pytest.raises(ShardError, match=r"none: no \*.tar found and no \*.jsonl; give a folder"):
        ShardSet(tmp_path / "none")
    (path,) = copied.glob("*.tar")
    index = path.with_suffix(".index.jsonl")
    good = index.read_text()
    os.truncate(path, path.stat().st_size - 512)
    with pytest.raises(ShardError, match=r"its header is .*'size': \d+.*copy the file again or run 'swim data index"):
        ShardSet(copied)
    for text, message in [
        ("", "header is damaged"),
        (good[:-20], r"line 7 is damaged"),
        ("[]\n", r"its header is \[\]"),
    ]:
        index.write_text(text.replace(str(path.stat().st_size + 512), str(path.stat().st_size), 1))
        with pytest.raises(ShardError, match=rf"{index.name}: .*{message}"):
            ShardSet(copied)
    index.unlink()
    with pytest.raises(ShardError, match=r"index shard-000000.index.jsonl is missing; run 'swim data index .*copy'"):
        ShardSet(copied)


def test_keys_are_unique_over_shards(synth_folder: Path, copied: Path) -> None:
    for path in synth_folder.iterdir():
        shutil.copy(path, copied / path.name.replace("000000", "000001"))
    index = copied / "shard-000001.index.jsonl"
    index.write_text(index.read_text().replace("shard-000000", "shard-000001"))
    with pytest.raises(ShardError, match=r"key 'synth_5_000000' is there twice; remove one"):
        ShardSet(copied)


def test_foreign_tars_are_indexed_or_refused(tmp_path: Path) -> None:
    def write(*members: tuple[str, bytes]) -> Path:
        with tarfile.open(tmp_path / "a.tar", "w") as tar:
            for name, data in members:
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
        return tmp_path / "a.tar"

    text = _record().model_dump_json().encode()
    index_shard(write(("k.mp4", b"data"), ("k.json", text)))
    assert ShardSet(tmp_path).read("k").media() == b"data", "a tar without masks, media first, is fine"
    with pytest.raises(ShardError, match=r"a.tar: 'k' has \['mp4'\] but no 'k.json'"):
        index_shard(write(("k.mp4", b"data")))
    with pytest.raises(ShardError, match=r"a.tar: members of 'k' are not adjacent, or it is there twice"):
        index_shard(write(("k.json", text), ("k.mp4", b""), ("l.json", text), ("l.mp4", b""), ("k.txt", b"")))
    with pytest.raises(RecordError, match=r"record 'k', media: member 'mp4' is not in the tar, which has \['json'\]"):
        index_shard(write(("k.json", text)))
    (tmp_path / "a.tar").write_bytes(b"<html>")
    with pytest.raises(ShardError, match=r"a.tar: cannot be read as a tar .*; copy it again"):
        index_shard(tmp_path / "a.tar")


def test_loose_media_are_read_from_the_folder(tmp_path: Path) -> None:
    media = Media(path="videos/a.mp4", kind="video", height=8, width=8, num_frames=2, fps=1)
    with ShardWriter(tmp_path) as writer:
        writer.write("a", _record(media), {}, {})
    sample = ShardSet(tmp_path).read(0)
    with pytest.raises(
        BadSample, match=r"media\[0\] cannot be read: 'videos/a.mp4' is not a file inside .*; put it there"
    ):
        sample.media()
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"loose")
    assert sample.media() == b"loose"


@pytest.mark.parametrize("path", ["../secret.mp4", "/dev/zero", "link.mp4"])
def test_a_record_cannot_name_files_outside_its_folder(tmp_path: Path, path: str) -> None:
    (tmp_path / "secret.mp4").write_bytes(b"secret")
    folder = tmp_path / "shards"
    media = Media(path=path, kind="video", height=8, width=8, num_frames=2, fps=1)
    with ShardWriter(folder) as writer:
        writer.write("a", _record(media), {}, {})
    (folder / "link.mp4").symlink_to(tmp_path / "secret.mp4")
    with pytest.raises(BadSample, match="is not a file inside"):
        ShardSet(folder).read(0).media()


def test_shards_and_samples_cross_processes(synth_folder: Path) -> None:
    shards = ShardSet(synth_folder)
    expected = shards.read(0).media()
    copied: Sample = pickle.loads(pickle.dumps(shards.read(0)))
    assert copied.media() == expected
    assert len(pickle.dumps(shards.read(0))) < 50_000, "a sample does not carry the whole index or the video"
    assert pickle.loads(pickle.dumps(shards)).read(0).media() == expected
    error = BadSample("k", "shard.tar", 7, "torn")
    assert str(pickle.loads(pickle.dumps(error))) == str(error) == "sample 'k' in shard.tar at byte 7: torn"
    read_end, write_end = os.pipe()
    child = os.fork()
    if child == 0:  # reads with descriptors that the parent opened, at the same time as the parent
        try:
            same = all(shards.read(i % 6).media() == shards.read(i % 6).media() for i in range(60))
            os.write(write_end, b"1" if same and shards.read(0).media() == expected else b"0")
        finally:
            os._exit(0)
    assert all(shards.read(0).media() == expected for _ in range(60))
    assert os.waitpid(child, 0)[1] == 0
    assert os.read(read_end, 1) == b"1"
    os.close(read_end)
    os.close(write_end)


def test_open_files_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("swim.data_tools.storage.MAX_OPEN_FILES", 3)
    storage._open_files.clear()
    with ShardWriter(tmp_path, max_bytes=1) as writer:
        for i in range(8):
            writer.write(f"clip{i}", _record(), {}, {"mp4": bytes([i])})
    shards = ShardSet(tmp_path)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for i in [*range(8), *range(8)]:
        assert shards.read(i).media() == bytes([i])
    assert len(list(Path("/proc/self/fd").iterdir())) == before + 3
    assert json.loads((tmp_path / "shard-000007.index.jsonl").read_text().splitlines()[0])["version"] == 1


def test_a_cached_index_is_parsed_once_and_lines_are_parsed_when_asked_for(
    copied: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ShardSet(copied)
    first = ShardSet(copied, cache=tmp_path / "cache")
    parsed = []
    parse = Lines._parse
    monkeypatch.setattr(Lines, "_parse", lambda *args: parsed.append(args[2]) or parse(*args))
    again = ShardSet(copied, cache=tmp_path / "cache")
    assert (len(again), again.digest, parsed) == (len(whole), whole.digest, [])
    for name, value in vars(first.facts).items():
        assert getattr(again.facts, name).tolist() == value.tolist() == getattr(whole.facts, name).tolist()
    assert again.entries[-2] == whole.entries[len(whole) - 2]
    assert len(parsed) == 2
    assert again.entries[1:3] == list(whole.entries)[1:3]
    with pytest.raises(IndexError):
        again.entries[len(again)]
    # Another index is looked at anew, and a damaged one refused whatever is cached.
    path = next(copied.glob("*.index.jsonl"))
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ShardError, match=r"line \d+ is damaged"):
        ShardSet(copied, cache=tmp_path / "cache")


MANY = """
import resource, sys
from swim.data_tools.shards import ShardSet

resource.setrlimit(resource.RLIMIT_NOFILE, (48, 48))
sets = [ShardSet(folder) for folder in sys.argv[1:]]
for number in range(len(sets[0])):
    for one in sets:
        assert one.read(number).record.source == "t"
print("read")
"""


def test_many_shards_of_many_data_sets_stay_within_the_files_that_a_process_may_open(tmp_path):
    said = [Conversation(task="t", turns=[Turn(role="user", text="?"), Turn(role="assistant", text="!")])]
    record = Record(source="t", license="CC0-1.0", media=[], objects=[], conversations=said)
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for folder in folders:
        with ShardWriter(folder, max_bytes=1) as writer:
            for number in range(60):
                writer.write(f"k{number}", record, {}, {})
    result = subprocess.run([sys.executable, "-c", MANY, *folders], capture_output=True, text=True)
    assert result.stdout == "read\n", result.stderr[-2000:]
