"""Promise: the stream of samples and the gradient of a step are the same for any number of ranks, wherever a run was
stopped; opening a run late costs no more than opening it early."""

import itertools
import json
import multiprocessing
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from gradient_ranks import gradients_of_step
from tiny import largest_difference, make_data, tiny_config

from swim.data_tools import plan as plans
from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardWriter
from swim.train.loader import Loader, Order
from swim.train.system import build_system


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Two folders of clips and one of text alone."""
    folder = tmp_path_factory.mktemp("loader")
    for name, clips in (("a", 9), ("b", 5)):
        make_data(folder / name, clips=clips, seed=clips)
    with ShardWriter(folder / "text") as writer:
        for number in range(8):
            turns = [Turn(role="user", text="why " * (number + 1)), Turn(role="assistant", text="yes")]
            said = [Conversation(task="text", turns=turns)] * (1 + number % 3)
            writer.write(
                f"t{number}", Record(source="t", license="CC0-1.0", media=[], objects=[], conversations=said), {}, {}
            )
    return folder


def mixture(data: Path, *overrides: str):
    train = json.dumps(
        [str(data / "a"), {"path": str(data / "b"), "repeat": 1.5}, {"path": str(data / "text"), "repeat": 0.7}]
    )
    packed = ["data.packed=true", "data.shared_prefix=true", "data.clips_per_pack=null", "data.tokens_per_pack=420"]
    step = ["data.packs_per_step=5", "data.max_conversations=5", "data.tasks=null", f"run.output={data / 'runs'}"]
    return tiny_config(data / "a", f"data.train={train}", *packed, *step, *overrides)


def ids(steps: Iterator[list]) -> list[list[list[str]]]:
    return [[batch.ids for batch in batches] for batches in steps]


def test_one_stream_of_ids_for_any_ranks_workers_and_stops(data, tmp_path):
    config = mixture(data)
    system = build_system(config)

    def order() -> Order:
        return Order(config, system, cache=tmp_path / "plans")

    first = order()
    epochs = [first.plan(epoch).num_steps for epoch in range(3)]
    num_steps = sum(epochs)
    whole = ids(Loader(first, system.collator).steps(0, num_steps))
    flat = [name for step in whole for pack in step for name in pack]
    assert len(set(flat)) < len(flat)
    assert {name[:1] for name in flat} == {"s", "t"}
    rng, worlds, stream = np.random.default_rng(0), itertools.cycle([1, 2, 4, 3]), []
    state = order().state(0)
    while state.run_step < num_steps:
        # As after a kill: everything is made anew, on another number of ranks, with another number of workers.
        again, size = order(), next(worlds)
        start = again.resume(state)
        stop = min(num_steps, start + int(rng.integers(1, 6)))
        ranks = []
        for rank in range(size):
            with Loader(again, system.collator, rank=rank, size=size, workers=int(rng.integers(3))) as loader:
                ranks.append(ids(loader.steps(start, stop)))
        for step in zip(*ranks, strict=True):
            packs = [pack for turn in zip(*step, strict=True) for pack in turn]
            stream.append(packs)
        state = again.state(stop)
    # Dummy packs have no ids.
    assert [[p for p in step if p] for step in stream] == [[p for p in step if p] for step in whole]


def test_the_gradient_of_a_step_is_the_same_on_one_to_four_ranks(data, tmp_path):
    config = mixture(data, "system.gradient_every=0")
    # One process imports everything, and is then copied.
    multiprocessing.set_forkserver_preload(["gradient_ranks"])
    arguments = (4, config, 1, tmp_path)
    torch.multiprocessing.start_processes(gradients_of_step, arguments, nprocs=4, start_method="forkserver")
    one, *others = (torch.load(tmp_path / f"ranks_{world}.pt", weights_only=True) for world in range(1, 5))
    assert len(one["ids"][0]) == 5, "five packs divide evenly among no more ranks than one"
    largest = max(float(gradient.abs().max()) for gradient in one["gradients"].values())
    assert largest > 1e-2
    for world, other in zip((2, 3, 4), others):
        packs = [pack for turn in itertools.zip_longest(*other["ids"]) for pack in turn]
        assert packs[:5] == one["ids"][0]
        assert packs[5:] == [[]] * (-5 % world), "dummy packs"
        assert torch.equal(other["counts"], one["counts"])
        assert largest_difference(one["gradients"], other["gradients"]) < 1e-6 * max(1.0, largest)


def test_a_run_opened_late_makes_no_earlier_plan_and_none_that_is_there(data, tmp_path, monkeypatch):
    config = mixture(data)
    system = build_system(config)
    made = []

    def counting(*arguments):
        made.append(arguments[2])
        return plans.make_plan(*arguments)

    monkeypatch.setattr("swim.train.loader.make_plan", counting)
    cache = tmp_path / "plans"
    first = Order(config, system, cache=cache)
    late = sum(first.plan(epoch).num_steps for epoch in range(7)) + 1
    state, packs = first.state(late), first.packs(late, 0, 1)
    assert state.epoch == 7
    assert set(made) == {*range(8)}
    made.clear()
    kept = sorted(path.name.split("_")[1] for path in cache.iterdir())
    assert kept == ["00000", "00006", "00007"], "the first, which every start looks at, and the last two"
    again = Order(config, system, cache=cache)
    assert again.resume(state) == late
    assert again.packs(late, 0, 1) == packs
    assert made == []
    damaged = next(cache.glob("epoch_00007_*"))
    damaged.write_bytes(damaged.read_bytes()[:-100])
    without = Order(config, system, cache=cache, writes=False)
    without.resume(state)
    assert without.packs(late, 0, 1) == packs
    assert made == [7], "made anew, and only that"


def test_steps_behind_an_epochs_end_are_the_next_epochs(data):
    config = mixture(data, "data.packs_per_step=1")
    order = Order(config, build_system(config))
    epochs = [order.plan(epoch) for epoch in range(4)]
    assert len({plan.num_steps for plan in epochs}) > 1
    steps = [(plan.epoch, plan.step(i)) for plan in epochs for i in range(plan.num_steps)]
    for step in (0, 7, len(steps) - 1, 3, *range(len(steps))):  # in any order
        epoch, packs = steps[step]
        assert [pack for pack in order.packs(step, 0, 1) if pack is not None] == packs
        assert order.state(step).epoch == epoch
