"""What a folder of shards holds, counted from indices and records; no video is decoded."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

import numpy as np

from swim.data_tools.records import Rle
from swim.data_tools.rle import decode_counts
from swim.data_tools.shards import BadSample, ShardSet

QUANTILES = {"min": 0.0, "10 %": 0.1, "median": 0.5, "90 %": 0.9, "max": 1.0}


def shard_stats(shards: ShardSet, numbers: Iterable[int]) -> dict[str, Any]:
    """Counts over these samples, as plain data; what cannot be read is listed under `bad` and not counted.

    `masks` counts (object, frame) pairs of the stored first medium: an object is seen there, annotated as absent, or
    not annotated. Quantiles are of clips with media: sides in pixels, `fps` in 1/s.
    """
    counts: dict[str, Counter[str]] = {
        name: Counter() for name in ("conversations", "mentions", "masks", "sources", "licenses")
    }
    sizes: dict[str, list[float]] = {name: [] for name in ("num_frames", "fps", "height", "width")}
    total: Counter[str] = Counter(clips=0, objects=0, bytes=0)
    bad = []
    for number in numbers:
        entry = shards.entries[number]
        try:
            sample = shards.read(number)
        except BadSample as error:
            bad.append(str(error))
            continue
        record = sample.record
        total.update(clips=1, objects=len(record.objects), bytes=entry.num_bytes)
        counts["sources"][record.source] += 1
        counts["licenses"][record.license] += 1
        counts["conversations"].update(conversation.task for conversation in record.conversations)
        turns = (turn for conversation in record.conversations for turn in conversation.turns)
        counts["mentions"].update(mention.kind for turn in turns for mention in turn.mentions)
        rles = [rle for frames in sample.masks.values() for rle in frames.values()]
        seen = sum(map(_covers, rles))
        missing = len(record.objects) * entry.num_frames - len(rles)
        counts["masks"].update({"present": seen, "absent": len(rles) - seen, "not annotated": missing})
        for name, values in sizes.items():
            if record.media:
                values.append(getattr(entry, name))
    quantiles = {
        name: dict(zip(QUANTILES, np.quantile(values, list(QUANTILES.values())).tolist())) if values else {}
        for name, values in sizes.items()
    }
    return {**total, **{name: dict(c.most_common()) for name, c in counts.items()}, "quantiles": quantiles, "bad": bad}


def _covers(rle: Rle | None) -> bool:
    return rle is not None and bool(decode_counts(rle.counts)[1::2].any())
