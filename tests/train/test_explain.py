"""Promise: what `swim explain` shows is the model's own attention, per layer and head, for little memory; and it says
what the model was trained on and what it left out."""

import io
import json
import re
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
import yaml
from browser import chromium, open_page, pixels, seek
from footage import footage_dir
from live_memory import Live
from tiny import family_config, make_data, tiny_config
from typer.testing import CliRunner

from swim.data_tools.all_nouns import marked_nouns
from swim.data_tools.records import Rle
from swim.data_tools.rle import encode_mask
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import decode_frames
from swim.train.batch import BatchOptions, make_batch
from swim.train.cli import app
from swim.train.explain.command import read_masks, sample_subject, video_subject
from swim.train.explain.look import Loaded, appended, choose_contents, chosen_layers
from swim.train.explain.row_maps import RowMaps
from swim.train.explain.sources import find_source
from swim.train.system import build_system

PROMPT = "which way does the red circle move ?"


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"), clips=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory, shards):
    """A run of the tiny recipe as training leaves it, its weights the first ones."""
    return save_run(tmp_path_factory.mktemp("runs") / "tiny", tiny_config(shards.folder))


def save_run(folder: Path, config) -> Path:
    system = build_system(config)
    system.build_model().save_pretrained(folder / "model")
    system.tokenizer.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "done.json").write_text('{"seconds": 1.0, "peak_memory_mib": 1, "ranks": 1}')
    return folder


def read_rows(model: Loaded, shards, layers, heads):
    """Capture, sequence, clip and words of a prompt and of an answer that the model is made to give."""
    subject = sample_subject(shards, shards.keys()[0])
    clip = model.load_clip(subject)
    asked, words = model.encode(PROMPT, [(23, 29)], clip)
    generated = model.tokenizer("the red circle moves upwards .", add_special_tokens=False)["input_ids"]
    answer, own = model.answer_words(generated, len(asked.ids), "built-in")
    assert answer == "the red circle moves upwards ."
    sequence = appended(asked, generated)
    visual = np.nonzero(sequence.types)[0][: clip.num_cells].tolist()
    columns = [word.columns for word in (*words, *own)]
    rows = range(asked.prefix, len(sequence.ids))
    capture = RowMaps(rows, columns, visual, steps=clip.grid[0], layers=layers, heads=heads)
    model.read(sequence, clip, capture)
    return capture, sequence, clip, columns


@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "internvl"])
def test_maps_are_the_rows_of_eager_attention(shards, tmp_path, family):
    config = find_source(str(save_run(tmp_path / family, family_config(shards.folder, family)))).config
    model = Loaded(config)
    capture, sequence, clip, columns = read_rows(model, shards, (0, 2), (0, 3))
    assert any(len(tokens) > 1 for tokens in columns), "a word of several tokens must be among them"
    batch = make_batch([("x", sequence, clip)], model.encoder, BatchOptions(pad_token=0))
    model.model.set_attn_implementation({"text_config": "eager"} if family != "internvl" else "eager")
    with torch.no_grad():
        attentions = model.model(**batch.inputs, use_cache=False, output_attentions=True).attentions
    visual, text = capture.keys, capture.rows
    for layer in (0, 2):
        eager_HRV = attentions[layer][0][:, text][:, :, visual]
        got = capture.maps()[layer]
        for number, tokens in enumerate(columns):
            own_HNV = attentions[layer][0][:, list(tokens)][:, :, visual]
            by_step = own_HNV.unflatten(-1, (clip.grid[0], -1))
            within = (by_step / by_step.sum(-1, keepdim=True)).flatten(-2).mean(1)
            for plane, want in enumerate(
                [within.mean(0), own_HNV.mean((0, 1)), own_HNV[0].mean(0), own_HNV[3].mean(0)]
            ):
                torch.testing.assert_close(got[number, plane], want, atol=1e-5, rtol=1e-5)
        shared_HV = eager_HRV.median(1).values
        torch.testing.assert_close(got[-1, 1], shared_HV.mean(0), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(got[-1, 3], shared_HV[3], atol=1e-5, rtol=1e-5)


def test_memory_does_not_grow_with_the_layers_of_the_model(shards, tmp_path, monkeypatch):
    """Reading a layer leaves behind what is kept of it and nothing else, takes a head's rows a few times meanwhile, and
    the same in the eighth layer as in the first."""
    costs, observe = [], RowMaps.observe

    def measured(*args, **kwargs):
        before = live.peak = live.now
        observe(*args, **kwargs)
        costs.append((live.now - before, live.peak - before))

    monkeypatch.setattr(RowMaps, "observe", measured)
    for layers in (2, 8):
        text = f"model.config.text_config.num_hidden_layers={layers}"
        config = tiny_config(shards.folder, text, "system.layers=[1]", "data.min_pixels=50176", "data.max_pixels=50176")
        model = Loaded(find_source(str(save_run(tmp_path / str(layers), config))).config)
        with (live := Live([*model.model.parameters(), *model.model.buffers()])):
            capture, sequence, clip, columns = read_rows(model, shards, range(layers), (0,))
    assert len(costs) == 2 + 8
    kept_bytes = (len(columns) + 1) * 3 * clip.num_cells * 4
    row_bytes = len(capture.rows) * len(sequence.ids) * 4
    keys_bytes = len(sequence.ids) * 32 * 4  # of one head, in fp32
    assert len(set(costs)) == 1
    left, most = costs[0]
    assert left == kept_bytes
    assert most < kept_bytes + 5 * row_bytes + keys_bytes


def test_words_of_an_answer_have_their_own_tokens(run):
    model = Loaded(find_source(str(run)).config)
    text = "the café’s naïve 🙂 cup, twice: cup"
    ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
    answer, words = model.answer_words([*ids, model.tokenizer.eos_token_id], 100, "built-in")
    assert answer == text
    assert [text[word.start : word.end] for word in words] == ["the", "café’s", "naïve", "cup", "twice", "cup"]
    for word in words:
        said = model.tokenizer.decode([ids[column - 100] for column in word.columns])
        assert said.strip() == text[word.start : word.end]
    assert not set(words[3].columns) & set(words[5].columns), "twins have places of their own"


def test_nouns_are_tagged_or_found():
    assert marked_nouns("What does the brown <ins>dog</ins> do?")[:2] == ("What does the brown dog do?", [(20, 23)])
    text, spans, by = marked_nouns("What does the brown dog do on the table ?", "built-in")
    assert [text[a:b] for a, b in spans] == ["dog", "table"]
    assert by.startswith("built-in")
    text, spans, _ = marked_nouns(PROMPT, "built-in")
    assert [text[a:b] for a, b in spans] == ["circle"], "the verb that 'does' leaves to the end is no noun"
    with pytest.raises(ValueError, match="has no"):
        marked_nouns("the <ins>dog")


@dataclass
class _Token:
    text: str
    idx: int
    pos_: str

    def __len__(self) -> int:
        return len(self.text)


def test_nouns_are_found_by_spacy_where_it_is(monkeypatch):
    def parse(text):
        tags = {"dog": "NOUN", "Rex": "PROPN"}
        return [_Token(m[0], m.start(), tags.get(m[0], "X")) for m in re.finditer(r"\w+", text)]

    monkeypatch.setattr("swim.data_tools.nouns.load_parser", lambda _: ("spaCy 3", parse))
    assert marked_nouns("the dog Rex runs")[1:] == ([(4, 7), (8, 11)], "spaCy 3")


def test_what_does_not_fit_the_page_is_left_out_in_this_order_and_named():
    def contents(limit):
        return choose_contents([True, False, False], range(8), 4, 100, (5, 7), limit)

    # Entries: the words and the shared map; planes: two means and the heads; 4/3 for base64.
    everything, no_heads, few, nouns = (4 * 8 * 6, 4 * 8 * 2, 4 * 2 * 2, 2 * 2 * 2)
    sizes = [n * 100 * 4 // 3 for n in (everything, no_heads, few, nouns)]
    found = [contents(size) for size in sizes]
    assert [(one.layers, one.heads, one.nouns_only) for one in found] == [
        (tuple(range(8)), (0, 1, 2, 3), False),
        (tuple(range(8)), (), False),
        ((5, 7), (), False),
        ((5, 7), (), True),
    ]
    assert found[0].left_out == ()
    for one, lost in zip(found[1:], ("heads", "layers other than 5, 7", "no nouns")):
        assert lost in one.left_out[0]
    with pytest.raises(ValueError, match="--page-mib"):
        contents(sizes[-1] - 1)
    assert len(choose_contents([True], range(28), 4, 100, (), sizes[1]).layers) == 6, "spread, where no run says which"


def test_layers_that_see_a_window_are_refused():
    config = SimpleNamespace(num_hidden_layers=4, layer_types=["full_attention", "sliding_attention"] * 2)
    assert chosen_layers("0, 2", config) == (0, 2)
    assert chosen_layers("last:2", SimpleNamespace(num_hidden_layers=4)) == (2, 3)
    with pytest.raises(ValueError, match=r"layers \[1, 3\] have sliding_attention"):
        chosen_layers("all", config)


def test_a_page_says_what_the_model_was_trained_on(run):
    source = find_source(str(run))
    assert source.sources == {("synth", "CC0-1.0")}
    assert source.own_layers(4) == (1, 3)
    said, warns = source.about_training("synth")
    assert not warns
    assert "synth (CC0-1.0)" in said
    for other, named in ((None, "unknown source"), ("sav", "from sav")):
        said, warns = source.about_training(other)
        assert warns
        assert said.startswith("Never trained on such video")
        assert named in said
    # A base that nobody knows may have seen anything; data that cannot be read may hold anything.
    assert source.trained is not None
    model = source.trained.model.model_copy(update={"config": None, "path": "some/base"})
    tuned = replace(source, trained=source.trained.model_copy(update={"model": model}))
    assert tuned.about_training(None)[0].startswith("This run never trained on such video")
    assert "What its base base saw before is not known here" in tuned.about_training(None)[0]
    said, warns = replace(source, sources=frozenset(), unread=("gone",)).about_training(None)
    assert warns
    assert "cannot be told" in said
    bare = find_source(str(run / "model"))
    assert bare.about_training("synth") == (
        "What this model was trained on is not known here: no run stands behind its folder.",
        True,
    )
    assert bare.config.model.path == str(run / "model")


def test_the_command_writes_page_and_cells(run, shards, tmp_path):
    video, mask = tmp_path / "clip.mp4", tmp_path / "masks.json"
    sample = shards.read(0)
    video.write_bytes(sample.media())
    frames = next(iter(sample.masks.values()))
    mask.write_text(json.dumps({str(f): None if rle is None else rle.model_dump() for f, rle in frames.items()}))
    out, cells = tmp_path / "page.html", tmp_path / "cells.json"
    options = ["--model", str(run), "--compare", str(run / "model"), "--out", str(out), "--mask", str(mask)]
    small = ["--frames", "4", "--pixels", "7056", "--answer-tokens", "6", "--json", str(cells)]
    done = CliRunner().invoke(app, ["explain", str(video), "where is the <ins>circle</ins> ?", *options, *small])
    assert done.exit_code == 0, done.output
    assert "Never trained on such video" in done.output
    page = out.read_text()
    assert "Never trained on such video: its 700 steps saw" in page
    assert "no run stands behind its folder" in page
    for model in json.loads(cells.read_text())["models"]:
        assert model["grid"] == [2, 6, 6]
        circle = model["words"][3]
        assert (circle["text"], circle["noun"]) == ("circle", True)
        assert sorted(circle["layers"]) == ["0", "1", "2", "3"]
        for planes in circle["layers"].values():
            assert np.sum(planes["mean_within_step"], axis=(1, 2)) == pytest.approx([1, 1], abs=1e-4)
            assert 0 < np.sum(planes["mean"]) < 1
    again = CliRunner().invoke(
        app, ["explain", str(shards.folder), PROMPT, "--key", sample.key, *options[:2], *options[4:6]]
    )
    assert again.exit_code == 0, again.output
    assert "this video is of the same source" in again.output


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["missing.mp4", "what ?"], "missing.mp4"),
        (["FOLDER", "what ?"], "--key"),
        (["VIDEO", "what ?", "--key", "a"], "--key"),
        (["FOLDER", "what ?", "--key", "a"], "'a'"),
        (["VIDEO", "?!"], "no words"),
        (["VIDEO", "the <ins>dog"], "has no '</ins>'"),
        (["VIDEO", "a <|im_end|>"], "control token"),
        (["VIDEO", "what ?", "--mask", "LATE"], "frame 99"),
        (["LATE", "what ?"], "late.json: video"),
        (["VIDEO", "what ?", "--json", "FOLDER", "--model", "missing"], "is a folder; give the name of a file"),
        (["VIDEO", "what ?", "--layers", "9"], "layers of this model"),
        (["VIDEO", "what ?", "--page-mib", "0.001"], "--page-mib"),
        (["VIDEO", "what ?", "--nouns", "magic"], "magic"),
        (["VIDEO", "what ?", "--model", "FOLDER"], "neither a run"),
    ],
)
def test_what_cannot_be_shown_is_one_message(run, shards, tmp_path, arguments, problem):
    video, late = tmp_path / "clip.mp4", tmp_path / "late.json"
    video.write_bytes(shards.read(0).media())
    late.write_text('{"99": null}')
    places = {"VIDEO": str(video), "FOLDER": str(shards.folder), "LATE": str(late)}
    given = ["explain", *(places.get(text, text) for text in arguments), "--out", str(tmp_path / "page.html")]
    done = CliRunner().invoke(app, [*given, *([] if "--model" in arguments else ["--model", str(run)])])
    assert done.exit_code == 2
    assert problem in done.output
    assert not (tmp_path / "page.html").exists()


def test_masks_are_read_in_every_form_that_is_promised(tmp_path):
    rle = {"size": [4, 4], "counts": "04<"}
    path = tmp_path / "masks.json"
    forms = {
        "layer": {"dog": {"3": rle, "1": None}},
        "frames": {"3": rle, "1": None},
        "nl_refer": {"3": {"segmentation": rle}, "1": {"segmentation": None}},
    }
    for name, form in forms.items():
        path.write_text(json.dumps(form))
        ((id, frames),) = read_masks(path).items()
        assert id == ("dog" if name == "layer" else "object")
        assert [*frames] == [1, 3]
        assert frames[1] is None
        assert frames[3].counts == "04<"
    for wrong in ("[1]", '{"3": {"counts": 1}}', "{"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match="no masks can be read"):
            read_masks(path)


def test_masks_that_do_not_belong_to_the_video_are_refused(tmp_path):
    """A mask of another shape would be stretched over the wrong pixels, in contour and mass alike."""
    video, path = tmp_path / "clip.mp4", tmp_path / "masks.json"
    video.write_bytes(synthesise(tmp_path / "shards", clips=1, seed=3).read(0).media())
    mask = np.zeros((56, 56), dtype=bool)
    mask[8:20, 8:20] = True
    path.write_text(json.dumps({"dog": {"3": encode_mask(mask)}}))
    assert video_subject(video, path).masks["dog"][3].size == (56, 56), "half the size is the same shape"
    for rle, problem in (
        (encode_mask(mask[:28]), "size 28x56 has another shape than the media's 112x112"),
        ({"size": [112, 112], "counts": "garbage!!"}, "outside the RLE alphabet"),
        ({"size": [112, 112], "counts": encode_mask(mask)["counts"]}, "the runs sum to"),
    ):
        path.write_text(json.dumps({"dog": {"3": rle}}))
        with pytest.raises(ValueError, match=rf"masks.json: mask of dog in frame 3: .*{problem}"):
            video_subject(video, path)


def test_masks_of_an_uneven_video_follow_its_frames(tmp_path):
    """Its frames get new numbers when it is made even: masks are still those of the picture they were drawn on."""
    numbered = synthesise(tmp_path / "numbered", clips=1, seed=1, size=56, frames=24, fps=8).read(0).media()
    path, mask = tmp_path / "uneven.mkv", tmp_path / "masks.json"
    with av.open(io.BytesIO(numbered)) as reader, av.open(str(path), "w", format="matroska") as writer:
        copy = writer.add_stream_from_template(reader.streams.video[0])
        for packet in reader.demux(reader.streams.video[0]):
            if packet.dts is not None and packet.pts is not None:
                slowed = [at + 3 * max(0, at - round(1 / packet.time_base)) for at in (packet.pts, packet.dts)]
                packet.stream, (packet.pts, packet.dts) = copy, slowed
                writer.mux(packet)
    of = {n: Rle(**encode_mask(np.arange(56 * 56).reshape(56, 56) < 56 * n)) for n in range(24)}
    mask.write_text(json.dumps({str(n): rle.model_dump() for n, rle in of.items()}))
    subject = video_subject(path, mask)
    shown = [read_barcode(frame) for frame in decode_frames(subject.video, range(subject.info.num_frames))]
    assert shown != list(range(24))
    (masks,) = subject.masks.values()
    assert [masks[number] for number in range(len(shown))] == [of[frame] for frame in shown]


def test_the_sequence_read_is_the_one_generated(run, shards):
    """The answer's first token is what the read pass predicts from the prompt: both see the same clip and positions."""
    model = Loaded(find_source(str(run)).config)
    clip = model.load_clip(sample_subject(shards, shards.keys()[0]))
    asked, _ = model.encode(PROMPT, [], clip)
    generated = model.generate(asked, clip, 3)
    sequence = appended(asked, generated)
    batch = make_batch([("x", sequence, clip)], model.encoder, BatchOptions(pad_token=0))
    with torch.no_grad():
        logits = model.model(**batch.inputs, use_cache=False).logits[0]
    predicted = logits[len(asked.ids) - 1 : -1].argmax(-1).tolist()
    assert predicted == generated
    # Published models bring a generation config of their own, from which `generate` takes what is left unsaid.
    model.model.generation_config.repetition_penalty = 1e-3
    assert model.generate(asked, clip, 3) == generated, "greedy, whatever the base says"


@pytest.mark.slow
def test_real_footage_from_file_to_page(run, tmp_path):
    source = footage_dir()
    record = json.loads((source / "nl_refer_footage.json").read_text())[0]
    mask, out = tmp_path / "ball.json", tmp_path / "cups.html"
    mask.write_text(json.dumps(record["annotation"][0]))
    prompt = record["conversations"][0]["value"].removeprefix("<video>\n")
    options = ["--model", str(run), "--mask", str(mask), "--out", str(out), "--frames", "16", "--pixels", "40000"]
    done = CliRunner().invoke(app, ["explain", str(source / "cups.mp4"), prompt, *options])
    assert done.exit_code == 0, done.output
    assert "Never trained on such video" in done.output
    with chromium() as driver:
        open_page(driver, out)
        assert driver.execute_script("return document.querySelector('#object option').textContent") == "ball"
        now = 'figure[data-view="0"] .now'
        for frame, said in ((10, "mass"), (150, "object absent")):
            seek(driver, frame)
            assert said in driver.find_element("css selector", now).text
            assert pixels(driver, 'figure[data-view="0"] canvas.heat')[..., 3].any()
