"""JSONL files beside loose videos, read like shards: a sidecar index says where every line lies and what it is about.

A line is a record of the source `jsonl`, one sample each. Its index is `NAME.index.jsonl`, made by `swim data index` or
by whoever opens the file first; lines that are left out are listed in `NAME.skipped.jsonl`.
"""

import json
import os
import sys
import time
import zlib
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress

from swim.data_tools.files import locked
from swim.data_tools.index import Entry, ShardError, check_header, entry_of, index_name, remedy, write_index
from swim.data_tools.records import KEY_PATTERN, RecordError, parse_sample
from swim.data_tools.rows import Row, stream_rows
from swim.data_tools.sources.forms import record_values, skip_line, slug
from swim.data_tools.sources.jsonl import SOURCE
from swim.data_tools.storage import LocalFiles
from swim.data_tools.video import VideoError, VideoInfo, probe

LINE = "line"
_CHUNK = 1 << 20
_KEPT = 4096
_Video = tuple[VideoInfo, int, int]  # with size and CRC32


def jsonl_files(folder: Path) -> list[Path]:
    """The JSONL files of a folder that hold records."""
    ours = (".index.jsonl", ".skipped.jsonl")
    named = (path for path in folder.glob("[!.]*.jsonl") if not path.name.endswith(ours))
    return sorted(path for path in named if path.name != "skipped.jsonl")


def line_values(entry: Entry, line: bytes, *, masks: bool) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON values of the record and the masks in a line of the index; RecordError if it is not of the form."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        value = None
    if not masks and isinstance(value, dict):
        value.pop("masks", None)
    video = next(iter(entry.files), None)
    info = None if video is None else VideoInfo(entry.height, entry.width, entry.num_frames, entry.fps)
    return _values(Row(Path(entry.shard), 0, value), video, info)


def _values(row: Row, video: str | None, info: VideoInfo | None) -> tuple[dict[str, Any], dict[str, Any]]:
    part = SOURCE.part(row, info)
    media = [{"path": video, "kind": "video", **vars(info)}] if info is not None else []
    return record_values(row, part, media, source=SOURCE), part.masks


def fresh_index(path: Path) -> bytes:
    """Text of the index of a JSONL file, made first if it is missing or of another version of the file.

    ShardError if it cannot be made where the file lies.
    """
    with suppress(OSError, ShardError):
        return _read(path)
    try:
        with _locked(path) as alone:
            with suppress(OSError, ShardError):  # another process may have made it meanwhile
                return _read(path)
            _make(path, alone=alone)
        return _read(path)
    except OSError as error:
        problem = f"{path}: its index {index_name(path.name)} is missing or stale, and cannot be made ({error})"
        raise ShardError(f"{problem}; {remedy(str(path))} where the folder can be written") from error


def index_jsonl(path: str | Path, *, jobs: int = 4) -> Path:
    """Write the index of a JSONL file anew and return its path; `jobs` threads look at videos.

    ShardError if no line can be used or the file is no JSON Lines.
    """
    path = Path(path)
    with _locked(path) as alone:
        return _make(path, alone=alone, jobs=jobs)


def _read(path: Path) -> bytes:
    index = path.with_name(index_name(path.name))
    text, made, now = index.read_bytes(), index.stat(), path.stat()
    header = check_header(str(path), text, now.st_size)
    # Copies have other times: only then is the file compared, and the next time is spared that.
    if now.st_mtime_ns >= made.st_mtime_ns:
        if header.get("crc32") != _checksum(path):
            raise ShardError(f"{path} has changed")
        with suppress(OSError):
            os.utime(index)
    return text


def _locked(path: Path) -> AbstractContextManager[bool]:
    return locked(path.with_name(f".{path.name}.lock"))


def _make(path: Path, *, alone: bool, jobs: int = 4) -> Path:
    if (tar := path.with_suffix(".tar")).exists():
        raise ShardError(f"{path}: {tar.name} beside it would have the same index; rename one of them")
    before = path.stat()
    print(f"indexing {path}: {before.st_size:,} bytes, and the videos that it names", file=sys.stderr, flush=True)
    checksum = _checksum(path)
    index, skipped = path.with_name(index_name(path.name)), path.with_name(f"{path.stem}.skipped.jsonl")
    for left in path.parent.glob(f".{index.name}.*.partial"):
        # By a process that was killed; where locks do not reach, another one may be at a younger one.
        with suppress(OSError):
            if alone or time.time() - left.stat().st_mtime > 3600:
                left.unlink()
    lines: list[dict[str, Any]] = []
    good = 0

    def entries() -> Iterator[Entry]:
        nonlocal good
        for entry in _entries(path, lines, jobs):
            good += 1
            yield entry
        after = path.stat()
        if (after.st_size, after.st_mtime_ns) != (before.st_size, before.st_mtime_ns):
            raise ShardError(f"{path}: changed while it was indexed; run again")
        skipped.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if not good:
            first = lines[0]["reason"] if lines else "it has no lines"
            raise ShardError(f"{path}: no line can be used ({first!r:.300}); see {skipped.name}")

    try:
        write_index(path, before.st_size, entries(), crc32=checksum)
    except RecordError as error:
        raise ShardError(str(error)) from error
    why = f"; {skipped} says why" if lines else ""
    print(f"indexed {path}: {good} records, {len(lines)} skipped{why}", file=sys.stderr, flush=True)
    if not lines:
        skipped.unlink()
    return index


def _entries(path: Path, skipped: list[dict[str, Any]], jobs: int) -> Iterator[Entry]:
    files = LocalFiles(path.parent)
    keys: set[str] = set()
    videos: dict[str, Future[_Video]] = {}  # the last ones: lines about a video mostly follow each other
    waiting: deque[tuple[int, bytes, Row, str | None, Future[_Video] | RecordError | None]] = deque()
    console = Console(stderr=True)
    with (
        ThreadPoolExecutor(jobs) as pool,
        Progress(console=console, disable=not console.is_terminal) as progress,
    ):
        reading = progress.add_task("indexing", total=path.stat().st_size)

        def finish() -> Iterator[Entry]:
            start, data, row, video, found = waiting.popleft()
            progress.update(reading, completed=start + len(data))
            try:
                if isinstance(found, RecordError):
                    raise found
                yield _entry(row, start, data, video, found.result() if found is not None else None, keys)
            except (RecordError, OSError, VideoError) as error:
                reason = error if isinstance(error, RecordError) else row.error("video", str(error))
                skipped.append(skip_line(row, video, reason))

        for number, (start, data, value) in enumerate(stream_rows(path)):
            row, video = Row(path, number, value), None
            found: Future[_Video] | RecordError | None = None
            try:
                if (video := SOURCE.video(row)) is not None:
                    found = videos[video] = videos.get(video) or pool.submit(_look, files, video)
            except RecordError as error:
                found = error
            if len(videos) > _KEPT:
                videos.pop(next(iter(videos)))
            waiting.append((start, data, row, video, found))
            if len(waiting) > 4 * jobs:
                yield from finish()
        while waiting:
            yield from finish()


def _look(files: LocalFiles, name: str) -> _Video:
    path = files.find(name)
    return probe(path), path.stat().st_size, _checksum(path)


def _entry(row: Row, start: int, data: bytes, video: str | None, found: _Video | None, keys: set[str]) -> Entry:
    values, masks = _values(row, video, found[0] if found is not None else None)
    name = f"{slug(row.file.stem)[:60]}-{row.number:06d}"
    own = row.value.get("key")
    plain = own if own and KEY_PATTERN.fullmatch(own) else slug(own or "")
    wanted = (plain, f"{plain[:60]}-{row.number:06d}", name) if own else (name,)
    key = next((key for key in wanted if key not in keys), None)
    if key is None:
        raise row.error("key", f"{own!r:.80} is taken; keys are unique over a data set")
    record, checked = parse_sample(key, values, masks)
    keys.add(key)
    files = {video: found[1:]} if video is not None and found is not None else {}
    return entry_of(key, {LINE: (start, len(data), zlib.crc32(data))}, record, checked, files)


def _checksum(path: Path) -> int:
    """CRC32 of a file."""
    found = 0
    with path.open("rb") as file:
        while data := file.read(_CHUNK):
            found = zlib.crc32(data, found)
    return found
