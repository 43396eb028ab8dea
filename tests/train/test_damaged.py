"""Promise: a thousand samples damaged in every known way cost these thousand; order and all other samples stay as they
are, and each damage is named with its place and reason."""

import ctypes
import json
import os
import re
import signal
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import tiny_config

from swim.data_tools import video
from swim.data_tools.records import Record
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.synth import synthesise
from swim.train.loader import Loader, Order
from swim.train.system import Request, build_system

HTML = b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
SIZE = 56
GOOD = 150
# Kind of damage: number of samples, reason in the quarantine.
KINDS = {
    "bits": (200, r"member '(mp4|json|masks\.json)' has CRC32 0x\w+, the index says 0x\w+; copy the shard again"),
    "cut_video": (150, r"(cannot be read as video|cut off|can be decoded|is damaged).*fetch"),
    "empty_video": (100, r"cannot be read as video"),
    "html_video": (100, r"cannot be read as video"),
    "wrong_size": (100, r"its record says"),
    "bad_json": (100, r"JSON: .* got b'"),
    "bad_record": (90, r"unknown key 'turnz'; did you mean 'turns'"),
    "bad_rle": (100, r"masks\..*\[0\]: (the runs sum to|the RLE string ends|character)"),
    "bomb": (20, r"masks\..*\[0\]: .*(outside 1 to|characters of RLE|the limit)"),
    "endless": (15, r"took longer than 1 s \(data\.deadline_s\)(, twice)?$"),
    "crash": (25, r"ended with SIGSEGV(, twice)?$"),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """The same samples, whole and damaged; the key of a damaged one begins with the kind of its damage."""
    folder = tmp_path_factory.mktemp("damaged")
    source = synthesise(folder / "source", clips=5, seed=1, size=SIZE, frames=4)
    rng = np.random.default_rng(0)
    names = ["good"] * GOOD + [kind for kind, (count, _) in KINDS.items() for _ in range(count)]
    keys = [f"{name}-{number}" for number, name in enumerate(names)]
    rng.shuffle(keys)
    for name in ("whole", "damaged"):
        with ShardWriter(folder / name, max_bytes=3 << 20) as writer:
            for number, key in enumerate(keys):
                sample = source.read(number % len(source))
                data, record, masks = sample.media(), sample.record, sample.masks
                if name == "damaged":
                    data, record = with_damage(key.split("-")[0], data, record)
                writer.write(key, record, masks, {"mp4": data})
    damage_tars(folder / "damaged", rng)
    return folder / "whole", folder / "damaged"


def with_damage(kind: str, data: bytes, record: Record) -> tuple[bytes, Record]:
    """What a careless writer stores: its checksums are right."""
    match kind:
        case "cut_video":
            data = data[: len(data) * 2 // 3]
        case "empty_video":
            data = b""
        case "html_video":
            data = HTML
        case "endless" | "crash":
            data = kind.encode()
        case "wrong_size":
            media = record.media[0].model_copy(update={"height": 2 * SIZE, "width": 2 * SIZE})
            record = record.model_copy(update={"media": [media]})
    return data, record


def damage_tars(folder: Path, rng: np.random.Generator) -> None:
    """Damage inside the tars: with the index's checksums wrong for `bits`, and right for the texts."""
    for path in sorted(folder.glob("*.tar")):
        index = path.with_suffix("").with_suffix(".index.jsonl")
        lines = [json.loads(line) for line in index.read_text().splitlines()]
        tar = bytearray(path.read_bytes())
        for line in lines[1:]:
            kind, number = line["key"].split("-")
            if kind == "bits":
                start, size, _ = line["members"][("mp4", "json", "masks.json")[int(number) % 3]]
                for place in rng.integers(start, start + size, 5):
                    tar[place] ^= 1 << int(rng.integers(8))
            elif kind in ("bad_json", "bad_record", "bad_rle", "bomb"):
                member = "masks.json" if kind in ("bad_rle", "bomb") else "json"
                start, size, _ = line["members"][member]
                text = damaged_text(kind, bytes(tar[start : start + size]), int(number)).ljust(size)
                assert len(text) == size
                tar[start : start + size] = text
                line["members"][member][2] = zlib.crc32(text)
        path.write_bytes(tar)
        index.write_text("".join(json.dumps(line) + "\n" for line in lines))


def damaged_text(kind: str, text: bytes, number: int) -> bytes:
    match kind:
        case "bad_json":
            return (text[: len(text) // 2], b"\xff" + text[1:], HTML, b"[" * 200)[number % 4]
        case "bad_record":
            return text.replace(b'"turns"', b'"turnz"', 1)
    masks = json.loads(text)
    frames = next(iter(masks.values()))
    if kind == "bad_rle":
        wrong = np.zeros((SIZE, SIZE - 1), bool)
        counts = (encode_mask(wrong)["counts"], "o", "0\x7f", "")[number % 3]
        frames["0"] = {"size": [SIZE, SIZE], "counts": counts}
    else:
        size, counts = [([1 << 20, 1 << 20], "0"), ([SIZE, SIZE], "o" * 30 + "0")][number % 2]
        frames["0"] = {"size": size, "counts": counts}
    return json.dumps(dict([next(iter(masks.items()))]), separators=(",", ":")).encode()


@pytest.fixture
def hostile_decoder(monkeypatch):
    """A decoder that never returns, or crashes, on some bytes."""
    decode = video.decode_frames

    def hostile(source, *args, **kwargs):
        if source == b"endless":
            ctypes.PyDLL(None).sleep(1000)
        if source == b"crash":
            signal.signal(signal.SIGSEGV, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGSEGV)
        return decode(source, *args, **kwargs)

    monkeypatch.setattr("swim.train.systems.swim.data.decode_frames", hostile)


@pytest.mark.usefixtures("hostile_decoder")
def test_a_thousand_damaged_samples_cost_a_thousand_samples(folders):
    assert sum(count for count, _ in KINDS.values()) == 1000
    whole, damaged = folders
    options = ("data.tasks=null", "data.max_conversations=1", "data.clips_per_pack=4", "data.num_frames=2")
    config = tiny_config(damaged, *options)
    system = build_system(config)
    order, clean = Order(config), ShardSet(whole)
    plan = order.plan(0)
    with Loader(order, system.collator, workers=2, deadline_s=1, prefetch=8) as loader:
        batches = [batch for step in loader.steps(0, plan.num_steps) for batch in step]
    packs = [plan.pack(i) for i in range(plan.num_packs)]
    assert len(batches) == len(packs) + len(packs) % config.data.packs_per_step
    keys = [entry.key for entry in order.shards[0].entries]
    holes = []
    for pack, batch in zip(packs, batches):
        good = [unit for unit in pack if keys[unit.clip].startswith("good-")]
        assert batch.ids == [f"{keys[unit.clip]}#{i}" for unit in good for i in unit.conversations]
        expected = system.collator(Request(clean.read(unit.clip), unit.conversations) for unit in good)
        for name, value in expected.inputs.items():
            assert torch.equal(batch.inputs[name], value), name
        assert torch.equal(batch.labels, expected.labels)
        holes += batch.holes
    check_holes(holes, order.shards[0])


def check_holes(holes, shards: ShardSet) -> None:
    entries = {entry.key: entry for entry in shards.entries}
    names = [hole.id.split("#")[0] for hole in holes]
    assert sorted(names) == sorted(key for key in entries if not key.startswith("good-")), "each once"
    for hole, name in zip(holes, names):
        entry = entries[name]
        assert hole.shard == entry.shard
        assert hole.offset in {place[0] for place in entry.members.values()}
        assert re.search(KINDS[name.split("-")[0]][1], hole.reason), (name, hole.reason)


def test_a_tar_cut_in_half_under_a_run_costs_what_lay_behind_the_cut(tmp_path):
    folder = tmp_path / "cut"
    shards = synthesise(folder, clips=12, seed=2, size=SIZE, frames=4)
    config = tiny_config(folder, "data.tasks=null", "data.max_conversations=1", "data.clips_per_pack=1")
    system, order = build_system(config), Order(config)
    (path,) = folder.glob("*.tar")
    cut = path.stat().st_size // 2
    os.truncate(path, cut)
    with Loader(order, system.collator, workers=1, deadline_s=30) as loader:
        batches = [batch for step in loader.steps(0, order.plan(0).num_steps) for batch in step]
    lost = {hole.id.split("#")[0] for batch in batches for hole in batch.holes}
    behind = {e.key for e in shards.entries if any(offset + size > cut for offset, size, _ in e.members.values())}
    assert lost == behind
    assert 0 < len(lost) < 12
    assert {i.split("#")[0] for batch in batches for i in batch.ids} == {e.key for e in shards.entries} - behind
    assert all("copy the shard again" in hole.reason for batch in batches for hole in batch.holes)


def test_memory_does_not_grow_over_an_epoch(tmp_path):
    """Neither in the trainer nor in its worker, whose pages are counted by itself."""
    folder = tmp_path / "clips"
    source = synthesise(tmp_path / "source", clips=4, seed=1, size=SIZE, frames=4)
    with ShardWriter(folder) as writer:
        for number in range(600):
            sample = source.read(number % 4)
            writer.write(f"c{number}", sample.record, sample.masks, {"mp4": sample.media()})
    config = tiny_config(folder, "data.tasks=null", "data.max_conversations=2", "data.num_frames=2")
    system = build_system(config)

    class Weighed:
        def __call__(self, requests):
            batch = system.collator(requests)
            batch.counts["worker_mib"] = resident_mib()
            return batch

    with Loader(Order(config), Weighed(), workers=1) as loader:
        weights = []
        for step in loader.steps(0, 300):
            weights.append((resident_mib(), step[0].counts["worker_mib"]))
    # What is lost is lost in every part; an allocator that keeps more from some moment on does so once.
    parts = [np.median(weights[end - 30 : end], axis=0) for end in (90, 160, 230, 300)]
    assert (np.diff(parts, axis=0).min(0) < 1).all(), parts


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20
