"""The right frames come back, and videos on which decoders could disagree are refused with a remedy."""

from pathlib import Path

import av
import numpy as np
import pytest
from footage import footage_dir

from swim.data_tools.shards import ShardSet
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import VideoError, VideoInfo, choose_frames, decode_frames, encode_video, probe

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
