"""Fields of the `system:` section for SWIM (arXiv 2605.18018)."""

from typing import Literal

from pydantic import Field, model_validator

from swim.train.config import Section


class Config(Section):
    """Which attention is supervised, against what, and how much."""

    layers: list[int] = Field(min_length=1)
    """Supervised decoder layers, 0-based (the paper's six of 28: 2, 7, 12, 17, 22, 27)."""
    softmax_scope: Literal["frame", "clip"] = "frame"
    """Keys that share one softmax: those of a temporal step (the paper's) or all of the clip."""
    loss: Literal["kl", "bce"] = "kl"
    """Mask loss on the token grid; provisional until ablated at scale (the paper's is bce)."""
    text_weight: float = Field(1.0, ge=0)
    """Weight of the answer tokens' mean cross-entropy."""
    mask_weight: float = Field(1.0, ge=0)
    """Weight of the nouns' mean mask loss; 0 is plain fine-tuning, with the mask loss still measured."""
    gradient_every: int = Field(10, ge=0)
    """Steps between measurements of the mask loss's own gradient at q and k; 0 never measures."""

    @model_validator(mode="after")
    def _something_to_train(self) -> "Config":
        if self.text_weight == 0 and self.mask_weight == 0:
            raise ValueError("system.text_weight and system.mask_weight are both 0: nothing would be trained")
        return self
