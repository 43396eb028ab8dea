"""Promise: the examples do what their first lines say."""

import importlib.util
import math
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def load(name: str):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def reentrant_example():
    return load("reentrant_gradient_loss")


def test_under_reentrant_checkpointing_the_attention_loss_falls_with_a_gradient_of_zero(reentrant_example):
    log = reentrant_example.train(reentrant=True)
    assert log[0][0] > 1.5
    assert log[-1][0] < 0.2, "the loss looks alive"
    assert all(gradient == 0 for _, gradient in log), "and trains nothing"


def test_both_ways_out_give_the_same_gradient(reentrant_example):
    plain, attached = (
        reentrant_example.train(reentrant=False, steps=30),
        reentrant_example.train(reentrant=True, attach=True, steps=30),
    )
    assert all(gradient > 1e-2 for _, gradient in plain)
    for (loss, gradient), (other_loss, other_gradient) in zip(plain, attached, strict=True):
        assert math.isclose(loss, other_loss, rel_tol=1e-3)
        assert math.isclose(gradient, other_gradient, rel_tol=1e-2)


def test_the_stock_trainer_binds_nouns(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sum(1 for _ in (EXAMPLES / "hf_trainer.py").open()) < 80
    log, pointing = load("hf_trainer").main(steps=160, clips=300)
    losses = [line["loss"] for line in log if "loss" in line]
    assert float(losses[-1]) < 0.5 * float(losses[0])
    assert pointing >= 0.9
