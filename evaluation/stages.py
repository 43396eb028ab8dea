"""The stages behind `swim evaluate score` and `report`: predictions.jsonl -> results.json, scores.jsonl, summary.md,
report.html. Neither needs torch, a GPU or a model; `report` shows frames where it is given the data."""

import json
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from math import isfinite
from pathlib import Path
from typing import Any

import numpy as np

from swim import __version__
from swim.evaluation.predictions import PredictionsError, read_header, read_lines
from swim.evaluation.registry import Benchmark, find_benchmark
from swim.evaluation.scores import PredictionFile, Settings, compare_variant, write_results

MAX_LISTED = 20


def load(path: Path, *, benchmark: str | None = None, expected: Path | None = None) -> PredictionFile:
    """A predictions file with its header; FileNotFoundError, PredictionsError."""
    header = read_header(path, expected)
    if benchmark is not None:
        header = replace(header, benchmark=benchmark)
    return PredictionFile(header, read_lines(path), path)


def score_files(
    files: Sequence[PredictionFile],
    out: Path,
    *,
    settings: Settings | None = None,
    variants: Mapping[str, PredictionFile] | None = None,
) -> dict[str, Any]:
    """Score one arm or two, the baseline first, into `out`: results.json, scores.jsonl, summary.md; gives the first.

    `variants` are other prompts for the same ids of the last arm. PredictionsError if the arms are of different
    benchmarks or names, or hold what was not expected.
    """
    s = settings or Settings()
    names = [file.header.benchmark for file in files]
    if len(set(names)) > 1:
        raise PredictionsError(f"the arms are of different benchmarks: {', '.join(names)}; choose one with --benchmark")
    if len({file.header.name for file in files}) < len(files):
        raise PredictionsError(f"both arms are named {files[0].header.name!r}; name them with --names")
    _check_data(files)
    found = find_benchmark(names[0])
    arms = {}
    for file in files:
        arms[file.header.name] = {**_figures(file), **found.score(file, s)}
    last = files[-1].header.name
    if variants:
        arms[last]["variants"] = {
            name: compare_variant(arms[last], found.score(file, s), found.metrics, s)
            | {"provenance": dict(file.header.provenance), "protocol": dict(file.header.protocol)}
            for name, file in variants.items()
        }
    results = write_results(
        out / "results.json",
        arms,
        found.metrics,
        protocol={
            **found.protocol,
            "predictions": {file.header.name: dict(file.header.protocol) for file in files},
            **_judge_of(arms),
            "systems": {file.header.name: file.header.provenance.get("system") for file in files},
        },
        provenance={
            "scored_by": software(("numpy",)),
            "files": {f.header.name: os.path.relpath(f.path, out) for f in files if f.path is not None},
            "arms": {file.header.name: dict(file.header.provenance) for file in files},
        },
        settings=s,
    )
    (out / "summary.md").write_text(summary(results, found, [f.header.name for f in files]), encoding="utf-8")
    return results


def _check_data(files: Sequence[PredictionFile]) -> None:
    """PredictionsError if the arms were predicted on different data, though their ids may be the same."""
    digests = [(file.header.provenance.get("data") or {}).get("sha256") for file in files]
    targets = [{entry.id: entry.target for entry in file.header.expected if entry.target} for file in files]
    differs = len({digest for digest in digests if digest}) > 1
    changed = [id for id in targets[0] if targets[-1].get(id, targets[0][id]) != targets[0][id]]
    if differs or changed:
        what = (
            f"data {', '.join(f'{digest:.12}' for digest in digests)}" if differs else f"the target of {changed[0]!r}"
        )
        raise PredictionsError(
            f"{files[0].path} and {files[-1].path} were predicted on different data ({what}); predict both on the same"
        )


def _figures(file: PredictionFile) -> dict[str, Any]:
    """The run's own figures, such as seconds; PredictionsError unless they are finite numbers or texts."""
    figures = file.header.provenance.get("figures", {})
    if not isinstance(figures, dict) or any(isinstance(v, float) and not isfinite(v) for v in figures.values()):
        raise PredictionsError(
            f"{file.path}: provenance.figures in its header must be an object of finite numbers, not {figures!r:.200}"
        )
    return figures


def _judge_of(arms: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Who judged, as a part of the protocol; PredictionsError if it is not the same for all arms."""
    parts = ("profile", "version", "model", "prompt_sha256", "params")
    judges = [
        {name: arm["judge"][name] for name in parts} for arm in arms.values() if arm.get("judge", {}).get("profile")
    ]
    if any(judge != judges[0] for judge in judges):
        said = ", ".join(f"{judge['model']} ({judge['profile']})" for judge in judges)
        raise PredictionsError(f"the arms were judged by different judges, {said}: have one judge both")
    return {"judge": judges[0]} if judges else {}


def title(results: Mapping[str, Any]) -> str:
    """Protocol id, version, and the judge's profile and name where there is one."""
    protocol = results["protocol"]
    judge = protocol.get("judge")
    by = f", judged by {judge['model']}, {judge['profile']} version {judge['version']}" if judge else ""
    return f"{protocol['id']}, version {protocol['version']}{by}"


def software(packages: Sequence[str]) -> dict[str, str]:
    """Versions of this program and of packages, the commit it runs from, Python and the machine."""
    root = Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True)
    return {
        "swim": __version__,
        "commit": git.stdout.strip() or "not a git checkout",
        **{name: _version(name) for name in packages},
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def arms_of(results: Mapping[str, Any]) -> list[str]:
    """Names of the arms in a results.json, the baseline first."""
    return [name for name, part in results.items() if isinstance(part, dict) and "coverage" in part]


def table(results: Mapping[str, Any], metrics: Sequence[str]) -> list[list[str]]:
    """Rows of a table: metric, a value with interval per arm, and the difference if there are two."""
    arms = arms_of(results)
    rows = [["metric", *arms, *(["difference"] if "difference" in results else [])]]
    for metric in metrics:
        cells = [show(results[arm][metric]) for arm in arms]
        if "difference" in results:
            change = results["difference"].get(metric)
            cells.append(show(change, sign="+") if change else "")
        rows.append([metric, *cells])
    return rows


def show(estimate: Mapping[str, Any], sign: str = "") -> str:
    """An estimate as text: the value and its interval."""
    if estimate["value"] is None:
        return "-"  # nothing to score, such as a data set without masks
    value = f"{estimate['value']:{sign}.3f}"
    if estimate["interval"] is None:
        return value  # one clip has no spread
    low, high = estimate["interval"]
    return f"{value} [{low:{sign}.3f}, {high:{sign}.3f}]"


def summary(results: Mapping[str, Any], benchmark: Benchmark, arms: Sequence[str]) -> str:
    """The results as a page of Markdown: protocol, headline, coverage, variants, failures, provenance."""
    lines = [f"# {_plain(title(results))}", ""]
    lines += ["Values with 95 % intervals (bootstrap over clips). An id without a usable prediction counts worst.", ""]
    lines += _markdown(table(results, benchmark.headline))
    lines += ["", "| without failures | " + " | ".join(arms) + " |", "|" + " --- |" * (1 + len(arms))]
    for metric in benchmark.headline:
        values = [results[arm][metric].get("value_scored_only") for arm in arms]
        if any(value is not None for value in values):
            cells = [
                "-" if v is None else f"{v:.3f} (n {results[a][metric]['num_scored']})" for a, v in zip(arms, values)
            ]
            lines.append(f"| {metric} | {' | '.join(cells)} |")
    kinds = ("expected", "predicted", "scored", "failed", "unparsed", "missing", "duplicate_lines")
    lines += [
        "",
        *_markdown([["coverage", *arms], *([k, *(f"{results[a]['coverage'][k]}" for a in arms)] for k in kinds)]),
    ]
    for arm in arms:
        lines += _variants(results[arm], arm, benchmark)
        failures = results[arm]["failures"]
        if failures:
            lines += ["", f"{len(failures)} ids of {_plain(arm)} were not scored:", ""]
            lines += [f"- `{_plain(f['id'])}`: {_plain(f['reason'])}" for f in failures[:MAX_LISTED]]
        if len(failures) > MAX_LISTED:
            lines.append(f"- and {len(failures) - MAX_LISTED} more, in results.json")
    lines += [
        "",
        "Provenance:",
        "",
        "```json",
        json.dumps(results["provenance"], indent=1, ensure_ascii=False),
        "```",
        "",
    ]
    return "\n".join(lines)


def _variants(arm: Mapping[str, Any], name: str, benchmark: Benchmark) -> list[str]:
    lines = []
    for variant, found in arm.get("variants", {}).items():
        rows = [[f"{name}, {variant}", "value", "difference"]]
        rows += [
            [m, show(found["metrics"][m]), show(found["difference"][m], sign="+")]
            for m in benchmark.headline
            if m in found["difference"]
        ]
        lines += ["", *_markdown([*rows, ["same answer", show(found["consistency"]), ""]])]
    return lines


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_plain, row))} |" for row in rows]
    return [lines[0], "|" + " --- |" * len(rows[0]), *lines[1:]]


def _plain(text: object) -> str:
    """Text that stays in its table cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def report(folder: Path, data: str | Path | None = None) -> Path:
    """Write report.html beside the results.json in `folder`; with `data`, alignment is shown on its frames."""
    from swim.evaluation.report import ArmFiles, write_benchmark_report, write_report

    path = folder / "results.json"
    if not path.exists():
        raise PredictionsError(f"{path} is missing: `swim evaluate score` writes it")
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        benchmark = find_benchmark(results["protocol"]["id"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise PredictionsError(f"{path}: not what `swim evaluate score` writes ({problem}); score again") from None
    out = folder / "report.html"
    if results["protocol"]["id"] != "alignment-grid":
        write_benchmark_report(
            out, title=title(results), results=results, scores=folder / "scores.jsonl", headline=benchmark.headline
        )
        return out
    files = {}
    for arm in arms_of(results):
        predictions = (folder / results["provenance"]["files"][arm]).resolve()
        run = _run_of(predictions, results["provenance"]["arms"][arm])
        files[arm] = ArmFiles(predictions, run / "metrics.jsonl", run / "quarantine.jsonl")
    frames_for, mask_for = readers(data) if data is not None else (_no_frames, _no_mask)
    write_report(
        out,
        title="Noun-attention supervision",
        results=results,
        arms=files,
        frames_for=frames_for,
        mask_for=mask_for,
    )
    return out


def _run_of(predictions: Path, provenance: Mapping[str, Any]) -> Path:
    """Folder of the run that predicted: around its own predictions, or else around the model as it was named."""
    own = predictions.parent.parent.parent
    return own if (own / "config.yaml").exists() else Path(provenance.get("model", {}).get("path", "")).parent


def _no_frames(*_: Any) -> np.ndarray:
    raise PredictionsError("the data was not given; `swim evaluate report --data` shows frames")


def _no_mask(*_: Any) -> None:
    return None


def readers(
    data: str | Path,
) -> tuple[Callable[[str, list[int]], np.ndarray], Callable[[str, str, int], np.ndarray | None]]:
    """What a report asks for frames (uint8 [N, H, W, 3]) and masks (bool [H, W]) of the clips in `data`."""
    from swim.data_tools.rle import decode_mask
    from swim.data_tools.shards import Sample, ShardSet
    from swim.data_tools.video import decode_frames

    shards = ShardSet(data)

    @cache
    def sample(clip: str) -> Sample:
        return shards.read(clip)

    def frames_for(clip: str, frames: list[int]) -> np.ndarray:
        return decode_frames(sample(clip).media(), frames)

    def mask_for(clip: str, object_id: str, frame: int) -> np.ndarray | None:
        rle = sample(clip).masks.get(object_id, {}).get(frame)
        return decode_mask(rle) if rle is not None else None

    return frames_for, mask_for
