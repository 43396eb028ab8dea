"""Checkpoints that are complete or have no name: hidden folder, barrier, manifest with hashes, rename.

DeepSpeed alone writes files under their final names and a `latest` that can point at half of them. Its state files are
pickles: they are loaded only from a folder whose manifest verifies. That finds damage; it does not tell who wrote the
folder, so resume only runs of your own.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers.utils import cached_file

from swim import __version__
from swim.data_tools.plan import PlanState
from swim.data_tools.shards import sync
from swim.train.lora import has_lora, merge_lora, save_adapter
from swim.train.world import World

MANIFEST = "manifest.json"
_NAME = re.compile(r"step_(\d{8})")


class CheckpointError(RuntimeError):
    """A checkpoint is damaged or does not fit; the message names file, value and remedy."""


def save_checkpoint(
    engine: Any, folder: Path, step: int, state: PlanState, world: World, *, guard: Sequence[float] = ()
) -> Path:
    """Write `folder`/step_XXXXXXXX: engine state, order, what the guard remembers, and random state of every rank;
    returns its path on all ranks."""
    hidden, final = folder / f".incoming_{step:08d}", folder / f"step_{step:08d}"
    if world.is_main:
        for torn in folder.glob(".incoming_*"):
            shutil.rmtree(torn)
        hidden.mkdir(parents=True)
    world.barrier()
    engine.save_checkpoint(str(folder), tag=hidden.name, save_latest=False)
    save_file({"cpu": torch.get_rng_state()}, hidden / f"rng_rank{world.rank:05d}.safetensors")
    world.barrier()
    if world.is_main:
        files = {str(path.relative_to(hidden)): _digest(path) for path in sorted(hidden.rglob("*")) if path.is_file()}
        manifest = {"version": __version__, "step": step, "world": world.size, "plan": asdict(state)}
        manifest |= {"guard": list(guard), "files": files}
        (hidden / MANIFEST).write_text(json.dumps(manifest, indent=1))
        for path in hidden.rglob("*"):
            if path.is_file():
                sync(path)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(hidden, final)
        sync(folder)
    world.barrier()
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step, if there is one."""
    named = [path for path in folder.glob("step_*") if _NAME.fullmatch(path.name) and (path / MANIFEST).exists()]
    return max(named, default=None)


def load_checkpoint(engine: Any, path: Path, world: World) -> tuple[PlanState, list[float]]:
    """Verify `path` and load it into the engine; position in the order, and what the guard remembers.

    CheckpointError if a file is missing, changed, or from another world size.
    """
    manifest = json.loads((path / MANIFEST).read_text())
    problems: list[str] = []
    if world.is_main:
        problems = [
            f"{name} is {'missing' if not (path / name).exists() else 'not what was written'}"
            for name, digest in manifest["files"].items()
            if not (path / name).exists() or _digest(path / name) != digest
        ]
    if problems := world.gather(problems)[0]:
        raise CheckpointError(f"{path}: {'; '.join(problems)}: delete this folder to resume from the one before it")
    if manifest["world"] != world.size:
        raise CheckpointError(
            f"{path}: written by {manifest['world']} ranks, this run has {world.size}; "
            f"start it with {manifest['world']} ranks"
        )
    if set(manifest["plan"]) != {field.name for field in fields(PlanState)}:
        raise CheckpointError(
            f"{path}: written by version {manifest['version']}, whose order version {__version__} cannot go on with; "
            "finish the run with that version, or start a new one"
        )
    loaded, _ = engine.load_checkpoint(str(path.parent), tag=path.name)
    if loaded is None:
        raise CheckpointError(f"{path}: the engine found no state; delete this folder to resume from the one before it")
    torch.set_rng_state(load_file(path / f"rng_rank{world.rank:05d}.safetensors")["cpu"])
    return PlanState(**manifest["plan"]), manifest["guard"]


# What a processor is made of beside the tokenizer; training changes none of it, so it is taken over from the base
# model.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


def save_model(engine: Any, folder: Path, tokenizer: Any, base: str | None, world: World) -> None:
    """Stock model folder of the current weights, gathered one parameter at a time on rank 0, with `base`'s processor.

    Adapters are merged into it, and also written alone into its subfolder `adapter`.
    """
    import deepspeed

    state: dict[str, torch.Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        partitioned = hasattr(parameter, "ds_id")
        with deepspeed.zero.GatheredParameters([parameter], enabled=partitioned):
            if world.is_main:
                state[name] = parameter.detach().to("cpu", copy=True)
    if world.is_main:
        hidden = folder.with_name(f".{folder.name}.incoming")
        shutil.rmtree(hidden, ignore_errors=True)
        model = engine.module
        if has_lora(model):
            save_adapter(model, state, hidden / "adapter")
            model, state = model.get_base_model(), merge_lora(model, state)
        # Under ZeRO-3 transformers 5.23 keeps renamings that no weight needed, and would undo those as well.
        if conversions := getattr(model, "_weight_conversions", None):
            # (5.17 has no `was_used`, nor the renamings.)
            model._weight_conversions = [c for c in conversions if getattr(c, "was_used", lambda: True)()]
        model.save_pretrained(hidden, state_dict=state)
        tokenizer.save_pretrained(hidden)
        for name in PROCESSOR_FILES:
            found = base and cached_file(base, name, _raise_exceptions_for_missing_entries=False)
            if found:
                shutil.copyfile(found, hidden / name)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(hidden, folder)
    world.barrier()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
