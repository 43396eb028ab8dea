"""Predictions of a trained run over held-out shards: answers and noun maps, one JSON line per conversation,
resumable."""

import json
from pathlib import Path
from typing import Any

import torch
from rich.progress import track

from swim.data_tools.plan import make_plan
from swim.data_tools.shards import BadSample, ShardSet
from swim.train.config import Config, load_config
from swim.train.metrics import append_jsonl
from swim.train.system import Request, build_system


def expected_ids(config: Config, shards: ShardSet) -> list[str]:
    """Ids of every held-out conversation that the run's task filter keeps."""
    units = _units(config, shards)
    return [f"{shards.entries[clip].key}#{i}" for clip, conversations in units for i in conversations]


def predict(run: Path, data: Path, out: Path) -> list[str]:
    """Write `out`/predictions.jsonl for the finished run's model over the shards in `data`; returns the expected ids.

    Lines that are there already are kept. A sample that cannot be read becomes a line with its error.
    """
    config = load_run(run)
    shards = ShardSet(data)
    system = build_system(config)
    model = system.build_model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "predictions.jsonl"
    done = {json.loads(line)["id"] for line in path.read_text().splitlines()} if path.exists() else set()
    torch.manual_seed(config.run.seed)
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
    return expected_ids(config, shards)


def load_run(run: Path) -> Config:
    """Config of a finished run with its trained model in place of the one it started from; FileNotFoundError if it is
    not finished."""
    if not (run / "done.json").exists():
        raise FileNotFoundError(
            f"{run / 'done.json'} is missing: the run is not finished; resume it with the same command"
        )
    return load_config(
        run / "config.yaml", [f"model.path={run / 'model'}", "model.config=null", "model.tokenizer=null"]
    )


def _units(config: Config, shards: ShardSet) -> list[tuple[int, tuple[int, ...]]]:
    plan = make_plan(
        [shards.digest],
        [shards.entries],
        weights=None,
        clips_per_pack=1,
        packs_per_step=1,
        seed=0,
        epoch=0,
        tasks=config.data.tasks,
        shuffle=False,
    )
    return [(unit.clip, unit.conversations) for pack in plan.packs for unit in pack]
