"""Records of a capture, which a device sends as one message each.

A record has the fields of a capture file's record header, then a message as Linux's ``vsockmon``
device has it (``linux/vsockmon.h``): addresses and an operation, the header of the transport if it
has one, and the payload.
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
    """``enum af_vsockmon_transport``: the transport whose header follows."""

    NONE = 1  #: no header follows
    VIRTIO = 2


def encode_header(
    operation: Operation,
    source: Address,
    destination: Address,
    transport: Transport = Transport.NONE,
    length: int = 0,
) -> bytes:
    """Return a ``struct af_vsockmon_hdr``; ``length`` bytes of the transport's header follow."""
    (source_cid, source_port), (cid, port) = source, destination
    return _HEADER.pack(source_cid, cid, source_port, port, operation, transport, length)


class Captured(NamedTuple):
    """A record of a capture.  An empty body marks the end of the capture."""

    nanoseconds: int  #: since 1970
    missed: int  #: dropped records between the previous one and this one
    length: int  #: bytes of the complete body; the end of the payload may be cut off
    body: bytes  #: from the vsockmon header on

    def encode(self) -> bytes:
        """Return the record as the bytes of one message."""
        return _FRONT.pack(*self[:3]) + self.body

    @classmethod
    def decode(cls, data: bytes) -> Captured:
        """Return the decoded record.  Raises ProtocolError if the lengths are invalid."""
        if len(data) != _FRONT.size and len(data) < _FRONT.size + HEADER_SIZE:
            raise ProtocolError(f"captured record of {len(data)} bytes (expected a header)")
        nanoseconds, missed, length = _FRONT.unpack_from(data)
        record = cls(nanoseconds, missed, length, data[_FRONT.size :])
        if record.length < len(record.body):
            raise ProtocolError(f"captured record of {record.length} bytes has {len(record.body)}")
        return record
