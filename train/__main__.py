"""The training program: `python -m swim.train [--config RECIPE] [section.key=value ...]`, started once per rank."""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import traceback
from typing import Any

DEFAULT_RECIPE = "tiny_cpu"
USAGE = """usage: deepspeed launch/train.sh [--config RECIPE] [section.key=value ...]
       python -m swim.train --dry-run [--world-size N] [--config RECIPE] [section.key=value ...]"""


def parse_arguments(arguments: list[str]) -> tuple[str, list[str]]:
    """Recipe and overrides; SystemExit with the usage for anything else. Launchers add --local_rank=N, which is
    dropped."""
    recipe, overrides = DEFAULT_RECIPE, []
    rest = iter(arguments)
    for argument in rest:
        if argument in ("-h", "--help"):
            print(USAGE)
            raise SystemExit(0)
        if argument == "--config":
            recipe = next(rest, "")
        elif argument.startswith("--config="):
            recipe = argument.removeprefix("--config=")
        elif argument.startswith(("--local_rank", "--local-rank")):
            if "=" not in argument:
                next(rest, None)
        elif argument.startswith("-") or "=" not in argument:
            raise SystemExit(f"unknown argument {argument!r}\n{USAGE}")
        else:
            overrides.append(argument)
    if not recipe:
        raise SystemExit(f"--config needs a recipe\n{USAGE}")
    return recipe, overrides


def take_dry_run(arguments: list[str]) -> tuple[list[str], bool, int | None]:
    """The other arguments, whether `--dry-run` is among them, and the `--world-size` that belongs to it."""
    rest, dry_run, size = [], False, None
    words = iter(arguments)
    for word in words:
        if word == "--dry-run":
            dry_run = True
        elif word.split("=")[0] == "--world-size":
            size = word.partition("=")[2] or next(words, "")
        else:
            rest.append(word)
    if size is not None and not (dry_run and size.isdecimal() and int(size)):
        raise SystemExit(f"--world-size {size}: give a number of ranks from 1, beside --dry-run\n{USAGE}")
    return rest, dry_run, int(size) if size else None


def main(arguments: list[str] | None = None) -> None:
    """Parse, check and train; a mistake of the user ends in one clear message and exit code 2.

    With `--placement` first, print the number of processes the recipe wants on this node, a free port and the run
    folder, and do nothing else. With `--dry-run` walk the plan of `--world-size` ranks in this one process, and exit
    with 0 or 1.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    arguments, dry_run, world_size = take_dry_run(arguments)
    placement = arguments[:1] == ["--placement"]
    recipe, overrides = parse_arguments(arguments[placement:])
    from swim.train.config import ConfigError, engine_file, load_config

    try:
        config = load_config(recipe, overrides)
        if placement:
            engine_file(config)
            print(config.launch.ranks or _num_gpus(), free_port(), config.run.folder)
            return
        from swim.data_tools.mixture import PlanError
        from swim.data_tools.pool import PoolError
        from swim.data_tools.shards import ShardError
        from swim.train.checkpoint import CheckpointError
        from swim.train.loop import TrainingError, train
        from swim.train.stop import EXIT_CODE, Stopped
    except ConfigError as error:
        raise SystemExit(_explain(error)) from None
    try:
        if dry_run:
            raise SystemExit(_walk(config, world_size))
        train(config)
    except Stopped as end:
        if os.environ.get("RANK", "0") == "0":
            print(end, flush=True)
        raise SystemExit(EXIT_CODE) from None
    except (ConfigError, ShardError, PlanError, PoolError, CheckpointError, TrainingError, OSError) as error:
        raise SystemExit(_explain(error)) from None


def _walk(config: Any, world_size: int | None) -> int:
    from swim.train.estimate import walk

    text, ready = walk(config, world_size or int(os.environ.get("WORLD_SIZE", config.launch.ranks or 1)))
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)
    return 0 if ready else 1


def _num_gpus() -> int:
    if "SLURM_GPUS_ON_NODE" in os.environ:  # nvidia-smi may list those of other jobs as well
        return max(1, int(os.environ["SLURM_GPUS_ON_NODE"]))
    listed = (
        subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True) if shutil.which("nvidia-smi") else None
    )
    return max(1, len(listed.stdout.splitlines())) if listed else 1


def free_port() -> int:
    """A port of this machine that nobody listens on, and that no outgoing connection is given before it is used."""
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):
            port = random.randrange(10000, 32768)  # below what Linux gives to connections
            probe.bind(("127.0.0.1", port))
            return port
    raise OSError("no free port from 10000 to 32767 in 100 attempts; set MASTER_PORT")


def _explain(error: Exception) -> int:
    # Most mistakes are found by every rank alike; what only another rank sees (a disk of its own) is not lost.
    rank = os.environ.get("RANK", "0")
    print(f"error: {error}" if rank == "0" else f"rank {rank}: error: {error}", file=sys.stderr, flush=True)
    return 2


def _leave(code: int) -> None:
    # Threads of gloo and autograd that ask for the interpreter while it shuts down abort the process now and then
    # ("terminate called without an active exception"), which a launcher takes for a failed run. Everything is on disk.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        _leave(end.code if isinstance(end.code, int) else 2 if end.code else 0)
    except BaseException:
        traceback.print_exc()
        _leave(1)
    _leave(0)
