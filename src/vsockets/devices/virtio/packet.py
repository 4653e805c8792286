"""Header of virtio-vsock packets (virtio 1.3, 5.10.6), and the packets' capture records."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ...protocol.vsockmon import Operation
from ..capture import CaptureSink

#: Source and destination CID, source and destination port, payload length, type, operation, flags,
#: the sender's buffer size and its count of forwarded bytes.
HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = HEADER.size

#: The device's configuration space: the guest's CID.
CONFIGURATION = struct.Struct("<Q")

# Feature bits of the device.
F_STREAM = 1 << 0
F_SEQPACKET = 1 << 1


#: Event of the event queue: all connections are reset, and the CID may have changed.
TRANSPORT_RESET = struct.pack("<I", 0)


class Type(IntEnum):
    """Type of a connection."""

    STREAM = 1
    SEQPACKET = 2


class Op(IntEnum):
    """Operation of a packet."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shutdown(IntFlag):
    """Flags of SHUTDOWN: the directions that its sender closes."""

    RECEIVE = 1
    SEND = 2


class Sequenced(IntFlag):
    """Flags of RW in a connection of type SEQPACKET."""

    END_OF_MESSAGE = 1
    END_OF_RECORD = 2


class Header(NamedTuple):
    """Header of a packet."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int = 0
    type: int = Type.STREAM
    op: int = 0
    flags: int = 0
    buf_alloc: int = 0  #: the sender's buffer size, in bytes
    fwd_cnt: int = 0  #: bytes that the sender has forwarded, modulo 2**32

    def encode(self) -> bytes:
        """Encode the header."""
        return HEADER.pack(*self)


_OPERATIONS = {
    Op.REQUEST: Operation.CONNECT,
    Op.RESPONSE: Operation.CONNECT,
    Op.RST: Operation.DISCONNECT,
    Op.SHUTDOWN: Operation.DISCONNECT,
    Op.RW: Operation.PAYLOAD,
    Op.CREDIT_UPDATE: Operation.CONTROL,
    Op.CREDIT_REQUEST: Operation.CONTROL,
}


def record(capture: CaptureSink, header: bytes, payload: Sequence[memoryview] = ()) -> None:
    """Send a capture record of a packet to or from the guest.

    ``payload`` may be shorter than ``header`` claims: the guest wrote the length.
    """
    source_cid, cid, source_port, port, length, _, op, *_ = HEADER.unpack(header)
    operation = _OPERATIONS.get(op, Operation.UNKNOWN)
    if operation is not Operation.PAYLOAD:
        length = 0
    capture.record(operation, (source_cid, source_port), (cid, port), payload, length, header)
