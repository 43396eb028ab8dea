"""Videos that look alike although their bytes differ: a difference hash of a few frames, and the search for near ones.

A frame becomes 8 x 9 grey averages and 64 bits, whether each is brighter than its right neighbour; scaling and
re-encoding turn few of them over.
"""

from collections.abc import Iterator

import av
import numpy as np

HASHED_AT = (0.25, 0.5, 0.75)  # of the clip, so that another frame rate gives nearly the same pictures
# Of 192 bits. Looks that share none of 12 bands of 16 bits are not compared: none are missed up to 11 bits apart, about
# a fifth at 24. Real clips re-encoded at half the size or rate were 0 to 8 bits apart, different clips 56 or more.
LIMIT = 24
MIN_CONTRAST = 16  # grey levels; the bits of a flatter frame are noise, and all such frames look alike
MAX_CROWD = 256


def frame_hash(frame: av.VideoFrame) -> bytes | None:
    """8 bytes that say what the frame looks like; None for a frame without contrast."""
    grey = frame.reformat(width=9, height=8, format="gray", interpolation="AREA", threads=1).to_ndarray().astype(int)
    if np.ptp(grey) < MIN_CONTRAST:
        return None
    return np.packbits(grey[:, :-1] > grey[:, 1:]).tobytes()


def near_pairs(looks: np.ndarray, groups: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(first, second, bits that differ) of looks uint8 [N, 24] of different groups [N] at most LIMIT bits apart, each
    second one once, with its nearest.

    In a crowd of more than MAX_CROWD looks that share a band, not every pair is compared.
    """
    best: dict[int, tuple[int, int]] = {}
    for band in looks.view(np.uint16).T if len(looks) else ():
        order = np.lexsort((groups, band))
        value = band[order]
        for apart in range(1, min(MAX_CROWD, len(order))):
            same = np.flatnonzero(value[apart:] == value[:-apart])
            if not same.size:
                break
            a, b = order[same], order[same + apart]
            pairs = groups[a] != groups[b]
            a, b = np.minimum(a, b)[pairs], np.maximum(a, b)[pairs]
            bits = np.bitwise_count(looks[a] ^ looks[b]).sum(1)
            for i in np.flatnonzero(bits <= LIMIT):
                best[int(b[i])] = min(best.get(int(b[i]), (LIMIT + 1, 0)), (int(bits[i]), int(a[i])))
    for second, (bits_apart, first) in sorted(best.items()):
        yield first, second, bits_apart
