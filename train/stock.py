"""The stock model of a run: tokenizer and config, pretrained or from the recipe, and the model made ready to train.

Everything a system needs before its own work starts; no system is named here.
"""

import difflib
import re
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig

from swim.train.attention import enable_checkpointing, register_capture
from swim.train.config import ConfigError, ModelConfig
from swim.train.families import FAMILIES
from swim.train.liger import apply_liger, wants_liger
from swim.train.lora import add_lora
from swim.train.tokenizer import adopt_family, control_token_fields, load_tokenizer, train_tokenizer


def tokenizer_and_config(source: ModelConfig) -> tuple[Any, Any]:
    """Tokenizer and transformers config of the model at `source.path`, or of the one that `source.config` describes."""
    if source.path is not None:
        return load_tokenizer(source.path), AutoConfig.from_pretrained(source.path)
    assert source.tokenizer is not None  # ModelConfig gives both or neither
    assert source.config is not None
    tokenizer = train_tokenizer(source.tokenizer)
    return tokenizer, _inline_config(source.config, tokenizer)


def greedy(tokens: int, *, pad: int, eos: int | None, suppress: list[int] | None = None) -> GenerationConfig:
    """Generation of the likeliest token each time, `tokens` of them at most, whatever the base's own config says."""
    # `generate` fills in what is None from the base's generation_config.json: Qwen2.5-VL's penalises repetition.
    return GenerationConfig(
        max_new_tokens=tokens,
        do_sample=False,
        num_beams=1,
        repetition_penalty=1.0,
        no_repeat_ngram_size=0,
        suppress_tokens=suppress,
        pad_token_id=pad,
        eos_token_id=eos,
    )


def build_stock_model(source: ModelConfig, config: Any, *, seed: int) -> nn.Module:
    """The model with attention capture registered, checkpointing, adapters and frozen parameters set.

    ConfigError for a freeze pattern or adapter targets that match nothing.
    """
    dtype = getattr(torch, source.dtype)
    attention = {"text_config": source.attention, "vision_config": source.attention}
    if source.path is not None:
        # safetensors only: other weight files are pickles, which run code when they are read
        model: Any = AutoModelForImageTextToText.from_pretrained(
            source.path, dtype=dtype, attn_implementation=attention, use_safetensors=True
        )
    else:
        torch.manual_seed(seed)
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype, attn_implementation=attention)
    register_capture(model)
    if wants_liger(source.liger):
        apply_liger(model)
    base = model
    if source.lora is not None:
        torch.manual_seed(seed)  # the adapters' first values, the same on every rank
        model = add_lora(model, source.lora)
    if source.checkpointing:
        # Behind peft, which would have inputs require gradients.
        enable_checkpointing(base, every=int(source.checkpointing))
    for pattern in source.freeze:
        matched = [p for name, p in model.named_parameters() if re.search(pattern, name)]
        if not matched:
            example = next(model.named_parameters())[0]
            raise ConfigError(f"model.freeze: {pattern!r} matches no parameter; names look like {example!r}")
        for parameter in matched:
            parameter.requires_grad_(False)
    return model


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Optimizer groups of the trained parameters: matrices decay, vectors do not."""
    # ZeRO-3 partitions are flat: the number of dimensions is that of the whole parameter.
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) > 1]
    vectors = [p for p in trained if len(getattr(p, "ds_shape", p.shape)) <= 1]
    groups = [
        {"params": matrices, "weight_decay": weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _inline_config(fields: dict[str, Any], tokenizer: Any) -> Any:
    """Config of a model with random weights that fits the tokenizer, to which its family's control tokens are added."""
    if (kind := fields.get("model_type")) not in FAMILIES:
        raise ConfigError(f"model.config.model_type: {kind!r} has no family adapter; there are: {', '.join(FAMILIES)}")
    adopt_family(tokenizer, kind)
    text, vision = (fields.get(part, {}) for part in ("text_config", "vision_config"))
    control = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(
        **{
            **fields,
            **control_token_fields(tokenizer, kind),
            "text_config": {**text, "vocab_size": len(tokenizer), **control},
            "vision_config": dict(vision),
        }
    )
    # The vision towers of Qwen-VL end at the text's width themselves; the others have a projector of its own.
    if width := {"qwen2_vl": "hidden_size", "qwen2_5_vl": "out_hidden_size", "qwen3_vl": "out_hidden_size"}.get(kind):
        setattr(config.vision_config, width, config.text_config.hidden_size)
    # transformers keeps whatever it is given: a misspelt key would silently leave the default.
    for where, given, section in (
        ("", fields, config),
        ("text_config.", text, config.text_config),
        ("vision_config.", vision, config.vision_config),
    ):
        known = set(type(section)().to_dict())
        for key in sorted(set(given) - known):
            near = difflib.get_close_matches(key, known, n=1, cutoff=0)
            raise ConfigError(f"model.config.{where}{key}: unknown key; did you mean {near[0]!r}?")
    return config
