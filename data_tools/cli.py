"""Commands `swim data ...`: make, convert, index, check and show shards."""

import functools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

from swim.data_tools.checks import KINDS
from swim.data_tools.convert import SKIPPED_FILE, convert
from swim.data_tools.expressions import LlmWriter, RuleWriter, Writer
from swim.data_tools.layers import index_layer
from swim.data_tools.llm import Client
from swim.data_tools.loose import index_jsonl, jsonl_files
from swim.data_tools.nouns import find_chunker
from swim.data_tools.records import record_schema
from swim.data_tools.refer import ABOUT_FILE, REPORT_FILE, Preview, Summary, preview, refer
from swim.data_tools.shards import BadSample, ShardError, ShardSet, index_shard
from swim.data_tools.sources import conversations, jsonl, llava_video, nl_refer, sav, videorefer
from swim.data_tools.stats import QUANTILES, shard_stats
from swim.data_tools.storage import write_manifest
from swim.data_tools.synth import synthesise
from swim.data_tools.validate import Options, Report, summarise, validate, write_report

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Make, convert, index, check and show shards.")

SOURCES = {
    module.SOURCE.name: module.SOURCE for module in (nl_refer, videorefer, sav, llava_video, conversations, jsonl)
}
_T = TypeVar("_T")
Folder = Annotated[str, typer.Argument(help="Folder of shards or JSONL files, a JSONL file, or a URL.")]


Layers = Annotated[list[str] | None, typer.Option("--layer", help="Layer to join; may be given several times.")]


def one_message(command: Callable[..., None]) -> Callable[..., None]:
    """Print what is wrong with the user's data as one message and exit with 2; other errors keep their traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except (ValueError, OSError, BadSample) as error:
            print(f"error: {error}", file=sys.stderr)
            raise typer.Exit(2) from None

    return run


@app.command()
@one_message
def synth(
    out: Annotated[Path, typer.Argument(help="Folder for the shards.")],
    clips: Annotated[int, typer.Option(help="Number of clips.")] = 100,
    seed: Annotated[int, typer.Option(help="Clip n depends on the seed and n alone.")] = 0,
    size: Annotated[int, typer.Option(help="Height and width in pixels.")] = 112,
    frames: Annotated[int, typer.Option(help="Frames per clip.")] = 8,
    fps: Annotated[float, typer.Option(help="Frames per second.")] = 8,
    objects: Annotated[int, typer.Option(help="Shapes per clip.")] = 3,
    hidden: Annotated[float, typer.Option(help="Share of the shapes that are away for a part of the clip.")] = 0.1,
    hard: Annotated[bool, typer.Option("--hard", help="3 to 8 shapes with distractors, occlusion, a pan.")] = False,
) -> None:
    """Render moving shapes with exact masks and questions about them."""
    sizes = {"size": size, "frames": frames, "objects": objects}
    shards = synthesise(out, clips=clips, seed=seed, fps=fps, hidden=hidden, hard=hard, **sizes)
    print(f"{len(shards)} clips in {out}, digest {shards.digest[:12]}")


@app.command(name="convert")
@one_message
def convert_command(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help=f"Form of the input: {', '.join(SOURCES)}.")],
    inputs: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Files, or folders of them.")],
    out: Annotated[Path, typer.Option(help="Folder for the shards.")],
    video_root: Annotated[
        Path | None, typer.Option(help="Folder that video names start from; by default that of the file.")
    ] = None,
    license: Annotated[str | None, typer.Option(help="Licence to note, instead of the source's.")] = None,
    canonical: Annotated[
        int | None, typer.Option(metavar="SIDE", min=16, help="Re-encode all videos, shorter side at most SIDE pixels.")
    ] = None,
    max_shard_size: Annotated[int, typer.Option(metavar="MIB", min=1, help="Size of a shard in MiB.")] = 1024,
    jobs: Annotated[int, typer.Option(min=1, help="Processes; each makes whole shards.")] = 1,
    part: Annotated[str, typer.Option(metavar="I/N", help="Make every N-th shard from the I-th on, I from 0.")] = "0/1",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Make shards of other input or options anew.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if any record was skipped.")] = False,
) -> None:
    """Convert a data set and its videos; run it again after a stop, and it goes on."""
    if source not in SOURCES:
        raise ValueError(f"no source {source!r}; there are {', '.join(SOURCES)}")
    found = re.fullmatch(r"(\d{1,9})/(\d{1,9})", part)
    i, n = (int(found[1]), int(found[2])) if found else (1, 1)
    if i >= n:
        raise ValueError(f"--part {part!r} is not I/N with I from 0 to N - 1, e.g. 0/8 to 7/8")
    summary = convert(
        SOURCES[source],
        inputs,
        out,
        video_root=video_root,
        license=license,
        canonical=canonical,
        max_bytes=max_shard_size << 20,
        jobs=jobs,
        part=(i, n),
        overwrite=overwrite,
    )
    print(f"{summary.kept} records kept in {summary.clips} clips, {summary.skipped} skipped")
    for reason, count in summary.reasons.most_common(10):
        print(f"  {count} x {repr(reason)[1:-1]}")  # a terminal must not obey what names from data hold
    if summary.skipped:
        print(f"reasons: {out / SKIPPED_FILE}")
    # A part may be without shards, where there are fewer than parts.
    if (not summary.kept and (summary.skipped or n == 1)) or (strict and summary.skipped):
        raise typer.Exit(1)


@app.command(name="refer")
@one_message
def refer_command(
    folder: Folder,
    out: Annotated[Path | None, typer.Option(help="Folder for the new shards.")] = None,
    llm_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible endpoint, e.g. http://localhost:8000/v1; else rules write.")
    ] = None,
    llm_model: Annotated[str | None, typer.Option(help="Name of the model there.")] = None,
    llm_key_env: Annotated[
        str | None, typer.Option(metavar="NAME", help="Environment variable that holds the endpoint's key.")
    ] = None,
    llm_param: Annotated[
        list[str] | None, typer.Option(metavar="NAME=JSON", help="Parameter of every request; null leaves one out.")
    ] = None,
    llm_timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may be silent.")] = 60,
    llm_attempts: Annotated[int, typer.Option(min=1, help="Attempts of a request before it counts as failed.")] = 6,
    llm_cache: Annotated[
        Path | None, typer.Option(help="SQLite file of all replies; by default OUT/replies.sqlite.")
    ] = None,
    chunker: Annotated[str, typer.Option(help="Of the rules: auto, spacy, built-in.")] = "auto",
    withhold_answer: Annotated[
        bool, typer.Option("--withhold-answer", help="Do not show the answer to whoever writes.")
    ] = False,
    max_leak: Annotated[
        float, typer.Option(min=0, max=1, help="Leave out what has more of the answer's words in the prompt.")
    ] = 1,
    jobs: Annotated[int, typer.Option(min=1, help="Clips whose requests run at a time.")] = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Ask and write nothing; say what would be.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 if anything was skipped.")] = False,
) -> None:
    """Replace every "object N" by a referring expression and mark its noun; run it again after a stop, it goes on."""
    if out is None and not dry_run:
        raise ValueError("--out is missing: name a folder for the new shards, or give --dry-run")
    writer: Writer
    if llm_url is None:
        writer = RuleWriter(*find_chunker(chunker))
    else:
        if llm_model is None:
            raise ValueError("--llm-model is missing: name a model that the endpoint serves")
        own = (out or Path()) / "replies.sqlite"
        cache = llm_cache or (own if out is not None and (own.is_file() or not dry_run) else ":memory:")
        params, key = _llm_params(llm_param or []), _llm_key(llm_key_env)
        writer = LlmWriter(
            Client(
                llm_url,
                llm_model,
                cache=cache,
                key=key,
                params=params,
                timeout_s=llm_timeout,
                attempts=llm_attempts,
            ),
            jobs=jobs,
        )
    shards = ShardSet(folder)
    print("written by", ", ".join(f"{name} {value}" for name, value in writer.about.items()))
    if dry_run:
        _print_preview(preview(shards, writer, withhold_answer=withhold_answer), writer)
        return
    assert out is not None
    summary = refer(shards, out, writer, withhold_answer=withhold_answer, max_leak=max_leak)
    _print_refer(summary, out)
    if isinstance(writer, LlmWriter):
        print(f"{writer.client.num_calls} requests")
    if not summary.rewritten or (strict and summary.skipped):
        raise typer.Exit(1)


def _llm_params(given: list[str]) -> dict[str, Any]:
    params = {}
    for item in given:
        name, equals, value = item.partition("=")
        try:
            params[name] = json.loads(value if equals else "")
        except ValueError:
            raise ValueError(f"--llm-param {item!r} is not NAME=JSON, e.g. temperature=0.2") from None
    return params


def _llm_key(variable: str | None) -> str | None:
    if variable is not None and not os.environ.get(variable):
        raise ValueError(f"--llm-key-env {variable!r}: no such variable is set; export it")
    return os.environ[variable].strip() if variable is not None else None


@app.command()
@one_message
def index(
    folder: Annotated[Path, typer.Argument(help="Folder of shards or JSONL files, or a JSONL file.")],
    base: Annotated[
        list[str] | None, typer.Option(help="The folder is a layer over this; then come the layers below it.")
    ] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Threads that look at loose videos.")] = 4,
) -> None:
    """Write the index of every tar, or else of every JSONL file, anew, and the manifest that web servers need."""
    paths, make = sorted(folder.glob("*.tar")), index_shard
    if base:
        make = functools.partial(index_layer, base=ShardSet(base[0], layers=base[1:]))
    elif not paths:
        paths = [folder] if folder.is_file() else jsonl_files(folder)
        make = functools.partial(index_jsonl, jobs=jobs)
    if not paths:
        raise ShardError(f"{folder}: no *.tar found and no *.jsonl; give a folder of shards or records")
    for path in progress(paths, "indexing") if paths[0].suffix == ".tar" else paths:
        print(make(path))
    print(write_manifest(paths[0].parent))
    if not base:
        ShardSet(folder)  # each index is good by itself; keys are unique over all of them


@app.command(name="validate")
@one_message
def validate_command(
    folders: Annotated[list[str], typer.Argument(metavar="FOLDER...", help="Folders of shards.")],
    deep: Annotated[bool, typer.Option("--deep", help="Read every byte and decode every frame.")] = False,
    against: Annotated[
        list[str] | None, typer.Option(help="Folder that must not share clips with these, such as a test split.")
    ] = None,
    report: Annotated[Path | None, typer.Option("--json", help="File for all findings and their counts.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 for warnings, too.")] = False,
    cells: Annotated[int, typer.Option(min=1, help="Cells of the grid in which a mask should fill one.")] = 768,
    jobs: Annotated[int, typer.Option(min=1, help="Processes.")] = 1,
    layers: Layers = None,
) -> None:
    """Check records, masks, nouns, origin and files, and that folders share no clips; exit with 1 for errors."""
    joined = [ShardSet(path, layers=layers or ()) for path in folders]
    sets = {"folders": joined, "against": [ShardSet(path) for path in against or ()]}
    total = sum(len(shards) for of_use in sets.values() for shards in of_use)
    options = Options(deep=deep, cells=cells)
    found = validate(sets["folders"], sets["against"], options=options, jobs=jobs)
    results = progress(found, "validating", total=total + 1)
    summary = write_report(report, results, sets) if report is not None else summarise(results)
    _print_report(summary)
    if summary.errors or (strict and summary.warnings):
        raise typer.Exit(1)


@app.command()
@one_message
def show(
    folder: Folder,
    key: Annotated[str | None, typer.Argument(help="Sample; the first if left out.")] = None,
    layers: Layers = None,
) -> None:
    """Print what is said about a clip."""
    shards = ShardSet(folder, layers=layers or ())
    if key is not None:
        check_key(shards, key)
    sample = shards.read(0 if key is None else key)
    record = sample.record
    # Strings from data are printed by repr: a terminal must not obey what they hold.
    print(f"{sample.key}  source {record.source!r}, licence {record.license!r}")
    for media in record.media:
        size = f"{media.num_frames} frames of {media.height}x{media.width} at {media.fps:g}/s"
        print(f"{media.kind} {media.member or media.path!r}: {size}")
    for thing in record.objects:
        frames = sample.masks.get(thing.id, {}).values()
        absent = sum(rle is None for rle in frames)
        print(f"object {thing.id!r} {thing.label!r}: masks in {len(frames) - absent} frames, absent in {absent}")
    for number, conversation in enumerate(record.conversations):
        print(f"#{number} {conversation.task!r}" + (f" frames {conversation.span}" if conversation.span else ""))
        for turn in conversation.turns:
            print(f"  {turn.role}: {turn.text!r}")
            for mention in turn.mentions:
                noun = turn.text[mention.start : mention.end]
                print(f"    {mention.kind} {noun!r} [{mention.start}, {mention.end}) -> {mention.object_ids}")


@app.command()
@one_message
def stats(
    folder: Folder,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    layers: Layers = None,
) -> None:
    """Count clips, conversations, mentions, objects, masks, sizes and licences; exit with 1 if a sample is bad."""
    shards = ShardSet(folder, layers=layers or ())
    found = shard_stats(shards, progress(range(len(shards)), "counting"))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print_stats(found)
    if found["bad"]:
        raise typer.Exit(1)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a record, with that of the masks layer in $defs."""
    print(record_schema(), end="")


def _print_refer(summary: Summary, out: Path) -> None:
    counts = f"{summary.rewritten} conversations rewritten, {summary.unchanged} without a placeholder kept as they are"
    print(f"{counts}, {summary.skipped} skipped; {summary.clips} clips in {out}")
    for reason, count in summary.reasons.most_common(10):
        print(f"  {count} x {repr(reason)[1:-1]}")
    leakage = summary.leakage
    if leakage:
        print(
            f"answer words in the prompt: mean {leakage['mean']:.1%} (with placeholders {leakage['mean_before']:.1%}), "
            f"95th percentile {leakage['p95']:.1%}"
        )
        for i, count in enumerate(leakage["histogram"]):
            if count:
                bar = "#" * max(1, round(40 * count / summary.rewritten))
                print(f"  {10 * i:3d} to {10 * i + 10:3d} %  {count:6d}  {bar}")
    print(f"each expression: {out / REPORT_FILE}; how they were made: {out / ABOUT_FILE}")
    if summary.skipped:
        print(f"reasons: {out / SKIPPED_FILE}")


def _print_preview(found: Preview, writer: Writer) -> None:
    print(f"{found.objects} expressions in {found.conversations} conversations of {found.clips} clips")
    if isinstance(writer, LlmWriter):
        tokens = found.num_chars // 4  # about four characters of English a token
        asked = found.objects - found.cached
        print(f"{found.cached} replies are kept, {asked} requests to make, about {tokens} tokens of prompts")
        print("more where a reply is not valid, or two objects get one name")
    for text in found.samples:
        print("".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text))
    for bad in found.bad:
        print(repr(bad)[1:-1])


def _print_stats(found: dict[str, Any]) -> None:
    # No markup: brackets in names from data are text.
    console = Console(markup=False, emoji=False, highlight=False)
    table = Table("", "", "number", "share", box=box.SIMPLE)
    for name in ("clips", "objects", "bytes"):
        table.add_row(name, "", f"{found[name]:,}", "")
    for name in ("conversations", "mentions", "masks", "sources", "licenses"):
        whole = sum(found[name].values())
        for i, (kind, count) in enumerate(found[name].items()):
            share = f"{count / whole:.1%}" if whole else ""
            table.add_row("" if i else name, repr(kind)[1:-1], f"{count:,}", share)
    console.print(table)
    table = Table("", *QUANTILES, box=box.SIMPLE)
    for name, values in found["quantiles"].items():
        table.add_row(name, *(f"{value:g}" for value in values.values()))
    console.print(table)
    for problem in found["bad"]:
        print(problem)


def _print_report(summary: Report) -> None:
    for kind, count in sorted(summary.counts.items(), key=lambda item: (KINDS[item[0]].level, -item[1])):
        print(f"{KINDS[kind].level} {kind}: {count:,}")
        for finding in summary.examples[kind]:
            print(f"  {finding}")
        if count > len(summary.examples[kind]):
            print(f"  ... and {count - len(summary.examples[kind]):,} more")
    if whole := summary.masks.total():
        shares = ", ".join(
            f"{name} {summary.masks[name] / whole:.1%}" for name in ("present", "absent", "not annotated")
        )
        print(f"objects in frames: {whole:,}, {shares}")
    counts = f"errors: {summary.errors:,}, warnings: {summary.warnings:,}"
    print(f"{summary.samples:,} samples, {summary.bad:,} of them with errors; {counts}")


def check_key(shards: ShardSet, key: str) -> None:
    """ShardError unless there is a sample with this key."""
    if key not in shards.keys():  # noqa: SIM118 - a ShardSet is no mapping
        first = shards.entries[0].key if len(shards) else None
        raise ShardError(f"{shards.folder}: no sample {key!r} among {len(shards)}; the first is {first!r}")


def progress(items: Iterable[_T], what: str, *, total: int | None = None) -> Iterable[_T]:
    """The items, with a progress bar where somebody looks; `total` is their number where they do not know it."""
    console = Console(stderr=True)
    return track(items, what, total=total, console=console, disable=not console.is_terminal)
