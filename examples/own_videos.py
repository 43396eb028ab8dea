"""Videos and a JSONL line about each, as you might have them: what docs/first_run.md starts from.

    python examples/own_videos.py mine

writes mine/train.jsonl, mine/held_out.jsonl and their videos, here rendered ones. What a line holds: docs/data.md.
"""

import json
import sys
import tempfile
from pathlib import Path

from swim.data_tools.synth import synthesise

CLIPS = {"train": (60, 1), "held_out": (6, 2)}  # number, seed


def main(folder: Path) -> None:
    """Write both files into `folder`."""
    for name, (clips, seed) in CLIPS.items():
        (folder / name).mkdir(parents=True)
        with tempfile.TemporaryDirectory() as scratch:
            shards = synthesise(scratch, clips=clips, seed=seed)
            lines = []
            for sample in map(shards.read, range(clips)):
                path = Path(name) / f"{sample.key}.mp4"
                (folder / path).write_bytes(sample.media())
                record = sample.record.model_dump(mode="json", include={"objects", "conversations"})
                masks = {
                    thing: {frame: rle and rle.model_dump(mode="json") for frame, rle in frames.items()}
                    for thing, frames in sample.masks.items()
                }
                about = {"video": str(path), "source": "mine", "license": "CC0-1.0"}
                lines.append(json.dumps(about | record | {"masks": masks}) + "\n")
        (folder / f"{name}.jsonl").write_text("".join(lines))
        print(f"{clips} videos and {folder / f'{name}.jsonl'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
