"""Promise: DeepSpeed accepts every file of ds_configs/, and what they ask for trains, is guarded and resumes as plain
ZeRO-3 does; what cannot is refused before the first step."""

import json

import pytest
import torch
from checkpoint_ranks import PROFILES, train_profiles
from processes import ROOT

from swim.train.__main__ import free_port
from swim.train.config import ConfigError, load_config
from swim.train.engine import engine_config
from swim.train.estimate import check_engine_config
from swim.train.profiles import check_device, check_profile

FILES = sorted((ROOT / "ds_configs").glob("*.json"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_deepspeed_accepts_a_file_whose_batch_sizes_are_computed(path):
    text = path.read_text()
    assert "auto" not in text
    assert not {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"} & {
        *json.loads(text)
    }
    config = load_config("swim_7b", [f"deepspeed={path.stem}"])
    for ranks in (1, 4, 8, 64):
        check_engine_config(config, 3, ranks)
        assert engine_config(config, 3, ranks)["train_batch_size"] == 3 * ranks


@pytest.mark.parametrize(
    ("zero", "message"),
    [
        ({"stage": 0}, "stage is 0; checkpoints need 1, 2 or 3"),
        ({"reduce_bucket_size": "auto"}, "zero_optimization.reduce_bucket_size is 'auto'"),
        ({"zero_quantized_gradients": True}, "so no guard sees them; remove it"),
        ({"zero_quantized_nontrainable_weights": True}, "frozen weights in eight bits; remove it"),
        ({"mics_shard_size": 2}, "mics_shard_size is 2"),
        ({"stage": 1, "elastic_checkpoint": True}, "elastic_checkpoint is True"),
        ({"zenflow": {"topk_ratio": 0.1}}, "optimizer state that checkpoints do not hold"),
        ({"offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}, "offload_optimizer.device is nvme"),
        ({"offload_param": {"device": "nvme", "nvme_path": "/x"}}, "offload_param.device is nvme"),
        ({"offload_optimizer": {"device": "cpu", "ratio": 0.5}}, "super_offload and ratio"),
        ({"stage": 2, "zero_hpz_partition_size": 8}, "zero_hpz_partition_size 8 belongs to stage 3, not 2"),
        ({"zero_hpz_partition_size": 8}, "zero_hpz_partition_size 8 does not divide 12 ranks"),
    ],
)
def test_what_cannot_be_saved_or_guarded_is_refused_at_start(tmp_path, zero, message):
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3, **zero}}))
    with pytest.raises(ConfigError, match=rf"^deepspeed: .*mine.json: .*{message}"):
        engine_config(load_config("tiny_cpu", [f"deepspeed={path}"]), 1, 12)


@pytest.mark.parametrize("other", [{"optimizer": {"type": "OneBitAdam"}}, {"fp16": {"enabled": True}}])
def test_other_optimizers_and_fp16_are_refused(other):
    with pytest.raises(ConfigError, match=r"OneBitAdam|fp16"):
        check_profile({"zero_optimization": {"stage": 3}, **other}, "mine", ranks=1)


def test_quantized_weights_need_a_gpu():
    fields = json.loads((ROOT / "ds_configs" / "zero3_zeropp.json").read_text())
    check_device(fields, "zero3_zeropp", cuda=True)
    with pytest.raises(ConfigError, match=r"zero3_zeropp: .*needs DeepSpeed's CUDA quantizer"):
        check_device(fields, "zero3_zeropp", cuda=False)


def ranks(folder, names: list[str]) -> dict[str, dict]:
    """What four ranks, two pairs under hpZ, note of each profile."""
    context = torch.multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["checkpoint_ranks"])
    port = free_port()
    started = [context.Process(target=train_profiles, args=(rank, 4, port, folder, names)) for rank in range(4)]
    for process in started:
        process.start()
    for process in started:
        process.join(200)
        assert process.exitcode == 0
    return {name: torch.load(folder / f"{name}.pt") for name in names}


def check(found: dict[str, dict], name: str, tolerance: float) -> None:
    one, plain = found[name], found["zero3"]
    assert not one["applied"]
    for state in ("refused", "loaded"):
        assert all(torch.equal(one[state][key], one["before"][key]) for key in one["before"]), state
    assert one["losses"] == pytest.approx(plain["losses"], abs=tolerance)
    # DeepSpeed's own Adam multiplies its bias corrections up step by step, and takes a power after a load.
    bits = 1e-6 if name == "offload_compiled" else 0
    assert one["again"] == pytest.approx(one["losses"][3:], abs=bits), "frozen weights of another base notwithstanding"
    if name != "zero3":
        assert one["from zero3"] == pytest.approx(plain["again"], abs=tolerance), "what plain ZeRO-3 saved loads too"


@pytest.fixture(scope="module")
def profiles(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("profiles"), [name for name in PROFILES if name != "offload_compiled"])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in PROFILES if name != "offload_compiled"])
def test_a_profile_trains_is_refused_and_resumes_as_plain_zero3(profiles, name):
    check(profiles, name, 0 if name in ("hpz", "offload_all", "offload_optimizer") else 1e-6)


@pytest.mark.slow
def test_deepspeeds_own_adam_on_the_host(tmp_path):
    """Compiled at its first use, in a minute or two."""
    pytest.importorskip("ninja")
    found = ranks(tmp_path, ["zero3", "offload_compiled"])
    check(found, "offload_compiled", 1e-5)
