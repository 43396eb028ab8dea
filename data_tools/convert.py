"""The converter engine: rows of foreign files and their videos in, shards out, one sample per video.

The files are streamed twice. The first pass keeps where each row lies and which video it is about, about 30 bytes a row
and 200 a video, whatever the files hold. That decides the shards: runs of videos in order of first appearance, cut by
size. The second pass reads the rows of one shard, so that any process can make any shard and its bytes do not depend on
who makes the others. A finished shard has a mark in `.done` with the digest of what it was made from.
"""

import fcntl
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import re
import stat
import struct
import threading
import time
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Self, TypeVar, cast

import numpy as np
from rich.console import Console
from rich.progress import Progress

from swim.data_tools.files import write_whole
from swim.data_tools.records import (
    MAX_JSON_BYTES,
    Conversation,
    Masks,
    Media,
    Object,
    Record,
    RecordError,
    parse_sample,
)
from swim.data_tools.reencode import reencode
from swim.data_tools.rows import Row, stream_rows
from swim.data_tools.sources.forms import NAMED, Part, Source, record_values, skip_line, slug
from swim.data_tools.video import UnsteadyVideo, VideoError, VideoInfo, verify
from swim.data_tools.writer import ShardError, ShardWriter

VERSION = 1  # of what the engine makes of the same input
MAX_MEDIA_BYTES = 4 << 30
SKIPPED_FILE = "skipped.jsonl"
ABOUT_FILE = "convert.json"
DONE_FOLDER = ".done"

_T = TypeVar("_T")


@dataclass(frozen=True)
class Summary:
    """What a conversion did: samples written, records in them, records listed in `skipped.jsonl`, how often why."""

    clips: int
    kept: int
    skipped: int
    reasons: Counter[str] = field(default_factory=Counter, compare=False)


@dataclass(frozen=True)
class _Run:
    """What every process knows: the form, the input, the options."""

    source: Source
    files: list[Path]
    root: Path
    beside: bool  # videos are counted from the folder of their file, not from the root
    out: Path
    license: str | None
    canonical: int | None
    max_bytes: int

    def about(self) -> dict[str, Any]:
        """What decides the bytes, but for rows and videos."""
        names = [os.path.relpath(file, self.root) if self.beside else file.name for file in self.files]
        options = {"license": self.license, "canonical": self.canonical, "max_bytes": self.max_bytes}
        return {"version": VERSION, "source": self.source.name, "files": names, **options}

    def locate(self, row: Row) -> str | None:
        """Video of a row as a path from the root; RecordError if it lies outside."""
        video = self.source.video(row)
        if video is None:
            return None
        base = row.file.parent if self.beside else self.root
        name = "." if "\0" in video else os.path.relpath(os.path.join(base, video), self.root)
        if name.split(os.sep)[0] in ("..", "."):
            raise row.error("video", f"{video!r} lies outside {self.root}; choose another --video-root")
        return name


@dataclass(frozen=True)
class _Shard:
    """Number of a shard, digest of what it is made from, its rows (_ROW), those of a clip together."""

    number: int
    digest: str
    rows: np.ndarray


@dataclass(frozen=True)
class _Clip:
    """A video as it is stored, its facts and those of the source; without `frame_map` they have the same frames."""

    data: bytes
    member: str
    stored: VideoInfo
    source: VideoInfo
    frame_map: list[int] | None


_ROW = np.dtype(
    [("file", "<u4"), ("number", "<u4"), ("start", "<u8"), ("size", "<u4"), ("clip", "<u4"), ("digest", "<u8")]
)
_CLIP = np.dtype([("size", "<u8"), ("time", "<i8")])
_FOLDER_LOCK = 1 << 32  # behind the numbers of shards
_CLIP_OVERHEAD = 4096  # bytes of a sample in a tar that are neither video nor rows


def convert(
    source: Source,
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    video_root: str | Path | None = None,
    license: str | None = None,
    canonical: int | None = None,
    max_bytes: int = 1 << 30,
    jobs: int = 1,
    part: tuple[int, int] = (0, 1),
    overwrite: bool = False,
) -> Summary:
    """Write the rows of files, or of the files in folders, as shards of at most about `max_bytes` into `out`.

    Videos lie under `video_root`, by default beside the file that names them. They are kept if they verify, re-encoded
    otherwise, or all of them with a shorter side of `canonical` pixels. `jobs` processes make the shards whose number
    modulo `part[1]` is `part[0]`, but for finished ones. Bad rows are left out and listed in `out/skipped.jsonl`.
    RecordError for a file that is not of the form, ShardError if `out` holds other shards; `overwrite` replaces them.
    """
    files = _files(source, [Path(item) for item in inputs])
    root = Path(video_root) if video_root is not None else Path(os.path.commonpath([file.parent for file in files]))
    run = _Run(source, files, root.absolute(), video_root is None, Path(out), license, canonical, max_bytes)
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal) as progress:
        reading = progress.add_task("reading", total=sum(file.stat().st_size for file in files))
        shards = _plan(run, *_scan(run, lambda num_bytes: progress.advance(reading, num_bytes)))
        mine = [shard for shard in shards if shard.number % part[1] == part[0]]
        todo = _prepare(run, mine, len(shards), part, overwrite)
        num_rows = sum(len(shard.rows) for shard in mine)
        writing = progress.add_task("writing", total=num_rows, completed=num_rows - sum(len(s.rows) for s in todo))
        for mark in _make_all(run, todo, jobs):
            progress.advance(writing, mark["kept"] + len(mark["skipped"]))
            names = ", ".join(mark["shards"]) or "no shard"
            counts = f"{mark['clips']} clips, {mark['kept']} records kept, {len(mark['skipped'])} skipped"
            console.print(f"{names}: {counts}", highlight=False, markup=False, soft_wrap=True)
    return _report(run, mine)


def _files(source: Source, inputs: Sequence[Path]) -> list[Path]:
    files: list[Path] = []
    for item in inputs:
        found = sorted(item.rglob(source.pattern)) if item.is_dir() else [item]
        if not found:
            raise RecordError(f"{item}: no file {source.pattern!r} in it; give the files of a {source.name} set")
        files += found
    for file in files:
        if not file.is_file():
            raise RecordError(f"{file}: no such file; give the files of a {source.name} set")
    return [file.absolute() for file in files]


def _scan(run: _Run, advance: Callable[[int], None]) -> tuple[np.ndarray, np.ndarray]:
    """First pass: all rows (_ROW) in order and, by number of first appearance, all clips (_CLIP)."""
    rows, clips = bytearray(), bytearray()
    number_of: dict[bytes, int] = {}
    for file_number, file in enumerate(run.files):
        end = 0
        found = _whole(file) if run.source.whole_files else stream_rows(file)
        for number, (start, data, value) in enumerate(found):
            try:
                name = run.locate(Row(file, number, value))
            except RecordError:
                name = None  # on the second pass it fails again and is listed
            what = f"video {name}" if name is not None else f"row {file_number} {number}"
            clip = number_of.setdefault(_digest(what.encode(errors="surrogatepass"), 16), len(number_of))
            if clip == len(clips) // _CLIP.itemsize:
                clips += struct.pack("<Qq", *_fingerprint(run.root, name))
            digest = int.from_bytes(_digest(data, 8), "little")
            rows += struct.pack("<IIQIIQ", file_number, number, start, len(data), clip, digest)
            advance(start + len(data) - end)
            end = start + len(data)
    return np.frombuffer(rows, _ROW), np.frombuffer(clips, _CLIP)


def _whole(file: Path) -> Iterator[tuple[int, bytes, Any]]:
    if file.stat().st_size > MAX_JSON_BYTES:
        raise RecordError(f"{file}: {file.stat().st_size} bytes, the limit is {MAX_JSON_BYTES}; split it")
    data = file.read_bytes()
    try:
        yield 0, data, json.loads(data)
    except (ValueError, RecursionError):
        yield 0, data, None


def _digest(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()


def _fingerprint(root: Path, name: str | None) -> tuple[int, int]:
    """Size in bytes and time of change in ns of a video: hashing its bytes would cost reading all of them again."""
    try:
        found = os.stat(root / name) if name is not None else None
    except (OSError, ValueError):
        found = None
    return (found.st_size, found.st_mtime_ns) if found else (0, 0)


def _plan(run: _Run, rows: np.ndarray, clips: np.ndarray) -> list[_Shard]:
    """Rows by clip, cut into shards by the size of what goes in."""
    rows = rows[np.argsort(rows["clip"], kind="stable")]
    sizes = np.bincount(rows["clip"], rows["size"], len(clips)).astype(np.int64) + clips["size"].astype(np.int64)
    cuts, filled = [0], 0
    for clip, size in enumerate(sizes.tolist()):
        if filled and filled + size + _CLIP_OVERHEAD > run.max_bytes:
            cuts.append(clip)
            filled = 0
        filled += size + _CLIP_OVERHEAD
    bounds = np.searchsorted(rows["clip"], [*cuts, len(clips)])
    about = json.dumps(run.about()).encode()
    shards = []
    for number, (first, last) in enumerate(zip(bounds[:-1].tolist(), bounds[1:].tolist())):
        part = rows[first:last]
        if len(part):
            # Neither places in the file nor numbers of clips: a shard does not change with what comes before it.
            facts = [
                about,
                *(part[name].tobytes() for name in ("file", "number", "digest")),
                clips[part["clip"]].tobytes(),
            ]
            shards.append(_Shard(number, _digest(b"".join(facts), 16).hex(), part))
    return shards


def _prepare(run: _Run, mine: list[_Shard], num_shards: int, part: tuple[int, int], overwrite: bool) -> list[_Shard]:
    """The shards that have to be made; ShardError if the folder holds something else."""
    done = run.out / DONE_FOLDER
    about_path = run.out / ABOUT_FILE
    about = json.dumps(run.about(), indent=1) + "\n"
    known = json.loads(about_path.read_text()) if about_path.is_file() else None
    remedy = "write to an empty folder or give --overwrite"
    if known is None and (stranger := next(run.out.glob("*.tar"), None)) is not None:
        raise ShardError(f"{stranger}, not of a conversion, already exists; write to an empty folder")
    if known is not None and known != run.about() and not overwrite:
        name = next(name for name in {**run.about(), **known} if known.get(name) != run.about().get(name))
        change = f"{name} was {known.get(name)!r:.80} and is now {run.about().get(name)!r:.80}"
        raise ShardError(f"{about_path}: another conversion ({change}) already exists; {remedy}")
    todo = []
    for shard in mine:
        mark = _read_mark(done, shard.number)
        if mark is not None and mark["digest"] != shard.digest and not overwrite:
            name = _shard_name(shard.number)
            raise ShardError(f"{run.out / name}, made from other records or videos, already exists; {remedy}")
        if not _finished(run.out, shard):
            todo.append(shard)
    done.mkdir(parents=True, exist_ok=True)
    for path in done.glob("*.json"):
        if int(path.stem) >= num_shards and int(path.stem) % part[1] == part[0]:
            if not overwrite:
                name = _shard_name(int(path.stem))
                raise ShardError(f"{run.out / name}, of records that are gone, already exists; {remedy}")
            _clear(run.out, int(path.stem))
    with _locked(run.out, _FOLDER_LOCK):
        _write(about_path, about)
    return todo


def _shard_name(number: int) -> str:
    return f"shard-{number:06d}.tar"


def _read_mark(done: Path, number: int) -> dict[str, Any] | None:
    path = done / f"{number:06d}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _finished(out: Path, shard: _Shard) -> dict[str, Any] | None:
    """The mark of a shard that is there and made from the same."""
    mark = _read_mark(out / DONE_FOLDER, shard.number)
    there = mark is not None and mark["digest"] == shard.digest and all((out / s).is_file() for s in mark["shards"])
    return mark if there else None


def _clear(out: Path, number: int) -> None:
    """Remove a shard, its mark first, and what a killed process left of it."""
    (out / DONE_FOLDER / f"{number:06d}.json").unlink(missing_ok=True)
    for pattern in (f"shard-{number:06d}.*", f".shard-{number:06d}.*"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)


@contextmanager
def _locked(out: Path, number: int) -> Iterator[None]:
    """Hold the lock of a number in a folder; a process that dies lets go of it."""
    with (out / DONE_FOLDER / "lock").open("a") as lock:
        with suppress(OSError):  # not every file system has locks
            fcntl.lockf(lock, fcntl.LOCK_EX, 1, number)
        yield


def _write(path: Path, text: str) -> None:
    for left in path.parent.glob(f".{path.name}.*.partial"):  # by a process that was killed, as its lock was free
        left.unlink(missing_ok=True)
    write_whole(path, text)


def _make_all(run: _Run, shards: list[_Shard], jobs: int) -> Iterator[dict[str, Any]]:
    if jobs == 1 or len(shards) < 2:
        yield from (_make(run, shard) for shard in shards)
        return
    # Fresh processes, not forks: the progress bar's thread may hold a lock at the time of a fork.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_start_worker, initargs=(run, os.getpid())) as pool:
        waiting: dict[Future[dict[str, Any]], int] = {}
        try:
            for shard in shards:
                waiting[pool.submit(_make_in_worker, shard)] = shard.number
                while len(waiting) >= 2 * jobs or (shard is shards[-1] and waiting):
                    for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                        yield future.result()
                        del waiting[future]
        except BrokenProcessPool:
            names = ", ".join(map(_shard_name, sorted(waiting.values())))
            remedy = "finished shards are kept; run again, with fewer --jobs if memory ran out"
            raise ShardError(f"a process died while it made one of {names}; {remedy}") from None
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_worker_run: _Run | None = None


def _start_worker(run: _Run, parent: int) -> None:
    global _worker_run
    _worker_run = run

    def watch() -> None:
        # A worker whose parent was killed would go on writing beside the next attempt.
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_in_worker(shard: _Shard) -> dict[str, Any]:
    assert _worker_run is not None
    return _make(_worker_run, shard)


def _make(run: _Run, shard: _Shard) -> dict[str, Any]:
    """Write one shard and, at last, its mark, unless another process has done so meanwhile."""
    # A worker of a run that was killed a moment ago may still be at this shard.
    with _locked(run.out, shard.number):
        return _finished(run.out, shard) or _write_shard(run, shard)


def _write_shard(run: _Run, shard: _Shard) -> dict[str, Any]:
    _clear(run.out, shard.number)
    clips, kept = 0, 0
    skipped: list[dict[str, Any]] = []
    with ShardWriter(run.out, max_bytes=run.max_bytes, number=shard.number) as writer, _Reader(run.files) as reader:
        for _, rows in itertools.groupby(shard.rows.tolist(), lambda row: row[4]):
            written = _write_clip(run, writer, map(reader.row, rows), skipped)
            clips, kept = clips + (written > 0), kept + written
    mark = {"digest": shard.digest, "shards": writer.names, "clips": clips, "kept": kept, "skipped": skipped}
    _write(run.out / DONE_FOLDER / f"{shard.number:06d}.json", json.dumps(mark))
    return mark


class _Reader:
    """Second pass over the files: rows by their place, with the last file kept open."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files
        self.number, self.file = -1, cast(BinaryIO, io.BytesIO())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def row(self, place: tuple[int, int, int, int, int, int]) -> Row:
        """The row at a place (_ROW); its value is None if it is not JSON. ShardError if the file has changed."""
        file, number, start, size, _, digest = place
        if file != self.number:
            self.file.close()
            self.number, self.file = file, self.files[file].open("rb")
        self.file.seek(start)
        data = self.file.read(size)
        if int.from_bytes(_digest(data, 8), "little") != digest:
            raise ShardError(f"{self.files[file]}: changed while it was converted; run again")
        try:
            return Row(self.files[file], number, json.loads(data))
        except (ValueError, RecursionError):
            return Row(self.files[file], number, None)


def _write_clip(run: _Run, writer: ShardWriter, rows: Iterable[Row], skipped: list[dict[str, Any]]) -> int:
    """Write what is good about one clip as one sample, list the rest; returns the number of rows written."""
    clip: _Clip | None = None
    trouble: RecordError | None = None  # of the video, so that it is decoded once for all its rows
    name: str | None = None
    good: list[tuple[Row, Part, tuple[Record, Masks]]] = []
    for row in rows:
        try:
            name = run.locate(row)
            if trouble is not None:
                raise row.error("video", str(trouble))
            if name is not None and clip is None:
                try:
                    clip = _load(run, name)
                except RecordError as error:
                    trouble = error
                    raise row.error("video", str(error)) from None
            part = run.source.part(row, clip.source if clip else None)
            good.append((row, part, _check(run, row, part, clip)))
        except RecordError as error:
            skipped.append(skip_line(row, name, error))
    if not good:
        return 0
    first = good[0][0]
    identity = name if name is not None else f"{first.file.name} {first.number}"
    stem = good[0][1].hint or (Path(name).stem if name is not None else first.name)
    key = f"{slug(stem)[:63]}-{_digest(identity.encode(errors='surrogatepass'), 8).hex()}"
    try:
        record, masks = _merge(clip, [checked for _, _, checked in good])
        writer.write(key, record, masks, {clip.member: clip.data} if clip else {})
    except RecordError as error:
        skipped += [skip_line(row, name, error) for row, *_ in good]
        return 0
    return len(good)


def _load(run: _Run, name: str) -> _Clip:
    """Read a video, verify it, re-encode it where that is needed or asked for; RecordError without the row's name."""
    path = run.root / name
    try:
        if not path.resolve().is_relative_to(run.root.resolve()):
            raise RecordError(f"{name!r} leads outside {run.root}; choose another --video-root")
        found = path.stat()
        if not stat.S_ISREG(found.st_mode) or found.st_size > MAX_MEDIA_BYTES:
            what = f"{found.st_size} bytes" if stat.S_ISREG(found.st_mode) else "no regular file"
            raise RecordError(f"{path} is {what}, the limit is {MAX_MEDIA_BYTES} bytes; cut it or give a video file")
        data = path.read_bytes()
    except (OSError, ValueError) as error:
        if isinstance(error, RecordError):
            raise
        raise RecordError(f"{path} cannot be read ({error}); check --video-root") from error
    try:
        if run.canonical is None:
            try:
                info = verify(data)
                return _Clip(data, path.suffix[1:].lower() or "mp4", info, info, None)
            except UnsteadyVideo:
                pass
        data, source, frame_map = reencode(data, run.canonical)
        return _Clip(data, "mp4", verify(data), source, frame_map)
    except VideoError as error:
        raise RecordError(f"{path}: {error}") from error


def _check(run: _Run, row: Row, part: Part, clip: _Clip | None) -> tuple[Record, Masks]:
    """Record of one row, in frames and pixels of the source video."""
    media = [{"member": clip.member, "kind": "video", **vars(clip.source)}] if clip else []
    values = record_values(row, part, media, source=run.source, license=run.license)
    return parse_sample(slug(row.name), values, part.masks)


def _merge(clip: _Clip | None, parts: Sequence[tuple[Record, Masks]]) -> tuple[Record, Masks]:
    """One sample of all rows about a clip, in frames and pixels of the stored video; equal masks are one object."""
    masks: Masks = {}
    objects: dict[str, Object] = {}
    conversations: list[Conversation] = []
    for record, part_masks in parts:
        new_id: dict[str, str] = {}
        for thing in record.objects:
            frames = part_masks.get(thing.id)
            # Two objects that are never visible have equal masks too, but nothing says that they are the same.
            seen = frames is not None and any(frames.values())
            same = next((name for name, known in masks.items() if known == frames), None) if seen else None
            names = itertools.chain([thing.id], map(str, itertools.count()))
            name = same or next(name for name in names if name not in objects)
            new_id[thing.id] = name
            if same is None:
                objects[name] = thing.model_copy(update={"id": name})
                if frames is not None:
                    masks[name] = frames
        conversations += [_rename(conversation, new_id) for conversation in record.conversations]
    licenses = sorted({record.license for record, _ in parts})
    update = {"license": " AND ".join(licenses), "objects": [*objects.values()], "conversations": conversations}
    return _restate(parts[0][0].model_copy(update=update), masks, clip)


def _rename(conversation: Conversation, new_id: Mapping[str, str]) -> Conversation:
    turns = []
    for turn in conversation.turns:
        mentions = [
            mention.model_copy(update={"object_ids": [new_id[name] for name in mention.object_ids]})
            for mention in turn.mentions
        ]
        turns.append(turn.model_copy(update={"mentions": mentions}))
    return conversation.model_copy(update={"turns": turns})


def _restate(record: Record, masks: Masks, clip: _Clip | None) -> tuple[Record, Masks]:
    """Frames and boxes of the source video as those of the stored one."""
    if clip is None or clip.frame_map is None:
        return record, masks
    shown: dict[int, list[int]] = {}
    for stored, frame in enumerate(clip.frame_map):
        shown.setdefault(frame, []).append(stored)

    def moved(frames: Mapping[int, _T]) -> dict[int, _T]:
        return {stored: value for frame, value in frames.items() for stored in shown.get(frame, ())}

    down, across = clip.stored.height / clip.source.height, clip.stored.width / clip.source.width
    objects = [
        thing.model_copy(
            update={
                "boxes": moved(
                    {i: (x0 * across, y0 * down, x1 * across, y1 * down) for i, (x0, y0, x1, y1) in thing.boxes.items()}
                )
            }
        )
        for thing in record.objects
    ]
    conversations = []
    for conversation in record.conversations:
        span = conversation.span
        if span is not None:
            first, last = bisect_left(clip.frame_map, span[0]), bisect_right(clip.frame_map, span[1]) - 1
            span = min(first, last), max(first, last)  # its neighbours, where no stored frame shows any of it
        conversations.append(conversation.model_copy(update={"span": span}))
    media = Media(member=clip.member, kind="video", **vars(clip.stored), frame_map=clip.frame_map)
    update = {"media": [media], "objects": objects, "conversations": conversations}
    return record.model_copy(update=update), {name: moved(frames) for name, frames in masks.items()}


def _report(run: _Run, mine: list[_Shard]) -> Summary:
    """Sum up the shards of this part, and list what all finished ones skipped in `skipped.jsonl`."""
    done = run.out / DONE_FOLDER
    while True:
        paths = sorted(done.glob("*.json"))
        lines = [json.dumps(line) + "\n" for path in paths for line in json.loads(path.read_text())["skipped"]]
        with _locked(run.out, _FOLDER_LOCK):
            _write(run.out / SKIPPED_FILE, "".join(lines))
        # Another part may have finished since: whoever writes last must have seen all.
        if sorted(done.glob("*.json")) == paths:
            break
    marks = [mark for shard in mine if (mark := _read_mark(done, shard.number)) is not None]
    reasons = Counter(_kind(line) for mark in marks for line in mark["skipped"])
    clips, kept = (sum(mark[name] for mark in marks) for name in ("clips", "kept"))
    return Summary(clips, kept, reasons.total(), reasons)


def _kind(line: Mapping[str, Any]) -> str:
    """A reason without what differs from record to record."""
    reason = re.sub(r"'[^']*'|\"[^\"]*\"|\S*/\S*", "…", NAMED.sub("", line["reason"]))
    return re.sub(r"\d+(\.\d+)?", "N", reason)
