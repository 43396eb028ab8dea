"""Promise: what `swim export` gives a name is a stock model with the trained weights under the base's names; every
check of it fails for the fault it is there for."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from processes import ROOT, TINY, run
from safetensors.torch import load_file, save_file
from tiny import contents, family_config, make_batch, make_data
from transformers import AutoModelForImageTextToText
from typer.testing import CliRunner

from swim.data_tools.records import Conversation, Turn
from swim.train import export as module
from swim.train import stock_reload, verify_export
from swim.train.cli import app
from swim.train.config import ConfigError
from swim.train.export import ExportError, export, find_source, stored_tensors
from swim.train.families import FAMILIES, Clip
from swim.train.key_names import parameter_name
from swim.train.predict import weights_digest
from swim.train.serve import serve_lines
from swim.train.system import Progress, build_system
from swim.train.verify_export import verify_export as verify
from swim.train.weights import save_model
from swim.train.world import World

LORA = "model.lora={rank: 4, alpha: 8}"
FROZEN = "model.freeze=['visual|vision_tower']"
# What the hub's files are called where stock `save_pretrained` calls them otherwise.
HUB = {"llava_onevision": (r"^vision_tower\.", "vision_tower.vision_model.")}
CHECKS = ["files", "names", "reload", "logits", "differs from base"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"), clips=2)


@pytest.fixture(scope="module")
def bases(tmp_path_factory, data):
    """A folder as the hub has it, by family; made once."""
    made = {}

    def base(model_type, seed=0):
        if (model_type, seed) not in made:
            folder = tmp_path_factory.mktemp("base") / model_type
            system = build_system(family_config(data.folder, model_type, f"run.seed={seed}"))
            system.build_model().save_pretrained(folder)
            system.tokenizer.save_pretrained(folder)
            (folder / "preprocessor_config.json").write_text('{"resample": 3}')
            (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A base\n")
            rename(folder, *HUB.get(model_type, ("^$", "")))
            made[model_type, seed] = folder
        return made[model_type, seed]

    return base


def rename(folder, pattern, replacement):
    """Rename tensors of a folder with one weight file."""
    edit(folder, lambda state: {re.sub(pattern, replacement, name): tensor for name, tensor in state.items()})


def edit(folder, change):
    """Change the weights of a folder with one weight file; `change` takes its state and may return another."""
    path = (
        folder / "model.safetensors"
        if (folder / "model.safetensors").exists()
        else folder / "adapter_model.safetensors"
    )
    state = {name: tensor.clone() for name, tensor in load_file(path).items()}
    save_file(change(state) or state, path, metadata={"format": "pt"})


def finished(folder, config, *, trained=True):
    """What a run leaves behind, its weights moved as training would."""
    system = build_system(config)
    model = system.build_model()
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        if trained and parameter.requires_grad:
            parameter.data += (torch.randn(parameter.shape, generator=generator) * 0.05).to(parameter.dtype)
    engine, world = SimpleNamespace(module=model), World(0, 1, torch.device("cpu"))
    save_model(engine, folder / "model", system.tokenizer, config.model.path, world)
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "done.json").write_text('{"seconds": 12.5, "peak_memory_mib": 652, "ranks": 2}')
    return folder


def on_base(data, base, *overrides, model_type="qwen2_5_vl"):
    source = [f"model.path={base}", "model.config=null", "model.tokenizer=null"]
    return family_config(data.folder, model_type, *overrides, *source)


@pytest.fixture
def here(monkeypatch):
    """Stock loads in this process: the fresh one, which costs seconds, has tests of its own."""

    def reports(jobs, work):  # noqa: ARG001
        try:
            return [stock_reload.reload(job) | {"foreign": []} for job in jobs]
        except Exception as error:  # as the fresh process would tell
            return f"{type(error).__name__}: {error}"

    monkeypatch.setattr(verify_export, "run_stock", reports)


def failed(checks):
    return {check.name for check in checks if check.passed is False}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_family_leaves_under_the_names_of_its_base(model_type, data, bases, tmp_path):
    base = bases(model_type)
    trained = finished(tmp_path / "run", on_base(data, base, FROZEN, model_type=model_type))
    done = export(trained, tmp_path / "out", max_shard_bytes=100_000)
    assert [check.name for check in done.checks] == CHECKS
    assert done.passed, done.checks
    ours, theirs = stored_tensors(tmp_path / "out"), stored_tensors(base)
    assert {name: tensor[:2] for name, tensor in ours.items()} == {name: tensor[:2] for name, tensor in theirs.items()}
    files = [path for path in (tmp_path / "out").glob("*.safetensors") if path.stat().st_size]
    assert len(files) > 3, "written a shard at a time"
    largest = max(tensor.numel() * 4 for tensor in load_file(base / "model.safetensors").values())
    assert max(path.stat().st_size for path in files) < max(100_000, largest) + 20_000  # headers
    copied = (tmp_path / "out" / "preprocessor_config.json").read_bytes()
    assert copied == (base / "preprocessor_config.json").read_bytes()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_published_names_are_those_a_stock_load_understands(model_type, bases, tmp_path):
    """The table against transformers: files under published names and under parameters' own give the same model."""
    base = bases(model_type)
    own = tmp_path / "own"
    shutil.copytree(base, own)
    edit(own, lambda state: {parameter_name(model_type, name): tensor for name, tensor in state.items()})
    loads = [AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True) for path in (base, own)]
    for model, info in loads:
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        state = load_file(own / "model.safetensors")
        parameters = dict(model.named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in state.items())
    assert all(parameter_name(model_type, name) == name for name in state), "parameters' own names stay"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_adapters_leave_merged_or_alone(form, data, bases, tmp_path):
    trained = finished(tmp_path / "run", on_base(data, bases("qwen2_5_vl"), LORA))
    done = export(trained, tmp_path / "out", form=form)
    assert [check.name for check in done.checks] == [*CHECKS, "adapters"]
    assert done.passed, done.checks
    assert (tmp_path / "out" / "adapter_model.safetensors").exists() == (form == "adapter")
    assert (tmp_path / "out" / "model.safetensors").exists() == (form == "merged")
    vllm, sglang = map(shlex.split, done.serve)
    assert ("--enable-lora" in vllm) == ("--enable-lora" in sglang) == (form == "adapter")


@pytest.mark.parametrize("form", ["merged", pytest.param("adapter", marks=pytest.mark.slow)])
def test_the_command_proves_it_in_a_fresh_process(form, data, bases, tmp_path, monkeypatch):
    """With paths from where the user stands, which the process does not."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bases("qwen2_5_vl"), tmp_path / "models" / "base")
    trained, out = finished(Path("runs", "one"), on_base(data, "models/base", LORA)), "models/out"
    said = CliRunner().invoke(app, ["export", str(trained), "--out", out, "--lora", form])
    assert said.exit_code == 0, said.output
    assert [line.split(":")[0] for line in said.output.splitlines()[:6]] == [
        f"ok    {c}" for c in [*CHECKS, "adapters"]
    ]
    assert f"vllm serve {'models/base' if form == 'adapter' else out} " in said.output
    record = json.loads((tmp_path / out / "swim_export.json").read_text())
    assert record["form"] == form
    assert list(record["checks"]) == [*CHECKS, "adapters"]
    if form == "merged":  # a fault seen from the command: weights that only the fresh process can miss
        edit(trained / "model", lambda state: {name: t for name, t in state.items() if name != "model.norm.weight"})
        said = CliRunner().invoke(app, ["export", str(trained), "--out", "second"])
        assert said.exit_code == 2
        assert "1 only in the base (model.norm.weight)" in said.output


def test_processor_files_written_as_data_make_the_real_processors(data, tmp_path):
    """Models without a base: the stock processor of every family gives the trainer's pixels and tokens."""
    torchvision = Path(os.environ.get("SWIM_TORCHVISION", ROOT / ".venv" / "torchvision"))
    if not (torchvision / "torchvision").is_dir():
        pytest.skip(f"no torchvision in {torchvision}; make env puts one there, SWIM_TORCHVISION names another folder")
    frames, folders = verify_export._frames(), {}
    for model_type in FAMILIES:
        trained = finished(tmp_path / f"run_{model_type}", family_config(data.folder, model_type))
        folders[model_type] = tmp_path / model_type
        export(trained, folders[model_type], verify=False)
        np.savez(folders[model_type] / "frames.npz", frames=frames)
    program = Path(__file__).with_name("stock_processor.py")
    command = [sys.executable, str(program), *map(str, folders.values())]
    environment = {**os.environ, "PYTHONPATH": str(torchvision)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    for model_type, folder in folders.items():
        config = family_config(data.folder, model_type)
        encoder, options = build_system(config).collator.encoder, config.data
        pixels, grid = encoder.family.pixels(frames, min_pixels=options.min_pixels, max_pixels=options.max_pixels)
        step = encoder.family.frames_per_step
        clip = Clip("x", pixels, grid, [[*range(i, i + step)] for i in range(0, 4, step)], step / 2, 2.0)
        turns = [Turn(role="user", text="What does the dog do?"), Turn(role="assistant", text="It runs.")]
        encoded = encoder(Conversation(task="x", span=None, turns=turns), name="x", clip=clip)
        stock = np.load(folder / "stock.npz")
        assert stock["input_ids"][0].tolist() == encoded.ids[: encoded.answer_start].tolist(), model_type
        seen = stock["pixel_values_videos"] if "pixel_values_videos" in stock else stock["pixel_values"]
        assert np.array_equal(seen.reshape(pixels.shape), pixels.numpy()), model_type


# Faults of an exported folder, and the checks that must fail for them.
def without(state):
    del state["model.layers.1.mlp.up_proj.weight"]


def with_another(state):
    state["model.layers.9.mlp.up_proj.weight"] = torch.zeros(2)


def reshaped(state):
    state["lm_head.weight"] = state["lm_head.weight"][:-1].clone()


def in_half(state):
    state["model.norm.weight"] = state["model.norm.weight"].bfloat16()


def changed(state):
    state["model.layers.2.self_attn.v_proj.weight"][0] += 1.0


def changed_a_little(state):
    state["model.layers.2.self_attn.v_proj.weight"][0, 0] += 1e-6


def thawed(state):
    state["visual.patch_embed.proj.weight"] += 1e-3


WEIGHT_FAULTS = {
    without: {"names", "reload"},
    with_another: {"names", "reload"},
    reshaped: {"names", "reload"},
    in_half: {"names"},
    changed: {"logits"},
    changed_a_little: {"logits"},
    thawed: {"logits", "differs from base"},
}


@pytest.fixture(scope="module")
def full(tmp_path_factory, data, bases):
    """A run that trained all but the tower, and its export, unverified."""
    place = tmp_path_factory.mktemp("full")
    trained = finished(place / "run", on_base(data, bases("qwen2_5_vl"), FROZEN))
    export(trained, place / "out", verify=False)
    return trained, place / "out"


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("fault", WEIGHT_FAULTS, ids=lambda fault: fault.__name__)
def test_weights_that_are_not_the_runs_fail(fault, full, tmp_path):
    trained, exported = full
    folder = shutil.copytree(exported, tmp_path / "out")
    source = find_source(trained, None, None)
    edit(folder, fault)
    checks = verify(folder, source, "merged")
    assert failed(checks) == WEIGHT_FAULTS[fault], checks


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (lambda f: (f / "preprocessor_config.json").unlink(), "missing preprocessor_config.json"),
        (lambda f: (f / "generation_config.json").unlink(), "missing generation_config.json"),
        (lambda f: (f / "chat_template.jinja").unlink(), "missing chat_template.jinja"),
        (lambda f: (f / "modeling_mine.py").write_text(""), "modeling_mine.py may run code"),
        (lambda f: (f / "model.bin").write_text(""), "model.bin may run code"),
        (lambda f: (f / "config.json").write_text('{"auto_map": {}}'), "auto_map in config.json"),
    ],
)
def test_files_that_are_missing_or_run_code_fail(fault, said, full, tmp_path):
    trained, exported = full
    folder = shutil.copytree(exported, tmp_path / "out")
    source = find_source(trained, None, None)
    assert verify_export.check_files(folder, source, "merged").passed
    fault(folder)
    check = verify_export.check_files(folder, source, "merged")
    assert not check.passed
    assert said in check.said


@pytest.mark.usefixtures("here")
def test_another_tokenizer_fails(full, tmp_path):
    trained, exported = full
    folder = shutil.copytree(exported, tmp_path / "out")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|endoftext|>"))
    assert failed(verify(folder, find_source(trained, None, None), "merged")) == {"reload"}


def test_an_index_that_names_other_files_fails(full, tmp_path):
    trained, _ = full
    export(trained, tmp_path / "out", verify=False, max_shard_bytes=100_000)
    source, index = find_source(trained, None, None), tmp_path / "out" / "model.safetensors.index.json"
    assert verify_export.check_names(tmp_path / "out", source, "merged").passed
    text = json.loads(index.read_text())
    del text["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(text))
    assert "index.json names" in verify_export.check_names(tmp_path / "out", source, "merged").said


@pytest.mark.usefixtures("here")
def test_weights_that_training_did_not_move_fail_and_get_no_name(data, bases, tmp_path):
    config = on_base(data, bases("qwen2_5_vl"), FROZEN)
    trained = finished(tmp_path / "run", config, trained=False)
    done = export(trained, tmp_path / "out")
    assert failed(done.checks) == {"differs from base"}
    assert not (tmp_path / "out").exists()
    assert "not exported; what failed is left in" in module.report(done)
    shutil.rmtree(trained)
    assert export(finished(trained, config), tmp_path / "out").passed


@pytest.mark.usefixtures("here")
def test_random_weights_that_the_run_does_not_keep_are_said_to_be_no_base(data, tmp_path):
    done = export(finished(tmp_path / "run", family_config(data.folder, "qwen2_5_vl")), tmp_path / "out")
    assert done.passed
    assert [check.name for check in done.checks if check.passed is None] == ["differs from base"]
    assert "none  differs from base: not checked: the run started from random weights" in module.report(done)


@pytest.mark.usefixtures("here")
def test_a_merge_that_left_the_base_as_it_was_fails(data, bases, tmp_path):
    base = bases("qwen2_5_vl")
    trained = finished(tmp_path / "run", on_base(data, base, LORA))
    shutil.copy(base / "model.safetensors", trained / "model" / "model.safetensors")
    assert failed(export(trained, tmp_path / "out").checks) == {"differs from base", "adapters"}


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize("form", ["merged", "adapter"])
def test_adapters_of_another_base_fail(form, data, bases, tmp_path):
    trained = finished(tmp_path / "run", on_base(data, bases("qwen2_5_vl"), LORA))
    other = str(bases("qwen2_5_vl", seed=1))
    done = export(trained, tmp_path / "out", form=form, base=other)
    assert failed(done.checks) >= ({"logits"} if form == "adapter" else {"differs from base", "adapters"})
    moved = shutil.copytree(bases("qwen2_5_vl"), tmp_path / "moved")
    assert export(trained, tmp_path / "out", form=form, base=str(moved)).passed


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (lambda state: state.popitem() and None, {"names", "reload"}),
        (lambda state: state.update(extra=torch.zeros(2)), {"names", "reload"}),
        (lambda state: {name: t * (".lora_A" in name) for name, t in state.items()}, {"differs from base", "logits"}),
        (lambda state: {name: t.bfloat16() for name, t in state.items()}, {"names"}),
    ],
    ids=["missing", "extra", "nothing added", "other type"],
)
def test_adapters_that_are_not_the_runs_fail(fault, expected, data, bases, tmp_path):
    trained = finished(tmp_path / "run", on_base(data, bases("qwen2_5_vl"), LORA))
    export(trained, tmp_path / "out", form="adapter", verify=False)
    edit(tmp_path / "out", fault)
    assert failed(verify(tmp_path / "out", find_source(trained, None, None), "adapter")) == expected


@pytest.mark.usefixtures("here")
def test_what_no_export_made_is_not_overwritten(full, tmp_path):
    trained, _ = full
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(ExportError, match="holds files that no export made"):
        export(trained, out, verify=False)
    assert contents(out) == {"mine.txt": b"mine"}
    (out / "mine.txt").unlink()
    export(trained, out, verify=False)
    first = contents(out)
    export(trained, out, verify=False)
    assert contents(out) == first
    # A check that fails leaves the earlier export in its place.
    edit(trained / "model", changed)
    assert export(trained, out).passed
    edit(trained / "model", thawed)
    before = contents(out)
    assert not export(trained, out).passed
    assert contents(out) == before
    assert (tmp_path / ".out.incoming").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "adapter"}, "adapters alone need a run with model.lora"),
        ({"checkpoint": "12"}, "step_00000012 is not there; checkpoints of this run: none"),
        ({"checkpoint": "last", "results": Path("x")}, "--results belong to the run's final model"),
        ({"checkpoint": ""}, "checkpoints of this run: none"),
        ({"checkpoint": "../.."}, "checkpoints of this run: none"),
        ({"base": "/nowhere"}, "the base /nowhere cannot be read"),
    ],
)
def test_what_cannot_be_exported_is_said(options, message, full, tmp_path):
    with pytest.raises(ExportError, match=re.escape(message)):
        export(full[0], tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_not_finished_names_its_checkpoints(full, tmp_path):
    trained = shutil.copytree(full[0], tmp_path / "run")
    (trained / "done.json").unlink()
    with pytest.raises(ExportError, match=r"the run is not finished; give --checkpoint last"):
        export(trained, tmp_path / "out")
    (trained / "checkpoints" / "last").mkdir(parents=True)
    with pytest.raises(ExportError, match=r"no usable manifest.json .* or give another one with --checkpoint"):
        export(trained, tmp_path / "out", checkpoint="last")
    with pytest.raises(ExportError, match="no run is there"):
        export(tmp_path / "typo", tmp_path / "out")


def test_the_base_of_a_run_is_not_replaced_by_its_export(full, tmp_path):
    trained, _ = full
    export(trained, tmp_path / "base", verify=False)
    before = contents(tmp_path / "base")
    with pytest.raises(ExportError, match="is the base of this run"):
        export(trained, tmp_path / "base", verify=False, base=str(tmp_path / "base"))
    assert contents(tmp_path / "base") == before


@pytest.mark.parametrize(("text", "problem"), [("[]", "no scores of 'run' in it"), ("{", "no JSON")])
def test_wrong_results_are_said_before_anything_is_written(text, problem, full, tmp_path):
    (tmp_path / "results.json").write_text(text)
    with pytest.raises(ConfigError, match=f"results.json: {problem}"):
        export(full[0], tmp_path / "out", verify=False, results=tmp_path / "results.json")
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_every_number_of_the_card_is_the_files(full, tmp_path):
    trained, _ = full
    estimate = {"value": 0.651234, "interval": [0.59911, 0.70322], "value_scored_only": 0.651234}
    results = {
        "run": {"accuracy": estimate, "nss": {"value": None, "interval": None}, "coverage": {"expected": 192}},
        "protocol": {"id": "alignment-grid", "version": 1},
        "provenance": {
            "arms": {
                "run": {"model": {"weights_sha256": weights_digest(trained)}, "data": {"sha256": "a19e761bafc2c0a5"}}
            }
        },
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    export(trained, tmp_path / "out", verify=False, results=tmp_path / "results.json")
    card = (tmp_path / "out" / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == "apache-2.0", "the base's"
    assert front["base_model"].endswith("qwen2_5_vl")
    assert (front["library_name"], front["pipeline_tag"]) == ("transformers", "video-text-to-text")
    assert front["datasets"] == ["synth"]
    (scored,) = front["model-index"][0]["results"]
    assert scored["metrics"] == [
        {"type": "accuracy", "name": "accuracy (alignment-grid, version 1)", "value": 0.651234}
    ]
    assert "| accuracy | 0.6512 | 0.5991 to 0.7032 |" in card
    assert "expected 192" in card
    assert "licence CC0-1.0" in card
    assert "2 processes, 12 s of steps" in card
    gone = yaml.safe_load((trained / "config.yaml").read_text())
    gone["data"]["train"] = [{"path": str(tmp_path / "gone")}]
    elsewhere = shutil.copytree(trained, tmp_path / "elsewhere")
    (elsewhere / "config.yaml").write_text(yaml.safe_dump(gone))
    export(elsewhere, tmp_path / "bare", verify=False)
    bare = (tmp_path / "bare" / "README.md").read_text()
    assert "look up its licences before you publish" in bare
    assert "None were given to the export." in bare
    assert "datasets" not in yaml.safe_load(bare.split("---\n")[1])
    results["provenance"]["arms"]["run"]["model"]["weights_sha256"] = "0" * 64
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(ConfigError, match=r"scores of weights 0000000000000000, the run's are"):
        export(trained, tmp_path / "out", verify=False, results=tmp_path / "results.json")


@pytest.mark.parametrize(
    ("model_type", "pixels"),
    [
        ("qwen2_5_vl", {"min_pixels": 7056, "max_pixels": 7056}),
        ("qwen3_vl", {"size": {"shortest_edge": 4 * 7056, "longest_edge": 4 * 7056}}),
        ("internvl", {}),
    ],
)
def test_servers_are_given_the_runs_frames_and_pixels(model_type, pixels, data):
    config = family_config(data.folder, model_type)
    vllm, sglang = map(shlex.split, serve_lines(config, model_type, Path("out dir"), None))
    assert vllm[:3] == ["vllm", "serve", "out dir"]
    options = dict(zip(vllm[3::2], vllm[4::2]))
    assert json.loads(options["--media-io-kwargs"]) == {"video": {"num_frames": config.data.num_frames}}
    assert json.loads(options.get("--mm-processor-kwargs", "{}")) == pixels
    assert json.loads(sglang[-1]) == {"video": {"nframes": config.data.num_frames, **pixels}}
    sampled = config.model_copy(update={"data": config.data.model_copy(update={"frame_sampling": "fps", "fps": 3.0})})
    vllm, sglang = map(shlex.split, serve_lines(sampled, model_type, Path("out"), None))
    assert '"fps": 3.0' in " ".join(vllm)
    assert '"max_frames": 4' in sglang[-1]


def test_an_exported_folder_is_a_model_to_train(full, data):
    """`model.path=DIR`: system, batch, both losses and their gradients."""
    system = build_system(on_base(data, full[1]))
    model = system.build_model().train()
    terms = system.loss(model, make_batch(system, data, [0]), Progress(0, 2))
    sum(term.sum for term in terms.values()).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "layers.0.self_attn" in name)


@pytest.mark.slow
def test_two_ranks_train_adapters_export_from_the_checkpoint_and_train_on(data, bases, tmp_path):
    base = bases("qwen2_5_vl")
    options = [f"data.train=[{data.folder}]", "run.steps=3", "optim.lr=1e-2", "system.layers=[0, 2]"]
    source = ["model.config=null", "model.tokenizer=null"]
    run([*TINY, *options, *source, f"model.path={base}", LORA, "run.name=lora", "launch.ranks=2"], cwd=tmp_path)
    trained, out = tmp_path / "runs" / "lora", tmp_path / "out"
    assert (trained / "model" / "adapter").exists()
    for form in ("merged", "adapter"):
        last = export(trained, out, form=form, checkpoint="last")
        assert last.passed, last.checks
        shutil.rmtree(out)
    by_step, final = export(trained, out, checkpoint="3"), export(trained, tmp_path / "final")
    assert by_step.passed, by_step.checks
    assert final.passed, final.checks
    weights = [load_file(path / "model.safetensors") for path in (out, tmp_path / "final")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    run([*TINY, *options, *source, f"model.path={out}", "run.name=again", "run.steps=2"], cwd=tmp_path)
    assert export(tmp_path / "runs" / "again", tmp_path / "twice").passed


@pytest.mark.slow
def test_a_run_from_random_weights_and_with_adapters_is_proved_from_its_checkpoint(data, tmp_path):
    options = [f"data.train=[{data.folder}]", "run.steps=2", "optim.lr=1e-2", "model.dtype=bfloat16", LORA]
    run([*TINY, *options, "run.name=lora"], cwd=tmp_path)
    trained = tmp_path / "runs" / "lora"
    refused = export(trained, tmp_path / "out")
    assert failed(refused.checks) == {"adapters"}
    assert "give --checkpoint last" in module.report(refused)
    done = export(trained, tmp_path / "out", checkpoint="last")
    assert done.passed, done.checks
