"""Shards as a JSONL file beside loose videos, shared by tests."""

import json
from pathlib import Path
from typing import Any

from swim.data_tools.shards import ShardSet


def write_loose(folder: Path, shards: ShardSet, **changes: Any) -> Path:
    """The samples of `shards` as `mine.jsonl` with videos in `clips/`."""
    (folder / "clips").mkdir(parents=True)
    lines = []
    for number in range(len(shards)):
        sample = shards.read(number)
        (folder / "clips" / f"{sample.key}.mp4").write_bytes(sample.media())
        record = sample.record.model_dump(mode="json")
        masks = {name: {i: rle and rle.model_dump() for i, rle in f.items()} for name, f in sample.masks.items()}
        line = {name: record[name] for name in ("source", "license", "objects", "conversations")}
        lines.append({"key": sample.key, "video": f"clips/{sample.key}.mp4", "masks": masks} | line | changes)
    path = folder / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path
