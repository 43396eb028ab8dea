"""Promise: liger's kernels stand in the text model of one model, compute what its own modules do, and leave attention,
capture and every other model alone."""

import importlib.util
from types import MethodType, SimpleNamespace

import pytest
import torch
from interpreter import interpreted, needs_triton, not_interpreted, run_interpreted
from tiny import family_config, gradients, largest_difference, make_batch, make_data

from swim.train.attention import Capture
from swim.train.config import ConfigError
from swim.train.families import FAMILIES
from swim.train.liger import apply_liger, wants_liger
from swim.train.loop import combine
from swim.train.system import Progress, build_system

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"), clips=2)


def build(shards, family, *options):
    system = build_system(family_config(shards.folder, family, *options))
    return system, system.build_model().train()


def replaced(model) -> set[str]:
    """Modules whose own forward pass has another in its place."""
    return {name for name, module in model.named_modules() if isinstance(vars(module).get("forward"), MethodType)}


@not_interpreted
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("lora", [(), ("model.lora={rank: 2}",)], ids=["whole", "lora"])
def test_norms_and_mlps_of_the_text_model_are_replaced_and_nothing_else(shards, family, lora):
    _, model = build(shards, family, *lora)
    plain = getattr(model, "get_base_model", lambda: model)()
    names, text = [name for name, _ in model.named_parameters()], plain.get_decoder()
    apply_liger(plain)
    layers = [f"layers.{i}." for i in range(3)]
    want = {"norm", *(f"{x}{part}" for x in layers for part in ("input_layernorm", "post_attention_layernorm", "mlp"))}
    if family == "qwen3_vl":
        want |= {f"{x}self_attn.{side}_norm" for x in layers for side in "qk"}
    prefix = next(name for name, module in plain.named_modules() if module is text)
    assert replaced(plain) == {f"{prefix}.{name}" for name in want}
    assert [name for name, _ in model.named_parameters()] == names, "a stock model is saved"
    assert plain.config.get_text_config()._attn_implementation == "swim_sdpa"
    _, later = build(shards, family)
    assert not replaced(later), "models made later are stock"


@not_interpreted
def test_a_model_without_such_modules_is_an_error():
    model = torch.nn.Linear(2, 2)
    model.config = SimpleNamespace(hidden_act="gelu")
    model.get_decoder = lambda: model
    with pytest.raises(ConfigError, match="no RMSNorm and no gated SiLU MLP in Linear's text model"):
        apply_liger(model)


@not_interpreted
def test_without_a_gpu_true_is_an_error_and_auto_is_off(shards, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"model.liger is true: it needs a GPU"):
        build(shards, "qwen2_vl", "model.liger=true")
    _, model = build(shards, "qwen2_vl", "model.liger=auto")
    assert not replaced(model)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert [wants_liger(choice) for choice in ("auto", True, False)] == [True, True, False]
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert wants_liger("auto") is False
    with pytest.raises(ConfigError, match=r"liger-kernel: pip install 'swim-train\[gpu\]'"):
        wants_liger(True)


def assert_same_training(shards, family: str, device: str, tolerance: float) -> None:
    """Loss, maps and gradients with and without the kernels."""
    found = []
    for liger in (False, True):
        system, model = build(shards, family, "model.checkpointing=2", "data.shared_prefix=true")
        if liger:
            apply_liger(model)
        model, batch = model.to(device), make_batch(system, shards, [0]).to(device)
        capture = Capture(batch.table, system.layers, layout=batch.layout, detach=True)
        with torch.no_grad():
            model(**batch.inputs, use_cache=False, capture=capture)
        loss = combine(system.loss(model, batch, Progress(1, 10)), batch.counts)
        loss.backward()
        found.append({"loss": loss.detach(), **gradients(model)} | {str(k): v for k, v in capture.maps().items()})
    assert any(grad.abs().max() > 1e-3 for name, grad in found[0].items() if "q_proj" in name)
    assert largest_difference(*found) < tolerance


@pytest.mark.gpu
@not_interpreted
@pytest.mark.parametrize("family", FAMILIES)
def test_training_is_the_same_on_a_gpu(shards, family):
    assert_same_training(shards, family, "cuda", 1e-4)


@needs_triton
@not_interpreted
@pytest.mark.slow
def test_training_is_the_same_in_the_interpreter():
    run_interpreted(__file__, least=2)


@interpreted
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_interpreted_training_is_the_same(shards, family, monkeypatch):
    import triton.language
    from liger_kernel.ops import rms_norm

    # The interpreter has no CUDA library, and no number of processors, over which liger sums the weight's gradient.
    monkeypatch.setattr(rms_norm, "rsqrt", lambda x: 1 / triton.language.sqrt(x))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=2))
    assert_same_training(shards, family, "cpu", 1e-5)
