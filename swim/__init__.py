"""Fine-grained video understanding by attention supervision (SWIM, arXiv 2605.18018) on stock transformers models."""

__version__ = "0.1.0"
