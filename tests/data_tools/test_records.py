"""Every way in which a record can be wrong is refused with the record, the field, the value and the remedy."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from swim.data_tools import records
from swim.data_tools.records import RecordError, Rle, masks_json, parse_sample, record_schema
from swim.data_tools.rle import encode_mask

MASK = encode_mask(np.eye(24, dtype=bool))


def _record() -> dict[str, Any]:
    mention = {"start": 4, "end": 12, "head": [8, 12], "object_ids": ["ball"]}
    turns = [
        {"role": "user", "text": "the red ball ?", "mentions": [mention]},
        {"role": "assistant", "text": "it rolls ."},
    ]
    media = {"member": "mp4", "kind": "video", "height": 48, "width": 48, "num_frames": 5, "fps": 6}
    return {
        "version": 1,
        "source": "test",
        "license": "CC0-1.0",
        "media": [media],
        "objects": [{"id": "ball", "label": "red ball", "boxes": {"2": [1, 2, 3, 4]}}],
        "conversations": [{"task": "describe", "span": [0, 4], "turns": turns}],
    }


def test_a_good_sample_comes_back_equal() -> None:
    masks = {"ball": {"0": MASK, "3": None}}
    record, parsed = parse_sample("clip-1", json.dumps(_record()).encode(), json.dumps(masks).encode())
    assert parsed["ball"] == {0: Rle(**MASK), 3: None}
    assert record.conversations[0].turns[0].mentions[0].kind == "noun"
    assert parse_sample("clip-1", record.model_dump_json().encode(), masks_json(parsed)) == (record, parsed)
    assert parse_sample("clip-1", _record(), None) == (record, {})


def test_text_only_records_need_no_media() -> None:
    values = _record() | {"media": [], "objects": []}
    values["conversations"][0].update(span=None, turns=[{"role": "assistant", "text": "hello"}])
    values["conversations"][0]["turns"].insert(0, {"role": "user", "text": "hello ?"})
    values["conversations"][0]["turns"].insert(0, {"role": "system", "text": "be short"})
    assert parse_sample("k", values, None)[0].media == []


MENTION = ("conversations", 0, "turns", 0, "mentions", 0)
TURN = ("conversations", 0, "turns", 0)
BAD_FIELDS: dict[str, tuple[tuple[str | int, ...], Any, str]] = {
    "unknown key": ((*MENTION, "heads"), [0, 1], r"mentions\[0\].heads: unknown key 'heads'; did you mean 'head'"),
    "unknown top key": (("licence",), "x", r"licence: unknown key 'licence'; did you mean 'license'"),
    "unknown media key": (("media", 0, "frames"), 5, r"media\[0\].frames: unknown key.*did you mean 'num_frames'"),
    "wrong type": (("media", 0, "fps"), "fast", r"media\[0\].fps: .*number.*got 'fast'; write it as record.schema"),
    "no frames": (("media", 0, "num_frames"), 0, r"media\[0\].num_frames: .*greater than or equal to 1, got 0"),
    "nan": (("media", 0, "fps"), float("nan"), r"media\[0\].fps: .*finite.*got nan"),
    "version": (("version",), 2, r"version: Input should be 1, got 2"),
    "two places": (("media", 0, "path"), "a.mp4", r"media\[0\]: .*exactly one of 'member' and 'path'"),
    "member is json": (("media", 0, "member"), "json", r"media\[0\]: .*'json' is not a media suffix"),
    "frame map": (("media", 0, "frame_map"), [0, 4], r"frame_map: 2 entries for 5 frames; give one source frame"),
    "mention end": ((*MENTION, "end"), 15, r"mentions\[0\]: characters 4 to 15 .*text, which has 14; give offsets"),
    "mention empty": ((*MENTION, "start"), 12, r"mentions\[0\]: characters 12 to 12 .*has 14; give offsets"),
    "head outside": ((*MENTION, "head"), [0, 3], r"head: \[0, 3\] does not lie inside the mention \[4, 12\]; give"),
    "head empty": ((*MENTION, "head"), [8, 8], r"head: \[8, 8\] covers only ''; let the head cover"),
    "head of spaces": ((*MENTION, "head"), [7, 8], r"head: \[7, 8\] covers only ' '; let the head cover"),
    "mentioned object": ((*MENTION, "object_ids"), ["cup"], r"object_ids: object id 'cup' is not among .*'ball'.*list"),
    "tag": ((*TURN, "text"), "the <ins>ball</ins>", r"turns\[0\].text: the text holds a tag .*strip tags"),
    "twice": (("objects",), [{"id": "a", "label": ""}] * 2, r"objects\[1\].id: 'a' is already .*ids are unique"),
    "box frame": (("objects", 0, "boxes"), {"5": [0, 0, 1, 1]}, r"boxes: frame 5 is outside .*frames 0 to 4"),
    "box order": (("objects", 0, "boxes"), {"1": [3, 0, 1, 1]}, r"boxes\[1\]: .*ends before it starts; write \[x0"),
    "span": (("conversations", 0, "span"), [2, 5], r"span: \[2, 5\] is not .*frames 0 to 4, number frames by"),
    "span reversed": (("conversations", 0, "span"), [3, 2], r"span: \[3, 2\] is not .*frames 0 to 4"),
    "first role": ((*TURN, "role"), "assistant", r"turns\[0\].role: 'assistant' where 'user' is due; .*alternate"),
    "last role": (("conversations", 0, "turns", 1, "role"), "user", r"turns\[1\].role: 'user' where 'assistant' is"),
    "no turns": (("conversations", 0, "turns"), [], r"conversations\[0\].turns: .*at least 1 item"),
}


@pytest.mark.parametrize("name", BAD_FIELDS)
def test_bad_fields_are_refused(name: str) -> None:
    path, value, message = BAD_FIELDS[name]
    record = _record()
    place = record
    for part in path[:-1]:
        place = place[part]  # type: ignore[index]
    place[path[-1]] = value  # type: ignore[index]
    with pytest.raises(RecordError, match=rf"^record 'clip_7', .*{message}"):
        parse_sample("clip_7", record, None)


def test_a_conversation_ends_with_the_assistant() -> None:
    record = _record()
    del record["conversations"][0]["turns"][1]
    with pytest.raises(RecordError, match=r"record 'k', .*turns\[0\].role: the last turn is 'user'; end with"):
        parse_sample("k", record, None)


BAD_MASKS: dict[str, tuple[Any, str]] = {
    "object": ({"cup": {}}, r"masks.cup: object id 'cup' is not among objects \['ball'\]; list it"),
    "frame": ({"ball": {"5": None}}, r"masks.ball\[5\]: frame 5 is outside the clip; .*0 to 4"),
    "negative frame": ({"ball": {"-1": MASK}}, r"masks.ball\[-1\]: frame -1 is outside the clip"),
    "no frame": ({"ball": {"x": None}}, r"masks.ball.x.*: .*valid integer"),
    "unknown key": ({"ball": {"0": MASK | {"count": ""}}}, r"masks.ball.*count: unknown key .*did you mean 'counts'"),
    "sum": ({"ball": {"0": {"size": [24, 24], "counts": "0:"}}}, r"ball\[0\]: the runs sum to 10, but 24 x 24 is 576"),
    "alphabet": ({"ball": {"0": {"size": [24, 24], "counts": "0 "}}}, r"character ' ' at position 1.*encode .* again"),
    "huge": ({"ball": {"0": {"size": [10**6, 10**6], "counts": "0"}}}, r"size 1000000x1000000 .*1 to 16384 a side"),
    "shape": ({"ball": {"0": {"size": [1000, 24], "counts": "0"}}}, r"size 1000x24 has another shape .*48x48; give"),
    "long": ({"ball": {"0": {"size": [2, 2], "counts": "0" * 36}}}, r"36 characters of RLE for 2x2 pixels; encode"),
}


@pytest.mark.parametrize("name", BAD_MASKS)
def test_bad_masks_are_refused(name: str) -> None:
    masks, message = BAD_MASKS[name]
    with pytest.raises(RecordError, match=rf"^record 'clip_7', .*{message}"):
        parse_sample("clip_7", _record(), masks)


@pytest.mark.parametrize("key", ["a.b", "", "a/b", "x" * 81, "a b"])
def test_keys_are_file_name_stems(key: str) -> None:
    with pytest.raises(RecordError, match=r"key: .* is not 1 to 80 of .*; rename it \(no dots\)"):
        parse_sample(key, _record(), None)


def test_broken_json_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(RecordError, match=r"record 'k', JSON: Invalid JSON.*got b'\{\"version\"'"):
        parse_sample("k", b'{"version"', None)
    monkeypatch.setattr(records, "MAX_JSON_BYTES", 10)
    with pytest.raises(RecordError, match=r"record 'k', JSON: \d+ bytes, the limit is 10; split the clip"):
        parse_sample("k", json.dumps(_record()).encode(), None)


def test_the_schema_file_is_current() -> None:
    path = Path(records.__file__).with_name("record.schema.json")
    assert path.read_text() == record_schema(), "run: swim data schema > data_tools/record.schema.json"
    schema = json.loads(record_schema())
    assert {"version", "media", "objects", "conversations"} <= set(schema["$defs"]["Record"]["properties"])
    assert schema["$defs"]["Media"]["additionalProperties"] is False


def test_models_do_not_change_after_checking() -> None:
    record = parse_sample("k", copy.deepcopy(_record()), None)[0]
    with pytest.raises(ValueError, match="frozen"):
        record.source = "other"  # type: ignore[misc]
