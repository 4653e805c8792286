"""Records of a capture: what a device sends to whoever asked for one, a message each.

In front is what a capture file says of every record; then what Linux's ``vsockmon`` device delivers
(``linux/vsockmon.h``): addresses and an operation, the header of the transport if there is one, the
payload.
"""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

from .messages import ProtocolError

_FRONT = struct.Struct("=QII")
_HEADER = struct.Struct("<QQIIHHHxx")
HEADER_SIZE = _HEADER.size

Address = tuple[int, int]


class Operation(IntEnum):
    """``enum af_vsockmon_op``."""

    UNKNOWN = 0
    CONNECT = 1
    DISCONNECT = 2
    CONTROL = 3
    PAYLOAD = 4


class Transport(IntEnum):
    """``enum af_vsockmon_transport``: whose header follows."""

    NONE = 1  #: nobody's
    VIRTIO = 2


def encode_header(
    operation: Operation,
    source: Address,
    destination: Address,
    transport: Transport = Transport.NONE,
    length: int = 0,
) -> bytes:
    """``struct af_vsockmon_hdr``; ``length`` bytes of the transport's header follow."""
    (source_cid, source_port), (cid, port) = source, destination
    return _HEADER.pack(source_cid, cid, source_port, port, operation, transport, length)


class Captured(NamedTuple):
    """One record; without a body, the last word: there is nothing more to come."""

    nanoseconds: int  #: since 1970
    missed: int  #: records before it that there was no room for
    length: int  #: of the whole, in bytes, of which the payload's end may be missing
    body: bytes  #: from the vsockmon header on

    def encode(self) -> bytes:
        """The message."""
        return _FRONT.pack(*self[:3]) + self.body

    @classmethod
    def decode(cls, data: bytes) -> Captured:
        """Raises ProtocolError on anything :meth:`encode` cannot have made."""
        if len(data) != _FRONT.size and len(data) < _FRONT.size + HEADER_SIZE:
            raise ProtocolError(f"a captured record of {len(data)} bytes")
        nanoseconds, missed, length = _FRONT.unpack_from(data)
        record = cls(nanoseconds, missed, length, data[_FRONT.size :])
        if record.length < len(record.body):
            raise ProtocolError(f"{len(record.body)} bytes of a record of {record.length}")
        return record
