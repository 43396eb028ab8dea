"""Re-encoding to the form in which every decoder finds the same frames at the least cost."""

import itertools
import tempfile
from collections import Counter
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.filter import Graph
from av.filter.context import FilterContext

from swim.data_tools.video import (
    VideoError,
    VideoInfo,
    check_decoded,
    encode_frames,
    frame_times,
    largest_shift,
    open_video,
    sound_frames,
)

LIMITED_RANGE, FULL_RANGE, UNSPECIFIED = 1, 2, 2  # in FFmpeg's numbers
COLOURS = ("colorspace", "color_primaries", "color_trc")
# Counter-clockwise angle in the metadata -> filters that turn the stored picture by it.
TURNS: dict[int, list[tuple[str, str | None]]] = {
    0: [],
    90: [("transpose", "cclock")],
    -90: [("transpose", "clock")],
    180: [("hflip", None), ("vflip", None)],
}


def reencode(source: bytes | Path, side: int | None = None, *, crf: int = 18) -> tuple[bytes, VideoInfo, list[int]]:
    """The largest video stream as MP4: H.264, 8-bit 4:2:0, constant rate, rotation baked in, header first, no sound.

    The shorter side becomes `side` pixels unless it is smaller; both become even. Returns the bytes, facts of the
    source as a player shows it (turned, without frames that an edit list hides), and for each stored frame the number
    of the source's frame it shows: at an uneven rate, the one nearest to its time. VideoError for damage.
    """
    with open_video(source) as (container, stream):
        rate, times, _ = frame_times(container, stream)
        rate, frame_map = _even_frames(rate, times)
    copies = Counter(frame_map)
    with open_video(source) as (container, stream), tempfile.TemporaryDirectory() as folder:
        frames = sound_frames(container, stream)
        first = next(frames, None)
        if first is None or first.rotation not in (*TURNS, -180):
            found = "no frame can be decoded" if first is None else f"rotated by {first.rotation} degrees"
            raise VideoError(f"{found}; fetch the file again or turn it by a multiple of 90")
        height, width = (first.width, first.height) if first.rotation in (90, -90) else (first.height, first.width)
        graph = _chain(first, *even_sides(height, width, side))
        colours = {name: getattr(first, name) or UNSPECIFIED for name in COLOURS}  # 0 is RGB, which it will not be
        num_frames = 0

        def stored() -> Iterator[av.VideoFrame]:
            nonlocal num_frames
            for frame in itertools.chain([first], frames):
                frame.pts, frame.colorspace = num_frames, UNSPECIFIED  # or the filter would convert to its own default
                graph.vpush(frame)
                turned = graph.vpull()
                turned.color_range = LIMITED_RANGE
                for name, value in colours.items():
                    setattr(turned, name, value)
                for _ in range(copies[num_frames]):
                    yield turned
                num_frames += 1

        path = Path(folder, "video.mp4")
        encode_frames(path, stored(), rate, crf=crf)
        check_decoded(num_frames, len(times))
        return path.read_bytes(), VideoInfo(height, width, num_frames, float(rate)), frame_map


def even_sides(height: int, width: int, side: int | None) -> tuple[int, int]:
    """Even sizes in pixels of the same shape, the shorter one `side` or what it was if that is less."""
    scale = min(1.0, side / min(height, width)) if side else 1.0
    return max(2, round(height * scale / 2) * 2), max(2, round(width * scale / 2) * 2)


def _even_frames(rate: Fraction, times: list[float | None]) -> tuple[Fraction, list[int]]:
    """A constant rate, and for each frame at it the number of the source's frame with the nearest time."""
    numbers = list(range(len(times)))
    if None in times or len(times) == 1:
        return rate, numbers
    times_N = np.array(times, float)
    if largest_shift(times_N, rate) < 0.5:
        return rate, numbers
    duration = times_N[-1] - times_N[0]
    if duration <= 0:
        raise VideoError(f"all {len(times)} frames have the same time; fetch the file again")
    rate = Fraction((len(times) - 1) / duration).limit_denominator(1001)
    wanted_N = np.linspace(times_N[0], times_N[-1], len(times))
    return rate, np.searchsorted((times_N[1:] + times_N[:-1]) / 2, wanted_N).tolist()


def _chain(first: av.VideoFrame, height: int, width: int) -> Graph:
    """Filters from frames like the first to upright 4:2:0 frames of a size."""
    graph = Graph()
    nodes: list[FilterContext] = [
        graph.add_buffer(width=first.width, height=first.height, format=first.format, time_base=Fraction(1, 1))
    ]
    turns = TURNS[abs(first.rotation) if abs(first.rotation) == 180 else first.rotation]
    # bitexact: the same bytes on every processor. The range must be said, as the buffer forgets what frames note.
    in_range = "pc" if first.color_range == FULL_RANGE else "tv"
    scale = f"{width}:{height}:flags=area+accurate_rnd+bitexact:in_range={in_range}:out_range=tv"
    for name, arguments in (*turns, ("scale", scale), ("format", "yuv420p"), ("buffersink", None)):
        nodes.append(graph.add(name, arguments))
    graph.link_nodes(*nodes).configure()
    return graph
