"""Packs hold at most so many tokens and little less, the ranks' packs cost about the same, and every conversation comes
exactly once."""

import itertools
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from swim.data_tools.facts import facts_of
from swim.data_tools.mixture import DataSet, PlanError, PlanOptions
from swim.data_tools.packing import PACK_WINDOW, Lengths, TokenModel, first_fit
from swim.data_tools.plan import Plan, PlanState, Unit, make_plan
from swim.data_tools.shards import ConversationFacts, Entry

FACTS = ConversationFacts("ask", None, 1, 1, 10)
Data = tuple[DataSet, ...]


def _options(**options: Any) -> PlanOptions:
    return PlanOptions(**({"tokens_per_pack": 500, "packs_per_step": 4, "seed": 3} | options))


def _folder(name: str, num_conversations: list[int], **options: Any) -> DataSet:
    entries = [Entry(f"{name}{i}", {}, 8, 8, 2, 1, (FACTS,) * n, f"s{i // 9}") for i, n in enumerate(num_conversations)]
    return DataSet(name, name, facts_of(entries), entries, **options)


def _world(seed: int, *, shared: bool) -> tuple[Data, TokenModel]:
    """Three data sets: clips with up to 8 conversations and two different system turns, text alone, and a mixture of
    both; some conversations and clips cannot be used."""
    rng = np.random.default_rng(seed)
    data, lengths = [], []
    for name, repeat, share_of_clips in (("clips", 1, 1.0), ("text", 2.5, 0.0), ("mixed", 0.5, 0.5)):
        counts = rng.integers(0, 9, 60).tolist()
        data.append(_folder(name, counts, repeat=repeat))
        shown = np.repeat(rng.random(60) < share_of_clips, counts)
        group = rng.integers(0, 2, len(shown))
        prefix = np.where(shown, np.repeat(rng.integers(50, 300, 60), counts) + 7 * group, 0)
        branch = rng.integers(5, 120, len(shown))
        usable = (rng.random(len(shown)) < 0.9) & np.repeat(rng.random(60) < 0.9, counts)
        lengths.append(Lengths(prefix * usable, branch * usable, group, rng.random(60) * 1e4))
    return tuple(data), TokenModel(tuple(lengths), shared, dummy=11, linear=100.0, pair=0.5, tokenizer="t")


def _sequences(data: Data, model: TokenModel, unit: Unit) -> list[tuple[int, list[int]]]:
    """The sequences of a unit as (prefix, branches), one conversation after the other."""
    lengths, first = model.lengths[unit.dataset], data[unit.dataset].facts.bounds[unit.clip]
    sequences: list[tuple[int, list[int]]] = []
    last = None
    for number in unit.conversations:
        prefix, branch = int(lengths.prefix[first + number]), int(lengths.branch[first + number])
        if prefix + branch == 0:
            continue
        group = lengths.group[first + number] if model.shared_prefix and prefix else None
        if group is not None and group == last:
            sequences[-1][1].append(branch)
        else:
            sequences.append((prefix, [branch]))
        last = group
    return sequences


def _expected(data: Data, model: TokenModel, pack: tuple[Unit, ...]) -> tuple[int, float]:
    """Tokens and cost of a pack, by the definition."""
    tokens, cost, seen = 0, 0.0, False
    for unit in pack:
        sequences = _sequences(data, model, unit)
        for prefix, branches in sequences:
            tokens += prefix + sum(branches)
            cost += model.pair * (prefix**2 / 2 + sum(b * prefix + b**2 / 2 for b in branches))
        if any(prefix for prefix, _ in sequences):
            seen = True
            cost += model.lengths[unit.dataset].vision[unit.clip]
    cost += model.linear * tokens
    return tokens + (0 if seen else model.dummy + (tokens == 0)), cost


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("seed", range(6))
def test_no_pack_is_too_long_and_everything_comes_as_often_as_asked(seed: int, shared: bool) -> None:
    data, model = _world(seed, shared=shared)
    plan = make_plan(data, _options(), seed, model)
    for number in range(plan.num_packs):
        tokens, cost = _expected(data, model, plan.pack(number))
        assert plan.tokens is not None
        assert plan.costs is not None
        assert plan.tokens[number] == tokens <= 500
        assert plan.costs[number] == pytest.approx(cost)

    def conversations(plan: Plan) -> Counter[tuple[int, int, int]]:
        return Counter((u.dataset, u.clip, i) for u in plan.units() for i in u.conversations)

    # The same clips as in packs of three, which know nothing of tokens.
    same = _options(tokens_per_pack=None, clips_per_pack=3)
    assert conversations(plan) == conversations(make_plan(data, same, seed))
    pieces = Counter((unit.dataset, unit.clip) for unit in plan.units())
    whole = Counter((unit.dataset, unit.clip) for unit in make_plan(data, same, seed).units())
    assert pieces - whole, "some clips are divided"
    for unit in plan.units():
        if pieces[unit.dataset, unit.clip] == 1 and unit.conversations:
            assert _expected(data, model, (unit,))[0] <= 500


def test_a_clip_is_divided_only_when_it_does_not_fit_and_as_little_as_possible() -> None:
    data = (_folder("x", [6, 3, 1]),)
    lengths = Lengths(np.full(10, 100), np.array([100] * 6 + [130] * 3 + [400]), np.zeros(10, int), np.zeros(3))
    model = TokenModel((lengths,), True, 11, 1.0, 1.0, "t")
    units = sorted(make_plan(data, _options(), 0, model).units())
    assert units == [Unit(0, 0, (0, 1, 2, 3)), Unit(0, 0, (4, 5)), Unit(0, 1, (0, 1, 2)), Unit(0, 2, (0,))]
    units = sorted(make_plan(data, _options(), 0, replace(model, shared_prefix=False)).units())
    assert units == [
        *(Unit(0, 0, (i, i + 1)) for i in (0, 2, 4)),
        *(Unit(0, 1, pair) for pair in ((0, 1), (2,))),
        Unit(0, 2, (0,)),
    ]


def test_a_conversation_longer_than_a_pack_is_named() -> None:
    data = (_folder("x", [2, 2]), _folder("y", [1, 2]))
    x = Lengths(np.full(4, 100), np.full(4, 20), np.zeros(4, int), np.zeros(2))
    y = Lengths(np.array([300, 300, 300]), np.array([200, 199, 260]), np.zeros(3, int), np.zeros(2))
    with pytest.raises(PlanError) as caught:
        make_plan(data, _options(tokens_per_pack=499), 0, TokenModel((x, y), True, 11, 1.0, 1.0, "t"))
    assert str(caught.value) == (
        "y: y1#1 has 560 tokens, 300 of them up to the end of its clip; data.tokens_per_pack is 499, and 1 other "
        "conversations are longer as well. Raise it to 560, or lower data.max_pixels or data.num_frames"
    )
    for epoch in range(4):  # whatever is drawn: a run must not find it after days
        options = _options(tokens_per_pack=519, max_conversations=1)
        with pytest.raises(PlanError, match=r"y: y1#1 has 560 tokens"):
            make_plan(data, options, epoch, TokenModel((x, y), True, 11, 1.0, 1.0, "t"))
    # Text alone stands beside the dummy clip.
    text = Lengths(np.zeros(1, int), np.array([495]), np.zeros(1, int), np.zeros(1))
    model = TokenModel((text,), True, 11, 1.0, 1.0, "t")
    with pytest.raises(PlanError, match=r"z0#0 has 506 tokens, 0 of them up to the end of its clip"):
        make_plan((_folder("z", [1]),), _options(), 0, model)
    assert make_plan((_folder("z", [1]),), _options(tokens_per_pack=506), 0, model).num_packs == 1


def test_first_fit_decreasing_is_what_its_name_says() -> None:
    rng = np.random.default_rng(0)
    sizes, alone = rng.integers(0, 400, PACK_WINDOW * 2 + 300), rng.integers(0, 2, PACK_WINDOW * 2 + 300) * 50
    packs = first_fit(sizes, alone, 500)
    expected, count = np.empty_like(packs), 0
    for start in range(0, len(sizes), PACK_WINDOW):
        window = range(start, min(start + PACK_WINDOW, len(sizes)))
        space: list[int] = []
        for unit in sorted(window, key=lambda i: -sizes[i]):
            fits = [i for i, left in enumerate(space) if left >= sizes[unit]] + [len(space)]
            space += [500] * (fits[0] == len(space))
            space[fits[0]] -= sizes[unit] + (alone[unit] if space[fits[0]] == 500 else 0)
            expected[unit] = count + fits[0]
        count += len(space)
    assert packs.tolist() == expected.tolist()
    assert first_fit(np.empty(0, int), np.empty(0, int), 500).tolist() == []


def _log_normal(count: int) -> tuple[Data, TokenModel]:
    """Clips of log-normal lengths with two questions each, and costs of the size of a 7B model's."""
    rng = np.random.default_rng(0)
    clip = np.minimum(rng.lognormal(6.8, 0.7, count), 7000).astype(int)
    entries = [Entry("k", {}, 8, 8, 2, 1, (FACTS, FACTS), "s")] * count
    lengths = Lengths(
        np.repeat(clip, 2), rng.integers(20, 60, 2 * count), np.zeros(2 * count, int), clip * 1.2e10 * (1 + clip / 8192)
    )
    return (DataSet("x", "x", facts_of(entries), entries),), TokenModel((lengths,), True, 3, 1.3e10, 4e5, "t")


def test_packs_are_full_and_ranks_balanced_on_200_000_log_normal_lengths() -> None:
    data, model = _log_normal(200_000)
    plan = make_plan(data, _options(tokens_per_pack=8192, packs_per_step=32), 0, model)
    assert plan.tokens is not None
    assert plan.costs is not None
    assert plan.tokens.max() <= 8192
    assert plan.tokens.mean() / 8192 >= 0.985
    assert len(np.unique(plan.clips[:, 1])) == len(plan.clips) == 200_000
    balance = {world: plan.balance(world).mean() for world in (2, 4, 8, 16, 32)}
    assert all(1 <= mean <= 1.03 for mean in balance.values()), balance
    # Among packs in any order a rank waits far longer, although all are full.
    shuffled = replace(plan, costs=np.random.default_rng(0).permutation(plan.costs))
    assert shuffled.balance(32).mean() > 1.06 > balance[32] + 0.03
    # Balance is no order by cost: costly and cheap steps are mixed.
    steps = plan.costs[: plan.num_packs // 32 * 32].reshape(-1, 32)
    assert abs(np.corrcoef(np.arange(len(steps)), steps.mean(1))[0, 1]) < 0.1
    assert abs(np.corrcoef(steps.mean(1)[1:], steps.mean(1)[:-1])[0, 1]) < 0.2


@pytest.mark.parametrize("world", [1, 2, 3, 5, 7, 8])
def test_ranks_differ_by_less_than_the_packs_of_a_step(world: int) -> None:
    data, model = _log_normal(3000)
    plan = make_plan(data, _options(tokens_per_pack=8192, packs_per_step=8 * world), 1, model)
    assert plan.costs is not None
    for start in range(0, plan.num_packs - 8 * world + 1, 8 * world):
        costs = plan.costs[start : start + 8 * world]
        sums = [costs[rank::world].sum() for rank in range(world)]
        assert max(sums) - min(sums) <= costs.max() - costs.min() + 1e-6 * costs.max()


def test_the_short_step_is_the_last() -> None:
    data, model = _log_normal(3001)
    for epoch in range(3):
        plan = make_plan(data, _options(tokens_per_pack=8192, packs_per_step=30), epoch, model)
        assert [len(plan.step(i)) for i in range(plan.num_steps)] == [
            *[30] * (plan.num_steps - 1),
            (plan.num_packs - 1) % 30 + 1,
        ]
        # All lie in one window: no step mixes the packs of two.
        assert plan.costs is not None
        steps = sorted((plan.costs[i : i + 30] for i in range(0, plan.num_packs, 30)), key=max)
        assert all(cheap.max() <= costly.min() for cheap, costly in itertools.pairwise(steps))


def test_a_mixture_in_packs_is_one_stream_for_any_number_of_ranks_and_stops() -> None:
    data, model = _world(0, shared=True)
    options = _options(packs_per_step=5, max_conversations=4, shuffle_shards=3)
    plans = [make_plan(data, options, epoch, model) for epoch in range(4)]
    assert len({plan.num_packs for plan in plans}) > 1, "epochs differ in length"
    whole = [pack for plan in plans for pack in (plan.pack(i) for i in range(plan.num_packs))]
    rng, worlds = np.random.default_rng(1), itertools.cycle([1, 2, 4, 3])
    stream: list[Any] = []
    epoch, step = 0, 0
    while epoch < 4:
        plan, world = make_plan(data, options, epoch, model), next(worlds)
        stop = min(plan.num_steps, step + int(rng.integers(1, 9)))
        for number in range(step, stop):
            ranks = [plan.rank_packs(number, rank, world) for rank in range(world)]
            stream += [pack for turn in zip(*ranks, strict=True) for pack in turn if pack is not None]
        epoch, step = (epoch + 1, 0) if stop == plan.num_steps else (epoch, stop)
    assert stream == whole


def test_a_changed_tokenizer_or_number_of_tokens_is_named() -> None:
    data, model = _world(0, shared=True)
    plan = make_plan(data, _options(), 0, model)
    state = PlanState(2, 0, 2, plan.digest, plan.identity)
    state.check(make_plan(data, _options(), 0, model))
    longer = replace(model.lengths[1], branch=model.lengths[1].branch + (model.lengths[1].branch > 0))
    changes = {
        r"the tokenizer, its chat template or the model family is another\.": replace(model, tokenizer="u"),
        r"data.train\[1\] has other numbers of tokens \(data.num_frames, fps, or a limit of pixels\?\)\.": replace(
            model, lengths=(model.lengths[0], longer, model.lengths[2])
        ),
        r"shared_prefix was True, is False\.": replace(model, shared_prefix=False),
        r"cost per token and pair was \[100.0, 0.5\], is \[100.0, 1.0\]\.": replace(model, pair=1.0),
    }
    for message, other in changes.items():
        with pytest.raises(PlanError) as caught:
            state.check(make_plan(data, _options(), 0, other))
        assert re.search(rf"this run has plan \w{{12}}: {message}", str(caught.value))
