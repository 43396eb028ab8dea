"""Which implementation of an operator runs: Triton kernels, or the torch reference beside them."""

import logging
import os
from importlib.util import find_spec
from typing import Literal, get_args

import torch
from torch import Tensor

Backend = Literal["auto", "triton", "torch"]

HAS_TRITON = find_spec("triton") is not None
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton kernels run on CPU tensors, slowly: for tests

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def without_triton(like: Tensor) -> str | None:
    """Why Triton cannot run on tensors of this device at all; None if it can."""
    if not HAS_TRITON:
        return "Triton is not installed"
    if like.device.type != "cuda" and not INTERPRETED:
        return f"tensors on device {like.device.type!r}"
    if torch.version.hip:
        return "an AMD device"  # nothing was ever compiled for one
    return None


def choose_triton(operator: str, backend: Backend, like: Tensor, reason: str | None) -> bool:
    """Whether `operator` takes Triton, which `reason` speaks against; `auto` then takes torch and says so once.

    Raises ValueError for an unknown backend, and under `triton` for what its kernels cannot do.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"{operator} backend is {backend!r}; use one of {', '.join(get_args(Backend))}")
    # A CPU never takes Triton by itself: there its kernels only run in the interpreter.
    if backend == "torch" or (backend == "auto" and like.device.type != "cuda"):
        return False
    if not reason:
        return True
    if backend == "triton":
        raise ValueError(f"{operator} has no Triton kernel for {reason}; use backend 'auto' or 'torch'")
    _say_once(f"{operator} runs in torch, not in Triton: {reason}")
    return False


@torch.compiler.assume_constant_result  # runs while tracing
def _say_once(line: str) -> None:
    if line not in _logged:
        _logged.add(line)
        _log.warning("%s", line)
