"""Video in and out through PyAV: probe, decode chosen frames, encode, choose frames."""

import io
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.container import InputContainer
from av.video.stream import VideoStream

REENCODE = "re-encode it, e.g. ffmpeg -i IN -map 0:v:0 -c:v libx264 -pix_fmt yuv420p -an OUT.mp4"


class VideoError(ValueError):
    """A video cannot be used; the message says what was found and how to repair it."""


@dataclass(frozen=True)
class VideoInfo:
    """Size in pixels, number of decodable frames, average frame rate in 1/s."""

    height: int
    width: int
    num_frames: int
    fps: float


def probe(source: bytes | Path) -> VideoInfo:
    """Facts of the largest video stream; VideoError if frame numbers of different decoders could disagree on it."""
    with _open(source) as (container, stream):
        rate = stream.average_rate or stream.guessed_rate
        # Containers may say nothing about the number of frames, or too much: packets are counted instead.
        # An edit list marks the packets it hides; decoders differ in whether they number them.
        num_frames, hidden = 0, 0
        for packet in container.demux(stream):
            if packet.size:
                hidden += packet.is_discard
                num_frames += 1
        if hidden:
            raise VideoError(f"an edit list hides {hidden} of {num_frames} frames; {REENCODE}")
        if stream.frames and stream.frames != num_frames:
            problem = f"the container announces {stream.frames} frames but holds {num_frames}"
            raise VideoError(f"{problem} (cut off, or frames hidden by an edit list); fetch it again or {REENCODE}")
        if not num_frames or not rate:
            raise VideoError(f"found {num_frames} frames at rate {rate}, need at least 1 and a rate; {REENCODE}")
    with _open(source) as (container, stream):
        frame = next(container.decode(stream), None)
        if frame is None:
            raise VideoError(f"no frame can be decoded; {REENCODE}")
        if frame.rotation:
            raise VideoError(f"metadata rotate the picture by {frame.rotation} degrees; bake it in: {REENCODE}")
        return VideoInfo(frame.height, frame.width, num_frames, float(rate))


def decode_frames(source: bytes | Path, indices: Sequence[int]) -> np.ndarray:
    """RGB uint8 [N, H, W, 3] of the frames `indices`, in that order; VideoError for damage or a missing frame."""
    places: dict[int, list[int]] = {}
    for place, index in enumerate(indices):
        places.setdefault(int(index), []).append(place)
    if not places or min(places) < 0:
        raise VideoError(f"frame indices {list(indices)} must be a non-empty list of numbers >= 0")
    last, number, frames_NHWC = max(places), -1, None
    with _open(source) as (container, stream):
        for number, frame in enumerate(container.decode(stream)):
            if number in places:
                if frame.is_corrupt:
                    raise VideoError(f"frame {number} is damaged; fetch the file again or {REENCODE}")
                rgb_HWC = frame.reformat(format="rgb24", threads=1).to_ndarray()
                if frames_NHWC is None:
                    frames_NHWC = np.empty((len(indices), *rgb_HWC.shape), np.uint8)
                if rgb_HWC.shape != frames_NHWC.shape[1:]:
                    sizes = f"{frames_NHWC.shape[1:3]} to {rgb_HWC.shape[:2]}"
                    raise VideoError(f"the size changes from {sizes} at frame {number}; {REENCODE}")
                frames_NHWC[places[number]] = rgb_HWC
            if number == last:
                break
        if number < last or frames_NHWC is None:
            problem = f"frame {last} was asked for, but only {number + 1} frames can be decoded"
            raise VideoError(f"{problem}; fetch the file again or correct num_frames")
    return frames_NHWC


def encode_video(frames: np.ndarray, fps: float, *, crf: int = 18) -> bytes:
    """MP4 bytes (H.264, 4:2:0, same bytes for same input) of RGB uint8 frames [N, H, W, 3] with even H and W."""
    num_frames, height, width, _ = frames.shape
    if not num_frames or height % 2 or width % 2:
        raise VideoError(f"{num_frames} frames of {height}x{width}: 4:2:0 video needs at least 1 and even sides; crop")
    with tempfile.TemporaryDirectory() as folder:  # to put the header first, FFmpeg opens its output a second time
        path = Path(folder, "video.mp4")
        _encode(path, frames, fps, crf)
        return path.read_bytes()


def _encode(path: Path, frames: np.ndarray, fps: float, crf: int) -> None:
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width, stream.pix_fmt = *frames.shape[1:3], "yuv420p"
        # Unless told otherwise, x264's bytes depend on the number of threads, on the processor and, in rare clips, on
        # how its buffers happen to be aligned.
        stream.options = {"crf": str(crf), "tune": "fastdecode", "threads": "1", "x264-params": "cpu-independent=1"}
        for frame in frames:
            rgb = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(rgb.reformat(format="yuv420p", threads=1)))
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
def _open(source: bytes | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Container and its largest video stream; whatever FFmpeg raises inside becomes a VideoError."""
    name = f"{len(source)} bytes" if isinstance(source, bytes) else str(source)
    try:
        # A file object instead of a name, and no protocols: a playlist in disguise must not open other files.
        with (
            closing(io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")) as file,
            av.open(file, "r", options={"protocol_whitelist": "none"}) as container,
        ):
            stream = max(container.streams.video, key=lambda stream: stream.width * stream.height, default=None)
            if stream is None:
                raise VideoError("no video stream in it; give a video file")
            stream.codec_context.thread_count = 1  # loader workers are the parallelism
            yield container, stream
    except VideoError as error:
        raise VideoError(f"video {name}: {error}") from None
    except (av.FFmpegError, OSError) as error:
        problem = f"cannot be read as video ({error})"
        raise VideoError(f"video {name}: {problem}; fetch it again or {REENCODE}") from error
