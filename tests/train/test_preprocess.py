"""Promise: pixels and grids equal those of the stock video processor, without its torchvision."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as stock_smart_resize

from swim.data_tools.video import VideoError
from swim.train.preprocess import Geometry, patchify, smart_resize

ROOT = Path(__file__).parents[2]
QWEN = {"patch_size": 14, "merge_size": 2, "temporal_patch_size": 2}
TINY = {"patch_size": 7, "merge_size": 2, "temporal_patch_size": 2}
# name: (frames, height, width, geometry, min_pixels, max_pixels)
CASES = {
    "shrunk": (4, 250, 333, QWEN, 4 * 28**2, 40 * 28**2),
    "enlarged": (2, 40, 61, QWEN, 16 * 28**2, 768 * 28**2),
    "kept": (2, 56, 84, QWEN, 4 * 28**2, 768 * 28**2),
    "rounded": (2, 100, 99, QWEN, 4 * 28**2, 768 * 28**2),
    "odd": (3, 112, 90, TINY, 112**2, 112**2),
    "one_frame": (1, 56, 56, QWEN, 4 * 28**2, 768 * 28**2),
    "long": (2, 30, 700, TINY, 14**2, 60 * 14**2),
    "deep": (6, 64, 48, {"patch_size": 8, "merge_size": 1, "temporal_patch_size": 4}, 64, 64 * 48),
}


def frames_of(name: str) -> np.ndarray:
    """Noise over a gradient: ringing of the resize and its clipping both matter."""
    count, height, width, *_ = CASES[name]
    rng = np.random.default_rng(len(name))
    ramp = np.linspace(0, 255, width)[None, None, :, None]
    return (ramp + rng.integers(-200, 200, (count, height, width, 3))).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torchvision = Path(os.environ.get("SWIM_TORCHVISION", ROOT / ".venv" / "torchvision"))
    if not (torchvision / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {torchvision}; make env puts one there, SWIM_TORCHVISION names another folder")
    folder = tmp_path_factory.mktemp("stock")
    for name, (_, _, _, geometry, min_pixels, max_pixels) in CASES.items():
        frames = frames_of(name)
        np.savez(folder / f"{name}.case.npz", frames=frames, min_pixels=min_pixels, max_pixels=max_pixels, **geometry)
    program = Path(__file__).with_name("stock_video_processor.py")
    environment = {**os.environ, "PYTHONPATH": str(torchvision)}
    done = subprocess.run([sys.executable, program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_the_stock_processors_bit_for_bit(stock, name):
    _, _, _, geometry, min_pixels, max_pixels = CASES[name]
    want = np.load(stock / f"{name}.stock.npz")
    patches, grid = patchify(frames_of(name), Geometry(**geometry), min_pixels=min_pixels, max_pixels=max_pixels)
    assert [list(grid)] == want["grid"].tolist()
    assert patches.dtype == torch.float32
    assert torch.equal(patches, torch.from_numpy(want["pixels"]))


SIDES = st.integers(1, 3000)


@given(height=SIDES, width=SIDES, cell=st.sampled_from([14, 28, 32]), cells=st.tuples(SIDES, SIDES))
@example(height=42, width=70, cell=28, cells=(4, 768))  # halves, which round to even
@example(height=1, width=200, cell=28, cells=(1, 3000))  # the longest shape there is
@example(height=28, width=2800, cell=28, cells=(1, 10))  # a side that would shrink below one cell
def test_sizes_equal_the_stock_rule(height, width, cell, cells):
    limits = [count * cell**2 for count in sorted(cells)]
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(VideoError, match=f"frame of {width}x{height} pixels has an aspect ratio beyond 200; crop"):
            smart_resize(height, width, cell, *limits)
    else:
        assert smart_resize(height, width, cell, *limits) == stock_smart_resize(height, width, cell, *limits)


def test_an_odd_last_frame_is_repeated():
    geometry, pixels = Geometry(**TINY), 56**2
    frames = np.random.default_rng(0).integers(0, 256, (3, 56, 56, 3), dtype=np.uint8)
    odd, grid = patchify(frames, geometry, min_pixels=pixels, max_pixels=pixels)
    even, _ = patchify(frames[[0, 1, 2, 2]], geometry, min_pixels=pixels, max_pixels=pixels)
    assert grid == (2, 8, 8)
    assert torch.equal(odd, even)


def test_a_patch_row_holds_the_pixels_of_its_place():
    """Rows run over merge x merge blocks; values over channel, frame, row, column. No resize, so pixels stay exact."""
    geometry = Geometry(**TINY, image_mean=(0, 0, 0), image_std=(1, 1, 1))
    frames = np.random.default_rng(1).integers(0, 256, (4, 28, 42, 3), dtype=np.uint8)
    patches, (steps, rows, columns) = patchify(frames, geometry, min_pixels=28 * 42, max_pixels=28 * 42)
    assert (steps, rows, columns) == (2, 4, 6)
    places = [
        (t, 2 * block_row + row, 2 * block_column + column)
        for t in range(2)
        for block_row in range(2)
        for block_column in range(3)
        for row in range(2)
        for column in range(2)
    ]
    for patch, (t, row, column) in zip(patches, places):
        pixels = frames[2 * t : 2 * t + 2, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7]
        want = torch.from_numpy(pixels.transpose(3, 0, 1, 2).reshape(-1).astype(np.float32)) / 255
        torch.testing.assert_close(patch, want)
