"""Processor files of a model that has no published base to take them from, as data.

The stock processors cannot be made without torchvision, so their files are written field by field; where torchvision
works, tests/train/test_export.py makes the real ones of them and compares pixels and tokens.
"""

import json
from typing import Any

from swim.train.config import DataConfig
from swim.train.families import Family

# Processor, image processor and video processor, as transformers names them.
_CLASSES = {
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", "Qwen2VLVideoProcessor"),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", "Qwen3VLVideoProcessor"),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", "LlavaOnevisionVideoProcessor"),
    "internvl": ("InternVLProcessor", "GotOcr2ImageProcessor", "InternVLVideoProcessor"),
}


# What a processor asks of its tokenizer by name, where that is more than a vocabulary.
_TOKENS = {
    "internvl": {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
}


def tokenizer_fields(model_type: str) -> dict[str, Any]:
    """Fields of tokenizer_config.json beside those that the tokenizer writes itself."""
    return {"extra_special_tokens": _TOKENS[model_type]} if model_type in _TOKENS else {}


def processor_files(model_type: str, family: Family, data: DataConfig) -> dict[str, str]:
    """Text of preprocessor_config.json, video_preprocessor_config.json and processor_config.json."""
    processor, image, video = _CLASSES[model_type]
    shared = {"processor_class": processor, "do_convert_rgb": True, "do_resize": True, "do_rescale": True}
    shared |= {"do_normalize": True, "resample": 3, "rescale_factor": 1 / 255}
    qwen = "geometry" in vars(family)
    special = _qwen(model_type, family, data) if qwen else _square(model_type, family)
    image_fields, video_fields, processor_fields = special
    files = {
        "preprocessor_config.json": {**shared, "image_processor_type": image, **image_fields},
        "video_preprocessor_config.json": {**shared, "video_processor_type": video, **video_fields, **_sampling(data)},
        "processor_config.json": {"processor_class": processor, **processor_fields},
    }
    return {name: json.dumps(fields, indent=2, sort_keys=True) + "\n" for name, fields in files.items()}


def _qwen(model_type: str, family: Any, data: DataConfig) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Pixel budgets and patches; a frame's budget, which is a whole clip's for Qwen3-VL."""
    patches = family.geometry.model_dump()  # patch_size, merge_size, temporal_patch_size, image_mean, image_std
    frames = data.num_frames if model_type == "qwen3_vl" else 1
    image, video = (
        {**patches, "size": {"shortest_edge": count * data.min_pixels, "longest_edge": count * data.max_pixels}}
        for count in (1, frames)
    )
    return image, video, {}


def _square(model_type: str, family: Any) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Frames stretched to the vision tower's square; images are one such frame too."""
    mean, std = family.normalisation
    fields = {"image_mean": mean, "image_std": std, "size": {"height": family.side, "width": family.side}}
    if model_type == "internvl":
        return {**fields, "crop_to_patches": False}, fields, {"image_seq_length": family.cells**2}
    image = {**fields, "image_grid_pinpoints": [[family.side, family.side]]}
    extra = {"num_image_tokens": family.patches**2, "vision_feature_select_strategy": family.strategy}
    return image, fields, {**extra, "image_token": "<image>", "video_token": family.token}


def _sampling(data: DataConfig) -> dict[str, Any]:
    """How the stock video processor samples if it is asked to; nearest to the recipe, whose segments' middles it lacks.

    Whether it samples unasked stays the class's: callers that sample themselves would have it done twice.
    """
    if data.frame_sampling == "fps":
        return {"fps": data.fps, "min_frames": data.min_frames, "max_frames": data.num_frames}
    return {"num_frames": data.num_frames}
