"""Pictures of the report: attention over frames, training curves; transparent, for light and dark pages."""

import io
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

DPI = 136
WIDTH = 11.5  # inches, at most
CELL, CELL_HEIGHT = 1.5, 1.8  # inches of one frame, at most
LABEL, BAR, TOP = 0.95, 0.95, 0.24  # inches for the names of the rows, the scale bar and the titles
GREY = "#7d7d7d"  # at least 4:1 against both white and near-black
ARM_COLOURS = ("#2a8fd0", "#d55e00")  # told apart with any colour vision
# The lowest third of inferno is darker than the frame below it, so that more attention would look like less.
HEAT = colormaps["inferno"](np.linspace(0.33, 1, 256))
SMOOTHED_SHARE = 0.03
MOST_SOURCES = 8


class Line(NamedTuple):
    """A curve: points [N, 2] of step and value, any matplotlib colour, width in points."""

    name: str
    points: np.ndarray
    colour: Any
    width: float


def strip_png(
    frames: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    masks: Sequence[np.ndarray | None],
    titles: Sequence[str],
    uniform: float | None = None,
    highest: float | None = None,
    notes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> bytes:
    """`strip_figure` as a PNG file."""
    figure = strip_figure(frames, maps, masks=masks, titles=titles, uniform=uniform, highest=highest, notes=notes)
    return to_png(figure)


def strip_figure(
    frames: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    masks: Sequence[np.ndarray | None],
    titles: Sequence[str],
    uniform: float | None = None,
    highest: float | None = None,
    notes: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> Figure:
    """N frames [N, H, W, 3] uint8 above one row of heat per named map [N, h, w], each cell one flat square.

    All rows share one scale from 0 to `highest`, by default their maximum, with a square-root stretch so that weak
    attention is seen beside a peak; heat is the more opaque the higher it is, and a map of NaN is hatched. `uniform`,
    what equal attention would put on each cell, is marked on the scale bar. `masks`, bool of any size or None, are
    drawn as contours; `titles` stand above the frames, `notes` by row ("video" for the frames) in the pictures.
    """
    columns, height, width = frames.shape[:3]
    cell = min(CELL, CELL_HEIGHT * width / height, (WIDTH - LABEL - BAR) / columns)
    size = LABEL + columns * cell + BAR, TOP + (1 + len(maps)) * cell * height / width
    figure = Figure(figsize=size, dpi=DPI)
    edges = {"left": LABEL / size[0], "right": 1 - BAR / size[0], "bottom": 0, "top": 1 - TOP / size[1]}
    grid = figure.subplots(1 + len(maps), columns, squeeze=False, gridspec_kw=edges | {"wspace": 0.04, "hspace": 0.04})
    if highest is None:
        highest = max(uniform or 0.0, *(float(map_NHW.max()) for map_NHW in maps.values()))
    norm = PowerNorm(0.5, vmin=0, vmax=highest or 1)  # without any attention there is still a scale
    for row, name, map_NHW in zip(grid, ("video", *maps), (None, *maps.values())):
        row[0].text(-0.06, 0.5, _short(name), transform=row[0].transAxes, ha="right", va="center", **_text(9))
        for axes, frame, mask, number in zip(row, frames, masks, range(columns)):
            if map_NHW is not None:
                # Grey and of low contrast below the heat: a cell's colour has to read as its value.
                _draw(axes, np.repeat(50 + 0.35 * frame.mean(axis=2, keepdims=True), 3, axis=2) / 255, mask)
                heat = _heat(np.nan_to_num(map_NHW[number]), norm)
                axes.imshow(heat, extent=(0, 1, 1, 0), aspect="auto", interpolation="nearest")
                if np.isnan(map_NHW[number]).any():
                    axes.add_patch(Rectangle((0, 0), 1, 1, fill=False, hatch="//", edgecolor="white", linewidth=0))
            else:
                _draw(axes, frame, mask)
            if name in notes and (note := notes[name][number]):
                box = {"facecolor": "black", "alpha": 0.65, "linewidth": 0, "pad": 2}
                axes.text(0.5, 0.95, note, ha="center", va="bottom", **(_text(8) | {"color": "white", "bbox": box}))
    for axes, title in zip(grid[0], titles):
        axes.set_title(title, pad=4, **_text(8))
    if maps:
        _draw_scale(figure, norm, uniform, len(maps) / (1 + len(maps)) * edges["top"])
    return figure


def _draw(axes: Axes, picture: np.ndarray, mask: np.ndarray | None) -> None:
    axes.set_axis_off()
    axes.imshow(picture, extent=(0, 1, 1, 0), aspect="auto")
    if mask is None or not mask.any():
        return
    # A border of background closes the contour of an object that touches the edge of the frame.
    padded = np.pad(mask, 1).astype(float)
    y, x = ((np.arange(side) - 0.5) / (side - 2) for side in padded.shape)
    for colour, line_width in (("black", 2.0), ("white", 0.9)):
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=line_width, zorder=3)
    axes.set(xlim=(0, 1), ylim=(1, 0))


def _draw_scale(figure: Figure, norm: PowerNorm, uniform: float | None, top: float) -> None:
    width, height = figure.get_size_inches()
    inset = 0.15 / height
    bar = figure.add_axes(((width - BAR + 0.12) / width, inset, 0.11 / width, top - 2 * inset))
    heat = _heat(norm.inverse(np.linspace(1, 0, 256))[:, None], norm)
    # As it looks on the grey of a frame: the page behind the picture may be light or dark.
    bar.imshow(heat[..., :3] * heat[..., 3:] + 0.37 * (1 - heat[..., 3:]), extent=(0, 1, 0, 1), aspect="auto")
    ticks = {0.0: "0", 1.0: f"{norm.vmax:.2g}"}
    if uniform is not None:
        at = float(norm(uniform))
        ticks = {value: text for value, text in ticks.items() if abs(value - at) > 0.12}  # no text over another
        ticks[at] = f"uniform\n= {uniform:.2g}"
    bar.set_yticks([*ticks], [*ticks.values()], **_text(7.5))
    bar.set_xticks([])
    bar.yaxis.tick_right()
    bar.tick_params(color=GREY, length=3)
    for spine in bar.spines.values():
        spine.set_visible(False)


def _heat(values: np.ndarray, norm: PowerNorm) -> np.ndarray:
    """RGBA of attention values [...] -> [..., 4]."""
    share = np.asarray(norm(values), dtype=float)
    rgba = HEAT[(share * (len(HEAT) - 1)).round().astype(int)]
    rgba[..., 3] = 0.95 * share**0.75
    return rgba


def curves_png(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """PNG of text loss, mask loss and the probe's pointing and mass of all arms, and of the last arm the text loss by
    source and the mask loss's own gradient at q and k, by layer.

    Rows have `step` and any of the keys of metrics.jsonl; a panel without data is left out, None if all are.
    """
    panels = {title: shown for title, lines in _panels(logs) if (shown := [line for line in lines if line.points.size])}
    if not panels:
        return None
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(WIDTH, 2.5 * rows), dpi=DPI, layout="constrained")
    grid = figure.subplots(rows, 2, squeeze=False).ravel()
    for axes, (title, lines) in zip(grid, panels.items()):
        _draw_curves(axes, title, lines)
    for axes in grid[len(panels) :]:
        axes.set_axis_off()
    return to_png(figure)


def _panels(logs: Mapping[str, Sequence[Mapping[str, float]]]) -> Iterator[tuple[str, list[Line]]]:
    """Title and lines of every panel, without points where nothing was logged."""
    common = (
        ("loss/text", "text loss"),
        ("loss/mask", "mask loss"),
        ("probe/pointing", "pointing on the probe set"),
        ("probe/mass", "attention mass on the probe set"),
    )
    for key, title in common:
        # Of two equal curves, the wide one is seen below the other.
        styles = [*zip(ARM_COLOURS, (2.6, 1.3))][-len(logs) :]
        yield title, [Line(name, _points(rows, key), *style) for (name, rows), style in zip(logs.items(), styles)]
    name, last = list(logs.items())[-1]
    name, keys = _short(name), set().union(*last)
    sources = _sources(last)
    shown = sources[:MOST_SOURCES] if len(sources) > 1 else []  # that of a single one is the text loss
    largest = f", the {len(shown)} largest of {len(sources)}" if len(sources) > len(shown) else ""
    yield (
        f"text loss by source, {name}{largest}",
        [
            Line(source, _points(last, f"loss/text/{source}"), shade, 1.3)
            for source, shade in zip(shown, _shades(shown))
        ],
    )
    for side, where in (("q", "queries"), ("k", "keys")):
        layers = sorted({int(found[1]) for key in keys if (found := re.match(f"mask_grad/{side}([0-9]+)$", key))})
        yield (
            f"gradient norm of the mask loss at the {where}, {name}",
            [
                Line(f"layer {layer}", _points(last, f"mask_grad/{side}{layer}"), shade, 1.3)
                for layer, shade in zip(layers, _shades(layers))
            ],
        )


def _sources(rows: Sequence[Mapping[str, float]]) -> list[str]:
    """Names of the sources of records, those with most answer tokens first."""
    counts: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        for key, value in row.items():
            if key.startswith("count/text/"):
                counts[key.removeprefix("count/text/")] += value or 0
    return sorted(counts, key=lambda name: (-counts[name], name))


def _shades(items: Sequence[object]) -> np.ndarray:
    return colormaps["viridis"](np.linspace(0.15, 0.8, len(items)))


def _draw_curves(axes: Axes, title: str, lines: Sequence[Line]) -> None:
    for line in lines:
        step, value = line.points.T
        axes.plot(step, value, color=line.colour, alpha=0.22, linewidth=0.7)
        # matplotlib hides labels that begin with an underscore; a space keeps any name.
        axes.plot(step, smooth(value), color=line.colour, linewidth=line.width, label=" " + _short(line.name))
    axes.set_ylim(bottom=0)
    axes.set_title(title, loc="left", **_text(9.5))
    axes.set_xlabel("step", **_text(8))
    axes.tick_params(colors=GREY, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.grid(color=GREY, alpha=0.18, linewidth=0.6)
    for side, spine in axes.spines.items():
        spine.set(visible=side in ("left", "bottom"), color=GREY)
    for text in axes.legend(frameon=False, fontsize=8.5, labelcolor=GREY).get_texts():
        text.set_parse_math(False)


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving mean over SMOOTHED_SHARE of the points, over fewer at the ends."""
    half = round(len(values) * SMOOTHED_SHARE / 2)
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def _points(rows: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
    return np.array([(row["step"], row[key]) for row in rows if row.get(key) is not None], dtype=float)


def _text(size: float) -> dict[str, Any]:
    # A dollar sign in a name is no formula.
    return {"fontsize": size, "color": GREY, "parse_math": False}


def _short(name: str) -> str:
    return name if len(name) <= 14 else name[:13] + "…"


def to_png(figure: Figure) -> bytes:
    """The figure as a PNG file; without software and date fields, so the same numbers give the same file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
