"""SWIM's batches: decoded clips, encoded conversations, and the mask targets of their nouns."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swim.data_tools.records import Masks, RecordError
from swim.data_tools.shards import BadSample, Sample
from swim.data_tools.video import DecoderMissing, VideoError, check_decoder, choose_frames, decode_frames
from swim.train.batch import Batch, BatchOptions, Hole, make_batch
from swim.train.config import ConfigError, DataConfig
from swim.train.encode import ConversationEncoder, Encoded, Noun
from swim.train.families import Clip, sampled_clip
from swim.train.system import Request
from swim.train.systems.swim.config import Config
from swim.train.systems.swim.targets import Targets, build_targets, step_coverages, step_masks


@dataclass
class SwimBatch(Batch):
    """A batch with mask targets; `coverages` holds per noun the (h, w) coverage of each step, None where not
    annotated."""

    targets: Targets | None = None
    coverages: tuple[tuple[np.ndarray | None, ...], ...] = ()


Conversations = list[tuple[str, Encoded, Clip | None]]  # id, tokens, clip


class SwimCollator:
    """Requests in, one batch out; reading, decoding and mask work happen here, in the loader's worker."""

    def __init__(
        self,
        encoder: ConversationEncoder,
        data: DataConfig,
        options: BatchOptions,
        config: Config,
    ) -> None:
        self.encoder, self.data, self.options, self.config = encoder, data, options, config
        try:
            check_decoder(data.decoder)
        except DecoderMissing as error:
            raise ConfigError(str(error)) from None
        if encoder.family.stacks_clips and data.frame_sampling == "fps" and data.clips_per_pack != 1:
            raise ConfigError(
                "data.frame_sampling fps gives clips different numbers of frames, and this model family needs equally "
                "many in a batch; set data.clips_per_pack=1, or data.frame_sampling=uniform"
            )

    def __call__(self, requests: Iterable[Request]) -> SwimBatch:
        """Batch of all conversations; a clip that cannot be read or encoded becomes one hole per conversation."""
        conversations: Conversations = []
        masks: list[Masks] = []
        holes: list[Hole] = []
        sources: list[str] = []
        for request in requests:
            new, bad = self.encode(request)
            conversations, holes = conversations + new, holes + bad
            masks += [request.sample.masks] * len(new)
            sources += [request.sample.record.source] * len(new)
        return replace(self.assemble(conversations, masks, holes), sources=sources)

    def assemble(self, conversations: Conversations, masks: Sequence[Masks], holes: Sequence[Hole] = ()) -> SwimBatch:
        """Batch of encoded conversations with the masks of each one's sample."""
        chosen = [(name, replace(e, nouns=self._nouns(e.nouns)), clip) for name, e, clip in conversations]
        batch = make_batch(chosen, self.encoder, self.options, holes=holes)
        on_pixels = self.config.mask_side == "pixel"
        # Nouns of the same objects, such as the sub-tokens of one, share their targets' decoding.
        wanted: dict[int, tuple[Masks, Clip, list[tuple[str, ...]]]] = {}
        for noun in batch.nouns:
            clip, of_clip = batch.clips[noun.conversation], masks[noun.conversation]
            assert clip is not None  # only conversations with a clip own nouns
            objects = wanted.setdefault(id(of_clip), (of_clip, clip, []))[2]
            if noun.object_ids not in objects:
                objects.append(noun.object_ids)
        covered: dict[Any, tuple[np.ndarray | None, ...]] = {}
        drawn: dict[Any, list[list[np.ndarray]]] = {}
        for number, (of_clip, clip, objects) in wanted.items():
            grid = clip.grid[1:]
            for ids, coverage in zip(objects, step_coverages(objects, of_clip, clip.frames, grid)):
                covered[number, ids] = coverage
                if on_pixels:
                    drawn[number, ids] = [step_masks(ids, of_clip, frames, grid) for frames in clip.frames]
        keys = [(id(masks[noun.conversation]), noun.object_ids) for noun in batch.nouns]
        grids = [wanted[number][1].grid[1:] for number, _ in keys]
        coverages = tuple(covered[key] for key in keys)
        pixels = [drawn[key] for key in keys] if on_pixels else None
        targets, counts = build_targets(coverages, grids, self.config, masks=pixels)
        fields = {**batch.__dict__, "counts": {**batch.counts, **counts}}
        return SwimBatch(**fields, targets=targets, coverages=coverages)

    def _nouns(self, nouns: Sequence[Noun]) -> list[Noun]:
        if self.config.subtokens == "each":
            return [replace(noun, tokens=(token,)) for noun in nouns for token in noun.tokens]
        if self.config.subtokens == "last":
            return [replace(noun, tokens=noun.tokens[-1:]) for noun in nouns]
        return list(nouns)

    def encode(self, request: Request) -> tuple[Conversations, list[Hole]]:
        """The request's conversations as tokens, and a hole for each that cannot become any."""
        sample = request.sample
        try:
            clip = self.load_clip(sample)
        except (BadSample, VideoError, RecordError) as error:
            return [], [_hole(sample, f"{sample.key}#{i}", error) for i in request.conversations]
        return self.encode_clip(request, clip)

    def measure(self, request: Request) -> Conversations:
        """What `encode` would give about an undecoded clip with one cell a step; without the conversations that become
        holes."""
        try:
            chosen = self._choose(request.sample)
        except RecordError:
            return []
        if chosen is None:
            return self.encode_clip(request, None)[0]
        steps = -(-len(chosen) // self.encoder.family.frames_per_step)
        return self.encode_clip(request, self._clip(request.sample, chosen, torch.empty(0), (steps, 1, 1)))[0]

    def encode_clip(self, request: Request, clip: Clip | None) -> tuple[Conversations, list[Hole]]:
        """The same with the clip already there."""
        record = request.sample.record
        conversations: Conversations = []
        holes = []
        for i in request.conversations:
            name = f"{request.sample.key}#{i}"
            try:
                if (span := record.conversations[i].span) is not None:
                    raise RecordError(f"{name}: span {list(span)}: only conversations about the whole clip can be used")
                conversations.append((name, self.encoder(record.conversations[i], name=name, clip=clip), clip))
            except RecordError as error:
                holes.append(_hole(request.sample, name, error))
        return conversations, holes

    def load_clip(self, sample: Sample) -> Clip | None:
        """Decode and patchify the clip's sampled frames; None for a record without media. BadSample or VideoError if
        unreadable."""
        if (chosen := self._choose(sample)) is None:
            return None
        media = sample.record.media[0]
        if self.data.decoder == "decord" and media.member is None:
            problem = "decord crashes on damaged files, and no checksum vouches for a loose one"
            raise VideoError(f"{media.path}: {problem}; put it into a shard or set data.decoder=pyav")
        size = media.height, media.width
        pixels = decode_frames(sample.media(), chosen, size=size, decoder=self.data.decoder)
        cells, grid = self.encoder.family.pixels(pixels, **self.data.pixel_limits(len(chosen)))
        return self._clip(sample, chosen, cells, grid)

    def _choose(self, sample: Sample) -> list[int] | None:
        """Frames to decode, None for a record without media; RecordError for other media than one video."""
        if not sample.record.media:
            return None
        media = sample.record.media[0]
        if media.kind != "video" or len(sample.record.media) > 1:
            kinds = [item.kind for item in sample.record.media]
            raise RecordError(f"{sample.key}: media {kinds}: only records with one video, or none, can be used")
        annotated = None
        if self.data.frame_sampling == "annotated":
            annotated = sorted({frame for frames in sample.masks.values() for frame in frames})
        return choose_frames(media.num_frames, self.data.frames_of(media.num_frames, media.fps), annotated)

    def _clip(self, sample: Sample, chosen: list[int], cells: Tensor, grid: tuple[int, int, int]) -> Clip:
        per_step, fps = self.encoder.family.frames_per_step, sample.record.media[0].fps
        return sampled_clip(sample.key, chosen, cells, grid, per_step=per_step, fps=fps)


def _hole(sample: Sample, name: str, error: Exception) -> Hole:
    shard, offset = (error.shard, error.offset) if isinstance(error, BadSample) else sample.place
    return Hole(name, shard, offset, str(error))
