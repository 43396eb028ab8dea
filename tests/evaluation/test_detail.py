"""Promise: maps per layer and head are kept in bounded size, without changing a metric, and the best head is not chosen
on the clips that it is measured on."""

from typing import Any

import numpy as np
import pytest

from swim.evaluation import detail as module
from swim.evaluation.alignment import METRICS, noun_metrics
from swim.evaluation.detail import decode_maps, encode_maps, kept_steps, layer_rows, score_layers
from swim.evaluation.predictions import Noun, Prediction
from swim.evaluation.scores import Settings


def test_maps_survive_being_kept_whatever_their_scale() -> None:
    maps = np.random.default_rng(0).dirichlet(np.ones(48), size=(3, 2)).reshape(3, 2, 6, 8).astype(np.float32)
    again = decode_maps(encode_maps(maps * 1e-6), maps.shape)
    np.testing.assert_allclose(again, maps / maps.max(axis=(-2, -1), keepdims=True), atol=5e-4)
    coverage = [np.eye(6, 8)] * 2
    want, got = (noun_metrics(of, coverage) for of in (maps[0], again[0]))
    assert want is not None
    assert got is not None
    for metric in METRICS:
        assert got[metric] == pytest.approx(want[metric], abs=2e-3), metric
    assert not decode_maps(encode_maps(np.zeros((1, 2, 2))), (1, 2, 2)).any()


def test_steps_are_kept_evenly_up_to_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_BYTES", 300)
    known = [True, False, *[True] * 8]
    assert kept_steps(known, 10) == [0, 2, 3, 4, 5, 6, 7, 8, 9]
    assert kept_steps(known, 100) == [0, 5, 9]
    assert kept_steps(known, 1000) == [0]
    assert kept_steps([False], 10) == []


def _line(clip: str, right_head: int) -> Prediction:
    """Layer 3 looks left with one of its two heads, where the object is, and right with the other; layer 5 evenly."""
    left, right, even = np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]]), np.ones((1, 2))
    heads = np.stack([[left, right] if right_head == 0 else [right, left], [even, even]])[:, :, None]
    found: dict[str, Any] = {
        "steps": [1],
        "layers": [3, 5],
        "heads": 2,
        "layer_maps": encode_maps(heads.mean(1)),
        "head_maps": encode_maps(heads),
    }
    coverage = (None, np.array([[1.0, 0.0]]))
    noun = Noun("x", 0, 0, 1, ("x",), ((0,), (1,)), np.ones((2, 1, 2)), coverage, found)
    return Prediction(f"{clip}#0", clip, nouns=(noun,))


def test_layers_and_heads_have_scores_of_their_own() -> None:
    got = score_layers([(clip, layer_rows(_line(clip, 0))) for clip in "abcd"], Settings(resamples=50))
    assert got is not None
    assert got["layers"]["3"]["pointing"]["value"] == 0.5  # the mean of both heads is even
    assert (got["heads"]["3.0"]["pointing"], got["heads"]["3.1"]["pointing"]) == (1, 0)
    assert got["heads"]["5.0"]["auc"] == 0.5
    assert (got["best_head"]["head"], got["best_head"]["metrics"]["pointing"]["value"]) == ("3.0", 1)
    assert got["best_head"]["head_mean"]["pointing"]["value"] == 0.5
    assert score_layers([("a", layer_rows(Prediction("a#0", "a")))], Settings()) is None


def test_the_best_head_is_measured_on_other_clips() -> None:
    # On clips a and c head 0 is right, on b and d head 1: what was chosen on the former is wrong on the latter.
    rows = [(clip, layer_rows(_line(clip, number % 2))) for number, clip in enumerate("abcd")]
    got = score_layers(rows, Settings(resamples=50))
    assert got is not None
    assert (got["best_head"]["head"], got["best_head"]["metrics"]["pointing"]["value"]) == ("3.0", 0)
    assert got["best_head"]["chosen_by"] == "ap on 2 clips, measured on 2 others"
