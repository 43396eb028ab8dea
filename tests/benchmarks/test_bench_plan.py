"""Measures the plan of an epoch of 1 000 000 clips: made, saved, loaded, and how full and balanced it is. `make bench`
prints it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from swim.data_tools.mixture import DataSet, PlanOptions
from swim.data_tools.packing import Lengths, TokenModel
from swim.data_tools.plan import load_plan, make_plan
from swim.data_tools.shards import ConversationFacts, Entry

pytestmark = pytest.mark.bench
CLIPS, BUDGET, PACKS, RANKS = 1_000_000, 8192, 32, 8

_T = TypeVar("_T")


def timed(what: str, work: Callable[[], _T]) -> _T:
    began = time.perf_counter()
    result = work()
    print(f"{what:42} {time.perf_counter() - began:6.2f} s")
    return result


def test_the_plan_of_a_million_clips(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clip = np.minimum(rng.lognormal(6.8, 0.7, CLIPS), 7000).astype(int)
    facts = ConversationFacts("ask", None, 1, 1, 10)
    entries = [Entry("k", {}, 8, 8, 2, 1, (facts, facts), f"shard{i // 1000}") for i in range(CLIPS)]
    lengths = Lengths(
        np.repeat(clip, 2), rng.integers(20, 60, 2 * CLIPS), np.zeros(2 * CLIPS, int), clip * 1.2e10 * (1 + clip / 8192)
    )
    model = TokenModel((lengths,), True, 3, 1.3e10, 4e5, "t")
    print(f"\n{CLIPS:,} clips with two questions each, packs of {BUDGET} tokens, {PACKS} a step")
    by_tokens = PlanOptions(packs_per_step=PACKS, seed=0, tokens_per_pack=BUDGET)
    by_clips = PlanOptions(packs_per_step=PACKS, seed=0, clips_per_pack=1, max_conversations=1, shuffle_shards=16)
    for what, options in (
        ("first plan, token budget", by_tokens),
        ("first plan, clips, 16 shards at a time", by_clips),
    ):
        data = [DataSet("x", "x", entries)]  # facts are taken from the entries anew
        plan = timed(what, lambda: make_plan(data, options, 0, model))  # noqa: B023 - called at once
        timed("the next epoch's", lambda: make_plan(data, options, 1, model))  # noqa: B023
        timed("saved", lambda: plan.save(tmp_path / "plan.npz"))  # noqa: B023
        timed("loaded", lambda: load_plan(tmp_path / "plan.npz", options, 0, (plan.digest, plan.identity)))  # noqa: B023
        print(f"{'file':42} {(tmp_path / 'plan.npz').stat().st_size / 2**20:6.1f} MiB")
        if options.tokens_per_pack is not None:
            assert plan.tokens is not None
            print(f"{'fill':42} {plan.tokens.mean() / BUDGET:8.2%}")
            print(f"{f'costliest of {RANKS} ranks / mean':42} {plan.balance(RANKS).mean():8.3f}")
