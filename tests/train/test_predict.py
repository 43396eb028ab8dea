"""Promise: predictions of a run or of any stock model say what they are of, go on after a kill, and keep what was asked
for in the words that were asked for."""

import json
import multiprocessing
import signal
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from tiny import make_data, requests, tiny_config

from swim.data_tools.convert import convert
from swim.data_tools.records import Mention, Turn
from swim.data_tools.rewording import letter_of, options_of
from swim.data_tools.rle import encode_mask
from swim.data_tools.sources.nl_refer import SOURCE as NL_REFER
from swim.data_tools.video import encode_video
from swim.evaluation.benchmarks.alignment import score
from swim.evaluation.detail import decode_maps
from swim.evaluation.predictions import parse_prediction, read_header, read_lines
from swim.evaluation.scores import Settings
from swim.evaluation.stages import load, score_files
from swim.train.config import ConfigError
from swim.train.predict import Options, find_model, predict, reword, safetensors_digest
from swim.train.system import Request, View, build_system

QUICK = Options(max_new_tokens=2)  # a model that was never trained says as much as it may
DEEP = ["system.layers=[1, 3]", "data.synth=null", "data.tasks=null"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("clips"), clips=3)


@pytest.fixture(scope="module")
def built(shards):
    system = build_system(tiny_config(shards.folder, "data.tasks=null"))
    return system, system.build_model().eval()


@pytest.fixture(scope="module")
def run_folder(built, tmp_path_factory):
    """What a finished run leaves, but for the training."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    system, model = built
    model.save_pretrained(folder / "model")
    system.tokenizer.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(yaml.safe_dump(system.config.model_dump(mode="json")))
    (folder / "done.json").write_text(json.dumps({"seconds": 3.5, "peak_memory_mib": 100.0}))
    return folder


def lines_of(path):
    return {id: parse_prediction(line) for id, line in read_lines(path).by_id.items()}


def same_maps(a, b, atol=1e-5):
    for x, y in zip(a.nouns, b.nouns, strict=True):
        np.testing.assert_allclose(x.map, y.map, atol=atol)


def test_the_header_says_what_was_predicted(run_folder, shards):
    path, ids = predict(run_folder, shards.folder, options=QUICK)
    header = read_header(path)
    assert [entry.id for entry in header.expected] == ids
    assert set(read_lines(path).by_id) == set(ids)
    assert {entry.task for entry in header.expected} >= {"direction"}
    conversation = shards.read(0).record.conversations[0]
    assert header.expected[0].target == conversation.turns[-1].text
    counted = {entry.id: entry.nouns for entry in header.expected}
    assert counted == {name: len(line.nouns) for name, line in lines_of(path).items()}, "else omissions go unseen"
    assert max(counted.values()) > 0
    about = header.provenance
    assert about["data"]["sha256"] == shards.digest
    assert about["model"]["dtype"] == "float32"
    assert about["sampling"]["num_frames"] == 4
    assert about["figures"] == {"seconds": 3.5, "peak_memory_mib": 100.0}
    assert set(about["software"]) >= {"swim", "commit", "torch", "transformers", "python"}
    assert score(load(path), Settings(resamples=50))["coverage"]["scored"] == len(ids)


def test_a_stock_model_folder_with_a_recipe_predicts_the_same(run_folder, shards, tmp_path):
    with pytest.raises(ConfigError, match="--recipe"):
        find_model(run_folder / "model")
    with pytest.raises(ConfigError, match="brings its own recipe"):
        find_model(run_folder, "tiny_cpu")
    with pytest.raises(FileNotFoundError, match="neither a run"):
        find_model(tmp_path)
    model = find_model(run_folder / "model", "tiny_cpu", DEEP)
    with pytest.raises(ConfigError, match="name a file with --out"):
        predict(model, shards.folder)
    path, ids = predict(model, shards.folder, options=QUICK, out=tmp_path / "stock.jsonl")
    mine, stock = lines_of(predict(run_folder, shards.folder, options=QUICK)[0]), lines_of(path)
    for id in ids:
        assert stock[id].answer == mine[id].answer
        same_maps(stock[id], mine[id])
    assert read_header(path).provenance["model"]["weights_sha256"] == find_model(run_folder).weights


def test_predictions_of_something_else_are_not_added_to(run_folder, shards, tmp_path):
    out = tmp_path / "p.jsonl"
    predict(run_folder, shards.folder, options=QUICK, out=out)
    before = out.read_bytes()
    other = make_data(tmp_path / "other", clips=1, seed=9)
    with pytest.raises(ConfigError, match="with other expected ids"):
        predict(run_folder, other.folder, options=QUICK, out=out)
    with pytest.raises(ConfigError, match="with other options"):
        predict(run_folder, shards.folder, out=out, options=Options(max_new_tokens=3))
    shallow = find_model(run_folder / "model", "tiny_cpu", ["system.layers=[0]", *DEEP[1:]])
    with pytest.raises(ConfigError, match="with other system"):
        predict(shallow, shards.folder, options=QUICK, out=out)
    own = find_model(run_folder)
    coarse_model = own.config.model.model_copy(update={"dtype": "bfloat16"})
    coarse = replace(own, config=own.config.model_copy(update={"model": coarse_model}))
    with pytest.raises(ConfigError, match="with other adapter, data type or attention"):
        predict(coarse, shards.folder, options=QUICK, out=out)
    changed = replace(own, weights="0" * 64)
    with pytest.raises(ConfigError, match="with other weights"):
        predict(changed, shards.folder, options=QUICK, out=out)
    assert out.read_bytes() == before
    out.with_suffix(".meta.json").unlink()
    with pytest.raises(ConfigError, match="without a header"):
        predict(run_folder, shards.folder, options=QUICK, out=out)
    out.write_bytes(b"")  # an attempt that ended before its first line
    assert predict(run_folder, shards.folder, options=QUICK, out=out)[0].read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"no \*.safetensors in it"):
        safetensors_digest(tmp_path)


def test_a_killed_prediction_goes_on(run_folder, tmp_path):
    # A real process, killed as soon as some lines are there; the next one adds the others and no line twice.
    many = make_data(tmp_path / "many", clips=16, seed=11)
    out = tmp_path / "p.jsonl"
    given = {"options": QUICK, "out": out}
    process = multiprocessing.get_context("fork").Process(target=predict, args=(run_folder, many.folder), kwargs=given)
    process.start()
    deadline = time.monotonic() + 120
    while not (out.exists() and out.read_bytes().count(b"\n") >= 3):
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    first = out.read_bytes()
    kept = set(read_lines(out).by_id)
    ids = {entry.id for entry in read_header(out).expected}
    assert 3 <= len(kept) < len(ids)
    out.write_bytes(first + b'{"id": "cut')
    predict(run_folder, many.folder, options=QUICK, out=out)
    lines = read_lines(out)
    assert (set(lines.by_id), lines.duplicates, lines.broken) == (ids, 0, ())
    assert out.read_bytes().startswith(first[: first.rindex(b"\n") + 1])


def test_kept_layers_and_heads_mean_up_to_the_map(built, shards):
    system, model = built
    request = requests(shards, [0])[0]
    plain = system.predict(model, request)
    view = View(frozenset({"layers", "heads", "pixels"}), "all")
    kept = system.predict(model, request, view)
    for line, bare in zip(kept, plain, strict=True):
        for noun, without in zip(line["nouns"], bare["nouns"], strict=True):
            np.testing.assert_allclose(noun["map"], without["map"], atol=1e-6)
            assert "detail" not in without
            detail = noun["detail"]
            steps, grid = detail["steps"], noun["grid"]
            assert (detail["layers"], detail["heads"]) == ([0, 1, 2, 3], 4)
            assert steps == [t for t, c in enumerate(noun["coverage"]) if c is not None and np.any(c)]
            if not steps:
                continue
            layers = decode_maps(detail["layer_maps"], (4, len(steps), *grid[1:]))
            # Every map is scaled to a peak of 1, and over its own frame it sums to 1: its scale can be had back.
            assert system.options.softmax_scope == "frame"
            scaled = layers / layers.sum((-2, -1), keepdims=True)
            np.testing.assert_allclose(scaled[[1, 3]].mean(0), np.array(noun["map"])[steps], atol=2e-3)
            heads = decode_maps(detail["head_maps"], (4, 4, len(steps), *grid[1:]))
            heads = heads / heads.sum((-2, -1), keepdims=True)
            np.testing.assert_allclose(heads.mean(1), scaled, atol=2e-3)
            tokens = decode_maps(detail["token_maps"], (-1, *grid))
            tokens = tokens / tokens.sum((-2, -1), keepdims=True)
            np.testing.assert_allclose(tokens.mean(0), noun["map"], atol=2e-3)


def test_kept_masks_are_those_of_the_data(built, shards):
    system, model = built
    sample = shards.read(0)
    for line in system.predict(model, requests(shards, [0])[0], View(frozenset({"pixels"}))):
        for noun in line["nouns"]:
            shown = {frame for step in noun["frames"] for frame in step}
            (object_id,) = noun["object_ids"]
            annotated = {frame for frame in sample.masks[object_id] if frame in shown}
            assert {int(frame) for frame in noun["detail"]["masks"]} == annotated
            for frame, rle in noun["detail"]["masks"].items():
                stored = sample.masks[object_id][int(frame)]
                if stored is not None:
                    assert rle["counts"] == stored.counts


def test_synonyms_change_the_prompt_and_keep_ids_and_masks(run_folder, shards, tmp_path):
    words = tmp_path / "words.json"
    words.write_text(json.dumps({"circle": "disc", "square": "box", "triangle": "wedge"}))
    plain = lines_of(predict(run_folder, shards.folder, options=QUICK)[0])
    path, _ = predict(run_folder, shards.folder, options=replace(QUICK, synonyms=words))
    other = lines_of(path)
    assert other.keys() == plain.keys()
    changed = [id for id in plain if plain[id].prompt != other[id].prompt]
    assert changed
    for id in plain:
        assert other[id].target == plain[id].target
        for noun, before in zip(other[id].nouns, plain[id].nouns, strict=True):
            assert noun.object_ids == before.object_ids
            if noun.turn == 0:
                assert other[id].prompt[noun.start : noun.end].endswith(noun.text)  # "purple diamond" is about the noun
            for a, b in zip(noun.coverage, before.coverage, strict=True):
                assert (a is None) == (b is None)
                assert a is None or np.array_equal(a, b)
    assert any(n.text in ("disc", "box", "wedge") for line in other.values() for n in line.nouns)
    assert "words.json" in read_header(path).protocol["synonyms"]
    words.write_text('{"circle": 1}')
    with pytest.raises(ConfigError, match=r"must hold \{noun: synonym\}"):
        predict(run_folder, shards.folder, options=replace(QUICK, synonyms=words))


def _tagged(sample, target, mentioned):
    """The sample's first conversation with this target, of which `mentioned` names the first object."""
    record = sample.record
    at = target.index(mentioned)
    mention = Mention(start=at, end=at + len(mentioned), head=(at, at + len(mentioned)),
                      object_ids=[record.objects[0].id])  # fmt: skip
    first = record.conversations[0]
    turns = [*first.turns[:-1], Turn(role="assistant", text=target, mentions=[mention])]
    conversations = [first.model_copy(update={"turns": turns}), *record.conversations[1:]]
    return replace(sample, record=record.model_copy(update={"conversations": conversations}))


def test_maps_over_the_generated_answer_find_its_nouns(built, shards, monkeypatch):
    system, model = built
    request = Request(_tagged(shards.read(0), "A circle, left of it.", "circle"), (0,))
    (forced,) = system.predict(model, request)
    in_target = [noun for noun in forced["nouns"] if noun["turn"] == 1]
    assert [noun["start"] for noun in in_target] == [2]
    monkeypatch.setattr(system, "_answers", lambda *_: ["The circles? A Circle there."])
    (said,) = system.predict(model, request, View(generated=True, max_new_tokens=2))
    assert (said["answer"], said["target"]) == ("The circles? A Circle there.", "A circle, left of it.")
    (found,) = [noun for noun in said["nouns"] if noun["turn"] == 1]
    # A whole word in any case; not the one within "circles".
    assert said["answer"][found["start"] : found["end"]] == "Circle"
    assert "unsaid" not in said
    monkeypatch.setattr(system, "_answers", lambda *_: ["left"])
    (silent,) = system.predict(model, request, View(generated=True, max_new_tokens=2))
    assert silent["unsaid"] == [{"text": "circle", "object_ids": in_target[0]["object_ids"]}]
    assert [noun["turn"] for noun in silent["nouns"]] == [0]
    # A noun of the prompt stands before the answer: whatever follows, its map is the same.
    prompts = [next(n["map"] for n in line["nouns"] if n["turn"] == 0) for line in (forced, said, silent)]
    for other in prompts[1:]:
        np.testing.assert_allclose(other, prompts[0], atol=1e-5)
    monkeypatch.setattr(system, "_answers", lambda *_: [""])
    (empty,) = system.predict(model, request, View(generated=True, max_new_tokens=2))
    assert empty["answer"] == ""
    assert [noun["turn"] for noun in empty["nouns"]] == [0]


def test_options_are_shuffled_in_prompt_and_target(run_folder, built, shards, tmp_path):
    with pytest.raises(ConfigError, match="no question with lettered options"):
        predict(run_folder, shards.folder, options=replace(QUICK, shuffle_options=1), out=tmp_path / "p.jsonl")
    sample = shards.read(0)
    prompt = sample.record.conversations[0].turns[0].text + "\n(A) left\n(B) right\n(C) up"
    turns = [
        sample.record.conversations[0].turns[0].model_copy(update={"text": prompt}),
        Turn(role="assistant", text="(B)"),
    ]
    asked = sample.record.conversations[0].model_copy(update={"turns": turns})
    changed = replace(sample, record=sample.record.model_copy(update={"conversations": [asked]}))
    system, model = built
    again = reword(changed, (0,), Options(shuffle_options=1))
    (line,) = system.predict(model, Request(again, (0,)), View(max_new_tokens=2))
    assert options_of(line["prompt"])[letter_of(line["target"])] == "right"
    assert line["prompt"] != prompt


def test_a_question_of_the_benchmark_goes_from_its_file_to_a_score(run_folder, tmp_path):
    size = 112
    mask = np.zeros((size, size), bool)
    mask[20:60, 20:50] = True
    (tmp_path / "a.mp4").write_bytes(encode_video(np.full((6, size, size, 3), 90, np.uint8), 6))
    rle = encode_mask(mask)
    options = ["(A) left", "(B) right", "(C) up", "(D) down"]
    question = "Which way does the <ins>circle</ins> go?"
    row = {"video": "a.mp4", "Question": question, "options": options, "Answer": "(B)", "type": "Basic"}
    row["annotation"] = [{"0": {"segmentation": rle | {"size": list(rle["size"])}}}]
    (tmp_path / "q.json").write_text(json.dumps([row]))
    convert(NL_REFER, [tmp_path / "q.json"], tmp_path / "shards", video_root=tmp_path)
    asked = replace(QUICK, benchmark="videorefer-bench-q")
    paths = {}
    for name, changed in {"plain": asked, "shuffled": replace(asked, shuffle_options=3)}.items():
        paths[name], ids = predict(run_folder, tmp_path / "shards", options=changed, out=tmp_path / f"{name}.jsonl")
    found = score_files([load(paths["plain"])], tmp_path / "out", variants={"shuffled": load(paths["shuffled"])})
    (id,) = ids
    assert found["mine"]["coverage"]["scored"] == 1
    assert list(found["mine"]["by_type"]) == ["multiple_choice: Basic"]
    lines = {name: lines_of(path)[id] for name, path in paths.items()}
    for line in lines.values():
        assert options_of(line.prompt)[letter_of(line.target)] == "right"
        assert [noun.text for noun in line.nouns] == ["circle"]
    assert lines["plain"].target == "(B)" != lines["shuffled"].target
    assert found["mine"]["variants"]["shuffled"]["consistency"]["num"] == 1


def test_nothing_is_learned_while_predicting(built, shards):
    system, model = built
    before = {name: p.clone() for name, p in model.named_parameters()}
    system.predict(model, requests(shards, [0])[0], View(frozenset({"heads"})))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
