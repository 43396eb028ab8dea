"""Promise: a mask supervises the temporal step that contains its frame and nothing else; bad samples are holes."""

import io
import sys
import tarfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from tiny import tiny_config

from swim.data_tools.records import Conversation, Masks, Media, Mention, Object, Record, Rle, Turn
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import ShardSet, ShardWriter, index_shard
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import choose_frames, decode_frames, encode_video
from swim.kernels.mask_loss import unpack_masks
from swim.train.config import ConfigError
from swim.train.system import Request, build_system
from swim.train.systems.swim.config import Config
from swim.train.systems.swim.data import SwimCollator
from swim.train.systems.swim.objective import mask_term
from swim.train.systems.swim.targets import Targets, build_targets, step_coverages, step_masks

SIZE = (56, 56)
GRID = (4, 4)


def box(rows: slice, columns: slice, size: tuple[int, int] = SIZE) -> Rle:
    """The mask of some of the 4 x 4 cells."""
    mask, cell = np.zeros(size, bool), size[0] // 4
    mask[rows.start * cell : rows.stop * cell, columns.start * cell : columns.stop * cell] = True
    return Rle(**encode_mask(mask))


def cells(rows: slice, columns: slice) -> np.ndarray:
    grid = np.zeros(GRID)
    grid[rows, columns] = 1
    return grid


LEFT, RIGHT, MIDDLE = (slice(0, 4), slice(0, 1)), (slice(0, 4), slice(3, 4)), (slice(1, 3), slice(1, 3))


# ---- which mask counts where


def step_coverage(ids, masks, frames, grid):
    ((coverage,),) = step_coverages([ids], masks, [frames], grid)
    return coverage


def test_a_mask_belongs_to_the_step_whose_frames_contain_it():
    masks: Masks = {"a": {0: box(*LEFT), 5: box(*RIGHT)}}
    steps = [step_coverage(["a"], masks, frames, GRID) for frames in ([0, 2], [3, 4], [5, 7], [1, 6])]
    np.testing.assert_allclose(steps[0], cells(*LEFT))  # frame 0 supervises its own step, not the clip
    np.testing.assert_allclose(steps[2], cells(*RIGHT))
    assert steps[1] is None
    assert steps[3] is None


def test_a_step_is_the_mean_of_its_annotated_frames():
    masks: Masks = {"a": {0: box(*LEFT), 1: box(*RIGHT), 2: box(*LEFT), 4: None, 5: box(*RIGHT)}}
    both = step_coverage(["a"], masks, [0, 1], GRID)
    np.testing.assert_allclose(both, (cells(*LEFT) + cells(*RIGHT)) / 2)
    np.testing.assert_allclose(step_coverage(["a"], masks, [2, 3], GRID), cells(*LEFT))  # 3 is not annotated
    np.testing.assert_allclose(step_coverage(["a"], masks, [3, 2], GRID), cells(*LEFT))
    np.testing.assert_allclose(step_coverage(["a"], masks, [4, 5], GRID), cells(*RIGHT) / 2)  # 4 shows nothing
    np.testing.assert_allclose(step_coverage(["a"], masks, [0, 0], GRID), cells(*LEFT))  # a repeated last frame
    np.testing.assert_allclose(step_coverage(["a"], masks, [0, 1, 1, 1], GRID), both)


def test_absent_is_not_the_same_as_not_annotated():
    nothing = Rle(**encode_mask(np.zeros(SIZE, bool)))
    masks: Masks = {"a": {0: None, 1: nothing}}
    for frames in ([0], [1], [0, 1], [0, 2]):
        coverage = step_coverage(["a"], masks, frames, GRID)
        assert coverage is not None
        assert not coverage.any()
    assert step_coverage(["a"], masks, [2], GRID) is None
    assert step_coverage(["unknown"], masks, [0], GRID) is None


def test_objects_of_one_noun_are_united_not_added():
    masks: Masks = {"a": {0: box(*LEFT), 1: box(*LEFT)}, "b": {0: box(slice(0, 4), slice(0, 2)), 1: None}, "c": {}}
    np.testing.assert_allclose(step_coverage(["a", "b"], masks, [0], GRID), cells(slice(0, 4), slice(0, 2)))
    np.testing.assert_allclose(step_coverage(["a", "b"], masks, [1], GRID), cells(*LEFT))
    # Half a cell each, the same half: the union covers half.
    half = np.zeros(SIZE, bool)
    half[:7] = True
    halves: Masks = {"a": {0: Rle(**encode_mask(half))}, "b": {0: Rle(**encode_mask(half))}}
    np.testing.assert_allclose(step_coverage(["a", "b"], halves, [0], GRID)[0], 0.5)
    # As long as one of them is not annotated, what the noun covers is not known.
    assert step_coverage(["a", "c"], masks, [0], GRID) is None


def test_masks_of_different_sizes_are_united_too():
    """Each mask may have a size of its own, so the objects of one noun may differ."""
    masks: Masks = {"a": {0: box(*LEFT)}, "b": {0: box(slice(0, 4), slice(0, 2), (112, 112))}}
    for names in (["a", "b"], ["b", "a"]):
        np.testing.assert_allclose(step_coverage(names, masks, [0], GRID), cells(slice(0, 4), slice(0, 2)))


def test_the_union_is_as_large_as_the_largest_mask_in_both_directions():
    """Wide beside tall: neither is scaled down."""
    wide, tall = np.zeros((28, 112), bool), np.zeros((112, 28), bool)
    wide[:, :10] = tall[:30] = True
    want = np.zeros((112, 112), bool)
    want[:, :10] = want[:30] = True
    masks: Masks = {"a": {0: Rle(**encode_mask(wide))}, "b": {0: Rle(**encode_mask(tall))}}
    for names in (["a", "b"], ["b", "a"]):
        (mask,) = step_masks(names, masks, [0], GRID)
        np.testing.assert_array_equal(mask, want)


def test_masks_of_a_step_are_those_of_its_annotated_frames_at_their_own_size():
    masks: Masks = {"a": {0: box(*LEFT), 1: box(*RIGHT, (112, 112)), 2: None, 3: None}, "b": {0: box(*RIGHT), 1: None}}
    pair = step_masks(["a"], masks, [0, 1, 1], GRID)
    assert [mask.shape for mask in pair] == [(56, 56), (112, 112)], "a repeated frame counts once"
    np.testing.assert_array_equal(pair[0], np.kron(cells(*LEFT), np.ones((14, 14))) > 0)
    np.testing.assert_array_equal(pair[1], np.kron(cells(*RIGHT), np.ones((28, 28))) > 0)
    assert step_masks(["a"], masks, [5, 6], GRID) == []
    (both,) = step_masks(["a", "b"], masks, [0, 2], GRID)  # of b, frame 2 is not annotated
    np.testing.assert_array_equal(both, np.kron(cells(*LEFT) + cells(*RIGHT), np.ones((14, 14))) > 0)
    (absent,) = step_masks(["a"], masks, [2], GRID)
    assert (absent.shape, absent.any()) == ((56, 56), False), "as large as the object's other masks"
    (never,) = step_masks(["c"], {"c": {0: None}}, [0], GRID)
    assert (never.shape, never.any()) == (GRID, False)


# ---- coverage to loss units


def units_of(targets: Targets) -> list[list[tuple[int, np.ndarray]]]:
    """First cell and target of every frame, unit by unit."""
    frames = []
    for group in targets.groups.values():
        target = group.target if group.size is None else unpack_masks(group.target, group.size[1])
        frames += list(zip(group.starts.tolist(), target.numpy()))
    ordered = iter([frames[i] for i in targets.order])
    return [[next(ordered) for _ in range(length)] for length in targets.unit_lengths]


def expect(targets: Targets, want: list[list[tuple[int, np.ndarray]]]) -> None:
    got = units_of(targets)
    assert [[start for start, _ in unit] for unit in got] == [[start for start, _ in unit] for unit in want]
    for unit, wanted in zip(got, want):
        for (_, target), (_, right) in zip(unit, wanted):
            np.testing.assert_allclose(target, right)


def options(**fields: str) -> Config:
    return Config(layers=[0], **fields)


STEPS = [cells(*LEFT), None, np.zeros(GRID), cells(*MIDDLE) / 2]  # shown, not annotated, absent, shown


WIDE = ["clip", "causal", "full"]
NO_COUNTS = {"mask": 0, "supervised_nouns": 0, "nouns": 0, "absent_steps": 0, "unannotated_steps": 0}


@pytest.mark.parametrize("kind", ["kl", "bce", "dice", "focal", "iou"])
def test_frame_scope_has_a_unit_per_step_that_shows_the_object(kind):
    targets, counts = build_targets([[None] * 4, STEPS], [GRID, GRID], options(loss=kind))
    assert counts == {"mask": 1, "supervised_nouns": 1, "nouns": 2, "absent_steps": 1, "unannotated_steps": 5}
    expect(targets, [[(64, STEPS[0])], [(64 + 48, STEPS[3])]])
    assert targets.unit_weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("scope", WIDE)
def test_kl_in_wide_scopes_has_one_unit_in_which_absent_steps_are_zero(scope):
    targets, counts = build_targets([STEPS, STEPS], [GRID, GRID], options(softmax_scope=scope))
    assert counts == {"mask": 2, "supervised_nouns": 2, "nouns": 2, "absent_steps": 2, "unannotated_steps": 2}
    steps = [(t * 16, STEPS[t]) for t in (0, 2, 3)]
    expect(targets, [steps, [(64 + start, step) for start, step in steps]])
    assert targets.unit_weights.tolist() == [1, 1]


@pytest.mark.parametrize("scope", WIDE)
@pytest.mark.parametrize(
    ("fields", "zero"),
    [
        ({"loss": "bce"}, True),
        ({"loss": "focal"}, True),
        ({"loss": "dice"}, False),
        ({"loss": "iou"}, False),
        ({"loss": "bce", "map_scale": "minmax"}, False),
        ({"loss": "bce", "map_scale": "max"}, False),
        ({"loss": "focal", "map_scale": "max"}, False),
        ({"loss": "bce", "fused_norm": "clip"}, True),
    ],
)
def test_absent_steps_are_targets_where_the_loss_can_be_lowered(scope, fields, zero):
    never = [None, np.zeros(GRID)]
    targets, counts = build_targets([STEPS, never], [GRID, GRID], options(softmax_scope=scope, **fields))
    steps = [0, 2, 3] if zero else [0, 3]
    expect(targets, [[(t * 16, STEPS[t])] for t in steps] + [[(64 + 16, never[1])]] * zero)
    assert targets.unit_weights.tolist() == pytest.approx([1 / len(steps)] * len(steps) + [1] * zero)
    assert counts["mask"] == counts["supervised_nouns"] == 1 + zero
    assert (counts["absent_steps"], counts["unannotated_steps"]) == (2, 2), "counted wherever they carry no loss"


def test_kl_of_scaled_maps_leaves_absent_steps_out():
    targets, _ = build_targets([STEPS], [GRID], options(softmax_scope="clip", map_scale="max"))
    expect(targets, [[(0, STEPS[0]), (48, STEPS[3])]])


@pytest.mark.parametrize("fields", [{}, {"softmax_scope": "clip"}, {"loss": "bce"}])
def test_the_mean_is_over_nouns_or_over_units(fields):
    """The release divides by (sub-token, frame) pairs: nouns seen longer weigh more."""
    once = [STEPS[0], None, None, None]
    coverages, grids = [STEPS, once], [GRID, GRID]
    by_noun, of_nouns = build_targets(coverages, grids, options(**fields))
    by_unit, of_units = build_targets(coverages, grids, options(loss_mean="unit", **fields))
    lengths = [1, 1] if "softmax_scope" in fields else [2, 1]
    assert by_noun.unit_weights.tolist() == [1 / n for n in lengths for _ in range(n)]
    assert by_unit.unit_weights.tolist() == [1] * sum(lengths)
    assert (of_nouns["mask"], of_units["mask"]) == (2, sum(lengths))
    assert of_nouns["supervised_nouns"] == of_units["supervised_nouns"] == 2
    expect(by_unit, units_of(by_noun))


@pytest.mark.parametrize("scope", ["frame", "clip"])
def test_a_noun_that_is_never_seen_has_no_unit_and_is_not_counted(scope):
    never = [np.zeros(GRID), None, np.zeros(GRID)]
    targets, counts = build_targets([never, [None] * 3], [GRID, GRID], options(softmax_scope=scope))
    assert counts == NO_COUNTS | {"nouns": 2, "absent_steps": 2, "unannotated_steps": 4}
    assert not targets.groups
    assert [len(targets.order), len(targets.unit_lengths), len(targets.unit_weights)] == [0, 0, 0]
    assert build_targets([], [], options())[1] == NO_COUNTS


def big(step: np.ndarray, factor: int) -> np.ndarray:
    return np.kron(step, np.ones((factor, factor))) > 0


def test_on_the_pixel_side_every_annotated_frame_is_a_target():
    """Two frames per step, of several sizes; absent frames belong to the unit of kl in wide scopes alone."""
    left, middle = cells(*LEFT), cells(*MIDDLE)
    frames = [[big(left, 3), big(middle, 3)], [], [big(0 * left, 3)], [big(middle, 5), big(0 * left, 5)]]
    coverages = [(left + middle) / 2, None, 0 * left, middle / 2]
    fields = {"mask_side": "pixel"}
    targets, counts = build_targets([coverages], [GRID], options(**fields), masks=[frames])
    shown = [(0, frames[0][0]), (0, frames[0][1]), (48, frames[3][0])]
    expect(targets, [[frame] for frame in shown])
    assert targets.unit_weights.tolist() == pytest.approx([1 / 3] * 3)
    assert counts == {"mask": 1, "supervised_nouns": 1, "nouns": 1, "absent_steps": 1, "unannotated_steps": 1}
    assert {group.size for group in targets.groups.values()} == {(12, 12), (20, 20)}
    assert all(group.target.dtype == torch.uint8 for group in targets.groups.values()), "bits travel, not pixels"
    assert targets.groups["(4, 4) (20, 20) bool"].target.shape == (1, 20, 3)

    targets, _ = build_targets([coverages], [GRID], options(softmax_scope="clip", **fields), masks=[frames])
    expect(targets, [[*shown[:2], (32, frames[2][0]), shown[2], (48, frames[3][1])]])


@pytest.mark.parametrize("scope", ["frame", "clip"])
@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_the_loss_is_a_mean_over_steps_of_each_noun_and_unannotated_steps_have_no_gradient(scope, kind):
    """Two nouns on different grids, one with two shown steps and one with one: equal say, whatever their numbers."""
    other = [None, np.array([[0.25, 0.0, 1.0]])]
    coverages, config = [STEPS, other], options(softmax_scope=scope, loss=kind)
    targets, counts = build_targets(coverages, [GRID, (1, 3)], config)
    maps = torch.rand(4 * 16 + 2 * 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    got = mask_term({0: maps}, [64, 6], [1, 1], targets, config) / counts["mask"]

    def unit(m: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
        if kind == "bce":
            return torch.nn.functional.binary_cross_entropy(m, c)
        return torch.nn.functional.kl_div((m / m.sum()).log(), c / c.sum(), reduction="sum")

    nouns, start = [], 0
    for steps, size in zip(coverages, [16, 3]):
        of_noun = maps[start : start + size * len(steps)].view(len(steps), size)
        start += size * len(steps)
        flat = [None if c is None else torch.tensor(c.ravel(), dtype=torch.float32) for c in steps]
        if scope == "frame":
            losses = [unit(m, c) for m, c in zip(of_noun, flat) if c is not None and c.any()]
            nouns.append(torch.stack(losses).mean())
        else:
            known = [t for t, c in enumerate(flat) if c is not None]
            nouns.append(unit(torch.cat([of_noun[t] for t in known]), torch.cat([flat[t] for t in known])))
    torch.testing.assert_close(got, torch.stack(nouns).mean())
    (grad,) = torch.autograd.grad(got, maps)
    assert grad[:16].any()
    assert not grad[16:32].any(), "step 1 of the first noun is not annotated"
    assert bool(grad[32:48].any()) == (scope == "clip"), "absent: no loss in frame scope, zero target in clip scope"
    assert not grad[64:67].any(), "step 0 of the second noun is not annotated"


# ---- through the collator: real video, real shards


def ask(noun: str, *object_ids: str) -> Conversation:
    mention = Mention(start=9, end=9 + len(noun), head=(9, 9 + len(noun)), object_ids=list(object_ids))
    turns = [Turn(role="user", text=f"find the {noun} ?", mentions=[mention]), Turn(role="assistant", text="yes")]
    return Conversation(task="find", turns=turns)


def write(folder: Path, key: str, masks: Masks, *conversations: Conversation, frames: int = 12, **media) -> None:
    """A clip of noise with these masks; `media` may lie about it."""
    pixels = np.random.default_rng(0).integers(0, 256, (frames, *SIZE, 3), dtype=np.uint8)
    facts = {"member": "mp4", "kind": "video", "height": 56, "width": 56, "num_frames": frames, "fps": 4.0} | media
    record = Record(
        source="test",
        license="CC0-1.0",
        media=[Media(**facts)],
        objects=[Object(id=name, label=name) for name in masks],
        conversations=list(conversations),
    )
    with ShardWriter(folder, prefix=key) as writer:
        writer.write(key, record, masks, {"mp4": encode_video(pixels, 4.0)})


def collator_for(folder: Path, *overrides: str) -> SwimCollator:
    """A collator for 4 x 4 tokens of 14 pixels per frame."""
    small = ["data.min_pixels=3136", "data.max_pixels=3136", "data.num_frames=6"]
    return build_system(tiny_config(folder, *small, *overrides)).collator


def everything(shards: ShardSet) -> list[Request]:
    samples = [shards.read(i) for i in range(len(shards))]
    return [Request(sample, tuple(range(len(sample.record.conversations)))) for sample in samples]


def test_coverage_follows_the_sampled_frames(tmp_path):
    """12 frames, 6 sampled, pairs of them are steps; annotated frames attract the sampling."""
    masks: Masks = {"a": {0: box(*LEFT), 5: box(*RIGHT), 9: None, 10: None}}
    write(tmp_path, "clip", masks, ask("a", "a"))
    (request,) = everything(ShardSet(tmp_path))
    batch = collator_for(tmp_path)([request])
    assert batch.clips[0].frames == [[0, 3], [5, 7], [9, 10]]
    first, second, third = batch.coverages[0]
    np.testing.assert_allclose(first, cells(*LEFT))
    np.testing.assert_allclose(second, cells(*RIGHT))
    np.testing.assert_allclose(third, 0 * cells(*LEFT))
    assert batch.counts == NO_COUNTS | {
        "blind_nouns": 0,
        "text": 2,
        "mask": 1,
        "supervised_nouns": 1,
        "nouns": 1,
        "absent_steps": 1,
    }
    expect(batch.targets, [[(0, first)], [(16, second)]])
    assert batch.clips[0].seconds_per_step == pytest.approx(2 * 2 / 4)  # two frames apart by two quarter seconds

    uniform = collator_for(tmp_path, "data.frame_sampling=uniform")([request])
    assert uniform.clips[0].frames == [[1, 3], [5, 7], [9, 11]]
    assert [c is None for c in uniform.coverages[0]] == [True, False, False]


def test_targets_lie_on_their_nouns_own_map(tmp_path):
    """Several clips, questions and nouns in a batch: cells index the maps laid one behind the other."""
    write(tmp_path, "a", {"a": {0: box(*LEFT)}, "b": {5: box(*RIGHT)}}, ask("b", "b"), ask("a", "a"), ask("x"))
    write(tmp_path, "b", {"a": {9: box(*MIDDLE)}}, ask("a", "a"))
    batch = collator_for(tmp_path)(everything(ShardSet(tmp_path)))
    assert batch.ids == ["a#0", "a#1", "a#2", "b#0"]
    assert [noun.conversation for noun in batch.nouns] == [0, 1, 3], "a noun without objects owns nothing"
    assert batch.counts["mask"] == 3
    expect(batch.targets, [[(16, cells(*RIGHT))], [(48, cells(*LEFT))], [(2 * 48 + 32, cells(*MIDDLE))]])
    assert batch.table.map_sizes == [48] * sum(len(noun.tokens) for noun in batch.nouns)


def test_masks_travel_at_their_own_size_as_bits(tmp_path):
    """Pixel side through the collator, beside the coverage that predictions show."""
    masks: Masks = {"a": {0: box(*LEFT), 3: box(*RIGHT, (112, 112)), 5: None}}
    write(tmp_path, "clip", masks, ask("a", "a"), ask("a", "a"))
    (request,) = everything(ShardSet(tmp_path))
    batch = collator_for(tmp_path, "system.mask_side=pixel")([request])
    assert batch.clips[0].frames[0] == [0, 3]
    small, large = big(cells(*LEFT), 14), big(cells(*RIGHT), 28)
    expect(batch.targets, [[(0, small)], [(0, large)], [(48, small)], [(48, large)]])
    np.testing.assert_allclose(batch.coverages[0][0], (cells(*LEFT) + cells(*RIGHT)) / 2)
    moved = batch.to("meta")
    assert {t.device.type for group in moved.targets.groups.values() for t in (group.starts, group.target)} == {"meta"}


def test_the_chosen_frames_are_the_ones_that_are_decoded(tmp_path):
    shards = synthesise(tmp_path, clips=1, seed=4, frames=23)
    collator = collator_for(tmp_path, "data.num_frames=7", "data.min_pixels=12544", "data.max_pixels=12544")
    sample = shards.read(0)
    some = {name: {frame: frames[frame] for frame in (0, 4, 21)} for name, frames in sample.masks.items()}
    clip = collator.load_clip(replace(sample, masks=some))
    chosen = [frame for step in clip.frames for frame in step]
    assert chosen == choose_frames(23, 7, [0, 4, 21])
    assert {0, 4, 21} <= set(chosen)
    # Back from patches to pixels; the last of the seven frames fills its step twice.
    geometry, (steps, rows, columns) = collator.encoder.family.geometry, clip.grid
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (geometry.image_mean, geometry.image_std))
    blocks = clip.pixels.view(steps, rows, columns, 2, 2, 3, 2, 7, 7).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
    frames = (blocks.reshape(2 * steps, 3, 112, 112) * std + mean).mul(255).permute(0, 2, 3, 1).numpy()
    assert [read_barcode(frame) for frame in frames] == [*chosen, chosen[-1]]


def test_at_a_rate_masks_are_those_of_the_frames_that_are_seen(tmp_path):
    """360p at 12 frames a second, some annotated: a white box that moves, found again in what is decoded."""
    pixels = np.zeros((66, 360, 640, 3), np.uint8)
    for number, frame in enumerate(pixels):
        frame[40 + 4 * number : 100 + 4 * number, 9 * number : 9 * number + 50] = 255
    masks: Masks = {"a": {n: Rle(**encode_mask(pixels[n, :, :, 0] > 128)) for n in (3, 9, 10, 15, 39, 51, 63)}}
    record = Record(
        source="test",
        license="CC0-1.0",
        media=[Media(member="mp4", kind="video", height=360, width=640, num_frames=66, fps=12)],
        objects=[Object(id="a", label="a")],
        conversations=[ask("a", "a")],
    )
    with ShardWriter(tmp_path) as writer:
        writer.write("clip", record, masks, {"mp4": encode_video(pixels, 12.0)})
    (request,) = everything(ShardSet(tmp_path))
    at_a_rate = ["data.frame_sampling=fps", "data.num_frames=16", "data.max_pixels=70000"]
    batch = collator_for(tmp_path, *at_a_rate)([request])
    (clip,) = batch.clips
    frames = [frame for step in clip.frames for frame in step]
    assert (len(frames), clip.grid) == (11, (6, 14, 25)), "5.5 seconds; the last frame fills its step"
    assert clip.seconds_per_step == pytest.approx(2 * 0.5)
    seen = decode_frames(request.sample.media(), frames)[..., 0] > 128
    rows, columns = (
        np.diff(np.clip(np.arange(n + 1)[:, None] * size / n - np.arange(size), 0, 1), axis=0) * n / size
        for n, size in ((14, 360), (25, 640))
    )
    areas = dict(zip(frames, rows @ seen.astype(float) @ columns.T))
    of_steps = [[areas[frame] for frame in step if frame in masks["a"]] for step in clip.frames]
    assert [len(found) for found in of_steps] == [2, 1, 0, 1, 1, 1]
    for coverage, found in zip(batch.coverages[0], of_steps, strict=True):
        assert (coverage is None) == (not found)
        if found:
            np.testing.assert_allclose(coverage, np.mean(found, axis=0), rtol=0, atol=1e-9)


def test_decord_gets_only_what_a_checksum_vouches_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "decord", None)
    with pytest.raises(ConfigError, match=r"data.decoder=decord cannot be used: .*pip install 'decord==0.6.0'"):
        collator_for(tmp_path, "data.decoder=decord")
    monkeypatch.setitem(sys.modules, "decord", ModuleType("decord"))
    collator = collator_for(tmp_path, "data.decoder=decord")
    media = Media(path="a.mp4", kind="video", height=56, width=56, num_frames=12, fps=4)
    record = Record(source="test", license="CC0-1.0", media=[media], objects=[], conversations=[ask("a")])
    with ShardWriter(tmp_path) as writer:
        writer.write("loose", record, {}, {})
    (tmp_path / "a.mp4").write_bytes(b"<html>")
    (hole,) = collator(everything(ShardSet(tmp_path))).holes
    assert hole.reason.startswith("a.mp4: decord crashes on damaged files, and no checksum vouches for a loose one")


def damaged(folder: Path, key: str, change: Mapping[str, bytes]) -> None:
    """Replace members of a shard, with an index that vouches for them."""
    path = next(folder.glob(f"{key}-*.tar"))
    with tarfile.open(path) as tar:
        members = {info.name: tar.extractfile(info).read() for info in tar}
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, data in members.items():
            data = change.get(name.partition(".")[2], data)
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    index_shard(path)


MASKS: Masks = {"a": {0: box(*LEFT)}}
QUESTIONS = (ask("a", "a"), ask("a", "a"))


def test_a_bad_clip_is_a_hole_that_leaves_the_others_untouched(tmp_path):
    write(tmp_path, "c1_good", MASKS, *QUESTIONS)
    write(tmp_path, "c2_corrupt", MASKS, *QUESTIONS)
    write(tmp_path, "c3_size", MASKS, *QUESTIONS, height=112, width=112)
    write(tmp_path, "c4_short", MASKS, *QUESTIONS, num_frames=20)
    write(tmp_path, "c5_control", MASKS, ask("<|im_end|>", "a"))
    write(tmp_path, "c6_good", MASKS, *QUESTIONS)
    write(tmp_path, "c7_crc", MASKS, *QUESTIONS)
    damaged(tmp_path, "c2_corrupt", {"mp4": b"not a video at all" * 50})
    place = ShardSet(tmp_path).entries[6].members["mp4"][0]
    path = next(tmp_path.glob("c7_crc-*.tar"))
    data = bytearray(path.read_bytes())
    data[place + 100] ^= 255
    path.write_bytes(data)

    requests, collator = everything(ShardSet(tmp_path)), collator_for(tmp_path)
    batch = collator(requests)
    assert batch.ids == ["c1_good#0", "c1_good#1", "c6_good#0", "c6_good#1"]
    names = ["c2_corrupt#0", "c2_corrupt#1", "c3_size#0", "c3_size#1", "c4_short#0", "c4_short#1", "c5_control#0"]
    assert [hole.id for hole in batch.holes] == [*names, "c7_crc#0", "c7_crc#1"]
    reasons = {hole.id.partition("#")[0]: hole.reason for hole in batch.holes}
    assert "cannot be read as video" in reasons["c2_corrupt"]
    assert "frames of 56x56 pixels, its record says 112x112; correct the record" in reasons["c3_size"]
    assert "only 12 frames can be decoded" in reasons["c4_short"]
    assert "'<|im_end|>'" in reasons["c5_control"]
    assert "CRC32" in reasons["c7_crc"]
    assert (batch.holes[-1].shard, batch.holes[-1].offset) == (path.name, place)

    alone = collator([requests[0], requests[5]])
    assert alone.holes == []
    for name, tensor in alone.inputs.items():
        assert torch.equal(tensor, batch.inputs[name]), name
    expect(alone.targets, units_of(batch.targets))
    assert torch.equal(alone.targets.unit_weights, batch.targets.unit_weights)
    assert (alone.nouns, alone.counts) == (batch.nouns, batch.counts)


def test_a_clip_of_a_shape_that_no_model_takes_is_a_hole(tmp_path):
    record = Record(
        source="test",
        license="CC0-1.0",
        media=[Media(member="mp4", kind="video", height=2, width=404, num_frames=4, fps=4)],
        objects=[],
        conversations=[ask("a")],
    )
    with ShardWriter(tmp_path) as writer:
        writer.write("thin", record, {}, {"mp4": encode_video(np.zeros((4, 2, 404, 3), np.uint8), 4.0)})
    batch = collator_for(tmp_path)(everything(ShardSet(tmp_path)))
    assert [hole.id for hole in batch.holes] == ["thin#0"]
    assert "404x2 pixels has an aspect ratio beyond 200" in batch.holes[0].reason
    assert batch.ids == []
