"""Layers: small tars that change what is said about samples of another data set, joined by key; no video is written
again.

    KEY.conversations.json  {replace, objects, conversations}
    KEY.masks.json          {object id: {frame: RLE | null}}

Conversations come behind those of the base, or in their place with `replace`. An object whose id the base has takes its
place, others are added. The masks of an object that is named take the place of all it had, other objects keep theirs.
Layers are joined one after the other; a sample without a layer is that of the base.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from swim.data_tools.access import Opened
from swim.data_tools.index import (
    BadSample,
    ConversationFacts,
    Entries,
    Entry,
    Place,
    ShardError,
    conversation_facts,
    write_index,
)
from swim.data_tools.records import (
    Conversation,
    Masks,
    Object,
    RecordError,
    masks_json,
    parse_sample,
)
from swim.data_tools.storage import FileCache
from swim.data_tools.writer import TarWriter, tar_samples

if TYPE_CHECKING:
    from swim.data_tools.shards import ShardSet

SAID, MASKS = "conversations.json", "masks.json"
HEADER = {"layer": True}
Change = dict[str, Any]
"""JSON values of the members of a layer about one sample."""


class Said(BaseModel):
    """What a layer says about a sample: conversations behind the base's or, with `replace`, in their place."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    replace: bool = False
    objects: list[Object] = []
    conversations: list[Conversation] = []


@dataclass(frozen=True)
class LayerEntry:
    """Index facts of a sample's layer: of its own conversations and, if it has masks, `num_mask_objects` of the base's
    conversations with them."""

    key: str
    members: dict[str, Place]
    replace: bool
    num_mask_objects: tuple[int, ...]
    conversations: tuple[ConversationFacts, ...]


def join(
    record: bytes | dict[str, Any], masks: bytes | dict[str, Any] | None, changes: Iterable[Change]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """JSON values of a valid record and its masks with changes of several layers, one after the other."""
    values: dict[str, Any] = json.loads(record) if isinstance(record, bytes) else dict(record)
    frames: dict[str, Any] = json.loads(masks) if isinstance(masks, bytes) else dict(masks or {})
    for change in changes:
        said = change.get(SAID, {})
        objects = {thing["id"]: thing for thing in [*values["objects"], *said.get("objects", ())]}
        kept = [] if said.get("replace") else values["conversations"]
        values |= {"objects": [*objects.values()], "conversations": [*kept, *said.get("conversations", ())]}
        frames |= change.get(MASKS, {})
    return values, frames


class Layer:
    """A layer over the samples with these `keys`; ShardError if it has others."""

    def __init__(self, where: str | Path, keys: Sequence[str], *, cache: Path | None, files: FileCache | None) -> None:
        opened = Opened(where, cache=cache, files=files, layer=True)
        self.digest, self._lines, self._read = opened.digest, opened.lines, opened.read
        line_of = {key: line for line, key in enumerate(self._lines.keys())}
        if len(line_of) < len(self._lines):
            raise ShardError(f"{where}: a key is there twice; write the layer anew")
        self._line = np.fromiter((line_of.get(key, -1) for key in keys), np.int64, len(keys))
        if np.count_nonzero(self._line >= 0) < len(line_of):
            unknown = sorted(line_of.keys() - set(keys))
            first = ", ".join(map(repr, unknown[:3]))
            raise ShardError(
                f"{where}: {len(unknown)} of its keys are not in the base, such as {first}; leave them out"
            )

    def read(self, number: int, *, masks: bool) -> Change | None:
        """What it says about sample `number`, if anything; BadSample for damage."""
        if (facts := self._facts(number)) is None:
            return None
        entry = Entry(facts["key"], facts["members"], 0, 0, 0, 0.0, (), facts["shard"])
        names = [name for name in entry.members if masks or name != MASKS]
        try:
            return {name: json.loads(self._read.member(entry, name)) for name in names}
        except ValueError as error:
            raise BadSample(entry.key, entry.shard, 0, f"layer: not JSON ({error}); write it anew") from error

    def entry(self, number: int, below: Entry) -> Entry:
        """Facts of sample `number` with this layer, from those without it."""
        if (facts := self._facts(number)) is None:
            return below
        counts = facts["num_mask_objects"]
        kept = () if facts["replace"] else below.conversations
        counted = tuple(replace(one, num_mask_objects=count) for one, count in zip(kept, counts))
        return replace(below, conversations=(*counted, *kept[len(counted) :], *facts["conversations"]))

    def _facts(self, number: int) -> dict[str, Any] | None:
        line = int(self._line[number])
        return None if line < 0 else self._lines[line]


class Joined(Sequence[Entry]):
    """Entries of a data set with layers."""

    def __init__(self, entries: Entries, layers: Sequence[Layer]) -> None:
        self._entries, self._layers = entries, layers

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> Iterator[str]:
        """The keys of all entries, in order."""
        return self._entries.keys()

    @overload
    def __getitem__(self, which: int) -> Entry: ...
    @overload
    def __getitem__(self, which: slice) -> list[Entry]: ...
    def __getitem__(self, which: int | slice) -> Entry | list[Entry]:
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(len(self)))]
        entry = self._entries[which]
        for layer in self._layers:
            entry = layer.entry(which, entry)
        return entry


class LayerWriter(TarWriter):
    """A TarWriter of a layer over `base`, which may have layers itself; samples are checked as they will be joined."""

    header = HEADER

    def __init__(
        self, folder: str | Path, base: "ShardSet", *, prefix: str = "layer", max_bytes: int = 1 << 30
    ) -> None:
        super().__init__(folder, prefix=prefix, max_bytes=max_bytes)
        self.base = base

    def write(
        self,
        key: str,
        *,
        conversations: Sequence[Conversation] = (),
        objects: Sequence[Object] = (),
        replace: bool = False,
        masks: Masks | None = None,
    ) -> None:
        """Append what changes about the sample `key` of the base.

        RecordError if that is nothing, if there is no such sample, and if it would not be valid.
        """
        self._new(key)
        said = Said(replace=replace, objects=list(objects), conversations=list(conversations))
        text = {SAID: said.model_dump_json().encode()} if conversations or objects or replace else {}
        text |= {MASKS: masks_json(masks)} if masks is not None else {}
        entry = _entry(self.base, key, {}, text)
        entry.members.update(self._add(key, text))  # which may begin another tar, with other lines
        self._lines.append(entry)


def index_layer(tar_path: str | Path, base: "ShardSet") -> Path:
    """Write the index of a layer's tar anew and return its path; ShardError and RecordError as for `index_shard`."""
    path = Path(tar_path)
    lines = (_entry(base, key, members, text) for key, members, text in tar_samples(path))
    return write_index(path, path.stat().st_size, lines, **HEADER)


def _entry(base: "ShardSet", key: str, members: dict[str, Place], text: dict[str, bytes]) -> LayerEntry:
    if not text or text.keys() - {SAID, MASKS}:
        problem = f"its members are {sorted(text)}, those of a layer are {SAID} and {MASKS}"
        raise RecordError(f"record {key!r}, layer: {problem}; write one of them or both")
    try:
        sample = base.read(key)
    except KeyError:
        raise RecordError(f"record {key!r}, key: it is not in {base.folder}; leave it out") from None
    try:
        change = {name: json.loads(data) for name, data in text.items()}
        said = Said.model_validate(change.get(SAID, {}))
    except (ValidationError, ValueError) as error:
        raise RecordError(f"record {key!r}, layer: {error}; write it with LayerWriter") from None
    below = sample.record.model_dump_json().encode(), masks_json(sample.masks)
    facts = conversation_facts(*parse_sample(key, *join(*below, [change])))
    kept = 0 if said.replace else len(sample.record.conversations)
    counts = tuple(one.num_mask_objects for one in facts[:kept]) if MASKS in text else ()
    return LayerEntry(key, members, said.replace, counts, facts[kept:])
