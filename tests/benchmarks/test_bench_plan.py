"""Measures the plan of an epoch of 1 000 000 clips: made, saved, loaded, and how full and balanced it is. `make bench`
prints it."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest

from swim.data_tools.facts import facts_of
from swim.data_tools.mixture import DataSet, PlanOptions
from swim.data_tools.packing import Lengths, TokenModel
from swim.data_tools.plan import Plan, load_plan, make_plan, plan_identity
from swim.data_tools.shards import ConversationFacts, Entry, ShardSet

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
    data = [DataSet("x", "x", timed("\nfacts of parsed entries", lambda: facts_of(entries)), entries)]
    print(f"\n{CLIPS:,} clips with two questions each, packs of {BUDGET} tokens, {PACKS} a step")
    by_tokens = PlanOptions(packs_per_step=PACKS, seed=0, tokens_per_pack=BUDGET)
    by_clips = PlanOptions(packs_per_step=PACKS, seed=0, clips_per_pack=1, max_conversations=1, shuffle_shards=16)
    for what, options in (
        ("first plan, token budget", by_tokens),
        ("first plan, clips, 16 shards at a time", by_clips),
    ):
        plan = timed(what, lambda: make_plan(data, options, 0, model))  # noqa: B023 - called at once
        timed("the next epoch's", lambda: make_plan(data, options, 1, model))  # noqa: B023
        timed("saved", lambda: plan.save(tmp_path / "plan.npz"))  # noqa: B023
        timed("loaded", lambda: load_plan(tmp_path / "plan.npz", options, 0, (plan.digest, plan.identity)))  # noqa: B023
        print(f"{'file':42} {(tmp_path / 'plan.npz').stat().st_size / 2**20:6.1f} MiB")
        if options.tokens_per_pack is not None:
            assert plan.tokens is not None
            print(f"{'fill':42} {plan.tokens.mean() / BUDGET:8.2%}")
            print(f"{f'costliest of {RANKS} ranks / mean':42} {plan.balance(RANKS).mean():8.3f}")


def test_opening_a_million_clips_at_a_late_step(tmp_path: Path) -> None:
    """What a resumed run does before its first decode: index, plan and the packs of the step."""
    shard = tmp_path / "data" / "shard-000000.tar"
    shard.parent.mkdir()
    shard.write_bytes(bytes(10240))
    ask = {"task": "ask", "span": None, "num_mentions": 1, "num_mask_objects": 1, "num_chars": 100}
    members = {"json": [512, 3000, 12345678], "masks.json": [4096, 30000, 12345678], "mp4": [40000, 900000, 12345678]}
    facts = {"members": members, "height": 480, "width": 640, "num_frames": 60, "fps": 6.0, "conversations": [ask] * 2}
    line = json.dumps(facts, separators=(",", ":"))[1:]
    header = json.dumps({"version": 1, "shard": shard.name, "size": 10240}, separators=(",", ":"))
    with shard.with_suffix(".index.jsonl").open("w") as file:
        file.write(f"{header}\n")
        file.writelines(f'{{"key":"clip{i:08d}",{line}\n' for i in range(CLIPS))

    def opened() -> Plan:
        shards = ShardSet(shard.parent, cache=tmp_path / "facts")
        data = [DataSet("x", shards.digest, shards.facts, shards.entries)]
        options = PlanOptions(packs_per_step=20, seed=0, clips_per_pack=1)
        plan = load_plan(tmp_path / "plan.npz", options, 0, plan_identity(data, options, 0))
        if plan is None:
            plan = make_plan(data, options, 0)
            plan.save(tmp_path / "plan.npz")
        assert len(plan.rank_packs(49_000, 3, 8)) == 3
        return plan

    print(f"\n{CLIPS:,} clips, an index of {shard.with_suffix('.index.jsonl').stat().st_size / 2**20:.0f} MiB")
    timed("opened for the first time", opened)
    timed("opened again", opened)
    (tmp_path / "plan.npz").unlink()
    timed("opened without its plan", opened)
