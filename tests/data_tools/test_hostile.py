"""Promise: a tar from elsewhere is indexed or refused with a reason, whatever it holds; nothing in it is ever run, and
nothing outside the folder is read or written."""

import io
import os
import pickle
import resource
import shutil
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from swim.data_tools.cli import app
from swim.data_tools.records import Media, Record
from swim.data_tools.shards import ShardSet, ShardWriter
from swim.data_tools.validate import Options, examine

MEDIA = {"member": "mp4", "kind": "video", "height": 8, "width": 8, "num_frames": 2, "fps": 1}


def _swim(*args: object) -> Result:
    return CliRunner().invoke(app, [str(arg) for arg in args])


def _record(**media: Any) -> bytes:
    record = {"source": "test", "license": "CC0-1.0", "media": [], "objects": [], "conversations": []}
    return Record.model_validate(record | ({"media": [MEDIA | media]} if media else {})).model_dump_json().encode()


def _member(name: str, data: bytes = b"", **fields: Any) -> tuple[tarfile.TarInfo, bytes]:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    return info, data


def _tar(path: Path, *members: tuple[tarfile.TarInfo, bytes], format: int = tarfile.GNU_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def _sparse(path: Path) -> None:
    """A header of an old GNU sparse file of 2 GiB that holds 512 bytes; reading it whole would take the 2 GiB."""
    info, _ = _member("k.mp4")
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"%011o\0" % 512
    header[156:157] = tarfile.GNUTYPE_SPARSE
    header[386:410] = b"%011o\0" % 0 + b"%011o\0" % 512
    header[483:495] = b"%011o\0" % (2 << 30)
    path.write_bytes(_checked(header) + b"x" * 512 + bytes(1024))


def _checked(header: bytearray) -> bytes:
    header[148:156] = b"%06o\0 " % tarfile.calc_chksums(bytes(header))[0]
    return bytes(header)


def _negative(path: Path) -> None:
    """A member whose size would lead back to its own header."""
    good = bytearray(_member("k.json", b"x")[0].tobuf(tarfile.GNU_FORMAT))
    good[124:136] = struct.pack(">i", -1)[:1] * 4 + struct.pack(">q", -512)
    path.write_bytes(_checked(good) * 4 + bytes(1024))


def _huge(path: Path) -> None:
    header = bytearray(_member("k.json")[0].tobuf(tarfile.GNU_FORMAT))
    header[124:136] = b"\x80" + (1 << 50).to_bytes(11, "big")
    path.write_bytes(_checked(header) + bytes(1024))


JSON = _member("k.json", _record(fps=1))
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "symbolic link": (
        lambda p: _tar(p, JSON, _member("k.mp4", type=tarfile.SYMTYPE, linkname="/etc/passwd")),
        "'k.mp4' is not a plain file",
    ),
    "link to another member": (
        lambda p: _tar(p, _member("k.mov", b"data"), JSON, _member("k.mp4", type=tarfile.SYMTYPE, linkname="k.mov")),
        "'k.mp4' is not a plain file",
    ),
    "hard link": (
        lambda p: _tar(p, JSON, _member("k.mp4", type=tarfile.LNKTYPE, linkname="k.json")),
        "'k.mp4' is not a plain file",
    ),
    "device": (lambda p: _tar(p, JSON, _member("k.mp4", type=tarfile.CHRTYPE, devmajor=1, devminor=5)), "not a plain"),
    "pipe": (lambda p: _tar(p, JSON, _member("k.mp4", type=tarfile.FIFOTYPE)), "'k.mp4' is not a plain file"),
    "folder": (lambda p: _tar(p, _member("k", type=tarfile.DIRTYPE), JSON), "'k' is not a plain file"),
    "absolute name": (lambda p: _tar(p, _member("/etc/k.json", _record())), "'/etc/k' is not 1 to 80"),
    "name that leads out": (lambda p: _tar(p, _member("../k.json", _record())), "'' has ['./k.json'] but no"),
    "pipe as a name": (lambda p: _tar(p, _member("pipe:touch x.json", _record())), "'pipe:touch x' is not 1 to 80"),
    "control characters": (lambda p: _tar(p, _member("\x1b[2J.json", _record())), r"'\x1b[2J' is not 1 to 80"),
    "absolute name in a pax header": (
        lambda p: _tar(p, _member("k.json", _record(), pax_headers={"path": "/k.json"}), format=tarfile.PAX_FORMAT),
        "'/k' is not 1 to 80",
    ),
    "sparse file of 2 GiB": (_sparse, "'k.mp4' is not a plain file"),
    "negative size": (_negative, "'k.json' has -512 bytes at byte 512"),
    "petabyte": (_huge, f"'k.json' has {1 << 50} bytes at byte 512 of 1536"),
    "nothing": (lambda p: p.write_bytes(b""), "cannot be read as a tar"),
}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", REFUSED)
def test_strange_tars_are_refused_with_a_reason(tmp_path: Path, name: str) -> None:
    make, said = REFUSED[name]
    make(tmp_path / "a.tar")
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = _swim("index", tmp_path)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    assert said in result.stderr
    assert "\x1b" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.tar"], "nothing is written, least of all an index"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 500 << 10, "KiB"


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "headers", [{"comment": "x" * 100_000}, {"mtime": "1e30"}, {"path": "k.json"}, {"SCHILY.xattr.user.x": "\udcff"}]
)
def test_pax_headers_are_read_over(tmp_path: Path, headers: dict[str, str]) -> None:
    _tar(tmp_path / "a.tar", _member("k.json", _record(), pax_headers=headers), format=tarfile.PAX_FORMAT)
    assert _swim("index", tmp_path).exit_code == 0
    assert ShardSet(tmp_path).read("k").record.source == "test"


def test_one_key_in_two_shards_is_refused_at_once(tmp_path: Path) -> None:
    for name in ("a.tar", "b.tar"):
        _tar(tmp_path / name, _member("k.json", _record()))
    for command in ("index", "validate"):
        result = _swim(command, tmp_path)
        assert result.exit_code == 2
        assert "key 'k' is there twice; remove one of its shards" in result.stderr


@pytest.mark.parametrize("path", ["pipe:touch made", "/dev/zero", "../made", "file:///etc/passwd", "concat:a|b"])
def test_a_path_is_a_file_of_the_folder_or_nothing(tmp_path: Path, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "s"
    folder.mkdir()
    _tar(folder / "a.tar", _member("k.json", _record(member=None, path=path)))
    assert _swim("index", folder).exit_code == 0
    result = _swim("validate", folder, "--deep")
    assert result.exit_code == 1
    assert f"{path!r} is not a file inside" in result.stdout
    assert not list(tmp_path.rglob("made"))
    for command in ("index", "validate", "show"):
        assert _swim(command, path).exit_code == 2
    assert not list(tmp_path.rglob("made"))


class _Bomb:
    """What makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("as_media", [False, True], ids=["beside", "as the media"])
@pytest.mark.parametrize("suffix", ["pyd", "pickle", "pkl", "pth", "npy", "npz"])
def test_pickles_are_never_loaded(synth_folder: Path, tmp_path: Path, suffix: str, as_media: bool) -> None:
    from tiny import tiny_config

    from swim.train.loader import Loader, Order
    from swim.train.system import build_system

    made = tmp_path / "made"
    bomb = pickle.dumps(_Bomb(made))
    pickle.loads(bomb)
    assert made.is_dir(), "the bomb is one"
    made.rmdir()
    source = ShardSet(synth_folder)
    members = []
    for number in range(3):
        sample = source.read(number)
        record = sample.record
        if as_media and number == 1:
            media = Media.model_validate({**record.media[0].model_dump(), "member": suffix})
            record = record.model_copy(update={"media": [media]})
        members.append(_member(f"k{number}.json", record.model_dump_json().encode()))
        members.append(_member(f"k{number}.masks.json", source.read_member(number, "masks.json")))
        if not (as_media and number == 1):
            members.append(_member(f"k{number}.mp4", sample.media()))
        if number == 1:
            members.append(_member(f"k{number}.{suffix}", bomb))
    folder = tmp_path / "s"
    folder.mkdir()
    _tar(folder / "a.tar", *members)
    assert _swim("index", folder).exit_code == 0
    shards = ShardSet(folder)
    assert [shards.read(i).media()[:8] == source.read(i).media()[:8] for i in range(3)] == [True, not as_media, True]
    found = [finding.kind for finding in examine(shards, 1, Options(deep=True)).findings]
    assert found == ["video" if as_media else "member"]
    assert _swim("validate", folder, "--deep").exit_code == int(as_media)
    assert _swim("stats", folder).exit_code == 0
    config = tiny_config(folder, "data.packs_per_step=1", f"run.output={tmp_path / 'runs'}")
    system = build_system(config)
    order = Order(config, system)
    with Loader(order, system.collator) as loader:
        batches = [batch for step in loader.steps(0, order.plan(0).num_steps) for batch in step]
    assert len({hole.id for batch in batches for hole in batch.holes}) == (3 if as_media else 0)
    assert not made.exists()


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_million_tiny_members_take_bounded_time_and_memory(tmp_path: Path) -> None:
    header = bytearray(_member("k.0000000")[0].tobuf(tarfile.USTAR_FORMAT))
    blocks = []
    for number in range(1_000_000):
        header[2:9] = b"%07d" % number
        header[148:156] = b"        "
        header[148:156] = b"%06o\0 " % sum(header)
        blocks.append(bytes(header))
    with (tmp_path / "a.tar").open("wb") as file:
        file.writelines(blocks)
        info, data = JSON
        file.write(info.tobuf() + data.ljust(-(-len(data) // 512) * 512, b"\0") + bytes(1024))
    del blocks
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused = _swim("index", tmp_path)
    assert refused.exit_code == 2
    assert "media: member 'mp4' is not in the tar" in refused.stderr
    assert len(refused.stderr) < 1000, "a message, not a million names"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 2 << 20, "KiB"


def test_the_writer_has_no_way_to_write_what_it_refuses(tmp_path: Path) -> None:
    record = Record.model_validate_json(_record())
    with ShardWriter(tmp_path) as writer:
        for key in ("/k", "../k", "pipe:k", "a.b", ""):
            with pytest.raises(ValueError, match="is not 1 to 80"):
                writer.write(key, record, {}, {})
    shutil.rmtree(tmp_path)
