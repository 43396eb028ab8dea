"""Tokenizers: a pretrained one from its folder, or a small byte-level BPE with the control tokens of a model family
for models built from a config."""

from typing import Any, NamedTuple

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from swim.data_tools import synth
from swim.train.config import TokenizerConfig

CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Words with their leading space, numbers, punctuation and line breaks never share a token, as in Qwen's vocabulary.
_PIECES = Regex(r" ?\p{L}[\p{L}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'video' %}VIDEO"
    "{% elif part['type'] == 'image' %}IMAGE"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Style(NamedTuple):
    """What a family adds to Qwen's language: what the template writes, control tokens, config fields that name them."""

    video: str
    image: str
    tokens: tuple[str, ...]
    fields: dict[str, str]


_QWEN = _Style(
    "<|vision_start|><|video_pad|><|vision_end|>",
    "<|vision_start|><|image_pad|><|vision_end|>",
    (),
    {
        "video_token_id": "<|video_pad|>",
        "image_token_id": "<|image_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    },
)
_STYLES = {
    "llava_onevision": _Style(
        "<video>\n",
        "<image>\n",
        ("<image>", "<video>"),
        {"video_token_index": "<video>", "image_token_index": "<image>"},
    ),
    "internvl": _Style(
        "<video>\n",
        "<IMG_CONTEXT>\n",
        ("<img>", "</img>", "<IMG_CONTEXT>", "<video>"),
        {"image_token_id": "<IMG_CONTEXT>"},
    ),
}


def load_tokenizer(path: str) -> PreTrainedTokenizerFast:
    """Tokenizer of a pretrained model; ValueError if it has no chat template."""
    tokenizer: Any = AutoTokenizer.from_pretrained(path)
    if tokenizer.chat_template is None:
        raise ValueError(
            f"{path}: the tokenizer has no chat template; add the model's chat_template.jinja to its folder"
        )
    return tokenizer


def train_tokenizer(config: TokenizerConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `vocab_size` entries on the corpus; the same one in every process."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(_PIECES, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["user", "assistant", "system", *synth.corpus()], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=_template(_QWEN),
        clean_up_tokenization_spaces=False,
    )


def adopt_family(tokenizer: PreTrainedTokenizerFast, model_type: str) -> None:
    """Give a trained tokenizer what `model_type` needs beyond Qwen-VL's control tokens and chat template."""
    if (style := _STYLES.get(model_type)) is not None:
        tokens = [AddedToken(token, normalized=False, special=True) for token in style.tokens]
        tokenizer.add_tokens(tokens, special_tokens=True)
        tokenizer.chat_template = _template(style)


def control_token_fields(tokenizer: PreTrainedTokenizerFast, model_type: str = "qwen2_5_vl") -> dict[str, Any]:
    """The config fields of a model that name control tokens, with this tokenizer's ids."""
    fields = _STYLES.get(model_type, _QWEN).fields
    return {field: tokenizer.convert_tokens_to_ids(token) for field, token in fields.items()}


def _template(style: _Style) -> str:
    return _CHAT_TEMPLATE.replace("VIDEO", style.video).replace("IMAGE", style.image)
