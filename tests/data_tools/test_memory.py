"""Promise: a process that reads a set over and over does not grow, and opening one costs its index and little more."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from loose_files import write_loose

from swim.data_tools.index import INDEX_VERSION
from swim.data_tools.shards import ShardSet
from swim.data_tools.synth import synthesise

# In a process of its own: the others' garbage is not counted.
# Huge pages, which Linux makes when it has the time, count in full however little of them is used.
READ = """
import ctypes, gc, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE
from pathlib import Path
from swim.data_tools.shards import ShardSet
from swim.data_tools.video import decode_frames

def rss():
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * {page}

shards = ShardSet(Path(sys.argv[1]))
def epoch():
    for number in range(len(shards)):
        sample = shards.read(number)
        assert decode_frames(sample.media(), [0, 1, 2, 3]).shape[0] == 4
epochs = {reads} // len(shards) // 3
sizes = []
for _ in range(4):
    for _ in range(epochs):
        epoch()
    sizes.append(rss())
print(*sizes)
"""

OPEN = """
import sys
from pathlib import Path
from swim.data_tools.shards import ShardSet

def rss():
    return int(Path("/proc/self/statm").read_text().split()[1]) * {page}

ShardSet(Path(sys.argv[1]), cache=Path(sys.argv[3]))
ShardSet(Path(sys.argv[2]), cache=Path(sys.argv[3]))  # its facts are cached from now on
"""


def run(code: str, *arguments: Path, **values: int) -> list[int]:
    filled = code.format(page=os.sysconf("SC_PAGE_SIZE"), **values)
    command = [sys.executable, "-c", filled, *map(str, arguments)]
    return [int(x) for x in subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()]


@pytest.mark.parametrize(("form", "reads"), [("shards", 3000), ("loose", 1500)])
def test_reading_and_decoding_for_epochs_does_not_grow(tmp_path: Path, form: str, reads: int) -> None:
    data = tmp_path / "shards"
    shards = synthesise(data, clips=50, seed=1, size=56, frames=4)
    if form == "loose":
        data = write_loose(tmp_path / "loose", shards)
        ShardSet(data)
    sizes = run(READ, data, reads=reads)
    # What is lost is lost in every part; an allocator that keeps more from some moment on does so once.
    grown = [after - before for before, after in itertools.pairwise(sizes)]
    assert min(grown) < 1 << 20, f"{[size >> 10 for size in grown]} KiB in the parts of {reads} reads"


def _indices(folder: Path, clips: int) -> int:
    """Write an index of so many clips; returns its size in bytes."""
    folder.mkdir()
    said = {"task": "where", "span": None, "num_mentions": 1, "num_mask_objects": 1, "num_chars": 30}
    facts = {"height": 448, "width": 796, "num_frames": 60, "fps": 6.0, "conversations": [said] * 4}
    members = {"json": [512, 300, 1], "masks.json": [1536, 300, 2], "mp4": [2560, 900_000, 3]}
    lines = [{"version": INDEX_VERSION, "shard": "a.tar", "size": 0}]
    lines += [{"key": f"clip-{i:08d}", "members": members, **facts} for i in range(clips)]
    (folder / "a.tar").touch()
    index = folder / "a.index.jsonl"
    index.write_text("".join(json.dumps(line, separators=(",", ":")) + "\n" for line in lines))
    return index.stat().st_size


def test_opening_costs_the_text_of_the_index(tmp_path: Path) -> None:
    size = _indices(tmp_path / "large", 60_000)
    _indices(tmp_path / "small", 10)
    code = OPEN + (
        "before = rss()\nshards = ShardSet(Path(sys.argv[2]), cache=Path(sys.argv[3]))\n"
        "for number in range(0, len(shards), 7):\n    shards.entries[number]\nprint(rss() - before)\n"
    )
    # The first two openings leave room in the allocator, so this one is in a process that made no facts.
    run(code, tmp_path / "small", tmp_path / "large", tmp_path / "cache")
    code = code.replace("ShardSet(Path(sys.argv[2]), cache=Path(sys.argv[3]))  # its", "# its")
    (grown,) = run(code, tmp_path / "small", tmp_path / "large", tmp_path / "cache")
    assert size > 20 << 20
    assert 0.8 * size < grown < 1.5 * size, f"{grown >> 10} KiB for an index of {size >> 10} KiB"
