"""vSockets' control packets over VMCI: 32 bytes, the payload of a datagram.

From Linux's ``net/vmw_vsock/vmci_transport.h``.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from .datagrams import Handle

_PACKET = struct.Struct("<BBHIIIQQ")
SIZE = _PACKET.size

VERSION = 1

#: The resource control packets come from and go to; the hypervisor's (context 0) is another.
RESOURCE = 1
HYPERVISOR_RESOURCE = 15


class Kind(IntEnum):
    """What a packet says."""

    INVALID = 0  #: what you sent is not known here
    REQUEST = 1  #: a connection, please; of this size
    NEGOTIATE = 2  #: yes; of this size
    OFFER = 3  #: here is the queue pair
    ATTACH = 4  #: and this side has attached to it
    WROTE = 5
    READ = 6
    RST = 7
    SHUTDOWN = 8
    WAITING_WRITE = 9  #: the older flow control: tell me when you have read
    WAITING_READ = 10  #: tell me when you have written
    REQUEST2 = 11  #: as REQUEST, with the flow controls one can do
    NEGOTIATE2 = 12  #: as NEGOTIATE, with the one that was chosen


class Protocol(IntFlag):
    """Flow controls."""

    INVALID = 0
    QUEUE_STATE = 1  #: tell the other side when the queue stops being empty, or full


class Shutdown(IntFlag):
    """Of SHUTDOWN: what the sender will not do any more."""

    RECEIVE = 1
    SEND = 2


class Packet(NamedTuple):
    """One control packet."""

    kind: int
    source_port: int
    destination_port: int
    value: int = 0  #: a size, a handle, a mode, or a generation
    offset: int = 0  #: of WAITING_READ and WAITING_WRITE
    protocol: int = 0  #: of REQUEST2 and NEGOTIATE2

    def encode(self) -> bytes:
        """The packet's bytes."""
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
        """What a datagram's payload says; None when it is no control packet."""
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
        """Of OFFER and ATTACH: the queue pair."""
        return Handle(self.value & 0xFFFF_FFFF, self.value >> 32)


def handle_value(handle: Handle) -> int:
    """A handle as a packet carries it."""
    return handle.context | handle.resource << 32
