"""What masks, reads, decoding and planning cost on this machine, and in proportion to usual ways: `swim data bench`.

Times are CPU time of this process, the least of some rounds; the ways that are compared take turns.
"""

import importlib.util
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np
from pycocotools import mask as coco

from swim.data_tools.facts import Facts
from swim.data_tools.mixture import DataSet, PlanOptions
from swim.data_tools.packing import Lengths, TokenModel
from swim.data_tools.plan import make_plan
from swim.data_tools.reencode import reencode
from swim.data_tools.rle import clip_coverage, encode_mask
from swim.data_tools.shards import ShardSet
from swim.data_tools.video import Decoder, DecoderMissing, check_decoder, choose_frames, decode_frames, probe

CELL = 28  # pixels of a visual token of the Qwen2-VL families
MASKS = {"360p": (360, 640), "720p": (720, 1280), "1080p": (1080, 1920)}
FRAMES, OBJECTS = 16, 2
CANONICAL_SIDE = 448
SHORTEST = 0.02  # seconds; a way that takes less is repeated
NUM_PACKED, NUM_PLANNED = 200_000, 1_000_000
BUDGET, PACKS, RANKS = 8192, 32, 8


def measure(ways: Mapping[str, Callable[[], object]], rounds: int = 5) -> dict[str, float]:
    """Seconds of CPU time of each way."""
    seconds = dict.fromkeys(ways, float("inf"))
    for _ in range(rounds):
        for name, way in ways.items():
            began, count = time.process_time(), 0
            while (spent := time.process_time() - began) < SHORTEST or not count:
                way()
                count += 1
            seconds[name] = min(seconds[name], spent / count)
    return seconds


def bench_masks(height: int, width: int, rounds: int = 5) -> dict[str, float]:
    """Microseconds a mask from run lengths to the grid, by `clip_coverage` and by the usual way, and their ratio.

    The usual way decodes with pycocotools and takes the area by two matrix products in float32: exact, and faster than
    PIL's or torch's area resize. One clip of 16 frames with 2 objects of wavy outline.
    """
    grid = round(height / CELL), round(width / CELL)
    rles = [encode_mask(_wavy(height, width, number)) for number in range(FRAMES * OBJECTS)]
    stored = [{"size": list(rle["size"]), "counts": rle["counts"].encode()} for rle in rles]
    down, across = _overlap(grid[0], height), _overlap(grid[1], width).T.copy()

    def usual() -> np.ndarray:
        return np.stack([down @ coco.decode(rle).astype(np.float32) @ across for rle in stored])

    def ours() -> np.ndarray:
        return clip_coverage(rles, grid)

    assert np.abs(ours() - usual()).max() < 1e-5
    seconds = measure({"ours": ours, "usual": usual}, rounds)
    found = {name: 1e6 * spent / len(rles) for name, spent in seconds.items()}
    return found | {"ratio": found["usual"] / found["ours"]}


def bench_reads(shards: ShardSet, limit: int = 1000, rounds: int = 7) -> dict[str, float | None]:
    """Samples per second: all members at random by the index, the same with checksums, and streamed by webdataset
    (None if it is not installed).

    All ways read the same samples: the first `limit` of the folder.
    """
    entries, folder = shards.entries[:limit], Path(shards.folder)
    order = np.random.default_rng(0).permutation(len(entries)).tolist()
    files = {name: os.open(folder / name, os.O_RDONLY) for name in {entry.shard for entry in entries}}

    def at_random() -> None:
        for number in order:
            entry = entries[number]
            for offset, size, _ in entry.members.values():
                os.pread(files[entry.shard], size, offset)

    def checked() -> None:
        for number in order:
            for member in entries[number].members:
                shards.read_member(number, member)

    ways: dict[str, Callable[[], object]] = {"at random": at_random, "at random, checked": checked}
    if importlib.util.find_spec("webdataset"):
        import webdataset

        urls = [str(folder / name) for name in sorted(files)]

        def streamed() -> None:
            found = webdataset.WebDataset(urls, shardshuffle=False, empty_check=False)
            assert sum(1 for _, _ in zip(range(len(entries)), found)) == len(entries)

        ways["streamed"] = streamed
    seconds = measure(ways, rounds)
    for file in files.values():
        os.close(file)
    found: dict[str, float | None] = {name: len(entries) / spent for name, spent in seconds.items()}
    return {"streamed": None, **found}


def bench_decoders(shards: ShardSet, clips: int = 2, rounds: int = 3) -> dict[str, dict[str, float | None]]:
    """Milliseconds for 16 frames of a clip, per decoder (None if it is not installed), of videos as they are stored and
    in canonical form."""
    found: dict[str, dict[str, float | None]] = {"stored": {}, "canonical": {}}
    stored = [shards.read(i).media() for i in range(min(clips, len(shards))) if shards.entries[i].num_frames]
    forms = {"stored": stored, "canonical": [reencode(data, CANONICAL_SIDE)[0] for data in stored]} if stored else {}
    for form, videos in forms.items():
        chosen = [choose_frames(probe(data).num_frames, FRAMES) for data in videos]
        for decoder in get_args(Decoder):
            try:
                check_decoder(decoder)
            except DecoderMissing:
                found[form][decoder] = None
                continue

            def decode(decoder: Decoder = decoder) -> None:
                for data, frames in zip(videos, chosen):  # noqa: B023 - called at once
                    decode_frames(data, frames, decoder=decoder)

            found[form][decoder] = 1e3 * measure({decoder: decode}, rounds)[decoder] / len(videos)
    return found


def bench_plan(clips: int) -> dict[str, float]:
    """Seconds that a plan of so many clips with log-normal numbers of tokens takes, how full its packs are, and the
    cost of the costliest of 8 ranks over their mean."""
    rng = np.random.default_rng(0)
    tokens = np.minimum(rng.lognormal(6.8, 0.7, clips), 7000).astype(np.int64)
    zeros, ones = np.zeros(clips, np.int64), np.ones(clips, np.int64)
    facts = Facts(ones, np.arange(clips) // 1000, np.ones((clips, 2), np.int64), ones, ones, np.array(["ask"]), zeros)
    lengths = Lengths(tokens, rng.integers(20, 60, clips), zeros, tokens * 1.2e10 * (1 + tokens / BUDGET))
    model = TokenModel((lengths,), True, 3, 1.3e10, 4e5, "t")
    options = PlanOptions(packs_per_step=PACKS, seed=0, tokens_per_pack=BUDGET)
    began = time.process_time()
    plan = make_plan([DataSet("x", "x", facts, [])], options, 0, model)
    seconds = time.process_time() - began
    assert plan.tokens is not None
    return {
        "seconds": seconds,
        "fill": float(plan.tokens.mean() / BUDGET),
        "balance": float(plan.balance(RANKS).mean()),
    }


def bench(shards: ShardSet) -> dict[str, Any]:
    """All of it, and the machine it was measured on."""
    return {
        "machine": {"cores": len(os.sched_getaffinity(0)), "numba": importlib.util.find_spec("numba") is not None},
        "masks": {name: bench_masks(*size) for name, size in MASKS.items()},
        "reads": bench_reads(shards),
        "decoders": bench_decoders(shards),
        "packs": bench_plan(NUM_PACKED),
        "plan": bench_plan(NUM_PLANNED),
    }


def table(found: Mapping[str, Any]) -> str:
    """The results of `bench`, and of a recipe if there are any, as lines."""
    machine = found["machine"]
    lines = [
        f"{machine['cores']} CPU cores, {'with' if machine['numba'] else 'without'} numba; CPU time, least of rounds"
    ]
    for name, of in found["masks"].items():
        usual = f"decoded and resized {of['usual']:8.1f} us: {of['ratio']:.1f} x"
        lines.append(f"mask to grid, {name:22} {of['ours']:8.1f} us, {usual}")
    reads = found["reads"]
    streamed = reads["streamed"]
    for name in ("at random", "at random, checked"):
        ratio = f"{reads[name] / streamed:.1f} x" if streamed else "webdataset is not installed"
        lines.append(f"{'reads ' + name:36} {reads[name]:8.0f} samples/s, streamed {streamed or 0:8.0f}: {ratio}")
    for form, of in found["decoders"].items():
        for decoder, spent in of.items():
            what = f"{FRAMES} frames, {form}, {decoder}"
            lines.append(f"{what:36} " + ("not installed" if spent is None else f"{spent:8.1f} ms"))
    packs, plan = found["packs"], found["plan"]
    lines.append(
        f"{f'packs of {NUM_PACKED:,} clips':36} {packs['fill']:8.2%} full, costliest rank / mean {packs['balance']:.4f}"
    )
    lines.append(f"{f'plan of {NUM_PLANNED:,} clips':36} {plan['seconds']:8.2f} s")
    if recipe := found.get("recipe"):
        lines += [f"{'sample, ' + stage:36} {1e3 * spent:8.1f} ms" for stage, spent in recipe["seconds"].items()]
        lines.append(f"{'tokens of a sample':36} {recipe['tokens']:8.0f}")
        step = f"{recipe['samples_per_step']} samples in {recipe['step_seconds']:.3g} s ({recipe['step_seconds_are']})"
        lines.append(f"{'CPU cores per GPU':36} {recipe['cores']:8.2f} for {step}")
    return "\n".join(lines)


def _wavy(height: int, width: int, number: int) -> np.ndarray:
    rng = np.random.default_rng(number)
    y, x = np.mgrid[:height, :width]
    y, x = y - rng.uniform(0.3, 0.7) * height, x - rng.uniform(0.3, 0.7) * width
    angle, radius = np.arctan2(y, x), rng.uniform(0.1, 0.25) * height
    return np.hypot(y, x) < radius * (1 + 0.3 * np.sin(3 * angle + number) + 0.1 * np.sin(17 * angle))


def _overlap(cells: int, pixels: int) -> np.ndarray:
    """Share of each cell [cells, pixels] that each pixel is."""
    edges = np.arange(cells + 1)[:, None] * pixels / cells
    shares = np.diff(np.clip(edges - np.arange(pixels), 0, 1), axis=0) * cells / pixels
    return shares.astype(np.float32)
