"""Command lines that serve an exported folder, with frames and pixels pinned to those of the run.

Left to themselves the servers sample otherwise than training did: vLLM takes 32 frames of every video, and both read
the pixel budget of the base's processor file.
"""

import json
import shlex
from pathlib import Path
from typing import Any

from swim.train.config import Config


def serve_lines(config: Config, model_type: str, folder: Path, base: str | None) -> list[str]:
    """Lines for vLLM and SGLang; `base` is given for a folder that holds adapters alone."""
    data = config.data
    budget: dict[str, Any] = {"min_pixels": data.min_pixels, "max_pixels": data.max_pixels}
    if model_type == "qwen3_vl":  # its budget is a clip's
        edges = {"shortest_edge": data.num_frames * data.min_pixels, "longest_edge": data.num_frames * data.max_pixels}
        budget = {"size": edges}
    pixels = budget if model_type.startswith("qwen") else {}  # the others know one size
    rate = {"fps": data.fps} if data.frame_sampling == "fps" else {}
    model, dtype = base or str(folder), config.model.dtype
    vllm: list[Any] = ["vllm", "serve", model, "--dtype", dtype, "--limit-mm-per-prompt", {"video": 1}]
    vllm += ["--media-io-kwargs", {"video": {"num_frames": data.num_frames, **rate}}]
    vllm += ["--mm-processor-kwargs", pixels] if pixels else []
    frames = {"fps": data.fps, "max_frames": data.num_frames} if rate else {"nframes": data.num_frames}
    sglang: list[Any] = ["python", "-m", "sglang.launch_server", "--model-path", model, "--dtype", dtype]
    sglang += ["--mm-process-config", {"video": {**frames, **pixels}}]
    if base is not None:
        rank = config.model.lora.rank if config.model.lora else 0
        vllm += ["--enable-lora", "--max-lora-rank", str(rank), "--lora-modules", f"swim={folder}"]
        sglang += ["--enable-lora", "--lora-paths", f"swim={folder}"]
    return [shlex.join(part if isinstance(part, str) else json.dumps(part) for part in line) for line in (vllm, sglang)]


def traps(config: Config) -> list[str]:
    """What the lines cannot pin, one sentence each."""
    said = [
        "vLLM samples with both ends of the clip, training the middles of equal segments: for the same frames, sample "
        'in the client, send them as one video, and set "num_frames": -1.'
    ]
    if config.data.frame_sampling == "annotated":
        said.append("The run moved frames to annotated ones, which a served video does not have.")
    said.append(
        "Qwen2.5-VL's positions in time follow the seconds between sampled frames; a server that is not told them "
        "assumes 2 frames per second."
    )
    return said
