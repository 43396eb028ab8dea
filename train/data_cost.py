"""CPU time that the loader spends on a sample of a recipe, and the cores that feed a GPU: for `swim data bench`."""

from typing import NamedTuple

from swim.data_tools.bench import measure
from swim.data_tools.shards import ShardSet
from swim.data_tools.video import decode_frames
from swim.train.config import Config
from swim.train.lengths import Cost
from swim.train.system import Request, build_system

ASSUMED_FLOPS = 4e14  # a second on one GPU, about 40 % of an H100's peak in bfloat16


class SampleCost(NamedTuple):
    """Means over clips with all their conversations: CPU seconds by stage, visual and other tokens, and floating-point
    operations of a training step."""

    seconds: dict[str, float]
    tokens: float
    flops: float


def sample_cost(config: Config, shards: ShardSet, limit: int) -> SampleCost:
    """Cost of the first `limit` clips; ValueError if none of them can be used.

    Operations are those of forward, a backward of twice as many, and forward again for layers that are recomputed.
    """
    system = build_system(config)
    collator, data, cost = system.collator, config.data, Cost(system.model_config)
    passes = 3 + (1 / config.model.checkpointing if config.model.checkpointing else 0)
    seconds = dict.fromkeys(("read", "decode", "pixels", "tokens, masks, batch"), 0.0)
    tokens = flops = 0.0
    used = 0
    for number, entry in enumerate(shards.entries[:limit]):
        request = Request(shards.read(number), tuple(range(len(entry.conversations))))
        batch = collator([request])
        clip = next((clip for clip in batch.clips if clip is not None and clip.key), None)
        if clip is None:
            continue
        chosen = [frame for step in clip.frames for frame in step]
        video = request.sample.media()
        frames = decode_frames(video, chosen, decoder=data.decoder)
        limits = data.pixel_limits(len(chosen))
        spent = measure(
            {
                "read": lambda: shards.read(number).media(),  # noqa: B023 - called at once, like the others
                "decode": lambda: decode_frames(video, chosen, decoder=data.decoder),  # noqa: B023
                "pixels": lambda: collator.encoder.family.pixels(frames, **limits),  # noqa: B023
                "all": lambda: collator([request]),  # noqa: B023
                "media": lambda: request.sample.media(),  # noqa: B023
            },
            rounds=3,
        )
        spent["tokens, masks, batch"] = max(0.0, spent["all"] - spent["decode"] - spent["pixels"] - spent["media"])
        for stage in seconds:
            seconds[stage] += spent[stage]
        tokens += batch.num_tokens
        pairs = cost.pair * batch.num_tokens**2 / 2
        flops += passes * (cost.vision(clip.grid) + cost.linear * batch.num_tokens + pairs)
        used += 1
    if not used:
        raise ValueError(f"{shards.folder}: none of the first {limit} clips can be used; swim data check says why")
    return SampleCost({stage: spent / used for stage, spent in seconds.items()}, tokens / used, flops / used)


def cores_per_gpu(cost: SampleCost, samples: int, step_seconds: float | None) -> dict[str, float | str]:
    """Cores that make `samples` a step on one GPU, whose time is given or assumed from ASSUMED_FLOPS."""
    per_sample = sum(cost.seconds.values())
    step = samples * cost.flops / ASSUMED_FLOPS if step_seconds is None else step_seconds
    source = (
        f"assumed: {ASSUMED_FLOPS:.0e} operations a second on a GPU, no weight frozen"
        if step_seconds is None
        else "given"
    )
    return {
        "samples_per_step": samples,
        "step_seconds": step,
        "step_seconds_are": source,
        "cpu_seconds_per_sample": per_sample,
        "cores": samples * per_sample / step,
    }
