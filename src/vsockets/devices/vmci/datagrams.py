"""VMCI datagrams: how a guest speaks to its hypervisor, and both to everybody."""

from __future__ import annotations

import struct
from enum import IntEnum
from typing import NamedTuple

#: The header: destination and source (context, resource), and the bytes that follow.
HEADER = struct.Struct("<IIIIQ")

#: The largest datagram with its header.
LARGEST = 17 * 4096

INVALID_ID = 0xFFFF_FFFF

#: What stands where no datagram is: one whose destination is no resource.
TERMINATOR = HEADER.pack(INVALID_ID, INVALID_ID, INVALID_ID, INVALID_ID, 0)

#: The resource of a guest that events go to.
EVENT_HANDLER = 0

_EVENT = struct.Struct("<II")
_HANDLE_AND_PEER = struct.Struct("<IIII")


class Hypercall(IntEnum):
    """Resources of the hypervisor, context 0."""

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


#: Resources of context 0 below this are the hypervisor's own; the highest hypercalls are not
#: in use any more.
LAST_HYPERCALL = 13


class Code(IntEnum):
    """What a datagram is answered with; what is not negative is success."""

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
    """What the hypervisor tells a guest of its own accord."""

    CTX_ID_UPDATE = 0
    CTX_REMOVED = 1
    QP_RESUMED = 2
    QP_PEER_ATTACH = 3
    QP_PEER_DETACH = 4


class Handle(NamedTuple):
    """A resource of a context."""

    context: int
    resource: int


class Datagram(NamedTuple):
    """One datagram."""

    destination: Handle
    source: Handle
    payload: bytes

    def encode(self) -> bytes:
        """Header and payload."""
        return HEADER.pack(*self.destination, *self.source, len(self.payload)) + self.payload

    @classmethod
    def decode(cls, data: bytes) -> Datagram | None:
        """The datagram that ``data`` begins with; None when it is not all there."""
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
    """An event about the context ``about``, for the guest ``cid``; encoded."""
    return _event(cid, event, _EVENT.pack(about, 0))


def queue_pair_event(cid: int, event: Event, handle: Handle, peer: int) -> bytes:
    """An event about a queue pair and the context at its other end; encoded."""
    return _event(cid, event, _HANDLE_AND_PEER.pack(*handle, peer, 0))
