"""SWIM's batches: decoded clips, encoded conversations, and the mask targets of their nouns."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from swim.data_tools.records import Masks, RecordError
from swim.data_tools.shards import BadSample, Sample
from swim.data_tools.video import VideoError, choose_frames, decode_frames
from swim.kernels.noun_attention import Scope
from swim.train.batch import Batch, Clip, Hole, pad_batch
from swim.train.config import DataConfig
from swim.train.encode import ConversationEncoder, Encoded, Noun
from swim.train.preprocess import Geometry, patchify
from swim.train.system import Request
from swim.train.systems.swim.targets import Targets, build_targets, step_coverage


@dataclass
class SwimBatch(Batch):
    """A batch with mask targets; `coverages` holds per noun the (h, w) coverage of each step, None where not
    annotated."""

    targets: Targets | None = None
    coverages: tuple[tuple[np.ndarray | None, ...], ...] = ()


class SwimCollator:
    """Requests in, one padded batch out; reading, decoding and mask work happen here, in the loader's worker."""

    def __init__(
        self, encoder: ConversationEncoder, geometry: Geometry, data: DataConfig, scope: Scope, pad_token: int
    ) -> None:
        self.encoder, self.geometry, self.data, self.scope, self.pad_token = encoder, geometry, data, scope, pad_token

    def __call__(self, requests: Sequence[Request], holes: Sequence[Hole] = ()) -> SwimBatch:
        """Padded batch of all conversations; a clip that cannot be read or encoded becomes one hole per
        conversation."""
        rows: list[tuple[str, Encoded, Clip | None]] = []
        masks: list[Masks] = []
        holes = list(holes)
        for request in requests:
            new, bad = self._encode(request)
            rows, holes = rows + new, holes + bad
            masks += [request.sample.masks] * len(new)
        special = self.encoder.special
        batch = pad_batch(
            rows, special=special, geometry=self.geometry, scope=self.scope, pad_token=self.pad_token, holes=holes
        )
        coverages = tuple(self._coverages(noun, masks[noun.row], batch.clips[noun.row]) for noun in batch.nouns)
        grids = [clip.grid for noun in batch.nouns if (clip := batch.clips[noun.row]) is not None]
        targets, counts = build_targets(coverages, [height * width for _, height, width in grids], self.scope)
        fields = {**batch.__dict__, "counts": {**batch.counts, **counts}}
        return SwimBatch(**fields, targets=targets, coverages=coverages)

    def _encode(self, request: Request) -> tuple[list[tuple[str, Encoded, Clip | None]], list[Hole]]:
        """Rows of the request's conversations, and a hole for each that cannot become one."""
        sample = request.sample
        names = [f"{sample.key}#{i}" for i in request.conversations]
        try:
            clip = self.load_clip(sample)
        except (BadSample, VideoError, RecordError) as error:
            return [], [_hole(sample, name, error) for name in names]
        rows: list[tuple[str, Encoded, Clip | None]] = []
        holes = []
        for i, name in zip(request.conversations, names):
            try:
                if (span := sample.record.conversations[i].span) is not None:
                    raise RecordError(f"{name}: span {list(span)}: only conversations about the whole clip can be used")
                num_tokens = int(np.prod(clip.grid)) if clip is not None else 0
                encoded = self.encoder(sample.record.conversations[i], name=name, num_video_tokens=num_tokens)
                rows.append((name, encoded, clip))
            except RecordError as error:
                holes.append(_hole(sample, name, error))
        return rows, holes

    def load_clip(self, sample: Sample) -> Clip | None:
        """Decode and patchify the clip's sampled frames; None for a record without media. BadSample or VideoError if
        unreadable."""
        if not sample.record.media:
            return None
        media = sample.record.media[0]
        if media.kind != "video" or len(sample.record.media) > 1:
            kinds = [item.kind for item in sample.record.media]
            raise RecordError(f"{sample.key}: media {kinds}: only records with one video, or none, can be used")
        annotated = None
        if self.data.frame_sampling == "annotated":
            annotated = sorted({frame for frames in sample.masks.values() for frame in frames})
        per_step = self.geometry.temporal_patch_size
        chosen = choose_frames(media.num_frames, self.data.num_frames, annotated)
        pixels = decode_frames(sample.media(), chosen)
        if pixels.shape[1:3] != (media.height, media.width):
            raise VideoError(
                f"video of {sample.key} has frames of {pixels.shape[2]}x{pixels.shape[1]} pixels, its record says "
                f"{media.width}x{media.height}; correct the record"
            )
        patches, (steps, rows, columns) = patchify(
            pixels, self.geometry, min_pixels=self.data.min_pixels, max_pixels=self.data.max_pixels
        )
        merge = self.geometry.merge_size
        # A clip shorter than num_frames ends in repetitions of its last frame, which take no time.
        spacing = max(1.0, (chosen[-1] - chosen[0]) / max(len(chosen) - 1, 1))
        return Clip(
            key=sample.key,
            patches=patches,
            grid=(steps, rows // merge, columns // merge),
            frames=[chosen[t * per_step : (t + 1) * per_step] for t in range(steps)],
            seconds_per_step=per_step * spacing / media.fps,
        )

    def _coverages(self, noun: Noun, masks: Masks, clip: Clip | None) -> tuple[np.ndarray | None, ...]:
        assert clip is not None  # only rows with a clip own nouns
        return tuple(step_coverage(noun.object_ids, masks, frames, clip.grid[1:]) for frames in clip.frames)


def _hole(sample: Sample, name: str, error: Exception) -> Hole:
    shard, offset = (error.shard, error.offset) if isinstance(error, BadSample) else sample.place
    return Hole(name, shard, offset, str(error))
