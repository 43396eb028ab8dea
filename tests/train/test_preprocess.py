"""Promise: pixels and grids equal those of the stock video processors, without their torchvision."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize as stock_smart_resize
from transformers.models.qwen3_vl.video_processing_qwen3_vl import Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize as stock_clip_resize

from swim.data_tools.video import VideoError
from swim.train.config import DataConfig, TokenizerConfig
from swim.train.families import FAMILIES, Family, family_of
from swim.train.preprocess import Geometry, patchify, smart_resize
from swim.train.tokenizer import adopt_family, control_token_fields, train_tokenizer

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


# name: (frames, height, width); the odd shapes are stretched by the families that know one size only
CLIPS = {"landscape": (4, 250, 333), "small": (2, 61, 90), "tall": (6, 500, 120)}
MIN_PIXELS, MAX_PIXELS = 16 * 32**2, 60 * 32**2  # of a frame
# The stock processor of each family; a clip's budget is that of its frames for Qwen3-VL.
PROCESSORS = {
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}


def noise(count: int, height: int, width: int) -> np.ndarray:
    """Noise over a gradient: ringing of the resize and its clipping both matter."""
    rng = np.random.default_rng(height)
    ramp = np.linspace(0, 255, width)[None, None, :, None]
    return (ramp + rng.integers(-200, 200, (count, height, width, 3))).clip(0, 255).astype(np.uint8)


def write_case(folder: Path, name: str, frames: np.ndarray, processor: str, fields: dict[str, Any]) -> None:
    options = {"cap_pixels_per_frame": False} if processor.startswith("Qwen") else {}
    case = {"processor": processor, "fields": json.dumps(fields), "options": json.dumps(options)}
    np.savez(folder / f"{name}.case.npz", frames=frames, **case)


def stock_fields(model_type: str, num_frames: int) -> dict[str, Any]:
    """What the published checkpoints' processors are given, where the class's own defaults are not it."""
    if model_type == "internvl":
        return {
            "size": {"height": 448, "width": 448},
            "image_mean": [0.485, 0.456, 0.406],
            "image_std": [0.229, 0.224, 0.225],
        }
    scale = num_frames if model_type == "qwen3_vl" else 1
    budget = {"size": {"shortest_edge": scale * MIN_PIXELS, "longest_edge": scale * MAX_PIXELS}}
    return {} if model_type == "llava_onevision" else budget


def family(model_type: str) -> Family:
    """The adapter for the default config of a family, which is that of a published model."""
    tokenizer = train_tokenizer(TokenizerConfig())
    adopt_family(tokenizer, model_type)
    return family_of(AutoConfig.for_model(model_type, **control_token_fields(tokenizer, model_type)), tokenizer)


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torchvision = Path(os.environ.get("SWIM_TORCHVISION", ROOT / ".venv" / "torchvision"))
    if not (torchvision / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {torchvision}; make env puts one there, SWIM_TORCHVISION names another folder")
    folder = tmp_path_factory.mktemp("stock")
    for name, (*shape, geometry, min_pixels, max_pixels) in CASES.items():
        fields = {**geometry, "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels}}
        write_case(folder, name, noise(*shape), "Qwen2VLVideoProcessor", fields)
    for name, shape in CLIPS.items():
        for model_type, processor in PROCESSORS.items():
            write_case(folder, f"{name}-{model_type}", noise(*shape), processor, stock_fields(model_type, shape[0]))
    program = Path(__file__).with_name("stock_video_processor.py")
    environment = {**os.environ, "PYTHONPATH": str(torchvision)}
    done = subprocess.run([sys.executable, program, folder], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", CASES)
def test_patches_equal_the_stock_processors_bit_for_bit(stock, name):
    *shape, geometry, min_pixels, max_pixels = CASES[name]
    want = np.load(stock / f"{name}.stock.npz")
    patches, grid = patchify(noise(*shape), Geometry(**geometry), min_pixels=min_pixels, max_pixels=max_pixels)
    assert [list(grid)] == want["video_grid_thw"].tolist()
    assert patches.dtype == torch.float32
    assert torch.equal(patches, torch.from_numpy(want["pixel_values_videos"]))


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_pixels_of_every_family_equal_its_stock_processors_bit_for_bit(stock, model_type, name):
    want = np.load(stock / f"{name}-{model_type}.stock.npz")
    pixels, grid = family(model_type).pixels(noise(*CLIPS[name]), min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    expected = torch.from_numpy(want["pixel_values_videos"])
    if "video_grid_thw" in want:
        assert [[grid[0], 2 * grid[1], 2 * grid[2]]] == want["video_grid_thw"].tolist()
    else:
        side = {"llava_onevision": 14, "internvl": 16}[model_type]
        assert grid == (CLIPS[name][0], side, side)
        expected = expected[0]  # of the one clip
    assert torch.equal(pixels, expected)


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


@given(
    sides=st.tuples(st.integers(32, 3000), st.integers(32, 3000)),
    cells=st.tuples(SIDES, SIDES),
    frames=st.integers(1, 40).map(lambda n: 2 * n),
)
@example(sides=(80, 112), cells=(4, 768), frames=6)
def test_a_budget_per_frame_is_qwen3s_budget_per_clip(sides, cells, frames):
    """For clips of whole temporal patches whose frames hold at least one cell."""
    if max(sides) <= 200 * min(sides):
        limits = [count * 32**2 for count in sorted(cells)]
        whole = {"min_pixels": frames * limits[0], "max_pixels": frames * limits[1]}
        assert smart_resize(*sides, 32, *limits) == stock_clip_resize(frames, *sides, factor=32, **whole)


@given(
    stored=st.integers(1, 5000), fps=st.sampled_from([5, 6.25, 23.976, 24, 25, 29.97, 30, 60]), rate=st.floats(0.2, 9)
)
@example(stored=1, fps=25, rate=2)
@example(stored=3, fps=25, rate=2)
def test_the_number_of_frames_at_a_rate_is_qwen3s(stored, fps, rate):
    data = DataConfig(train=["x"], frame_sampling="fps", fps=rate, num_frames=64)
    video = SimpleNamespace(total_num_frames=stored, fps=fps)
    chosen = Qwen3VLVideoProcessor.sample_frames(SimpleNamespace(fps=rate, min_frames=4, max_frames=64), video)
    assert data.frames_of(stored, fps) == len(chosen)


def test_the_budget_of_a_clip_is_shared_by_its_frames():
    data = DataConfig(train=["x"], min_pixels=2000, max_pixels=9000, clip_pixels=80000)
    limits = {n: data.pixel_limits(n)["max_pixels"] for n in (1, 8, 10, 32, 64)}
    assert limits == {1: 9000, 8: 9000, 10: 8000, 32: 2500, 64: 2000}, "never below min_pixels"
    assert DataConfig(train=["x"]).pixel_limits(768)["max_pixels"] == 28 * 28 * 768


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
