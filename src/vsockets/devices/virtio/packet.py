"""The packets of virtio-vsock (virtio 1.3, 5.10.6): the header, which is all there is to it."""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

#: source and destination CID, source and destination port, length of the payload, type,
#: operation, flags, the sender's buffer and how much of what it received it has passed on.
HEADER = struct.Struct("<QQIIIHHIII")
HEADER_SIZE = HEADER.size

#: The device's configuration space: the guest's CID.
CONFIGURATION = struct.Struct("<Q")

# Features of the device.
F_STREAM = 1 << 0
F_SEQPACKET = 1 << 1
F_NO_IMPLIED_STREAM = 1 << 2

#: What the event queue carries: every connection is gone, and the CID may be another.
TRANSPORT_RESET = struct.pack("<I", 0)


class Type(IntEnum):
    """Of a connection."""

    STREAM = 1
    SEQPACKET = 2


class Op(IntEnum):
    """What a packet is for."""

    REQUEST = 1
    RESPONSE = 2
    RST = 3
    SHUTDOWN = 4
    RW = 5
    CREDIT_UPDATE = 6
    CREDIT_REQUEST = 7


class Shutdown(IntFlag):
    """Flags of SHUTDOWN: what its sender will not do any more."""

    RECEIVE = 1
    SEND = 2


class Sequenced(IntFlag):
    """Flags of RW in a connection of type SEQPACKET."""

    END_OF_MESSAGE = 1
    END_OF_RECORD = 2


class Header(NamedTuple):
    """One header."""

    src_cid: int
    dst_cid: int
    src_port: int
    dst_port: int
    length: int = 0
    type: int = Type.STREAM
    op: int = 0
    flags: int = 0
    buf_alloc: int = 0  #: bytes the sender can hold
    fwd_cnt: int = 0  #: bytes it has passed on so far, modulo 2**32

    def encode(self) -> bytes:
        """The header's HEADER_SIZE bytes."""
        return HEADER.pack(*self)
