"""Messages between a process and its copies: a kind, a number, and an object in memory that both sides map.

The bytes of tensors and arrays are written once and read where they lie. The memory has no name, so nothing is left
when a process is killed, and none of it is taken from /dev/shm, which containers keep small.
"""

import io
import mmap
import os
import pickle
import socket
import struct
from collections.abc import Sequence
from typing import Any

import torch

_ALIGN = 64  # bytes
_SMALL = 1 << 16  # bytes
_MESSAGE = struct.Struct("<cq")  # kind and number; the object comes as a descriptor beside it


def channels() -> tuple[socket.socket, socket.socket]:
    """Two ends of a channel that keeps messages apart."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(
    channel: socket.socket, kind: bytes, number: int = 0, *, payload: Any = None, descriptors: Sequence[int] = ()
) -> None:
    """Send a message with an object, or with descriptors; ConnectionError if nobody is at the other end."""
    memory = None if payload is None else _dump(payload)
    try:
        passed = [*descriptors] if memory is None else [memory]
        socket.send_fds(channel, [_MESSAGE.pack(kind, number)], passed)
    finally:
        if memory is not None:
            os.close(memory)


def receive(channel: socket.socket) -> tuple[bytes, int, list[int]]:
    """Kind, number and descriptors of the next message; EOFError if there will be none."""
    message, descriptors, _, _ = socket.recv_fds(channel, _MESSAGE.size, 1)
    if not message:
        raise EOFError("the other end is closed")
    kind, number = _MESSAGE.unpack(message)
    return kind, number, descriptors


def payload_of(descriptors: Sequence[int]) -> Any:
    """The object that came with a message."""
    (descriptor,) = descriptors
    try:
        return _load(descriptor)
    finally:
        os.close(descriptor)


def _dump(value: Any) -> int:
    """Descriptor of memory that holds a value: its pickle, then the bytes of its tensors and arrays."""
    buffers: list[pickle.PickleBuffer] = []
    file = io.BytesIO()

    def apart(buffer: pickle.PickleBuffer) -> bool:
        # What is small is copied: else one number that is kept would keep all memory of the message.
        if small := buffer.raw().nbytes < _SMALL:
            return small
        buffers.append(buffer)
        return False

    _Pickler(file, protocol=5, buffer_callback=apart).dump(value)
    parts = [file.getbuffer(), *(buffer.raw() for buffer in buffers)]
    sizes = struct.pack(f"<{len(parts) + 1}q", len(parts), *map(len, parts))
    descriptor = os.memfd_create("batch")
    place = 0
    for part in [memoryview(sizes), *parts]:
        place += -place % _ALIGN
        end = place + len(part)
        while place < end:  # Linux writes 2 GiB at a time
            place += os.pwrite(descriptor, part[place - end :], place)
    os.ftruncate(descriptor, place)
    return descriptor


def _load(descriptor: int) -> Any:
    memory = memoryview(mmap.mmap(descriptor, 0))
    (count,) = struct.unpack_from("<q", memory)
    place, parts = 8 * (count + 1), []
    for size in struct.unpack_from(f"<{count}q", memory, 8):
        place += -place % _ALIGN
        parts.append(memory[place : place + size])
        place += size
    return pickle.loads(parts[0], buffers=parts[1:])


class _Pickler(pickle.Pickler):
    """Tensors as buffers: torch's own way copies their bytes into the pickle."""

    def reducer_override(self, value: Any) -> Any:
        if type(value) is not torch.Tensor or value.requires_grad:
            return NotImplemented
        # Also an empty one: torch would send all that it is a view of.
        whole = value.contiguous()
        flat = whole.as_strided((whole.numel(),), (1,))  # of one element or none, the stride may be anything
        data = flat.view(torch.uint8).numpy().data
        return _tensor, (pickle.PickleBuffer(data) if value.numel() else b"", value.dtype, value.shape)


def _tensor(data: memoryview, dtype: torch.dtype, shape: torch.Size) -> torch.Tensor:
    return torch.frombuffer(data, dtype=dtype).view(shape) if len(data) else torch.empty(shape, dtype=dtype)
