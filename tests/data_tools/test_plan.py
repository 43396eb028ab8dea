"""Order depends on data, seed, epoch and batch shape alone: never on ranks, and not on where a run was stopped."""

import itertools
from typing import Any

import pytest

from swim.data_tools.plan import Plan, PlanError, PlanState, make_plan
from swim.data_tools.shards import ConversationFacts, Entry


def _entries(count: int) -> list[Entry]:
    """Clip i has i % 4 questions of task a and one of task b."""

    def facts(task: str) -> ConversationFacts:
        return ConversationFacts(task, None, 1, 1, 10)

    return [Entry(f"clip{i}", {}, 8, 8, 2, 1, tuple([facts("a")] * (i % 4) + [facts("b")])) for i in range(count)]


DATA = {"digests": ["x", "y"], "units": [_entries(30), _entries(21)]}


def _plan(**options: Any) -> Plan:
    defaults: dict[str, Any] = {"weights": None, "clips_per_pack": 3, "packs_per_step": 4, "seed": 7, "epoch": 0}
    return make_plan(**(DATA | defaults | options))


def test_every_conversation_comes_once_and_clips_stay_whole() -> None:
    plan = _plan()
    units = [unit for pack in plan.packs for unit in pack]
    expected = {(d, i): tuple(range(i % 4 + 1)) for d, count in enumerate((30, 21)) for i in range(count)}
    assert len(units) == 51
    assert {(unit.dataset, unit.clip): unit.conversations for unit in units} == expected
    assert [len(pack) for pack in plan.packs] == [3] * 17
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
    whole = [pack for epoch in range(2) for pack in _plan(epoch=epoch).packs]
    stream, state, worlds = [], PlanState(0, 0, _plan(epoch=0).digest), itertools.cycle([1, 2, 4, 3])
    while state.epoch < 2:
        plan, world = _plan(epoch=state.epoch), next(worlds)  # as after a restart: made anew, other ranks
        state.check(plan)
        for step in range(state.step, min(state.step + 2, plan.num_steps)):
            ranks = [plan.rank_packs(step, rank, world) for rank in range(world)]
            stream += [pack for turn in zip(*ranks, strict=True) for pack in turn if pack is not None]
            state = PlanState(state.epoch, step + 1, plan.digest)
        if state.step == plan.num_steps:
            state = PlanState(state.epoch + 1, 0, _plan(epoch=state.epoch + 1).digest)
    assert stream == whole


def test_seed_and_epoch_change_the_order_only() -> None:
    base, again = _plan(), _plan()
    assert base == again
    for other in (_plan(seed=8), _plan(epoch=1)):
        assert other.packs != base.packs
        assert sorted(itertools.chain(*other.packs)) == sorted(itertools.chain(*base.packs))
    in_order = _plan(shuffle=False)
    assert list(itertools.chain(*in_order.packs)) == sorted(itertools.chain(*base.packs))


CHANGES: dict[str, dict[str, Any]] = {
    "data": {"digests": ["x", "z"]},
    "order of data sets": {"digests": ["y", "x"]},
    "seed": {"seed": 8},
    "epoch": {"epoch": 1},
    "clips_per_pack": {"clips_per_pack": 2},
    "packs_per_step": {"packs_per_step": 3},
    "tasks": {"tasks": ["a"]},
    "max_conversations": {"max_conversations": 2},
    "shuffle": {"shuffle": False},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_position_fits_its_own_plan_only(name: str) -> None:
    plan = _plan()
    state = PlanState(0, 3, plan.digest)
    state.check(_plan())
    with pytest.raises(PlanError, match=rf"epoch 0, step 3.*{plan.digest[:12]}.*restore them to resume"):
        state.check(_plan(**CHANGES[name]))


def test_positions_past_the_end_are_refused() -> None:
    plan = _plan()
    PlanState(0, 5, plan.digest).check(plan)
    with pytest.raises(PlanError, match=r"saved step 6 is outside the plan's 5; start a new run"):
        PlanState(0, 6, plan.digest).check(plan)


def test_tasks_and_limits_choose_conversations() -> None:
    only_a = [unit for pack in _plan(tasks=["a"]).packs for unit in pack]
    assert {(unit.dataset, unit.clip) for unit in only_a} == {
        (d, i) for d, count in enumerate((30, 21)) for i in range(count) if i % 4
    }
    assert all(unit.conversations == tuple(range(unit.clip % 4)) for unit in only_a)
    drawn = {
        (epoch, unit.dataset, unit.clip): unit.conversations
        for epoch in range(3)
        for pack in _plan(max_conversations=2, epoch=epoch).packs
        for unit in pack
    }
    assert all(len(kept) == min(2, clip % 4 + 1) for (_, _, clip), kept in drawn.items())
    assert all(list(kept) == sorted(set(kept)) for kept in drawn.values())
    assert len({kept for (_, _, clip), kept in drawn.items() if clip % 4 == 3}) > 3, "drawn, and anew in each epoch"
    first = [unit for pack in _plan(max_conversations=2, shuffle=False).packs for unit in pack]
    assert all(unit.conversations == tuple(range(min(2, unit.clip % 4 + 1))) for unit in first)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"weights": [1, 0.5]}, ValueError, r"weight 0.5: .*every weight must be 1"),
        ({"weights": [1]}, ValueError, r"2 digests, 2 lists of entries, 1 weights: give one of each"),
        ({"digests": ["x"]}, ValueError, r"1 digests, 2 lists of entries"),
        ({"clips_per_pack": 0}, ValueError, r"clips_per_pack is 0, must be at least 1"),
        ({"packs_per_step": -1}, ValueError, r"packs_per_step is -1, must be at least 1"),
        ({"max_conversations": 0}, ValueError, r"max_conversations is 0, must be at least 1"),
        ({"tasks": ["a", "colour"]}, PlanError, r"no conversation of task \['colour'\]; the data has \['a', 'b'\]"),
        ({"units": [[], []]}, PlanError, r"the data has \[\]"),
    ],
)
def test_impossible_plans_are_refused(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _plan(**options)


def test_equal_weights_are_no_weights() -> None:
    assert _plan(weights=[1, 1.0]) == _plan()
