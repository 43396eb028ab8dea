"""Attention capture: noun rows in, maps out, from an unmodified transformers model.

`register_capture` adds an attention function beside the stock ones and points the *text* part of a model at it. The
function calls its base backend (sdpa, flash_attention_2, ...) unchanged, piece by piece where the batch is packed or
shares a prefix (`layout.py`); where a `Capture` travels along as the model kwarg `capture`, it also computes the noun
maps of the supervised layers with `swim.kernels`. Where the Capture has a group of ranks, these divide columns and
heads among themselves (`sequence.py`). No fork, no patch, no state outside the Capture. Cost per supervised layer:
N x V x H dot products for N noun rows and V visual keys, and one N x V fp32 map; without checkpointing autograd also
keeps the keys in fp32 and the weights of every head.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from swim.kernels.backend import Backend
from swim.kernels.noun_attention import WorkTable, noun_attention
from swim.train.layout import Layout, attend
from swim.train.sequence import add_copies, gather_columns, gather_heads, own_inputs

MODEL_KWARG = "capture"


class Capture:
    """Collects the maps of one forward call, and lays its attention out; make a new one for each call."""

    def __init__(
        self,
        table: WorkTable,
        layers: tuple[int, ...],
        *,
        layout: Layout | None = None,
        detach: bool = False,
        measure: bool = False,
        backend: Backend = "auto",
        group: "torch.distributed.ProcessGroup | None" = None,  # ranks that hold the batch together, each some columns
    ) -> None:
        if group is not None and layout is None:
            raise ValueError("ranks that hold a batch together need its layout: make it with BatchOptions.sequence")
        self.table, self.layers, self.detach, self.measure, self.backend = table, layers, detach, measure, backend
        self.layout, self.group = layout, group
        self.layout_cache: dict[Any, Any] = {}  # masks, shared by the layers
        # layer -> (2,) squared norms of d(mask loss)/dq and /dk, filled by the backward pass; with a group, this rank's
        # share of them
        self.gradient_squares: dict[int, Tensor] = {}
        self._maps: dict[int, Tensor] = {}
        self._open = True

    def observe(self, layer: int, q_BHLD: Tensor, k_BKLD: Tensor, scale: float, *, num_kv_heads: int) -> None:
        """Compute the maps of `layer`; they are stored until `maps` is called.

        With a group q and k are this rank's heads; `num_kv_heads` is the model's number.
        """
        # The work is the same in the first pass and in recomputation: non-reentrant checkpointing counts saved tensors.
        if self.detach:
            q_BHLD, k_BKLD = q_BHLD.detach(), k_BKLD.detach()
        elif self.measure:
            copied = self.group is not None and k_BKLD.shape[1] * self.group.size() > num_kv_heads
            q_BHLD = _GradientNorm.apply(q_BHLD, self.gradient_squares, layer, 0)
            k_BKLD = _GradientNorm.apply(
                k_BKLD, self.gradient_squares, layer, 1, (num_kv_heads, self.group) if copied else None
            )
        flat = noun_attention(q_BHLD, k_BKLD, self.table, scale=scale, backend=self.backend, group=self.group)
        if self._open:
            self._maps[layer] = flat
        elif torch._C._current_graph_task_id() == -1:  # not a recomputation within the backward pass
            raise RuntimeError("the maps of this capture were read already: make a new one for every forward call")

    def maps(self) -> dict[int, Tensor]:
        """Flat fp32 maps by layer, after the forward; RuntimeError when a layer is missing or a training map has no
        gradient."""
        self._open = False
        if missing := [layer for layer in self.layers if layer not in self._maps]:
            raise RuntimeError(
                f"no attention map came from layers {missing} (seen: {sorted(self._maps)}): the model does not use the "
                "capture attention function, or has fewer layers; call register_capture(model), check the layer list"
            )
        dead = [layer for layer, flat in self._maps.items() if not flat.requires_grad]
        if dead and not self.detach and torch.is_grad_enabled() and self.table.num_rows:
            raise RuntimeError(
                f"the maps of layers {dead} carry no gradient, so a loss on them would train nothing: activation "
                "checkpointing is reentrant, or nothing below these maps is trained (frozen parameters, no adapters); "
                'use gradient_checkpointing_enable({"use_reentrant": False}), train the attention projections, or take '
                "these layers out of the supervised ones"
            )
        return self._maps


class _GradientNorm(torch.autograd.Function):
    """Identity that notes the squared norm of the gradient passing through: on the map branch, that of the mask loss
    alone. Of heads that are copies on several ranks, `copied` from so many in a group, it is the norm of the sum."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, store: dict[int, Tensor], layer: int, slot: int, copied: Any = None) -> Tensor:
        ctx.store, ctx.layer, ctx.slot, ctx.copied = store, layer, slot, copied
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        squares = ctx.store.setdefault(ctx.layer, grad.new_zeros(2, dtype=torch.float32))
        whole = add_copies(grad, *ctx.copied) if ctx.copied else grad
        squares[ctx.slot] = whole.float().square().sum()
        return grad, None, None, None, None


class _View:
    """An object with some attributes replaced."""

    def __init__(self, wrapped: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _wrapped=wrapped)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def register_capture(model: PreTrainedModel) -> str:
    """Point the text layers of `model` at a capturing copy of their attention backend and return its registered
    name."""
    base = model.config.get_text_config()._attn_implementation
    if base.startswith("swim_"):
        return base
    if base == "eager":
        raise ValueError(
            "eager attention is not a registered function that could be wrapped; load the model with 'sdpa'"
        )
    # The name keeps the base's: transformers chooses mask forms and cu_seqlens by the word "flash" in it.
    name = f"swim_{base}"
    flash = "flash" in base

    def capture_attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        capture: Capture | None = kwargs.pop(MODEL_KWARG, None)
        layer: Any = module.layer_idx
        group = capture.group if capture is not None else None
        kv_heads = key.shape[1]
        if group is not None:
            query, key, value = (gather_columns(x, group) for x in (query, key, value))
        if capture is not None and layer in capture.layers:
            scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
            capture.observe(layer, query, key, scale, num_kv_heads=kv_heads)
        # Looked up at call time, so that a backend registered or replaced later is the one that runs.
        function = ALL_ATTENTION_FUNCTIONS[base]
        # transformers' flash function imports its kernels by the name in the module's config, where ours now stands.
        caller: Any = _View(module, config=_View(module.config, _attn_implementation=base)) if flash else module
        if group is not None:
            caller = _View(caller, num_key_value_groups=query.shape[1] // key.shape[1])
        if capture is None or capture.layout is None:
            return function(caller, query, key, value, attention_mask, **kwargs)
        kwargs.pop("is_causal", None)
        layout, cache = capture.layout, capture.layout_cache
        output = attend(function, caller, query, key, value, layout, flash=flash, cache=cache, **kwargs)
        return output if group is None else gather_heads(output, group), None

    AttentionInterface.register(name, capture_attention)
    # Without a mask function of the same name transformers passes no mask at all and padding is attended silently.
    AttentionMaskInterface.register(name, AttentionMaskInterface()[base])
    text = model.config.get_text_config()
    key = next((key for key in model.config.sub_configs if getattr(model.config, key) is text), None)
    model.set_attn_implementation({key: name} if key else name)  # the vision tower keeps its own backend
    return name


def shard_text_model(model: PreTrainedModel) -> None:
    """Let the text model of `model` work on this rank's columns in calls whose Capture has a group; once."""

    def shard(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:  # noqa: ARG001
        capture: Capture | None = kwargs.get(MODEL_KWARG)
        return None if capture is None or capture.group is None else (args, own_inputs(kwargs, capture.group))

    model.get_decoder().register_forward_pre_hook(shard, with_kwargs=True)


def enable_checkpointing(model: PreTrainedModel, *, every: int = 1, reentrant: bool = False) -> None:
    """Switch activation checkpointing on for every so-manieth layer of the model; non-reentrant, because reentrant
    recomputation cuts the maps off the graph."""
    # transformers 5.23 renamed the method and deprecates the old name; 5.17 knows only the old one.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": reentrant})
    # What transformers 5.23 calls every_n_layers and 5.17 has not.
    layers = (module for module in model.modules() if isinstance(module, GradientCheckpointingLayer))
    for number, layer in enumerate(layers):
        layer.gradient_checkpointing = number % every == 0
    if not reentrant:
        # Only reentrant recomputation needs inputs that require a gradient. They would have it passed back through a
        # frozen vision tower, for nothing.
        model.disable_input_require_grads()
