"""What a noun may carry beside its map: maps per layer, head and token, and masks; opt-in, of bounded size.

```
"detail": {"steps": [t, ...],                   # temporal steps that the layer and head maps are of
           "layers": [l, ...], "heads": H,
           "layer_maps": str, "head_maps": str, # [L][steps][h][w] and [L][H][steps][h][w]
           "token_maps": str,                   # [tokens][T][h][w]: the layers' mean for each token of the noun
           "masks": {frame: RLE}}               # union of the noun's objects, in every annotated frame of its steps
```
Every key is optional. Maps are base64 of little-endian float16, each h x w scaled to a maximum of 1: no metric here
depends on the scale, and attention of 1e-5 would lose its digits otherwise. Values that agree in 11 bits become ties.
"""

import base64
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from swim.evaluation.alignment import noun_metrics
from swim.evaluation.predictions import Noun, Prediction
from swim.evaluation.scores import Settings, estimate_values

MAX_BYTES = 1 << 20  # of float16 per noun and kind of map
LAYER_METRICS = ("pointing", "mass", "ap", "auc", "nss")
CHOSEN_BY = "ap"


def encode_maps(maps: np.ndarray) -> str:
    """Maps [..., h, w] >= 0 as text."""
    peak = maps.max(axis=(-2, -1), keepdims=True)
    scaled = np.divide(maps, peak, out=np.zeros_like(maps), where=peak > 0)
    return base64.b64encode(scaled.astype("<f2").tobytes()).decode()


def decode_maps(text: str, shape: Sequence[int]) -> np.ndarray:
    """Maps of the given shape, -1 allowed once; ValueError if the text does not hold them."""
    return np.frombuffer(base64.b64decode(text, validate=True), "<f2").astype(np.float64).reshape(shape)


def kept_steps(annotated: Sequence[bool], bytes_per_step: int) -> list[int]:
    """Annotated steps whose maps fit into MAX_BYTES, evenly spread; at least one."""
    steps = [step for step, known in enumerate(annotated) if known]
    fitting = max(1, MAX_BYTES // bytes_per_step)
    if len(steps) <= fitting:
        return steps
    return [steps[i] for i in np.linspace(0, len(steps) - 1, fitting).round().astype(int)]


LayerRow = tuple[tuple[int, int | None], Mapping[str, float]]
BROKEN = (ValueError, KeyError, TypeError, IndexError)  # what reading a detail that is none may raise


def layer_rows(line: Prediction) -> list[LayerRow]:
    """Metrics of each (layer, None) and (layer, head) that the line's nouns have maps of; any of BROKEN."""
    return [row for noun in line.nouns for row in _rows(noun)]


def score_layers(rows: Sequence[tuple[str, Sequence[LayerRow]]], settings: Settings) -> dict[str, Any] | None:
    """Metrics of every layer (head mean) and head, means over clips, from (clip, rows); None when there are no rows.

    `best_head` is chosen by AP on the even-numbered clips and measured on the odd ones, beside the head mean there.
    """
    layers, heads = dict[str, dict[int, Any]](), dict[str, dict[tuple[int, int], Any]]()
    for clip, of_line in rows:
        for (layer, head), row in of_line:
            if head is None:
                layers.setdefault(clip, {}).setdefault(layer, []).append(row)
            else:
                heads.setdefault(clip, {}).setdefault((layer, head), []).append(row)
    if not layers:
        return None
    names = sorted({layer for of_clip in layers.values() for layer in of_clip})
    found: dict[str, Any] = {
        "clips": len(layers),
        "layers": {
            str(layer): {metric: estimate_values(_of(layers, layer, metric), settings) for metric in LAYER_METRICS}
            for layer in names
        },
    }
    if heads:
        pairs = sorted({pair for of_clip in heads.values() for pair in of_clip})
        found["heads"] = {
            f"{layer}.{head}": {metric: _mean(_of(heads, (layer, head), metric)) for metric in LAYER_METRICS}
            for layer, head in pairs
        }
        found["best_head"] = _best_head(heads, layers, pairs, settings)
    return found


def _rows(noun: Noun) -> Iterator[LayerRow]:
    detail = noun.detail or {}
    if "layer_maps" not in detail:
        return
    steps, (height, width) = detail["steps"], noun.map.shape[1:]
    coverage = [noun.coverage[step] for step in steps]
    by_layer = decode_maps(detail["layer_maps"], (len(detail["layers"]), len(steps), height, width))
    for layer, maps in zip(detail["layers"], by_layer):
        if row := noun_metrics(maps, coverage):
            yield (layer, None), row
    if "head_maps" in detail:
        shape = (len(detail["layers"]), detail["heads"], len(steps), height, width)
        for layer, of_layer in zip(detail["layers"], decode_maps(detail["head_maps"], shape)):
            for head, maps in enumerate(of_layer):
                if row := noun_metrics(maps, coverage):
                    yield (layer, head), row


def _best_head(heads: Any, layers: Any, pairs: Sequence[tuple[int, int]], settings: Settings) -> dict[str, Any] | None:
    clips = sorted(heads)
    first, second = ({clip: heads[clip] for clip in clips[start::2]} for start in (0, 1))
    if not second:
        return None
    best = max(pairs, key=lambda pair: _mean(_of(first, pair, CHOSEN_BY)) or -1.0)
    same = {clip: layers[clip] for clip in second}
    return {
        "head": f"{best[0]}.{best[1]}",
        "chosen_by": f"{CHOSEN_BY} on {len(first)} clips, measured on {len(second)} others",
        "metrics": {metric: estimate_values(_of(second, best, metric), settings) for metric in LAYER_METRICS},
        "head_mean": {metric: estimate_values(_of(same, best[0], metric), settings) for metric in LAYER_METRICS},
    }


def _of(rows: Mapping[str, Mapping[Any, Sequence[Mapping[str, float]]]], key: Any, metric: str) -> dict[str, Any]:
    """The metric's mean in each clip that has rows of the key, as a list of one."""
    return {
        clip: [float(np.mean([row[metric] for row in of_clip[key]]))]
        for clip, of_clip in rows.items()
        if key in of_clip
    }


def _mean(values: Mapping[str, Sequence[float]]) -> float | None:
    return float(np.mean([value for of_clip in values.values() for value in of_clip])) if values else None
