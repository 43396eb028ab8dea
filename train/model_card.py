"""The README.md of an exported model: what it is, how it was trained and scored, every number from the run's files."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from swim import __version__
from swim.data_tools.shards import ShardError, ShardSet
from swim.train.config import Config, ConfigError

_INTENDED = """Questions about what named things do in a video, asked in plain text; no masks, boxes or markers are
needed. Research and evaluation. The attention of a noun is meant to lie on its object; that is evidence of what the
model looks at, not a segmentation."""
_LIMITS = """- Only what the scores below measure was measured, on the data named there; general ability may have
  changed and is not in them unless a benchmark is named.
- Frames and pixels should be those of training (below): servers sample otherwise when they are left to themselves.
- Mistakes and biases of the base model and of the training data's captions and masks are inherited."""


def model_card(
    config: Config,
    run: Path,
    *,
    title: str,
    origin: str,
    library: str,
    serve: list[str],
    scored: Mapping[str, Any] | None,
    licence: str,
) -> str:
    """Markdown with YAML front matter as the hub reads it; `scored` is what `read_scores` gives."""
    sources = _data_sources(config)
    front = {
        **({"base_model": config.model.path} if config.model.path else {}),
        "license": licence,
        "library_name": library,
        "pipeline_tag": "video-text-to-text",
        "tags": ["swim", "attention-supervision", "video"],
        **({"datasets": sorted({source for source, _, _ in sources})} if sources else {}),
        **({"model-index": [_index(title, scored)]} if scored else {}),
    }
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# {title}",
        f"Exported by `swim export` {__version__} from the {origin} of a run: unmodified `transformers` classes, no "
        "custom code. Trained with noun-attention supervision (SWIM, arXiv 2605.18018); at inference plain text is "
        "enough.",
        "## Intended use\n\n" + _INTENDED,
        "## Limits\n\n" + _LIMITS,
        "## Scores\n\n" + (_score_table(scored) if scored else "None were given to the export."),
        "## Training\n\n" + _training(config, run, sources),
        "## Serving (not run)\n\n```\n" + "\n".join(serve) + "\n```",
    ]
    return "\n\n".join(parts) + "\n"


def read_scores(path: Path, run: Path) -> dict[str, Any]:
    """Metrics of the run's arm of a results.json, with protocol and coverage; of these weights, or ConfigError."""
    from swim.train.predict import weights_digest

    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ConfigError(f"{path}: no JSON ({error}); give the results.json of swim evaluate") from None
    arm = run.resolve().name
    if not isinstance(results, dict) or not isinstance(results.get(arm), dict):
        raise ConfigError(f"{path}: no scores of {arm!r} in it; score this run, or leave --results out")
    origin = results.get("provenance", {}).get("arms", {}).get(arm, {})
    stated, own = str(origin.get("model", {}).get("weights_sha256")), weights_digest(run)
    if stated != own:
        raise ConfigError(f"{path}: scores of weights {stated[:16]}, the run's are {own[:16]}; evaluate the run again")
    metrics = {name: value for name, value in results[arm].items() if isinstance(value, dict) and "value" in value}
    return {
        "metrics": metrics,
        "coverage": results[arm].get("coverage", {}),
        "protocol": results.get("protocol", {}),
        "held_out": str(origin.get("data", {}).get("sha256", "unknown"))[:16],
    }


def _index(title: str, scored: Mapping[str, Any]) -> dict[str, Any]:
    held_out = scored["held_out"]
    values = [
        {"type": name, "name": f"{name} ({_protocol(scored)})", "value": estimate["value"]}
        for name, estimate in scored["metrics"].items()
        if estimate["value"] is not None and not name.startswith("prevalence")  # which is the data's
    ]
    data = {"name": f"held-out shards {held_out}", "type": held_out}
    return {"name": title, "results": [{"task": {"type": "video-text-to-text"}, "dataset": data, "metrics": values}]}


def _score_table(scored: Mapping[str, Any]) -> str:
    lines = [
        f"Protocol `{_protocol(scored)}`, held-out data {scored['held_out']}, coverage "
        + ", ".join(f"{k} {v}" for k, v in scored["coverage"].items() if isinstance(v, int))
        + "; 95 % intervals by bootstrap over clips.",
        "",
        "| metric | value | interval |",
        "| --- | --- | --- |",
    ]
    for name, estimate in scored["metrics"].items():
        value = "-" if estimate["value"] is None else f"{estimate['value']:.4f}"
        interval = estimate.get("interval")
        lines.append(f"| {name} | {value} | {'-' if interval is None else '{:.4f} to {:.4f}'.format(*interval)} |")
    return "\n".join(lines)


def _protocol(scored: Mapping[str, Any]) -> str:
    return f"{scored['protocol'].get('id', 'unknown')}, version {scored['protocol'].get('version', 'unknown')}"


def _training(config: Config, run: Path, sources: list[tuple[str, str, int]]) -> str:
    data = config.data
    done = json.loads((run / "done.json").read_text()) if (run / "done.json").exists() else {}
    lines = [
        f"- {config.run.steps} steps of {data.packs_per_step} packs, seed {config.run.seed}, {config.model.dtype}"
        + (f", {done['ranks']} processes, {done['seconds']:.0f} s of steps" if done else ""),
        f"- Frames: {data.num_frames}, sampling `{data.frame_sampling}`, {data.min_pixels} to {data.max_pixels} pixels",
        f"- Supervision: `{json.dumps(config.system)}`",
    ]
    for source, licence, shards in sources:
        lines.append(f"- Data: {source}, licence {licence} (as its records say: the first of each of {shards} shards)")
    if not sources:
        lines.append("- Data: not there any more when this was exported; look up its licences before you publish")
    return "\n".join(lines)


def _data_sources(config: Config) -> list[tuple[str, str, int]]:
    """Source, licence and number of shards of the training data, from the first record of every shard or file."""
    counted: dict[tuple[str, str], int] = {}
    for found in _first_records(config):
        counted[found] = counted.get(found, 0) + 1
    return [(source, licence, count) for (source, licence), count in sorted(counted.items())]


def _first_records(config: Config) -> Iterator[tuple[str, str]]:
    for data in config.data.train:
        try:
            shards = ShardSet(data.path, layers=data.layers)
        except (OSError, ShardError):
            continue
        first = {entry.shard: number for number, entry in reversed(list(enumerate(shards.entries)))}
        for number in first.values():
            record = shards.read(number, masks=False).record
            yield record.source, record.license
