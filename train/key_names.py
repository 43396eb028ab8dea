"""Names of weights in the files of published models, which are not those of the parameters in transformers 5.

The hub's files keep the names of the code they were first written by. transformers 5 renames while it loads; its
class-level table is empty, and other programs that read the files (vLLM, SGLang) know the published names. So the
export writes whatever names its base has; this table says which parameter each of them is. A test checks every layout
against a stock load.
"""

import re

_QWEN = (
    (re.compile(r"^visual\."), "model.visual."),
    (re.compile(r"^model\.(?!language_model\.|visual\.)"), "model.language_model."),
)
_LLAVA = (
    (re.compile(r"^language_model\.lm_head\."), "lm_head."),
    (re.compile(r"^language_model\.model\."), "model.language_model."),
    (re.compile(r"^(model\.)?vision_tower\.(vision_model\.)?"), "model.vision_tower."),
    (re.compile(r"^(multi_modal_projector\.|image_newline$)"), r"model.\1"),
)
_RULES = {
    "qwen2_vl": _QWEN,
    "qwen2_5_vl": _QWEN,
    "qwen3_vl": (),
    "llava_onevision": _LLAVA,
    "internvl": _LLAVA,
}


def parameter_name(model_type: str, stored: str) -> str:
    """Name of the parameter that a weight file of this family calls `stored`; parameters' own names stay."""
    for pattern, replacement in _RULES[model_type]:
        if pattern.match(stored):
            return pattern.sub(replacement, stored, count=1)
    return stored
