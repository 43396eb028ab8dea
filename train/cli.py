"""The `swim` command: data, estimate, train, evaluate, explain, export, demo, doctor."""

import contextlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from typer.core import TyperGroup

from swim.data_tools.cli import Folder, Layers, check_key, one_message, progress
from swim.data_tools.cli import app as data_app
from swim.evaluation.cli import judge_check, print_results, report, score
from swim.evaluation.lmms import lmms_path, lmms_predictions

app = typer.Typer(
    no_args_is_help=True, add_completion=False, help="Fine-grained video understanding by attention supervision."
)
app.add_typer(data_app, name="data")

Run = Annotated[Path, typer.Argument(help="Folder of a finished run.")]


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(context: typer.Context) -> None:
    """Train a recipe: swim train [--config RECIPE] [section.key=value ...]; the same as `bash launch/train.sh`.

    With --dry-run [--world-size N], only walk the plan of N ranks and check the configuration; needs no GPU.
    """
    from swim.train.demo import launch

    if "--dry-run" in context.args:
        from swim.train.__main__ import main

        main(context.args)
        return

    raise typer.Exit(launch(context.args))


@app.command()
@one_message
def estimate(
    recipe: Annotated[str, typer.Argument(help="Recipe: a path, or the name of a file in recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    gpus: Annotated[str | None, typer.Option(help="COUNTxDEVICE, as in 8xH100; default: launch.ranks CPUs.")] = None,
    tokens: Annotated[int | None, typer.Option(min=8, help="Tokens of a pack, if the data is not there yet.")] = None,
    memory: Annotated[float | None, typer.Option(min=0, help="GB of a device, instead of its data sheet's.")] = None,
    scaling: Annotated[bool, typer.Option("--scaling", help="Print the page docs/scaling.md of the recipe.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Memory, traffic, steps and a verdict before a run, with ways to fit; exit with 1 if it does not. Needs no GPU."""
    from swim.train import estimate as before
    from swim.train.config import load_config

    config = load_config(recipe, overrides or ())
    if scaling:
        print(before.scaling(config, Path(recipe).stem), end="")
        return
    size = None if memory is None else int(memory * 1e9)
    with contextlib.redirect_stdout(sys.stderr):  # what counting tokens says
        found = before.estimate(config, gpus, tokens=tokens, ranks=config.launch.ranks or 1, memory=size)
    print(json.dumps(before.describe(found), indent=2) if as_json else before.report(found))
    if found.fits is False:
        raise typer.Exit(1)


@data_app.command()
def plan(
    recipe: Annotated[str, typer.Argument(help="Recipe: a path, or the name of a file in recipes/.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="section.key=value ...")] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Number of ranks; default: launch.ranks, or 1.")] = None,
) -> None:
    """Print what an epoch of a recipe will be: steps, packs, tokens, shares, balance between ranks. Needs no GPU."""
    from swim.train.config import load_config
    from swim.train.plan_report import plan_report

    try:
        config = load_config(recipe, overrides or ())
        print(plan_report(config, world_size or config.launch.ranks or 1))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None


class _RunsByDefault(TyperGroup):
    """A group whose first word, where it is no command, is the first argument of `run`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["run", *args]
        return super().parse_args(ctx, args)


evaluation = typer.Typer(
    cls=_RunsByDefault,
    no_args_is_help=True,
    help="Predict, score and report. `swim evaluate RUN [RUN2] --data D` does all three.",
)
app.add_typer(evaluation, name="evaluate")
evaluation.command()(score)
evaluation.command()(report)
evaluation.command()(judge_check)
evaluation.command()(lmms_path)
evaluation.command("lmms-predictions")(one_message(lmms_predictions))


@evaluation.command()
def run(
    runs: Annotated[list[Path], typer.Argument(help="Folders of one or two finished runs; the first is the baseline.")],
    data: Annotated[str, typer.Option(help="Held-out folder of shards or JSONL files, a JSONL file, or a URL.")],
    out: Annotated[
        Path | None, typer.Option(help="Folder for results.json and report.html; default: the last run.")
    ] = None,
) -> None:
    """Predict, score and report: answers, alignment of noun attention with masks, and a page to look at."""
    from swim.train.config import ConfigError
    from swim.train.demo import evaluate_runs

    names = [run.resolve().name for run in runs]
    if len(runs) > 2 or len(set(names)) < len(names):
        raise ConfigError(f"runs are {', '.join(map(str, runs))}; give one, or two whose folders have different names")
    print_results(evaluate_runs(dict(zip(names, runs)), data, out or runs[-1]))


@evaluation.command()
@one_message
def predict(
    model: Annotated[Path, typer.Argument(help="Folder of a finished run, or of a model in stock form.")],
    data: Annotated[str, typer.Option(help="Held-out folder of shards or JSONL files, a JSONL file, or a URL.")],
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the recipe: section.key=value ...")] = None,
    recipe: Annotated[str | None, typer.Option(help="How to ask a model folder; a run brings its own.")] = None,
    out: Annotated[Path | None, typer.Option(help="File to write; default: in the run's folder.")] = None,
    name: Annotated[str | None, typer.Option(help="What the results call it; default: the folder's name.")] = None,
    benchmark: Annotated[str, typer.Option(help="Protocol id that it will be scored by.")] = "alignment-grid",
    keep: Annotated[list[str] | None, typer.Option(help="Also keep maps: layers, heads, pixels.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers to keep: all, even:N, last:N; default: the run's.")] = None,
    generated: Annotated[bool, typer.Option("--generated", help="Maps over the model's own answer.")] = False,
    synonyms: Annotated[Path | None, typer.Option(help="JSON {noun: synonym} for the prompts' nouns.")] = None,
    shuffle_options: Annotated[int | None, typer.Option(help="Seed of another order of the options.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 64,
) -> None:
    """Write predictions, a line per id; run it again after a stop, it goes on."""
    from dataclasses import replace

    from swim.train.predict import Options, check_keep, find_model
    from swim.train.predict import predict as predict_ids

    options = Options(
        benchmark=benchmark,
        keep=check_keep(keep or ()),
        layers=layers,
        maps="generated" if generated else "teacher",
        synonyms=synonyms,
        shuffle_options=shuffle_options,
        max_new_tokens=max_new_tokens,
    )
    found = find_model(model, recipe, overrides or ())
    path, ids = predict_ids(replace(found, name=name or found.name), data, options=options, out=out)
    print(f"{len(ids)} ids: {path}")


# A data command, but made of training code, which data_tools does not import.
@data_app.command()
@one_message
def inspect(
    folder: Folder,
    recipe: Annotated[str, typer.Option(help="Recipe whose sampling, grid and options are applied.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")],
    chosen: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY]... [SECTION.KEY=VALUE]...", help="Samples, and overrides of the recipe."),
    ] = None,
    limit: Annotated[int, typer.Option(metavar="N", min=1, help="Samples, where no KEY is given: the first N.")] = 10,
    layers: Layers = None,
) -> None:
    """Write a page of what training makes of clips: frames, masks, their coverage of the grid, tokens, nouns."""
    from swim.data_tools.shards import ShardSet
    from swim.train.config import load_config
    from swim.train.system import page_writer

    chosen = chosen or []
    shards = ShardSet(folder, layers=layers or ())
    keys = [text for text in chosen if "=" not in text]
    for key in keys:
        check_key(shards, key)
    config = load_config(recipe, [text for text in chosen if "=" in text])
    samples = ((shards, key, None) for key in progress(keys or shards.keys()[:limit], "inspecting"))
    title = f"What {recipe} makes of {Path(folder).resolve().name}"
    shown, bad = page_writer(config)(samples, config, out, title=title, origin=f"shards {shards.digest[:12]}")
    print(f"{shown} clips shown, {bad} left out (the page says why): {out}")
    if bad:
        raise typer.Exit(1)


@data_app.command()
@one_message
def replay(
    run: Annotated[Path, typer.Argument(help="Folder of a run, finished or not.")],
    step: Annotated[int, typer.Option(help="Step as metrics.jsonl counts them, from 1.")],
    rank: Annotated[int | None, typer.Option(help="One rank; default: all.")] = None,
    world_size: Annotated[int | None, typer.Option(min=1, help="Number of ranks; default: the run's.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Folders of data.train, if they have moved.")] = None,
    out: Annotated[Path | None, typer.Option(help="HTML page to write: what training made of these samples.")] = None,
    tensors: Annotated[Path | None, typer.Option(help="safetensors file to write: the batches.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the samples behind a step's loss, made again and compared with the log; exit with 1 if they differ."""
    from swim.train.replay import describe, replay_report, save_tensors
    from swim.train.replay import replay as replay_step
    from swim.train.system import page_writer

    found = replay_step(run, step, rank=rank, num_ranks=world_size, data=data or ())
    print(json.dumps(describe(found), indent=2) if as_json else replay_report(found))
    if tensors is not None:
        print(f"{save_tensors(found, tensors)} tensors: {tensors}", file=sys.stderr)
    if out is not None:
        title = f"Step {step} of {run.resolve().name}" + ("" if rank is None else f", rank {rank} of {found.num_ranks}")
        origin = f"plan {found.position.plan_digest[:12]}"
        shown, bad = page_writer(found.config)(found.units(), found.config, out, title=title, origin=origin)
        print(f"{shown} clips shown, {bad} holes (the page says why): {out}", file=sys.stderr)
    if found.differences:
        raise typer.Exit(1)


@data_app.command()
@one_message
def bench(
    folder: Folder,
    overrides: Annotated[list[str] | None, typer.Argument(help="Of the recipe: section.key=value ...")] = None,
    recipe: Annotated[str | None, typer.Option(help="Also the cores that feed a GPU with samples of a recipe.")] = None,
    step_seconds: Annotated[
        float | None, typer.Option(min=1e-6, help="Time of a step on a GPU; without it, one is assumed.")
    ] = None,
    samples_per_step: Annotated[int, typer.Option(min=1, help="Clips of a step on one GPU.")] = 4,
    limit: Annotated[int, typer.Option(min=1, help="Clips of the folder that are measured with the recipe.")] = 4,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure masks, reads, decoders and planning on this machine, and the CPU cores a GPU needs. Takes a minute."""
    from swim.data_tools.bench import bench as measured
    from swim.data_tools.bench import table
    from swim.data_tools.shards import ShardSet
    from swim.train.config import load_config
    from swim.train.data_cost import cores_per_gpu, sample_cost

    shards = ShardSet(folder)
    found = {}
    if recipe is not None:
        cost = sample_cost(load_config(recipe, overrides or ()), shards, limit)
        found["recipe"] = cost._asdict() | cores_per_gpu(cost, samples_per_step, step_seconds)
    found |= measured(shards)
    print(json.dumps(found, indent=2) if as_json else table(found))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of the demo.")] = Path("runs/demo"),
    seed: Annotated[
        list[int] | None, typer.Option(help="Seed of model and order; give several for a table over seeds.")
    ] = None,
    short: Annotated[
        bool, typer.Option("--short", help="A few steps only: checks the path, shows nothing about the method.")
    ] = False,
    table: Annotated[Path | None, typer.Option(help="Write the table over the seeds into this Markdown file.")] = None,
) -> None:
    """Train the tiny model with and without supervision and write a report about the difference."""
    from swim.train.demo import run_demo, write_table

    seeds = seed or [0]
    folders = [out if len(seeds) == 1 else out / f"seed{number}" for number in seeds]
    for folder, number in zip(folders, seeds):
        run_demo(folder, seed=number, short=short)
    if table is not None:
        write_table(table, dict(zip(seeds, folders)))


@app.command()
@one_message
def explain(
    video: Annotated[str, typer.Argument(help="Video file; or a folder of shards, with --key.")],
    prompt: Annotated[str, typer.Argument(help='What to ask, nouns tagged or not: "What does the <ins>dog</ins> do?"')],
    model: Annotated[str, typer.Option(help="Folder of a finished run, of any stock model, or a hub id.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")],
    compare: Annotated[str | None, typer.Option(help="A second model, shown beside the first.")] = None,
    key: Annotated[str | None, typer.Option(help="Sample of the shards, whose masks are shown.")] = None,
    mask: Annotated[Path | None, typer.Option(help="Masks of the video file: a JSON file (docs/explain.md).")] = None,
    cells: Annotated[Path | None, typer.Option("--json", help="Also write the raw cells of the maps.")] = None,
    layers: Annotated[str | None, typer.Option(help="Layers: 2,7,12, even:6, last:4 or all (the default).")] = None,
    frames: Annotated[int | None, typer.Option(min=1, help="Frames sampled; default: the model's recipe.")] = None,
    pixels: Annotated[int | None, typer.Option(min=1, help="Most pixels of a frame; default: the recipe's.")] = None,
    answer_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the answer, at most.")] = 64,
    nouns: Annotated[str, typer.Option(help="Who finds nouns without tags: auto, spacy, built-in.")] = "auto",
    side: Annotated[int, typer.Option(min=64, help="Shorter side in pixels of the video in the page.")] = 360,
    page_mib: Annotated[float, typer.Option(min=0, help="Maps in the page, at most; what goes is named.")] = 12.0,
) -> None:
    """Write a page that plays the video with the attention of each word of prompt and answer. Needs no GPU."""
    from swim.data_tools.shards import ShardSet
    from swim.train.explain.command import explain as explained
    from swim.train.explain.command import sample_subject, video_subject
    from swim.train.explain.look import Options

    if Path(video).is_file() if key is not None else Path(video).is_dir():
        raise ValueError(f"{video}: give a video file without --key, or a folder of shards with it")
    if key is not None and mask is not None:
        raise ValueError(f"--mask {mask}: the masks of --key {key} are its own; give one of them")
    if key is None:
        subject = video_subject(Path(video), mask)
    else:
        check_key(shards := ShardSet(video), key)
        subject = sample_subject(shards, key)
    options = Options(frames, pixels, layers, nouns, answer_tokens, side, page_mib)
    models = [model, *([compare] if compare else [])]
    found = explained(subject, prompt, models, out, cells=cells, options=options)
    for name, answer in found.answers.items():
        print(f"{name}: {answer!r}")
    for line in found.said:
        print(line)
    print(f"{out}: " + ", ".join(f"{part} {size / 2**20:.2f} MiB" for part, size in found.sizes.items()))


@app.command()
@one_message
def export(
    run: Annotated[Path, typer.Argument(help="Folder of a run.")],
    out: Annotated[Path, typer.Option(help="Folder to write; an earlier export there is replaced.")],
    lora: Annotated[Literal["merged", "adapter"], typer.Option(help="Adapters: in the weights, or alone.")] = "merged",
    checkpoint: Annotated[
        str | None, typer.Option(metavar="last|best|STEP", help="Of a checkpoint; default: the finished run's model.")
    ] = None,
    verify: Annotated[bool, typer.Option(help="Check names, a stock reload, logits, base and adapters.")] = True,
    base: Annotated[str | None, typer.Option(help="Where the run's base model lies now.")] = None,
    results: Annotated[Path | None, typer.Option(help="results.json of the run, for the model card.")] = None,
    licence: Annotated[str | None, typer.Option("--license", help="For the card; default: the base's.")] = None,
) -> None:
    """Write a run's model as a stock transformers folder and verify it; exit with 1 if a check fails."""
    from swim.train.export import export as export_run
    from swim.train.export import report

    exported = export_run(
        run, out, form=lora, checkpoint=checkpoint, base=base, verify=verify, results=results, licence=licence
    )
    print(report(exported))
    if not exported.passed:
        raise typer.Exit(1)


@app.command()
def doctor(
    run: Annotated[
        Path | None, typer.Argument(help="Run folder: how is the run? Without it: how is this machine?")
    ] = None,
    disk: Annotated[Path, typer.Option(help="Folder of runs, whose disk is measured.")] = Path("runs"),
    data: Annotated[str | None, typer.Option(help="Data set, whose reads are measured.")] = None,
) -> None:
    """Say whether this machine (under srun or a launcher: all of them, with the network) or a run is well; exit with 1
    if not."""
    from swim.train.doctor import block, check_machine
    from swim.train.doctor_ranks import check_ranks
    from swim.train.doctor_run import check_run
    from swim.train.world import find_place

    if run is None and find_place()[1] > 1:
        raise typer.Exit(check_ranks(disk, data))
    findings = check_machine(disk, data) if run is None else check_run(run)
    print(block(findings))
    if any(finding.remedy for finding in findings):
        raise typer.Exit(1)


def main() -> None:
    """Run the command; what a user can mend is one message and exit code 2."""
    # Before torch is imported: on a few cores a second thread only waits for the first.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if shutil.which("nvidia-smi") is None:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed announces its choice on stdout
    from safetensors import SafetensorError

    from swim.data_tools.mixture import PlanError
    from swim.data_tools.shards import ShardError
    from swim.train.config import ConfigError
    from swim.train.demo import DemoError

    try:
        app()
    except SafetensorError as error:
        print(f"error: a safetensors file of the model is damaged or cut off ({error})", file=sys.stderr)
        raise SystemExit(2) from None
    except (ConfigError, DemoError, ShardError, PlanError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
