"""Buffers and messages in a program's memory: struct iovec and struct msghdr.

Each is read once; what it says is checked before it is used.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from .call import Call, Piece, failure

#: What send() without a destination fails with, as Linux's AF_VSOCK does.
ADDRESS_NEEDED = errno.EINVAL

_VECTOR = struct.Struct("=QQ")
_MOST_VECTORS = 1024  # UIO_MAXIOV
#: struct msghdr of 64-bit Linux: name, its size, vectors, their number, control, its size, flags.
_MESSAGE = struct.Struct("=QI4xQQQQi4x")
_NAME_SIZE_AT, _CONTROL_SIZE_AT, _FLAGS_AT = 8, 40, 48
#: Its size, and how far apart those of a struct mmsghdr array are, in bytes.
MESSAGE_SIZE, MESSAGE_STRIDE = _MESSAGE.size, 64
MOST_MESSAGES = 1024  # UIO_MAXIOV
_LONGEST = 0x7FFF_F000  # MAX_RW_COUNT


def read_vectors(call: Call, address: int, count: int) -> list[tuple[int, int]]:
    """An array of struct iovec: (address, size) of each; OSError EMSGSIZE, EINVAL or EFAULT."""
    if count > _MOST_VECTORS:
        raise failure(errno.EMSGSIZE)
    vectors = list(_VECTOR.iter_unpack(call.read(address, count * _VECTOR.size))) if count else []
    if sum(size for _, size in vectors) > _LONGEST:
        raise failure(errno.EINVAL)
    return [(base, size) for base, size in vectors]


class Message(NamedTuple):
    """A struct msghdr, and the buffers it speaks of."""

    at: int  #: where it is
    name: int
    name_size: int
    vectors: list[tuple[int, int]]

    @classmethod
    def of(cls, buffer: int, size: int) -> Message:
        """What a call with one buffer sends."""
        return cls(0, 0, 0, [(buffer, size)])

    @property
    def size(self) -> int:
        """The bytes there is room for."""
        return sum(size for _, size in self.vectors)

    def read(self, call: Call) -> bytes:
        """What the buffers hold."""
        return b"".join(call.read(address, size) for address, size in self.vectors)

    def fill(self, data: bytes) -> list[Piece]:
        """Return what to write: as much of ``data`` as there is room for in the buffers."""
        pieces: list[Piece] = []
        done = 0
        for address, size in self.vectors:
            if done >= len(data):
                break
            pieces.append((address, data[done : done + size]))
            done += size
        return pieces

    def results(self, name_size: int, flags: int) -> list[Piece]:
        """Return what recvmsg() writes besides: the source's size, no control data, and flags."""
        return [
            (self.at + _NAME_SIZE_AT, struct.pack("=I", name_size)),
            (self.at + _CONTROL_SIZE_AT, struct.pack("=Q", 0)),
            (self.at + _FLAGS_AT, struct.pack("=i", flags)),
        ]


def read_message(call: Call, address: int) -> Message:
    """The struct msghdr at ``address``."""
    name, name_size, vectors, count, _, _, _ = _MESSAGE.unpack(call.read(address, _MESSAGE.size))
    return Message(address, name, name_size, read_vectors(call, vectors, count))
