"""`swim data validate`: the checks of every sample of folders, in worker processes, and what folders have in common."""

import functools
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from swim.data_tools.checks import (
    KINDS,
    Found,
    broken_contract,
    check_masks,
    check_picture,
    check_record,
    check_video,
    measure_tubes,
)
from swim.data_tools.files import written_whole
from swim.data_tools.lookalike import near_pairs
from swim.data_tools.loose import LINE
from swim.data_tools.records import Record, RecordError, parse_fields, problems
from swim.data_tools.shards import BadSample, Entry, Sample, ShardSet

REPORT_VERSION = 1
CHUNK = 256  # samples that a process takes at once; fewer where each of them is decoded
EXAMPLES = 3


@dataclass(frozen=True)
class Finding:
    """A rule of `checks.KINDS` that a sample breaks, with the place of its first byte; texts are plain, not escaped."""

    level: str
    kind: str
    key: str
    shard: str
    offset: int
    field: str
    value: str
    limit: str
    remedy: str

    def __str__(self) -> str:
        text = f"{self.key!r} in {self.shard} at byte {self.offset}, {self.field}: {self.value}; "
        text += f"wanted {self.limit}; {self.remedy}"
        # A terminal must not obey what names from data hold.
        return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(frozen=True)
class Options:
    """How deep to look: `deep` reads every byte and decodes every frame; `cells` of the grid for tiny masks."""

    deep: bool = False
    cells: int = 768


@dataclass
class Result:
    """Of one sample: key, findings, (size, CRC32) of its media, its look (`lookalike`), mask frames by state."""

    key: str
    findings: list[Finding] = field(default_factory=list)
    media: list[tuple[int, int]] = field(default_factory=list)
    look: bytes | None = None
    masks: Counter[str] = field(default_factory=Counter)


@dataclass
class Report:
    """Number of samples, of those with errors, of findings by kind, of mask frames by state, and a few findings of each
    kind."""

    samples: int = 0
    bad: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    masks: Counter[str] = field(default_factory=Counter)
    examples: dict[str, list[Finding]] = field(default_factory=dict)

    @property
    def errors(self) -> int:
        """Findings that are errors."""
        return sum(count for kind, count in self.counts.items() if KINDS[kind].level == "error")

    @property
    def warnings(self) -> int:
        """Findings that are warnings."""
        return self.counts.total() - self.errors


def examine(shards: ShardSet, number: int, options: Options) -> Result:
    """All that is wrong with one sample alone; the media of a wrong record are read, but not decoded."""
    entry = shards.entries[number]
    result = Result(entry.key)
    result.media = [(size, crc) for name, (_, size, crc) in entry.members.items() if size and not _is_text(name)]
    result.media += entry.files.values()

    def add(found: Found, offset: int | None = None) -> None:
        result.findings.append(_finding(shards, entry, found, offset))

    text_names = ("json", "masks.json")
    for name in entry.members if options.deep else ():
        if name not in text_names:
            for found, offset in _unreadable(shards, number, name):
                add(found, offset)
    try:
        sample = shards.read(number)
    except BadSample as error:
        damaged = [pair for name in text_names if name in entry.members for pair in _unreadable(shards, number, name)]
        for found, offset in damaged or _all_problems(shards, number, error):
            add(found, offset)
        return result
    record = sample.record
    for found in _check_members(record, entry.members):
        add(found)
    stated, told = (entry.height, entry.width, entry.num_frames, entry.fps), _facts(record)
    if stated != told:
        add(Found("index", "media[0]", f"{stated} in the index, {told} in the record"))
    tubes = measure_tubes(sample.masks)
    for found in chain(check_record(record, tubes), check_masks(record, tubes, cells=options.cells)):
        add(found)
    seen = sum(int(tube.seen.sum()) for tube in tubes.values())
    annotated = sum(len(tube.frames) for tube in tubes.values())
    missing = len(record.objects) * entry.num_frames - annotated
    result.masks.update({"present": seen, "absent": annotated - seen, "not annotated": missing})
    for found in _check_media(sample, result) if options.deep else ():
        add(found)
    return result


def _unreadable(shards: ShardSet, number: int, name: str) -> Iterator[tuple[Found, int]]:
    try:
        shards.read_member(number, name)
    except BadSample as error:
        yield Found("unreadable", name, error.reason), error.offset


def _all_problems(shards: ShardSet, number: int, first: BadSample) -> Iterator[tuple[Found, int]]:
    """All that is wrong with a record, of which reading it has told the first."""
    members = shards.entries[number].members
    if "json" not in members:
        yield Found("schema", "", first.reason), first.offset
        return
    texts = [shards.read_member(number, name) if name in members else None for name in ("json", "masks.json")]
    try:
        record, masks = parse_fields(first.key, texts[0] or b"", texts[1])
    except RecordError as error:
        path, wrong, remedy = error.problem or ("", str(error), "")
        yield Found("schema", path, wrong, remedy=remedy), first.offset
        return
    for problem in problems(record, masks):
        yield broken_contract(problem), first.offset


def _finding(shards: ShardSet, entry: Entry, found: Found, offset: int | None = None) -> Finding:
    level, limit, remedy = KINDS[found.kind]
    if offset is None:
        offset = min((offset for offset, _, _ in entry.members.values()), default=0)
    words = found.field, found.value, found.limit or limit, found.remedy or remedy
    return Finding(level, found.kind, entry.key, _shard(shards, entry), offset, *words)


def _shard(shards: ShardSet, entry: Entry) -> str:
    return f"{shards.folder}/{entry.shard}"


def _check_members(record: Record, members: Mapping[str, tuple[int, int, int]]) -> Iterator[Found]:
    named = {medium.member for medium in record.media}
    for i, medium in enumerate(record.media):
        if medium.member is not None and medium.member not in members:
            yield Found("unreadable", f"media[{i}].member", f"no {medium.member!r} among {sorted(members)}")
    for name in members:
        if name not in named and not _is_text(name):
            yield Found("member", name, f"{members[name][1]} bytes")


def _is_text(name: str) -> bool:
    return name == LINE or name.split(".")[-1] == "json"


def _facts(record: Record) -> tuple[int, int, int, float]:
    return next(((one.height, one.width, one.num_frames, one.fps) for one in record.media), (0, 0, 0, 0.0))


def _check_media(sample: Sample, result: Result) -> Iterator[Found]:
    for i, medium in enumerate(sample.record.media):
        path = f"media[{i}]"
        try:
            data = sample.media(i)
        except BadSample as error:
            if medium.member is None:  # else it was read before, and said
                yield Found("unreadable", f"{path}.path", error.reason, "a file inside the folder of the shards")
            continue
        if medium.kind == "video":
            stated = medium.height, medium.width, medium.num_frames, medium.fps
            found, look = check_video(data, path, stated)
            result.look = look if i == 0 else result.look
            yield from found
        else:
            yield from check_picture(data, path, (medium.height, medium.width))


def validate(
    folders: Sequence[ShardSet], against: Sequence[ShardSet] = (), *, options: Options, jobs: int = 1
) -> Iterator[Result]:
    """An empty result for each sample of `against`, which is only compared with, then those of `folders`, and last what
    samples of these have in common with those of an earlier folder, without a key."""
    whole = [*against, *folders]
    twins = _Twins(whole, len(against))
    size = CHUNK // 32 if options.deep else CHUNK
    chunks = [
        (number, range(first, min(first + size, len(shards))))
        for number, shards in enumerate(whole)
        for first in range(0, len(shards), size)
    ]
    for (folder, numbers), results in zip(chunks, _examine_all(whole, chunks, options, jobs)):
        for number, result in zip(numbers, results):
            twins.add(folder, number, result)
            yield result if folder >= len(against) else Result("")
    yield Result("", list(twins.findings()))


_Chunk = tuple[int, range]
_work: tuple[Sequence[ShardSet], Options] | None = None  # of a worker process


def _start_worker(folders: Sequence[ShardSet], options: Options) -> None:
    global _work
    _work = folders, options


def _examine_chunk(chunk: _Chunk) -> list[Result]:
    assert _work is not None
    folders, options = _work
    return [examine(folders[chunk[0]], number, options) for number in chunk[1]]


def _examine_all(
    folders: Sequence[ShardSet], chunks: Sequence[_Chunk], options: Options, jobs: int
) -> Iterator[list[Result]]:
    if jobs == 1 and not options.deep:
        yield from ([examine(folders[folder], number, options) for number in numbers] for folder, numbers in chunks)
        return
    # Decoders may take their process with them. Fresh processes, not forks: the progress bar has a thread.
    pool = functools.partial(
        ProcessPoolExecutor,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(folders, options),
    )
    done = 0
    while done < len(chunks):
        with pool(jobs) as workers:
            try:
                for results in workers.map(_examine_chunk, chunks[done:]):
                    yield results
                    done += 1
            except BrokenProcessPool:
                pass
            except BaseException:
                workers.shutdown(cancel_futures=True)
                raise
        if done < len(chunks):  # which of the chunks that were under way it was shows only when they are alone
            folder, numbers = chunks[done]
            alone = []
            for number in numbers:
                with pool(1) as worker:
                    try:
                        alone += worker.submit(_examine_chunk, (folder, range(number, number + 1))).result()
                    except BrokenProcessPool:
                        alone.append(_crashed(folders[folder], number))
            yield alone
            done += 1


def _crashed(shards: ShardSet, number: int) -> Result:
    entry = shards.entries[number]
    return Result(
        entry.key, [_finding(shards, entry, Found("crash", "media", "its process died while it was decoded"))]
    )


class _Twins:
    """Samples of different folders that have a key, a video or a look in common; the first folders are only compared
    with."""

    def __init__(self, folders: Sequence[ShardSet], num_against: int) -> None:
        self._folders, self._num_against = folders, num_against
        self._groups: dict[str, dict[Any, list[int]]] = {"same_key": {}, "same_video": {}}
        self._places: list[tuple[int, int]] = []  # folder and number of a sample
        self._looks: list[bytes] = []
        self._looked: list[int] = []

    def add(self, folder: int, number: int, result: Result) -> None:
        """Take note of a sample; those of a folder come behind those of the folders before it."""
        if len(self._folders) < 2:
            return
        at = len(self._places)
        self._places.append((folder, number))
        self._groups["same_key"].setdefault(result.key, []).append(at)
        for media in result.media:
            self._groups["same_video"].setdefault(media, []).append(at)
        if result.look is not None:
            self._looks.append(result.look)
            self._looked.append(at)

    def findings(self) -> Iterator[Finding]:
        """One for each sample that repeats an earlier folder's key, video or look; a look only where the video is
        another."""
        said = set()
        for kind, groups in self._groups.items():
            for what, group in groups.items():
                firsts: dict[int, int] = {}
                for at in group:
                    folder = self._places[at][0]
                    firsts.setdefault(folder, at)
                    other = next((first for number, first in firsts.items() if number != folder), None)
                    if other is not None and folder >= self._num_against:
                        said.add((kind, at))
                        value = f"{what[0]} bytes, CRC32 {what[1]:#010x}" if kind == "same_video" else repr(what)
                        yield self._common(kind, value, other, at)
        if self._looks:
            looks = np.frombuffer(b"".join(self._looks), np.uint8).reshape(len(self._looks), -1)
            folders = np.array([self._places[at][0] for at in self._looked])
            for a, b, bits in near_pairs(looks, folders):
                at = self._looked[b]
                if self._places[at][0] >= self._num_against and ("same_video", at) not in said:
                    value = f"{bits} of {looks.shape[1] * 8} bits of three frames differ"
                    yield self._common("look_alike", value, self._looked[a], at)

    def _common(self, kind: str, value: str, other: int, own: int) -> Finding:
        (folder, number), (own_folder, own_number) = self._places[other], self._places[own]
        first, shards = self._folders[folder], self._folders[own_folder]
        entry = first.entries[number]
        value = f"{value}, as {entry.key!r} in {_shard(first, entry)}"
        return _finding(
            shards, shards.entries[own_number], Found(kind, "key" if kind == "same_key" else "media", value)
        )


def summarise(results: Iterable[Result], file: TextIO | None = None) -> Report:
    """Counts of all results; the findings go to `file` as the items of a JSON list, and only a few are kept."""
    summary = Report()
    for result in results:
        summary.samples += bool(result.key)
        summary.masks.update(result.masks)
        summary.bad += any(finding.level == "error" for finding in result.findings)
        for finding in result.findings:
            if file is not None:
                file.write((",\n" if summary.counts.total() else "\n") + json.dumps(asdict(finding)))
            summary.counts[finding.kind] += 1
            if len(examples := summary.examples.setdefault(finding.kind, [])) < EXAMPLES:
                examples.append(finding)
    return summary


def write_report(path: Path, results: Iterable[Result], folders: Mapping[str, Sequence[ShardSet]]) -> Report:
    """Write results as JSON, whole or not at all, one finding a line; `folders` are the sets by what they were for."""
    with written_whole(path) as hidden, hidden.open("w") as file:
        file.write('{"findings": [')
        summary = summarise(results, file)
        about = {
            "version": REPORT_VERSION,
            **{use: [{"path": str(s.folder), "digest": s.digest} for s in sets] for use, sets in folders.items()},
            "samples": summary.samples,
            "masks": dict(summary.masks),
            "errors": summary.errors,
            "warnings": summary.warnings,
            "kinds": {kind: {"level": KINDS[kind].level, "findings": count} for kind, count in summary.counts.items()},
        }
        file.write("\n]," + json.dumps(about)[1:] + "\n")
    return summary
