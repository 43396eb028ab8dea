"""Fields of the `system:` section for SWIM (arXiv 2605.18018), and the rules that name its layers."""

import re
from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from swim.kernels.backend import Backend
from swim.kernels.mask_loss import LossKind, MapScale
from swim.train.config import ConfigError, Section

Fusion = Literal["mean", "sum", "max", "product"]

_LAYER_RULE = re.compile(r"(even|last):([1-9][0-9]*)|all")


class Config(Section):
    """Which attention is supervised, against what, and how much."""

    layers: list[int] | str
    """Supervised decoder layers: a 0-based list, `even:N` (evenly spaced, ending at the last), `last:N` or `all`."""
    words: list[Literal["noun", "attribute"]] = Field(["noun"], min_length=1)
    """Kinds of mentions that are supervised; the method's are nouns, with attributes for comparison."""
    softmax_scope: Literal["frame", "clip", "causal", "full"] = "frame"
    """Keys that share one softmax: a temporal step's (the paper's), the clip's, the row's causal ones, or all."""
    row_offset: Literal[-1, 0] = 0
    """Row read for a noun's token: its own (0) or the one that predicts it (-1, the release's)."""
    subtokens: Literal["mean", "each", "last"] = "mean"
    """A noun of several tokens: mean of their maps, each a noun of its own (the release's), or the last token alone."""
    layer_fusion: Fusion = "mean"
    """How the layers' maps become one: mean (the paper's), sum, max or product (the release's; in the log domain)."""
    fused_norm: Literal["none", "clip"] = "none"
    """Whether the fused map is divided by its sum over the visual tokens of the clip (the release's)."""
    map_scale: MapScale = "none"
    """Scaling of every temporal step of the fused map: none, to [0, 1] (minmax, the release's), or to a peak of 1."""
    mask_side: Literal["grid", "pixel"] = "grid"
    """Where map meets mask: on cells with their mean coverage, or upsampled on each mask's own pixels (the paper's)."""
    loss: LossKind = "kl"
    """Mask loss; kl is provisional until ablated at scale (the paper's is bce)."""
    loss_mean: Literal["noun", "unit"] = "noun"
    """What weighs the same: every noun, or every temporal step (pixel side: frame) of every noun (the release's)."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of the answer tokens' mean cross-entropy."""
    mask_weight: float = Field(1.0, ge=0)
    """Weight of the mean mask loss; 0 is plain fine-tuning, with the mask loss still measured."""
    backend: Backend = "auto"
    """Implementation of maps and pixel-side loss: Triton on CUDA where it can and else torch (auto), or only one."""
    gradient_every: int = Field(10, ge=0)
    """Steps between measurements of the mask loss's own gradient at q and k; 0 never measures."""

    @field_validator("layers", mode="before")
    @classmethod
    def _list_or_rule(cls, value: Any) -> Any:
        # Before pydantic's own check, which would report a misspelt rule once per type it might have been.
        if isinstance(value, str) and _LAYER_RULE.fullmatch(value):
            return value
        # By type: a bool is an int too, but no layer.
        if isinstance(value, list | tuple) and value and all(type(layer) is int for layer in value):
            return list(value)
        raise ValueError("neither a list of layer numbers nor one of 'even:N', 'last:N' (N from 1), 'all'")

    @model_validator(mode="after")
    def _something_to_train(self) -> "Config":
        if self.text_weight == 0 and self.mask_weight == 0:
            raise ValueError("system.text_weight and system.mask_weight are both 0: nothing would be trained")
        return self

    @model_validator(mode="after")
    def _losses_that_mean_something(self) -> "Config":
        unscaled = self.map_scale == "none" and self.fused_norm == "none"
        if self.layer_fusion in ("sum", "product") and unscaled and self.loss != "kl":
            why = {
                "sum": "a sum of probabilities passes 1",
                "product": "a product of probabilities is 1e-13 and less, below what a mask of ones can reach",
            }[self.layer_fusion]
            raise ValueError(
                f"system.layer_fusion {self.layer_fusion!r} with system.loss {self.loss!r} needs a scale ({why}): set "
                "system.map_scale to 'minmax' or 'max', or system.fused_norm to 'clip', or system.loss to 'kl'"
            )
        if self.map_scale == "minmax" and self.loss == "kl":
            raise ValueError(
                "system.map_scale 'minmax' makes the smallest cell exactly 0, where system.loss 'kl' is infinite: set "
                "system.map_scale to 'none' or 'max', or choose another system.loss"
            )
        return self


def resolve_layers(layers: Sequence[int] | str, num_layers: int) -> tuple[int, ...]:
    """The layers that a list or a rule (`even:N`, `last:N`, `all`) names in a model of `num_layers`; ConfigError if it
    has not got them.

    `even:N` ends at the last layer and steps by num_layers / N, rounded, which gives the paper's six of 28.
    """
    if isinstance(layers, str):
        if not (match := _LAYER_RULE.fullmatch(layers)):
            raise ConfigError(f"system.layers: {layers!r} is no rule; use 'even:N', 'last:N' or 'all'")
        count = int(match[2] or num_layers)
        if count > num_layers:
            raise ConfigError(f"system.layers: {layers!r} wants more layers than the {num_layers} of this model")
        spread = (num_layers - 1) // (count - 1) if count > 1 else 1
        stride = min(round(num_layers / count), spread) if match[1] == "even" else 1
        return tuple(num_layers - 1 - stride * i for i in reversed(range(count)))
    if outside := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ConfigError(f"system.layers: {outside} are not layers of this model; it has 0 to {num_layers - 1}")
    if twice := sorted({layer for layer in layers if list(layers).count(layer) > 1}):
        raise ConfigError(f"system.layers: {twice} are named more than once; name each layer once")
    return tuple(layers)
