"""The training loop: next packs -> forward -> terms -> backward -> guard -> step -> log -> maybe save, maybe stop.

A system hands over sums; the loop divides them by the whole step's counts over all ranks and micro-batches, so the loss
is a mean over nouns and answer tokens of the step, not a mean of means, and the gradient is the same for any number of
ranks.
"""

import gc
import json
import math
import time
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from swim.data_tools.files import write_whole
from swim.train.batch import Batch
from swim.train.checkpoint import CheckpointError, latest_checkpoint, load_checkpoint, save_checkpoint
from swim.train.config import Config
from swim.train.curves import Curves
from swim.train.engine import build_engine, nothing_applied
from swim.train.guard import Guard, Refusal
from swim.train.heartbeat import Heartbeat
from swim.train.journal import QUARANTINE, REFUSED, too_many_bad, write_lines
from swim.train.loader import Loader, Order
from swim.train.metrics import METRICS_FILE, PARTS_FILE, Metrics, append_jsonl, drop_after, peak_memory_mib, read_jsonl
from swim.train.prepare import build_loader, build_order, prepare_run
from swim.train.probe import Probe
from swim.train.profiler import Profiler
from swim.train.sequence import agreed
from swim.train.stop import Stopped, StopSwitch
from swim.train.system import Progress, System, Term, build_system
from swim.train.watch import Watch
from swim.train.weights import save_model
from swim.train.world import World, init_world

_COLLECT_EVERY = 50  # steps
_MAX_FAILED_SAVES = 3  # in a row


class TrainingError(RuntimeError):
    """Training cannot go on; the message names step, samples and remedy."""


@dataclass
class Run:
    """What a step needs beside its batches."""

    config: Config
    world: World
    group: ProcessGroup | None  # ranks that hold a micro-batch together with this one
    system: System
    order: Order
    engine: Any
    guard: Guard
    stop: StopSwitch
    heartbeat: Heartbeat
    watch: Watch
    failed_saves: int = 0  # in a row


def train(config: Config) -> Path:
    """Run (or resume) the training that `config` describes on this rank and return the run folder.

    Stopped if it was asked to end before, TrainingError if it cannot go on.
    """
    folder, limits = config.run.folder, config.guard
    # Behind the limits of the heartbeat, which says more.
    world = init_world(max(limits.start_s, limits.hang_s) + 300)
    group = world.subgroup(config.parallel.sequence)
    prepare_run(config, world)
    if any(world.gather(world.is_main and (folder / "done.json").exists())):
        if world.is_main:
            print(f"{folder} is finished: its model is {folder / 'model'}; give run.name another value to train anew")
        world.close()
        return folder
    hours = config.run.max_hours
    stop = StopSwitch(folder if world.is_main else None, hours and 3600 * hours)
    heartbeat = Heartbeat(folder, world.rank, world.size, limit_s=limits.hang_s, start_limit_s=limits.start_s)
    with stop, heartbeat:
        system = build_system(config)
        order = build_order(config, system, world)
        # Before the engine: workers are copies of this process, and would keep a second copy of what it changes.
        with build_loader(config, system, order, world) as loader, ExitStack() as stack:
            probe = None
            if config.probe is not None:
                probe = stack.enter_context(Probe(config.probe, config, system, world, group, heartbeat))
            num_readers = world.size // config.parallel.sequence
            engine = build_engine(config, system, order.micro_batches(num_readers), world, group)
            watch = Watch(config, system, engine, world)
            run = Run(config, world, group, system, order, engine, Guard(limits), stop, heartbeat, watch)
            _train(run, loader, probe)
    world.close()
    return folder


def _train(run: Run, loader: Loader, probe: Probe | None) -> None:
    config, world, folder = run.config, run.world, run.config.run.folder
    start = _resume(run)
    stop = min(config.run.stop_after or config.run.steps, config.run.steps)
    # Which order and how many readers (ranks, or groups of them) the next steps have: what it takes to replay one.
    num_readers = world.size // config.parallel.sequence
    part = {"step": start + 1, "ranks": num_readers, "plan": asdict(run.order.state(start))}
    world.on_main(lambda: append_jsonl(folder / PARTS_FILE, [part]))
    batches = agreed(loader.steps(start, stop), run.group) if run.group else loader.steps(start, stop)
    gc.collect()
    gc.disable()  # else each rank collects when it likes, and all wait for it
    path = folder / METRICS_FILE if world.is_main else None
    curves, profiler = Curves(folder), Profiler(config.profile, folder, world)
    with Metrics(path, start=start, steps=config.run.steps, config=config) as metrics:
        for step in range(start, stop):
            with profiler.step(step + 1):
                values, problem = train_step(run, batches, Progress(step, config.run.steps))
            asked = values.pop("stop") and step + 1 < stop
            if probe and probe.due(step + 1):
                values |= probe(run.engine, step + 1)
            metrics.log(step + 1, values)
            if values["holes"]:
                problem = problem or too_many_bad(folder, config.data.max_bad, step + 1, world)
            due = config.run.save_every and (step + 1) % config.run.save_every == 0
            if step + 1 == stop or due or problem or asked:
                last = bool(step + 1 == stop or problem or asked)
                why = next(filter(None, world.gather(run.stop.asked())), None) if asked else None
                _save(run, step + 1, last=last)
                if config.log.curves and world.is_main:
                    curves.draw(last=last)
                if last:
                    run.stop.clear()
                    profiler.close(step + 1)
            if problem:
                raise TrainingError(problem)
            if asked:
                world.barrier()  # the first rank that leaves makes the launcher end the others
                done = f"stopped behind step {step + 1} of {config.run.steps}, saved"
                raise Stopped(f"{done} ({why}); start it again to go on")
            if (step + 1) % _COLLECT_EVERY == 0:
                gc.collect()
    gc.enable()
    if stop == config.run.steps:
        save_model(run.engine, folder / "model", run.system.tokenizer, config.model.path, world)
        _finish(folder, world)


def train_step(run: Run, batches: Iterator[list[Batch]], progress: Progress) -> tuple[dict[str, float], str | None]:
    """One optimizer step over this rank's micro-batches: its numbers, the same on every rank, and what should end the
    run, if anything."""
    engine, system, world, step = run.engine, run.system, run.world, progress.step
    began = time.perf_counter()
    run.heartbeat.phase("data", step + 1)
    read = next(batches)
    micro_batches = [batch.to(world.device) for batch in read]
    waited = time.perf_counter() - began
    # Ranks that hold a micro-batch together all have the whole of it: the first of them counts it.
    counted = micro_batches if run.group is None or run.group.rank() == 0 else []
    own = {name: sum(batch.counts[name] for batch in counted) for name in micro_batches[0].counts}
    own["tokens"] = float(sum(batch.num_tokens for batch in counted))
    counts = world.sum({**own, **run.watch.before(read)})
    run.watch.agree(counts)
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate(run.config, step)
    losses = []
    for number, batch in enumerate(micro_batches):
        run.heartbeat.phase("forward", step + 1)
        loss = system.loss(engine, batch, progress)
        run.heartbeat.phase("backward", step + 1)
        # The engine averages over ranks; the terms are divided by the whole step's counts already.
        engine.backward(combine(loss, counts) * world.size, scale_wrt_gas=False)
        losses.append({name: replace(term, sum=term.sum.detach()) for name, term in loss.items()})
        if number + 1 < len(micro_batches):
            engine.step()
    run.heartbeat.phase("step", step + 1)
    holes = [asdict(hole) for batch in counted for hole in batch.holes]
    sums = {f"loss/{name}": sum(float(loss[name].sum) for loss in losses) for name in losses[0]}
    sums |= {"holes": float(len(holes)), "waited": waited, "stop": float(run.stop.asked() is not None)}
    totals = world.sum({**sums, **system.after_backward(), **run.watch.after(micro_batches, losses, waited)})
    values = {f"loss/{name}": totals[f"loss/{name}"] / max(counts[name], 1) for name in losses[0]}
    values["loss/total"] = sum(losses[0][name].weight * values[f"loss/{name}"] for name in losses[0])
    refusal = run.guard.verdict(values["loss/total"])
    with nothing_applied(engine) if refusal else nullcontext():
        engine.step()
    # The norm is the same on every rank; without a word DeepSpeed skips a step for which it is not finite.
    norm = float(engine.get_global_grad_norm() or 0.0)
    if not refusal and not math.isfinite(norm):
        refusal = Refusal("the gradient is not finite")
    problem = _refused(run, refusal, counted, values["loss/total"], step + 1)
    if totals["holes"]:
        write_lines(run.config.run.folder / QUARANTINE, step + 1, holes, world)

    elapsed = time.perf_counter() - began
    values |= {f"count/{name}": counts[name] for name in own}
    values |= run.watch.numbers({**counts, **totals}, elapsed)
    values |= system.summarise({**counts, **totals}, world.size)
    values |= {
        "grad_norm": norm,
        "lr": learning_rate(run.config, step),
        "step_s": elapsed,
        "tokens_per_s": counts["tokens"] / elapsed,
        "data_wait": totals["waited"] / world.size / elapsed,
        "peak_memory_mib": peak_memory_mib(world.device),
        "holes": totals["holes"],
        "refused": float(refusal is not None),
        "stop": totals["stop"],
    }
    return values, problem


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


def _refused(run: Run, refusal: Refusal | None, batches: list[Batch], loss: float, step: int) -> str | None:
    """Note the step; if it was refused, write whose it was, and say what should end the run, if anything."""
    applied = run.engine.was_step_applied()
    if applied != (refusal is None):
        did = "applied" if applied else "skipped"
        raise TrainingError(f"step {step}: the engine {did} it, the guard says {refusal}; report this")
    run.guard.note(loss, applied=applied)
    if refusal is None:
        return None
    ids = [name for batch in batches for name in batch.ids]
    lines = [{"reason": refusal.reason, "ids": ids}] if batches else []
    write_lines(run.config.run.folder / REFUSED, step, lines, run.world)
    if run.world.is_main:
        print(f"step {step}: {refusal.reason}; nothing was updated, its samples are in refused.jsonl", flush=True)
    policy = run.config.guard.spike
    if refusal.spike and policy == "rewind" and run.guard.refused < run.config.guard.max_refused:
        return _rewind(run, step)
    if (refusal.spike and policy == "stop") or run.guard.refused >= run.config.guard.max_refused:
        return (
            f"step {step}: {refusal.reason}; {run.guard.refused} steps in a row changed nothing (guard.max_refused "
            f"{run.config.guard.max_refused}, guard.spike {policy}). Look at the samples in "
            f"{run.config.run.folder / 'refused.jsonl'}, lower optim.lr ({run.config.optim.lr}); a resumed run passes "
            "over these steps"
        )
    return None


def _rewind(run: Run, step: int) -> str | None:
    """Take back weights and optimizer of the last checkpoint; the order goes on behind this step."""
    path = _latest(run)
    if path is None:
        return f"step {step}: guard.spike is rewind, but no checkpoint was saved yet; set run.save_every"
    run.heartbeat.phase("load", step)
    load_checkpoint(run.engine, path, run.world)
    if run.world.is_main:
        print(f"step {step}: back to the weights of {path}; the steps since are passed over", flush=True)
    return None


def _save(run: Run, step: int, *, last: bool) -> None:
    """Save behind `step`; a disk that is full for a while does not end the run, unless this is its last save."""
    run.heartbeat.phase("save", step)
    config, losses = run.config, run.guard.losses[-(run.config.run.save_every or run.config.run.steps) :]
    try:
        save_checkpoint(
            run.engine,
            config.run.folder / "checkpoints",
            step,
            run.order.state(step),
            run.world,
            guard=run.guard.state,
            score=sum(losses) / len(losses) if losses else None,
            keep=config.run.keep,
            config=config.model_dump(mode="json"),
        )
        run.failed_saves = 0
    except CheckpointError as error:
        run.failed_saves += 1
        if last or run.failed_saves >= _MAX_FAILED_SAVES:
            raise
        if run.world.is_main:
            print(f"step {step}: {error}; going on ({run.failed_saves} of {_MAX_FAILED_SAVES})", flush=True)


def _latest(run: Run) -> Path | None:
    folder = run.config.run.folder / "checkpoints"
    return run.world.on_main(lambda: latest_checkpoint(folder))


def _resume(run: Run) -> int:
    folder, path, step = run.config.run.folder, _latest(run), 0
    if path is not None:
        state, guard = load_checkpoint(run.engine, path, run.world)
        step, run.guard = run.order.resume(state), Guard(run.config.guard, **guard)

    def shorten() -> None:
        for name in (METRICS_FILE, QUARANTINE, REFUSED, PARTS_FILE):
            drop_after(folder / name, step)
        if path is not None:
            print(f"resuming from {path} at step {step}", flush=True)

    run.world.on_main(shorten)
    return step


def _finish(folder: Path, world: World) -> None:
    peaks = world.gather(peak_memory_mib(world.device))
    if world.is_main:
        # From the metrics, so that a run in several parts counts all of them.
        seconds = sum(line["step_s"] for line in read_jsonl(folder / METRICS_FILE))
        summary = {"seconds": round(seconds, 1), "peak_memory_mib": round(max(peaks)), "ranks": world.size}
        # Success is this file, not an exit code: a launcher that is killed exits 0.
        write_whole(folder / "done.json", json.dumps(summary))
        print(f"finished: {folder / 'model'} is a stock transformers folder", flush=True)
