"""`swim evaluate score | report | judge-check`: what needs neither torch nor a model. `predict` is the trainer's."""

import functools
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from swim.evaluation import judge_cli as options
from swim.evaluation.predictions import PredictionsError

Out = Annotated[Path | None, typer.Option(help="Folder of the results; default: that of the predictions.")]


def one_message(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, with errors of files and of data as one line and exit code 2."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


@one_message
def score(
    predictions: Annotated[Path, typer.Argument(help="predictions.jsonl, with its header beside it.")],
    baseline: Annotated[Path | None, typer.Option(help="Predictions of the same ids to compare with.")] = None,
    names: Annotated[str | None, typer.Option(help="NAME or BASELINE,NAME instead of the runs' own.")] = None,
    benchmark: Annotated[str | None, typer.Option(help="Protocol id; default: the header's.")] = None,
    expected: Annotated[Path | None, typer.Option(help="Header, if it does not lie beside the predictions.")] = None,
    synonyms: Annotated[Path | None, typer.Option(help="Predictions of the same ids with other words.")] = None,
    shuffled: Annotated[
        Path | None, typer.Option(help="Predictions of the same ids, options in another order.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the bootstrap.")] = 0,
    resamples: Annotated[int, typer.Option(min=1, help="Draws of the bootstrap.")] = 2000,
    out: Out = None,
    judge_url: options.Url = None,
    judge_model: options.ModelName = None,
    judge_profile: options.ProfileName = "robust",
    judge_prompt: options.Prompt = None,
    judge_repeats: options.Repeats = 1,
    judge_workers: options.Workers = 8,
    judge_param: options.Params = None,
    judge_key_env: options.KeyVariable = None,
    judge_cache: options.Cache = None,
    judge_timeout: options.Timeout = 60,
    judge_attempts: options.Attempts = 6,
    judge_dry_run: options.DryRun = False,
    judge_price: options.Price = None,
) -> None:
    """Score predictions into results.json, scores.jsonl and summary.md. Needs no GPU, no torch and no data.

    VideoRefer-Bench-D needs a judge, or the judge.jsonl that one has written beside the results.
    """
    from swim.evaluation.scores import Settings
    from swim.evaluation.stages import load, score_files

    paths = [predictions] if baseline is None else [baseline, predictions]
    files = [load(path, benchmark=benchmark, expected=expected) for path in paths]
    if names is not None:
        given = names.split(",")
        if len(given) != len(files):
            raise PredictionsError(f"--names {names!r}: {len(given)} names for {len(files)} files; give one for each")
        files = [replace(file, header=replace(file.header, name=name)) for file, name in zip(files, given)]
    others = {"synonyms": synonyms, "shuffled": shuffled}
    variants = {name: load(path, benchmark=benchmark) for name, path in others.items() if path is not None}
    folder = out or predictions.parent
    judge = options.judge_options(
        judge_url,
        judge_model,
        judge_profile,
        judge_prompt,
        judge_key_env,
        cache=judge_cache or folder / "judge_cache.sqlite",
        repeats=judge_repeats,
        workers=judge_workers,
        params=options.read_params(judge_param or ()),
        timeout_s=judge_timeout,
        attempts=judge_attempts,
    )
    if judge is None and (judge_dry_run or judge_param or judge_price or judge_cache):
        raise PredictionsError("--judge-url is missing: the other --judge options say how it is asked")
    if judge is not None:
        from swim.evaluation.benchmarks.videorefer_d import PROTOCOL, pairs_of

        everything = [*files, *variants.values()]
        if any(file.header.benchmark != PROTOCOL["id"] for file in everything):
            raise PredictionsError(f"only {PROTOCOL['id']} has a judge; leave the --judge options out")
        pairs = [pair for file in everything for pair in pairs_of(file)]
        if judge_dry_run:
            options.dry_run(pairs, judge, folder / "judge.jsonl", judge_price)
            return
        options.ask(pairs, judge, folder / "judge.jsonl")
    about = None if judge is None else judge.identity()
    settings = Settings(seed, resamples, judge=folder / "judge.jsonl", judged_by=about)
    results = score_files(files, folder, settings=settings, variants=variants)
    print_results(results)
    print(f"results: {folder / 'results.json'}")


@one_message
def judge_check(
    judge_url: options.Url = None,
    judge_model: options.ModelName = None,
    judge_profile: options.ProfileName = "robust",
    judge_prompt: options.Prompt = None,
    judge_repeats: options.Repeats = 3,
    judge_workers: options.Workers = 8,
    judge_param: options.Params = None,
    judge_key_env: options.KeyVariable = None,
    judge_cache: options.Cache = None,
    judge_timeout: options.Timeout = 60,
    judge_attempts: options.Attempts = 6,
    judge_dry_run: options.DryRun = False,
    judge_price: options.Price = None,
    out: Annotated[Path, typer.Option(help="Folder for judge.jsonl and the cache.")] = Path("judge_check"),
    at_least: Annotated[float, typer.Option(min=0, max=1, help="Share in the right order to exit with 0.")] = 0.8,
) -> None:
    """Have a judge grade a few hand-labelled pairs; exit with 1 if it does not put them in order."""
    from swim.evaluation.calibration import calibration_pairs, check, describe, read_calibration
    from swim.evaluation.judge import read_judged

    if judge_url is None:
        raise PredictionsError("--judge-url is missing: give the endpoint of the judge")
    judge = options.judge_options(
        judge_url,
        judge_model,
        judge_profile,
        judge_prompt,
        judge_key_env,
        cache=judge_cache or out / "judge_cache.sqlite",
        repeats=judge_repeats,
        workers=judge_workers,
        params=options.read_params(judge_param or ()),
        timeout_s=judge_timeout,
        attempts=judge_attempts,
    )
    assert judge is not None
    entries, path = read_calibration(), out / "judge.jsonl"
    if judge_dry_run:
        options.dry_run(calibration_pairs(entries), judge, path, judge_price)
        return
    options.ask(calibration_pairs(entries), judge, path)
    found = check(entries, read_judged(path, judge.identity()), judge.profile)
    print(describe(found))
    if found["ordering"] < at_least:
        print(f"below {at_least:.0%}: this judge is not fit to judge", file=sys.stderr)
        raise typer.Exit(1)


@one_message
def report(
    folder: Annotated[Path, typer.Argument(help="Folder of a results.json.")],
    data: Annotated[str | None, typer.Option(help="The data that was predicted, for its frames.")] = None,
) -> None:
    """Write report.html from results.json, scores.jsonl and the predictions."""
    from swim.evaluation.stages import report as write

    print(f"report: {write(folder, data)}")


def print_results(results: dict[str, Any]) -> None:
    """The headline of every arm with 95 % intervals, their difference, and the coverage, as a table."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from swim.evaluation.registry import find_benchmark
    from swim.evaluation.stages import arms_of, table, title

    rows = table(results, find_benchmark(results["protocol"]["id"]).headline)
    shown = Table(*map(escape, rows[0]))
    for row in rows[1:]:
        shown.add_row(*row)
    for figure in ("seconds", "peak_memory_mib"):
        if all(figure in results[arm] for arm in arms_of(results)):
            shown.add_row(figure, *(f"{results[arm][figure]:.0f}" for arm in arms_of(results)))
    console = Console(width=110)
    console.print(title(results), markup=False, highlight=False)
    console.print(shown)
    for arm in arms_of(results):
        coverage = results[arm]["coverage"]
        kinds = ("expected", "predicted", "scored", "failed", "unparsed", "missing")
        said = ", ".join(f"{coverage[kind]} {kind}" for kind in kinds)
        more = f", {coverage['duplicate_lines']} lines replaced" if coverage["duplicate_lines"] else ""
        broken = f", {len(coverage['broken_lines'])} unreadable lines" if coverage["broken_lines"] else ""
        console.print(f"{arm}: {said}{more}{broken}", markup=False, highlight=False, soft_wrap=True)
