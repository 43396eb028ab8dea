"""Run as a program with a torchvision on PYTHONPATH: the real processors of model folders, on frames and a chat.

    python tests/train/stock_processor.py FOLDER...

Every folder holds `frames.npz` beside the model's files; what its processor makes of them goes to `stock.npz`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from stock_video_processor import _LIBRARY  # its import declares the operators that torchvision misses on CPU torch


def main(folders: list[str]) -> None:
    from transformers import AutoProcessor

    assert _LIBRARY is not None
    for folder in map(Path, folders):
        frames = np.load(folder / "frames.npz")["frames"]
        processor = AutoProcessor.from_pretrained(folder)
        parts = [{"type": "video"}, {"type": "text", "text": "What does the dog do?"}]
        text = processor.apply_chat_template([{"role": "user", "content": parts}], add_generation_prompt=True)
        made = processor(
            text=[text],
            videos=[torch.from_numpy(frames).permute(0, 3, 1, 2)],
            return_tensors="pt",
            do_sample_frames=False,
            video_metadata=[{"fps": 2.0, "total_num_frames": len(frames), "frames_indices": [*range(len(frames))]}],
        )
        np.savez(folder / "stock.npz", name=type(processor).__name__, **{k: np.asarray(v) for k, v in made.items()})


if __name__ == "__main__":
    main(sys.argv[1:])
