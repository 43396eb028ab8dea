"""Promise: two ZeRO-3 processes compute what one plain torch loop does, whatever the ranks hold."""

import math
from pathlib import Path

import pytest
import torch
from mixed import EPSILON, arguments, from_base, make_mixed
from processes import TINY, metrics, run
from safetensors import safe_open
from tiny import largest_difference
from transformers import AutoModelForImageTextToText

from swim.train.config import load_config
from swim.train.loader import Loader, Order
from swim.train.loop import combine, learning_rate
from swim.train.system import Progress, build_system


@pytest.fixture(scope="module")
def mixed(tmp_path_factory) -> Path:
    return make_mixed(tmp_path_factory.mktemp("mixed"))


@pytest.mark.parametrize(
    ("base", "layout"),
    [
        ("base", ()),
        ("base", ("data.packed=true", "model.checkpointing=true")),
        pytest.param("qwen2_vl", ("system.layers=[0, 2]",), marks=pytest.mark.slow),
        pytest.param("qwen3_vl", ("system.layers=[0, 2]",), marks=pytest.mark.slow),
    ],
    ids=["shared", "packed-checkpointed", "qwen2_vl", "qwen3_vl"],
)
def test_two_ranks_equal_a_plain_torch_loop(mixed, tmp_path, base, layout):
    """The ranks share prefixes; the plain loop has one padded sequence for every conversation."""
    # Three packs on two ranks: rank 1 fills its second micro-batch with a dummy pack.
    options = arguments(
        mixed,
        "run.name=two",
        "run.steps=5",
        "data.packs_per_step=3",
        "run.seed=4",
        "optim.lr=2e-4",
        "system.gradient_every=0",
        *layout,
        f"model.path={mixed / base}",
    )
    run(options, cwd=tmp_path)

    config = load_config("tiny_cpu", [*options[2:], "data.shared_prefix=false", "data.packed=false"])
    order, system = Order(config), build_system(config)
    nouns_by_rank = [
        [sum(b.counts["mask"] for b in load_step(order, system, step, rank, 2)) for rank in (0, 1)] for step in range(4)
    ]
    assert any(0 in nouns and max(nouns) > 0 for nouns in nouns_by_rank), (
        f"one rank must be text-only once: {nouns_by_rank}"
    )
    assert any(0 < nouns[0] != nouns[1] > 0 for nouns in nouns_by_rank), f"uneven nouns must occur: {nouns_by_rank}"

    model = system.build_model().train()
    optimizer = torch.optim.AdamW(system.param_groups(model), lr=config.optim.lr, betas=config.optim.betas, eps=EPSILON)
    for step, line in enumerate(metrics(tmp_path / "runs" / "two")):
        batches = load_step(order, system, step, 0, 1)
        counts = {name: sum(batch.counts[name] for batch in batches) for name in batches[0].counts}
        sums = dict.fromkeys(("text", "mask"), 0.0)
        for batch in batches:
            loss = system.loss(model, batch, Progress(step, 5))
            combine(loss, counts).backward()
            for name, term in loss.items():
                sums[name] += float(term.sum.detach())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step)
        optimizer.step()
        optimizer.zero_grad()
        for name in sums:
            assert line[f"loss/{name}"] == pytest.approx(sums[name] / max(counts[name], 1), abs=2e-5)
        assert line["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        assert line["count/mask"] == counts["mask"]
    files = [folder / "model.safetensors" for folder in (mixed / base, tmp_path / "runs" / "two" / "model")]
    with safe_open(files[0], "pt") as before, safe_open(files[1], "pt") as saved:
        assert before.keys() == saved.keys(), "the names of the base's own file"
    trained = parameters(stock(tmp_path / "runs" / "two" / "model"))
    assert largest_difference(parameters(model), trained) < 1e-5
    assert largest_difference(parameters(stock(mixed / base)), trained) > 5e-4, "training must move the weights"


@pytest.mark.slow
def test_one_to_four_ranks_train_alike(mixed, tmp_path):
    """Real runs with a token budget and a mixture: five packs a step, dealt out unevenly."""
    shares = f"data.train=[{mixed / 'clips'}, {{path: {mixed / 'text'}, repeat: 1.5}}]"
    budget = ["data.clips_per_pack=null", "data.tokens_per_pack=420", "data.packed=true", "data.packs_per_step=5"]
    options = arguments(mixed, shares, *budget, "run.steps=3", "run.seed=4", "optim.lr=2e-4")
    for ranks in range(1, 5):
        run([*options, f"run.name=ranks{ranks}", f"launch.ranks={ranks}"], cwd=tmp_path, timeout_s=400)
    one, *others = (tmp_path / "runs" / f"ranks{ranks}" for ranks in range(1, 5))
    for other in others:
        for a, b in zip(metrics(one), metrics(other), strict=True):
            assert {k: v for k, v in a.items() if k.startswith("count/")} | {"count/tokens": 0} == {
                k: v for k, v in b.items() if k.startswith("count/")
            } | {"count/tokens": 0}, "but for the tokens of dummy packs"
            for name in ("loss/text", "loss/mask", "grad_norm"):
                assert b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6)
        trained = [parameters(stock(folder / "model")) for folder in (one, other)]
        assert largest_difference(*trained) < 1e-6
    assert largest_difference(parameters(stock(mixed / "base")), trained[0]) > 1e-4, "training must move the weights"


def stock(folder: Path) -> torch.nn.Module:
    """The model as any user of transformers loads it; nothing may be missing or unexpected."""
    model, info = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


def parameters(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def load_step(order, system, step, rank, size):
    return next(Loader(order, system.collator, rank=rank, size=size).steps(step, step + 1))


def test_the_mask_loss_alone_trains_every_supervised_layer_under_zero3_and_checkpointing(mixed, tmp_path):
    only_mask = [
        "system.text_weight=0",
        "system.gradient_every=1",
        "model.checkpointing=true",
        "data.tasks=[direction]",
    ]
    options = [
        *TINY,
        f"data.train=[{mixed / 'clips'}]",
        f"deepspeed={mixed / 'engine.json'}",
        *from_base(mixed),
        *only_mask,
    ]
    run([*options, "run.name=mask", "run.steps=3", "data.packs_per_step=2"], cwd=tmp_path)
    for line in metrics(tmp_path / "runs" / "mask"):
        for name in ("q1", "k1", "q3", "k3"):
            assert line[f"mask_grad/{name}"] > 0
        assert line["grad_norm"] > 0
        assert math.isfinite(line["loss/mask"])
    before, after = parameters(stock(mixed / "base")), parameters(stock(tmp_path / "runs" / "mask" / "model"))
    for layer in (1, 3):
        for side in "qk":
            name = f"model.language_model.layers.{layer}.self_attn.{side}_proj.weight"
            assert (before[name] - after[name]).abs().max() > 1e-5
    # Nothing flows from the maps to what lies above them: the head moves only by the text loss.
    assert torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_order_does_not_depend_on_the_number_of_ranks(mixed):
    config = load_config("tiny_cpu", [*arguments(mixed, "data.packs_per_step=5")[2:]])
    order = Order(config)
    for step in range(3):
        alone = order.packs(step, 0, 1)
        for size in (2, 3, 8):
            ranks = [order.packs(step, rank, size) for rank in range(size)]
            assert len({len(packs) for packs in ranks}) == 1
            interleaved = [packs[i] for i in range(len(ranks[0])) for packs in ranks]
            assert [pack for pack in interleaved if pack is not None] == [pack for pack in alone if pack is not None]
