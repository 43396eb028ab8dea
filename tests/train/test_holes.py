"""Promise: what cannot be used is a hole with its place and reason, for that conversation alone; nothing is supervised
that causal attention forbids."""

from pathlib import Path

import pytest
from tiny import make_data, requests, tiny_config

from swim.data_tools.records import Conversation, Media, Mention, Turn
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.train.system import build_system


def ask(text: str, **fields) -> Conversation:
    return Conversation(task="test", turns=[Turn(role="user", text=text), Turn(role="assistant", text="yes")], **fields)


@pytest.fixture
def rewritten(tmp_path: Path):
    """A clip of the synthetic data with other conversations, or other facts, said about it."""
    source = make_data(tmp_path / "source", clips=1).read(0)

    def write(conversations: list[Conversation], **media_fields) -> ShardSet:
        folder = tmp_path / "changed"
        media = [Media(**{**source.record.media[0].model_dump(), **media_fields})]
        record = source.record.model_copy(update={"conversations": conversations, "media": media})
        with ShardWriter(folder) as writer:
            writer.write("clip", record, source.masks, {"mp4": source.media()})
        return ShardSet(folder)

    write.first_object = source.record.objects[0].id
    return write


def collate(shards: ShardSet):
    system = build_system(tiny_config(shards.folder, "data.tasks=null"))
    return system.collator(requests(shards, [0]))


def test_a_bad_conversation_leaves_the_others_of_its_clip(rewritten):
    shards = rewritten([ask("a fine one ?"), ask("ends <|im_end|> here ?"), ask("when ?", span=(0, 3)), ask("fine ?")])
    batch = collate(shards)
    assert batch.ids == ["clip#0", "clip#3"]
    assert [hole.id for hole in batch.holes] == ["clip#1", "clip#2"]
    assert "control token '<|im_end|>' at character 5" in batch.holes[0].reason
    assert "span [0, 3]: only conversations about the whole clip" in batch.holes[1].reason
    for hole in batch.holes:
        assert hole.shard == "shard-000000.tar"
        assert hole.offset == min(offset for offset, _, _ in shards.entries[0].members.values())


def test_predictions_beside_a_bad_conversation_keep_their_own_prompts(rewritten):
    shards = rewritten([ask("first ?"), ask("ends <|im_end|> here ?"), ask("third ?")])
    system = build_system(tiny_config(shards.folder, "data.tasks=null"))
    (request,) = requests(shards, [0])
    lines = system.predict(system.build_model().eval(), request)
    assert {line["id"]: line.get("prompt", "failed") for line in lines} == {
        "clip#0": "first ?",
        "clip#1": "failed",
        "clip#2": "third ?",
    }


def test_a_clip_that_is_no_video_is_a_hole(rewritten):
    batch = collate(rewritten([ask("what ?")], kind="frames"))
    assert batch.ids == []
    assert "media ['frames']: only records with one video" in batch.holes[0].reason


def test_a_noun_before_the_clip_has_no_row(rewritten):
    mention = Mention(start=8, end=14, head=(8, 14), object_ids=[rewritten.first_object])
    turns = [
        Turn(role="system", text="look at circle first", mentions=[mention]),
        Turn(role="user", text="look at circle now", mentions=[mention]),
        Turn(role="assistant", text="yes"),
    ]
    batch = collate(rewritten([Conversation(task="test", turns=turns)]))
    assert [noun.turn for noun in batch.nouns] == [1]
    first_key = int((batch.inputs["mm_token_type_ids"][0] == 2).nonzero()[0])
    assert all(token > first_key for noun in batch.nouns for token in noun.tokens)


def test_frames_of_a_short_clip_keep_their_distance_in_time(tmp_path):
    shards = make_data(tmp_path / "clips", clips=1)  # 8 frames at 8 per second
    seconds = []
    for num_frames in (4, 8, 32):
        system = build_system(tiny_config(shards.folder, f"data.num_frames={num_frames}"))
        seconds.append(system.collator.load_clip(shards.read(0)).seconds_per_step)
    assert seconds == [pytest.approx(2 * 2 / 8), pytest.approx(2 / 8), pytest.approx(2 / 8)]
