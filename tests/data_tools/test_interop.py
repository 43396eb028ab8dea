"""Promise: our shards are plain tars that other readers take as they are; equal samples give equal bytes anywhere."""

import hashlib
import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import webdataset

from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.synth import synthesise

ROOT = Path(__file__).parents[2]
ENERGON = Path(os.environ.get("SWIM_ENERGON_ENV", ROOT / ".venv" / "energon")) / "bin"


def _split(source: ShardSet, folder: Path, numbers: range) -> ShardSet:
    """Some of the samples, two to three in a shard."""
    with ShardWriter(folder, max_bytes=60_000) as writer:
        for sample in map(source.read, numbers):
            writer.write(sample.key, sample.record, sample.masks, {"mp4": sample.media()})
    return ShardSet(folder)


def test_webdataset_reads_every_byte_of_every_member_in_order(synth_folder: Path, tmp_path: Path) -> None:
    shards = _split(ShardSet(synth_folder), tmp_path / "s", range(6))
    tars = sorted(map(str, (tmp_path / "s").glob("*.tar")))
    assert len(tars) > 1
    seen = list(webdataset.WebDataset(tars, shardshuffle=False))
    assert [item["__key__"] for item in seen] == shards.keys()
    for number, item in enumerate(seen):
        members = {name: data for name, data in item.items() if not name.startswith("__")}
        assert list(members) == list(shards.entries[number].members) == ["json", "masks.json", "mp4"]
        for name, data in members.items():
            assert data == shards.read_member(number, name)


def test_members_have_the_names_sizes_and_plain_headers_that_any_tar_has(synth_folder: Path) -> None:
    (path,) = synth_folder.glob("*.tar")
    shards = ShardSet(synth_folder)
    with tarfile.open(path) as tar:
        infos = tar.getmembers()
    expected = {f"{e.key}.{name}": place for e in shards.entries for name, place in e.members.items()}
    assert {info.name: (info.offset_data, info.size) for info in infos} == {n: p[:2] for n, p in expected.items()}
    assert {(info.uid, info.gid, info.uname, info.gname, info.mode, info.mtime) for info in infos} == {
        (0, 0, "", "", 0o644, 0)
    }
    assert all(info.isreg() and not info.pax_headers for info in infos)


def test_shards_do_not_depend_on_umask_time_zone_locale_hash_seed_or_folder(tmp_path: Path) -> None:
    code = (
        "import os, sys, time\n"
        "os.umask(int(sys.argv[2], 8))\n"
        "now = float(sys.argv[3]); time.time = lambda: now\n"
        "from swim.data_tools.synth import synthesise\n"
        "synthesise(sys.argv[1], clips=3, seed=9)\n"
    )
    found = []
    for umask, now, zone, locale in (("000", "0", "Asia/Tokyo", "C"), ("077", "4e9", "America/Lima", "de_DE.UTF-8")):
        out = tmp_path / zone
        env = {**os.environ, "TZ": zone, "LC_ALL": locale, "PYTHONHASHSEED": umask.lstrip("0") or "0"}
        env["PYTHONPATH"] = str(ROOT)
        subprocess.run([sys.executable, "-c", code, str(out), umask, now], env=env, cwd=tmp_path, check=True)
        found.append({path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(out.iterdir())})
    assert found[0] == found[1]
    assert list(found[0]) == ["shard-000000.index.jsonl", "shard-000000.tar"]


PREPARE = [
    *(str(ENERGON / "energon"), "prepare", "--non-interactive", "--no-progress", "--num-workers", "1"),
    # A crude set, which a user's own code would cook, has nothing that `lint` could load: one with a field map has.
    *("--sample-type", "TextSample", "--field-map", '{"text": "json"}'),
]


def _energon(*arguments: str, cwd: Path) -> str:
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run([*arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout


needs_energon = pytest.mark.skipif(
    not (ENERGON / "energon").exists(),
    reason=f"{ENERGON / 'energon'} is not there; run 'make energon-env', or set SWIM_ENERGON_ENV to that folder",
)


@pytest.mark.slow
@needs_energon
def test_energon_prepares_lints_and_reads_the_same(tmp_path: Path) -> None:
    source = synthesise(tmp_path / "source", clips=9, seed=4)
    folder = tmp_path / "set"
    parts = {"train": _split(source, folder / "train", range(6)), "val": _split(source, folder / "val", range(6, 9))}
    splits = [arg for name in parts for arg in ("--split-parts", f"{name}:{name}/.*")]
    told = _energon(*PREPARE, *splits, str(folder), cwd=tmp_path)
    (types,) = re.findall(r"part types in the dataset: (.*)", told)
    assert set(types.split(", ")) == {"json", "mp4", "masks.json"}
    split = (folder / ".nv-meta" / "split.yaml").read_text()
    assert re.findall(r"- (\w+)/shard", split) == ["train", "val"]
    info = _energon(str(ENERGON / "energon"), "info", str(folder), cwd=tmp_path)
    assert f"({len(source)} samples, " in info
    for name, shards in parts.items():
        share = round(100 * len(shards) / len(source))
        assert f"`{name}`: {share}%, {len(shards)} samples in {len(list((folder / name).glob('*.tar')))} shards" in info
    _energon(str(ENERGON / "energon"), "lint", "--split-parts", "train,val", str(folder), cwd=tmp_path)

    places = {
        f"{entry.key}.{name}": (shards, number, name)
        for shards in parts.values()
        for number, entry in enumerate(shards.entries)
        for name in entry.members
    }
    reader = [str(ENERGON / "python"), str(ROOT / "tests" / "energon_reader.py"), str(folder), json.dumps(list(places))]
    read = json.loads(_energon(*reader, cwd=tmp_path).splitlines()[-1])
    for name, (shards, number, member) in places.items():
        assert read["members"][name] == hashlib.sha256(shards.read_member(number, member)).hexdigest()
    # Energon's own key of a sample has its shard before it.
    records = {key.rpartition("/")[2]: value for key, value in read["records"].items()}
    assert records == {
        entry.key: [part, json.loads(shards.read_member(number, "json"))]
        for part, shards in parts.items()
        for number, entry in enumerate(shards.entries)
    }
    assert [shards.digest for shards in parts.values()] == [ShardSet(folder / part).digest for part in parts]


@pytest.mark.slow
@needs_energon
def test_energon_splits_our_tars_by_ratio(synth_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    shards = _split(ShardSet(synth_folder), folder, range(6))
    tars = sorted(path.name for path in folder.glob("*.tar"))
    _energon(*PREPARE, "--split-ratio", "1,1,1", str(folder), cwd=tmp_path)
    info = _energon(str(ENERGON / "energon"), "info", str(folder), cwd=tmp_path)
    found = re.findall(r"`(\w+)`: \d+%, (\d+) samples in (\d+) shards", info)
    assert [name for name, _, _ in found] == ["train", "val", "test"]
    assert sum(int(samples) for _, samples, _ in found) == len(shards)
    assert sum(int(number) for _, _, number in found) == len(tars)
    _energon(str(ENERGON / "energon"), "lint", str(folder), cwd=tmp_path)
