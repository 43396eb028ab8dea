"""Promise: the demo's whole path runs on real processes, its files hold what is promised, and it deletes nothing of
others."""

import json
import re
from operator import itemgetter

import numpy as np
import pytest
import yaml
from processes import environment, finish, start
from tiny import make_data

from swim.evaluation.stages import show
from swim.train import demo
from swim.train.predict import predict

PROMISED = ("accuracy", "pointing", "mass", "ap", "auc", "nss")


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("with blank, and comma") / "demo"
    demo.run_demo(out, seed=0, short=True)
    return out


def test_results_hold_both_arms(short):
    results = json.loads((short / "results.json").read_text())
    for arm in ("sft", "supervised"):
        for metric in PROMISED:
            low, high = results[arm][metric]["interval"]
            assert low <= results[arm][metric]["value"] <= high
        assert results[arm]["seconds"] > 0
        assert results[arm]["peak_memory_mib"] > 100
        assert results[arm]["coverage"]["expected"] == results[arm]["coverage"]["scored"] == 12
        config = yaml.safe_load((short / arm / "config.yaml").read_text())
        assert config["system"]["mask_weight"] == (0.0 if arm == "sft" else 0.2)
        assert json.loads((short / arm / "done.json").read_text())["ranks"] == 2
    assert results["protocol"]["systems"]["supervised"]["mask_weight"] == 0.2
    assert {"value", "interval", "excludes_zero"} <= results["difference"]["pointing"].keys()
    assert "data:image/png;base64" in (short / "report.html").read_text()


def test_the_two_arms_start_from_the_same_weights_and_see_the_same_batches(short):
    first = [json.loads((short / arm / "metrics.jsonl").read_text().splitlines()[0]) for arm in ("sft", "supervised")]
    for name in ("loss/text", "loss/mask", "count/tokens", "lr"):
        assert first[0][name] == first[1][name]


def test_table_over_seeds_is_made_of_the_results(short, tmp_path):
    demo.write_table(tmp_path / "demo.md", {0: short, 7: short})
    table = (tmp_path / "demo.md").read_text()
    results = json.loads((short / "results.json").read_text())
    assert f"{results['supervised']['auc']['value']:.3f} [" in table
    assert "| 7 | pointing |" in table
    assert re.search(r"swim demo --seed 0 --seed 7 --table", table)


def test_predictions_are_kept_and_belong_to_data_and_weights(short, tmp_path):
    run, data = short / "supervised", short / "data" / "held_out"
    path, ids = predict(run, data)
    before = path.read_text()
    assert len(before.splitlines()) == len(ids)
    # Cut off in mid-write, and one sample that failed: both are done again, the rest is kept.
    lines = before.splitlines()
    failed = json.dumps({"id": json.loads(lines[0])["id"], "clip": "x", "error": "disk"})
    path.write_text("\n".join([failed, *lines[1:-1], lines[-1][:50]]))
    again, _ = predict(run, data)
    redone, wanted = (
        sorted(map(json.loads, text.splitlines()), key=itemgetter("id")) for text in (again.read_text(), before)
    )
    # A conversation that is predicted without its neighbours stands in another sequence: equal but for rounding.
    for got, want in zip(redone, wanted, strict=True):
        maps = [np.array([noun.pop("map") for noun in line["nouns"]]) for line in (got, want)]
        assert got == want
        np.testing.assert_allclose(*maps, atol=1e-5)
    other = make_data(tmp_path / "other", clips=2, seed=9)
    elsewhere, _ = predict(run, other.folder)
    assert elsewhere != path
    assert path.read_text() == again.read_text()


def test_an_unfinished_run_and_missing_figures_are_said(tmp_path):
    (tmp_path / "config.yaml").touch()
    with pytest.raises(FileNotFoundError, match="not finished"):
        predict(tmp_path, tmp_path)
    assert show({"value": None, "interval": None}) == "-"
    assert show({"value": 0.5, "interval": None}) == "0.500"


def test_a_folder_of_somebody_else_is_not_removed(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(demo.DemoError, match="holds files that no demo made"):
        demo.run_demo(tmp_path, seed=0, short=True)
    assert (tmp_path / "thesis.tex").exists()


def test_other_synthetic_data_than_asked_for_is_refused(short, tmp_path):
    assert "HF_HUB_OFFLINE" in environment()
    train = json.dumps([str(short / "data" / "train")])
    code, output = finish(start([f"data.train={train}", "data.synth.clips=13", "run.steps=1"], cwd=tmp_path))
    assert code == 2
    assert '"clips": 12' in output
    assert "remove that folder, or set data.synth=null" in output
