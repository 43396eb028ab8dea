"""The DeepSpeed engine around a system's model: what it is told, how it is built, how one of its steps is refused."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import deepspeed
from torch.distributed import ProcessGroup

from swim.train.config import Config, engine_file
from swim.train.profiles import check_device, check_profile
from swim.train.system import System
from swim.train.world import World


def engine_config(config: Config, micro_batches: int, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration: the named file plus what this program computes (batch sizes, type, clipping).

    ConfigError for a file with which a run could not be saved, resumed or guarded.
    """
    file = engine_file(config)
    fields = json.loads(file.read_text())
    check_profile(fields, str(file), ranks=world_size)
    parameters = fields.setdefault("optimizer", {"type": "AdamW"}).setdefault("params", {})
    parameters.update(lr=config.optim.lr, betas=list(config.optim.betas), weight_decay=config.optim.weight_decay)
    return fields | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "train_batch_size": micro_batches * world_size,
        "gradient_clipping": config.optim.clip,
        "bf16": {"enabled": config.model.dtype == "bfloat16"},
        "steps_per_print": 10**9,
    }


def build_engine(config: Config, system: System, micro_batches: int, world: World, group: ProcessGroup | None) -> Any:
    """The engine with the system's model and optimizer inside; the ranks of `group` hold micro-batches together."""
    fields = engine_config(config, micro_batches, world.size)
    check_device(fields, config.deepspeed, cuda=world.device.type == "cuda")
    from transformers.integrations import HfDeepSpeedConfig

    # While it lives, transformers makes (and loads) every parameter partitioned; zero.Init alone breaks its
    # initialisation.
    partitioned = HfDeepSpeedConfig(fields)
    model = system.build_model(group)
    model.train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=system.param_groups(model), config=fields)
    del partitioned
    return engine


@contextmanager
def nothing_applied(engine: Any) -> Iterator[None]:
    """Inside, `engine.step()` discards the gradients, as it does by itself with those that are not finite."""
    optimizer = engine.optimizer

    def discard(*_: object) -> None:
        optimizer.overflow = True

    # All ZeRO stages look at `overflow` right behind this call, which is theirs to scale fp16 losses.
    optimizer._update_scale = discard
    try:
        yield
    finally:
        del optimizer._update_scale
