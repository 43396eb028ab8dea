"""Promise: adapters are supervised like weights, nothing else is trained, and the saved model is a stock one with them
merged."""

import json

import peft
import pytest
import torch
from processes import TINY, metrics, run
from safetensors.torch import load_file
from tiny import contents, gradients, largest_difference, make_batch, make_data, tiny_config
from transformers import AutoModelForImageTextToText

from swim.train.config import ConfigError
from swim.train.consolidate import consolidate
from swim.train.lora import lora_scales, merged, plain_name, sides
from swim.train.predict import load_run
from swim.train.system import Progress, build_system

LORA = "model.lora={rank: 4, alpha: 8}"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"))


def build(shards, *overrides):
    system = build_system(tiny_config(shards.folder, *overrides))
    return system, system.build_model().train()


def randomise(model):
    """Adapters start as zero updates; give them something to add."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_mask_loss_alone_reaches_the_adapters_of_every_supervised_layer(shards, checkpointing):
    system, model = build(shards, LORA, "system.text_weight=0", f"model.checkpointing={checkpointing}")
    randomise(model)
    system.loss(model, make_batch(system, shards, [0]), Progress(0, 10))["mask"].sum.backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in name and "language_model" in name for name in trained)
    assert len(trained) == 4 * 7 * 2
    grads = gradients(model)
    for layer in (1, 3):
        for side in "qk":
            for factor in "AB":
                name = f"layers.{layer}.self_attn.{side}_proj.lora_{factor}.default.weight"
                assert any(name in key and grad.norm() > 0 for key, grad in grads.items()), name


def test_merged_weights_give_the_adapters_output(shards):
    system, model = build(shards, LORA)
    _, plain = build(shards)
    randomise(model)
    batch = make_batch(system, shards, [0, 1])
    state = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    plain_state = {plain_name(name): tensor for name, tensor in state.items() if ".lora_" not in name}
    for name, scale in lora_scales(model).items():
        plain_state[plain_name(name)] = merged(state[name], *(state[side] for side in sides(name)), scale)
    with torch.no_grad():
        want = model.eval()(**batch.inputs, use_cache=False).logits
        before = plain.eval()(**batch.inputs, use_cache=False).logits
        plain.load_state_dict(plain_state)
        got = plain(**batch.inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert (before - want).abs().max() > 0.1, "the adapters must change the output"
    theirs, ours = (dict(m.state_dict()) for m in (model.merge_and_unload(), plain))
    assert largest_difference(theirs, ours) < 1e-6


def test_a_run_with_adapters_leaves_a_stock_model_and_the_adapters(shards, tmp_path, monkeypatch):
    """Two ZeRO-3 ranks; a base that is loaded, whose own weights must come out as they went in."""
    base = tmp_path / "base"
    system, model = build(shards)
    model.save_pretrained(base)
    system.tokenizer.save_pretrained(base)
    source = [f"model.path={base}", "model.config=null", "model.tokenizer=null"]
    options = [f"data.train=[{shards.folder}]", "run.name=lora", "run.steps=4", "optim.lr=1e-2", LORA, *source]
    run([*TINY, *options], cwd=tmp_path)
    folder = tmp_path / "runs" / "lora"
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3, 4]
    assert all(line["mask_grad/q3"] > 0 for line in metrics(folder)[:1])
    merged = AutoModelForImageTextToText.from_pretrained(folder / "model").eval()
    adapter = folder / "model" / "adapter"
    assert json.loads((adapter / "adapter_config.json").read_text())["r"] == 4
    adapted = peft.PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(base), str(adapter)).eval()
    batch = make_batch(system, shards, [0])
    with torch.no_grad():
        want, got = (m(**batch.inputs, use_cache=False).logits for m in (adapted, merged))
        before = model.eval()(**batch.inputs, use_cache=False).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-5)
    assert (before - want).abs().max() > 1e-3, "training must move the output"
    old, new = load_file(base / "model.safetensors"), load_file(folder / "model" / "model.safetensors")
    assert old.keys() == new.keys()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {n for n in old if n.startswith("model.layers.") and n.endswith("_proj.weight")}
    assert load_run(folder).model.lora is None, "the trained model has no adapters left"
    monkeypatch.chdir(tmp_path)
    consolidate(folder / "checkpoints" / "last", tmp_path / "consolidated")
    assert contents(tmp_path / "consolidated") == contents(folder / "model")


def test_targets_that_match_nothing_are_an_error(shards):
    with pytest.raises(ConfigError, match=r"model.lora.targets: 'nothing'"):
        build(shards, "model.lora={targets: nothing}")


def test_freeze_patterns_reach_adapters(shards):
    _, model = build(shards, LORA, "model.freeze=['layers\\.0\\.']")
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert not any("layers.0." in name for name in trained)
