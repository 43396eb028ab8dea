"""Low-rank adapters beside full fine-tuning, through peft (LoRA, arXiv 2106.09685); trained models leave merged."""

from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from swim.train.config import ConfigError, LoraConfig

_PREFIX = "base_model.model."


def add_lora(model: nn.Module, config: LoraConfig) -> nn.Module:
    """`model` with adapters on the linear layers whose full names match `config.targets`; nothing else is trained.

    ConfigError without peft or a matching layer.
    """
    try:
        import peft
    except ImportError:
        raise ConfigError("model.lora needs peft, which is not installed: pip install 'swim-train[peft]'") from None
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=config.targets
    )
    try:
        adapted: Any = peft.get_peft_model(model, settings)
    except ValueError as error:
        raise ConfigError(f"model.lora.targets: {config.targets!r}: {error}") from None
    return adapted


def has_lora(model: nn.Module) -> bool:
    """Whether `add_lora` made this model."""
    return hasattr(model, "peft_config")


def merge_lora(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights of the plain model, adapters added in, from the gathered parameters `state` of the adapted one."""
    merged = {}
    for name, tensor in state.items():
        if ".lora_" in name:
            continue
        plain = name.removeprefix(_PREFIX)
        if plain.endswith(".base_layer.weight"):
            layer = name.removesuffix(".base_layer.weight")
            scale = model.get_submodule(layer).scaling["default"]
            # In fp32: the update is small beside the weight.
            up, down = (state[f"{layer}.lora_{side}.default.weight"].float() for side in "BA")
            tensor = (tensor.float() + scale * (up @ down)).to(tensor.dtype)
        merged[plain.replace(".base_layer.", ".")] = tensor
    return merged


def save_adapter(model: Any, state: dict[str, Tensor], folder: Path) -> None:
    """The adapters alone in peft's own layout, from the gathered parameters `state`."""
    folder.mkdir(parents=True, exist_ok=True)
    model.peft_config["default"].save_pretrained(str(folder))
    own = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in state.items() if ".lora_" in name}
    save_file(own, folder / "adapter_model.safetensors", metadata={"format": "pt"})
