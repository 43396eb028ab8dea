"""`swim data replay`: the packs and batches of a step of a run, made again from what its folder holds.

Steps count from 1, as in all files of a run.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from swim.data_tools.plan import Pack, PlanState
from swim.data_tools.shards import ShardSet
from swim.train.batch import Batch
from swim.train.config import Config, load_config
from swim.train.loader import Loader, Order
from swim.train.metrics import PARTS_FILE
from swim.train.system import build_system


class ReplayError(ValueError):
    """A step cannot be replayed; the message names file, value and remedy."""


@dataclass(frozen=True)
class MicroBatch:
    """What a rank trained on at once: the pack (None: a dummy) and the batch made of it."""

    rank: int
    number: int
    pack: Pack | None
    batch: Batch


@dataclass(frozen=True)
class Replay:
    """A step, from 1, with its position in the plan, the line it left in metrics.jsonl (None: it was not finished), the
    lines in quarantine.jsonl, and micro-batches of all ranks or of one."""

    config: Config
    step: int
    num_ranks: int
    position: PlanState
    logged: dict[str, float | None] | None
    quarantined: list[dict[str, Any]]
    micro_batches: list[MicroBatch]
    shards: list[ShardSet]
    differences: list[str] | None  # from the log; None where it says nothing about these micro-batches

    def units(self) -> Iterator[tuple[ShardSet, str, tuple[int, ...]]]:
        """Shards, key and conversations of every sample, in order."""
        for one in self.micro_batches:
            for unit in one.pack or ():
                shards = self.shards[unit.dataset]
                yield shards, shards.entries[unit.clip].key, unit.conversations


def replay(
    run: Path, step: int, *, rank: int | None = None, num_ranks: int | None = None, data: Sequence[str] = ()
) -> Replay:
    """Make step `step` (from 1) of a run again, for one rank or all; PlanError if its data or order has changed.

    `num_ranks` is by default what the run had in this step; `data` are the folders of data.train if they have moved.
    """
    config = _config(run, data)
    if not 1 <= step <= config.run.steps:
        raise ReplayError(f"--step {step} is outside 1 to {config.run.steps}, the steps of {run}")
    part = _part(run, step)
    own_ranks = int(part["ranks"])
    num_ranks = num_ranks or own_ranks
    if rank is not None and not 0 <= rank < num_ranks:
        raise ReplayError(
            f"--rank {rank} is outside 0 to {num_ranks - 1}; give --world-size for another number of ranks"
        )
    system = build_system(config)
    order = Order(config, system, cache=run / "plans", writes=False)
    order.resume(PlanState(**part["plan"]))  # checks the plan's digest
    micro_batches = []
    for of in range(num_ranks) if rank is None else [rank]:
        with Loader(order, system.collator, rank=of, size=num_ranks) as loader:
            (batches,) = loader.steps(step - 1, step)
        for number, (pack, batch) in enumerate(zip(order.packs(step - 1, of, num_ranks), batches, strict=True)):
            micro_batches.append(MicroBatch(of, number, pack, batch))
    logged = next((line for line in _lines(run / "metrics.jsonl") if line["step"] == step), None)
    quarantined = [line for line in _lines(run / "quarantine.jsonl") if line["step"] == step]
    comparable = logged is not None and rank is None and num_ranks == own_ranks
    return Replay(
        config=config,
        step=step,
        num_ranks=num_ranks,
        position=order.state(step - 1),
        logged=logged,
        quarantined=quarantined,
        micro_batches=micro_batches,
        shards=order.shards,
        differences=_differences(logged, quarantined, micro_batches) if logged and comparable else None,
    )


def _config(run: Path, data: Sequence[str]) -> Config:
    if not (run / "config.yaml").is_file():
        raise ReplayError(f"{run}: no config.yaml in it; give the folder of a run")
    config = load_config(run / "config.yaml")
    train = config.data.train
    if data and len(data) != len(train):
        raise ReplayError(f"{len(data)} folders are given with --data, data.train of {run} has {len(train)}; give all")
    if data:
        train = [type(one).model_validate({**one.model_dump(), "path": path}) for one, path in zip(train, data)]
    # The folder may have moved since.
    whole = run.resolve()
    place = config.run.model_copy(update={"output": whole.parent, "name": whole.name})
    return config.model_copy(update={"run": place, "data": config.data.model_copy(update={"train": train})})


def _part(run: Path, step: int) -> dict[str, Any]:
    """What was noted when the part of the run began that has this step."""
    parts = [part for part in _lines(run / PARTS_FILE) if part["step"] <= step]
    if not parts:
        raise ReplayError(
            f"{run / PARTS_FILE} tells of no part with step {step}; only runs that wrote it can be replayed"
        )
    return parts[-1]


def _lines(path: Path) -> list[dict[str, Any]]:
    found = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue  # cut off while it was written
    return found


def _differences(
    logged: dict[str, float | None], quarantined: Sequence[dict[str, Any]], micro_batches: Sequence[MicroBatch]
) -> list[str]:
    """How the batches differ from what the run has noted of them; the plan's digest does not cover bytes of videos."""
    counts: Counter[str] = Counter()
    for one in micro_batches:
        counts.update({**one.batch.counts, "tokens": one.batch.num_tokens})
    found = [
        f"count/{name} is {count:g}, the log says {logged[f'count/{name}']:g}"
        for name, count in counts.items()
        if f"count/{name}" in logged and float(f"{count:.9g}") != logged[f"count/{name}"]
    ]
    then, now = {line["id"] for line in quarantined}, {hole.id for one in micro_batches for hole in one.batch.holes}
    for names, what in ((then - now, "could not be read then, but can now"), (now - then, "cannot be read any more")):
        found += [f"{name} {what}" for name in sorted(names)]
    return found


def describe(found: Replay) -> dict[str, Any]:
    """A replayed step as plain data."""
    return {
        "run": str(found.config.run.folder),
        "step": found.step,
        "ranks": found.num_ranks,
        "epoch": found.position.epoch,
        "step_in_epoch": found.position.step + 1,
        "plan": found.position.plan_digest,
        "logged": found.logged,
        "quarantined": found.quarantined,
        "differences": found.differences,
        "micro_batches": [_describe_micro_batch(one, found.shards) for one in found.micro_batches],
    }


def _describe_micro_batch(one: MicroBatch, shards: Sequence[ShardSet]) -> dict[str, Any]:
    samples = []
    for unit in one.pack or ():
        entry = shards[unit.dataset].entries[unit.clip]
        ids = [f"{entry.key}#{i}" for i in unit.conversations]
        samples.append({"ids": ids, "shard": f"{shards[unit.dataset].folder}/{entry.shard}"})
    holes = [{"id": hole.id, "offset": hole.offset, "reason": hole.reason} for hole in one.batch.holes]
    place = {"rank": one.rank, "micro_batch": one.number, "dummy": one.pack is None}
    return {**place, "tokens": one.batch.num_tokens, "counts": one.batch.counts, "samples": samples, "holes": holes}


def replay_report(found: Replay) -> str:
    """A replayed step as text."""
    told = describe(found)
    lines = [
        f"step {told['step']} of {found.config.run.steps:,}: step {told['step_in_epoch']} of epoch {told['epoch']}, "
        f"plan {told['plan'][:12]}, {told['ranks']} ranks"
    ]
    logged = {name: value for name, value in (told["logged"] or {}).items() if name != "step"}
    shown = (f"{name} {'not finite' if value is None else f'{value:.6g}'}" for name, value in logged.items())
    lines.append("logged: " + ("  ".join(shown) or "nothing, the run did not finish this step"))
    for one in told["micro_batches"]:
        kind = "a dummy pack" if one["dummy"] else f"{len(one['samples'])} clips"
        lines.append(f"rank {one['rank']}, micro-batch {one['micro_batch']}: {kind}, {one['tokens']:,} tokens")
        lines += [f"  {', '.join(sample['ids'])}  in {sample['shard']}" for sample in one["samples"]]
        lines += [f"  hole {hole['id']}: {hole['reason']}" for hole in one["holes"]]
    if told["differences"] is None:
        lines.append("counts are not compared with the log, which is about all ranks of a finished step")
    elif told["differences"]:
        lines.append("these are NOT the batches of then: " + "; ".join(told["differences"]))
    else:
        lines.append("counts and holes are those of the log")
    # A terminal must not obey what names from data hold.
    return "\n".join("".join(c if c.isprintable() else repr(c)[1:-1] for c in line) for line in lines)


def batch_tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors in a batch, with names such as `inputs.input_ids` behind `name`."""
    if isinstance(value, Tensor):
        yield name, value.detach().clone().contiguous()
        return
    if is_dataclass(value) and not isinstance(value, type):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    elif isinstance(value, list | tuple):
        value = dict(enumerate(value))
    for key, item in value.items() if isinstance(value, dict) else ():
        yield from batch_tensors(item, f"{name}.{key}")


def save_tensors(found: Replay, path: Path) -> int:
    """Write the tensors of all micro-batches, named rank0.batch0.inputs.input_ids and so on; returns their number."""
    tensors = dict(
        pair for one in found.micro_batches for pair in batch_tensors(one.batch, f"rank{one.rank}.batch{one.number}")
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, {"replay": json.dumps(describe(found))})
    return len(tensors)
