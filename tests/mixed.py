"""Data and models of the tests with several ranks."""

import json
from pathlib import Path

from processes import TINY
from tiny import family_config, make_data

from swim.data_tools.records import Conversation, Record, Turn
from swim.data_tools.shards import ShardWriter
from swim.train.config import load_config
from swim.train.system import build_system

# A key's bias has no gradient but rounding; Adam's own epsilon of 1e-8 would make steps of full length out of it.
EPSILON = 1e-6
# Every parameter is partitioned, none is kept whole on each rank for being small.
PARTITION_ALL = {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": False}


def make_mixed(folder: Path) -> Path:
    """Clips with very different numbers of nouns, records without any clip, and the models to start from."""
    make_data(folder / "clips", clips=6)
    with ShardWriter(folder / "text") as writer:
        for number in range(6):
            turns = [Turn(role="user", text="is a circle round ?"), Turn(role="assistant", text="yes")]
            record = Record(
                source="test",
                license="CC0-1.0",
                media=[],
                objects=[],
                conversations=[Conversation(task="text", turns=turns)],
            )
            writer.write(f"text_{number}", record, {}, {})
    base = load_config("tiny_cpu", ["data.synth=null"])
    system = build_system(base)
    system.build_model().save_pretrained(folder / "base")
    system.tokenizer.save_pretrained(folder / "base")
    for model_type in ("qwen2_vl", "qwen3_vl"):
        system = build_system(family_config(folder, model_type))
        system.build_model().save_pretrained(folder / model_type)
        system.tokenizer.save_pretrained(folder / model_type)
    adam = {"torch_adam": True, "eps": EPSILON}
    engine = {"zero_optimization": PARTITION_ALL, "optimizer": {"type": "AdamW", "params": adam}}
    (folder / "engine.json").write_text(json.dumps(engine))
    return folder


def arguments(mixed: Path, *overrides: str) -> list[str]:
    folders = f"data.train=[{mixed / 'clips'}, {mixed / 'text'}]"
    return [*TINY, folders, f"deepspeed={mixed / 'engine.json'}", *from_base(mixed), *overrides]


def from_base(mixed: Path) -> list[str]:
    # Loaded, not drawn: random numbers are drawn in another order when parameters are partitioned as they are made.
    return [f"model.path={mixed / 'base'}", "model.config=null", "model.tokenizer=null"]
