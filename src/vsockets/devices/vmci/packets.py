"""Control packets of vSockets over VMCI: 32 bytes, the payload of a datagram.

From Linux's ``net/vmw_vsock/vmci_transport.h``.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ...protocol.vsockmon import Operation
from .datagrams import Handle

_PACKET = struct.Struct("<BBHIIIQQ")
SIZE = _PACKET.size

VERSION = 1

#: The resource that sends and receives control packets; the hypervisor (context 0) has another.
RESOURCE = 1
HYPERVISOR_RESOURCE = 15


class Kind(IntEnum):
    """Kind of a control packet; a size is that of each queue of the stream, in bytes."""

    INVALID = 0  #: unknown packet received
    REQUEST = 1  #: connect, with the proposed size
    NEGOTIATE = 2  #: accept, with the selected size
    OFFER = 3  #: handle of the created queue pair
    ATTACH = 4  #: this side has attached to the queue pair
    WROTE = 5  #: data was written to the queue
    READ = 6  #: data was read from the queue
    RST = 7
    SHUTDOWN = 8
    WAITING_WRITE = 9  #: version 1: notify after reading
    WAITING_READ = 10  #: version 1: notify after writing
    REQUEST2 = 11  #: REQUEST with the supported flow controls
    NEGOTIATE2 = 12  #: NEGOTIATE with the selected flow control


class Protocol(IntFlag):
    """Flow controls that a side supports."""

    INVALID = 0
    QUEUE_STATE = 1  #: notify when the queue stops being empty or full


class Shutdown(IntFlag):
    """Mode of SHUTDOWN: the directions that the sender closes."""

    RECEIVE = 1
    SEND = 2


class Packet(NamedTuple):
    """A control packet."""

    kind: int
    source_port: int
    destination_port: int
    value: int = 0  #: a size, handle, mode or generation
    offset: int = 0  #: of WAITING_READ and WAITING_WRITE
    protocol: int = 0  #: of REQUEST2 and NEGOTIATE2

    def encode(self) -> bytes:
        """Encode the packet."""
        return _PACKET.pack(
            VERSION,
            self.kind,
            self.protocol,
            self.source_port,
            self.destination_port,
            0,
            self.value,
            self.offset,
        )

    @classmethod
    def decode(cls, payload: bytes) -> Packet | None:
        """Decode a datagram's payload; return None if it is not a control packet."""
        if len(payload) < SIZE:
            return None
        version, kind, protocol, source, destination, _, value, offset = _PACKET.unpack_from(
            payload
        )
        if version != VERSION:
            return None
        return cls(kind, source, destination, value, offset, protocol)

    @property
    def handle(self) -> Handle:
        """The handle of the queue pair that OFFER or ATTACH carries."""
        return Handle(self.value & 0xFFFF_FFFF, self.value >> 32)


def handle_value(handle: Handle) -> int:
    """Encode a handle as the ``value`` of a packet."""
    return handle.context | handle.resource << 32


_OPERATIONS = {
    **dict.fromkeys(
        (Kind.WROTE, Kind.READ, Kind.WAITING_READ, Kind.WAITING_WRITE), Operation.CONTROL
    ),
    **dict.fromkeys((Kind.SHUTDOWN, Kind.RST, Kind.INVALID), Operation.DISCONNECT),
}


def operation_of(kind: int) -> Operation:
    """Return the operation with which a capture records a control packet of ``kind``."""
    return _OPERATIONS.get(kind, Operation.CONNECT)  # type: ignore[call-overload,no-any-return]
