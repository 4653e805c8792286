"""Buffers and messages in a program's memory: struct iovec and struct msghdr.

Each is read once, and checked before it is used: the program may change it at any time.
"""

from __future__ import annotations

import errno
import struct
from typing import NamedTuple

from .call import Call, Piece, failure

#: The error of send() without a destination, as of Linux's AF_VSOCK.
ADDRESS_NEEDED = errno.EINVAL

_VECTOR = struct.Struct("=QQ")
_MOST_VECTORS = 1024  # UIO_MAXIOV
#: struct msghdr of 64-bit Linux: name, its size, vectors, their number, control, its size, flags.
_MESSAGE = struct.Struct("=QI4xQQQQi4x")
_NAME_SIZE_AT, _CONTROL_SIZE_AT, _FLAGS_AT = 8, 40, 48
#: The size of struct msghdr, and that of struct mmsghdr, in bytes.
MESSAGE_SIZE, MESSAGE_STRIDE = _MESSAGE.size, 64
MOST_MESSAGES = 1024  # UIO_MAXIOV
_LONGEST = 0x7FFF_F000  # MAX_RW_COUNT


def read_vectors(call: Call, address: int, count: int) -> list[tuple[int, int]]:
    """Read an array of struct iovec, and return the address and size of each.

    Raises OSError(EMSGSIZE) if ``count`` is too large, OSError(EINVAL) if the sizes are,
    OSError(EFAULT) if the array is not mapped.
    """
    if count > _MOST_VECTORS:
        raise failure(errno.EMSGSIZE)
    vectors = list(_VECTOR.iter_unpack(call.read(address, count * _VECTOR.size))) if count else []
    if sum(size for _, size in vectors) > _LONGEST:
        raise failure(errno.EINVAL)
    return [(base, size) for base, size in vectors]


class Message(NamedTuple):
    """A struct msghdr, and the buffers that it refers to."""

    at: int  #: its own address
    name: int
    name_size: int
    vectors: list[tuple[int, int]]

    @classmethod
    def of(cls, buffer: int, size: int) -> Message:
        """Return the message of a call with one buffer."""
        return cls(0, 0, 0, [(buffer, size)])

    @property
    def size(self) -> int:
        """Size of all buffers, in bytes."""
        return sum(size for _, size in self.vectors)

    def read(self, call: Call) -> bytes:
        """Return the contents of the buffers."""
        return b"".join(call.read(address, size) for address, size in self.vectors)

    def fill(self, data: bytes) -> list[Piece]:
        """Return pieces, each ``(address, bytes)``, that write ``data`` to the buffers.

        Data in excess of the buffers' size is left out.
        """
        pieces: list[Piece] = []
        done = 0
        for address, size in self.vectors:
            if done >= len(data):
                break
            pieces.append((address, data[done : done + size]))
            done += size
        return pieces

    def results(self, name_size: int, flags: int) -> list[Piece]:
        """Return pieces that set msg_namelen, msg_controllen (to 0) and msg_flags."""
        return [
            (self.at + _NAME_SIZE_AT, struct.pack("=I", name_size)),
            (self.at + _CONTROL_SIZE_AT, struct.pack("=Q", 0)),
            (self.at + _FLAGS_AT, struct.pack("=i", flags)),
        ]


def read_message(call: Call, address: int) -> Message:
    """Read the struct msghdr at ``address``.

    Raises OSError if it is invalid or not mapped, CallInterrupted if the call no longer waits.
    """
    name, name_size, vectors, count, _, _, _ = _MESSAGE.unpack(call.read(address, _MESSAGE.size))
    return Message(address, name, name_size, read_vectors(call, vectors, count))
