"""Index facts of a data set as arrays: what a plan needs of a million samples, without a million objects."""

import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from swim.data_tools.files import written_whole

if TYPE_CHECKING:
    from swim.data_tools.index import Entry

FACTS_VERSION = 2  # raise it when the arrays change


@dataclass(frozen=True)
class Facts:
    """N clips with C conversations: number of each clip's conversations, shard, (height, width) in pixels, frames and
    their rate in 1/s, zeros without media; names of tasks, and the number of each conversation's."""

    counts: np.ndarray
    shards: np.ndarray
    sizes: np.ndarray
    num_frames: np.ndarray
    fps: np.ndarray
    task_names: np.ndarray
    tasks: np.ndarray

    @cached_property
    def bounds(self) -> np.ndarray:
        """(N + 1,) where each clip's conversations begin among all C of the set."""
        return np.append(0, np.cumsum(self.counts))


def facts_of(entries: "Iterable[Entry]") -> Facts:
    """Facts of entries, in their order; they are looked at one after the other."""
    counts, sizes, timing, shards, tasks = [], [], [], [], []
    shard_numbers: dict[str, int] = {}
    task_numbers: dict[str, int] = {}
    for entry in entries:
        counts.append(len(entry.conversations))
        sizes.append((entry.height, entry.width))
        timing.append((entry.num_frames, entry.fps))
        shards.append(shard_numbers.setdefault(entry.shard, len(shard_numbers)))
        tasks += [task_numbers.setdefault(facts.task, len(task_numbers)) for facts in entry.conversations]
    num_frames, fps = np.array(timing, dtype=np.float64).reshape(-1, 2).T
    return Facts(
        counts=np.array(counts, dtype=np.int64),
        shards=np.array(shards, dtype=np.int64),
        sizes=np.array(sizes, dtype=np.int64).reshape(-1, 2),
        num_frames=num_frames.astype(np.int64),
        fps=fps.copy(),
        task_names=np.array(list(task_numbers), dtype=np.str_),
        tasks=np.array(tasks, dtype=np.int64),
    )


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    """Write a .npz file, whole or not at all, and its folder; any process that writes it writes the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as hidden, hidden.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]


def load_arrays(path: Path) -> dict[str, np.ndarray] | None:
    """Arrays of a .npz file; None if it is missing or damaged, so that it is made anew."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None
