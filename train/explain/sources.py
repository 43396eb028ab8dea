"""The model to be explained: a finished run, or any stock model folder, and what is known about its training."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from huggingface_hub import snapshot_download

from swim.data_tools.index import BadSample, ShardError
from swim.data_tools.shards import ShardSet
from swim.train.config import Config, ConfigError, load_config, parse_config
from swim.train.predict import load_run
from swim.train.systems.swim.config import resolve_layers

STOCK_RECIPE = "swim_7b"  # whose frames and pixels a stock model gets
SYNTH = "synth"  # what records of rendered clips name as their source
MAX_READ = 20  # samples of a data set that are asked for their source


@dataclass(frozen=True)
class Source:
    """A model by name, the configuration that loads it, and the configuration of its training (None: not known)."""

    name: str
    config: Config
    trained: Config | None
    sources: frozenset[tuple[str, str]]  # (source, licence) of the data of the run, as far as it can be read
    unread: tuple[str, ...]  # names of data sets that cannot be

    def config_with(self, frames: int | None, pixels: int | None) -> Config:
        """The configuration with other numbers of frames and of pixels of a frame."""
        changed: dict[str, Any] = {} if frames is None else {"num_frames": frames}
        if pixels is not None:
            changed |= {"max_pixels": pixels, "min_pixels": min(pixels, self.config.data.min_pixels)}
        if frames is not None:
            changed["min_frames"] = min(frames, self.config.data.min_frames)
        data = self.config.data.model_dump(mode="json") | changed
        return parse_config(self.config.model_dump(mode="json") | {"data": data}, source=self.name)

    def own_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers whose attention the run compared with masks, whatever its weight; none if nothing is known."""
        system = self.trained.system if self.trained else {}
        return resolve_layers(system["layers"], num_layers) if "layers" in system else ()

    @property
    def history(self) -> str:
        """How the model was made, in a line."""
        if self.trained is None:
            return "not known: no run stands behind this folder"
        run = self.trained
        parts = [f"{run.run.steps} steps", f"mask weight {run.system.get('mask_weight', 0):g}", self._said()]
        start = "random weights" if run.model.config is not None else Path(str(run.model.path)).name
        return f"from {start}, " + ", ".join(parts)

    def about_training(self, source: str | None) -> tuple[str, bool]:
        """What the model was trained on beside what this video is (its record's source, None: unknown), and whether
        that is a warning: that it was not trained on such video, or that nobody knows."""
        if self.trained is None:
            return "What this model was trained on is not known here: no run stands behind its folder.", True
        run, said = self.trained, self._said()
        video = "a file of unknown source" if source is None else f"from {source}"
        based = run.model.config is None
        before = f" What its base {Path(str(run.model.path)).name} saw before is not known here." if based else ""
        if source is not None and source in {name for name, _ in self.sources}:
            return f"Trained for {run.run.steps} steps on {said}; this video is of the same source.{before}", False
        if self.unread:
            return f"Trained for {run.run.steps} steps on {said}; whether on video like this cannot be told.", True
        never = "This run never trained on such video" if based else "Never trained on such video"
        return (
            f"{never}: its {run.run.steps} steps saw {said} alone, this video is {video}. Answer and maps show what "
            f"the model does with what it does not know.{before}",
            True,
        )

    def _said(self) -> str:
        rendered = "rendered clips of moving shapes, "
        named = [f"{rendered if name == SYNTH else ''}{name} ({license})" for name, license in sorted(self.sources)]
        return " and ".join([*named, *(f"{name}, which cannot be read here" for name in self.unread)])


def find_source(name: str) -> Source:
    """The model that `name` says: the folder of a finished run, a stock model folder, or a hub id.

    FileNotFoundError for an unfinished run, ConfigError for something else.
    """
    folder = Path(name)
    if (folder / "config.yaml").exists():
        config = _to_look(load_run(folder))
        trained = parse_config(yaml.safe_load((folder / "config.yaml").read_text()), source=str(folder / "config.yaml"))
        sources, unread = _data_sources(trained)
        return Source(folder.resolve().name, config, trained, sources, unread)
    if folder.exists() and not (folder / "config.json").exists():
        raise ConfigError(f"{folder}: neither a run (config.yaml) nor a model folder (config.json) is there")
    path = str(folder) if folder.exists() else _fetched(name)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    overrides = [f"model.dtype={dtype}", "data.frame_sampling=uniform"]
    config = load_config(STOCK_RECIPE, overrides)
    config = config.model_copy(update={"model": config.model.model_copy(update={"path": path})})
    return Source(folder.resolve().name if folder.exists() else name, _to_look(config), None, frozenset(), ())


def _fetched(name: str) -> str:
    try:
        return str(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "*.txt", "*.jinja"]))
    except (OSError, ValueError) as error:
        problem = str(error).partition("\n")[0]
        raise ConfigError(f"{name}: no such folder, and the hub does not give it ({problem}); give a folder") from None


def _to_look(config: Config) -> Config:
    """Without what only training needs, on an attention backend that every device has."""
    plain: dict[str, Any] = {"lora": None, "freeze": [], "checkpointing": False, "attention": "sdpa"}
    return config.model_copy(update={"model": config.model.model_copy(update=plain)})


def _data_sources(config: Config) -> tuple[frozenset[tuple[str, str]], tuple[str, ...]]:
    """Sources and licences that records of the data sets name, and the data sets that cannot be read."""
    found, unread = set(), []
    for part in config.data.train:
        try:
            shards = ShardSet(part.path)
            for number in range(0, len(shards), max(1, len(shards) // MAX_READ)):
                with contextlib.suppress(BadSample):
                    record = shards.read(number, masks=False).record
                    found.add((record.source, record.license))
        except (OSError, ShardError):
            unread.append(Path(part.path).name)
    return frozenset(found), tuple(unread)


def distinct(names: Sequence[str]) -> list[str]:
    """Names with a number behind those that come again."""
    return [name if name not in names[:i] else f"{name} ({i + 1})" for i, name in enumerate(names)]
