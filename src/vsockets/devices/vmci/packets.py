"""Layouts and numbers: VMCI datagrams, and the control packets of vSockets in them.

Datagrams are messages between guests, hypervisor and host.  A control packet, of 32 bytes, is the
payload of a datagram; the layout is that of Linux's ``net/vmw_vsock/vmci_transport.h``.
"""

from __future__ import annotations

import struct
from enum import IntEnum, IntFlag
from typing import NamedTuple

from ...protocol.vsockmon import Operation

#: The header: destination and source (context, resource), and the number of bytes that follow.
HEADER = struct.Struct("<IIIIQ")

#: The largest datagram, header included.
LARGEST = 17 * 4096

INVALID_ID = 0xFFFF_FFFF

#: Marker of the end of datagrams in a buffer: a datagram whose destination is no resource.
TERMINATOR = HEADER.pack(INVALID_ID, INVALID_ID, INVALID_ID, INVALID_ID, 0)

#: The resource of a guest that receives events.
EVENT_HANDLER = 0

_EVENT = struct.Struct("<II")
_HANDLE_AND_PEER = struct.Struct("<IIII")


class Hypercall(IntEnum):
    """Hypercall: a resource of the hypervisor, context 0."""

    RESOURCES_QUERY = 0
    GET_CONTEXT_ID = 1
    SET_NOTIFY_BITMAP = 2
    DOORBELL_LINK = 3
    DOORBELL_UNLINK = 4
    DOORBELL_NOTIFY = 5
    EVENT_SUBSCRIBE = 8
    EVENT_UNSUBSCRIBE = 9
    QUEUEPAIR_ALLOC = 10
    QUEUEPAIR_DETACH = 11


#: The last resource of context 0 that is reserved for hypercalls; the highest are obsolete.
LAST_HYPERCALL = 13


class Code(IntEnum):
    """Result of a guest's datagram; negative values are errors."""

    SUCCESS = 0
    QUEUEPAIR_CREATED = 4
    QUEUEPAIR_ATTACHED = 5
    INVALID_RESOURCE = -1
    INVALID_ARGS = -2
    NO_MEM = -3
    NO_ACCESS = -7
    DUPLICATE_ENTRY = -9
    DST_UNREACHABLE = -10
    PAYLOAD_TOO_LARGE = -11
    NO_RESOURCES = -19
    UNAVAILABLE = -20
    NOT_FOUND = -21
    ALREADY_EXISTS = -22
    INVALID_SIZE = -24
    EVENT_UNKNOWN = -29


class Event(IntEnum):
    """Event that the hypervisor reports to a guest."""

    CTX_ID_UPDATE = 0
    CTX_REMOVED = 1
    QP_RESUMED = 2
    QP_PEER_ATTACH = 3
    QP_PEER_DETACH = 4


class Handle(NamedTuple):
    """Address of a resource of a context."""

    context: int
    resource: int


class Datagram(NamedTuple):
    """A datagram between two resources."""

    destination: Handle
    source: Handle
    payload: bytes

    def encode(self) -> bytes:
        """Encode the datagram: header and payload."""
        return HEADER.pack(*self.destination, *self.source, len(self.payload)) + self.payload

    @classmethod
    def decode(cls, data: bytes) -> Datagram | None:
        """Decode the datagram at the start of ``data``; return None if it is incomplete."""
        if len(data) < HEADER.size:
            return None
        context, resource, own_context, own_resource, size = HEADER.unpack_from(data)
        if size > len(data) - HEADER.size:
            return None
        payload = data[HEADER.size : HEADER.size + size]
        return cls(Handle(context, resource), Handle(own_context, own_resource), payload)


def _event(cid: int, event: Event, payload: bytes) -> bytes:
    data = _EVENT.pack(event, 0) + payload
    return Datagram(Handle(cid, EVENT_HANDLER), Handle(0, 0), data).encode()


def context_event(cid: int, event: Event, about: int) -> bytes:
    """Encode an event datagram for the guest ``cid``, about the context ``about``."""
    return _event(cid, event, _EVENT.pack(about, 0))


def queue_pair_event(cid: int, event: Event, handle: Handle, peer: int) -> bytes:
    """Encode an event datagram for the guest ``cid``, about a queue pair shared with ``peer``."""
    return _event(cid, event, _HANDLE_AND_PEER.pack(*handle, peer, 0))


_PACKET = struct.Struct("<BBHIIIQQ")
_CONTROL_DATAGRAM = struct.Struct(HEADER.format + _PACKET.format[1:])
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

    def encode_datagram(self, destination: Handle, source: Handle) -> bytes:
        """Encode a datagram that carries the packet."""
        kind, source_port, destination_port, value, offset, protocol = self
        return _CONTROL_DATAGRAM.pack(
            *destination, *source, SIZE,
            VERSION, kind, protocol, source_port, destination_port, 0, value, offset,
        )  # fmt: skip

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
