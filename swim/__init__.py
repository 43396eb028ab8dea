"""Fine-grained video understanding by attention supervision (SWIM, arXiv 2605.18018) on stock transformers models.

Inside a training loop of your own: `register_capture(model)` once, `describe(model, inputs, nouns, layers=...)` per
batch, `mask_loss(supervision)` after the forward; `assert_supervised(loss, model)` in the first step. See
docs/supervision.md and examples/hf_trainer.py.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from swim.train.attention import register_capture
    from swim.train.library import NounTarget, Supervision, assert_supervised, describe, mask_loss

__version__ = "0.1.0"
__all__ = ["NounTarget", "Supervision", "assert_supervised", "describe", "mask_loss", "register_capture"]


def __getattr__(name: str) -> Any:
    # On first use: `import swim` alone takes no torch, which keeps the command line quick.
    if name == "register_capture":
        from swim.train.attention import register_capture

        return register_capture
    if name in __all__:
        from swim.train import library

        return getattr(library, name)
    raise AttributeError(f"module 'swim' has no attribute {name!r}")
