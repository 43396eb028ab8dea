"""Predictions of a trained run over held-out shards: answers and noun maps, one JSON line per conversation,
resumable."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.progress import track

from swim.data_tools.files import write_whole
from swim.data_tools.mixture import DataSet, PlanOptions
from swim.data_tools.plan import make_plan
from swim.data_tools.shards import BadSample, ShardSet
from swim.train.config import Config, parse_config
from swim.train.metrics import append_jsonl
from swim.train.system import Request, build_system


def expected_ids(config: Config, shards: ShardSet) -> list[str]:
    """Ids of every held-out conversation that the run's task filter keeps."""
    units = _units(config, shards)
    return [f"{shards.entries[clip].key}#{i}" for clip, conversations in units for i in conversations]


def predict(run: Path, data: str | Path) -> tuple[Path, list[str]]:
    """Predictions of a finished run over the shards in `data`: path of the JSONL file, and the ids it should hold.

    The file lies in the run folder under a name made of the data's and the weights' digests, so lines that are there
    already are kept: other data or a retrained model have a file of their own. A sample that cannot be read becomes a
    line with its error and is tried again next time.
    """
    config = load_run(run)
    shards = ShardSet(data)
    path = run / "evaluation" / f"{shards.digest[:12]}-{weights_digest(run)[:12]}" / "predictions.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    done = _good_lines(path)
    system = build_system(config)
    model = system.build_model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    for clip, conversations in track(_units(config, shards), description=f"predict {run.name}"):
        key = shards.entries[clip].key
        wanted = tuple(i for i in conversations if f"{key}#{i}" not in done)
        if not wanted:
            continue
        try:
            lines: list[dict[str, Any]] = system.predict(model, Request(shards.read(clip), wanted))
        except BadSample as error:
            lines = [{"id": f"{key}#{i}", "clip": key, "error": str(error)} for i in wanted]
        append_jsonl(path, lines)
    return path, expected_ids(config, shards)


def weights_digest(run: Path) -> str:
    """SHA-256 over the safetensors of a run's model."""
    return safetensors_digest(run / "model")


def safetensors_digest(folder: Path) -> str:
    """SHA-256 over the safetensors in a model folder."""
    hashed = hashlib.sha256()
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _good_lines(path: Path) -> set[str]:
    """Ids that have a prediction; drops the rest of the file: errors, and a last line cut off in mid-write."""
    kept = {}
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            parsed = json.loads(line)
        except ValueError:
            continue
        if "error" not in parsed:
            kept[parsed["id"]] = line
    write_whole(path, "".join(line + "\n" for line in kept.values()))
    return set(kept)


def load_run(run: Path) -> Config:
    """Config of a finished run with its trained model in place of the one it started from; FileNotFoundError if it is
    not finished."""
    if not (run / "done.json").exists():
        raise FileNotFoundError(
            f"{run / 'done.json'} is missing: the run is not finished; resume it with the same command"
        )
    data = yaml.safe_load((run / "config.yaml").read_text())
    data["model"] |= {"path": str(run / "model"), "config": None, "tokenizer": None, "lora": None, "liger": False}
    return parse_config(data, source=str(run / "config.yaml"))


def _units(config: Config, shards: ShardSet) -> list[tuple[int, tuple[int, ...]]]:
    data = DataSet(str(shards.folder), shards.digest, shards.facts, shards.entries)
    tasks = None if config.data.tasks is None else tuple(config.data.tasks)
    plan = make_plan([data], PlanOptions(packs_per_step=1, seed=0, clips_per_pack=1, tasks=tasks, shuffle=False), 0)
    return [(unit.clip, unit.conversations) for unit in plan.units()]
