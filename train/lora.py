"""Low-rank adapters beside full fine-tuning, through peft (LoRA, arXiv 2106.09685); trained models leave merged."""

from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from swim.train.config import ConfigError, LoraConfig

_PREFIX = "base_model.model."
_WEIGHT = ".base_layer.weight"


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


def lora_scales(model: Any) -> dict[str, float]:
    """Factor of the update of every adapted weight, by its name in the adapted model."""
    return {
        name: float(model.get_submodule(name.removesuffix(_WEIGHT)).scaling["default"])
        for name, _ in model.named_parameters()
        if name.endswith(_WEIGHT)
    }


def plain_name(name: str) -> str:
    """A parameter's name in the plain model."""
    return name.removeprefix(_PREFIX).replace(".base_layer.", ".")


def sides(name: str) -> tuple[str, str]:
    """Names of the two matrices, down and up, that adapt the weight `name`."""
    layer = name.removesuffix(_WEIGHT)
    return f"{layer}.lora_A.default.weight", f"{layer}.lora_B.default.weight"


def merged(weight: Tensor, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """The weight with its adapter added in."""
    # In fp32: the update is small beside the weight.
    return (weight.float() + scale * (up.float() @ down.float())).to(weight.dtype)


def adapter_config(model: Any) -> str:
    """The text of peft's own adapter_config.json."""
    with TemporaryDirectory() as folder:
        model.peft_config["default"].save_pretrained(folder)
        return (Path(folder) / "adapter_config.json").read_text()


def save_adapter(state: Mapping[str, Tensor], path: Path) -> None:
    """Write the adapters alone, from their parameters `state`, under peft's own names."""
    own = {name.replace(".default.", "."): tensor.contiguous() for name, tensor in state.items()}
    save_file(own, path, metadata={"format": "pt"})
