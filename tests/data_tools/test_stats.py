"""Promise: the numbers of `swim data stats` are counts of what the records say."""

import json
import shutil
from pathlib import Path

from typer.testing import CliRunner, Result

from swim.data_tools.cli import app
from swim.data_tools.records import Rle
from swim.data_tools.rle import encode_counts
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.synth import synthesise


def _stats(*args: object) -> Result:
    return CliRunner().invoke(app, ["stats", *map(str, args)])


def test_numbers_are_those_counted_by_hand(tmp_path: Path) -> None:
    made = synthesise(tmp_path / "made", clips=3, seed=4, frames=8, hidden=0)
    folder = tmp_path / "s"
    empty = Rle(**encode_counts((112, 112), [112 * 112]))
    with ShardWriter(folder) as writer:
        for number in range(3):
            sample = made.read(number)
            masks = {name: dict(frames) for name, frames in sample.masks.items()}
            names = list(masks)
            if number == 0:
                masks[names[0]] = {0: None, 1: empty, 2: masks[names[1]][0]}  # 2 absent, 1 seen, 5 not annotated
                del masks[names[1]]  # 8 not annotated
            update = {"source": "[red]odd", "license": "MIT"} if number == 2 else {}
            writer.write(sample.key, sample.record.model_copy(update=update), masks, {"mp4": sample.media()})
    shards = ShardSet(folder)
    members = shards.entries[0].members, shards.entries[1].members, shards.entries[2].members
    size = sum(member[1] for of_clip in members for member in of_clip.values())
    seen = sum(
        rle is not None and rle.counts != empty.counts
        for i in range(3)
        for frames in shards.read(i).masks.values()
        for rle in frames.values()
    )
    result = _stats(folder, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["clips"], found["objects"], found["bytes"], found["bad"]) == (3, 9, size, [])
    # A question about direction and one about colour for each of three objects, two about existence, a description.
    assert found["conversations"] == {"direction": 9, "colour": 9, "existence": 6, "describe": 3}
    assert found["mentions"] == {"noun": 9 + 9 + 6 + 2 * 3}
    assert found["masks"] == {"present": seen, "absent": 72 - 13 - seen, "not annotated": 13}
    assert found["masks"]["absent"] >= 2
    assert found["sources"] == {"synth": 2, "[red]odd": 1}
    assert found["licenses"] == {"CC0-1.0": 2, "MIT": 1}
    assert found["quantiles"]["num_frames"] == dict.fromkeys(("min", "10 %", "median", "90 %", "max"), 8.0)
    assert set(found["quantiles"]["width"].values()) == {112.0}
    table = _stats(folder).stdout
    for said in ("[red]odd", "not annotated", f"{size:,}", f"{13 / 72:.1%}"):
        assert said in table


def test_quantiles_are_over_clips(tmp_path: Path) -> None:
    for frames in (4, 6, 16):
        synthesise(tmp_path / str(frames), clips=1, seed=frames, frames=frames)
        for path in (tmp_path / str(frames)).iterdir():
            (tmp_path / "s").mkdir(exist_ok=True)
            shutil.copy(path, tmp_path / "s" / path.name.replace("shard-000000", f"shard-{frames:06d}"))
    for path in (tmp_path / "s").glob("*.jsonl"):
        path.unlink()
    assert CliRunner().invoke(app, ["index", str(tmp_path / "s")]).exit_code == 0
    found = json.loads(_stats(tmp_path / "s", "--json").stdout)["quantiles"]["num_frames"]
    assert (found["min"], found["median"], found["max"]) == (4, 6, 16)


def test_bad_samples_are_named_and_not_counted(synth_folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(synth_folder, tmp_path / "copy"))
    entry = ShardSet(copied).entries[1]
    path = copied / entry.shard
    data = bytearray(path.read_bytes())
    data[entry.members["masks.json"][0] + 3] ^= 1
    path.write_bytes(data)
    result = _stats(copied, "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["clips"] == 5
    assert [entry.key in problem and "CRC32" in problem for problem in found["bad"]] == [True]
    assert found["bad"][0] in _stats(copied).stdout
