"""What a frozen vision tower outside the engine would bring: the same weights whole on every rank, without gathers.

`python benchmarks/frozen_tower.py` counts collectives and times steps of the tiny recipe on two CPU ranks with the
tower inside and outside, turn by turn, and prints what the formulas of `swim estimate` say about `swim_7b`.
"""

import copy
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "tests")]
STEPS, SKIPPED = 60, 5
KINDS = ("inside", "outside")
# A small model treated as a large one: hardly a weight is kept whole or fetched ahead.
ENGINE = {
    "zero_optimization": {
        "stage": 3,
        "overlap_comm": False,
        "stage3_param_persistence_threshold": 1000,
        "stage3_prefetch_bucket_size": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_max_live_parameters": 0,
    },
    "optimizer": {"type": "AdamW", "params": {"torch_adam": True}},
}


def rank_steps(rank: int, size: int, port: int, folder: Path) -> None:
    """Step both engines by turns; the first rank prints."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK=str(rank), MASTER_PORT=str(port))
    from live_states import count_collectives
    from tiny import tiny_config
    from torch import distributed as dist

    from swim.train.engine import build_engine
    from swim.train.loader import Loader, Order
    from swim.train.loop import combine
    from swim.train.system import Progress, build_system
    from swim.train.world import init_world

    sent, world = count_collectives(), init_world()
    options = ["data.shared_prefix=true", "model.freeze=[visual]", "data.packs_per_step=2", "data.clips_per_pack=1"]
    options += [
        f"deepspeed={folder / 'engine.json'}",
        f"run.steps={STEPS}",
        "data.tasks=null",
        f"run.output={folder / 'runs'}",
        "data.num_frames=8",
    ]
    config = tiny_config(folder / "clips", *options)
    made: dict[str, Any] = {}
    for kind in KINDS:
        system: Any = build_system(config)
        order = Order(config, system, writes=False)
        if kind == "outside":
            _move_out(system, build_system(config).build_model().model.visual)
        engine = build_engine(config, system, order.micro_batches(size), world, None)
        made[kind] = system, engine, Loader(order, system.collator, rank=rank, size=size).steps(0, STEPS)
    seconds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    carried: dict[str, int] = {}
    for step in range(STEPS):
        for kind in KINDS if step % 2 else reversed(KINDS):
            system, engine, loader = made[kind]
            batches = next(loader)
            names = sorted(batches[0].counts)
            counts = world.sum({name: sum(batch.counts[name] for batch in batches) for name in names})
            sent.clear()
            dist.barrier()
            began = time.perf_counter()
            for batch in batches:
                engine.backward(combine(system.loss(engine, batch, Progress(1, 2)), counts), scale_wrt_gas=False)
                engine.step()
            dist.barrier()
            seconds[kind].append(time.perf_counter() - began)
            carried[kind] = sum(sent.values())
    if world.is_main:
        pairs = list(zip(seconds["outside"], seconds["inside"]))[SKIPPED:]
        print("tiny recipe, 2 ranks: bytes a step", carried, f"{carried['outside'] / carried['inside'] - 1:+.1%}")
        print(f"step time outside / inside: {statistics.median(out / in_ for out, in_ in pairs):.3f} (median of pairs)")
    sys.stdout.flush()
    os._exit(0)  # threads of gloo abort at exit now and then


def _move_out(system: Any, tower: Any) -> None:
    build = system.build_model

    def moved(group: Any) -> Any:
        model = build(group)
        del model.model._modules["visual"]
        model.model.__dict__["visual"] = copy.deepcopy(tower).requires_grad_(False)
        return model

    system.build_model = moved


def formulas() -> None:
    """Memory, traffic and step time of swim_7b with the tower inside and outside."""
    from benchmarks.qwen import Shape
    from swim.train.config import engine_file, load_config
    from swim.train.estimate import Model, Setup, work
    from swim.train.memory import Zero, model_states
    from swim.train.scaling import DEVICES, predict, traffic

    with tempfile.TemporaryDirectory() as folder:
        Shape().config().save_pretrained(folder)
        config = load_config("swim_7b", [f"model.path={folder}"])
        model = Model(config, 14043)
    zero = Zero.of(json.loads(engine_file(config).read_text()))
    one, device = work(model, Setup(config, zero, 8), "H100"), DEVICES["H100"]
    parameters, _ = model.of(config, cuda=True)
    others = [p for p in parameters if p.part != "vision"]
    brief = replace(one, tokens=one.tokens // 8, layer_flops=one.layer_flops / 8, vision_flops=one.vision_flops / 8)
    for world in (8, 64, 512):
        kept = [model_states(ps, zero, world, element=2).kept for ps in (parameters, others)]
        sent = [
            traffic(ps, zero, world, element=2, vision_flows=False, embedding_flows=True).of_step(1)
            for ps in (parameters, others)
        ]
        gains = []
        for pack in (one, brief):
            inside, outside = (
                predict(w, device, world, max(32, world)).seconds for w in (pack, replace(pack, vision_bytes=0))
            )
            gains.append(f"{1 - outside / inside:.1%} with {pack.tokens:,} tokens")
        print(
            f"{world} x H100: {(kept[1] + one.vision_bytes - kept[0]) / 2**30:+.2f} GiB a rank, "
            f"{sent[1] / sent[0] - 1:+.1%} bytes, step time shorter by {', '.join(gains)}"
        )


def main() -> None:
    """Both."""
    import torch
    from tiny import make_data

    from swim.train.__main__ import free_port

    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder) / "clips")
        (Path(folder) / "engine.json").write_text(json.dumps(ENGINE))
        torch.multiprocessing.spawn(rank_steps, (2, free_port(), Path(folder)), nprocs=2)
    formulas()


if __name__ == "__main__":
    main()
