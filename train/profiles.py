"""Which DeepSpeed files this program trains with: what it cannot save, load or guard is refused at start."""

from collections.abc import Iterator, Mapping
from typing import Any

from swim.train.config import ConfigError

# Fields of `zero_optimization`, the value that is no use of them, and what would go wrong.
_REFUSED = (
    ("zero_quantized_gradients", False, "quantizing turns NaN and infinity into numbers, so no guard sees them"),
    ("zero_quantized_nontrainable_weights", False, "checkpoints would hold frozen weights in eight bits"),
    ("mics_shard_size", -1, "checkpoints are read as divided among all ranks"),
    ("elastic_checkpoint", False, "it changes what checkpoints hold"),
    ("zenflow", None, "it keeps optimizer state that checkpoints do not hold"),
)
_OFFLOADS = ("offload_optimizer", "offload_param")


def check_profile(fields: Mapping[str, Any], source: str, *, ranks: int) -> None:
    """ConfigError, naming the file `source`, for DeepSpeed fields with which a run could not be saved, resumed or
    guarded on so many ranks."""
    for problem in _problems(fields, ranks):
        raise ConfigError(f"deepspeed: {source}: {problem}")


def check_device(fields: Mapping[str, Any], source: str, *, cuda: bool) -> None:
    """ConfigError for what needs a GPU where there is none."""
    if fields.get("zero_optimization", {}).get("zero_quantized_weights") and not cuda:
        raise ConfigError(
            f"deepspeed: {source}: zero_optimization.zero_quantized_weights needs DeepSpeed's CUDA quantizer, and this "
            "rank has no GPU; take zero3_cpu or zero3_hpz"
        )


def _problems(fields: Mapping[str, Any], ranks: int) -> Iterator[str]:
    for path in _autos(fields):
        yield f"{path} is 'auto'; batch sizes, type and learning rate are computed here: remove it or give a value"
    zero = fields.get("zero_optimization", {})
    stage, kind = zero.get("stage", 0), fields.get("optimizer", {}).get("type", "AdamW")
    if stage not in (1, 2, 3):
        yield f"zero_optimization.stage is {stage}; checkpoints need 1, 2 or 3"
    if kind.lower() not in ("adam", "adamw"):
        yield f"optimizer.type is {kind}; the schedule and checkpoints know AdamW and Adam"
    if fields.get("fp16", {}).get("enabled"):
        yield "fp16.enabled is true; the type is model.dtype, float32 or bfloat16: remove fp16"
    for name, unused, why in _REFUSED:
        if zero.get(name, unused) != unused:
            yield f"zero_optimization.{name} is {zero[name]}: {why}; remove it"
    for name in _OFFLOADS:
        part = zero.get(name) or {}
        if part.get("device", "none") not in ("none", "cpu"):
            yield f"zero_optimization.{name}.device is {part['device']}; files there are no part of a checkpoint: cpu"
        if part.get("super_offload") or part.get("ratio", 1.0) != 1.0:
            yield f"zero_optimization.{name}: super_offload and ratio divide the optimizer in two; remove them"
    hpz = zero.get("zero_hpz_partition_size", 1)
    if hpz > 1 and stage != 3:
        yield f"zero_optimization.zero_hpz_partition_size {hpz} belongs to stage 3, not {stage}"
    if hpz > 1 and ranks > hpz and ranks % hpz:
        yield (
            f"zero_optimization.zero_hpz_partition_size {hpz} does not divide {ranks} ranks; start a multiple of it, "
            "or give the number of GPUs of a node"
        )


def _autos(value: Any, path: str = "") -> Iterator[str]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _autos(item, f"{path}.{key}".removeprefix("."))
    elif value == "auto":
        yield path
