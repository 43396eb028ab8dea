"""Checkpoints that are complete or have no name: hidden folder, files hashed and synced by the rank that writes them,
manifest, rename.

DeepSpeed alone writes files under their final names and a `latest` that can point at half of them. Its state files are
pickles: they are opened only in a folder whose manifest verifies, and with an allow-list. That finds damage; it does
not tell who wrote the folder, so resume only runs of your own.
"""

import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, fields
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes

from swim.data_tools.files import sync
from swim.data_tools.plan import PlanState
from swim.train.partitions import CheckpointError as CheckpointError
from swim.train.partitions import Partitions, load_partitions
from swim.train.state_files import StateFiles, written_by
from swim.train.versions import versions
from swim.train.weights import frozen_hashes, stock_description
from swim.train.world import World

MANIFEST = "manifest.json"
LAST, BEST = "last", "best"
_NAME = re.compile(r"step_(\d{8})")
_HIDDEN = (".incoming_*", ".removed_*", ".link_*")
_REMEDY = "delete this folder to resume from the one before it"


def save_checkpoint(
    engine: Any,
    folder: Path,
    step: int,
    state: PlanState,
    world: World,
    *,
    guard: Mapping[str, Any] | None = None,
    score: float | None = None,
    keep: int | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """Write `folder`/step_XXXXXXXX: engine state, order, what the guard remembers, and random state of every rank;
    returns its path on all ranks.

    Links `last`, and `best` of the lowest `score`, follow; of the others, the `keep` newest stay. CheckpointError on
    all ranks if one of them cannot write; what was there before is untouched.
    """
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(f"{folder}: optimizer state on NVMe lies outside a checkpoint's files; offload it to cpu")
    hidden, final = folder / f".incoming_{step:08d}", folder / f"step_{step:08d}"
    files = StateFiles(hidden)
    if world.is_main:
        with files.noting():
            folder.mkdir(parents=True, exist_ok=True)
            _clear(folder)
            hidden.mkdir()
    world.barrier()
    with written_by(engine, files):
        engine.save_checkpoint(str(folder), tag=hidden.name, save_latest=False)
    files.write(f"rng_rank{world.rank:05d}.safetensors", to_bytes(_random_state()))
    frozen = frozen_hashes(engine, world)
    wrote = world.gather((files.entries, files.problem))
    problem = next((problem for _, problem in wrote if problem), None)
    if world.is_main and not problem:
        with files.noting():
            manifest = {
                "step": step,
                "world": world.size,
                "plan": asdict(state),
                "guard": dict(guard or {}),
                "score": score if score is not None and math.isfinite(score) else None,
                "versions": versions(),
                "stock": stock_description(engine.module),
                "frozen": frozen,
                "config": dict(config or {}),
                "files": {name: entry for entries, _ in wrote for name, entry in entries.items()},
            }
            files.write(MANIFEST, json.dumps(manifest, indent=1).encode())
        if not files.problem:
            with files.noting():
                _commit(hidden, final, keep=keep)
    if world.is_main and (problem := problem or files.problem):
        needed = sum(entry["size"] for entries, _ in wrote for entry in entries.values())
        what = "saved, but not linked or others not removed" if final.exists() else "not saved"
        problem = f"{final}: {what}: {problem}; {_room(folder, needed)}. Older checkpoints are untouched"
        with suppress(OSError):
            _clear(folder)
    if problem := world.gather(problem)[0]:
        raise CheckpointError(problem)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    return max(_named(folder), default=None)


def load_checkpoint(engine: Any, path: Path, world: World) -> tuple[PlanState, dict[str, Any]]:
    """Verify `path`, written by any number of ranks, and load it into the engine; position in the order, and what the
    guard remembers.

    CheckpointError if a file is missing or changed, or a frozen weight is not what it was.
    """
    manifest = verify(path, world)
    if set(manifest["plan"]) != {field.name for field in fields(PlanState)}:
        raise CheckpointError(
            f"{path}: its order was written by version {manifest['versions']['swim']}, and this one cannot go on with "
            "it; finish the run with that version, or start a new one"
        )
    if manifest["world"] != world.size and world.is_main:
        print(f"{path}: written by {manifest['world']} ranks, repartitioned for {world.size}", flush=True)
    load_partitions(engine, Partitions([path / name for name in manifest["files"]], manifest["world"]))
    found = frozen_hashes(engine, world, fresh=True)
    for name in sorted(manifest["frozen"].keys() | found.keys()):
        if manifest["frozen"].get(name) != found.get(name):
            raise CheckpointError(
                f"{path}: the frozen parameter {name} is not what it was when this was saved; restore model.path, "
                "model.freeze and model.lora of that run"
            )
    _restore_random_state(path, manifest, world)
    guard = manifest["guard"]  # a list of losses, before it held more than those
    return PlanState(**manifest["plan"]), guard if isinstance(guard, dict) else {"losses": guard}


def verify(path: Path, world: World | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint whose every file has the size and hash it was written with; the ranks of `world`
    share the work. CheckpointError names what has not."""
    rank, size = (world.rank, world.size) if world else (0, 1)
    manifest: dict[str, Any] = {}
    try:
        manifest = json.loads((path / MANIFEST).read_text())
        by_size = sorted(manifest["files"].items(), key=lambda item: (-item[1]["size"], item[0]))
        found = [problem for name, entry in by_size[rank::size] if (problem := _damage(path / name, entry))]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        # Told to all ranks below: a disk may fail one of them alone.
        found = [f"no usable {MANIFEST} ({type(error).__name__}: {error})"]
    if problems := sorted({*chain(*(world.gather(found) if world else [found]))}):
        raise CheckpointError(f"{path}: {'; '.join(problems)}: {_REMEDY}")
    return manifest


def _commit(hidden: Path, final: Path, *, keep: int | None) -> None:
    folder = final.parent
    sync(hidden)
    os.replace(hidden, final)
    sync(folder)
    scores = {path: found for path in _named(folder) if (found := _score(path)) is not None}
    _link(folder / LAST, final)
    if best := min(scores, key=lambda path: (scores[path], path), default=None):
        _link(folder / BEST, best)
    sync(folder)
    for path in sorted(_named(folder))[: -keep if keep else 0]:
        if path != best:
            shutil.rmtree(_hide(path))
    for path in folder.glob(".removed_*"):
        shutil.rmtree(path)


def _hide(path: Path) -> Path:
    """Take its name away first: what is half removed has none."""
    hidden = path.with_name(f".removed_{path.name}")
    os.replace(path, hidden)
    return hidden


def _link(link: Path, target: Path) -> None:
    incoming = link.with_name(f".link_{link.name}")
    os.symlink(target.name, incoming)
    os.replace(incoming, link)


def _clear(folder: Path) -> None:
    """Remove what an interrupted save has left."""
    for path in [path for pattern in _HIDDEN for path in folder.glob(pattern)]:
        path.unlink() if path.is_symlink() else shutil.rmtree(path)


def _named(folder: Path) -> list[Path]:
    return [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and path.is_dir()]


def _score(path: Path) -> float | None:
    try:
        score: float | None = json.loads((path / MANIFEST).read_text())["score"]
    except (OSError, ValueError, KeyError):
        return None
    return score


def _damage(path: Path, entry: Mapping[str, Any]) -> str | None:
    if not path.is_file():
        return f"{path.name} is missing"
    if path.stat().st_size == entry["size"]:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]:
                return None
    return f"{path.name} is not what was written"


def _room(folder: Path, needed: int) -> str:
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    return f"{needed} bytes are needed, {shutil.disk_usage(existing).free} are free in {existing}"


def _random_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _restore_random_state(path: Path, manifest: Mapping[str, Any], world: World) -> None:
    if manifest["world"] != world.size:
        # Only dropout draws in training: new ranks need other numbers than each other, not those of the old ranks.
        torch.manual_seed((manifest["step"] << 20) + world.rank)
        return
    state = load_file(path / f"rng_rank{world.rank:05d}.safetensors")
    torch.set_rng_state(state["cpu"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
