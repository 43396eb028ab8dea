"""The right frames come back, and videos on which decoders could disagree are refused with a remedy."""

import io
import struct
import subprocess
import sys
import zlib
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import av
import numpy as np
import pytest
from footage import footage_dir
from processes import environment

from swim.data_tools import video
from swim.data_tools.reencode import reencode
from swim.data_tools.shards import ShardSet
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import (
    Decoder,
    DecoderMissing,
    VideoError,
    VideoInfo,
    choose_frames,
    decode_frames,
    encode_video,
    open_video,
    probe,
    verify,
)

RNG = np.random.default_rng(0)
FRAMES = np.clip(np.cumsum(RNG.integers(-4, 5, (40, 64, 48, 3)), axis=0) + 128, 0, 255).astype(np.uint8)
VIDEO = encode_video(FRAMES, 8)


def _remux(path: Path, *, container: str = "mp4", first: int = 0, rotation: int = 0) -> Path:
    """VIDEO copied packet by packet, starting `first` frames before zero, with a rotation noted."""
    source = path.with_name("source.mp4")
    source.write_bytes(VIDEO)
    with av.open(str(source)) as reader, av.open(str(path), "w", format=container) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        if rotation:
            copy.set_display_rotation(rotation)
        shift = int(first / 8 / stream.time_base)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.stream, packet.pts, packet.dts = copy, packet.pts - shift, packet.dts - shift
                writer.mux(packet)
    return path


@pytest.mark.parametrize("indices", [[0], [39], [3, 3, 3], [39, 0, 17, 2, 17], list(range(40))])
def test_frames_come_in_the_order_asked_for(tmp_path: Path, indices: list[int]) -> None:
    shards = synthesise(tmp_path, clips=1, seed=1, size=56, frames=40)
    frames = decode_frames(shards.read(0).media(), indices)
    assert frames.dtype == np.uint8
    assert frames.shape == (len(indices), 56, 56, 3)
    assert [read_barcode(frame) for frame in frames] == indices


NUMBERED = 90  # frames
FORMS: dict[str, tuple[str, str, dict[str, str], int]] = {  # container, codec, options, first time in frames
    "one gop": ("mp4", "libx264", {"g": "250"}, 0),
    "short gops": ("mp4", "libx264", {"g": "8", "bf": "0"}, 0),
    "short gops with b-frames": ("mp4", "libx264", {"g": "9", "bf": "3", "x264-params": "b-pyramid=normal"}, 0),
    "gops of two": ("mp4", "libx264", {"g": "2", "bf": "1"}, 0),
    "open gops": ("mp4", "libx264", {"g": "12", "bf": "3", "x264-params": "open-gop=1:scenecut=0"}, 0),
    "intra refresh": ("mp4", "libx264", {"g": "15", "x264-params": "intra-refresh=1"}, 0),
    "all intra": ("mp4", "libx264", {"g": "1"}, 0),
    "late start": ("mp4", "libx264", {"g": "10", "bf": "2"}, 17),
    "fragments": ("mp4", "libx264", {"g": "10", "movflags": "frag_keyframe+empty_moov"}, 3),
    "matroska": ("matroska", "libx264", {"g": "10", "bf": "3"}, 5),
    "transport stream": ("mpegts", "libx264", {"g": "10", "bf": "3"}, 7),
    "hevc open gops": ("mp4", "libx265", {"g": "12", "x265-params": "open-gop=1:log-level=none"}, 0),
    "vp9": ("webm", "libvpx-vp9", {"g": "10", "cpu-used": "8"}, 4),
    "mpeg4 in avi": ("avi", "mpeg4", {"g": "10", "bf": "2"}, 0),
}


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> np.ndarray:
    shards = synthesise(tmp_path_factory.mktemp("numbered"), clips=1, seed=1, size=112, frames=NUMBERED)
    return decode_frames(shards.read(0).media(), range(NUMBERED))


def _encode(frames: np.ndarray, container: str, codec: str, options: dict[str, str], first: int) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as writer:
        stream = writer.add_stream(codec, rate=8)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        writer.options.update({name: options[name] for name in options if name == "movflags"})
        stream.options = {"threads": "1", **options}
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = first + number, Fraction(1, 8)
            writer.mux(stream.encode(frame))
        writer.mux(stream.encode())
    return file.getvalue()


@pytest.mark.parametrize("form", FORMS)
def test_jumping_gives_the_frames_that_reading_on_gives(numbered: np.ndarray, form: str) -> None:
    data = _encode(numbered, *FORMS[form])
    with open_video(data) as (container, stream):
        in_order = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    assert [read_barcode(frame) for frame in in_order] == list(range(NUMBERED))
    for indices in ([0], [NUMBERED - 1], [7, 41, 42, 43, 88], range(NUMBERED), range(2, NUMBERED, 16)):
        np.testing.assert_array_equal(decode_frames(data, indices), np.stack([in_order[i] for i in indices]))


def test_jumps_spare_the_frames_between_them(numbered: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where they pay, nothing falls back to reading on: the in-order reader is out of order here."""
    monkeypatch.setattr(video, "_frames_in_order", None)
    for form in ("one gop", "short gops with b-frames", "gops of two", "all intra", "late start", "matroska", "vp9"):
        assert len(decode_frames(_encode(numbered, *FORMS[form]), [3, 44, 80])) == 3


@pytest.mark.parametrize("decoder", ["torchcodec", "decord"])
@pytest.mark.parametrize("name", ["synthetic", "nasa_13013.mp4", "coffee.mp4", "cups.mp4", "canonical"])
def test_decoders_give_the_same_pixels(numbered: np.ndarray, decoder: Decoder, name: str) -> None:
    pytest.importorskip(decoder)
    if name == "synthetic":
        data = encode_video(numbered, 8)
    else:
        path = footage_dir() / ("cups.mp4" if name == "canonical" else name)
        data = reencode(path, 224)[0] if name == "canonical" else path.read_bytes()
    info = verify(data)
    last = info.num_frames - 1
    for indices in ([last, 0, 5, 5, last // 2], range(1, last, last // 9)):
        size = (info.height, info.width)
        frames = decode_frames(data, indices, size=size, decoder=decoder)
        assert frames.dtype == np.uint8
        np.testing.assert_array_equal(frames, decode_frames(data, indices))


DECODERS = ["pyav", "torchcodec", "decord"]


@pytest.mark.parametrize("decoder", DECODERS)
def test_a_wrong_size_costs_nothing(numbered: np.ndarray, decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("av" if decoder == "pyav" else decoder)
    data = encode_video(numbered[:4], 8)
    with pytest.raises(VideoError, match=r"frames of 112x112 pixels, its record says 64x48; correct the record"):
        decode_frames(data, [0], size=(48, 64), decoder=decoder)
    with pytest.raises(VideoError, match=r"frame.*4"):
        decode_frames(data, [0, 4], decoder=decoder)
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 112 * 112 - 1)
    with pytest.raises(VideoError, match=r"frames of (112x112|no size).* 12543 .*make it smaller, e.g. ffmpeg"):
        decode_frames(data, [0], decoder=decoder)


MEASURE = """
import resource, sys
from swim.data_tools.video import Path, VideoError, decode_frames, probe
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for read in (probe, lambda path: decode_frames(path, [0])):
    try:
        read(Path(sys.argv[1]))
    except VideoError as error:
        print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_a_huge_frame_costs_an_error_and_no_memory(tmp_path: Path) -> None:
    """A PNG that promises 16 000 x 16 000 pixels."""
    header = struct.pack(">IIBBBBB", 16000, 16000, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(1 << 20))), (b"IEND", b"")]
    body = [struct.pack(">I", len(d)) + kind + d + struct.pack(">I", zlib.crc32(kind + d)) for kind, d in chunks]
    path = tmp_path / "a.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    done = subprocess.run([sys.executable, "-c", MEASURE, path], env=environment(), capture_output=True, text=True)
    *errors, grown = done.stdout.splitlines()
    assert len(errors) == 2, done.stderr
    assert all("more than 35389440 pixels; make it smaller, e.g. ffmpeg" in error for error in errors)
    assert int(grown) < 100 << 10, "KiB"


def test_frames_that_grow_inside_a_video_are_refused(numbered: np.ndarray, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = (
        _encode(numbered[:2, :side, :side], "mjpeg", "mjpeg", {"strict": "unofficial"}, 0) for side in (64, 112)
    )
    with pytest.raises(VideoError, match=r"the size changes from 64x64 to 112x112 at frame 2"):
        decode_frames(small + large, range(4))
    monkeypatch.setattr(video, "MAX_FRAME_PIXELS", 100 * 100)
    with pytest.raises(VideoError, match=r"cannot be read as video"):
        decode_frames(small + large, range(4))


def test_a_missing_decoder_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    constraints = Path(__file__).parents[2].joinpath("constraints.txt").read_text().splitlines()
    for name, module in (("torchcodec", "torchcodec.decoders"), ("decord", "decord")):
        monkeypatch.setitem(sys.modules, module, None)
        pin = next(line for line in constraints if line.startswith(f"{name}=="))
        with pytest.raises(DecoderMissing, match=f"decoder={name} cannot be used: .* pip install '{pin}'"):
            decode_frames(VIDEO, [0], decoder=name)  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "decord", ModuleType("decord"))
    with pytest.raises(VideoError, match=r"a.mp4: decord crashes on damaged files, so it takes checked bytes only"):
        decode_frames(Path("a.mp4"), [0], decoder="decord")


def test_encoding_is_close_and_deterministic() -> None:
    assert encode_video(FRAMES, 8) == VIDEO
    assert VIDEO.find(b"moov") < VIDEO.find(b"mdat"), "the header comes first, so streams can start early"
    assert probe(VIDEO) == VideoInfo(height=64, width=48, num_frames=40, fps=8)
    smooth = np.broadcast_to(np.linspace(0, 255, 64, dtype=np.uint8)[:, None, None], (3, 64, 64, 3))
    assert np.abs(decode_frames(encode_video(smooth, 8), [0, 1, 2]) - smooth.astype(int)).mean() < 2


def test_fractional_rates_and_higher_crf_are_kept() -> None:
    assert probe(encode_video(FRAMES, 30000 / 1001)).fps == pytest.approx(30000 / 1001)
    assert len(encode_video(FRAMES, 8, crf=40)) < len(VIDEO)


def test_frames_are_counted_where_the_container_does_not_say(tmp_path: Path) -> None:
    path = _remux(tmp_path / "a.mkv", container="matroska")
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    assert probe(path).num_frames == 40


def test_edit_lists_that_hide_frames_are_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"b.mp4: an edit list hides 10 of 40 frames; re-encode it, e.g. ffmpeg"):
        probe(_remux(tmp_path / "b.mp4", first=10))


def test_rotation_is_refused(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"r.mp4: metadata rotate the picture by -?90 degrees; bake it in: re-encode"):
        probe(_remux(tmp_path / "r.mp4", rotation=90))


@pytest.mark.parametrize(
    "data",
    [b"", b"<html>not found</html>", VIDEO[:500], b"ffconcat version 1.0\nfile '/etc/hostname'\n"],
    ids=["empty", "html", "header only", "playlist"],
)
def test_what_is_no_video_is_refused(data: bytes) -> None:
    for read in (probe, lambda data: decode_frames(data, [0])):
        with pytest.raises(VideoError, match=rf"video {len(data)} bytes: cannot be read as video .*fetch it again"):
            read(data)


def test_truncated_videos_are_refused() -> None:
    with pytest.raises(VideoError, match=r"announces 40 frames but holds \d+ \(cut off.*fetch it again"):
        probe(VIDEO[: len(VIDEO) // 2])
    with pytest.raises(VideoError, match="fetch"):
        decode_frames(VIDEO[: len(VIDEO) // 2], [39])


def test_missing_frames_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(VideoError, match=r"frame 40 was asked for, but only 40 frames can be decoded; .*num_frames"):
        decode_frames(VIDEO, [0, 40])
    with pytest.raises(VideoError, match=r"frame indices \[-1\] must be"):
        decode_frames(VIDEO, [-1])
    with pytest.raises(VideoError, match=r"none.mp4: cannot be read as video .*No such file"):
        probe(tmp_path / "none.mp4")
    with pytest.raises(VideoError, match=r"1 frames of 63x64: .*even sides; crop"):
        encode_video(np.zeros((1, 63, 64, 3), np.uint8), 8)


def test_the_largest_stream_of_real_footage_is_taken() -> None:
    path = footage_dir() / "nasa_13013.mp4"
    assert probe(path) == VideoInfo(height=270, width=480, num_frames=390, fps=pytest.approx(29.97, abs=0.01))
    assert decode_frames(path, [5]).shape == (1, 270, 480, 3)


def test_chosen_frames_are_segment_middles() -> None:
    assert choose_frames(100, 4) == [12, 37, 62, 87]
    assert choose_frames(8, 8) == list(range(8))
    assert choose_frames(3, 5) == [0, 1, 2, 2, 2], "a short clip repeats its last frame"
    assert choose_frames(100, 4, [0, 30, 33, 80, 99]) == [0, 33, 62, 80]
    assert choose_frames(100, 4, [50, 74, -1, 100]) == [12, 37, 50, 87], "ties go to the earlier, strangers are ignored"
    with pytest.raises(ValueError, match=r"cannot choose 0 of 5 frames; both must be at least 1"):
        choose_frames(5, 0)


def test_chosen_frames_stay_in_their_segments() -> None:
    for num_frames, count in [(9, 4), (17, 16), (301, 16), (5, 7), (1, 1), (64, 32)]:
        for annotated in (None, [], range(0, num_frames, 5), range(num_frames)):
            chosen = choose_frames(num_frames, count, annotated)
            assert len(chosen) == count
            assert chosen == sorted(chosen)
            if num_frames >= count:
                assert [(2 * frame + 1) * count // (2 * num_frames) for frame in chosen] == list(range(count))


def test_opening_many_videos_leaks_no_descriptors(synth_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(ShardSet(synth_folder).read(0).media())
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        decode_frames(path, [0])
    assert len(list(Path("/proc/self/fd").iterdir())) == before
