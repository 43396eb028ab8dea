"""Promise: our lmms-eval tasks score as we do, run in lmms-eval itself, and so does an exported model, unmodified."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer
import yaml
from processes import ROOT
from tiny import make_data
from typer.testing import CliRunner

from swim.evaluation.benchmarks import videorefer_q
from swim.evaluation.lmms import TASKS, lmms_path, lmms_predictions, predictions_of
from swim.evaluation.stages import load, score_files
from swim.train.cli import app as command

LMMS = Path(os.environ.get("SWIM_LMMS_ENV", ROOT / ".venv" / "lmms")) / "bin" / "python"
OPTIONS = ["(A) a red cup", "(B) it runs.", "(C) it flies", "(D) both"]
# answer: what the published script reads, what the strict parser reads
ANSWERS = {
    "(B)": ("B", "B"),
    "B) it runs": ("B", "B"),
    "B": ("B", "B"),
    "B.": ("B", "B"),
    "The answer is B": ("T", "B"),
    "the correct option: (C)": ("C", "C"),
    "It Runs": ("I", "B"),
    "A or (B)": ("B", "B"),
    "(A) or (B)": ("A", None),
    "A red cup": ("A", "A"),
    "A dog": ("A", None),
    "": (None, None),
    "I cannot see": ("I", None),
    " B": (" ", "B"),
    "b": ("B", None),
    ".B": ("B", None),
}


def load_utils():
    spec = importlib.util.spec_from_file_location("lmms_utils", TASKS / "utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


utils = load_utils()


def question(number, answer="(B) it runs.", kind="Basic", video="clip.mp4"):
    return {"id": f"q{number}", "video": video, "Question": "What?", "type": kind, "options": OPTIONS, "Answer": answer}


@pytest.mark.parametrize("answer", ANSWERS)
def test_both_parsers_read_what_they_say(answer):
    options = utils.options_of(OPTIONS)
    assert options == {"A": "a red cup", "B": "it runs.", "C": "it flies", "D": "both"}
    assert (utils.parse_official(answer), utils.parse_strict(answer, options)) == ANSWERS[answer]


def test_the_parsers_are_those_of_the_scorer():
    options = utils.options_of(OPTIONS)
    for answer in ANSWERS:
        assert utils.parse_official(answer) == videorefer_q.parse_official(answer), answer
        assert utils.parse_strict(answer, options) == videorefer_q.parse_strict(answer, options), answer


def test_scores_are_micro_and_macro_and_what_names_no_option_is_wrong():
    given = [("Basic", "(B)"), ("Basic", "(C)"), ("Basic", "hm"), ("Future", "it runs")]
    rows = [utils.question_results(question(i, kind=kind), [text]) for i, (kind, text) in enumerate(given)]
    scored = {name: [row[name] for row in rows] for name in rows[0]}
    assert utils.mean_score(scored["accuracy"]) == 1 / 4
    assert utils.mean_score(scored["accuracy_strict"]) == 2 / 4
    assert utils.macro_score(scored["macro_accuracy_strict"]) == (1 / 3 + 1) / 2
    assert utils.mean_score(scored["unparsed_strict"]) == 1 / 4
    with pytest.raises(ValueError, match=r"sample q1: the Answer '' names no option"):
        utils.question_results(question(1, answer=""), ["(B)"])
    assert utils.description_results({"id": "d", "video": "v"}, [" "])["answered"]["score"] == 0


def test_a_sample_without_its_video_is_an_error(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sample q1: no video .*clip\.mp4"):
        utils.doc_to_visual(question(1))
    (tmp_path / "clip.mp4").touch()
    assert utils.doc_to_visual(question(1)) == [str(tmp_path / "clip.mp4")]


def test_every_task_names_functions_that_exist():
    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda _, node: getattr(utils, node.value.removeprefix("utils.")))
    for path in TASKS.glob("*.yaml"):
        task = yaml.load(path.read_text(), Loader)
        assert task["task"] == path.stem
        text = task["doc_to_text"](question(1), task["lmms_eval_specific_kwargs"]["default"])
        assert text.startswith("What?")
        unit = task["process_results"](question(1), ["(B)"])
        assert set(unit) == {metric["metric"] for metric in task["metric_list"]}
        assert all(task["cluster_key"] in part for part in unit.values())


def test_the_tasks_need_nothing_but_the_standard_library():
    """They run where this package is not installed."""
    code = f"import sys; sys.path.insert(0, {str(TASKS)!r}); import utils; print(*sorted(sys.modules))"
    loaded = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"swim", "numpy", "torch"} & {name.split(".")[0] for name in loaded.split()}


def test_the_folder_is_printed_and_samples_become_predictions(tmp_path):
    app = typer.Typer()
    app.command()(lmms_path)
    app.command()(lmms_predictions)
    assert Path(CliRunner().invoke(app, ["lmms-path"]).output.strip()) == TASKS
    unit = {"id": "q1", "video": "clip.mp4", "type": "Basic", "score": 1.0}
    asked = "What?\n" + "\n".join(OPTIONS)
    sample = {"doc_id": 0, "target": "(B)", "filtered_resps": ["B"], "input": asked, "accuracy": unit}
    # A line separator ends no line of JSON; lmms-eval writes it as it is.
    other = sample | {"filtered_resps": ["(A)\u2028"], "accuracy": unit | {"id": "q2"}}
    logged, out = tmp_path / "1_samples_videorefer_bench_q.jsonl", tmp_path / "p.jsonl"
    logged.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in (sample, other)), encoding="utf-8")
    said = CliRunner().invoke(app, ["lmms-predictions", str(logged), "--out", str(out)])
    assert said.output.startswith("2 predictions for videorefer-bench-q")
    line = {"id": "clip.mp4#q1", "clip": "clip.mp4", "task": "Basic", "prompt": asked, "target": "(B)", "answer": "B"}
    assert json.loads(out.read_text().splitlines()[0]) == line | {"nouns": []}
    found = score_files([load(out)], tmp_path)["p"]
    assert (found["accuracy"]["value"], found["accuracy_strict"]["value"]) == (0.5, 0.5), "as our own scorer has it"
    (tmp_path / "samples.jsonl").write_text(json.dumps({"filtered_resps": [], "accuracy": 1.0}) + "\n")
    with pytest.raises(ValueError, match=r"samples.jsonl:1: no id and video"):
        list(predictions_of(tmp_path / "samples.jsonl"))
    said = CliRunner().invoke(
        command, ["evaluate", "lmms-predictions", str(tmp_path / "samples.jsonl"), "--out", str(out)]
    )
    assert (said.exit_code, said.output.count("\n")) == (2, 1), "one message, no traceback"


needs_lmms = pytest.mark.skipif(
    not LMMS.exists(), reason=f"{LMMS} is not there; run 'make lmms-env', or set SWIM_LMMS_ENV to that folder"
)
# As `python -m lmms_eval`; its import declares the operators that torchvision misses on CPU torch.
PROGRAM = "import stock_video_processor\nfrom lmms_eval.__main__ import cli_evaluate\ncli_evaluate()"


def run_lmms(folder, tasks, *arguments):
    """Metrics by task, and the samples files, of a run in lmms-eval's environment on the first four samples."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tests" / "train"), "HF_HOME": str(folder / "hf")}
    command = [str(LMMS), "-c", PROGRAM, "--include_path", str(TASKS), "--tasks", tasks, "--limit", "4"]
    command += ["--batch_size", "1", "--log_samples", "--output_path", "out", *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    (results,) = (folder / "out").rglob("*results.json")
    found = json.loads(results.read_text())["results"]
    assert done.returncode == 0, done.stderr[-3000:]
    metrics = {
        task: {name.split(",")[0]: value for name, value in values.items() if name.endswith(",none")}
        for task, values in found.items()
    }
    samples = {task: next((folder / "out").rglob(f"*samples_{task}.jsonl")) for task in found}
    return metrics, samples


@pytest.fixture
def bench(tmp_path):
    """Five questions and four descriptions about two clips."""
    shards = make_data(tmp_path / "clips", clips=2)
    for number in range(2):
        (tmp_path / f"{number}.mp4").write_bytes(shards.read(number).media())
    kinds, answers = ("Basic", "Basic", "Future", "Future", "Future"), (0, 1, 0, 0, 3)
    questions = [
        question(i, OPTIONS[answer], kind, f"{i % 2}.mp4") for i, (kind, answer) in enumerate(zip(kinds, answers))
    ]
    request = {"Question": "Describe.", "caption": "A dog."}
    described = [{"id": f"d{i}", "video": f"{i % 2}.mp4", **request} for i in range(4)]
    for name, lines in {"q": questions, "d": described}.items():
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / f"videorefer_bench_{name}.jsonl").write_text(text)
    return tmp_path, questions


@pytest.mark.slow
@needs_lmms
def test_lmms_eval_scores_our_tasks_as_we_do(bench):
    folder, questions = bench
    names = "videorefer_bench_q,videorefer_bench_d"
    metrics, samples = run_lmms(folder, names, "--model", "dummy", "--model_args", "response=A")
    rows = [utils.question_results(doc, ["A"]) for doc in questions[:4]]
    want = {
        name: (utils.macro_score if name.startswith("macro") else utils.mean_score)([row[name] for row in rows])
        for name in rows[0]
    }
    assert want["accuracy"] == 0.75
    assert {name: metrics["videorefer_bench_q"][name] for name in want} == pytest.approx(want)
    assert metrics["videorefer_bench_d"]["answered"] == 1.0
    made = list(predictions_of(samples["videorefer_bench_q"]))
    assert [line["id"].partition("#")[2] for line in made] == ["q0", "q1", "q2", "q3"]
    assert {line["answer"] for line in made} == {"A"}
    assert {line["target"] for line in predictions_of(samples["videorefer_bench_d"])} == {"A dog."}


@pytest.mark.slow
@needs_lmms
def test_an_exported_model_runs_in_lmms_eval_unmodified(bench):
    """Its own Qwen2.5-VL class, processor and decoder."""
    from types import SimpleNamespace

    import torch
    from tiny import tiny_config

    from swim.train.export import export
    from swim.train.system import build_system
    from swim.train.weights import save_model
    from swim.train.world import World

    folder, _ = bench
    config = tiny_config(folder / "clips")
    system = build_system(config)
    engine, world = SimpleNamespace(module=system.build_model()), World(0, 1, torch.device("cpu"))
    save_model(engine, folder / "run" / "model", system.tokenizer, None, world)
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (folder / "run" / "done.json").write_text("{}")
    export(folder / "run", folder / "exported", verify=False)
    given = f"pretrained={folder / 'exported'},device=cpu,device_map=cpu,attn_implementation=sdpa,max_num_frames=4"
    budget = "min_pixels=7056,max_pixels=7056"
    metrics, samples = run_lmms(
        folder, "videorefer_bench_q", "--model", "qwen2_5_vl", "--model_args", f"{given},{budget}"
    )
    assert 0 <= metrics["videorefer_bench_q"]["accuracy"] <= 1
    made = list(predictions_of(samples["videorefer_bench_q"]))
    assert [line["id"].partition("#")[2] for line in made] == ["q0", "q1", "q2", "q3"]
