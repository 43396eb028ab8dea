"""Grid coverage straight from runs is exact, and damaged run-length strings are refused."""

import json
from collections.abc import Callable

import numpy as np
import pytest
from footage import footage_dir
from pycocotools import mask as coco

from swim.data_tools import rle as rle_module
from swim.data_tools.rle import (
    clip_coverage,
    decode_counts,
    decode_mask,
    encode_counts,
    encode_mask,
    encode_polygons,
)

RNG = np.random.default_rng(0)


def _exact(mask: np.ndarray, grid: tuple[int, int], crop: tuple[float, ...] | None = None) -> np.ndarray:
    """Covered share of each cell by overlap matrices over the decoded mask: another way to the same numbers."""
    top, left, bottom, right = crop or (0, 0, *mask.shape)

    def overlap(cells: int, pixels: int, first: float, last: float) -> np.ndarray:
        edges = first + np.arange(cells + 1)[:, None] * (last - first) / cells
        below = np.clip(edges - np.arange(pixels), 0, 1)
        return np.diff(below, axis=0) * cells / (last - first)

    down = overlap(grid[0], mask.shape[0], top, bottom)
    return down @ mask.astype(float) @ overlap(grid[1], mask.shape[1], left, right).T


def _one_pixel(height: int, width: int) -> np.ndarray:
    mask = np.zeros((height, width), bool)
    mask[height // 2, width // 3] = True
    return mask


MASKS = {
    "random": RNG.random((37, 53)) < 0.3,
    "dense": RNG.random((64, 48)) < 0.9,
    "empty": np.zeros((20, 31), bool),
    "full": np.ones((20, 31), bool),
    "one pixel": _one_pixel(45, 80),
    "first pixel": np.arange(35).reshape(5, 7) == 0,
    "last pixel": np.arange(35).reshape(5, 7) == 34,
    "one column": _one_pixel(90, 1),
    "one row": _one_pixel(1, 90),
}


WAYS = ["numpy", "numba"]
GRIDS = [(1, 1), (4, 4), (13, 23), (7, 5), (64, 100)]


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """One implementation of coverage and then the other."""
    if request.param == "numba":
        pytest.importorskip("numba")
    monkeypatch.setattr(rle_module, "_compiled", rle_module._compiled if request.param == "numba" else lambda: None)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("grid", GRIDS)
def test_coverage_equals_exact_area(grid: tuple[int, int]) -> None:
    """Of masks of different sizes in one call."""
    coverage = clip_coverage([encode_mask(mask) for mask in MASKS.values()], grid)
    assert coverage.shape == (len(MASKS), *grid)
    assert coverage.dtype == np.float64
    for mask, found in zip(MASKS.values(), coverage):
        np.testing.assert_allclose(found, _exact(mask, grid), rtol=0, atol=1e-12)


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize(
    "crop", [(0, 0, 37, 53), (3, 5, 30, 50), (2.25, 7.5, 31.125, 52.999), (11.4, 20.6, 12.3, 20.9)]
)
def test_crop_and_flip_are_arithmetic_on_borders(crop: tuple[float, float, float, float], flip: bool) -> None:
    masks = [RNG.random((37, 53)) < share for share in (0.0, 0.3, 0.9, 1.1)]
    for grid in GRIDS:
        found = clip_coverage([encode_mask(mask) for mask in masks], grid, crop=crop, flip=flip)
        for mask, coverage in zip(masks, found):
            expected = _exact(mask, grid, crop)
            np.testing.assert_allclose(coverage, expected[:, ::-1] if flip else expected, rtol=0, atol=1e-9)


def test_the_batch_is_its_masks_one_by_one() -> None:
    rles = [encode_mask(mask) for mask in MASKS.values()] * 3
    together = clip_coverage(rles, (6, 9))
    np.testing.assert_array_equal(together, np.concatenate([clip_coverage([rle], (6, 9)) for rle in rles]))
    assert clip_coverage([], (6, 9)).shape == (0, 6, 9)


def test_numba_equals_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    rles = [encode_mask(RNG.random((90, 160)) < share) for share in RNG.random(20)]
    compiled = clip_coverage(rles, (26, 46))
    assert rle_module._compiled() is not None
    monkeypatch.setattr(rle_module, "_compiled", lambda: None)
    np.testing.assert_allclose(compiled, clip_coverage(rles, (26, 46)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("crop", [(0, 0, 21, 31), (5, 5, 5, 9), (-1, 0, 5, 5), (0, float("nan"), 5, 5)])
def test_a_crop_outside_of_the_mask_is_refused(crop: tuple[float, float, float, float]) -> None:
    with pytest.raises(ValueError, match=r"is not \(top, left, bottom, right\) inside a mask of 20 x 31"):
        clip_coverage([encode_mask(MASKS["full"])], (4, 4), crop=crop)


@pytest.mark.parametrize("name", MASKS)
def test_runs_and_masks_equal_pycocotools(name: str) -> None:
    mask = MASKS[name]
    rle = encode_mask(mask)
    runs = decode_counts(rle["counts"])
    values = np.repeat(np.arange(runs.size) % 2, runs).reshape(mask.shape, order="F").astype(bool)
    np.testing.assert_array_equal(values, mask)
    np.testing.assert_array_equal(decode_mask(rle), mask)


def test_long_runs_survive_the_string() -> None:
    runs = [0, 5, 70_000, 3, 1, 900_000, 0, 2]
    text = coco.frPyObjects({"size": [sum(runs), 1], "counts": runs}, sum(runs), 1)["counts"].decode()
    assert decode_counts(text).tolist() == runs


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        ("", "empty"),
        ("0z", "'z' at position 1 is outside"),
        ("0é", "'é' at position 1 is outside"),
        ("0P", "ends inside a number"),
        ("P" * 7 + "0", "8 characters, the limit is 7"),
        ("01O", r"run 2 has the negative length -1"),
    ],
)
def test_damaged_strings_are_refused(counts: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_counts(counts)


def test_real_masklets_are_exact() -> None:
    masklets = json.loads((footage_dir() / "sav_000001_manual.json").read_text())["masklet"]
    rles = [rle for frame in masklets[::20] for rle in frame]
    assert any(decode_mask(rle).any() for rle in rles)
    for rle, coverage in zip(rles, clip_coverage(rles, (30, 17)), strict=True):
        assert decode_counts(rle["counts"]).sum() == np.prod(rle["size"])
        np.testing.assert_allclose(coverage, _exact(decode_mask(rle), (30, 17)), rtol=0, atol=1e-12)


def test_runs_are_compressed_as_they_are() -> None:
    for mask in (RNG.random((7, 9)) < 0.5, np.zeros((3, 4), bool), np.ones((3, 4), bool)):
        runs = decode_counts(encode_mask(mask)["counts"]).tolist()
        assert encode_counts(mask.shape, runs) == encode_mask(mask)


def test_polygons_are_filled_as_by_pycocotools() -> None:
    one, two = [2.5, 3, 20, 3.2, 18, 25, 4, 22.7], [10, 10, 47, 10, 47, 31, 10, 31]
    filled = decode_mask(encode_polygons((32, 48), [one, two]))
    expected = [coco.decode(coco.frPyObjects([polygon], 32, 48))[..., 0] for polygon in (one, two)]
    np.testing.assert_array_equal(filled, np.logical_or(*expected))
    assert not decode_mask(encode_polygons((32, 48), [])).any()
    assert decode_mask(encode_polygons((32, 48), [[-1, -1, 49, -1, 49, 33, -1, 33]])).all(), "a pixel of slack"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encode_counts((4, 4), [3, 4]), r"the runs sum to 7, but 4 x 4 is 16"),
        (lambda: encode_counts((4, 4), [-1, 17]), r"counts \[-1, 17\] hold other things"),
        (lambda: encode_counts((4, 4), [True, 15]), r"counts \[True, 15\] hold other things"),
        (lambda: encode_counts((10**9, 10**9), [10**18]), r"size 1000000000 x 1000000000 is not two numbers"),
        (lambda: encode_counts((0, 4), []), r"size 0 x 4 is not two numbers"),
        (lambda: encode_polygons((10**6, 10**6), []), r"is not two numbers of pixels from 1 to 16384"),
        (lambda: encode_polygons((32, 48), [[0, 0, 1e9, 0, 5, 5]]), r"coordinate 1000000000.0 is outside 0 to 48"),
        (lambda: encode_polygons((32, 48), [[0, 0, 5, 40, 5, 5]]), r"coordinate 40.0 is outside 0 to 32"),
        (lambda: encode_polygons((32, 48), [[0, 0, float("nan"), 0, 5, 5]]), r"coordinate nan is outside"),
        (lambda: encode_polygons((32, 48), [[0, 0, 5, 5]]), r"a polygon of 4 numbers is not x0, y0"),
    ],
)
def test_runs_and_polygons_of_no_mask_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
