"""Data behind a URL reads like the folder it came from, whatever the server does; the cache keeps its bound."""

import functools
import http.server
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from loose_files import write_loose
from typer.testing import CliRunner

from swim.data_tools import storage
from swim.data_tools.cli import app
from swim.data_tools.records import Conversation, Media, Record, Turn
from swim.data_tools.shards import BadSample, ShardError, ShardSet, ShardWriter
from swim.data_tools.storage import FileCache, locate, write_manifest

TURNS = [Turn(role="user", text="what ?"), Turn(role="assistant", text="that .")]
SIZE = 100_000


class Server(http.server.ThreadingHTTPServer):
    """A web server of a folder, with ranges; `faults` maps the end of a path to what goes wrong with the next of its
    requests, `gets` counts them."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
        self.folder, self.faults, self.gets = folder, dict[str, list[str]](), Counter[str]()
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Handler(http.server.SimpleHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        name = self.path.lstrip("/")
        self.server.gets[name] += 1
        path = self.server.folder / name
        fault = (self.server.faults.get(name) or [""]).pop(0)
        if not path.is_file() or fault == "error":
            return self.send_error(500 if fault else 404)
        data = b"<html>come back later</html>" if fault == "html" else path.read_bytes()
        whole, code = len(data), 200
        if (asked := self.headers.get("Range")) and fault != "whole":
            first, last = asked.removeprefix("bytes=").split("-")
            data, code = data[int(first) : int(last) + 1], 206
        self.send_response(code)
        if fault != "endless":
            self.send_header("Content-Length", str(len(data)))
        if code == 206:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(data) - 1}/{whole}")
        self.end_headers()
        if fault == "flip":
            data = bytes([data[0]]) + bytes(byte ^ 1 for byte in data[1:])
        if fault == "endless":
            data = data + data
        self.wfile.write(data[: len(data) // 2] if fault == "cut" else data)
        if fault in ("cut", "endless"):
            self.close_connection = True
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage, "WAITS", (0.01, 0.01, 0.01))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Five shards of one sample with 100 kB each."""
    media = Media(member="bin", kind="video", height=8, width=8, num_frames=2, fps=1)
    said = [Conversation(task="ask", turns=TURNS)]
    record = Record(source="test", license="CC0-1.0", media=[media], objects=[], conversations=said)
    with ShardWriter(tmp_path / "shards", max_bytes=1) as writer:
        for i in range(5):
            writer.write(f"clip{i}", record, {}, {"bin": bytes([i]) * SIZE})
    write_manifest(tmp_path / "shards")
    return tmp_path / "shards"


@pytest.fixture
def server(folder: Path) -> Iterator[Server]:
    with Server(folder) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()
        thread.join()


@pytest.fixture
def memory(folder: Path) -> Iterator[str]:
    fs = fsspec.filesystem("memory")
    fs.put(str(folder) + "/", "/bucket/", recursive=True)
    yield "memory://bucket"
    fs.rm("/bucket", recursive=True)


def whole(tmp_path: Path, shards: float = 100) -> FileCache:
    return FileCache(tmp_path / "cache", int(shards * 1.15 * SIZE))


def read_all(shards: ShardSet) -> list[int]:
    return [shards.read(i).media()[-1] for i in range(len(shards))]


@pytest.mark.parametrize("cached", [True, False])
@pytest.mark.parametrize("scheme", ["memory", "http"])
def test_a_url_reads_like_the_folder(request, folder: Path, tmp_path: Path, scheme: str, cached: bool) -> None:
    url = request.getfixturevalue("memory") if scheme == "memory" else request.getfixturevalue("server").url
    local = ShardSet(folder)
    remote = ShardSet(f"{url}/", cache=tmp_path / "indices", files=whole(tmp_path) if cached else None)
    assert (remote.digest, remote.keys(), read_all(remote)) == (local.digest, local.keys(), read_all(local))
    assert remote.read("clip3").media() == bytes([3]) * SIZE
    copied = pickle.loads(pickle.dumps(remote))
    if scheme == "http":  # the memory of another process is another
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert [pool.apply_async(read_all, (x,)).get(30) for x in (remote, copied)] == [list(range(5))] * 2
    assert len(list((tmp_path / "indices").glob("index_*"))) == 5


def test_indices_and_shards_are_fetched_once(server: Server, tmp_path: Path) -> None:
    for _ in range(3):
        shards = ShardSet(server.url, cache=tmp_path / "indices", files=whole(tmp_path))
        assert read_all(shards) == [0, 1, 2, 3, 4]
    assert server.gets.pop("shards.json") == 3
    assert set(server.gets.values()) == {1}
    # Another index is another digest, and a run's resume refuses it.
    index = server.folder / "shard-000002.index.jsonl"
    index.write_text(index.read_text().replace('"ask"', '"two"'))
    write_manifest(server.folder)
    assert ShardSet(server.url, cache=tmp_path / "indices").digest != shards.digest


def test_transient_errors_are_repeated(server: Server, tmp_path: Path) -> None:
    index = "shard-000000.index.jsonl"
    server.faults = {"shards.json": ["error"], index: ["error", "cut"], "shard-000000.tar": ["error", "error"]}
    server.faults["shard-000001.tar"] = ["cut", "html", "endless"]
    shards = ShardSet(server.url, files=whole(tmp_path))
    assert read_all(shards) == [0, 1, 2, 3, 4]
    assert (server.gets["shard-000000.tar"], server.gets["shard-000001.tar"], server.gets[index]) == (3, 4, 3)
    assert not list((tmp_path / "cache").glob(".*.partial"))


@pytest.mark.parametrize("cached", [True, False])
def test_lasting_errors_cost_the_sample_and_say_why(server: Server, tmp_path: Path, cached: bool) -> None:
    shards = ShardSet(server.url, files=whole(tmp_path) if cached else None)
    for fault, reason in [
        ("error", "500, message="),
        ("cut", "ClientPayloadError"),
        ("html", "<html>come|ends after 0 of"),
    ]:
        server.faults["shard-000002.tar"] = [fault] * 100
        server.gets.clear()
        with pytest.raises(BadSample, match=rf"'clip2' in shard-000002.tar .*({reason})"):
            shards.read(2)
        assert server.gets["shard-000002.tar"] <= 8
    os.rename(server.folder / "shard-000002.tar", server.folder / "gone")
    server.faults.clear()
    server.gets.clear()
    with pytest.raises(BadSample, match=r"shard-000002.tar"):
        shards.read(2)
    assert server.gets["shard-000002.tar"] == 1, "what is not there is not asked for again"
    assert shards.read(3).media()[0] == 3
    os.rename(server.folder / "gone", server.folder / "shard-000002.tar")
    assert shards.read(2).media()[0] == 2


@pytest.mark.parametrize("cached", [True, False])
def test_flipped_bits_are_fetched_once_more(server: Server, tmp_path: Path, cached: bool) -> None:
    shards = ShardSet(server.url, files=whole(tmp_path) if cached else None)
    server.faults["shard-000001.tar"] = ["flip"]
    assert shards.read(1).media()[0] == 1
    assert server.gets["shard-000001.tar"] == (2 if cached else 4)
    server.faults["shard-000002.tar"] = ["flip"] * 9
    with pytest.raises(BadSample, match=r"CRC32 .* the index says .*copy the shard again"):
        shards.read(2)
    assert server.gets["shard-000002.tar"] == 2


def test_a_server_without_ranges_needs_the_cache(server: Server, tmp_path: Path) -> None:
    server.faults["shard-000001.tar"] = ["whole"] * 9
    with pytest.raises(BadSample, match=r"bytes came instead of \d+; give data.cache_gib room"):
        ShardSet(server.url).read(1)
    assert ShardSet(server.url, files=whole(tmp_path)).read(1).media()[0] == 1


def test_the_cache_keeps_its_bound_and_what_was_used_last(server: Server, tmp_path: Path) -> None:
    cache = whole(tmp_path, shards=2)
    shards = ShardSet(server.url, files=cache)
    for i in [0, 1, 0, 0, 2, 0, 3, 0]:
        assert shards.read(i).media()[0] == i
        time.sleep(0.01)
        kept = [path for path in cache.folder.iterdir() if path.suffix != ".lock"]
        assert sum(path.stat().st_size for path in kept) <= cache.max_bytes
    assert [server.gets[f"shard-00000{i}.tar"] for i in range(4)] == [1, 1, 1, 1], "0 was always in use"
    with pytest.raises(BadSample, match=r"has \d+ bytes, data.cache_gib allows \d+; raise it, or set it to 0"):
        ShardSet(server.url, files=FileCache(tmp_path / "small", SIZE)).read(0)


def test_a_reader_keeps_what_is_evicted(server: Server, tmp_path: Path) -> None:
    cache = whole(tmp_path, shards=1)
    shards = ShardSet(server.url, files=cache)
    total = (server.folder / "shard-000000.tar").stat().st_size
    descriptor = cache.open(f"{server.url}/shard-000000.tar", total, lambda path: path.write_bytes(bytes(total)))
    assert shards.read(1).media()[0] == 1
    assert len(os.pread(descriptor, total, 0)) == total
    os.close(descriptor)


def _read_often(url: str, cache: FileCache, seed: int) -> bool:
    shards = ShardSet(url, files=cache)
    order = [(i * (seed + 2) + seed) % 5 for i in range(25)]
    return all(shards.read(i).media() == bytes([i]) * SIZE for i in order)


def test_many_processes_share_a_cache(server: Server, tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        ample = whole(tmp_path)
        assert all(pool.starmap(_read_often, [(server.url, ample, i) for i in range(4)]))
        assert [server.gets[f"shard-00000{i}.tar"] for i in range(5)] == [1] * 5, "one of them fetches, all read"
        small = FileCache(tmp_path / "small", int(2.4 * SIZE))
        assert all(pool.starmap(_read_often, [(server.url, small, i) for i in range(4)]))
    left = [path for path in small.folder.iterdir() if path.suffix != ".lock"]
    assert sum(path.stat().st_size for path in left) <= small.max_bytes
    assert not [path for path in left if path.suffix == ".partial"]


def test_a_download_that_goes_on_keeps_its_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache, inside, done = FileCache(tmp_path / "cache", int(1.5 * SIZE)), threading.Event(), threading.Event()
    monkeypatch.setattr(storage, "DEAD_AFTER", 0.0)  # the lock alone tells

    def slow(path: Path) -> None:
        inside.set()
        path.write_bytes(bytes(SIZE))
        time.sleep(0.5)
        done.set()

    thread = threading.Thread(target=lambda: os.close(cache.open("http://x/a.tar", SIZE, slow)))
    thread.start()
    assert inside.wait(30)
    os.close(cache.open("http://x/b.tar", SIZE, lambda path: path.write_bytes(bytes(SIZE)) and None))
    assert done.is_set(), "there is room for one of them only"
    thread.join()


def _fetch_forever(cache: FileCache, started: Any) -> None:
    def fetch(path: Path) -> None:
        path.write_bytes(bytes(SIZE))
        started.set()
        time.sleep(60)

    cache.open("http://x/a.tar", SIZE, fetch)


def test_a_killed_download_does_not_hold_room(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    cache, started = FileCache(tmp_path / "cache", int(1.5 * SIZE)), context.Event()
    process = context.Process(target=_fetch_forever, args=(cache, started))
    process.start()
    assert started.wait(30)
    process.kill()
    process.join()
    (left,) = cache.folder.glob(".*.partial")
    os.utime(left, (0, 0))
    (cache.folder / "notes.txt").write_bytes(bytes(2 * SIZE))
    os.close(cache.open("http://x/b.tar", SIZE, lambda path: path.write_bytes(bytes(SIZE)) and None))
    assert not list(cache.folder.glob(".*.partial"))
    assert (cache.folder / "notes.txt").exists(), "what is not the cache's own is neither counted nor removed"


def test_loose_videos_are_read_from_a_url(synth_folder: Path, tmp_path: Path) -> None:
    local = ShardSet(write_loose(tmp_path / "loose", ShardSet(synth_folder)))
    fs = fsspec.filesystem("memory")
    fs.put(f"{tmp_path / 'loose'}/", "/loose/", recursive=True)
    for url in ("memory://loose", "memory://loose/mine.jsonl"):
        remote = ShardSet(url, files=whole(tmp_path))
        assert remote.digest == local.digest
        for i in range(len(local)):
            assert remote.read(i).media() == local.read(i).media()
    fs.pipe_file(f"/loose/{local.read(0).record.media[0].path}", b"changed")
    assert remote.read(0).media(), "from the cache"
    with pytest.raises(BadSample, match=r"media\[0\] .*7 of \d+ bytes"):
        ShardSet("memory://loose").read(0).media()
    fs.rm("/loose", recursive=True)


def test_what_cannot_be_opened_says_what_to_do(server: Server, memory: str, tmp_path: Path) -> None:
    (server.folder / "shards.json").unlink()
    with pytest.raises(ShardError, match=r"shards.json is not there, and a web server lists no files; run 'swim data"):
        ShardSet(server.url)
    (server.folder / "shards.json").write_text("<html>")
    with pytest.raises(ShardError, match=r"shards.json is damaged"):
        ShardSet(server.url)
    write_manifest(server.folder)
    index = server.folder / "shard-000001.index.jsonl"
    server.faults[index.name] = ["html"]
    with pytest.raises(ShardError, match=r"is not the one that shards.json names"):
        ShardSet(server.url)
    fs = fsspec.filesystem("memory")
    good = fs.cat_file("/bucket/shard-000001.index.jsonl")
    fs.pipe_file("/bucket/shard-000001.index.jsonl", b"<html>")
    for _ in range(2):
        with pytest.raises(ShardError, match=r"shard-000001.index.jsonl: its header is damaged"):
            ShardSet(memory, cache=tmp_path)
    fs.pipe_file("/bucket/shard-000001.index.jsonl", good)
    assert len(ShardSet(memory, cache=tmp_path)) == 5
    fs.rm("/bucket/shard-000001.index.jsonl")
    with pytest.raises(ShardError, match=r"shard-000001.index.jsonl is not there; run 'swim data index' before"):
        ShardSet(memory)
    fs.mkdir("/empty")
    with pytest.raises(ShardError, match=r"memory://empty: no \*.tar"):
        ShardSet("memory://empty")
    with pytest.raises(ShardError, match=r"memory://none: cannot be opened"):
        ShardSet("memory://none")


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x", "pipe://cat x", "reference://x", "simplecache::s3://x", "zip://a::s3://x", "jar://x", "data://x"],
)
def test_urls_that_do_more_than_read_are_refused(url: str) -> None:
    with pytest.raises(ShardError, match="is neither a folder nor a plain URL of a known scheme"):
        ShardSet(url)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(ShardError, match="s3://bucket/x: Install s3fs to access S3; install that package"):
        ShardSet("s3://bucket/x")


def test_file_urls_are_paths(folder: Path) -> None:
    assert locate(f"file://{folder}") == folder
    assert ShardSet(f"file://{folder}").digest == ShardSet(folder).digest


def test_data_commands_take_urls(server: Server) -> None:
    for command in ("stats", "show"):
        result = CliRunner().invoke(app, [command, server.url])
        assert result.exit_code == 0, result.output


def test_the_manifest_is_written_by_the_index_command(folder: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(folder, tmp_path / "copy"))
    for path in [*copied.glob("*.jsonl"), copied / "shards.json"]:
        path.unlink()
    assert CliRunner().invoke(app, ["index", str(copied)]).exit_code == 0
    assert (copied / "shards.json").read_bytes() == (folder / "shards.json").read_bytes()
