"""The training loop: next packs -> forward -> terms -> guard -> backward -> step -> log -> maybe save.

A system hands over sums; the loop divides them by the whole step's counts over all ranks and micro-batches, so the loss
is a mean over nouns and answer tokens of the step, not a mean of means, and the gradient is the same for any number of
ranks.
"""

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import deepspeed
import torch
import yaml
from torch import Tensor

from swim.data_tools.mixture import PlanError
from swim.data_tools.shards import ShardError
from swim.data_tools.synth import synthesise
from swim.train.batch import Batch
from swim.train.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint, save_model
from swim.train.config import Config, ConfigError, engine_file
from swim.train.loader import Order, load_steps
from swim.train.metrics import Metrics, append_jsonl, drop_after, peak_memory_mib, write_whole
from swim.train.system import Progress, System, Term, build_system
from swim.train.world import World, init_world


class TrainingError(RuntimeError):
    """Training cannot go on; the message names step, samples and remedy."""


def train(config: Config) -> Path:
    """Run (or resume) the training that `config` describes on this rank and return the run folder."""
    world = init_world()
    folder = config.run.folder
    _prepare(config, world)
    if any(world.gather(world.is_main and (folder / "done.json").exists())):
        if world.is_main:
            print(f"{folder} is finished: its model is {folder / 'model'}; give run.name another value to train anew")
        world.close()
        return folder
    system = build_system(config)
    order = _build_order(config, system, world)
    engine = _build_engine(config, system, order.micro_batches(world.size), world)
    start = _resume(engine, order, folder, world)
    stop = min(config.run.stop_after or config.run.steps, config.run.steps)
    batches = load_steps(
        order, system.collator, start=start, stop=stop, rank=world.rank, size=world.size, workers=config.data.workers
    )
    with Metrics(folder / "metrics.jsonl" if world.is_main else None, start=start, steps=config.run.steps) as metrics:
        for step in range(start, stop):
            values = train_step(engine, system, batches, config, Progress(step, config.run.steps), world)
            metrics.log(step + 1, values)
            due = config.run.save_every and (step + 1) % config.run.save_every == 0
            bad = _count_bad(folder, world) if values["holes"] else 0
            if step + 1 == stop or due or bad > config.data.max_bad:
                save_checkpoint(engine, folder / "checkpoints", step + 1, order.state(step + 1), world)
            if bad > config.data.max_bad:
                raise TrainingError(
                    f"step {step}: {bad} conversations could not be read so far, data.max_bad is "
                    f"{config.data.max_bad}; see {folder / 'quarantine.jsonl'}, repair the shards or raise the limit, "
                    "then resume"
                )
    if stop == config.run.steps:
        save_model(engine, folder / "model", system.tokenizer, config.model.path, world)
        _finish(folder, world)
    world.close()
    return folder


def train_step(
    engine: Any, system: System, batches: Iterator[list[Batch]], config: Config, progress: Progress, world: World
) -> dict[str, float]:
    """One optimizer step over this rank's micro-batches; returns the step's numbers, the same on every rank."""
    began = time.perf_counter()
    micro_batches = [batch.to(world.device) for batch in next(batches)]
    waited = time.perf_counter() - began
    own = {name: sum(batch.counts[name] for batch in micro_batches) for name in micro_batches[0].counts}
    counts = world.sum({**own, "tokens": sum(batch.num_tokens for batch in micro_batches)})
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(config, progress.step)
    losses = []
    for number, batch in enumerate(micro_batches):
        loss = system.loss(engine, batch, progress)
        # The engine averages over ranks; the terms are divided by the whole step's counts already.
        engine.backward(combine(loss, counts) * world.size, scale_wrt_gas=False)
        losses.append({name: Term(term.sum.detach(), term.weight) for name, term in loss.items()})
        if number + 1 < len(micro_batches):
            engine.step()
    holes = [asdict(hole) for batch in micro_batches for hole in batch.holes]
    sums = {f"loss/{name}": sum(float(loss[name].sum) for loss in losses) for name in losses[0]}
    sums |= {
        "bad_loss": float(not all(map(math.isfinite, sums.values()))),
        "holes": float(len(holes)),
        "waited": waited,
    }
    totals = world.sum({**sums, **system.after_backward()})
    _guard(totals["bad_loss"], "loss", micro_batches, progress, config, world)
    engine.step()
    # Without a word DeepSpeed skips a step whose gradient is not finite; its norm is the same on every rank.
    norm = float(engine.get_global_grad_norm() or 0.0)
    _guard(not math.isfinite(norm), "gradient", micro_batches, progress, config, world)
    if totals["holes"]:
        _quarantine(holes, progress, config, world)

    elapsed = time.perf_counter() - began
    means = {name: totals[f"loss/{name}"] / max(counts[name], 1) for name in losses[0]}
    values = {f"loss/{name}": mean for name, mean in means.items()}
    values["loss/total"] = sum(losses[0][name].weight * mean for name, mean in means.items())
    values |= {f"count/{name}": count for name, count in counts.items()}
    values |= system.summarise({**counts, **totals}, world.size)
    return values | {
        "grad_norm": norm,
        "lr": learning_rate(config, progress.step),
        "step_s": elapsed,
        "tokens_per_s": counts["tokens"] / elapsed,
        "data_wait": totals["waited"] / world.size / elapsed,
        "peak_memory_mib": peak_memory_mib(world.device),
        "holes": totals["holes"],
    }


def combine(loss: dict[str, Term], counts: dict[str, float]) -> Tensor:
    """Weighted sum of the terms, each divided by the step's count of its name, or by 1 where that is 0."""
    return torch.stack([term.weight * term.sum / max(counts[name], 1.0) for name, term in loss.items()]).sum()


def learning_rate(config: Config, step: int) -> float:
    """Learning rate of step `step` (from 0): a pure function, so a resumed run needs no scheduler state."""
    optim, steps = config.optim, config.run.steps
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(steps - optim.warmup_steps, 1)
    shape = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}[optim.schedule]
    return optim.lr * (optim.min_lr_ratio + (1 - optim.min_lr_ratio) * shape)


def engine_config(config: Config, micro_batches: int, world_size: int) -> dict[str, Any]:
    """The DeepSpeed configuration: the named file plus what this program computes (batch sizes, type, clipping,
    rates)."""
    fields = json.loads(engine_file(config).read_text())
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


def _build_engine(config: Config, system: System, micro_batches: int, world: World) -> Any:
    fields = engine_config(config, micro_batches, world.size)
    from transformers.integrations import HfDeepSpeedConfig

    # While it lives, transformers makes (and loads) every parameter partitioned; zero.Init alone breaks its
    # initialisation.
    partitioned = HfDeepSpeedConfig(fields)
    model = system.build_model()
    model.train()
    engine, *_ = deepspeed.initialize(model=model, model_parameters=system.param_groups(model), config=fields)
    del partitioned
    return engine


def _build_order(config: Config, system: System, world: World) -> Order:
    """The order of the run. The main rank is first: it counts tokens and writes plans, the others read them."""
    order, problem, cache = None, None, config.run.folder / "plans"
    if world.is_main:
        try:
            order = Order(config, system, cache=cache)
        except (ConfigError, ShardError, PlanError) as error:
            problem = error
    if problem := world.gather(problem)[0]:
        raise problem
    order = order or Order(config, system, cache=cache, writes=False)
    if len(set(world.gather(order.plan(0).digest))) > 1:
        folders = [part.path for part in config.data.train]
        raise ConfigError(f"the ranks see different data in {folders}; compare the nodes")
    return order


def _prepare(config: Config, world: World) -> None:
    """Run folder, resolved configuration and synthetic data if asked for: made by the main rank, awaited by all."""
    problem = None
    if world.is_main:
        try:
            _render(config)
            _claim(config)
        except (ConfigError, ValueError, OSError) as error:
            problem = str(error)
    # Told to all ranks: they would wait for a main rank that has left.
    if problem := world.gather(problem)[0]:
        raise ConfigError(problem)


def _render(config: Config) -> None:
    synth, folder = config.data.synth, Path(config.data.train[0].path)
    if synth is None:
        return
    if "://" in config.data.train[0].path or folder.suffix == ".jsonl":
        raise ConfigError(f"data.synth cannot render into {config.data.train[0].path}; set data.synth=null")
    recipe, wanted = folder / "synth.json", json.dumps(synth.model_dump())
    if any(folder.glob("*.tar")):
        found = recipe.read_text() if recipe.exists() else "other data"
        if found != wanted:
            raise ConfigError(
                f"data.synth asks for {wanted}, but {folder} holds {found}; remove that folder, or set data.synth=null"
            )
        return
    print(f"rendering {synth.clips} clips into {folder}", flush=True)
    synthesise(folder, clips=synth.clips, seed=synth.seed, size=synth.size)
    recipe.write_text(wanted)


def _claim(config: Config) -> None:
    folder = config.run.folder
    folder.mkdir(parents=True, exist_ok=True)
    resolved = config.model_dump(mode="json")
    saved = folder / "config.yaml"
    if saved.exists() and _identity(yaml.safe_load(saved.read_text())) != _identity(resolved):
        raise ConfigError(
            f"{folder} holds a run with another configuration; give run.name another value or remove the folder"
        )
    write_whole(saved, yaml.safe_dump(resolved, sort_keys=False))


def _count_bad(folder: Path, world: World) -> int:
    ids = set()
    if world.is_main:
        ids = {json.loads(line)["id"] for line in (folder / "quarantine.jsonl").read_text().splitlines()}
    return int(world.gather(len(ids))[0])


def _identity(config: dict[str, Any]) -> dict[str, Any]:
    # What may change between the parts of one run: when it saves, logs and stops, how it is launched and loaded.
    run = {k: v for k, v in config["run"].items() if k not in ("save_every", "stop_after", "output", "name")}
    free = {"workers", "max_bad", "train", "synth", "cache", "cache_gib"}
    data = {k: v for k, v in config["data"].items() if k not in free}
    return {**config, "run": run, "data": data, "launch": None}


def _resume(engine: Any, order: Order, folder: Path, world: World) -> int:
    path = world.gather(latest_checkpoint(folder / "checkpoints") if world.is_main else None)[0]
    step = order.resume(load_checkpoint(engine, path, world)) if path is not None else 0
    if world.is_main:
        # metrics count steps from 1, the quarantine from 0
        drop_after(folder / "metrics.jsonl", step)
        drop_after(folder / "quarantine.jsonl", step - 1)
        if path is not None:
            print(f"resuming from {path} at step {step}", flush=True)
    world.barrier()
    return step


def _guard(bad: float, what: str, batches: list[Batch], progress: Progress, config: Config, world: World) -> None:
    if not bad:
        return
    ids = [name for batch in batches for name in batch.ids]
    found = [name for names in world.gather(ids) for name in names]
    raise TrainingError(
        f"step {progress.step}: the {what} is not finite; samples of the step: {', '.join(found)}. Nothing was "
        f"updated; lower optim.lr ({config.optim.lr}), look at these samples, or resume from the last checkpoint"
    )


def _quarantine(holes: list[dict[str, Any]], progress: Progress, config: Config, world: World) -> None:
    lines = [{"step": progress.step, **hole} for of_rank in world.gather(holes) for hole in of_rank]
    if world.is_main:
        append_jsonl(config.run.folder / "quarantine.jsonl", lines)


def _finish(folder: Path, world: World) -> None:
    peaks = world.gather(peak_memory_mib(world.device))
    if world.is_main:
        # From the metrics, so that a run in several parts counts all of them.
        seconds = sum(json.loads(line)["step_s"] for line in (folder / "metrics.jsonl").read_text().splitlines())
        summary = {"seconds": round(seconds, 1), "peak_memory_mib": round(max(peaks)), "ranks": world.size}
        # Success is this file, not an exit code: a launcher that is killed exits 0.
        write_whole(folder / "done.json", json.dumps(summary))
        print(f"finished: {folder / 'model'} is a stock transformers folder", flush=True)
