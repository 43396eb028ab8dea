"""Video in and out: probe, verify, decode chosen frames, encode, choose frames; through PyAV, decoding also through
others."""

import importlib
import io
import itertools
import tempfile
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Literal

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

Decoder = Literal["pyav", "torchcodec", "decord"]
PINS = {"torchcodec": "torchcodec==0.13.0", "decord": "decord==0.6.0"}
MAX_FRAME_PIXELS = 8192 * 4320  # 8K; a frame has 100 MiB as RGB
REENCODE = "re-encode it, e.g. ffmpeg -i IN -map 0:v:0 -c:v libx264 -pix_fmt yuv420p -an OUT.mp4"

SHRINK = "make it smaller, e.g. ffmpeg -i IN -vf scale=1920:-2 OUT.mp4"


class VideoError(ValueError):
    """A video cannot be used; the message says what was found and how to repair it."""


class UnsteadyVideo(VideoError):  # noqa: N818 - a healthy video, and nothing that must end a program
    """Decoders could disagree on the frame numbers of this video; re-encoding removes the cause."""


class DecoderMissing(ValueError):  # noqa: N818 - no VideoError: it is not the video that is at fault
    """A decoder was asked for that cannot be used here; the message says how to install it."""


@dataclass(frozen=True)
class VideoInfo:
    """Size in pixels, number of decodable frames, average frame rate in 1/s."""

    height: int
    width: int
    num_frames: int
    fps: float


def probe(source: bytes | Path) -> VideoInfo:
    """Facts of the largest video stream, from its packets and its first frame.

    UnsteadyVideo if frame numbers of different decoders could disagree on it (edit list, rotation, uneven rate),
    VideoError for what is damaged or no video.
    """
    with open_video(source) as (container, stream):
        rate, times, hidden = frame_times(container, stream)
        if hidden:
            raise UnsteadyVideo(f"an edit list hides {hidden} of {len(times) + hidden} frames; {REENCODE}")
        if None in times:
            raise UnsteadyVideo(f"{times.count(None)} of {len(times)} frames have no time; {REENCODE}")
        shift = largest_shift(np.array(times, float), rate)
        if shift >= 0.5:  # frames; from there on, rounding a time to a frame number goes wrong
            problem = f"a frame is {shift:.2f} frame times from its place at a constant {float(rate):.6g}/s"
            raise UnsteadyVideo(f"{problem}, the limit is 0.5; {REENCODE}")
    with open_video(source) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(f"no frame can be decoded; {REENCODE}")
        if frame.rotation:
            raise UnsteadyVideo(f"metadata rotate the picture by {frame.rotation} degrees; bake it in: {REENCODE}")
        if (frame.height, frame.width) != (stream.height, stream.width):
            sizes = f"{_shown((stream.height, stream.width))}, its frames have {_shown((frame.height, frame.width))}"
            raise UnsteadyVideo(f"the container says {sizes} pixels; {REENCODE}")
        return VideoInfo(frame.height, frame.width, len(times), float(rate))


def verify(source: bytes | Path) -> VideoInfo:
    """What `probe` finds, after decoding every frame; VideoError also for frames that are damaged or missing."""
    info = probe(source)
    with open_video(source) as (container, stream):
        check_decoded(sum(1 for _ in sound_frames(container, stream)), info.num_frames)
    return info


def frame_times(container: InputContainer, stream: VideoStream) -> tuple[Fraction, list[float | None], int]:
    """Average rate in 1/s, sorted times in s of the frames a player shows, number of those that an edit list hides.

    A time is None where the container has none. VideoError for a cut-off file or one without frames.
    """
    rate = stream.average_rate or stream.guessed_rate
    # Containers may say nothing about the number of frames, or too much: packets are counted instead.
    # An edit list marks the packets it hides; decoders differ in whether they number them.
    packets = [(packet.pts, packet.is_discard) for packet in container.demux(stream) if packet.size]
    hidden = sum(discard for _, discard in packets)
    if stream.frames and stream.frames != len(packets) and not hidden:
        problem = f"the container announces {stream.frames} frames but holds {len(packets)}"
        raise VideoError(f"{problem} (cut off, or frames hidden by an edit list); fetch it again or {REENCODE}")
    if len(packets) == hidden or not rate:
        raise VideoError(f"found {len(packets) - hidden} frames at rate {rate}, need at least 1 and a rate; {REENCODE}")
    shown = [pts for pts, discard in packets if not discard]
    known = sorted(pts for pts in shown if pts is not None)
    if len(known) < len(shown) or stream.time_base is None:
        return rate, [None] * len(shown), hidden
    return rate, [float(pts * stream.time_base) for pts in known], hidden


def largest_shift(times: np.ndarray, rate: Fraction) -> float:
    """How far, in frame times, sorted times in s [N] are from places at a constant rate in 1/s."""
    return float(np.abs((times - times[0]) * float(rate) - np.arange(len(times))).max())


def sound_frames(container: InputContainer, stream: VideoStream) -> Iterator[av.VideoFrame]:
    """All frames; VideoError at a damaged one and where the size changes."""
    size = None
    for number, frame in enumerate(container.decode(stream)):
        if frame.is_corrupt:
            raise VideoError(f"frame {number} is damaged; fetch the file again or {REENCODE}")
        size = size or (frame.height, frame.width)
        if size != (frame.height, frame.width):
            raise VideoError(f"the size changes from {size} to {(frame.height, frame.width)} at frame {number}; cut it")
        yield frame


def check_decoded(found: int, stored: int) -> None:
    """VideoError unless as many frames were decoded as are stored."""
    if found != stored:
        raise VideoError(f"{stored} frames are stored but {found} can be decoded; fetch the file again or {REENCODE}")


def decode_frames(
    source: bytes | Path, indices: Sequence[int], *, size: tuple[int, int] | None = None, decoder: Decoder = "pyav"
) -> np.ndarray:
    """RGB uint8 [N, H, W, 3] of the frames `indices`, in that order; VideoError for damage or a missing frame, and
    before anything large is allocated if frames are not of `size` (H, W).

    All decoders give the same pixels of what `verify` accepts. `decord` may crash on anything else: it takes bytes
    only, and they should be checked ones, such as a shard's.
    """
    wanted, places = np.unique(np.asarray(indices, np.int64), return_inverse=True)
    if not len(wanted) or wanted[0] < 0:
        raise VideoError(f"frame indices {list(indices)} must be a non-empty list of numbers >= 0")
    frames = DECODERS[decoder](source, wanted.tolist(), size)
    return frames if np.array_equal(places, np.arange(len(frames))) else frames[places]


def _decode_pyav(source: bytes | Path, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    for read in (_frames_by_time, _frames_in_order):
        with open_video(source) as (container, stream):
            _check_size((stream.height, stream.width), size)
            frames_NHWC = np.empty((len(wanted), stream.height, stream.width, 3), np.uint8)
            numbers = iter(wanted)
            for place, frame in enumerate(read(container, stream, wanted)):
                number = next(numbers)
                if frame.is_corrupt:
                    raise VideoError(f"frame {number} is damaged; fetch the file again or {REENCODE}")
                if (frame.height, frame.width) != frames_NHWC.shape[1:3]:
                    sizes = f"{_shown(frames_NHWC.shape[1:3])} to {_shown((frame.height, frame.width))}"
                    raise VideoError(f"the size changes from {sizes} at frame {number}; {REENCODE}")
                frames_NHWC[place] = frame.reformat(format="rgb24", threads=1).to_ndarray()
            if next(numbers, None) is None:
                return frames_NHWC
    raise AssertionError("reading in order gives every frame or an error")


def _frames_by_time(container: InputContainer, stream: VideoStream, wanted: list[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames, in rising order, known by their times; it jumps to a key frame where one lies ahead.

    Ends early where times do not tell: frames without any, twice the same, hidden by an edit list, or not found.
    """
    packets = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.size and not p.is_discard]
    times = sorted(pts for pts, _ in packets if pts is not None)
    number_of: dict[int | None, int] = {time: number for number, time in enumerate(times)}
    keys = sorted(number_of[pts] for pts, key in packets if key and pts is not None)
    whole = len(number_of) == len(packets) == (stream.frames or len(packets))
    if not whole or not keys or keys[0] > 0 or wanted[-1] >= len(packets):
        return
    frames: Iterator[av.VideoFrame] = iter(())
    number = -2
    for index in wanted:
        key = keys[bisect_right(keys, index) - 1]
        if key > number + 1:
            container.seek(times[key], stream=stream)
            frames = container.decode(stream)
        for frame in frames:
            if (number := number_of.get(frame.pts, len(packets))) >= index:
                break
        if number != index:
            return
        yield frame


def _frames_in_order(container: InputContainer, stream: VideoStream, wanted: list[int]) -> Iterator[av.VideoFrame]:
    """The wanted frames, in rising order, counted from the first; VideoError if there are too few."""
    number, places = -1, set(wanted)
    for number, frame in enumerate(container.decode(stream)):
        if number in places:
            yield frame
        if number == wanted[-1]:
            return
    problem = f"frame {wanted[-1]} was asked for, but only {number + 1} frames can be decoded"
    raise VideoError(f"{problem}; fetch the file again or correct num_frames")


def _decode_torchcodec(source: bytes | Path, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    decoders = _optional("torchcodec.decoders")
    try:
        # Exact numbers need a scan of the packets, below a millisecond for a short clip.
        decoder = decoders.VideoDecoder(source, dimension_order="NHWC", seek_mode="exact")
        _check_size((decoder.metadata.height, decoder.metadata.width), size)
        return decoder.get_frames_at(wanted).data.numpy()
    except (RuntimeError, ValueError, IndexError) as error:
        if isinstance(error, VideoError):
            raise
        problem = f"torchcodec cannot decode frames {wanted}: {_first_line(error)}"
        raise VideoError(f"{problem}; fetch the file again or {REENCODE}") from error


def _decode_decord(source: bytes | Path, wanted: list[int], size: tuple[int, int] | None) -> np.ndarray:
    decord = _optional("decord")
    if not isinstance(source, bytes):
        problem = "decord crashes on damaged files, so it takes checked bytes only"
        raise VideoError(f"{source}: {problem}; put the video into a shard or set data.decoder=pyav")
    with open_video(source) as (_, stream):  # decord itself knows no size before it decodes
        size = size or (stream.height, stream.width)
        _check_size((stream.height, stream.width), size)
    try:
        frames = decord.VideoReader(io.BytesIO(source), ctx=decord.cpu(0), num_threads=1).get_batch(wanted).asnumpy()
    except (decord.DECORDError, IndexError) as error:
        problem = f"decord cannot decode frames {wanted}: {_first_line(error)}"
        raise VideoError(f"{problem}; set data.decoder=pyav, fetch the file again or {REENCODE}") from error
    _check_size(frames.shape[1:3], size)  # it has a rule of its own for the stream
    return frames


DECODERS: dict[Decoder, Callable[[bytes | Path, list[int], tuple[int, int] | None], np.ndarray]] = {
    "pyav": _decode_pyav,
    "torchcodec": _decode_torchcodec,
    "decord": _decode_decord,
}


def check_decoder(decoder: Decoder) -> None:
    """DecoderMissing, with the command that installs it, if a decoder cannot be used here."""
    if decoder != "pyav":
        _optional("torchcodec.decoders" if decoder == "torchcodec" else decoder)


def _optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except (ImportError, RuntimeError, OSError) as error:  # torchcodec: RuntimeError where it finds no FFmpeg
        package = name.partition(".")[0]
        raise DecoderMissing(
            f"data.decoder={package} cannot be used: {_first_line(error)}. Install it with: "
            f"pip install '{PINS[package]}'{' and the FFmpeg libraries of the system' * (package == 'torchcodec')}; or "
            "set data.decoder=pyav"
        ) from error


def _check_size(found: Sequence[int], size: tuple[int, int] | None) -> None:
    """VideoError unless frames are of `size`, if it is known, and not too large."""
    if size is not None and tuple(found) != tuple(size):
        raise VideoError(f"frames of {_shown(found)} pixels, its record says {_shown(size)}; correct the record")
    if found[0] * found[1] > MAX_FRAME_PIXELS:
        raise VideoError(f"frames of {_shown(found)} pixels, the limit is {MAX_FRAME_PIXELS} in all; {SHRINK}")


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _shown(size: Sequence[int]) -> str:
    return f"{size[1]}x{size[0]}"


def encode_video(frames: np.ndarray, fps: float, *, crf: int = 18) -> bytes:
    """MP4 bytes (H.264, 4:2:0, same bytes for same input) of RGB uint8 frames [N, H, W, 3] with even H and W."""
    num_frames, height, width, _ = frames.shape
    if not num_frames or height % 2 or width % 2:
        raise VideoError(f"{num_frames} frames of {height}x{width}: 4:2:0 video needs at least 1 and even sides; crop")
    with tempfile.TemporaryDirectory() as folder:  # to put the header first, FFmpeg opens its output a second time
        path = Path(folder, "video.mp4")
        rgb = (av.VideoFrame.from_ndarray(frame, format="rgb24") for frame in frames)
        yuv = (frame.reformat(format="yuv420p", threads=1) for frame in rgb)
        encode_frames(path, yuv, Fraction(fps).limit_denominator(1001), crf=crf)
        return path.read_bytes()


def encode_frames(path: Path, frames: Iterator[av.VideoFrame], rate: Fraction, *, crf: int) -> None:
    """Write an MP4 of one or more 4:2:0 frames at `rate` per second, of the size and the colours of the first."""
    first = next(frames)
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.height, stream.width, stream.pix_fmt = first.height, first.width, "yuv420p"
        for name in ("colorspace", "color_range", "color_primaries", "color_trc"):
            setattr(stream.codec_context, name, getattr(first, name))
        # Unless told otherwise, x264's bytes depend on the number of threads, on the processor and, in rare clips, on
        # how its buffers happen to be aligned.
        stream.options = {"crf": str(crf), "tune": "fastdecode", "threads": "1", "x264-params": "cpu-independent=1"}
        for number, frame in enumerate(itertools.chain([first], frames)):
            frame.pts, frame.time_base = number, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def choose_frames(num_frames: int, count: int, annotated: Sequence[int] | None = None) -> list[int]:
    """`count` sorted frame indices: the middle of each of `count` equal segments of the clip.

    A middle moves to the nearest annotated frame of its own segment where there is one. A clip shorter than `count`
    gives each of its frames once and then repeats the last one.
    """
    if num_frames < 1 or count < 1:
        raise ValueError(f"cannot choose {count} of {num_frames} frames; both must be at least 1")
    if num_frames <= count:
        return [min(i, num_frames - 1) for i in range(count)]
    chosen = [(2 * k + 1) * num_frames // (2 * count) for k in range(count)]
    middles = list(chosen)
    best = [num_frames] * count
    for frame in sorted(annotated or ()):
        if 0 <= frame < num_frames:
            segment = (2 * frame + 1) * count // (2 * num_frames)  # that its middle lies in
            distance = abs(frame - middles[segment])
            if distance < best[segment]:
                best[segment], chosen[segment] = distance, frame
    return chosen


@contextmanager
def open_video(source: bytes | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Container and its largest video stream; whatever FFmpeg raises inside becomes a VideoError."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    # FFmpeg's own limit: larger frames get no memory, neither when it looks what is in a file nor where sizes change.
    limit = {"max_pixels": str(MAX_FRAME_PIXELS)}
    try:
        # A file object instead of a name, and no protocols: a playlist in disguise must not open other files.
        with (
            closing(io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")) as file,
            av.open(file, "r", options={"protocol_whitelist": "none", **limit}) as container,
        ):
            stream = max(container.streams.video, key=lambda stream: stream.width * stream.height, default=None)
            if stream is None:
                raise VideoError("no video stream in it; give a video file")
            if not stream.width * stream.height:
                raise VideoError(f"frames of no size, or of more than {MAX_FRAME_PIXELS} pixels; {SHRINK}")
            _check_size((stream.height, stream.width), None)
            stream.codec_context.options = limit
            stream.codec_context.thread_count = 1  # loader workers are the parallelism
            yield container, stream
    except VideoError as error:
        raise type(error)(f"video {name}: {error}") from None
    except (av.FFmpegError, OSError) as error:
        problem = f"cannot be read as video ({error})"
        raise VideoError(f"video {name}: {problem}; fetch it again or {REENCODE}") from error
