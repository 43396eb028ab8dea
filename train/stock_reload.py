"""Run as a program, with nothing of this repository: model folders loaded by stock transformers (and peft) alone, and
run on fixed inputs.

    python train/stock_reload.py JOBS.json

JOBS.json is a list of {folder, adapter (or null), inputs, logits, messages}; `inputs` is a safetensors file of model
inputs, `logits` the file to write. The last line of the output is a JSON list with what each load reported.
"""

import json
import sys
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor, AutoTokenizer


def reload(job: dict[str, Any]) -> dict[str, Any]:
    """Load one folder, note what was missing, write its logits (with an adapter: also those after merging it)."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(
        job["folder"], dtype="auto", attn_implementation="sdpa", use_safetensors=True, output_loading_info=True
    )
    model, info = loaded
    names = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    report: dict[str, Any] = {name: sorted(map(str, info.get(name) or ())) for name in names}
    report |= {"class": type(model).__name__, "dtype": str(model.dtype).removeprefix("torch.")}
    tokenizer = AutoTokenizer.from_pretrained(job["adapter"] or job["folder"])
    report["tokens"] = tokenizer.apply_chat_template(job["messages"], return_dict=False)
    report["processor"] = _processor(job["folder"])
    outputs = {}
    if job["adapter"]:
        model = _adapted(model, job["adapter"], report)
    inputs = load_file(job["inputs"])
    outputs["logits"] = _logits(model, inputs)
    if job["adapter"]:
        with model.disable_adapter():
            outputs["base"] = _logits(model, inputs)
        outputs["merged"] = _logits(model.merge_and_unload(), inputs)
    save_file(outputs, job["logits"])
    return report


def _processor(folder: str) -> str | None:
    """Class of the stock processor, which needs torchvision; None without a torchvision that works."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: a build for another torch
        return None
    return type(AutoProcessor.from_pretrained(folder)).__name__


def _adapted(model: Any, adapter: str, report: dict[str, Any]) -> Any:
    import peft

    stored = load_file(f"{adapter}/adapter_model.safetensors")
    adapted = peft.PeftModel.from_pretrained(model, adapter, autocast_adapter_dtype=False)
    held = peft.get_peft_model_state_dict(adapted)
    report["missing_keys"] += sorted(held.keys() - stored.keys())
    report["unexpected_keys"] += sorted(stored.keys() - held.keys())
    both = held.keys() & stored.keys()
    report["mismatched_keys"] += sorted(name for name in both if not torch.equal(held[name].cpu(), stored[name]))
    return adapted


@torch.no_grad()
def _logits(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    logits: torch.Tensor = model.eval()(**inputs, use_cache=False).logits
    return logits.float().contiguous()


def main(path: str) -> None:
    """Print the reports of all jobs of the file."""
    with open(path) as file:
        reports = [reload(job) for job in json.load(file)]
    foreign = sorted(name for name in sys.modules if name.split(".")[0] == "swim")
    print(json.dumps([report | {"foreign": foreign} for report in reports]))


if __name__ == "__main__":
    main(sys.argv[1])
