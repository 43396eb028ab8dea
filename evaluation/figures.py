"""PNG figures that stand on light and dark pages alike: transparent ground, mid-grey text."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

WIDTH = 11.6  # inches; 1 392 pixels at DPI
DPI = 120
GREY = "#7d7d7d"  # at least 4:1 against both white and near-black
LINES = (("#56b4e9", 2.2), ("#d55e00", 1.1))  # Okabe-Ito; a thin line on a wide one, so equal curves show both
CURVES = {
    "loss/text": "text loss",
    "loss/mask": "mask loss",
    "loss/total": "total loss",
    "grad_norm": "gradient norm",
    "lr": "learning rate",
    "supervised_share": "supervised share",
}


def strip_png(
    frames: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    masks: Sequence[np.ndarray | None],
    titles: Sequence[str],
    uniform: float,
) -> bytes:
    """PNG of N frames [N, H, W, 3] uint8 above one row of heat overlays per named map [N, h, w], cells visible.

    All rows share one colour scale from 0 to their maximum, with a square-root stretch so that weak attention stays
    visible beside a peak; `uniform` (what equal attention would put on each cell) is marked on the colour bar. `masks`
    are bool [any size] or None per frame, drawn as contours; `titles` stand above the frames.
    """
    height, width = frames.shape[1:3]
    label, gap, bar = 0.95, 0.06, 0.95  # inches
    cell_width = (WIDTH - label - bar) / len(frames) - gap
    # Few frames would otherwise fill the page with one picture.
    cell_width = min(cell_width, 2.2)
    cell_height = cell_width * height / width
    top, below = 0.26, 0.08
    total = top + (1 + len(maps)) * (cell_height + gap) + below
    figure_width = label + len(frames) * (cell_width + gap) + bar
    figure = Figure(figsize=(figure_width, total), dpi=DPI)
    norm = PowerNorm(0.5, vmin=0, vmax=max([uniform, *(float(rows.max()) for rows in maps.values())]))
    grey = frames.mean(axis=-1)
    for row, name in enumerate(("video", *maps)):
        bottom = total - top - (row + 1) * cell_height - row * gap
        for column in range(len(frames)):
            left = label + column * (cell_width + gap)
            axes = figure.add_axes(
                (left / figure_width, bottom / total, cell_width / figure_width, cell_height / total)
            )
            axes.set_axis_off()
            extent = (0, width, height, 0)
            # Below the heat the frame is grey, dim and low in contrast: a cell's colour has to read as its value.
            if row == 0:
                axes.imshow(frames[column], extent=extent)
                axes.set_title(titles[column], fontsize=8, color=GREY, pad=4, parse_math=False)
            else:
                axes.imshow(grey[column], extent=extent, cmap="gray", vmin=-100, vmax=500)
                axes.imshow(
                    maps[name][column], extent=extent, norm=norm, cmap="magma", alpha=0.75, interpolation="nearest"
                )
            _draw_contour(axes, masks[column], width, height)
            axes.set_xlim(0, width)
            axes.set_ylim(height, 0)
        middle = (bottom + cell_height / 2) / total
        shown = name if len(name) <= 14 else name[:13] + "…"
        figure.text(
            (label - 0.1) / figure_width,
            middle,
            shown,
            ha="right",
            va="center",
            fontsize=9,
            color=GREY,
            parse_math=False,
        )
    if maps:
        bar_height = min(len(maps) * (cell_height + gap) - gap, 2.6)
        bar_bottom = below + (len(maps) * (cell_height + gap) - bar_height) / 2
        bar_axes = figure.add_axes(
            ((figure_width - bar + 0.06) / figure_width, bar_bottom / total, 0.12 / figure_width, bar_height / total)
        )
        bar_ = figure.colorbar(ScalarMappable(norm, "magma"), cax=bar_axes, ticks=[0, uniform, norm.vmax])
        bar_.ax.set_yticklabels(["0", f"uniform\n= {uniform:.2g}", f"{norm.vmax:.2g}"], fontsize=7.5, color=GREY)
        bar_.ax.tick_params(color=GREY, length=3)
        bar_.outline.set_visible(False)
    return _png(figure)


def curves_png(series: Mapping[str, Sequence[Mapping[str, float]]]) -> bytes | None:
    """PNG of the known curves of each run's log (rows with `step` and any of CURVES); None if no log has any."""
    keys = [key for key in CURVES if any(key in row for rows in series.values() for row in rows)]
    if not keys:
        return None
    columns = min(3, len(keys))
    rows_of_axes = -(-len(keys) // columns)
    figure = Figure(figsize=(WIDTH, 2.5 * rows_of_axes), dpi=DPI, layout="constrained")
    axes = figure.subplots(rows_of_axes, columns, squeeze=False).ravel()
    for ax, key in zip(axes, keys):
        for (name, rows), (colour, line_width) in zip(series.items(), LINES[-len(series) :]):
            points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
            if points:
                # matplotlib hides labels that begin with an underscore; a space keeps any name.
                ax.plot(*zip(*points), color=colour, linewidth=line_width, label=" " + name)
        ax.set_title(CURVES[key], fontsize=9.5, color=GREY, loc="left")
        ax.tick_params(colors=GREY, labelsize=8)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        ax.grid(color=GREY, alpha=0.2, linewidth=0.6)
        ax.patch.set_alpha(0)
        for side, spine in ax.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(GREY)
    for ax in axes[len(keys) :]:
        ax.set_axis_off()
    for ax in axes[: len(keys)]:
        if len(ax.lines) == len(series):
            for text in ax.legend(frameon=False, fontsize=8, labelcolor=GREY).get_texts():
                text.set_parse_math(False)
            break
    figure.supxlabel("step", fontsize=8.5, color=GREY)
    return _png(figure)


def _draw_contour(axes: Axes, mask: np.ndarray | None, width: int, height: int) -> None:
    if mask is None or not mask.any():
        return
    # A border of background closes the contour of an object that touches the edge of the frame.
    padded = np.pad(mask, 1).astype(float)
    x = (np.arange(padded.shape[1]) - 0.5) * width / mask.shape[1]
    y = (np.arange(padded.shape[0]) - 0.5) * height / mask.shape[0]
    for colour, line_width in (("black", 2.2), ("white", 1.0)):
        axes.contour(x, y, padded, levels=[0.5], colors=colour, linewidths=line_width)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # No software and date fields: the same numbers give the same file.
    figure.savefig(buffer, format="png", transparent=True, metadata={"Software": None})
    return buffer.getvalue()
