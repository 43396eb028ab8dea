"""Synthetic clips are what their masks, labels and conversations say, pixel by pixel."""

import itertools
from pathlib import Path

import numpy as np
import pytest

from swim.data_tools.rle import decode_mask
from swim.data_tools.shards import Sample, ShardSet
from swim.data_tools.synth import COLOURS, DIRECTIONS, SHAPES, corpus, read_barcode, synthesise
from swim.data_tools.video import decode_frames


def _samples(folder: Path) -> list[Sample]:
    shards = ShardSet(folder)
    return [shards.read(i) for i in range(len(shards))]


def _names(sample: Sample) -> dict[str, tuple[str, str]]:
    return {thing.id: (thing.label.split()[0], thing.label.split()[1]) for thing in sample.record.objects}


def test_masks_match_the_decoded_pixels(synth_folder: Path) -> None:
    checked = 0
    for sample in _samples(synth_folder):
        frames = decode_frames(sample.media(), range(8)).astype(float)
        assert [read_barcode(frame) for frame in frames] == list(range(8))
        everywhere = np.zeros(frames.shape[:3], bool)
        for name, (colour, _) in _names(sample).items():
            assert sorted(sample.masks[name]) == list(range(8)), "every frame is annotated"
            for frame, rle in sample.masks[name].items():
                mask = decode_mask(rle) if rle is not None else np.zeros((112, 112), bool)
                assert not (mask & everywhere[frame]).any(), "what is visible of two objects does not overlap"
                everywhere[frame] |= mask
                if mask.sum() > 100:
                    checked += 1
                    distance = np.abs(frames[frame] - COLOURS[colour]).max(axis=2)
                    assert np.median(distance[mask]) < 40, "colours are over 100 apart; compression blurs edges"
        background = frames[:, 8:][~everywhere[:, 8:]]
        for colour in COLOURS.values():
            assert (np.abs(background - colour).max(axis=1) < 20).mean() < 0.01, "no object outside its mask"
    assert checked > 60


def test_answers_follow_from_the_masks(tmp_path: Path) -> None:
    asked = dict.fromkeys(("direction", "colour", "existence", "describe"), 0)
    synthesise(tmp_path, clips=12, seed=9, objects=1, frames=6, hidden=0)  # one object: nothing covers it
    for sample in _samples(tmp_path):
        ((name, (colour, shape)),) = _names(sample).items()
        masks = [decode_mask(rle) for rle in sample.masks[name].values() if rle is not None]
        assert len(masks) == 6
        first, last = (np.argwhere(mask).mean(axis=0)[::-1] for mask in (masks[0], masks[-1]))
        moved = last - first
        direction = max(DIRECTIONS, key=lambda word: float(np.dot(moved, DIRECTIONS[word])))
        assert np.abs(moved).max() > 20
        assert np.abs(moved).min() < 2, "straight"
        for conversation in sample.record.conversations:
            question, answer = conversation.turns
            asked[conversation.task] += 1
            if conversation.task == "direction":
                assert (question.text, answer.text) == (f"which way does the {colour} {shape} move ?", direction)
            elif conversation.task == "colour":
                assert (question.text, answer.text) == (f"what colour is the {shape} ?", colour)
            elif conversation.task == "describe":
                assert answer.text == f"the {colour} {shape} moves {direction} ."
            else:
                (mention,) = question.mentions
                there = question.text[mention.start : mention.end] == f"{colour} {shape}"
                assert answer.text == ("yes" if there else "no")
                assert mention.object_ids == ([name] if there else [])
    assert asked == {"direction": 12, "colour": 12, "existence": 24, "describe": 12}


def test_mentions_cover_their_nouns(synth_folder: Path) -> None:
    for sample in _samples(synth_folder):
        names = _names(sample)
        assert len({colour for colour, _ in names.values()}) == len({shape for _, shape in names.values()}) == 3
        for conversation in sample.record.conversations:
            assert conversation.turns[0].mentions, "every question has a noun"
            for turn in conversation.turns:
                for mention in turn.mentions:
                    noun, head = turn.text[mention.start : mention.end], turn.text[slice(*mention.head)]
                    assert noun.split()[-1] == head
                    assert head in SHAPES
                    for name in mention.object_ids:
                        assert noun in (names[name][1], " ".join(names[name]))


def test_clips_do_not_depend_on_how_many_there_are(synth_folder: Path, tmp_path: Path) -> None:
    few = synthesise(tmp_path, clips=2, seed=5, hidden=0.5)
    many = ShardSet(synth_folder)
    for i in range(2):
        assert few.read(i) == many.read(i)
        assert few.read(i).media() == many.read(i).media()
    first, second = few.read(0).masks, few.read(1).masks
    assert first != second


def test_hidden_objects_are_away_at_one_end(tmp_path: Path) -> None:
    away = synthesise(tmp_path / "a", clips=8, seed=2, objects=1, hidden=1.0)
    ends = set()
    for i in range(8):
        (frames,) = away.read(i).masks.values()
        shown = [frames[frame] is not None for frame in range(8)]
        runs = [(value, len(list(group))) for value, group in itertools.groupby(shown)]
        assert len(runs) == 2, "away once, for a prefix or a suffix"
        assert 4 <= sum(shown) < 8, "the motion can still be seen"
        ends.add(shown[0])
    assert ends == {True, False}
    never = synthesise(tmp_path / "b", clips=8, seed=2, objects=1, hidden=0.0)
    assert all(None not in frames.values() for i in range(8) for frames in never.read(i).masks.values())


def test_hard_clips_have_what_makes_them_hard(tmp_path: Path) -> None:
    """Scores must not saturate: distractors, occlusion, a camera that moves, late objects, 3 to 8 of them."""
    shards = synthesise(tmp_path / "hard", clips=24, seed=3, hard=True)
    counts, hidden, late, panned = set(), 0, 0, 0
    for i in range(len(shards)):
        sample = shards.read(i)
        names = list(_names(sample).values())
        counts.add(len(names))
        assert len(set(names)) == len(names), "a name is one object's"
        assert any(c == d or s == t for (c, s), (d, t) in itertools.combinations(names, 2)), "there is a distractor"
        frames = decode_frames(sample.media(), range(8)).astype(int)
        assert [read_barcode(frame) for frame in frames] == list(range(8))
        post = [np.nonzero(np.median(np.abs(frame[8:] - 50).max(axis=2), axis=0) < 20)[0] for frame in frames]
        assert all(8 <= len(columns) <= 24 for columns in post), "a post stands in front"
        panned += post[0][0] != post[-1][0]
        for of_object in sample.masks.values():
            masks = [None if rle is None else decode_mask(rle) for rle in of_object.values()]
            late += any(mask is None for mask in masks)
            for mask, columns in zip(masks, post):
                assert mask is None or not mask[:, columns[1:-1]].any(), "nothing is seen through the post"
            areas = [mask.sum() for mask in masks if mask is not None]
            hidden += bool(areas) and min(areas) < 0.6 * max(areas)
        for talk in sample.record.conversations:
            noun, *rest = talk.turns[0].mentions
            assert noun.kind == "noun"
            assert all(mention.kind == "attribute" for mention in rest)
            asked = talk.turns[0].text[noun.start : noun.end].split()
            assert len(rest) == len(asked) - 1, "colour words are mentions of their own"
            assert all(talk.turns[0].text[m.start : m.end] == asked[0] for m in rest)
            assert all(sum(map(bool, sample.masks[name].values())) > 1 for name in noun.object_ids), "it can be seen"
            if talk.task == "colour":
                assert [shape for _, shape in names].count(asked[0]) == 1, "one answer is right"
    assert counts >= {3, 8}
    assert min(hidden, late) > 20
    assert panned > 8


def test_a_share_of_the_clips_is_annotated(tmp_path: Path) -> None:
    for share in (0.125, 0.5):
        some = synthesise(tmp_path / str(share), clips=16, seed=1, size=56, frames=2, annotated=share)
        whole = [i for i in range(16) if some.read(i).masks]
        assert len(whole) == 16 * share
        assert max(whole) > 7, "spread over the clips"


@pytest.mark.parametrize("size", [56, 112, 224])
def test_the_barcode_survives_at_every_size(tmp_path: Path, size: int) -> None:
    shards = synthesise(tmp_path, clips=1, seed=size, size=size, frames=20, objects=6)
    frames = decode_frames(shards.read(0).media(), range(20))
    assert [read_barcode(frame) for frame in frames] == list(range(20))
    masks = [decode_mask(rle) for frames in shards.read(0).masks.values() for rle in frames.values() if rle is not None]
    assert not any(mask[: size // 14].any() for mask in masks), "objects never enter the strip"
    widest = max(max(np.ptp(np.nonzero(mask), axis=1)) for mask in masks) + 1
    assert size * 20 / 112 < widest <= size * 33 / 112


def test_the_barcode_reads_every_number() -> None:
    for number in (0, 1, 511, 512, 682, 1023):
        frame = np.zeros((112, 112, 3), np.uint8)
        frame[:8, :80] = np.repeat((number >> np.arange(10) & 1) * 255, 8)[None, :, None]
        assert read_barcode(frame) == number


def test_the_corpus_holds_every_sentence(synth_folder: Path) -> None:
    known = set(corpus())
    said = {turn.text for item in _samples(synth_folder) for talk in item.record.conversations for turn in talk.turns}
    assert len(said) > 30
    assert said <= known


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 42}, "size 42: must be even and at least 56"),
        ({"frames": 1}, "frames 1: must be 2 to 1023"),
        ({"objects": 7}, "objects 7: must be 1 to 6, colours do not repeat"),
    ],
)
def test_impossible_clips_are_refused(tmp_path: Path, options: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        synthesise(tmp_path, clips=1, seed=0, **options)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())
