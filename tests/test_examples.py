"""Promise: the examples do what their first lines say."""

import importlib.util
import math
from pathlib import Path

import pytest
from tiny import family_config, make_data
from transformers import TrainingArguments

import swim
from swim.train.system import Request, build_system

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
    plain = reentrant_example.train(reentrant=False, steps=30)
    attached = reentrant_example.train(reentrant=True, attach=True, steps=30)
    assert all(gradient > 1e-2 for _, gradient in plain)
    for (loss, gradient), (other_loss, other_gradient) in zip(plain, attached, strict=True):
        assert math.isclose(loss, other_loss, rel_tol=1e-3)
        assert math.isclose(gradient, other_gradient, rel_tol=1e-2)


@pytest.mark.slow
def test_the_stock_trainer_binds_nouns(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    assert sum(1 for _ in (EXAMPLES / "hf_trainer.py").open()) < 80
    assert load("hf_trainer").main(steps=160, clips=300) >= 0.9


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "internvl"])
def test_the_stock_trainer_divides_by_the_accumulation_steps(tmp_path, model_type):
    """For models that take **kwargs, Trainer would leave the division to them, and the gradient grow with the steps."""
    example, shards, norms = load("hf_trainer"), make_data(tmp_path / "clips", clips=4), []
    data = [Request(shards.read(clip), (0, 2, 4)) for clip in range(4)]
    for steps in (1, 4):
        system = build_system(family_config(shards.folder, model_type))
        model = system.build_model()
        swim.register_capture(model)
        sizes = {"per_device_train_batch_size": 4 // steps, "gradient_accumulation_steps": steps, "max_steps": 1}
        plain = {"remove_unused_columns": False, "report_to": [], "save_strategy": "no", "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path / "out"), logging_steps=1, max_grad_norm=1e9, **sizes, **plain)
        trainer = example.SupervisedTrainer(model, arguments, example.collator(model, system.collator), data)
        trainer.train()
        norms.append(float(trainer.state.log_history[0]["grad_norm"]))
    # Means of four batches and the mean of one differ a little (nouns per batch), not by a factor of four.
    assert norms[1] == pytest.approx(norms[0], rel=0.3)
