"""Promise: `swim data validate` names every kind of wrong sample with its place and remedy, and says nothing about good
ones."""

import io
import json
import os
import pickle
import re
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import av
import numpy as np
import pytest
from footage import footage_dir
from PIL import Image
from pycocotools import mask as coco
from typer.testing import CliRunner, Result

from swim.data_tools.checks import KINDS, check_video, measure_mask
from swim.data_tools.cli import app
from swim.data_tools.lookalike import LIMIT, near_pairs
from swim.data_tools.records import Record, RecordError, Rle
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.validate import Options, examine, validate
from swim.data_tools.video import decode_frames, encode_video, probe


def _run(*args: object) -> Result:
    return CliRunner().invoke(app, ["validate", *(str(arg) for arg in args)])


def _write(folder: Path, source: ShardSet, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> ShardSet:
    """The first sample of `source` as `change` leaves its JSON, whatever a writer would refuse."""
    sample = source.read(0)
    with ShardWriter(folder) as writer:
        writer.write("k", sample.record, sample.masks, {"mp4": sample.media()})
    shards = ShardSet(folder)
    texts = [json.loads(shards.read_member(0, name)) for name in ("json", "masks.json")]
    change(*texts)
    _patch(shards, {name: json.dumps(text).encode() for name, text in zip(("json", "masks.json"), texts)})
    return ShardSet(folder)


def _patch(shards: ShardSet, members: dict[str, bytes]) -> None:
    """Replace members of the first sample, in the tar (behind its end) and in its index."""
    entry = shards.entries[0]
    tar = shards.folder / entry.shard
    index = tar.with_suffix(".index.jsonl")
    header, line = map(json.loads, index.read_text().splitlines())
    with tar.open("ab") as file:
        for name, data in members.items():
            line["members"][name] = [file.tell(), len(data), zlib.crc32(data)]
            file.write(data)
    header["size"] = tar.stat().st_size
    index.write_text(json.dumps(header) + "\n" + json.dumps(line) + "\n")


def _kinds(shards: ShardSet, **options: Any) -> dict[str, tuple[str, str]]:
    found = examine(shards, 0, Options(**options)).findings
    for finding in found:
        assert (finding.key, finding.level) == (shards.entries[0].key, KINDS[finding.kind].level)
        assert finding.shard == str(shards.folder / "shard-000000.tar")
        assert finding.offset in {offset for offset, _, _ in shards.entries[0].members.values()}
        assert finding.value
        assert finding.limit
        assert finding.remedy
    return {finding.kind: (finding.field, finding.value) for finding in found}


def test_good_samples_have_no_findings_shallow_or_deep(synth_folder: Path, tmp_path: Path) -> None:
    for flags in ((), ("--deep",), ("--jobs", 2)):
        result = _run(synth_folder, "--strict", "--json", tmp_path / "report.json", *flags)
        assert result.exit_code == 0, result.output
        assert result.stdout.endswith("6 samples, 0 of them with errors; errors: 0, warnings: 0\n")
        report = json.loads((tmp_path / "report.json").read_text())
        assert report["findings"] == []
        assert report["kinds"] == {}
        assert report["samples"] == 6
        assert report["folders"] == [{"path": str(synth_folder), "digest": ShardSet(synth_folder).digest}]
        assert sum(report["masks"].values()) == 6 * 3 * 8
        assert report["masks"]["absent"] > 0


def _noun(record: dict[str, Any]) -> dict[str, Any]:
    return record["conversations"][0]["turns"][0]["mentions"][0]


def _set(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, Any]], None]:
    def change(record: dict[str, Any], masks: dict[str, Any]) -> None:
        names = path.split(".")
        target: Any = {"record": record, "masks": masks, "noun": _noun(record)}[names[0]]
        for name in names[1:-1]:
            target = target[int(name) if isinstance(target, list) else name]
        last = names[-1]
        target[int(last) if isinstance(target, list) else last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "kind", "field", "said"),
    [
        ("record.licence", "x", "schema", "licence", "unknown key"),
        ("record.license", " Unknown ", "license", "license", "' Unknown '"),
        ("record.source", "", "source", "source", "''"),
        ("record.media.0.num_frames", 0, "schema", "media[0].num_frames", "greater than or equal to 1, got 0"),
        ("record.media.0.frame_map", [0, 1, 2], "media", "media[0].frame_map", "3 entries for 8 frames"),
        ("record.media.0.frame_map", [0, 2, 4, 4, 6, 5, 7, 9], "frame_map", "media[0].frame_map[5]", "5"),
        ("record.media.0.frame_map", [-1, 2, 4, 4, 6, 6, 7, 9], "frame_map", "media[0].frame_map[0]", "-1"),
        ("record.media.0.fps", 9.0, "index", "media[0]", "8.0) in the index, (112, 112, 8, 9.0) in the record"),
        ("record.media.0.member", "mov", "unreadable", "media[0].member", "no 'mov' among"),
        ("record.objects.1.id", "x", "masks", "masks.", "is not among objects"),
        ("record.objects.0.boxes", {"8": [0, 0, 1, 1]}, "objects", "objects[0].boxes", "frame 8 is outside the clip"),
        ("record.objects.0.boxes", {"3": [0, 0, 200, 1]}, "box", "objects[0].boxes[3]", "in 112x112 pixels"),
        ("record.objects.0.label", "juggler", "label", ".object_ids", "labels ['juggler']"),
        ("record.conversations.0.span", [2, 8], "span", "conversations[0].span", "[2, 8] is not"),
        ("record.conversations.0.turns.0.text", "<ins>x", "turns", "turns[0].text", "the text holds a tag"),
        ("record.conversations.0.turns.0.role", "assistant", "turns", "turns[0].role", "'assistant' where 'user'"),
        ("noun.end", 999, "mention", "mentions[0]", "do not lie inside the text"),
        ("noun.head", [10, 13], "head", "mentions[0].head", "'the'"),
        ("noun.object_ids", ["nobody"], "mention", ".object_ids", "is not among objects"),
    ],
)
def test_each_wrong_field_is_named(
    synth_folder: Path, tmp_path: Path, path: str, value: Any, kind: str, field: str, said: str
) -> None:
    def change(record: dict[str, Any], masks: dict[str, Any]) -> None:
        if kind == "head":  # "which way does the X Y move ?"
            _noun(record)["start"] = 10
            value[:] = [record["conversations"][0]["turns"][0]["text"].index("the"), 0]
            value[1] = value[0] + 3
        _set(path, value)(record, masks)

    found = _kinds(_write(tmp_path, ShardSet(synth_folder), change))
    assert kind in found, found
    assert field in found[kind][0]
    assert said in found[kind][1]


@pytest.mark.parametrize("head", ["circ", "ircle", "red circle", "!", " a"])
def test_a_head_that_is_no_whole_word_is_suspected(synth_folder: Path, tmp_path: Path, head: str) -> None:
    def change(record: dict[str, Any], _: dict[str, Any]) -> None:
        turn = record["conversations"][0]["turns"][0]
        turn["text"] = "where is a red circle ! ?"
        start = turn["text"].index(head)
        noun = {"start": 8, "end": 25, "head": [start, start + len(head)], "kind": "noun", "object_ids": []}
        turn["mentions"] = [noun]

    found = _kinds(_write(tmp_path, ShardSet(synth_folder), change))
    assert set(found) == {"head"}
    assert repr(head) in found["head"][1]


@pytest.mark.parametrize("text", ["where is the CIRCLE ?", "two circles ?", "圆圈在哪里", "l’étoile circle"])
def test_whole_words_of_any_script_are_heads(synth_folder: Path, tmp_path: Path, text: str) -> None:
    def change(record: dict[str, Any], _: dict[str, Any]) -> None:
        turn = record["conversations"][0]["turns"][0]
        turn["text"] = text
        span = re.search(r"circles?|圆圈", text, re.IGNORECASE)
        assert span
        record["objects"][0]["label"] = "圆圈" if "圆" in text else "blue circle"
        ids = [record["objects"][0]["id"]]
        turn["mentions"] = [{"start": span.start(), "end": span.end(), "head": list(span.span()), "object_ids": ids}]

    shards = _write(tmp_path, ShardSet(synth_folder), change)
    assert not [f for f in examine(shards, 0, Options()).findings if "conversations[0]" in f.field]


def _masks_of(*areas: tuple[int, int, int, int] | None) -> dict[str, Any]:
    """Boxes (x0, y0, x1, y1) on 112x112 as the masks of one object, frame by frame."""
    frames: dict[str, Any] = {}
    for frame, box in enumerate(areas):
        mask = np.zeros((112, 112), bool)
        if box is not None:
            mask[box[1] : box[3], box[0] : box[2]] = True
        frames[str(frame)] = encode_mask(mask) if box is not None else None
    return frames


STILL = (10, 10, 30, 30)


@pytest.mark.parametrize(
    ("boxes", "kind", "said"),
    [
        ([STILL] * 8, None, ""),
        ([(10 + 9 * i, 10, 30 + 9 * i, 30) for i in range(8)], None, ""),
        (
            [STILL, STILL, (60, 60, 80, 80), STILL, STILL, STILL],
            "centroid_jump",
            "3.54 widths, frames 1 to 2, 2 such steps",
        ),
        ([STILL, STILL, None, (60, 60, 80, 80), (60, 60, 80, 80)], None, ""),
        ([STILL, STILL, (10, 10, 60, 60), (10, 10, 60, 60)], "area_jump", "6.25 times the area, frames 1 to 2"),
        ([STILL, STILL, (10, 10, 12, 12)], "tiny_mask", "1 of 3 masks, the smallest 4 pixels in frame 2"),
        ([None, None, None], "never_seen", "absent in 3 frames"),
        ([(5, 5, 5, 5)] * 2, "never_seen", "absent in 2 frames"),
        ([], "no_masks", "->"),
    ],
    ids=["still", "steady", "jumps", "comes-back", "grows", "tiny", "absent", "empty", "none"],
)
def test_masks_that_jump_vanish_or_are_missing(
    synth_folder: Path, tmp_path: Path, boxes: list[Any], kind: str | None, said: str
) -> None:
    def change(record: dict[str, Any], masks: dict[str, Any]) -> None:
        (name,) = _noun(record)["object_ids"]
        masks[name] = _masks_of(*boxes)

    found = _kinds(_write(tmp_path, ShardSet(synth_folder), change))
    assert set(found) == ({kind} if kind else set())
    if kind:
        assert said in found[kind][1]


@pytest.mark.parametrize(
    ("rle", "said"),
    [
        ({"size": [112, 112], "counts": "0"}, "the runs sum to 0, but 112 x 112 is 12544"),
        ({"size": [64, 112], "counts": "0"}, "has another shape than the media's 112x112"),
        ({"size": [112, 112], "counts": "\x7f"}, "outside the RLE alphabet"),
        ({"size": [10**9, 10**9], "counts": "0"}, "is outside 1 to 16384 a side"),
    ],
)
def test_every_bad_mask_is_listed_not_only_the_first(
    synth_folder: Path, tmp_path: Path, rle: dict[str, Any], said: str
) -> None:
    def change(record: dict[str, Any], masks: dict[str, Any]) -> None:
        masks[record["objects"][0]["id"]] = {"1": rle, "5": rle}

    found = examine(_write(tmp_path, ShardSet(synth_folder), change), 0, Options()).findings
    assert [finding.field.partition("[")[2] for finding in found] == ["1]", "5]"]
    assert all(finding.kind == "masks" and said in finding.value for finding in found)


def test_masks_of_several_sizes_are_suspected(synth_folder: Path, tmp_path: Path) -> None:
    def change(record: dict[str, Any], masks: dict[str, Any]) -> None:
        masks[record["objects"][0]["id"]] = {**_masks_of(None, STILL), "0": encode_mask(np.ones((56, 56), bool))}

    assert _kinds(_write(tmp_path, ShardSet(synth_folder), change))["mask_size"][1].startswith("2 sizes, (56, 56) to")


def test_area_and_centroid_are_those_of_pycocotools() -> None:
    rng = np.random.default_rng(0)
    for shape in ((1, 1), (7, 5), (30, 40)):
        for share in (0.0, 0.3, 1.0):
            mask = rng.random(shape) < share
            rle = Rle(**encode_mask(mask))
            area, x, y = measure_mask(rle)
            assert area == coco.area({"size": list(rle.size), "counts": rle.counts.encode()})
            rows, columns = np.nonzero(mask)
            if area:
                assert (x, y) == pytest.approx((columns.mean() + 0.5, rows.mean() + 0.5))


def test_deep_finds_damage_wrong_facts_and_strays(synth_folder: Path, tmp_path: Path) -> None:
    source = ShardSet(synth_folder)
    folder = tmp_path / "s"
    shards = _write(folder, source, lambda *_: None)
    good, video = _kinds(shards, deep=True), shards.read(0).media()
    assert good == {}
    _patch(shards, {"pkl": b"x"})
    assert _kinds(ShardSet(folder))["member"] == ("pkl", "1 bytes")
    cut = encode_video(decode_frames(video, [0, 1, 2, 3]), 12)
    _patch(shards, {"mp4": cut})
    found = _kinds(ShardSet(folder), deep=True)
    assert found["video"] == ("media[0]", "(height, width, frames) (112, 112, 4)")
    assert found["fps"] == ("media[0]", "12/s")
    assert "video" not in _kinds(ShardSet(folder)), "without --deep no video byte is read"
    _patch(shards, {"mp4": video[: len(video) // 2]})
    assert set(_kinds(ShardSet(folder), deep=True)) == {"video", "member"}
    tar = folder / "shard-000000.tar"
    data = bytearray(tar.read_bytes())
    data[-1] ^= 1
    tar.write_bytes(data)
    field, value = _kinds(ShardSet(folder), deep=True)["unreadable"]
    assert field == "mp4"
    assert "CRC32" in value


def test_a_frame_damaged_in_the_middle_is_found(synth_folder: Path) -> None:
    """First and last frames may be sound: every one is decoded."""
    video = bytearray(ShardSet(synth_folder).read(0).media())
    with av.open(io.BytesIO(bytes(video))) as container:
        packets = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    middle = packets[4]
    video[middle[0] + 6 : middle[0] + middle[1]] = Random(0).randbytes(middle[1] - 6)
    found, _ = check_video(bytes(video), "media[0]", (112, 112, 8, 8.0))
    assert [finding.kind for finding in found] == ["video"]


def test_loose_files_must_be_there_and_inside(synth_folder: Path, tmp_path: Path) -> None:
    for path in ("missing.mp4", "pipe:cat /etc/passwd", "/dev/zero", "../x.mp4"):
        shutil.rmtree(tmp_path / "s", ignore_errors=True)

        where = {"path": path, "member": None}
        shards = _write(tmp_path / "s", ShardSet(synth_folder), lambda r, _, w=where: r["media"][0].update(w))
        field, value = _kinds(shards, deep=True)["unreadable"]
        assert field == "media[0].path"
        assert f"{path!r} is not a file inside" in value


def test_pictures_are_decoded(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((8, 12, 3), np.uint8)).save(tmp_path / "a.png")
    for height, kinds in ((8, set()), (9, {"video"})):
        media = {"member": "png", "kind": "image", "height": height, "width": 12, "num_frames": 1, "fps": 1}
        record = Record.model_validate(
            {"source": "s", "license": "l", "media": [media], "objects": [], "conversations": []}
        )
        with ShardWriter(tmp_path / str(height)) as writer:
            writer.write("k", record, {}, {"png": (tmp_path / "a.png").read_bytes()})
        assert set(_kinds(ShardSet(tmp_path / str(height)), deep=True)) == kinds


def test_splits_must_not_share_clips(synth_folder: Path, tmp_path: Path) -> None:
    source = ShardSet(synth_folder)
    video = source.read(0).media()
    again = encode_video(decode_frames(video, list(range(8))), 8, crf=30)
    for name, samples in {
        "same": [("synth_5_000000", 0, video)],
        "renamed": [("other", 0, video)],
        "encoded": [("other", 0, again), ("third", 0, again)],
    }.items():
        with ShardWriter(tmp_path / name) as writer:
            for key, number, data in samples:
                sample = source.read(number)
                writer.write(key, sample.record, sample.masks, {"mp4": data})
    for name, deep, kinds in (
        ("same", False, {"same_key": 1, "same_video": 1}),
        ("renamed", False, {"same_video": 1}),
        ("encoded", False, {}),
        ("encoded", True, {"look_alike": 2}),
    ):
        report = tmp_path / "report.json"
        result = _run(tmp_path / name, "--against", synth_folder, "--json", report, *(["--deep"] if deep else []))
        assert result.exit_code == ("same_video" in kinds), result.output
        found = json.loads(report.read_text())
        assert {kind: told["findings"] for kind, told in found["kinds"].items()} == kinds
        assert found["samples"] == len(ShardSet(tmp_path / name)), "without those that it is compared with"
        assert all(item["shard"] == str(tmp_path / name / "shard-000000.tar") for item in found["findings"])
        assert all(
            f"as 'synth_5_000000' in {synth_folder / 'shard-000000.tar'}" in f["value"] for f in found["findings"]
        )
    both = _run(synth_folder, tmp_path / "renamed")
    assert both.exit_code == 1, "folders given together are splits too"
    assert "'other' in" in both.stdout
    assert _run(tmp_path / "encoded").exit_code == 0, "and a folder by itself may repeat"


@pytest.mark.parametrize("crf", [18, 35])
def test_looks_survive_reencoding_and_tell_clips_apart(crf: int) -> None:
    looks = []
    for path in sorted(footage_dir().glob("*.mp4")):
        data = path.read_bytes()
        info = probe(data)
        frames = decode_frames(data, range(0, info.num_frames, 3))  # another rate
        small = [av.VideoFrame.from_ndarray(f, format="rgb24").reformat(width=320, height=180) for f in frames]
        other = encode_video(np.stack([frame.to_ndarray() for frame in small]), info.fps / 3, crf=crf)
        for video in (data, other):
            looks.append(check_video(video, "media[0]", (1, 1, 1, 1.0))[1])
    as_bits = np.array([np.unpackbits(np.frombuffer(look, np.uint8)) for look in looks])
    apart = (as_bits[:, None] != as_bits).sum(2)
    clip = np.arange(len(looks)) // 2
    same = clip == clip[:, None]
    assert apart[same].max() <= LIMIT
    assert apart[~same].min() > 2 * LIMIT


def test_near_looks_are_found_among_many() -> None:
    rng = np.random.default_rng(0)
    looks = rng.integers(0, 256, (20_000, 24), dtype=np.uint8)
    for i in range(100):  # 11 bits: none may be missed
        looks[19_000 + i] = looks[i]
        for bit in rng.permutation(192)[:11]:
            looks[19_000 + i, bit // 8] ^= 1 << bit % 8
    folders = np.repeat([0, 1], [19_000, 1_000])
    assert list(near_pairs(looks, folders)) == [(i, 19_000 + i, 11) for i in range(100)]
    assert list(near_pairs(looks, np.zeros(20_000, int))) == []


def test_a_decoder_that_takes_its_process_along_costs_one_sample(
    synth_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = tmp_path / "hook" / "sitecustomize.py"
    hook.parent.mkdir()
    hook.write_text(
        "import os, signal, swim.data_tools.validate as v\n"
        "real = v.check_video\n"
        "def check(data, *rest):\n"
        "    if data[-1] == 0x99: os.kill(os.getpid(), signal.SIGSEGV)\n"
        "    return real(data, *rest)\n"
        "v.check_video = check\n"
    )
    source = ShardSet(synth_folder)
    with ShardWriter(tmp_path / "s") as writer:
        for i in range(6):
            sample = source.read(i)
            writer.write(f"k{i}", sample.record, sample.masks, {"mp4": sample.media() + (b"\x99" if i == 3 else b"")})
    paths = [str(hook.parent), str(Path(__file__).parents[2])]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(paths))
    results = list(validate([ShardSet(tmp_path / "s")], options=Options(deep=True), jobs=2))
    assert [result.key for result in results] == [*(f"k{i}" for i in range(6)), ""]
    (finding,) = (finding for result in results for finding in result.findings)
    assert (finding.key, finding.kind) == ("k3", "crash")


def test_the_terminal_is_neither_flooded_nor_obeyed(synth_folder: Path, tmp_path: Path) -> None:
    sample = ShardSet(synth_folder).read(0)
    hostile = sample.record.model_copy(update={"license": "", "source": "unknown"})
    with ShardWriter(tmp_path / "s") as writer:
        for i in range(300):
            writer.write(f"k{i}", hostile, {}, {"mp4": b"x"})
    result = _run(tmp_path / "s", "--jobs", 2)
    assert result.exit_code == 0
    assert result.stdout.count("\n") < 30
    assert "warning license: 300" in result.stdout
    assert "... and 297 more" in result.stdout
    assert _run(tmp_path / "s", "--strict").exit_code == 1

    def change(record: dict[str, Any], _: dict[str, Any]) -> None:
        record["objects"][0]["id"] = "\x1b[2J"
        record["\ud800"] = "\x07"

    _write(tmp_path / "t", ShardSet(synth_folder), change)
    shown = _run(tmp_path / "t", "--json", tmp_path / "t.json")
    assert shown.exit_code == 1
    assert not set(shown.stdout) & {"\x1b", "\x07", "\ud800"}
    assert json.loads((tmp_path / "t.json").read_text())["errors"] == 1


def test_what_cannot_be_validated_is_one_message(synth_folder: Path, tmp_path: Path) -> None:
    for args in ((tmp_path,), (synth_folder, "--against", tmp_path / "none"), ("pipe:ls",)):
        result = _run(*args)
        assert result.exit_code == 2
        assert result.stderr.startswith("error: ")
        assert result.stderr.count("\n") == 1


def test_a_record_error_crosses_processes_with_its_parts() -> None:
    error = pickle.loads(pickle.dumps(RecordError.at("k", ("a.b", "is 3", "make it 2"))))
    assert (str(error), error.problem) == ("record 'k', a.b: is 3; make it 2", ("a.b", "is 3", "make it 2"))
