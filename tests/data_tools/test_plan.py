"""Order depends on data, seed, epoch and batch shape alone: never on ranks, and not on where a run was stopped."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from swim.data_tools.facts import facts_of
from swim.data_tools.mixture import DataSet, PlanError, PlanOptions
from swim.data_tools.plan import Plan, PlanState, load_plan, make_plan
from swim.data_tools.shards import ConversationFacts, Entry


def _entries(count: int) -> list[Entry]:
    """Clip i has i % 4 questions of task a and one of task b; five clips a shard."""

    def facts(task: str) -> ConversationFacts:
        return ConversationFacts(task, None, 1, 1, 10)

    def entry(i: int) -> Entry:
        return Entry(f"clip{i}", {}, 8, 8, 2, 1, tuple([facts("a")] * (i % 4) + [facts("b")]), f"shard{i // 5}")

    return [entry(i) for i in range(count)]


def _set(
    name: str, digest: str, entries: Sequence[Entry], repeat: float = 1, proportion: float | None = None
) -> DataSet:
    return DataSet(name, digest, facts_of(entries), entries, repeat, proportion)


FOLDERS = (_set("first", "x", _entries(30)), _set("second", "y", _entries(21)))


def _plan(*, data: tuple[DataSet, ...] = FOLDERS, epoch: int = 0, **options: Any) -> Plan:
    return make_plan(data, PlanOptions(**({"clips_per_pack": 3, "packs_per_step": 4, "seed": 7} | options)), epoch)


def _packs(plan: Plan) -> list[Any]:
    return [plan.pack(i) for i in range(plan.num_packs)]


def _state(plan: Plan, step: int) -> PlanState:
    return PlanState(step, plan.epoch, step, plan.digest, plan.identity)


def test_every_conversation_comes_once_and_clips_stay_whole() -> None:
    plan = _plan()
    units = list(plan.units())
    expected = {(d, i): tuple(range(i % 4 + 1)) for d, count in enumerate((30, 21)) for i in range(count)}
    assert len(units) == 51
    assert {(unit.dataset, unit.clip): unit.conversations for unit in units} == expected
    assert [len(pack) for pack in _packs(plan)] == [3] * 17
    assert plan.num_steps == 5
    assert [len(plan.step(i)) for i in range(5)] == [4, 4, 4, 4, 1], "the last step keeps what is left"
    with pytest.raises(IndexError, match="step 5 of a plan of 5 steps"):
        plan.step(5)


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_any_number_of_ranks_sees_the_same_steps(world: int) -> None:
    plan = _plan()
    for step in range(plan.num_steps):
        ranks = [plan.rank_packs(step, rank, world) for rank in range(world)]
        assert len({len(packs) for packs in ranks}) == 1, "as many micro-batches on every rank"
        assert len(ranks[0]) == -(-len(plan.step(step)) // world)
        in_order = [pack for turn in zip(*ranks, strict=True) for pack in turn if pack is not None]
        assert in_order == plan.step(step)


def test_a_run_stopped_and_resumed_elsewhere_reads_the_same_stream() -> None:
    whole = [pack for epoch in range(2) for pack in _packs(_plan(epoch=epoch))]
    stream, state, worlds = [], _state(_plan(), 0), itertools.cycle([1, 2, 4, 3])
    while state.epoch < 2:
        plan, world = _plan(epoch=state.epoch), next(worlds)  # as after a restart: made anew, other ranks
        state.check(plan)
        for step in range(state.step, min(state.step + 2, plan.num_steps)):
            ranks = [plan.rank_packs(step, rank, world) for rank in range(world)]
            stream += [pack for turn in zip(*ranks, strict=True) for pack in turn if pack is not None]
            state = _state(plan, step + 1)
        if state.step == plan.num_steps:
            state = _state(_plan(epoch=state.epoch + 1), 0)
    assert stream == whole


def test_seed_and_epoch_change_the_order_only() -> None:
    base, again = _plan(), _plan()
    assert _packs(base) == _packs(again)
    assert base.digest == again.digest
    for other in (_plan(seed=8), _plan(epoch=1)):
        assert _packs(other) != _packs(base)
        assert sorted(other.units()) == sorted(base.units())
    assert list(_plan(shuffle=False).units()) == sorted(base.units())


def test_the_order_of_earlier_releases_is_kept() -> None:
    """Runs of the recipes, and the numbers of the demo, depend on it."""
    first = [[(unit.dataset, unit.clip) for unit in pack] for pack in _plan().step(0)]
    assert first == [
        [(1, 1), (1, 4), (1, 19)],
        [(0, 26), (0, 21), (1, 10)],
        [(1, 13), (0, 22), (0, 14)],
        [(1, 12), (0, 9), (1, 14)],
    ]


CHANGES: dict[str, tuple[dict[str, Any], str]] = {
    "data": (
        {"data": (FOLDERS[0], _set("second", "z", _entries(21)))},
        r"data.train\[1\] \(second\) has other shards",
    ),
    "repeat": (
        {"data": (FOLDERS[0], _set("second", "y", _entries(21), 2))},
        r"second\) came 1 times an epoch, now 2",
    ),
    "order of data sets": ({"data": FOLDERS[::-1]}, r"data.train\[0\] \(first\) has other shards.*data.train\[1\]"),
    "fewer data sets": ({"data": FOLDERS[:1]}, r"data.train had 2 folders, has 1"),
    "seed": ({"seed": 8}, "seed was 7, is 8"),
    "epoch": ({"epoch": 1}, "epoch was 0, is 1"),
    "clips_per_pack": ({"clips_per_pack": 2}, "clips_per_pack was 3, is 2"),
    "packs_per_step": ({"packs_per_step": 3}, "packs_per_step was 4, is 3"),
    "tasks": ({"tasks": ("a",)}, r"tasks was None, is \['a'\]"),
    "max_conversations": ({"max_conversations": 2}, "max_conversations was None, is 2"),
    "shuffle": ({"shuffle": False}, "shuffle was True, is False"),
    "shuffle_shards": ({"shuffle_shards": 2}, "shuffle_shards was None, is 2"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_position_fits_its_own_plan_only_and_says_what_has_changed(name: str) -> None:
    plan, (change, message) = _plan(), CHANGES[name]
    state = _state(plan, 3)
    state.check(_plan())
    with pytest.raises(PlanError) as caught:
        state.check(_plan(**change), ["first", "second"])
    for part in (rf"epoch 0, step 3.*{plan.digest[:12]}", message, "Restore that to resume, or start a new run"):
        assert re.search(part, str(caught.value)), caught.value
    others = {m for n, (_, m) in CHANGES.items() if n != name and "other shards" not in m}
    assert not any(re.search(other, str(caught.value)) for other in others), "it names what has changed, nothing else"


def test_positions_past_the_end_are_refused() -> None:
    plan = _plan()
    _state(plan, 5).check(plan)
    with pytest.raises(PlanError, match=r"step 6\) is outside the plan's 5 steps; start a new run"):
        _state(plan, 6).check(plan)


def test_tasks_and_limits_choose_conversations() -> None:
    only_a = list(_plan(tasks=("a",)).units())
    assert {(unit.dataset, unit.clip) for unit in only_a} == {
        (d, i) for d, count in enumerate((30, 21)) for i in range(count) if i % 4
    }
    assert all(unit.conversations == tuple(range(unit.clip % 4)) for unit in only_a)
    drawn = {
        (epoch, unit.dataset, unit.clip): unit.conversations
        for epoch in range(3)
        for unit in _plan(max_conversations=2, epoch=epoch).units()
    }
    assert all(len(kept) == min(2, clip % 4 + 1) for (_, _, clip), kept in drawn.items())
    assert all(list(kept) == sorted(set(kept)) for kept in drawn.values())
    assert len({kept for (_, _, clip), kept in drawn.items() if clip % 4 == 3}) > 3, "drawn, and anew in each epoch"
    first = _plan(max_conversations=2, shuffle=False).units()
    assert all(unit.conversations == tuple(range(min(2, unit.clip % 4 + 1))) for unit in first)
    last_of_four = _plan(tasks=("b",)).units()
    assert all(unit.conversations == (unit.clip % 4,) for unit in last_of_four)


@pytest.mark.parametrize("repeat", [0.3, 1, 2.5, math.pi])
def test_repetitions_are_even_over_the_epochs(repeat: float) -> None:
    data = (FOLDERS[0], _set("second", "y", _entries(21), repeat))
    total: Counter[tuple[int, int]] = Counter()
    for epoch in range(12):
        units = list(_plan(data=data, epoch=epoch).units())
        own = Counter((unit.dataset, unit.clip) for unit in units)
        assert all(own[0, clip] == 1 for clip in range(30)), "the other set comes exactly once"
        counts = [own[1, clip] for clip in range(21)]
        assert set(counts) <= {math.floor(repeat), math.ceil(repeat)}
        assert abs(sum(counts) - 21 * repeat) < 1
        total += own
        over = [total[1, clip] for clip in range(21)]
        assert max(over) - min(over) <= 1, "no clip is more than one ahead"
    assert abs(sum(over) - 12 * 21 * repeat) < 1


def test_which_clips_come_once_more_depends_on_the_seed() -> None:
    data = (_set("one", "x", _entries(30), 1.5),)
    twice = [
        frozenset(
            clip for (clip,), n in Counter((u.clip,) for u in _plan(data=data, seed=seed).units()).items() if n == 2
        )
        for seed in range(4)
    ]
    assert [len(clips) for clips in twice] == [15] * 4
    assert len(set(twice)) == 4


def test_proportions_share_an_epoch_as_long_as_all_sets_together() -> None:
    data = tuple(_set(one.name, one.digest, one.entries, proportion=p) for one, p in zip(FOLDERS, (1, 2)))
    counts = Counter(unit.dataset for unit in _plan(data=data).units())
    assert counts == {0: 17, 1: 34}
    # Of clips with the wanted tasks: 30 - 8 and 21 - 6 of them.
    counts = Counter(unit.dataset for unit in _plan(data=data, tasks=("a",)).units())
    assert sum(counts.values()) in (36, 37)
    assert abs(counts[0] - 37 / 3) < 1
    with pytest.raises(ValueError, match=r"1 of 2 data sets have a proportion; give one to all or to none"):
        _plan(data=(FOLDERS[0], data[1]))
    other = _set("empty", "z", [], proportion=1)
    with pytest.raises(PlanError, match=r"empty has a proportion, but no conversation of the wanted tasks"):
        _plan(data=(*data, other))


def test_an_epoch_may_be_empty() -> None:
    plan = _plan(data=(_set("few", "x", _entries(2), 0.25),))
    assert (plan.num_packs, plan.num_steps, list(plan.units())) == (0, 0, [])


def test_shards_are_read_a_few_at_a_time() -> None:
    data = (_set("first", "x", _entries(30)), _set("second", "y", _entries(20), 2))
    plan = _plan(data=data, shuffle_shards=2)
    assert sorted(plan.units()) == sorted(_plan(data=data).units())
    units = [(unit.dataset, unit.clip // 5) for unit in plan.units()]
    windows = [set(units[i : i + 10]) for i in range(0, len(units), 10)]
    assert [len(window) for window in windows] == [2] * 7, "two shards of five clips each in any ten units"
    assert Counter(shard for window in windows for shard in window) == {
        **{(0, shard): 1 for shard in range(6)},
        **{(1, shard): 2 for shard in range(4)},
    }
    order = [sorted(window) for window in windows]
    assert order != sorted(order), "shards are shuffled"
    assert any(units[i] != units[i + 1] for i in range(10)), "and the clips of the two"
    first = _plan(data=data, shuffle_shards=2, epoch=1)
    assert _packs(first) != _packs(plan)


def test_a_saved_plan_is_the_plan(tmp_path: Path) -> None:
    plan = _plan()
    plan.save(tmp_path / "plan.npz")
    loaded = load_plan(
        tmp_path / "plan.npz", PlanOptions(clips_per_pack=3, packs_per_step=4, seed=7), 0, (plan.digest, plan.identity)
    )
    assert loaded is not None
    assert _packs(loaded) == _packs(plan)
    assert [path.name for path in tmp_path.iterdir()] == ["plan.npz"]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clips_per_pack": 0}, ValueError, r"clips_per_pack is 0, must be at least 1"),
        ({"clips_per_pack": None}, ValueError, r"clips_per_pack None and tokens_per_pack None: give exactly one"),
        ({"tokens_per_pack": 9}, ValueError, r"clips_per_pack 3 and tokens_per_pack 9: give exactly one"),
        ({"clips_per_pack": None, "tokens_per_pack": 9}, ValueError, r"tokens_per_pack needs a token model"),
        ({"packs_per_step": -1}, ValueError, r"packs_per_step is -1, must be at least 1"),
        ({"max_conversations": 0}, ValueError, r"max_conversations is 0, must be at least 1"),
        ({"shuffle_shards": 0}, ValueError, r"shuffle_shards is 0, must be at least 1"),
        ({"tasks": ("a", "colour")}, PlanError, r"no conversation of task \['colour'\]; the data has \['a', 'b'\]"),
        ({"data": (_set("none", "x", []),)}, PlanError, r"the data has \[\]"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _plan(**options)
