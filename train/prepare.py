"""What stands before the first step: the run folder and its lock, synthetic data, the order, the loader."""

import fcntl
import json
import os
import resource
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from swim.data_tools.files import locked, write_whole
from swim.data_tools.synth import synthesise
from swim.train import heartbeat
from swim.train.config import Config, ConfigError, SynthConfig, parse_config
from swim.train.loader import Loader, Order
from swim.train.sinks import check_sinks
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
_FREE_SECTIONS = ("launch", "log", "probe", "profile")


def prepare_run(config: Config, world: World) -> None:
    """Run folder, its lock, resolved configuration and synthetic data: made by the main rank, awaited by all.

    ConfigError if another run is in the folder, or one of another configuration was.
    """

    def prepare() -> None:
        try:
            check_sinks(config.log)
            config.run.folder.mkdir(parents=True, exist_ok=True)
            lock_folder(config.run.folder)
            _claim(config)
            (config.run.folder / heartbeat.FOLDER / heartbeat.FAILED).unlink(missing_ok=True)
            _render(config)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error

    world.on_main(prepare)
    # Shards stay open, and every batch on its way is one more file.
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


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
    cache = config.run.folder / "plans"
    order: Order | None = None

    def first() -> None:
        nonlocal order
        order = Order(config, system, cache=cache)

    world.on_main(first)
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
    folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(folder.parent / f".{folder.name}.lock"):  # another run may be at it
        _render_once(synth, folder)


def _render_once(synth: SynthConfig, folder: Path) -> None:
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
    saved = folder / "config.yaml"
    if saved.exists():
        try:
            before = parse_config(yaml.safe_load(saved.read_text()), source=str(saved))
        except (yaml.YAMLError, UnicodeError) as error:
            raise ConfigError(f"{saved}: cannot be read as YAML ({error}); remove the folder") from None
        then, now = (dict(_identity(one.model_dump(mode="json"))) for one in (before, config))
        names = [name for name in sorted(then.keys() | now.keys()) if then.get(name) != now.get(name)]
        if changed := [f"{name} was {then.get(name)!r}, is {now.get(name)!r}" for name in names]:
            raise ConfigError(
                f"{folder} holds a run with another configuration ({'; '.join(changed[:3])}); restore that to resume, "
                "give run.name another value, or remove the folder"
            )
    write_whole(saved, yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))


def _identity(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values of the fields that all parts of a run have in common."""
    for key, value in config.items():
        if key in _FREE.get(prefix.rstrip("."), ()) or (not prefix and key in _FREE_SECTIONS):
            continue
        if isinstance(value, dict):
            yield from _identity(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
