"""Draws docs/performance.md and its plots from the files in benchmarks/results and from nothing else.

make bench-report
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.targets import targets

ROOT = Path(__file__).resolve().parents[1]
RESULTS, PAGE = ROOT / "benchmarks/results", ROOT / "docs/performance.md"
Results = Mapping[str, Any]

HEAD = """# Performance

Drawn by `make bench-report` from the files in `benchmarks/results` and nothing else. `make bench` (`pytest -m bench`)
measures what a CPU can; `python benchmarks/gpu.py` what needs a GPU, in ten minutes, where torch, triton, numpy,
pytest and transformers are enough.

On a CPU the ways take turns in one run, so only ratios mean anything: median (quartiles) of those within the rounds,
one thread. Memory there is what the allocator gave out beyond the inputs and had not got back, in forward and
backward. Gradients of q and k in full size are among it, as any way has to return them; the table also shows the peak
without the two that are returned. On a GPU times are p50 (p20 to p80), the L2 cache flushed before every run,
replayed from a CUDA graph; *eager* is the same with what the host adds. Every way is compared with float64 before it
is timed. The *floor* is the least time that the bytes, operations and special functions of the computation take at
the rates measured in the same run; full-size gradients are among the bytes."""


def read_results() -> dict[str, Any]:
    """Result files by name."""
    return {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def page(results: Results) -> str:
    """The page's Markdown."""
    parts = [HEAD, "## Targets", _table(("target", "measured", "limit", ""), _target_lines(results))]
    for name, (title, header, lines) in SECTIONS.items():
        found = results.get(name)
        body = _table(header, lines(found) if found else [("not run",)])
        parts += [f"## {title}", *([_origin(name, found)] if found else []), body]
        if found and name in PLOTS:
            parts.append(f"![{title}](performance_{name}.svg)")
    return "\n\n".join(parts) + "\n"


def _table(header: Sequence[str], lines: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> str:
    cells = [header, ["---"] * len(header), *([*line, *[""] * (len(header) - len(line))] for line in lines)]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _target_lines(results: Results) -> Iterator[Sequence[str]]:
    for target in targets(results):
        limit = f"{'at least' if target.at_least else 'at most'} {target.limit:g}"
        yield target.name, _short(target.value), limit, "met" if target.met else "missed"
    for name, (title, _, _) in SECTIONS.items():
        if name.startswith("gpu") and name not in results:
            yield title, "not run"


def _origin(name: str, result: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{package} {version}" for package, version in result["versions"].items())
    text = f"`{name}.json`: {result['device']}, {versions}, {result['date']}."
    if "ceilings" in result:
        rates = result["ceilings"]
        text += (
            f" Measured there: {rates['bytes'] / 1e12:.2f} TB/s copied, {rates['flops'] / 1e12:.0f} TFLOP/s in bf16, "
            f"{rates['specials'] / 1e12:.2f} T special functions a second."
        )
    if "layers" in result:
        text += (
            f" {result['layers']} layers, {len(result['supervised_layers'])} supervised; {result['tokens']} tokens, "
            f"{result['visual_tokens']} of them visual; bf16, checkpointing, no optimizer, vision tower frozen."
        )
    return text


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _spread(time: Mapping[str, Any]) -> str:
    low, high = time["quartiles"]
    return f"{_short(time['median'])} ({_short(low)} to {_short(high)})"


def _quantiles(us: Sequence[float]) -> str:
    return f"{_short(us[1])} ({_short(us[0])} to {_short(us[2])})"


def _compared(ways: Mapping[str, Any], *before: str) -> Iterator[Sequence[str]]:
    for name, way in ways.items():
        yield *before, name, _spread(way["time"]), f"{_short(way['memory'])} ({_short(way['peak_mib'])} MiB)"


def _cpu_noun_rows(result: Any) -> Iterator[Sequence[str]]:
    for line, way in zip(_compared(result["ways"]), result["ways"].values()):
        yield *line, f"{_short(way['memory_beyond_gradients'])} ({_short(way['peak_beyond_gradients_mib'])} MiB)"


def _cpu_pixel_loss(result: Any) -> Iterator[Sequence[str]]:
    for title, shape in result["shapes"].items():
        yield from _compared(shape["ways"], title)


def _shared_prefix(result: Any) -> Iterator[Sequence[str]]:
    for line, layout in zip(_compared(result["layouts"]), result["layouts"].values()):
        yield line[0], str(layout["tokens"]), *line[1:]


def _gpu_kernels(result: Any) -> Iterator[Sequence[str]]:
    for title, shape in result["shapes"].items():
        yield f"**{title}**", "floor", "", _short(shape["floor_us"])
        yield "", f"{shape['launches']} empty launches", "", _quantiles(shape["launch_us"])
        for name, way in shape["ways"].items():
            if "failed" in way:
                yield "", name, way["failed"].replace("|", "/").replace("\n", " ")
                continue
            share = f"{shape['floor_us'] / way['step_us'][1]:.0%}"
            memory = [_short(way[key]) for key in ("kept_mib", "peak_mib")]
            times = [_quantiles(way[key]) for key in ("forward_us", "step_us", "eager_step_us")]
            yield "", name, *times, share, *memory, ", ".join(f"{error:.0e}" for error in way["errors"])


def _plot_cpu(result: Any, figure: Any) -> None:
    ways = list(result["ways"].items())[::-1]
    for number, (key, label) in enumerate((("seconds", "seconds"), ("peak_mib", "peak memory, MiB"))):
        axes = figure.add_subplot(1, 2, number + 1)
        axes.barh([name for name, _ in ways], [way[key] for _, way in ways], log=True, color="#4477aa")
        axes.set_xlabel(label)
        if number:
            axes.set_yticklabels([])


def _plot_gpu(result: Any, figure: Any) -> None:
    axes = figure.add_subplot()
    shapes = result["shapes"]
    for way in dict.fromkeys(way for shape in shapes.values() for way in shape["ways"]):
        times = [shape["ways"].get(way, {}).get("step_us", [None] * 3)[1] for shape in shapes.values()]
        axes.plot(range(len(shapes)), [float("nan") if t is None else t for t in times], "o", label=way)
    axes.plot(range(len(shapes)), [shape["floor_us"] for shape in shapes.values()], "k_", markersize=16, label="floor")
    axes.set_xticks(range(len(shapes)), list(shapes), rotation=30, ha="right", fontsize=7)
    axes.set_yscale("log")
    axes.set_ylabel("forward and backward, us")
    axes.legend(fontsize=7)


Lines = Callable[[Any], Iterator[Sequence[str]]]
TIMES = ("forward, us", "forward and backward, us", "eager, us", "floor / time")
GPU_HEADER = ("shape", "way", *TIMES, "kept for backward, MiB", "peak, MiB", "errors")
SECTIONS: dict[str, tuple[str, Sequence[str], Lines]] = {
    "cpu_step": (
        "A training step of the tiny model, on a CPU",
        ("step", "time / plain", "peak memory / plain"),
        lambda result: _compared(result["kinds"]),
    ),
    "cpu_noun_rows": (
        "Noun rows in torch, on a CPU",
        ("way", "time / noun rows", "peak memory / noun rows", "the same without the returned gradients"),
        _cpu_noun_rows,
    ),
    "cpu_pixel_loss": (
        "The pixel side's BCE in torch, on a CPU",
        ("shape", "way", "time / mask loss", "peak memory / mask loss"),
        _cpu_pixel_loss,
    ),
    "cpu_shared_prefix": (
        "Shared prefixes, on a CPU",
        ("three clips with three questions each", "tokens", "time / separate", "peak memory / separate"),
        _shared_prefix,
    ),
    "gpu_noun_rows": ("Noun rows, on a GPU", GPU_HEADER, _gpu_kernels),
    "gpu_pixel_loss": ("The pixel side's BCE, on a GPU", GPU_HEADER, _gpu_kernels),
    "gpu_step": (
        "A training step of a model of Qwen2.5-VL-7B's shape, on a GPU",
        ("step", "time / plain", "peak memory / plain"),
        lambda result: _compared(result["kinds"]),
    ),
}
PLOTS: dict[str, Callable[[Any, Any], None]] = {
    "cpu_noun_rows": _plot_cpu,
    "gpu_noun_rows": _plot_gpu,
    "gpu_pixel_loss": _plot_gpu,
}


def draw(results: Results, folder: Path) -> None:
    """The plots, as SVG files that are the same for the same results."""
    import matplotlib
    from matplotlib.figure import Figure

    for name in PLOTS.keys() & results.keys():
        with matplotlib.rc_context({"svg.hashsalt": name, "svg.fonttype": "none"}):
            figure = Figure(figsize=(9, 3.2 if name.startswith("cpu") else 5), layout="constrained")
            PLOTS[name](results[name], figure)
            figure.savefig(folder / f"performance_{name}.svg", metadata={"Date": None, "Creator": None})


def main() -> None:
    """Write the page and its plots."""
    results = read_results()
    PAGE.write_text(page(results))
    draw(results, PAGE.parent)


if __name__ == "__main__":
    main()
