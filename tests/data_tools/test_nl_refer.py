"""NL-Refer records become checked samples; whatever is wrong with one of them costs that record only."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from footage import footage_dir
from pycocotools import mask as coco

from swim.data_tools.convert import Summary, convert
from swim.data_tools.records import RecordError
from swim.data_tools.rle import decode_mask, encode_mask
from swim.data_tools.shards import ShardSet
from swim.data_tools.sources.nl_refer import SOURCE, split_tags
from swim.data_tools.video import encode_video

LEFT, RIGHT = np.zeros((2, 32, 48), bool)
LEFT[4:20, 2:10], RIGHT[8:28, 30:40] = True, True
VIDEO = encode_video(np.full((6, 32, 48, 3), 90, np.uint8), 6)


def _segmentation(mask: np.ndarray, *, listed: bool = False) -> dict[str, Any]:
    rle = encode_mask(mask)
    if listed:
        flat = mask.ravel(order="F")
        edges = np.flatnonzero(np.diff(flat)) + 1
        rle["counts"] = np.diff([0, *edges, flat.size]).tolist()
    return {"segmentation": rle | {"size": list(rle["size"])}}


def _row(**changes: Any) -> dict[str, Any]:
    conversations = [
        {"from": "human", "value": "<video>\nWhere is the red <ins>cup</ins> ?"},
        {"from": "gpt", "value": "The cup is left of the <ins>ball</ins>."},
    ]
    annotation = [{"0": _segmentation(LEFT), "3": {"segmentation": None}}, {"5": _segmentation(RIGHT)}]
    return copy.deepcopy(
        {
            "index": "videorefer_detailed_caption_0",
            "video": "a.mp4",
            "conversations": conversations,
            "annotation": annotation,
        }
        | changes
    )


def _convert(folder: Path, *rows: dict[str, Any]) -> tuple[Summary, list[dict[str, Any]]]:
    (folder / "a.mp4").write_bytes(VIDEO)
    (folder / "rows.json").write_text(json.dumps(rows))
    summary = convert(SOURCE, [folder / "rows.json"], folder / "out", video_root=folder, license="CC0-1.0")
    return summary, [json.loads(line) for line in (folder / "out" / "skipped.jsonl").read_text().splitlines()]


def test_the_task_of_a_question_names_its_type(tmp_path: Path) -> None:
    # What Bench-Q is averaged over.
    row = {"video": "a.mp4", "Question": "Which <ins>cup</ins>?", "options": ["(A) red", "(B) blue"], "Answer": "(B)",
           "annotation": [{"0": _segmentation(LEFT)}]}  # fmt: skip
    _convert(tmp_path, row, row | {"type": "Future Predictions"})
    shards = ShardSet(tmp_path / "out")
    tasks = {conversation.task for key in range(len(shards)) for conversation in shards.read(key).record.conversations}
    assert tasks == {"multiple_choice", "multiple_choice: Future Predictions"}


def test_a_record_becomes_a_sample(tmp_path: Path) -> None:
    summary, skipped = _convert(tmp_path, _row())
    assert (summary, skipped) == (Summary(clips=1, kept=1, skipped=0), [])
    sample = ShardSet(tmp_path / "out").read(0)
    assert sample.key.startswith("a-")
    assert sample.media() == VIDEO, "bytes unchanged"
    (media,) = sample.record.media
    assert (media.height, media.width, media.num_frames, media.fps) == (32, 48, 6, 6)
    (conversation,) = sample.record.conversations
    assert (conversation.task, sample.record.license) == ("detailed_caption", "CC0-1.0")
    question, answer = conversation.turns
    assert (question.text, answer.text) == ("Where is the red cup ?", "The cup is left of the ball.")
    nouns = [
        (turn.text[mention.start : mention.end], turn.text[slice(*mention.head)], mention.object_ids)
        for turn in (question, answer)
        for mention in turn.mentions
    ]
    assert nouns == [("cup", "cup", ["0"]), ("ball", "ball", ["1"])], "the k-th tag is the k-th object"
    assert answer.mentions[0].start == 23, "the untagged cup before it takes no mention"
    assert [thing.label for thing in sample.record.objects] == ["cup", "ball"]
    np.testing.assert_array_equal(decode_mask(sample.masks["0"][0]), LEFT)
    assert sample.masks["0"][3] is None, "null is annotated as absent"
    assert sorted(sample.masks["0"]) == [0, 3], "other frames are not annotated"


def test_records_of_one_video_share_a_sample_and_objects(tmp_path: Path) -> None:
    one = {"annotation": [{"5": _segmentation(RIGHT)}, {"1": {"segmentation": None}}], "index": "short_caption_1"}
    summary, _ = _convert(tmp_path, _row(), _row(**one), _row(**one | {"index": "qa_2"}))
    assert summary == Summary(clips=1, kept=3, skipped=0)
    sample = ShardSet(tmp_path / "out").read(0)
    assert [item.task for item in sample.record.conversations] == ["detailed_caption", "short_caption", "qa"]
    ids = [
        [mention.object_ids for turn in item.turns for mention in turn.mentions] for item in sample.record.conversations
    ]
    assert ids[0] == [["0"], ["1"]]
    assert ids[1][0] == ids[2][0] == ["1"], "equal masks are one object"
    assert ids[1][1] != ids[2][1], "nothing says that two absent objects are the same"


def test_counts_may_be_lists(tmp_path: Path) -> None:
    listed = _segmentation(RIGHT, listed=True)
    assert coco.decode(coco.frPyObjects(listed["segmentation"], 32, 48)).sum() == RIGHT.sum()
    _convert(tmp_path, _row(annotation=[{"0": listed}, {"0": _segmentation(LEFT)}]))
    masks = ShardSet(tmp_path / "out").read(0).masks
    np.testing.assert_array_equal(decode_mask(masks["0"][0]), RIGHT)
    assert masks["0"][0].size == (32, 48)


def test_without_annotation_the_text_stays_and_mentions_go(tmp_path: Path) -> None:
    assert _convert(tmp_path, _row(annotation=[]))[0].kept == 1
    sample = ShardSet(tmp_path / "out").read(0)
    turns = sample.record.conversations[0].turns
    assert [turn.text for turn in turns] == ["Where is the red cup ?", "The cup is left of the ball."]
    assert not any(turn.mentions for turn in turns)


def _turns(question: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "Yes."}]


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "more tags than objects": (
        {"annotation": [{}]},
        r"annotation: 2 <ins> tags but 1 objects; give one object",
    ),
    "unbalanced": (
        {"conversations": _turns("the <ins>cup ?")},
        r"\[0\]: the last '<ins>' has no '</ins>'; write",
    ),
    "nested": ({"conversations": _turns("<ins>a <ins>b</ins></ins>")}, r"'<ins>' at character 7 has no partner; write"),
    "empty tag": ({"conversations": _turns("<ins> </ins> ?")}, r"\[0\]: the tag that ends at character 12 encloses"),
    "late frame": ({"annotation": [{"6": {"segmentation": None}}, {}]}, r"frame 6 is outside the clip; .*0 to 5"),
    "frame name": ({"annotation": [{"first": {}}, {}]}, r"annotation\[0\]: 'first' is not a frame number; number"),
    "bare rle": ({"annotation": [{"0": [1, 2]}, {}]}, r"annotation\[0\]\[0\]: \[1, 2\] is not \{segmentation: RLE\}"),
    "list sum": (
        {"annotation": [{"0": {"segmentation": {"size": [32, 48], "counts": [3, 4]}}}, {}]},
        r"annotation\[0\]\[0\]: the runs sum to 7, but 32 x 48 is 1536; size and counts",
    ),
    "list of words": (
        {"annotation": [{"0": {"segmentation": {"size": [32, 48], "counts": ["a"]}}}, {}]},
        r"counts \['a'\] hold other things than pixel numbers; encode the mask again",
    ),
    "string sum": (
        {"annotation": [{"0": {"segmentation": {"size": [32, 48], "counts": "0:"}}}, {}]},
        r"the runs sum to 10, but 32 x 48 is 1536",
    ),
    "swapped size": (
        {"annotation": [{"0": _segmentation(LEFT.T)}, {}]},
        r"size 48x32 has another shape than the media's 32x48; give size as",
    ),
    "role": ({"conversations": [{"from": "user", "value": "x"}]}, r"conversations\[0\]: .*'user'.*is not .*human"),
    "no answer": ({"conversations": _turns("a")[:1], "annotation": []}, r"the last turn is 'user'; end with"),
    "no turns": ({"conversations": None}, r"conversations\[0\].turns: .*at least 1 item"),
    "annotation form": ({"annotation": {"0": {}}}, r"annotation: .* is not a list; correct it"),
    "missing video": ({"video": "b.mp4"}, r"video: .*b.mp4 cannot be read .*check --video-root"),
    "no video": ({"video": None}, r"video: None is not a file name; name the clip's video"),
    "outside": ({"video": "../b.mp4"}, r"video: '../b.mp4' lies outside .*choose another --video-root"),
    "not a video": ({"video": "rows.json"}, r"video: .*rows.json: .*no video stream in it; give a video file"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_record_is_listed_and_the_rest_is_kept(tmp_path: Path, name: str) -> None:
    changes, message = BAD_ROWS[name]
    summary, skipped = _convert(tmp_path, _row(), _row(index="qa_bad", **changes), _row(index="qa_last"))
    assert summary == Summary(clips=1, kept=2, skipped=1)
    assert [(line["number"], line["index"]) for line in skipped] == [(1, "qa_bad")]
    with pytest.raises(RecordError, match=rf"^record 'qa_bad', .*{message}"):
        raise RecordError(skipped[0]["reason"])
    assert [item.task for item in ShardSet(tmp_path / "out").read(0).record.conversations] == ["detailed_caption", "qa"]


@pytest.mark.parametrize(
    ("text", "message"), [("{", r"not JSON .*; give one"), ("{}", r"holds dict; give one JSON array")]
)
def test_other_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(RecordError, match=rf"x.json: {message}"):
        convert(SOURCE, [tmp_path / "x.json"], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tags_leave_spaces_outside_the_noun() -> None:
    assert split_tags("a<ins> red ball </ins>b <ins>c</ins>") == ("a red ball b c", [(2, 10), (13, 14)])
    assert split_tags("plain") == ("plain", [])
    with pytest.raises(ValueError, match=r"'</ins>' at character 1 has no partner"):
        split_tags("a</ins>")


def test_real_footage_converts(tmp_path: Path) -> None:
    folder = footage_dir()
    summary = convert(SOURCE, [folder / "nl_refer_footage.json"], tmp_path)
    assert summary == Summary(clips=2, kept=4, skipped=0)
    shards = ShardSet(tmp_path)
    cups = next(shards.read(key) for key in shards.keys() if key.startswith("cups"))  # noqa: SIM118
    assert len(cups.record.conversations) == 3
    ball = next(thing.id for thing in cups.record.objects if thing.label == "ball")
    assert sum(rle is None for rle in cups.masks[ball].values()) == 53
    assert cups.media() == (folder / "cups.mp4").read_bytes()
