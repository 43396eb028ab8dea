"""Measures masks, reads and plans against their limits; `swim data bench` measures the same on any shards. `make bench`
prints it."""

from pathlib import Path

import numpy as np
import pytest

from swim.data_tools.bench import MASKS, bench_masks, bench_plan, bench_reads
from swim.data_tools.records import Conversation, Media, Object, Record, Rle, Turn
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import ShardSet, ShardWriter

pytestmark = pytest.mark.bench


def test_masks_reach_the_grid_twenty_times_faster_than_by_decoding() -> None:
    found = {name: bench_masks(*size) for name, size in MASKS.items()}
    print(f"\n{found}")
    assert found["720p"]["ratio"] >= 20
    assert found["1080p"]["ratio"] >= 20


def test_reads_at_random_are_three_times_faster_than_a_stream(tmp_path: Path) -> None:
    """Of 400 samples of 0.8 MiB; with checksums too, which the stream has none of, they are not slower than half of
    it."""
    media = [Media(member="mp4", kind="video", height=720, width=1280, num_frames=60, fps=6)]
    turns = [Turn(role="user", text="where is it ?"), Turn(role="assistant", text="there")]
    record = Record(
        source="bench",
        license="CC0-1.0",
        media=media,
        objects=[Object(id="a", label="a")],
        conversations=[Conversation(task="ask", turns=turns)],
    )
    rng = np.random.default_rng(0)
    masks = {"a": {frame: Rle(**encode_mask(rng.random((72, 128)) < 0.02)) for frame in range(60)}}
    with ShardWriter(tmp_path, max_bytes=100 << 20) as writer:
        for number in range(400):
            writer.write(f"clip{number}", record, masks, {"mp4": rng.bytes(800_000)})
    found = bench_reads(ShardSet(tmp_path))
    print(f"\n{found}")
    assert found["at random"] >= 3 * found["streamed"]
    assert found["at random, checked"] >= found["streamed"] / 2


def test_packs_are_full_and_balanced_and_a_plan_takes_seconds() -> None:
    packs, plan = bench_plan(200_000), bench_plan(1_000_000)
    print(f"\n{packs}\n{plan}")
    assert packs["fill"] >= 0.985
    assert packs["balance"] <= 1.03
    assert plan["seconds"] < 5
