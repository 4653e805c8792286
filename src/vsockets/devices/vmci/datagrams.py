"""VMCI datagrams: messages between guests, hypervisor and host, and their numbers."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

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
