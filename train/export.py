"""`swim export`: the model of a run as a stock folder under the names its base has, verified before it gets its name.

The weights come from the run's `model/` or from a checkpoint, a shard at a time; nothing of this repository is needed
to load the result. `verify_export.py` holds the checks.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import yaml
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import cached_file

from swim import __version__
from swim.data_tools.files import sync
from swim.train.config import Config, parse_config
from swim.train.consolidate import Weights, checkpoint_weights
from swim.train.families import family_of
from swim.train.key_names import parameter_name
from swim.train.lora import plain_name
from swim.train.model_card import model_card, read_scores
from swim.train.partitions import CheckpointError
from swim.train.processor_files import processor_files, tokenizer_fields
from swim.train.serve import serve_lines, traps
from swim.train.stock import tokenizer_and_config
from swim.train.weights import MAX_SHARD_BYTES, PROCESSOR_FILES, fill_folder, name_folder, stock_shards, write_shard

MARKER = "swim_export.json"
Form = Literal["merged", "adapter"]
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}


class ExportError(ValueError):
    """A run cannot be exported; the message names file, value and remedy."""


@dataclass(frozen=True)
class Source:
    """Weights to export: the run's config with the base where it lies now, and where the weights come from."""

    run: Path
    config: Config
    weights: Weights
    folder: Path | None  # the run's `model/`, None for a checkpoint
    origin: str

    @property
    def model_type(self) -> str:
        """The family of the model."""
        return str(json.loads(self.weights.stock["files"]["config.json"])["model_type"])


class Check(NamedTuple):
    """A check of an exported folder: its name, whether it passed (None: it could not be made), and the figures."""

    name: str
    passed: bool | None
    said: str


class Exported(NamedTuple):
    """Where the folder is, the checks it went through (none if it was not verified), how to serve it and what the
    command lines cannot pin."""

    folder: Path
    checks: list[Check]
    serve: list[str]
    traps: list[str]

    @property
    def passed(self) -> bool:
        """Whether no check failed; then the folder has its name."""
        return all(check.passed is not False for check in self.checks)


def find_source(run: Path, checkpoint: str | None, base: str | None) -> Source:
    """The weights of a run: its final model, or those of a checkpoint (`last`, `best` or a step).

    ExportError for what is not there or damaged.
    """
    if not (run / "config.yaml").exists():
        raise ExportError(f"{run / 'config.yaml'} is missing: no run is there; give the folder of one, as in runs/NAME")
    if checkpoint is None:
        folder: Path | None = run / "model"
        if not (run / "done.json").exists():
            raise ExportError(
                f"{run / 'done.json'} is missing: the run is not finished; give --checkpoint last (or best, or a step)"
            )
        config = parse_config(yaml.safe_load((run / "config.yaml").read_text()), source=str(run / "config.yaml"))
        weights, origin = _folder_weights(run / "model"), "final model"
    else:
        name = f"step_{int(checkpoint):08d}" if checkpoint.isdecimal() else checkpoint
        path = run / "checkpoints" / name
        if (name not in ("last", "best") and not re.fullmatch(r"step_\d{8}", name)) or not path.exists():
            there = ", ".join(sorted(p.name for p in (run / "checkpoints").glob("[!.]*"))) or "none"
            raise ExportError(f"{path} is not there; checkpoints of this run: {there}")
        folder = None
        try:
            config, weights = checkpoint_weights(path)
        except CheckpointError as error:
            raise ExportError(f"{error}, or give another one with --checkpoint") from None
        origin = f"checkpoint {path.resolve().name}"
    if base is not None:
        if config.model.path is None:
            raise ExportError(f"--base {base}: this run started from random weights (model.config), it has no base")
        config = config.model_copy(update={"model": config.model.model_copy(update={"path": base})})
    return Source(run, config, weights, folder, origin)


def export(
    run: Path,
    out: Path,
    *,
    form: Form = "merged",
    checkpoint: str | None = None,
    base: str | None = None,
    verify: bool = True,
    results: Path | None = None,
    licence: str | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> Exported:
    """Write the folder `out`: the checks it went through, and how to serve it.

    With a check that failed, the folder stays under its hidden name. ExportError for what cannot be exported, and if
    `out` is not an earlier export.
    """
    from swim.train.verify_export import verify_export

    if out.exists() and not out.is_dir():
        raise ExportError(f"{out} is a file; give a folder")
    if out.exists() and any(out.iterdir()) and not (out / MARKER).exists():
        raise ExportError(f"{out} holds files that no export made; give another folder, or remove it")
    if results is not None and checkpoint is not None:
        raise ExportError("--results belong to the run's final model: leave --checkpoint out, or --results")
    source = find_source(run, checkpoint, base)
    base = source.config.model.path
    if base is not None and out.exists() and out.resolve() == base_folder(base).resolve():
        raise ExportError(f"{out} is the base of this run, which the export would replace; give another folder")
    if form == "adapter" and (source.config.model.lora is None or source.config.model.path is None):
        raise ExportError(f"{run}: adapters alone need a run with model.lora on a base (model.path); use --lora merged")
    scored = None if results is None else read_scores(results, run)  # before anything large is written
    hidden = out.with_name(f".{out.name}.incoming")
    shutil.rmtree(hidden, ignore_errors=True)
    hidden.mkdir(parents=True)
    if form == "adapter":
        write_adapter(source, hidden)
    else:
        write_merged(source, hidden, max_shard_bytes)
    serve = serve_lines(source.config, source.model_type, out, base if form == "adapter" else None)
    card = model_card(
        source.config,
        run,
        title=out.resolve().name,
        origin=source.origin,
        library="peft" if form == "adapter" else "transformers",
        serve=serve,
        scored=scored,
        licence=licence or base_licence(base),
    )
    (hidden / "README.md").write_text(card)
    exported = Exported(out, verify_export(hidden, source, form) if verify else [], serve, traps(source.config))
    if not exported.passed:
        return exported._replace(folder=hidden)
    said = {check.name: check.said for check in exported.checks}
    record = {"swim": __version__, "run": run.resolve().name, "origin": source.origin, "form": form, "checks": said}
    (hidden / MARKER).write_text(json.dumps(record, indent=2) + "\n")
    name_folder(hidden, out)
    return exported


def report(exported: Exported) -> str:
    """A line for every check, and those that serve the folder."""
    word = {True: "ok  ", False: "FAIL", None: "none"}
    lines = [f"{word[passed]}  {name}: {said}" for name, passed, said in exported.checks]
    if not exported.passed:
        return "\n".join([*lines, f"not exported; what failed is left in {exported.folder}"])
    if not exported.checks:
        lines.append("not verified")
    told = [f"  {line}" for line in exported.serve] + [f"  note: {trap}" for trap in exported.traps]
    return "\n".join([*lines, f"exported: {exported.folder}", "serve it (not run here):", *told])


def target_names(source: Source) -> dict[str, str]:
    """Name in the exported files -> name in training: the base's names, without a base those of stock
    `save_pretrained`."""
    names: Mapping[str, str] = source.weights.stock["names"]
    if (base := source.config.model.path) is None:
        return dict(names)
    own = {plain_name(name): name for name in names.values()}
    found = {stored: own.get(parameter_name(source.model_type, stored)) for stored in stored_tensors(base_folder(base))}
    strange = [stored for stored, name in found.items() if name is None]
    left = sorted(set(own.values()) - set(found.values()))
    if strange or left:
        raise ExportError(
            f"the base {base} and the run hold different tensors: {len(strange)} only in the base "
            f"({', '.join(strange[:3]) or '-'}), {len(left)} only in the run ({', '.join(left[:3]) or '-'}); "
            "give the base the run started from with --base"
        )
    return {stored: name for stored, name in found.items() if name is not None}


def stored_tensors(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype, Path]]:
    """Shape, type and file of every tensor in the safetensors files of a model folder, from their headers."""
    found: dict[str, tuple[tuple[int, ...], torch.dtype, Path]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118
                    part = file.get_slice(name)
                    found[name] = (tuple(part.get_shape()), _DTYPES[part.get_dtype()], path)
        except SafetensorError as error:
            raise ExportError(f"{path}: damaged or cut off ({error}); take the weights from a checkpoint") from None
    if not found:
        raise ExportError(f"{folder}: no model*.safetensors in it; give the folder of a model in safetensors form")
    return found


def read_tensor(folder: Mapping[str, tuple[Any, Any, Path]], name: str) -> Tensor:
    """One tensor of what `stored_tensors` found."""
    with safe_open(folder[name][2], framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def base_folder(base: str) -> Path:
    """The local folder of a model path or hub id; ExportError if it is not on this machine."""
    try:
        return Path(str(cached_file(base, "config.json"))).parent
    except OSError as error:
        raise ExportError(f"the base {base} cannot be read ({error}); say where it lies now with --base") from None


def base_licence(base: str | None) -> str:
    """The licence that the card of the base states, else `other`."""
    if base is None or not (card := base_folder(base) / "README.md").exists():
        return "other"
    parts = card.read_text().split("---\n", 2)
    front = yaml.safe_load(parts[1]) if len(parts) == 3 and not parts[0] else None
    return str((front or {}).get("license", "other"))


def _folder_weights(folder: Path) -> Weights:
    """A run's `model/`, its adapters merged, under the names of training."""
    stored = stored_tensors(folder)
    files = {name: (folder / name).read_text() for name in ("config.json", "generation_config.json")}
    config = json.loads(files["config.json"])
    names = {name: parameter_name(config["model_type"], name) for name in stored}
    by_parameter = {name: stock for stock, name in names.items()}
    adapters = {}
    if (adapter := folder / "adapter").exists():
        files["adapter/adapter_config.json"] = (adapter / "adapter_config.json").read_text()
        with safe_open(adapter / "adapter_model.safetensors", framework="pt") as file:
            adapters = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    stock = {"files": files, "names": names, "scales": {}, "dtype": config["dtype"]}
    shapes = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (shape, dtype, _) in stored.items()}
    return Weights(stock, shapes, lambda name: read_tensor(stored, by_parameter[name]), adapters)


def write_merged(source: Source, hidden: Path, most: int) -> None:
    """All weights under their target names, `most` bytes in a file, with everything that makes a stock folder."""
    stock, shapes, fetch, _ = source.weights
    by_name = {own: shapes[stored] for stored, own in stock["names"].items()}
    names = target_names(source)
    target = {**stock, "names": names, "files": {k: v for k, v in stock["files"].items() if "/" not in k}}
    shapes = {stored: by_name[own] for stored, own in names.items()}
    for path, tensors in stock_shards(hidden, target, shapes, fetch, most):
        write_shard(path, tensors)
        sync(path)
        del tensors
    model, base = source.config.model, source.config.model.path
    tokenizer, config = tokenizer_and_config(model)
    fill_folder(hidden, target, shapes, tokenizer, base, most, {})
    if not any((hidden / name).exists() for name in PROCESSOR_FILES):
        files = processor_files(source.model_type, family_of(config, tokenizer), source.config.data)
        for name, text in files.items():
            (hidden / name).write_text(text)
        settings = hidden / "tokenizer_config.json"
        fields = json.loads(settings.read_text()) | tokenizer_fields(source.model_type)
        settings.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")


def write_adapter(source: Source, hidden: Path) -> None:
    """Adapters alone, as stock peft reads them, with the tokenizer."""
    from swim.train.lora import save_adapter

    settings = json.loads(source.weights.stock["files"]["adapter/adapter_config.json"])
    settings["base_model_name_or_path"] = source.config.model.path
    (hidden / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
    if not source.weights.adapters:
        raise ExportError(f"{source.run}: no adapters in its {source.origin}; use --lora merged")
    save_adapter(source.weights.adapters, hidden / "adapter_model.safetensors")
    tokenizer_and_config(source.config.model)[0].save_pretrained(hidden)
