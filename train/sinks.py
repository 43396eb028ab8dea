"""Where the numbers of a run go beside metrics.jsonl: TensorBoard and Weights & Biases, on the main rank, when asked.

A sink that fails (a full disk, no network, no key) is said once and left out; it never ends a run.
"""

import secrets
from collections.abc import Callable, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, TypeVar

from swim.data_tools.files import write_whole
from swim.train.config import Config, ConfigError, LogConfig, WandbConfig

TENSORBOARD_FOLDER, WANDB_ID_FILE = "tensorboard", "wandb_id.txt"

_T = TypeVar("_T")


class Sink(Protocol):
    """Takes the numbers of steps."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note step `step` (from 1)."""
        ...

    def close(self, *, failed: bool) -> None:
        """Write what is not written yet."""
        ...


def check_sinks(log: LogConfig) -> None:
    """ConfigError when a package of a sink that is asked for is not installed."""
    for asked, package in ((log.tensorboard, "tensorboard"), (log.wandb, "wandb")):
        if asked and find_spec(package) is None:
            raise ConfigError(
                f"log.{package}: the package {package} is not installed; pip install 'swim-train[track]', or take it "
                "out of the recipe"
            )


class TensorBoard:
    """Scalars in event files; those behind step `start` of an earlier part of the run are taken back."""

    def __init__(self, folder: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / TENSORBOARD_FOLDER), purge_step=start + 1)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note step `step` (from 1)."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, failed: bool) -> None:  # noqa: ARG002
        """Write what is not written yet."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases whose id lies in the run folder; steps that it has already are not taken twice."""

    def __init__(self, folder: Path, asked: WandbConfig, config: Config) -> None:
        import wandb

        path = folder / WANDB_ID_FILE
        name = path.read_text().strip() if path.exists() else secrets.token_hex(4)
        write_whole(path, name)
        self._run: Any = wandb.init(
            project=asked.project,
            entity=asked.entity,
            mode=asked.mode,
            id=name,
            name=config.run.name,
            resume="allow",
            dir=str(folder),
            settings=wandb.Settings(quiet=True),
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note step `step` (from 1)."""
        if step >= self._run.step:
            self._run.log(dict(values), step=step)

    def close(self, *, failed: bool) -> None:
        """Send what is not sent yet."""
        self._run.finish(exit_code=int(failed))


class Sinks:
    """All sinks that the configuration asks for; `start` is the last step that the run has already."""

    def __init__(self, config: Config, start: int, say: Callable[[str], object]) -> None:
        self._say, self._sinks = say, dict[str, Sink]()
        folder, log = config.run.folder, config.log
        if log.tensorboard:
            self._add("log.tensorboard", partial(TensorBoard, folder, start))
        if log.wandb is not None:
            self._add("log.wandb", partial(WeightsAndBiases, folder, log.wandb, config))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Note step `step` (from 1)."""
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.log, step, values))

    def close(self, *, failed: bool) -> None:
        """Close all sinks."""
        for name, sink in list(self._sinks.items()):
            self._try(name, partial(sink.close, failed=failed))

    def _add(self, name: str, make: Callable[[], Sink]) -> None:
        if (sink := self._try(name, make)) is not None:
            self._sinks[name] = sink

    def _try(self, name: str, work: Callable[[], _T]) -> _T | None:
        try:
            return work()
        except Exception as error:  # whatever a library raises: its numbers are in metrics.jsonl as well
            self._sinks.pop(name, None)
            self._say(f"{name} failed and is left out from here on: {type(error).__name__}: {error}")
            return None
