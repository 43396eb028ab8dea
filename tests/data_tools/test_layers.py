"""A layer changes what is said about samples, never their video; it is checked, counted and part of the digest."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from loose_files import write_loose
from tiny import tiny_config
from typer.testing import CliRunner

from swim.data_tools.cli import app
from swim.data_tools.index import conversation_facts
from swim.data_tools.layers import LayerWriter
from swim.data_tools.mixture import PlanError
from swim.data_tools.records import Conversation, Masks, Mention, Object, RecordError, Rle, Turn
from swim.data_tools.rle import encode_mask
from swim.data_tools.shards import BadSample, ShardError, ShardSet
from swim.data_tools.synth import synthesise
from swim.train.loader import Order
from swim.train.system import build_system


def ask(name: str, task: str = "new") -> Conversation:
    mention = Mention(start=0, end=4, head=(0, 4), object_ids=[name])
    turns = [Turn(role="user", text="that ?", mentions=[mention]), Turn(role="assistant", text="yes .")]
    return Conversation(task=task, turns=turns)


def some_mask() -> Rle:
    mask = np.zeros((112, 112), bool)
    mask[3:9, 5:20] = True
    return Rle(**encode_mask(mask))


@pytest.fixture
def base(synth_folder: Path) -> ShardSet:
    return ShardSet(synth_folder)


@pytest.fixture
def captions(base: ShardSet, tmp_path: Path) -> Path:
    """Adds a conversation about a new object to clip 1, replaces all of clip 2."""
    with LayerWriter(tmp_path / "captions", base, max_bytes=1) as writer:
        thing = Object(id="ghost", label="a ghost")
        writer.write(base.keys()[1], conversations=[ask("ghost")], objects=[thing], masks={"ghost": {3: None}})
        writer.write(base.keys()[2], conversations=[ask(base.read(2).record.objects[0].id)], replace=True)
    return tmp_path / "captions"


@pytest.fixture
def fix(base: ShardSet, tmp_path: Path) -> Path:
    """New masks of one object in clips 1 and 4, none of another in clip 4."""
    with LayerWriter(tmp_path / "fix", base) as writer:
        for number in (1, 4):
            first, second, *_ = (thing.id for thing in base.read(number).record.objects)
            masks: Masks = {first: {0: some_mask(), 5: None}}
            writer.write(base.keys()[number], masks=masks | ({second: {}} if number == 4 else {}))
    return tmp_path / "fix"


def test_layers_are_joined_one_after_the_other(base: ShardSet, captions: Path, fix: Path) -> None:
    joined = ShardSet(base.folder, layers=[captions, fix])
    assert (len(joined), joined.keys()) == (len(base), base.keys())
    for number in (0, 3, 5):
        assert joined.read(number) == base.read(number)
        assert joined.entries[number] == base.entries[number]
    before, after = base.read(1), joined.read(1)
    assert after.record.conversations == [*before.record.conversations, ask("ghost")]
    assert [thing.id for thing in after.record.objects] == [*(o.id for o in before.record.objects), "ghost"]
    first, *others = (thing.id for thing in before.record.objects)
    assert after.masks[first] == {0: some_mask(), 5: None}
    assert {name: after.masks[name] for name in others} == {name: before.masks[name] for name in others}
    assert after.masks["ghost"] == {3: None}
    assert joined.read(2).record.conversations == [ask(base.read(2).record.objects[0].id)]
    first, second, *_ = (thing.id for thing in base.read(4).record.objects)
    assert joined.read(4).masks[second] == {}
    for number in range(len(base)):
        assert joined.read(number).media() == base.read(number).media()
        assert joined.read(number, masks=False).record == joined.read(number).record
        assert joined.read(number, masks=False).masks == {}
    assert pickle.loads(pickle.dumps(joined)).read(1) == after
    assert sum(path.stat().st_size for path in captions.glob("*.tar")) < 25_000, "no video in it"


def test_facts_are_those_of_the_joined_samples(base: ShardSet, captions: Path, fix: Path, tmp_path: Path) -> None:
    for layers in ([], [captions], [fix], [captions, fix], [fix, captions]):
        joined = ShardSet(base.folder, layers=layers, cache=tmp_path / "cache")
        again = ShardSet(base.folder, layers=layers, cache=tmp_path / "cache")
        for number in range(len(base)):
            sample = joined.read(number)
            assert joined.entries[number].conversations == conversation_facts(sample.record, sample.masks)
        counts = [len(joined.read(number).record.conversations) for number in range(len(base))]
        assert joined.facts.counts.tolist() == again.facts.counts.tolist() == counts
        names = joined.facts.task_names[joined.facts.tasks].tolist()
        assert names == [c.task for i in range(len(base)) for c in joined.read(i).record.conversations]


def test_every_layer_counts_in_the_digest_and_a_run_refuses_another(
    base: ShardSet, captions: Path, fix: Path, tmp_path: Path
) -> None:
    digests = [
        ShardSet(base.folder, layers=layers).digest
        for layers in ([], [captions], [fix], [captions, fix], [fix, captions])
    ]
    assert len(set(digests)) == 5
    assert digests[0] == base.digest

    def order(*layers: Path) -> Order:
        train = json.dumps([{"path": str(base.folder), "layers": list(map(str, layers))}])
        config = tiny_config(Path(base.folder), f"data.train={train}", "data.tasks=null", f"run.output={tmp_path}")
        return Order(config, build_system(config))

    state = order(captions).state(1)
    order(captions).resume(state)
    with pytest.raises(PlanError, match=r"data.train\[0\] .* has other shards or layers"):
        order(captions, fix).resume(state)
    tasks = [c.task for c in order(captions).shards[0].read(2).record.conversations]
    assert tasks == ["new"]


def test_the_writer_refuses_what_does_not_fit_the_base(base: ShardSet, tmp_path: Path) -> None:
    key = base.keys()[0]
    with LayerWriter(tmp_path / "layer", base) as writer:
        with pytest.raises(RecordError, match=r"record 'nobody', key: it is not in .*; leave it out"):
            writer.write("nobody", masks={})
        with pytest.raises(RecordError, match=r"its members are \[\], those of a layer are conversations.json and"):
            writer.write(key)
        with pytest.raises(RecordError, match=r"masks.ghost: object id 'ghost' is not among"):
            writer.write(key, masks={"ghost": {0: None}})
        with pytest.raises(RecordError, match=r"conversations\[9\].*object_ids: object id 'ghost' is not among"):
            writer.write(key, conversations=[ask("ghost")])
        with pytest.raises(RecordError, match=r"frame 99 is outside the clip"):
            writer.write(key, masks={base.read(0).record.objects[0].id: {99: None}})
        writer.write(key, masks={base.read(0).record.objects[0].id: {0: None}})
        with pytest.raises(RecordError, match=r"it was written before"):
            writer.write(key, masks={})
    assert len(ShardSet(base.folder, layers=[tmp_path / "layer"])) == len(base)


def test_a_layer_of_another_base_or_in_its_place_is_refused(base: ShardSet, captions: Path, tmp_path: Path) -> None:
    other = synthesise(tmp_path / "other", clips=3, seed=99)
    found = r"captions: 2 of its keys are not in the base, such as 'synth_5_000001', 'synth_5_000002'"
    with pytest.raises(ShardError, match=found):
        ShardSet(other.folder, layers=[captions])
    with pytest.raises(ShardError, match=r"layer-000000.tar: it is a layer; name it in `layers` of its base"):
        ShardSet(captions)
    with pytest.raises(ShardError, match=r"shard-000000.tar: it is no layer; write one with LayerWriter"):
        ShardSet(base.folder, layers=[other.folder])
    for path in captions.glob("layer-000000.*"):
        text = path.read_bytes().replace(b"layer-000000", b"layer-000009")
        (captions / path.name.replace("000000", "000009")).write_bytes(text)
    with pytest.raises(ShardError, match=r"captions: a key is there twice"):
        ShardSet(base.folder, layers=[captions])


def test_damage_in_a_layer_costs_its_samples_alone(base: ShardSet, captions: Path) -> None:
    path = captions / "layer-000000.tar"
    data = bytearray(path.read_bytes())
    data[700] ^= 1
    path.write_bytes(data)
    joined = ShardSet(base.folder, layers=[captions])
    with pytest.raises(BadSample, match=r"'synth_5_000001' in layer-000000.tar .*'conversations.json' has CRC32"):
        joined.read(1)
    assert joined.read(2).record.conversations[0].task == "new"
    assert joined.read(0) == base.read(0)


def test_a_layer_whose_base_has_changed_is_found_when_joined(base: ShardSet, fix: Path, tmp_path: Path) -> None:
    with LayerWriter(tmp_path / "gone", base) as writer:  # no object of clip 1 is spoken of or kept
        writer.write(base.keys()[1], conversations=[ask(base.read(1).record.objects[0].id)], replace=True)
    mine = write_loose(tmp_path / "loose", base)
    lines = [json.loads(line) for line in mine.read_text().splitlines()]
    lines[1] |= {"objects": [], "masks": {}, "conversations": [ask("x").model_dump() | {"turns": TEXT}]}
    mine.write_text("".join(json.dumps(line) + "\n" for line in lines))
    for layer in (fix, tmp_path / "gone"):
        with pytest.raises(BadSample, match=r"object id '\w+' is not among objects \[\]"):
            ShardSet(mine, layers=[layer]).read(1)
    assert ShardSet(mine, layers=[fix]).read(4).masks == ShardSet(base.folder, layers=[fix]).read(4).masks


TEXT = [{"role": "user", "text": "?"}, {"role": "assistant", "text": "."}]


def test_an_index_is_made_anew_over_the_base(base: ShardSet, captions: Path, fix: Path) -> None:
    run = CliRunner()
    digest = ShardSet(base.folder, layers=[captions, fix]).digest
    for layer in (captions, fix):
        written = {path.name: path.read_bytes() for path in layer.glob("*.index.jsonl")}
        for name in written:
            (layer / name).unlink()
        result = run.invoke(app, ["index", str(layer), "--base", str(base.folder)])
        assert result.exit_code == 0, result.output
        assert {path.name: path.read_bytes() for path in layer.glob("*.index.jsonl")} == written
    assert ShardSet(base.folder, layers=[captions, fix]).digest == digest
    refused = run.invoke(app, ["index", str(captions)])
    assert refused.exit_code == 2
    assert "no 'synth_5_000001.json'" in refused.stderr


def test_data_commands_join_layers(base: ShardSet, captions: Path, fix: Path) -> None:
    layers = ["--layer", str(captions), "--layer", str(fix)]
    run = CliRunner()
    shown = run.invoke(app, ["show", str(base.folder), base.keys()[1], *layers])
    assert "'ghost' 'a ghost'" in shown.stdout
    assert "errors: 0" in run.invoke(app, ["validate", "--deep", str(base.folder), *layers]).stdout
    counted = json.loads(run.invoke(app, ["stats", str(base.folder), "--json", *layers]).stdout)
    assert counted["conversations"]["new"] == 2
