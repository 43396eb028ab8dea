"""Promise: a stock folder can be made of any checkpoint, a shard at a time, equal to what the end of a run leaves."""

import errno
import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import TINY, run
from safetensors.torch import load_file
from tiny import contents, family_config, make_data, tiny_config
from transformers import AutoModelForImageTextToText

from swim.train import consolidate as module
from swim.train import weights
from swim.train.checkpoint import CheckpointError
from swim.train.consolidate import consolidate
from swim.train.system import build_system
from swim.train.weights import save_model, stock_description, write_shard
from swim.train.world import World


def test_a_checkpoint_gives_the_bytes_of_the_final_model(tmp_path, monkeypatch):
    """Two ZeRO-3 ranks, a base that is loaded, bfloat16, a frozen tower (adapters: test_lora.py)."""
    shards = make_data(tmp_path / "clips", clips=4)
    system = build_system(family_config(shards.folder, "qwen2_5_vl"))
    system.build_model().save_pretrained(tmp_path / "base")
    system.tokenizer.save_pretrained(tmp_path / "base")
    (tmp_path / "base" / "preprocessor_config.json").write_text("{}")
    source = [f"model.path={tmp_path / 'base'}", "model.config=null", "model.tokenizer=null"]
    command = [*TINY, f"data.train=[{shards.folder}]", "run.name=run", "run.steps=3", "system.layers=[0, 2]"]
    options = ["launch.ranks=2", "optim.lr=1e-2", "model.freeze=['visual']", "model.dtype=bfloat16"]
    run([*command, *source, *options], cwd=tmp_path)
    monkeypatch.chdir(tmp_path)
    checkpoint, model = (tmp_path / "runs" / "run" / name for name in ("checkpoints/last", "model"))
    consolidate(checkpoint, tmp_path / "whole")
    assert contents(tmp_path / "whole") == contents(model)
    assert "preprocessor_config.json" in contents(model)

    most, written = 100_000, []
    write = module.write_shard
    monkeypatch.setattr(
        module,
        "write_shard",
        lambda path, tensors: (written.append(sum(map(size, tensors.values()))), write(path, tensors)),
    )
    consolidate(checkpoint, tmp_path / "sharded", max_shard_bytes=most)
    largest = max(map(size, load_file(model / "model.safetensors").values()))
    assert len(written) > 3
    assert max(written) <= max(most, largest)
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == load_file(model / "model.safetensors").keys()
    one, many = (AutoModelForImageTextToText.from_pretrained(tmp_path / name) for name in ("whole", "sharded"))
    assert one.dtype == many.dtype
    theirs = many.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in one.state_dict().items())

    with pytest.raises(CheckpointError, match="exists already"):
        consolidate(checkpoint, tmp_path / "whole")
    victim = next(checkpoint.glob("*rank_1*optim_states.pt"))
    victim.write_bytes(victim.read_bytes()[:-1])
    with pytest.raises(CheckpointError, match=f"{victim.name} is not what was written"):
        consolidate(checkpoint, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


@pytest.mark.parametrize("model_type", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "internvl"])
@pytest.mark.parametrize("loaded", [False, True])
def test_names_and_configs_are_those_of_save_pretrained(tmp_path, model_type, loaded):
    data = make_data(tmp_path / "clips", clips=1).folder
    system = build_system(family_config(data, model_type))
    model = system.build_model()
    if loaded:
        model.save_pretrained(tmp_path / "base")
        model = AutoModelForImageTextToText.from_pretrained(tmp_path / "base")
    stock = stock_description(model)
    model.save_pretrained(tmp_path / "model")
    saved, own = load_file(tmp_path / "model" / "model.safetensors"), dict(model.named_parameters())
    buffers = {name for name in saved if name not in stock["names"]}
    assert not buffers
    assert all(torch.equal(saved[name], own[stock["names"][name]]) for name in saved)
    for name, text in stock["files"].items():
        assert (tmp_path / "model" / name).read_text() == text


def test_a_model_that_cannot_be_written_is_an_error_on_all_ranks_and_the_old_one_stays(tmp_path, monkeypatch):
    system = build_system(tiny_config(tmp_path))
    engine, world = SimpleNamespace(module=system.build_model()), World(0, 1, torch.device("cpu"))
    save_model(engine, tmp_path / "model", system.tokenizer, None, world)
    before = contents(tmp_path / "model")
    written = []

    def write(path: Path, tensors: dict[str, torch.Tensor]) -> None:
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_shard(path, tensors)

    monkeypatch.setattr(weights, "write_shard", write)
    with pytest.raises(CheckpointError, match=r"could not be written: OSError: .* No space left on device"):
        save_model(engine, tmp_path / "model", system.tokenizer, None, world, max_shard_bytes=100_000)
    assert len(written) == 2
    assert contents(tmp_path / "model") == before
