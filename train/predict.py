"""Predictions of a model over held-out shards: answers and noun maps, one JSON line per conversation, resumable.

Beside the lines lies a header with the expected ids and everything a reader needs to repeat them, so that scoring needs
neither the data nor the model.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
import yaml
from rich.progress import track

from swim.data_tools.files import write_whole
from swim.data_tools.mixture import DataSet, PlanOptions
from swim.data_tools.plan import make_plan
from swim.data_tools.records import Conversation
from swim.data_tools.rewording import replace_nouns, shuffle_options
from swim.data_tools.shards import BadSample, Sample, ShardSet
from swim.evaluation.predictions import Expected, Header, header_path, read_header, read_lines, write_header
from swim.evaluation.registry import find_benchmark
from swim.evaluation.stages import software
from swim.train.config import Config, ConfigError, load_config, parse_config
from swim.train.metrics import append_jsonl
from swim.train.system import MAX_ANSWER_TOKENS, Detail, Request, View, build_system

PACKAGES = ("torch", "transformers", "deepspeed", "numpy")
Maps = Literal["teacher", "generated"]


@dataclass(frozen=True)
class Model:
    """What predicts: a finished run, or a model folder with a recipe. `figures` are the run's own, such as seconds."""

    name: str
    path: Path
    config: Config
    figures: dict[str, Any]
    weights: str
    adapter: str | None = None
    folder: Path | None = None  # where predictions go that nobody names; of a run only


@dataclass(frozen=True)
class Options:
    """How is predicted: for which benchmark, what is kept of the maps, and in which words is asked."""

    benchmark: str = "alignment-grid"
    keep: tuple[Detail, ...] = ()
    layers: str | None = None  # of the kept maps; default: the supervised ones
    maps: Maps = "teacher"
    synonyms: Path | None = None
    shuffle_options: int | None = None  # a seed
    max_new_tokens: int = MAX_ANSWER_TOKENS

    def describe(self) -> dict[str, Any]:
        """The options as they are noted, files by their hash."""
        words = None if self.synonyms is None else f"{self.synonyms.name} {_sha256([self.synonyms])[:12]}"
        return {
            "maps": "teacher-forced" if self.maps == "teacher" else "over the generated answer",
            "kept": sorted(self.keep),
            "kept_layers": self.layers,
            "synonyms": words,
            "options_shuffled_by_seed": self.shuffle_options,
            "decoding": {
                "strategy": "greedy",
                "max_new_tokens": self.max_new_tokens,
                "batch": "a clip's conversations",
            },
        }


def check_keep(given: Sequence[str]) -> tuple[Detail, ...]:
    """The parts of maps to keep, as they are known; ConfigError."""
    if unknown := [item for item in given if item not in get_args(Detail)]:
        raise ConfigError(f"--keep {unknown[0]!r} is not one of: {', '.join(get_args(Detail))}")
    return cast(tuple[Detail, ...], tuple(dict.fromkeys(given)))


def find_model(path: Path, recipe: str | None = None, overrides: Sequence[str] = ()) -> Model:
    """A run by its folder, or a model folder read with a recipe; ConfigError, FileNotFoundError.

    Of the recipe everything but where the model comes from is taken: frames, pixels, prompts, layers, data type.
    """
    if (path / "config.yaml").exists():
        if recipe is not None or overrides:
            raise ConfigError(f"{path} is a run, which brings its own recipe; leave --recipe and overrides out")
        config = load_run(path)
        weights = path / "model"
        done = json.loads((path / "done.json").read_text())
        return Model(path.resolve().name, weights, config, done, weights_digest(path), _adapter(weights), path)
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"{path}: neither a run (config.yaml) nor a model folder (config.json)")
    if recipe is None:
        raise ConfigError(f"{path} is a model folder: say how to ask it with --recipe, e.g. swim_7b")
    own = [f"model.path={json.dumps(str(path))}", "model.config=null", "model.tokenizer=null", "model.lora=null"]
    config = load_config(recipe, [*overrides, *own])
    digest = safetensors_digest(path)
    return Model(path.resolve().name, path, config, {}, digest, _adapter(path))


def expected_ids(config: Config, shards: ShardSet) -> list[str]:
    """Ids of every held-out conversation that the run's task filter keeps."""
    units = _units(config, shards)
    return [f"{shards.entries[clip].key}#{i}" for clip, conversations in units for i in conversations]


def predict(
    source: Path | Model, data: str | Path, *, options: Options | None = None, out: Path | None = None
) -> tuple[Path, list[str]]:
    """Predictions of a run or model over the shards in `data`: path of the JSONL file, and the ids it should hold.

    Without `out` the file lies in the run folder under a name made of the data's, the weights' and the options'
    digests, so lines that are there already are kept: other data or a retrained model have a file of their own. A
    sample that cannot be read becomes a line with its error and is tried again next time. ConfigError if `out` holds
    predictions of something else.
    """
    model = find_model(source) if isinstance(source, Path) else source
    options = options or Options()
    find_benchmark(options.benchmark)
    shards = ShardSet(data)
    path = out or _default_path(model, shards, options)
    header = make_header(model, data, shards, options)
    path.parent.mkdir(parents=True, exist_ok=True)
    _check_same(path, header)
    done = _good_lines(path)
    write_header(path, header)
    _predict_rest(path, model, shards, options, done)
    return path, [entry.id for entry in header.expected]


def _predict_rest(path: Path, model: Model, shards: ShardSet, options: Options, done: set[str]) -> None:
    """Append a line for every expected id that has none."""
    system = build_system(model.config)
    network = system.build_model().eval().to("cuda" if torch.cuda.is_available() else "cpu")
    view = View(frozenset(options.keep), options.layers, options.maps == "generated", options.max_new_tokens)
    for clip, conversations in track(_units(model.config, shards), description=f"predict {model.name}"):
        key = shards.entries[clip].key
        wanted = tuple(i for i in conversations if f"{key}#{i}" not in done)
        if not wanted:
            continue
        try:
            sample = reword(shards.read(clip), wanted, options)
            lines: list[dict[str, Any]] = system.predict(network, Request(sample, wanted), view)
        except BadSample as error:
            lines = [{"id": f"{key}#{i}", "clip": key, "error": str(error)} for i in wanted]
        append_jsonl(path, lines)


def reword(sample: Sample, chosen: Iterable[int], options: Options) -> Sample:
    """The sample with its chosen conversations in other words; ConfigError if one cannot be."""
    if options.synonyms is None and options.shuffle_options is None:
        return sample
    words = _words(options.synonyms) if options.synonyms is not None else {}
    conversations = list(sample.record.conversations)
    for i in chosen:
        name = f"{sample.key}#{i}"
        try:
            changed: Conversation = replace_nouns(conversations[i], words)[0]
            if options.shuffle_options is not None:
                changed = shuffle_options(changed, options.shuffle_options, name)
        except ValueError as error:
            raise ConfigError(f"{name}: {error}") from None
        conversations[i] = changed
    return replace(sample, record=sample.record.model_copy(update={"conversations": conversations}))


def make_header(model: Model, data: str | Path, shards: ShardSet, options: Options) -> Header:
    """The header of predictions: expected ids, protocol, and what a reader needs to repeat them."""
    config, expected, prompts = model.config, [], hashlib.sha256()
    for clip, conversations in _units(config, shards):
        key = shards.entries[clip].key
        try:
            sample = reword(shards.read(clip, masks=False), conversations, options)
        except BadSample:
            expected += [Expected(f"{key}#{i}", key) for i in conversations]
            continue
        for i in conversations:
            conversation = sample.record.conversations[i]
            turns = [turn.text for turn in conversation.turns]
            prompts.update(json.dumps([key, i, turns]).encode())
            nouns = _count_nouns(conversation) if sample.record.media else 0
            expected.append(Expected(f"{key}#{i}", key, conversation.task, turns[-1], nouns))
    provenance = {
        "model": {
            "path": str(model.path),
            "weights_sha256": model.weights,
            "adapter_sha256": model.adapter,
            "dtype": config.model.dtype,
            "attention": config.model.attention,
        },
        "data": {"path": str(data), "sha256": shards.digest, "tasks": config.data.tasks},
        "prompts_sha256": prompts.hexdigest(),
        "sampling": {
            name: getattr(config.data, name)
            for name in ("frame_sampling", "num_frames", "fps", "min_frames", "min_pixels", "max_pixels", "clip_pixels",
                         "decoder")
        },
        "system": config.system,
        "seed": config.run.seed,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "software": software(PACKAGES),
        "figures": model.figures,
    }  # fmt: skip
    return Header(model.name, options.benchmark, tuple(expected), options.describe(), _plain(provenance))


def _count_nouns(conversation: Conversation) -> int:
    """Nouns that see the clip, which stands at the head of the first user turn."""
    roles = [turn.role for turn in conversation.turns]
    behind = conversation.turns[roles.index("user") :] if "user" in roles else []
    return sum(mention.kind == "noun" and bool(mention.object_ids) for turn in behind for mention in turn.mentions)


def _check_same(path: Path, header: Header) -> None:
    """ConfigError if the file holds predictions of another model, data, prompts or options."""
    if not path.exists() or not path.stat().st_size:
        return  # a first attempt that wrote no line binds to nothing
    if not header_path(path).exists():
        raise ConfigError(
            f"{path} is there without a header, so nobody knows what it is of; "
            "remove it, or name another file with `swim evaluate predict --out`"
        )
    old = read_header(path)
    for what, before, now in (
        ("expected ids", old.expected, header.expected),
        ("options", old.protocol, header.protocol),
        *((name, old.provenance.get(name), header.provenance[name]) for name in ("data", "sampling", "system")),
        ("weights", old.provenance["model"]["weights_sha256"], header.provenance["model"]["weights_sha256"]),
        ("adapter, data type or attention", _how(old), _how(header)),
        ("prompts", old.provenance["prompts_sha256"], header.provenance["prompts_sha256"]),
    ):
        if before != now:
            raise ConfigError(f"{path} holds predictions with other {what}; remove it, or name another file with --out")


def _how(header: Header) -> list[Any]:
    return [header.provenance["model"].get(name) for name in ("adapter_sha256", "dtype", "attention")]


def _default_path(model: Model, shards: ShardSet, options: Options) -> Path:
    if model.folder is None:
        raise ConfigError(f"{model.path} is a model folder, nothing is written into it: name a file with --out")
    described = json.dumps([options.benchmark, options.describe()], sort_keys=True)
    plain = options == Options(benchmark=options.benchmark)
    suffix = "" if plain else f"-{hashlib.sha256(described.encode()).hexdigest()[:8]}"
    folder = f"{shards.digest[:12]}-{model.weights[:12]}{suffix}"
    return model.folder / "evaluation" / folder / "predictions.jsonl"


def weights_digest(run: Path) -> str:
    """SHA-256 over the safetensors of a run's model."""
    return safetensors_digest(run / "model")


def safetensors_digest(folder: Path) -> str:
    """SHA-256 over the safetensors in a model folder; FileNotFoundError without any."""
    if not (files := sorted(folder.glob("*.safetensors"))):
        raise FileNotFoundError(f"{folder}: no *.safetensors in it; save the model with safe_serialization=True")
    return _sha256(files)


def _adapter(model: Path) -> str | None:
    files = sorted((model / "adapter").glob("*.safetensors"))
    return _sha256(files) if files else None


def _sha256(files: Sequence[Path]) -> str:
    """SHA-256 over the SHA-256 of files."""
    hashed = hashlib.sha256()
    for path in files:
        with path.open("rb") as file:
            hashed.update(hashlib.file_digest(file, "sha256").digest())
    return hashed.hexdigest()


def _words(path: Path) -> dict[str, str]:
    """Synonyms {noun: other noun} of a JSON file; ConfigError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
    if not isinstance(found, dict) or not all(isinstance(word, str) and word for word in found.values()):
        raise ConfigError(f"{path}: must hold {{noun: synonym}}")
    return {noun.lower(): word for noun, word in found.items()}


def _plain(value: Any) -> Any:
    """The value as JSON gives it back."""
    return json.loads(json.dumps(value, default=str))


def _good_lines(path: Path) -> set[str]:
    """Ids that have a prediction; drops the rest of the file: errors, and a last line cut off in mid-write."""
    lines = read_lines(path).by_id.values() if path.exists() else ()
    kept = [line for line in lines if "error" not in line]
    write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))
    return {cast(str, line["id"]) for line in kept}


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
