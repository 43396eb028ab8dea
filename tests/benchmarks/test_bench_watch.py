"""Measures what guards, heartbeat, stop switch, metrics, loss by source and rank times add to a step of the demo: steps
of the loop and of a bare engine take turns in one run, on the same batches. Limit: 1.05.

Beside the time of a step stands the processor time of both ranks, which other work on the machine disturbs less.
"""

import os
import statistics
import time
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from tiny import make_data

from swim.train import loop
from swim.train.__main__ import free_port
from swim.train.config import Config, load_config
from swim.train.engine import build_engine
from swim.train.guard import Guard
from swim.train.heartbeat import Heartbeat
from swim.train.loader import Loader, Order
from swim.train.loop import Run, combine, learning_rate, train_step
from swim.train.metrics import Metrics
from swim.train.stop import StopSwitch
from swim.train.system import Progress, build_system
from swim.train.watch import Watch
from swim.train.world import init_world

pytestmark = pytest.mark.bench
ROUNDS, SEEDS, WARM_UP = 40, 3, 5


def bare_step(run: Run, batches, progress: Progress) -> None:
    """The same update by the engine and one all-reduce of counts; nothing is guarded, said or looked at."""
    micro_batches = [batch.to(run.world.device) for batch in next(batches)]
    names = micro_batches[0].counts
    counts = run.world.sum({name: sum(batch.counts[name] for batch in micro_batches) for name in names})
    for group in run.engine.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, progress.step)
    for batch in micro_batches:
        loss = run.system.loss(run.engine, batch, progress)
        run.engine.backward(combine(loss, counts) * run.world.size, scale_wrt_gas=False)
        run.engine.step()


def measure(rank: int, ranks: int, port: int, config: Config, out: Path) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_PORT=str(port))
    torch.set_num_threads(1)
    world, folder = init_world(), config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    system = build_system(config)
    order = Order(config, system)
    engine = build_engine(config, system, order.micro_batches(ranks), world, None)
    stop = StopSwitch(folder if world.is_main else None, 1e9)
    heartbeat = Heartbeat(folder, rank, ranks, limit_s=600, start_limit_s=600)
    watch = Watch(config, system, engine, world)
    run = Run(config, world, None, system, order, engine, Guard(config.guard), stop, heartbeat, watch)
    seconds: defaultdict[str, list[float]] = defaultdict(list)
    path = folder / "metrics.jsonl" if world.is_main else None
    with stop, heartbeat, Metrics(path, start=0, steps=config.run.steps, config=config) as metrics:
        read = list(Loader(order, system.collator, rank=rank, size=ranks).steps(0, ROUNDS + WARM_UP))
        watch.own.close()
        for number, micro_batches in enumerate(read):
            # The same batches for both, in changing order, so that neither profits from warm caches.
            for kind in ("all", "bare") if number % 2 else ("bare", "all"):
                progress = Progress(number, config.run.steps)
                world.barrier()
                began, worked = time.perf_counter(), time.process_time()
                if kind == "all":
                    watch.own.open()
                    values, _ = train_step(run, iter([micro_batches]), progress)
                    values.pop("stop")
                    metrics.log(number + 1, values)
                    watch.own.close()
                else:
                    bare_step(run, iter([micro_batches]), progress)
                worked = time.process_time() - worked
                world.barrier()
                seconds[kind].append(time.perf_counter() - began)
                seconds[f"{kind}, processors"].append(world.sum({"s": worked})["s"])
    if world.is_main:
        torch.save({kind: values[WARM_UP:] for kind, values in seconds.items()}, out)
    os._exit(0)


def test_what_watching_a_step_costs(tmp_path, benchmark):
    assert loop.train_step is train_step
    shards = make_data(tmp_path / "clips", clips=12)
    context = torch.multiprocessing.get_context("spawn")
    ratios: dict[str, list[float]] = {"": [], ", processors": []}
    for seed in range(SEEDS):
        options = [f"run.output={tmp_path}", f"run.seed={seed}", f"run.name=seed{seed}", "run.steps=200"]
        config = load_config(
            "tiny_cpu", [*options, f"data.train=[{shards.folder}]", "data.synth=null", "guard.spike=skip"]
        )
        out, port = tmp_path / f"{seed}.pt", free_port()
        ranks = [context.Process(target=measure, args=(rank, 2, port, config, out)) for rank in range(2)]
        for rank in ranks:
            rank.start()
        for rank in ranks:
            rank.join(600)
            assert rank.exitcode == 0
        seconds = torch.load(out, weights_only=True)
        for kind in ("", ", processors"):
            of_all, of_bare = seconds[f"all{kind}"], seconds[f"bare{kind}"]
            found = [a / b for a, b in zip(of_all, of_bare)]
            ratios[kind] += found
            medians = [statistics.median(values) * 1000 for values in (of_bare, of_all)]
            print(f"\nseed {seed}{kind}: bare {medians[0]:.1f} ms, all {medians[1]:.1f} ms; {told(found)}", end="")
    for kind, found in ratios.items():
        print(f"\nall seeds{kind}: {told(found)}; limit 1.05", end="")
    benchmark.pedantic(lambda: None, rounds=1, warmup_rounds=0)


def told(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    error = 1.2533 * statistics.stdev(sorted(ratios)[len(ratios) // 20 : -len(ratios) // 20]) / len(ratios) ** 0.5
    return f"ratio {middle:.3f} +- {error:.3f} (median of {len(ratios)} pairs, quartiles {low:.3f} and {high:.3f})"
