"""Referring expressions for placeholders: 'Describe object 1.' becomes 'Describe the brown dog.' with 'dog' marked.

`rewritten` yields (key, new record) and what there is to say about each conversation, in order, and knows nothing of
files. `refer` writes them as shards, one for each that it reads; a finished one gets a mark, so that a killed run goes
on. Against leakage it measures how much of the answer the new prompt holds.
"""

import fcntl
import itertools
import json
import re
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
from rich.console import Console
from rich.progress import Progress

from swim.data_tools.convert import DONE_FOLDER, SKIPPED_FILE
from swim.data_tools.expressions import (
    MAX_CONTEXT_CHARS,
    OTHER,
    PROMPT_VERSION,
    TARGET,
    Dialogue,
    Expression,
    GiveUp,
    LlmWriter,
    Subject,
    Writer,
)
from swim.data_tools.files import write_whole
from swim.data_tools.nouns import content_words
from swim.data_tools.records import Conversation, Mention, Record, RecordError, Turn
from swim.data_tools.shards import BadSample, Sample, ShardError, ShardSet, ShardWriter

VERSION = 1  # of what is made of the same input
REPORT_FILE, SUMMARY_FILE, ABOUT_FILE = "report.jsonl", "summary.json", "refer.json"
SOURCE_SUFFIX = "+refer"
PLACEHOLDER = re.compile(r"object \d{1,6}", re.IGNORECASE)  # what `convert videorefer` leaves
_ARTICLE = re.compile(r"\b(?:the|this|that|an?)\s+$", re.IGNORECASE)
_SENTENCE_START = re.compile(r"(?:^|[.!?:]\s+|\n)[\s\"'(]*$")


@dataclass(frozen=True)
class Outcome:
    """What became of a sample: its new record, None if nothing is left; lines for the report and for what was left out;
    the number of conversations without a placeholder."""

    key: str
    record: Record | None
    report: list[dict[str, Any]]
    skipped: list[dict[str, Any]]
    unchanged: int = 0


@dataclass(frozen=True)
class Summary:
    """Numbers of conversations rewritten, unchanged for want of a placeholder, and left out, how often why; leakage of
    the rewritten ones: shares of answer words in the prompt."""

    clips: int
    rewritten: int
    unchanged: int
    skipped: int
    reasons: Counter[str] = field(default_factory=Counter)
    leakage: dict[str, Any] = field(default_factory=dict)


@dataclass
class Preview:
    """What `refer` would ask: expressions in conversations of clips, replies that are kept, characters of the prompts
    that are not, the first few prompts, samples that cannot be read."""

    clips: int = 0
    conversations: int = 0
    objects: int = 0
    cached: int = 0
    num_chars: int = 0
    samples: list[str] = field(default_factory=list)
    bad: list[str] = field(default_factory=list)


class _Skip(ValueError):  # noqa: N818 - what happens to a conversation
    """A conversation is left out."""


def leakage(prompt: Sequence[str], answers: Sequence[str]) -> float:
    """Share of the answers' distinct content words (`content_words`) that the prompt holds; 0 without such words."""
    said = set().union(*map(content_words, answers))
    return len(said & set().union(*map(content_words, prompt))) / len(said) if said else 0.0


def rewritten(
    shards: ShardSet,
    numbers: Sequence[int],
    writer: Writer,
    *,
    withhold_answer: bool = False,
    max_leak: float = 1,
) -> Iterator[Outcome]:
    """What becomes of samples by number, in their order; `writer.jobs` of them are worked on at a time."""

    def one(number: int) -> Outcome:
        try:
            sample = shards.read(number, masks=False)
        except BadSample as error:
            return Outcome(error.key, None, [], [{"key": error.key, "reason": str(error)}])
        return rewrite(sample.key, sample.record, writer, withhold_answer=withhold_answer, max_leak=max_leak)

    waiting: deque[Future[Outcome]] = deque()
    with ThreadPoolExecutor(writer.jobs) as pool:
        try:
            for number in numbers:
                waiting.append(pool.submit(one, number))
                if len(waiting) >= 4 * writer.jobs:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BaseException:
            writer.stop()
            pool.shutdown(cancel_futures=True)
            raise


def rewrite(key: str, record: Record, writer: Writer, *, withhold_answer: bool = False, max_leak: float = 1) -> Outcome:
    """The record with an expression for every placeholder, without the conversations for which there is none.

    Conversations without placeholders stay. With `withhold_answer` the writer does not see what the assistant says in
    the conversation it writes for; one with more than `max_leak` leakage is left out.
    """
    conversations: list[Conversation] = []
    report: list[dict[str, Any]] = []
    skipped: list[dict[str, Any]] = []
    nouns: dict[str, str] = {}
    unchanged = 0
    for number, conversation in enumerate(record.conversations):
        if not any(_placeholders(turn) for turn in conversation.turns):
            conversations.append(conversation)
            unchanged += 1
            continue
        line = {"key": key, "conversation": number, "task": conversation.task}
        try:
            names = _name_objects(record, number, writer, withhold_answer)
            new = conversation.model_copy(update={"turns": [_replace(turn, names) for turn in conversation.turns]})
            leak, before = _leak(new, conversation), _leak(conversation, conversation)
            if leak > max_leak:
                raise _Skip(f"{leak:.2f} of the answer's words are in the prompt, the limit is {max_leak:g}")
        except _Skip as error:
            skipped.append({**line, "reason": str(error)})
            continue
        said = {name: expression.model_dump() for name, expression in names.items()}
        report.append({**line, "expressions": said, "leak": round(leak, 4), "leak_before": round(before, 4)})
        conversations.append(new)
        nouns = {name: expression.head for name, expression in names.items()} | nouns
    new_record = None
    if conversations or not record.conversations:
        objects = [
            thing.model_copy(update={"label": nouns[thing.id]})
            if thing.id in nouns and _label(record, thing.id) is None
            else thing
            for thing in record.objects
        ]
        source = record.source + (SOURCE_SUFFIX if report else "")
        update = {"source": source, "objects": objects, "conversations": conversations}
        new_record = record.model_copy(update=update)
    return Outcome(key, new_record, report, skipped, unchanged)


def subjects(record: Record, number: int, *, withhold_answer: bool = False) -> dict[str, Subject]:
    """What a writer may know about each object with a placeholder in a conversation of a record, by object id."""
    ids = [mention.object_ids[0] for turn in record.conversations[number].turns for mention in _placeholders(turn)]
    return {name: _subject(record, number, name, withhold_answer) for name in dict.fromkeys(ids)}


def _placeholders(turn: Turn) -> list[Mention]:
    found = [
        mention
        for mention in turn.mentions
        if mention.kind == "phrase"
        and len(mention.object_ids) == 1
        and PLACEHOLDER.fullmatch(turn.text[mention.start : mention.end])
    ]
    return sorted(found, key=lambda mention: mention.start)


def _label(record: Record, name: str) -> str | None:
    """An object's label, if it says what the object is."""
    label = next(thing.label for thing in record.objects if thing.id == name).strip()
    return None if PLACEHOLDER.fullmatch(label) or label.lower() in ("", "object", "unnamed", "unknown") else label


def _subject(record: Record, number: int, name: str, withhold_answer: bool) -> Subject:
    answers = {_plain(turn.text) for turn in record.conversations[number].turns if turn.role == "assistant"}
    own, others, num_chars = None, [], 0
    for i, conversation in enumerate(record.conversations):
        named = {thing for turn in conversation.turns for mention in turn.mentions for thing in mention.object_ids}
        if name not in named:
            continue
        turns = [
            (turn.role, _masked(turn, name))
            for turn in conversation.turns
            # The same answer may stand in another conversation too.
            if not (withhold_answer and turn.role == "assistant" and (i == number or _plain(turn.text) in answers))
        ]
        dialogue = Dialogue(conversation.task, tuple(turns), named == {name})
        if i == number:
            own = dialogue
            continue
        num_chars += sum(len(text) for _, text in turns)
        if turns and num_chars <= MAX_CONTEXT_CHARS:
            others.append(dialogue)
    assert own is not None
    return Subject(_label(record, name), (own, *others))


def _plain(text: str) -> str:
    return " ".join(text.casefold().split())


def _masked(turn: Turn, name: str) -> str:
    text = turn.text
    for mention in reversed(_placeholders(turn)):
        text = text[: mention.start] + (TARGET if mention.object_ids == [name] else OTHER) + text[mention.end :]
    return text


def _name_objects(record: Record, number: int, writer: Writer, withhold_answer: bool) -> dict[str, Expression]:
    """An expression for each object, no two of them alike; _Skip if there is none."""
    about = subjects(record, number, withhold_answer=withhold_answer)
    try:
        names = {name: writer.write(subject) for name, subject in about.items()}
        for name in _alike(names):
            names[name] = writer.write(about[name], [names[name].expression.lower()])
    except GiveUp as error:
        raise _Skip(f"no expression: {error}") from None
    alike = _alike(names)
    if alike:
        problem = f"objects {', '.join(map(repr, alike))} are both called {names[alike[0]].expression!r}"
        raise _Skip(f"{problem}, after another try")
    return names


def _alike(names: dict[str, Expression]) -> list[str]:
    count = Counter(expression.expression.casefold() for expression in names.values())
    return [name for name, expression in names.items() if count[expression.expression.casefold()] > 1]


def _replace(turn: Turn, names: dict[str, Expression]) -> Turn:
    """The turn with expressions for placeholders, and the mentions where they then are."""
    text, moves, mentions = "", list[tuple[int, int]](), list[Mention]()
    places, position = _placeholders(turn), 0
    for place in places:
        start = place.start
        article = _ARTICLE.search(turn.text, max(position, start - 20), start)
        if article:  # 'the object 1': the expression has its own
            start = article.start()
        text += turn.text[position:start]
        expression = names[place.object_ids[0]]
        said = expression.expression
        if _SENTENCE_START.search(turn.text, max(0, start - 20), start):
            said = said[0].upper() + said[1:]
        head = (len(text) + expression.span[0], len(text) + expression.span[1])
        end = len(text) + len(said)
        mentions.append(Mention(start=len(text), end=end, head=head, object_ids=place.object_ids))
        text, position = text + said, place.end
        moves.append((place.end, end - place.end))
        for other in turn.mentions:
            if other is not place and other.start < place.end and other.end > start:
                between = turn.text[other.start : other.end]
                raise _Skip(f"mention {between!r} overlaps the placeholder {turn.text[place.start : place.end]!r}")

    def moved(offset: int) -> int:
        return offset + next((by for end, by in reversed(moves) if end <= offset), 0)

    for mention in turn.mentions:
        if mention not in places:
            head = (moved(mention.head[0]), moved(mention.head[1]))
            update = {"start": moved(mention.start), "end": moved(mention.end), "head": head}
            mentions.append(mention.model_copy(update=update))
    return Turn(
        role=turn.role,
        text=text + turn.text[position:],
        mentions=sorted(mentions, key=lambda mention: (mention.start, mention.end)),
    )


def _leak(prompted: Conversation, answered: Conversation) -> float:
    """Leakage of what the assistant said with placeholders into what the others say; placeholders are not counted."""
    prompt = [_without_placeholders(turn) for turn in prompted.turns if turn.role != "assistant"]
    return leakage(prompt, [_without_placeholders(turn) for turn in answered.turns if turn.role == "assistant"])


def _without_placeholders(turn: Turn) -> str:
    text = turn.text
    for mention in reversed(_placeholders(turn)):
        text = text[: mention.start] + " " + text[mention.end :]
    return text


def refer(
    shards: ShardSet, out: str | Path, writer: Writer, *, withhold_answer: bool = False, max_leak: float = 1
) -> Summary:
    """Write what `rewritten` makes of all samples into `out`, and what it says beside it; go on where a run stopped.

    ShardError if `out` holds something else, LlmError if the endpoint fails; finished shards and replies are kept.
    """
    folder = Path(out)
    about = {"version": VERSION, "input": shards.digest, **writer.about}
    about |= {"withhold_answer": withhold_answer, "max_leak": max_leak}
    _prepare(folder, about)
    console = Console(stderr=True)
    with _alone(folder), Progress(console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("rewriting", total=len(shards))
        marks = []
        groups = itertools.groupby(range(len(shards)), lambda i: shards.entries[i].shard)
        for number, (name, samples) in enumerate(groups):
            numbers = list(samples)
            mark = _finished(folder, number)
            if mark is None:
                found = rewritten(shards, numbers, writer, withhold_answer=withhold_answer, max_leak=max_leak)
                mark = _write_shard(shards, folder, number, found, lambda: progress.advance(task))
                counts = f"{len(mark['report'])} rewritten, {len(mark['skipped'])} skipped"
                console.print(f"{name}: {mark['clips']} clips, {counts}", highlight=False, markup=False, soft_wrap=True)
            else:
                progress.advance(task, len(numbers))
            marks.append(mark)
        return _report(folder, marks)


def preview(shards: ShardSet, writer: Writer, *, withhold_answer: bool = False, num_samples: int = 2) -> Preview:
    """Count what a run would ask for, without asking."""
    found = Preview()
    for i in range(len(shards)):
        try:
            record = shards.read(i, masks=False).record
        except BadSample as error:
            found.bad.append(str(error))
            continue
        about = [subjects(record, k, withhold_answer=withhold_answer) for k in range(len(record.conversations))]
        found.clips += any(about)
        found.conversations += sum(map(bool, about))
        for subject in (subject for of_one in about for subject in of_one.values()):
            found.objects += 1
            if not isinstance(writer, LlmWriter):
                continue
            messages = writer.messages(subject)
            if writer.client.cached(messages, Expression, version=PROMPT_VERSION) is not None:
                found.cached += 1
                continue
            found.num_chars += sum(len(message["content"]) for message in messages)
            if len(found.samples) < num_samples:
                found.samples.append("\n".join(f"[{message['role']}] {message['content']}" for message in messages))
    return found


def _write_shard(shards: ShardSet, out: Path, number: int, found: Iterator[Outcome], advance: Any) -> dict[str, Any]:
    """Write one shard and, at last, its mark."""
    for left in out.glob(f"*shard-{number:06d}.*"):
        left.unlink()
    mark: dict[str, Any] = {"clips": 0, "unchanged": 0, "report": [], "skipped": []}
    with ShardWriter(out, number=number, max_bytes=1 << 62) as shard_writer:
        for outcome in found:
            mark["skipped"] += outcome.skipped
            try:
                if outcome.record is not None:
                    sample = shards.read(outcome.key)
                    record, media = _with_media(sample, outcome.record)
                    shard_writer.write(outcome.key, record, sample.masks, media)
                    mark["clips"] += 1
                    mark["unchanged"] += outcome.unchanged
                    mark["report"] += outcome.report
            except (BadSample, RecordError) as error:
                mark["skipped"].append({"key": outcome.key, "reason": str(error)})
            advance()
    mark["shards"] = shard_writer.names
    write_whole(out / DONE_FOLDER / f"{number:06d}.json", json.dumps(mark))
    return mark


def _with_media(sample: Sample, record: Record) -> tuple[Record, dict[str, bytes]]:
    """Media bytes of a sample by member, and the record with loose files as members."""
    media = {}
    for i, item in enumerate(record.media):
        member = item.member or f"{i}{Path(str(item.path)).suffix.lower() or '.mp4'}"
        media[member] = sample.media(i)
    items = [item.model_copy(update={"member": name, "path": None}) for item, name in zip(record.media, media)]
    return record.model_copy(update={"media": items}), media


def _prepare(out: Path, about: dict[str, Any]) -> None:
    path = out / ABOUT_FILE
    if path.is_file():
        known = json.loads(path.read_text())
        for name in dict.fromkeys([*about, *known]):
            if known.get(name) != about.get(name):
                change = f"{name} was {known.get(name)!r:.80} and is now {about.get(name)!r:.80}"
                raise ShardError(f"{path}: another run ({change}) already wrote here; write to an empty folder")
    elif next(out.glob("*.tar"), None) is not None:
        raise ShardError(f"{out}: holds shards that 'refer' did not write; write to an empty folder")
    (out / DONE_FOLDER).mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(about, indent=1) + "\n")


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """ShardError if another process writes to the folder; one that dies lets go of it."""
    with (out / DONE_FOLDER / "lock").open("a") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ShardError(f"{out}: another run writes here now; wait for it, or write elsewhere") from None
        except OSError:
            pass  # not every file system has locks
        yield


def _finished(out: Path, number: int) -> dict[str, Any] | None:
    path = out / DONE_FOLDER / f"{number:06d}.json"
    mark = cast(dict[str, Any], json.loads(path.read_text())) if path.is_file() else None
    return mark if mark and all((out / name).is_file() for name in mark["shards"]) else None


def _report(out: Path, marks: Sequence[dict[str, Any]]) -> Summary:
    summary = summarise(marks)
    for name, what in ((REPORT_FILE, "report"), (SKIPPED_FILE, "skipped")):
        write_whole(out / name, "".join(json.dumps(line) + "\n" for mark in marks for line in mark[what]))
    write_whole(out / SUMMARY_FILE, json.dumps(vars(summary), indent=1) + "\n")
    return summary


def summarise(marks: Sequence[dict[str, Any]]) -> Summary:
    """Sum up {clips, unchanged, report lines, skipped lines} of shards."""
    report = [line for mark in marks for line in mark["report"]]
    reasons = Counter(_kind(line["reason"]) for mark in marks for line in mark["skipped"])
    clips, unchanged = (sum(mark[name] for mark in marks) for name in ("clips", "unchanged"))
    leaks, before = (np.array([line[name] for line in report]) for name in ("leak", "leak_before"))
    found: dict[str, Any] = {}
    if report:
        histogram = np.histogram(leaks, bins=10, range=(0, 1))[0].tolist()
        found = {"mean": round(float(leaks.mean()), 4), "p95": round(float(np.percentile(leaks, 95)), 4)}
        found |= {"mean_before": round(float(before.mean()), 4), "histogram": histogram}
    return Summary(clips, len(report), unchanged, reasons.total(), reasons, found)


def _kind(reason: str) -> str:
    """A reason without what differs from record to record."""
    return re.sub(r"0x[0-9a-f]+|\d+(\.\d+)?", "N", re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*", "…", reason))
