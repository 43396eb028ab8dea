"""What stands before the first step: the run folder and its lock, synthetic data, the order, the loader."""

import fcntl
import json
import os
import socket
from pathlib import Path
from typing import Any

import yaml

from swim.data_tools.mixture import PlanError
from swim.data_tools.shards import ShardError
from swim.data_tools.synth import synthesise
from swim.train.config import Config, ConfigError
from swim.train.loader import Loader, Order
from swim.train.metrics import write_whole
from swim.train.system import System
from swim.train.world import World

LOCK_FILE = ".lock"
# What may change between the parts of one run: when it saves, logs and stops, how it is launched, watched and loaded.
_FREE = {
    "run": ("save_every", "keep", "stop_after", "max_hours", "output", "name"),
    "data": ("workers", "deadline_s", "prefetch", "max_bad", "train", "synth", "cache", "cache_gib"),
    "guard": ("hang_s", "start_s", "max_refused"),
    "parallel": ("sequence",),
}


def prepare_run(config: Config, world: World) -> None:
    """Run folder, its lock, resolved configuration and synthetic data: made by the main rank, awaited by all.

    ConfigError if another run is in the folder, or one of another configuration was.
    """
    problem = None
    if world.is_main:
        try:
            _render(config)
            config.run.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(config.run.folder)
            _claim(config)
        except (ConfigError, ValueError, OSError) as error:
            problem = str(error)
    # Told to all ranks: they would wait for a main rank that has left.
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)


def lock_folder(folder: Path) -> None:
    """Keep other runs out of a run folder until this process ends; ConfigError if one is inside."""
    # Never closed: closing any descriptor of the file gives the lock up. Children do not inherit it.
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(descriptor, 1000, 0).decode(errors="replace")
        os.close(descriptor)
        raise ConfigError(f"{folder} belongs to a run that is going on ({holder}); wait for it, or end it") from None
    except OSError as error:
        print(f"{folder / LOCK_FILE}: this file system has no locks ({error}); start no second run there", flush=True)
        return
    job = os.environ.get("SLURM_JOB_ID")
    text = f"process {os.getpid()} on {socket.gethostname()}" + (f", SLURM job {job}" if job else "")
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, text.encode(), 0)


def build_order(config: Config, system: System, world: World) -> Order:
    """The order of the run. The main rank is first: it counts tokens and writes plans, the others read them."""
    order, problem, cache = None, None, config.run.folder / "plans"
    if world.is_main:
        try:
            order = Order(config, system, cache=cache)
        except (ConfigError, ShardError, PlanError) as error:
            problem = error
    if problem := world.gather(problem)[0]:
        raise problem
    order = order or Order(config, system, cache=cache, writes=False)
    if len(set(world.gather(order.plan(0).digest))) > 1:
        folders = [part.path for part in config.data.train]
        raise ConfigError(f"the ranks see different data in {folders}; compare the nodes")
    return order


def build_loader(config: Config, system: System, order: Order, world: World) -> Loader:
    """This rank's loader; its workers are copies of the process as it is now."""
    data = config.data
    return Loader(
        order,
        system.collator,
        # Ranks that hold a micro-batch together read the same packs.
        rank=world.rank // config.parallel.sequence,
        size=world.size // config.parallel.sequence,
        workers=data.workers,
        deadline_s=data.deadline_s,
        prefetch=data.prefetch,
        pinned=world.device.type == "cuda",
    )


def _render(config: Config) -> None:
    synth, folder = config.data.synth, Path(config.data.train[0].path)
    if synth is None:
        return
    if "://" in config.data.train[0].path or folder.suffix == ".jsonl":
        raise ConfigError(f"data.synth cannot render into {config.data.train[0].path}; set data.synth=null")
    recipe, wanted = folder / "synth.json", json.dumps(synth.model_dump())
    if any(folder.glob("*.tar")):
        found = recipe.read_text() if recipe.exists() else "other data"
        if found != wanted:
            raise ConfigError(
                f"data.synth asks for {wanted}, but {folder} holds {found}; remove that folder, or set data.synth=null"
            )
        return
    print(f"rendering {synth.clips} clips into {folder}", flush=True)
    synthesise(folder, clips=synth.clips, seed=synth.seed, size=synth.size)
    recipe.write_text(wanted)


def _claim(config: Config) -> None:
    folder = config.run.folder
    resolved = config.model_dump(mode="json")
    saved = folder / "config.yaml"
    if saved.exists() and _identity(yaml.safe_load(saved.read_text())) != _identity(resolved):
        raise ConfigError(
            f"{folder} holds a run with another configuration; give run.name another value or remove the folder"
        )
    write_whole(saved, yaml.safe_dump(resolved, sort_keys=False))


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    fixed = {
        section: {key: value for key, value in config.get(section, {}).items() if key not in free}
        for section, free in _FREE.items()
    }
    return {**config, **fixed, "launch": None}
