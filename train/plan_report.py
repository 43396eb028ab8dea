"""What an epoch of a recipe will be, without a model or a GPU: `swim data plan`."""

import numpy as np

from swim.train.config import Config
from swim.train.loader import Order
from swim.train.system import build_system


def plan_report(config: Config, world: int) -> str:
    """Steps, packs, fill, tokens, shares of the data sets and balance between `world` ranks, or between the groups of
    them that hold a micro-batch together, of the first epoch.

    Counts the tokens of text that was not counted yet, where training will find them.
    """
    if world % (sequence := config.parallel.sequence):
        raise ValueError(f"parallel.sequence: {world} ranks do not divide into groups of {sequence}; give --world-size")
    groups = world // sequence
    order = Order(config, build_system(config), counted=True)
    plan, data = order.plan(0), config.data
    if not plan.num_packs:
        raise ValueError("data.train: the first epoch has no clips; raise repeat")
    assert plan.tokens is not None
    size = data.packs_per_step
    steps = np.add.reduceat(plan.tokens, np.arange(0, plan.num_packs, size))
    micro_batches = order.micro_batches(groups)
    dummies = plan.num_steps * micro_batches * groups - plan.num_packs
    balance = plan.balance(groups)
    if data.tokens_per_pack is None:
        fill = f"{_spread(plan.tokens)} tokens"
    else:
        fill = f"{plan.tokens.mean() / data.tokens_per_pack:.2%} of {data.tokens_per_pack:,} tokens filled"
    epochs = config.run.steps / plan.num_steps
    lines = [
        f"steps     {plan.num_steps:,} an epoch; run.steps {config.run.steps:,}: {epochs:.2f} epochs",
        f"packs     {plan.num_packs:,}, {size} a step; {fill}",
        f"tokens    {plan.tokens.sum():,} an epoch; {_spread(steps)} a step",
        f"ranks     {world}, {micro_batches} micro-batches each a step; {dummies} dummy packs an epoch",
        "balance   "
        + (
            f"cost of the costliest rank / mean rank: {balance.mean():.3f} on average, {balance.max():.3f} at most"
            if len(balance)
            else f"no full step of {size} packs"
        ),
    ]
    units = np.bincount(plan.clips[:, 0], minlength=len(data.train))
    chosen = np.bincount(np.repeat(plan.clips[:, 0], np.diff(plan.unit_bounds)), minlength=len(data.train))
    for part, shards, repeat, own, conversations in zip(data.train, order.shards, order.repeats(), units, chosen):
        lines.append(
            f"{part.path}: {len(shards):,} clips x {repeat:.4g}: {own:,} in packs ({own / len(plan.clips):.1%}), "
            f"{conversations:,} conversations"
        )
    return "\n".join([*lines, f"digest    {plan.digest[:12]}"])


def _spread(values: np.ndarray) -> str:
    return f"{values.min():,} to {values.max():,}, on average {values.mean():,.0f}"
