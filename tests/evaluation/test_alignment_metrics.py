"""Promise: the alignment metrics are the published definitions, exactly, on the cell grid."""

import numpy as np
import pytest
from scipy.special import rel_entr
from sklearn.metrics import auc, average_precision_score, roc_auc_score

from swim.evaluation.alignment import WORST, baseline_metrics, centre_map, count_steps, noun_metrics, step_metrics
from swim.evaluation.predictions import Noun

PIXELS = 16  # per cell


def _expand(map_HW: np.ndarray, covered_HW: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The map nearest-upsampled to PIXELS pixels per cell and the mask with `covered` of them set, both flat."""
    mask = np.arange(PIXELS) < covered_HW.reshape(-1, 1)
    return np.repeat(map_HW.ravel(), PIXELS), mask.ravel()


def _cases() -> list[tuple[str, np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    some = lambda: rng.integers(0, PIXELS + 1, (5, 7)) * (rng.random((5, 7)) < 0.4)  # noqa: E731
    return [
        ("distinct", rng.random((5, 7)), some()),
        ("ties", rng.integers(0, 4, (5, 7)) / 4, some()),
        ("constant", np.full((5, 7), 0.3), some()),
        ("zero map", np.zeros((5, 7)), some()),
        ("whole cells", rng.random((5, 7)), PIXELS * rng.integers(0, 2, (5, 7))),
        ("one pixel", rng.random((5, 7)), np.eye(5, 7, dtype=int) * (np.arange(5)[:, None] == 2)),
        ("peaked", rng.dirichlet(np.full(35, 0.05)).reshape(5, 7).astype(np.float32), some()),
    ]


@pytest.mark.parametrize(("map_HW", "covered_HW"), [case[1:] for case in _cases()], ids=[case[0] for case in _cases()])
def test_coverage_weighted_metrics_equal_the_pixel_metrics(map_HW: np.ndarray, covered_HW: np.ndarray) -> None:
    values, mask = _expand(map_HW, covered_HW)
    got = step_metrics(map_HW, covered_HW / PIXELS)
    assert got["ap"] == pytest.approx(average_precision_score(mask, values))
    assert got["auc"] == pytest.approx(roc_auc_score(mask, values))
    assert got["ap_lift"] == pytest.approx(got["ap"] / mask.mean())
    if not mask.all():
        thresholds = np.unique(values[mask])[::-1]
        hits = [0.0, *((values[mask] >= t).mean() for t in thresholds), 1.0]
        false_alarms = [0.0, *((values[~mask] >= t).mean() for t in thresholds), 1.0]
        assert got["auc_judd"] == pytest.approx(auc(false_alarms, hits))
    p = covered_HW / covered_HW.sum()
    q = map_HW.astype(float) / map_HW.sum() if map_HW.any() else np.full(map_HW.shape, 1 / map_HW.size)
    assert got["kl"] == pytest.approx(rel_entr(p, np.maximum(q, 1e-12)).sum())
    std = values.std()
    assert got["nss"] == pytest.approx(((values - values.mean()) / std)[mask].mean() if std > 1e-9 else 0, abs=1e-9)
    high = values >= values.min() + 0.75 * (values.max() - values.min())
    assert got["precision"] == pytest.approx(mask[high].mean())
    total = values.sum()
    assert got["mass_px"] == pytest.approx(values[mask].sum() / total if total else mask.mean())
    assert got["prevalence_px"] == pytest.approx(mask.mean())
    # The expected share of mask in the top P % of pixels when pixels of equal value come in random order.
    for percent in (1, 5, 10):
        budget = len(values) * percent / 100
        credit = 0.0
        for value in np.unique(values)[::-1]:
            level = mask[values == value]
            credit += min(max(budget - (values > value).sum(), 0), len(level)) * level.mean()
        assert got[f"gamepoint_{percent}"] == pytest.approx(credit / budget)


def test_touch_metrics_by_hand() -> None:
    map_HW = np.array([[0.4, 0.1], [0.4, 0.1]])
    coverage_HW = np.array([[0.01, 0.0], [0.0, 1.0]])
    got = step_metrics(map_HW, coverage_HW)
    assert got["pointing"] == 0.5  # two cells share the maximum, one of them touches the mask
    assert got["mass"] == pytest.approx(0.5)  # 0.4 + 0.1: a touched cell counts in full
    assert got["prevalence"] == 0.5
    assert got["mass_px"] == pytest.approx(0.4 * 0.01 + 0.1)


def test_nss_and_gamepoint_by_hand() -> None:
    map_HW = np.array([[4.0, 2.0, 2.0, 0.0]])  # mean 2, std sqrt(2)
    got = step_metrics(map_HW, np.array([[1.0, 0.5, 0.0, 0.0]]))
    assert got["nss"] == pytest.approx((1 * 2 + 0.5 * 0) / np.sqrt(2) / 1.5)
    assert got["gamepoint_1"] == got["gamepoint_10"] == 1.0  # 10 % of 4 cells is the top cell
    map_HW = np.zeros((10, 10))
    map_HW[0, 0], map_HW[0, 1:8] = 2, 1
    coverage_HW = np.zeros((10, 10))
    coverage_HW[0, :4] = 1
    got = step_metrics(map_HW, coverage_HW)
    assert got["gamepoint_1"] == 1
    assert got["gamepoint_5"] == pytest.approx((1 + 4 * 3 / 7) / 5)  # four of the seven tied cells fit, three are mask
    assert got["gamepoint_10"] == pytest.approx((1 + 3 + 2 * 0) / 10)


def test_auc_judd_is_not_the_area_under_the_whole_curve() -> None:
    # Mask at 4 and 2, the rest at 3 and 1. Points (0, 0) (0, 1/2) (1/2, 1) (1, 1), of which the ROC also has another.
    got = step_metrics(np.array([[4.0, 3.0, 2.0, 1.0]]), np.array([[1.0, 0.0, 1.0, 0.0]]))
    assert got["auc_judd"] == pytest.approx(0.5 * (0.5 + 1) / 2 + 0.5)
    assert got["auc"] == pytest.approx(0.75)


def test_kl_by_hand() -> None:
    uniform = step_metrics(np.ones((1, 4)), np.array([[1.0, 0, 0, 0]]))
    assert uniform["kl"] == pytest.approx(np.log(4))
    exact = step_metrics(np.array([[3.0, 1, 0, 0]]), np.array([[0.75, 0.25, 0, 0]]))
    assert exact["kl"] == pytest.approx(0)
    missed = step_metrics(np.array([[0.0, 1, 0, 0]]), np.array([[1.0, 0, 0, 0]]))
    assert missed["kl"] == pytest.approx(WORST["kl"]) == pytest.approx(12 * np.log(10))


def test_metrics_do_not_depend_on_the_scale_of_the_map() -> None:
    map_HW = np.random.default_rng(1).random((6, 6))
    coverage_HW = np.eye(6)
    assert step_metrics(map_HW * 2**-60, coverage_HW) == pytest.approx(step_metrics(map_HW, coverage_HW))


def test_a_mask_over_the_whole_frame_has_no_ranking() -> None:
    got = step_metrics(np.arange(4.0).reshape(2, 2), np.ones((2, 2)))
    assert (got["auc"], got["ap"], got["pointing"]) == (0.5, 1, 1)
    assert got["nss"] == pytest.approx(0)


def test_absent_and_unannotated_steps_are_skipped_and_counted() -> None:
    inside, outside = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])
    coverage_T = [inside, None, np.zeros((1, 2)), inside]
    map_THW = np.stack([inside, outside, outside, outside])
    got = noun_metrics(map_THW, coverage_T)
    assert got is not None
    assert got["pointing"] == 0.5
    assert count_steps(coverage_T) == {"scored": 2, "absent": 1, "unannotated": 1}
    assert noun_metrics(map_THW, [None, None, np.zeros((1, 2)), None]) is None


def _noun(object_id: str, x: int, *, look: int | None = None, frames: tuple[tuple[int, ...], ...] = ((0,),)) -> Noun:
    """A noun whose object fills column x of a 2 x 4 grid and whose map lies on column `look` (its own by default)."""
    coverage = np.zeros((2, 4))
    coverage[:, x] = 1
    map_THW = np.zeros((1, 2, 4))
    map_THW[:, :, x if look is None else look] = 0.5
    return Noun(object_id, 0, 0, 1, (object_id,), frames, map_THW, (coverage,))


def test_wrong_noun_uses_the_maps_of_other_objects_only() -> None:
    a, b, again = _noun("a", 0), _noun("b", 1), _noun("a", 0)
    other_frames = _noun("c", 0, frames=((2,),))
    at_a = _noun("d", 2, look=0)
    for noun in (a, b):
        wrong = baseline_metrics(noun, [a, b, again, other_frames])["wrong_noun"]
        assert wrong is not None
        assert wrong["pointing"] == 0  # neither its own map, nor the same object's, nor another grid of frames
    wrong = baseline_metrics(a, [a, b, at_a])["wrong_noun"]
    assert wrong is not None
    assert wrong["pointing"] == 0.5  # the mean over b (looks away) and d (looks at a)
    assert baseline_metrics(a, [a, again, other_frames])["wrong_noun"] is None


def test_wrong_frame_is_the_noun_half_a_clip_before() -> None:
    # The object moves a column a step and the map follows it: at another time it is elsewhere.
    coverage = np.zeros((4, 1, 4))
    coverage[range(4), 0, range(4)] = 1
    noun = Noun("x", 0, 0, 1, ("x",), ((0,), (1,), (2,), (3,)), coverage.copy(), tuple(coverage))
    wrong = baseline_metrics(noun, [])["wrong_frame"]
    assert wrong is not None
    assert (wrong["pointing"], wrong["auc"]) == (0, pytest.approx(1 / 3))
    still = Noun("x", 0, 0, 1, ("x",), ((0,),), coverage[:1], tuple(coverage[:1]))
    assert baseline_metrics(still, [])["wrong_frame"] is None
    looks = Noun("x", 0, 0, 1, ("x",), noun.frames, np.roll(coverage, -2, axis=0), tuple(coverage))
    found = baseline_metrics(looks, [])["wrong_frame"]
    assert found is not None
    assert found["pointing"] == 1


def test_uniform_and_centre_baselines() -> None:
    corner, middle = np.zeros((8, 8)), np.zeros((8, 8))
    corner[0, 0] = middle[4, 4] = 1
    rows = {}
    for name, coverage in (("corner", corner), ("middle", middle)):
        noun = Noun("x", 0, 0, 1, ("x",), ((0,),), np.ones((1, 8, 8)), (coverage,))
        rows[name] = baseline_metrics(noun, [])
    for name in rows:
        uniform = rows[name]["uniform"]
        assert uniform is not None
        assert uniform["ap"] == uniform["mass"] == uniform["pointing"] == pytest.approx(1 / 64)
        assert uniform["auc"] == 0.5
    assert rows["middle"]["centre"]["auc"] > 0.95 > 0.05 > rows["corner"]["centre"]["auc"]  # type: ignore[index]
    grid = centre_map(8, 8)
    np.testing.assert_allclose(grid, grid[::-1, ::-1])
    # Two cell sides are a quarter of the side, one sigma: exp(-1/2) apart along the row through the centre.
    y = x = (np.arange(8) + 0.5) / 8 - 0.5
    np.testing.assert_allclose(grid, np.exp(-(y[:, None] ** 2 + x**2) / 2 / 0.25**2))
