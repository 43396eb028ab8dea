"""Checks of an exported folder against what it should be: names, a stock load elsewhere, logits, the base, adapters.

Each gives a line with figures. The stock loads happen in a fresh process that knows nothing of this repository
(`stock_reload.py`); host memory is that of two models in turn.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForImageTextToText

from swim.data_tools.records import Conversation, Turn
from swim.kernels.noun_attention import ClipKeys, Row, build_work_table
from swim.train.attention import MODEL_KWARG, Capture
from swim.train.export import (
    MARKER,
    Check,
    Form,
    Source,
    base_folder,
    read_tensor,
    stored_tensors,
    target_names,
    write_adapter,
)
from swim.train.families import Clip
from swim.train.key_names import parameter_name
from swim.train.lora import merged, plain_name, sides
from swim.train.stock import tokenizer_and_config
from swim.train.system import build_system
from swim.train.weights import PROCESSOR_FILES, stock_description

# Of the largest logit. In fp32 the order of sums differs; in bf16 every layer rounds, and merging rounds the weights.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
_SAFE = {".json", ".jinja", ".safetensors", ".md", ".txt", ".model"}  # .model: sentencepiece
_NUM_FRAMES, _SIDE = 4, 112
Messages = list[dict[str, str]]


def verify_export(folder: Path, source: Source, form: Form) -> list[Check]:
    """All checks that the form has, in order; what a folder computes is looked at once it is what it should be."""
    checks = [check_files(folder, source, form), check_names(folder, source, form)]
    with TemporaryDirectory(prefix="swim-export-") as place:
        work = Path(place)
        messages, want = trainers_logits(source, work / "inputs.safetensors")
        jobs = _jobs(folder, source, form, work, messages)
        reports = run_stock(jobs, work)
        checks += [check_reload(reports, source, messages)]
        if any(check.passed is False for check in checks):
            return checks
        got = [load_file(str(job["logits"])) for job in jobs]
    checks.append(check_logits(folder, source, form, got[0]["logits"], want))
    checks.append(check_difference(folder, source, form, got[0]))
    if source.weights.adapters:
        checks.append(check_adapters(source, form, got, want))
    return checks


def check_files(folder: Path, source: Source, form: Form) -> Check:
    """Everything a stock load or server reads is there; nothing that runs code is."""
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    needed = {"tokenizer.json", "tokenizer_config.json"}
    if form == "adapter":
        needed |= {"adapter_config.json", "adapter_model.safetensors"}
    else:
        needed |= {"config.json", "generation_config.json"} | _processor_files(source)
    problems = [f"missing {name}" for name in sorted(needed - files)]
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text()) if "tokenizer_config.json" in files else {}
    if "chat_template" not in tokenizer and not files & {"chat_template.jinja", "chat_template.json"}:
        problems.append("missing chat_template.jinja")
    problems += [f"{name} may run code" for name in sorted(files) if Path(name).suffix not in _SAFE]
    problems += [
        f"auto_map in {name}"
        for name in sorted(files)
        if name.endswith(".json") and '"auto_map"' in (folder / name).read_text()
    ]
    count = len(files - {MARKER})
    return Check("files", not problems, "; ".join(problems) or f"{count} files, none with code, no auto_map")


def _processor_files(source: Source) -> set[str]:
    if (base := source.config.model.path) is None:
        return {"preprocessor_config.json", "video_preprocessor_config.json", "processor_config.json"}
    there = {name for name in PROCESSOR_FILES if (base_folder(base) / name).exists()}
    return there or {"preprocessor_config.json"}


def check_names(folder: Path, source: Source, form: Form) -> Check:
    """Names, shapes and types equal those of the reference: the base's files, else what stock `save_pretrained` would
    write; for adapters, stock peft's."""
    dtype = getattr(torch, source.weights.stock["dtype"])
    what = "of peft's own adapters" if form == "adapter" else f"of {source.config.model.path or 'save_pretrained'}"
    reference = _adapter_reference(source) if form == "adapter" else _reference(folder, source)
    stored = _stored_adapter(folder) if form == "adapter" else _stored(folder)
    problems = [f"{name} is missing" for name in sorted(reference.keys() - stored.keys())]
    problems += [f"{name} is not in the reference" for name in sorted(stored.keys() - reference.keys())]
    for name in sorted(stored.keys() & reference.keys()):
        shape, kind = stored[name]
        if shape != reference[name]:
            problems.append(f"{name} is {list(shape)}, in the reference {list(reference[name])}")
        if kind != dtype:
            problems.append(f"{name} is {kind}, trained in {dtype}")
    if form == "merged":
        problems += _index_problems(folder, stored.keys())
    if problems:
        return Check("names", False, f"{len(problems)} problems: " + "; ".join(problems[:5]))
    return Check("names", True, f"{len(stored)} tensors: names and shapes {what}, all {str(dtype)[6:]}")


def _stored(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (shape, dtype) for name, (shape, dtype, _) in stored_tensors(folder).items()}


def _stored_adapter(folder: Path) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    return {name: (tuple(t.shape), t.dtype) for name, t in load_file(folder / "adapter_model.safetensors").items()}


def _reference(folder: Path, source: Source) -> dict[str, tuple[int, ...]]:
    if (base := source.config.model.path) is not None:
        return {name: shape for name, (shape, _, _) in stored_tensors(base_folder(base)).items()}
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder))
    own = dict(model.named_parameters())
    return {stored: tuple(own[name].shape) for stored, name in stock_description(model)["names"].items()}


def _adapter_reference(source: Source) -> dict[str, tuple[int, ...]]:
    import peft

    settings = json.loads(source.weights.stock["files"]["adapter/adapter_config.json"])
    with torch.device("meta"):
        base = base_folder(str(source.config.model.path))
        model: Any = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(base))
        keys = ("r", "lora_alpha", "target_modules", "lora_dropout")
        model = peft.get_peft_model(model, peft.LoraConfig(**{key: settings[key] for key in keys}))
        state = peft.get_peft_model_state_dict(model)
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _index_problems(folder: Path, names: Any) -> list[str]:
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        one = {file.name for file in folder.glob("model*.safetensors")} == {"model.safetensors"}
        return [] if one else ["several weight files and no model.safetensors.index.json"]
    weight_map = json.loads(path.read_text())["weight_map"]
    where = {name: file.name for name, (_, _, file) in stored_tensors(folder).items()}
    return [] if weight_map == where else [f"model.safetensors.index.json names {len(weight_map)} of {len(names)}"]


def trainers_logits(source: Source, inputs: Path) -> tuple[Messages, Tensor]:
    """Logits (1, L, vocabulary) of the run's weights through the trainer's own build, capture on every layer; writes
    the inputs, without what only the trainer adds (positions, capture)."""
    model_config = source.config.model
    plain = {"attention": "sdpa", "checkpointing": False, "freeze": []}
    if source.folder is not None:
        plain |= {"path": str(source.folder), "config": None, "tokenizer": None, "lora": None}
    system = build_system(source.config.model_copy(update={"model": model_config.model_copy(update=plain)}))
    model: Any = system.build_model().eval()
    encoder, data = system.collator.encoder, source.config.data
    pixels, grid = encoder.family.pixels(_frames(), min_pixels=data.min_pixels, max_pixels=data.max_pixels)
    step = encoder.family.frames_per_step
    numbers = [list(range(i, min(i + step, _NUM_FRAMES))) for i in range(0, _NUM_FRAMES, step)]
    clip = Clip("export", pixels, grid, numbers, seconds_per_step=step / 2, fps=2.0)
    turns = [Turn(role="user", text="What does the object do?"), Turn(role="assistant", text="It moves.")]
    encoded = encoder(Conversation(task="export", span=None, turns=turns), name="export", clip=clip)
    ids, types = torch.from_numpy(encoded.ids)[None], torch.from_numpy(encoded.types)[None]
    tensors = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **encoder.family.inputs([clip], types)}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, inputs)
    visual = np.nonzero(encoded.types)[0][: clip.num_cells].tolist()
    table = build_work_table([Row(0, ids.shape[1] - 1, ())], [ClipKeys(0, visual[0], grid, visual)], "frame")
    layers = tuple(range(system.model_config.get_text_config().num_hidden_layers))
    capture = Capture(table, layers, detach=True)
    positions = torch.from_numpy(encoder.family.positions(encoded.types, clip))[:, None]
    tensors["position_ids"] = positions if len(positions) > 1 else positions[0]
    with torch.no_grad():
        if source.folder is None:
            for name, parameter in model.named_parameters():
                parameter.copy_(source.weights.fetch(name))
        logits: Tensor = model(**tensors, use_cache=False, **{MODEL_KWARG: capture}).logits
    capture.maps()  # raises where our attention function was not used
    return [{"role": turn.role, "content": turn.text} for turn in turns], logits.float()


def _frames() -> np.ndarray:
    """A bright square that wanders over a gradient: (N, height, width, 3) uint8, the same everywhere."""
    frames = np.empty((_NUM_FRAMES, _SIDE, _SIDE, 3), dtype=np.uint8)
    for number in range(_NUM_FRAMES):
        frames[number] = (np.arange(_SIDE) * 2)[None, :, None]
        at = 10 + 20 * number
        frames[number, at : at + 24, at : at + 24] = (250, 120, 30)
    return frames


def _jobs(folder: Path, source: Source, form: Form, work: Path, messages: Messages) -> list[dict[str, Any]]:
    inputs = {"inputs": str(work / "inputs.safetensors"), "messages": messages}
    base, jobs = source.config.model.path, []
    if form == "merged":
        jobs.append(
            {"folder": str(folder.resolve()), "adapter": None, "logits": str(work / "folder.safetensors"), **inputs}
        )
    if source.weights.adapters and base is not None:
        adapter = folder
        if form == "merged":
            adapter = work / "adapter"
            adapter.mkdir()
            write_adapter(source, adapter)
        jobs.append(
            {
                "folder": str(base_folder(base).resolve()),
                "adapter": str(adapter.resolve()),
                "logits": str(work / "base.safetensors"),
                **inputs,
            }
        )
    return jobs


def run_stock(jobs: list[dict[str, Any]], work: Path) -> list[dict[str, Any]] | str:
    """What stock loads report, each job in turn in one fresh process; the end of its errors if it failed."""
    (work / "jobs.json").write_text(json.dumps(jobs))
    # -P: the folder of the program, which is ours, is not on its path.
    program = Path(__file__).with_name("stock_reload.py")
    command = [sys.executable, "-P", str(program), str(work / "jobs.json")]
    done = subprocess.run(command, cwd=work, capture_output=True, text=True)
    if done.returncode:
        return done.stderr[-1500:]
    reports: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return reports


def check_reload(reports: list[dict[str, Any]] | str, source: Source, messages: Messages) -> Check:
    """Stock `from_pretrained` took every tensor, missed none, found none too many, and the tokenizer is the run's."""
    if isinstance(reports, str):
        return Check("reload", False, f"stock transformers cannot load it: {reports}")
    problems = [
        f"{kind.replace('_', ' ')}: {', '.join(report[kind][:3])}"
        for report in reports
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs", "foreign")
        if report[kind]
    ]
    tokens = tokenizer_and_config(source.config.model)[0].apply_chat_template(messages, return_dict=False)
    if reports[0]["tokens"] != tokens:
        problems.append("its tokenizer gives other tokens to a chat than the run's")
    processor = reports[0]["processor"] or "no processor made, which needs torchvision"
    loaded = (
        f"{reports[0]['class']} in {reports[0]['dtype']}, nothing missing or unexpected, {len(tokens)} tokens equal, "
        f"{processor}"
    )
    return Check("reload", not problems, "; ".join(problems) or loaded)


def check_logits(folder: Path, source: Source, form: Form, got: Tensor, want: Tensor) -> Check:
    """Logits on fixed frames equal the trainer's to the tolerance; the merged form's tensors equal the run's bit for
    bit."""
    difference, tolerance, close = _compare(got, want, source)
    said = f"{want.shape[1]} tokens, largest difference {difference:.1e}, tolerance {tolerance:.1e}"
    if form == "adapter":
        return Check("logits", close, said)
    stored, names = stored_tensors(folder), target_names(source)
    other = [name for name, own in names.items() if not torch.equal(read_tensor(stored, name), _expected(source, own))]
    said += f"; {len(names) - len(other)} of {len(names)} tensors equal the run's bit for bit"
    return Check("logits", close and not other, said + (f", not {', '.join(other[:3])}" if other else ""))


def _expected(source: Source, own: str) -> Tensor:
    """A tensor of the run by its name in training, its adapter merged into it."""
    stock, _, fetch, _ = source.weights
    if (scale := stock["scales"].get(own)) is None:
        return fetch(own)
    down, up = (fetch(side) for side in sides(own))
    return merged(fetch(own), down, up, scale)


def _compare(got: Tensor, want: Tensor, source: Source) -> tuple[float, float, bool]:
    """Largest difference, the tolerance, and whether it holds; a NaN does not."""
    tolerance = TOLERANCES[source.weights.stock["dtype"]] * float(want.abs().max())
    difference = float((got - want).abs().max()) if got.shape == want.shape else float("nan")
    return difference, tolerance, difference <= tolerance


def check_difference(folder: Path, source: Source, form: Form, got: Mapping[str, Tensor]) -> Check:
    """The trained tensors are not the base's, the frozen ones are; adapters add something."""
    if form == "adapter":
        change = float((got["logits"] - got["base"]).abs().max())
        ups = [up for name, up in load_file(folder / "adapter_model.safetensors").items() if ".lora_B" in name]
        moved = sum(bool(up.any()) for up in ups)
        said = f"{moved} of {len(ups)} adapters add something, logits move by {change:.1e}"
        return Check("differs from base", bool(moved) and change > 0, said)
    if source.config.model.path is None:
        return _without_base(source)
    base, stored = stored_tensors(base_folder(source.config.model.path)), stored_tensors(folder)
    changed, total = {True: 0, False: 0}, {True: 0, False: 0}
    moved_by = size = 0.0  # squares, over the trained
    for name in stored:
        trained = _is_trained(source, parameter_name(source.model_type, name))
        ours = read_tensor(stored, name)
        theirs = read_tensor(base, name).to(ours.dtype)
        total[trained] += 1
        changed[trained] += not torch.equal(ours, theirs)
        if trained:
            moved_by += float((ours.float() - theirs.float()).square().sum())
            size += float(theirs.float().square().sum())
    relative = (moved_by / max(size, 1e-30)) ** 0.5
    said = (
        f"{changed[True]} of {total[True]} trained tensors are not those of {source.config.model.path}, norm of the "
        f"change {relative:.1e} of theirs; {total[False] - changed[False]} of {total[False]} frozen ones are"
    )
    return Check("differs from base", changed[True] > 0 and not changed[False], said)


def _without_base(source: Source) -> Check:
    """Of a run from random weights, which are drawn in ZeRO-3's order and kept nowhere: only adapters can be told."""
    ups = [up for name, up in source.weights.adapters.items() if ".lora_B" in name]
    moved = sum(bool(up.any()) for up in ups)
    said = "the run started from random weights and does not keep them"
    if not ups:
        return Check("differs from base", None, f"not checked: {said}")
    return Check("differs from base", moved > 0, f"{moved} of {len(ups)} adapters add something; {said}")


def _is_trained(source: Source, parameter: str) -> bool:
    model = source.config.model
    if any(re.search(pattern, parameter) for pattern in model.freeze):
        return False
    return model.lora is None or bool(re.fullmatch(model.lora.targets, parameter.removesuffix(".weight")))


def check_adapters(source: Source, form: Form, got: list[dict[str, Tensor]], want: Tensor) -> Check:
    """Merged weights give what stock peft gives with the adapters on the base."""
    if source.config.model.path is None:
        if source.folder is not None:
            said = "the run started from random weights and keeps them in checkpoints alone: give --checkpoint last"
            return Check("adapters", False, said)
        difference, tolerance, close = _compare(got[0]["logits"], want, source)
        against = "the trainer's adapters on its own base"
    else:
        first = got[0]["merged"] if form == "adapter" else got[0]["logits"]
        difference, tolerance, close = _compare(first, got[-1]["logits"], source)
        against = f"stock peft on {source.config.model.path}"
    count = len({plain_name(name).split(".lora_")[0] for name in source.weights.adapters})
    said = f"{count} adapters, merged against {against}: largest difference {difference:.1e}, tolerance {tolerance:.1e}"
    return Check("adapters", close, said)
