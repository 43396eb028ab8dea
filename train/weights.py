"""Stock model folders of weights in training, written a shard at a time."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import cached_file

from swim.data_tools.files import sync
from swim.train.lora import adapter_config, has_lora, lora_scales, merged, plain_name, save_adapter, sides
from swim.train.partitions import CheckpointError
from swim.train.world import World

MAX_SHARD_BYTES = 5 * 10**9
# What a processor is made of beside the tokenizer; training changes none of it, so it is taken over from the base
# model.
PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)
_HASHES = "_swim_frozen_hashes"


def stock_description(model: Any) -> dict[str, Any]:
    """What makes a stock folder of the model's parameters, as plain data: files, names, scales of the adapters, type.

    `names` leads from the name in the stock folder to that of the parameter.
    """
    plain = model.get_base_model() if has_lora(model) else model
    own = {plain_name(name): name for name, _ in model.named_parameters() if ".lora_" not in name}
    tensors = {name: torch.empty(0, device="meta") for name in own}
    origin = {id(tensor): own[name] for name, tensor in tensors.items()}
    plain.config.dtype = str(plain.dtype).removeprefix("torch.")
    plain.config.architectures = [type(plain).__name__]
    files = {
        "config.json": plain.config.to_json_string(use_diff=True),
        "generation_config.json": plain.generation_config.to_json_string(use_diff=True),
    }
    return {
        "files": files | ({"adapter/adapter_config.json": adapter_config(model)} if has_lora(model) else {}),
        "names": {stock: origin[id(tensor)] for stock, tensor in _as_stored(plain, tensors).items()},
        "scales": lora_scales(model) if has_lora(model) else {},
        "dtype": plain.config.dtype,
    }


def save_model(
    engine: Any,
    folder: Path,
    tokenizer: Any,
    base: str | None,
    world: World,
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
    """Stock model folder of the current weights, gathered one parameter at a time and written a shard at a time by
    rank 0, with `base`'s processor.

    Adapters are merged into it, and also written alone into its subfolder `adapter`. CheckpointError on all ranks if
    rank 0 cannot write.
    """
    parameters = dict(engine.module.named_parameters())
    stock = stock_description(engine.module)
    hidden, problem = folder.with_name(f".{folder.name}.incoming"), None

    def fetch(name: str) -> Tensor:
        return _gathered(parameters[name], keep=world.is_main)

    if world.is_main:
        shutil.rmtree(hidden, ignore_errors=True)
    shapes = {name: _meta(parameters[own]) for name, own in stock["names"].items()}
    adapters = {name: fetch(name) for name in parameters if ".lora_" in name}
    for path, tensors in stock_shards(hidden, stock, shapes, fetch, max_shard_bytes):
        # The other ranks gather with this one to the end: it tells them of a problem behind it.
        if world.is_main and problem is None:
            problem = _attempt(write_shard, path, tensors)
        del tensors
    if world.is_main and problem is None:
        problem = _attempt(finish_folder, hidden, folder, stock, shapes, tokenizer, base, max_shard_bytes, adapters)
    if problem := world.gather(problem)[0]:
        raise CheckpointError(f"{folder}: the model could not be written: {problem}; start the run again to write it")


def frozen_hashes(engine: Any, world: World, *, fresh: bool = False) -> dict[str, str]:
    """SHA-256 of every frozen parameter, by name, on all ranks; taken once, for they never change, unless `fresh`."""
    if fresh or not hasattr(engine, _HASHES):
        frozen = [(name, p) for name, p in engine.module.named_parameters() if not p.requires_grad]
        own = {}
        for number, (name, parameter) in enumerate(frozen):
            mine = number % world.size == world.rank
            tensor = _gathered(parameter, keep=mine)
            if mine:
                own[name] = hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()
        setattr(engine, _HASHES, {name: digest for of_rank in world.gather(own) for name, digest in of_rank.items()})
    hashes: dict[str, str] = getattr(engine, _HASHES)
    return hashes


def _as_stored(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names of the model's stock files."""
    # Under ZeRO-3 transformers 5.23 keeps renamings that no weight needed, and would undo those as well.
    if conversions := getattr(model, "_weight_conversions", None):
        # (5.17 has no `was_used`, nor the renamings.)
        model._weight_conversions = [c for c in conversions if getattr(c, "was_used", lambda: True)()]
    stored: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    if {id(tensor) for tensor in stored.values()} != {id(tensor) for tensor in tensors.values()}:
        raise CheckpointError(
            f"{type(model).__name__}: its stock files hold other tensors than its parameters, which cannot be written "
            "a shard at a time"
        )
    return stored


def stock_shards(
    folder: Path, stock: Mapping[str, Any], shapes: dict[str, Tensor], fetch: Callable[[str], Tensor], most: int
) -> Iterator[tuple[Path, dict[str, Tensor]]]:
    """Path and tensors of every weight file of a stock folder; `shapes` are meta tensors by stock name, `fetch` gives a
    parameter."""
    for file, names in _plan(shapes, most).filename_to_tensors.items():
        yield folder / file, {name: _merged(stock, name, fetch) for name in names}


def _merged(stock: Mapping[str, Any], name: str, fetch: Callable[[str], Tensor]) -> Tensor:
    own = stock["names"][name]
    weight = fetch(own)
    if (scale := stock["scales"].get(own)) is not None:
        down, up = (fetch(side) for side in sides(own))
        weight = merged(weight, down, up, scale)
    return weight


def _plan(shapes: dict[str, Tensor], most: int) -> Any:
    return split_torch_state_dict_into_shards(shapes, max_shard_size=most, filename_pattern="model{suffix}.safetensors")


def write_shard(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write one weight file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"format": "pt"})


def fill_folder(
    hidden: Path,
    stock: Mapping[str, Any],
    shapes: dict[str, Tensor],
    tokenizer: Any,
    base: str | None,
    most: int,
    adapters: Mapping[str, Tensor],
) -> None:
    """Everything but the weights."""
    plan = _plan(shapes, most)
    if plan.is_sharded:
        index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
        (hidden / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    for name, text in stock["files"].items():
        (hidden / name).parent.mkdir(exist_ok=True)
        (hidden / name).write_text(text)
    if adapters:
        save_adapter(adapters, hidden / "adapter" / "adapter_model.safetensors")
    tokenizer.save_pretrained(hidden)
    for name in PROCESSOR_FILES:
        if found := base and cached_file(base, name, _raise_exceptions_for_missing_entries=False):
            shutil.copyfile(found, hidden / name)


def name_folder(hidden: Path, folder: Path) -> None:
    """Sync what `hidden` holds and give it its name, in place of what has it."""
    for path in [*hidden.rglob("*"), hidden]:
        sync(path)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(hidden, folder)
    sync(folder.resolve().parent)


def finish_folder(hidden: Path, folder: Path, *parts: Any) -> None:
    """Everything but the weights (`parts` as `fill_folder` takes them), then the name."""
    fill_folder(hidden, *parts)
    name_folder(hidden, folder)


def _attempt(action: Callable[..., None], *arguments: Any) -> str | None:
    try:
        action(*arguments)
    except Exception as error:  # whatever it is, all ranks must hear of it
        return f"{type(error).__name__}: {error}"
    return None


def _gathered(parameter: nn.Parameter, *, keep: bool) -> Tensor:
    """The whole parameter in host memory where it is kept, an empty one elsewhere; all ranks take part."""
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter], enabled=hasattr(parameter, "ds_id")):
        return parameter.detach().to("cpu", copy=True) if keep else torch.empty(0)


def _meta(parameter: Any) -> Tensor:
    return torch.empty(getattr(parameter, "ds_shape", parameter.shape), dtype=parameter.dtype, device="meta")
