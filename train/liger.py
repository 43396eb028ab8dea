"""Liger's fused kernels (arXiv 2410.10989) in the text model of one stock model, where there is a GPU.

Taken: RMSNorm and the gated MLP's product, through liger's functional interface; they compute what the stock modules
do, each on a tensor of its own. Left out: RoPE, which liger puts into transformers for the whole process, and its cross
entropy, which takes the place of the model's forward pass: the loss here needs logits of answer tokens alone, and the
capture goes through that pass. Its functions by model type (0.8.5) do not import with transformers 5.23.
"""

import importlib.util
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from swim.train.config import ConfigError


def wants_liger(choice: str | bool) -> bool:
    """What `model.liger` comes to here; ConfigError when it is `true` and liger or a GPU is missing."""
    installed, cuda = importlib.util.find_spec("liger_kernel") is not None, torch.cuda.is_available()
    if choice is True and not (installed and cuda):
        missing = "a GPU, and here is none" if installed else "liger-kernel: pip install 'swim-train[gpu]'"
        raise ConfigError(f"model.liger is true: it needs {missing}; set it to auto or false")
    return bool(choice) and installed and cuda


def apply_liger(model: Any) -> None:
    """Put the kernels into the text model of `model`, and nowhere else; ConfigError where they fit none of its
    modules."""
    text = model.get_decoder()
    gated = getattr(text.config, "hidden_act", None) in ("silu", "swish")
    found = [(m, forward) for m in text.modules() if (forward := _fitting(m, gated=gated)) is not None]
    if not found:
        raise ConfigError(
            f"model.liger: no RMSNorm and no gated SiLU MLP in {type(model).__name__}'s text model; set it to false"
        )
    for module, forward in found:
        module.forward = MethodType(forward, module)


def _fitting(module: nn.Module, *, gated: bool) -> Any:
    # Classes differ by family, these names do not; Gemma's norms, which scale by 1 + weight, have `eps` instead.
    if type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        return _norm
    return _mlp if gated and all(hasattr(module, f"{name}_proj") for name in ("gate", "up", "down")) else None


def _norm(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    # "llama" rounds before the weight is applied, as the stock norms do; in place it would overwrite the gradient.
    out: Tensor = liger_rms_norm(
        hidden, module.weight, module.variance_epsilon, offset=0.0, casting_mode="llama", in_place=False
    )
    return out


def _mlp(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    out: Tensor = module.down_proj(liger_swiglu(module.gate_proj(hidden), module.up_proj(hidden)))
    return out
