"""Re-encoded video shows the source's frames upright, at a constant rate, and says which is which."""

import io
from collections.abc import Callable

import av
import numpy as np
import pytest
from footage import footage_dir

from swim.data_tools.reencode import even_sides, reencode
from swim.data_tools.synth import read_barcode, synthesise
from swim.data_tools.video import UnsteadyVideo, VideoError, VideoInfo, decode_frames, encode_video, probe, verify

NUM_FRAMES, FPS = 40, 8


@pytest.fixture(scope="module")
def numbered(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A clip whose frames carry their number."""
    shards = synthesise(tmp_path_factory.mktemp("numbered"), clips=1, seed=1, size=56, frames=NUM_FRAMES, fps=FPS)
    return shards.read(0).media()


def _remux(
    data: bytes,
    *,
    container: str = "mp4",
    rotation: int = 0,
    time: Callable[[int], float] = lambda number: number / FPS,
) -> bytes:
    """The packets copied, frame `number` shown at `time(number)` s."""
    out = io.BytesIO()
    with av.open(io.BytesIO(data)) as reader, av.open(out, "w", format=container) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        if rotation:
            copy.set_display_rotation(rotation)
        for packet in reader.demux(stream):
            if packet.dts is not None and packet.pts is not None and packet.time_base is not None:
                # Decode times only have to come early enough and in order.
                pts, dts = (time(round(at * packet.time_base * FPS)) for at in (packet.pts, packet.dts))
                packet.stream = copy
                packet.pts, packet.dts = round(pts / packet.time_base), round(dts / packet.time_base)
                writer.mux(packet)
    return out.getvalue()


def _numbers(data: bytes) -> list[int]:
    return [read_barcode(frame) for frame in decode_frames(data, range(probe(data).num_frames))]


def test_a_steady_video_keeps_frames_rate_and_colours(numbered: bytes) -> None:
    data, info, frame_map = reencode(numbered)
    assert info == verify(data) == VideoInfo(56, 56, NUM_FRAMES, FPS)
    assert frame_map == _numbers(data) == list(range(NUM_FRAMES))
    assert reencode(numbered)[0] == data, "the same bytes again"
    assert data.find(b"moov") < data.find(b"mdat")
    before, after = (decode_frames(video, range(NUM_FRAMES)).astype(float) for video in (numbered, data))
    assert np.abs(before - after).mean() < 4


@pytest.mark.parametrize(("rotation", "quarters"), [(90, 1), (-90, -1), (180, 2)])
def test_rotation_is_baked_in(numbered: bytes, rotation: int, quarters: int) -> None:
    wide = encode_video(decode_frames(numbered, range(8))[:, :, :40], FPS)
    turned = _remux(wide, rotation=rotation)
    with av.open(io.BytesIO(turned)) as container:
        (found,) = {frame.rotation for frame in container.decode(video=0)}
    assert abs(found) == abs(rotation)
    with pytest.raises(UnsteadyVideo, match="metadata rotate the picture"):
        probe(turned)
    data, info, _ = reencode(turned)
    assert (info.height, info.width) == ((40, 56) if quarters % 2 else (56, 40))
    assert verify(data) == info
    # FFmpeg's angle is counter-clockwise, as is rot90's.
    expected = np.rot90(decode_frames(wide, [3])[0], quarters * (1 if found == rotation else -1))
    assert np.abs(decode_frames(data, [3])[0].astype(float) - expected).mean() < 6


def test_an_uneven_rate_becomes_constant_and_the_map_says_how(numbered: bytes) -> None:
    # The first half runs at 8 per second, the second at 2: 20 frames stand for 2.5 s, 20 for 10 s.
    uneven = _remux(
        numbered, container="matroska", time=lambda number: number / 8 if number < 20 else 2.5 + (number - 20) / 2
    )
    with pytest.raises(
        UnsteadyVideo, match=r"a frame is \d+\.\d+ frame times from its place at a constant .*the limit is 0.5"
    ):
        probe(uneven)
    data, info, frame_map = reencode(uneven)
    found = verify(data)
    assert info.num_frames == found.num_frames == NUM_FRAMES
    assert found.num_frames / found.fps == pytest.approx(12.3, abs=0.3), "it lasts as long as before"
    assert frame_map == _numbers(data)
    assert frame_map[0] == 0
    assert frame_map[-1] == 39
    assert set(frame_map) > set(range(21, 40)), "slow frames are repeated"
    assert len(set(frame_map) & set(range(20))) < 12, "of fast ones some are left out"


def test_small_jitter_is_steady(numbered: bytes) -> None:
    jittered = _remux(numbered, container="matroska", time=lambda number: (number + (number % 3) * 0.1) / FPS)
    assert probe(jittered).num_frames == NUM_FRAMES
    assert reencode(jittered)[2] == list(range(NUM_FRAMES))


def test_frames_that_an_edit_list_hides_do_not_count(numbered: bytes) -> None:
    cut = _remux(numbered, time=lambda number: (number - 10) / FPS)
    with pytest.raises(UnsteadyVideo, match="an edit list hides 10 of 40"):
        probe(cut)
    data, info, frame_map = reencode(cut)
    assert info.num_frames == 30
    assert frame_map == list(range(30))
    assert _numbers(data) == list(range(10, 40)), "frame 0 is the first that a player shows"


def test_damage_is_refused(numbered: bytes) -> None:
    with pytest.raises(VideoError, match=r"announces 40 frames but holds \d+"):
        reencode(numbered[: len(numbered) // 2])
    with pytest.raises(VideoError, match="cannot be read as video"):
        reencode(b"<html>")
    damaged = bytearray(numbered)
    start = damaged.find(b"mdat") + 4 + len(damaged) // 3
    damaged[start : start + 3000] = bytes(3000)
    assert probe(bytes(damaged)).num_frames == NUM_FRAMES, "its first frame is fine"
    for read in (verify, reencode):
        with pytest.raises(VideoError, match=r"cannot be read as video|is damaged|can be decoded"):
            read(bytes(damaged))


def test_sides_become_even_and_are_never_enlarged() -> None:
    assert even_sides(720, 1280, 448) == (448, 796)
    assert even_sides(1280, 720, 448) == (1280 * 448 // 720 // 2 * 2, 448)
    assert even_sides(101, 53, None) == (100, 52)
    assert even_sides(100, 60, 448) == (100, 60)
    assert even_sides(2, 3000, 448) == (2, 3000)


def test_real_footage_shrinks_to_the_side() -> None:
    path = footage_dir() / "nasa_13013.mp4"
    data, info, frame_map = reencode(path, 112)
    assert (info.height, info.width, frame_map) == (270, 480, list(range(390)))
    found = verify(data)
    assert (found.height, found.width) == (112, 200)
    with av.open(io.BytesIO(data)) as container:
        (stream,) = container.streams
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    before, after = decode_frames(path, [200])[0], decode_frames(data, [200])[0]
    np.testing.assert_allclose(before.mean((0, 1)), after.mean((0, 1)), atol=1.5, err_msg="colours stay")
