"""The guest's transmit queue: packets from the guest, understood and handed on.

Packets of one stream that come one after another are handed on together, so that many of them
go by one system call.
"""

from __future__ import annotations

from time import monotonic
from typing import Protocol

from ..capture import CaptureSink
from ..limits import IO_VECTORS_MAX
from .capture import record
from .host_stream import VirtioConnection
from .kick_coalescing import KickCoalescing
from .limits import VIRTIO_PACKETS_PER_TURN_MAX
from .packet import HEADER, HEADER_SIZE, Header, Op, Type
from .ring import Ring, RingError, total_length

_unpack_header = HEADER.unpack_from
_RW = int(Op.RW)
_STREAM = int(Type.STREAM)


class Receiver(Protocol):
    """Where packets go."""

    #: by the peer's CID and port and the guest's port
    connections: dict[tuple[int, int, int], VirtioConnection]

    @property
    def backpressured(self) -> bool:
        """Whether no more packets are to be looked at now."""

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        """A packet without payload for anybody; its credit was taken note of."""

    def mark_dirty(self, connection: VirtioConnection) -> None:
        """What the guest may be sent, or is to be told, has changed."""


class TransmitQueue:
    """Takes packets of the guest ``cid``."""

    def __init__(self, ring: Ring, cid: int, receiver: Receiver, capture: CaptureSink) -> None:
        self.packets = 0  #: taken in the last turn
        self._ring = ring
        self._cid = cid
        self._receiver = receiver
        self._capture = capture

    def stop(self) -> int:
        """Let go of the guest's memory; returns where to go on."""
        self._ring.rewind()
        self._ring.publish()
        return self._ring.base

    def run(self, coalescing: KickCoalescing) -> tuple[bool, bool]:
        """Take packets, for a turn.

        Returns whether there are more, and whether the guest wants to be told.  If there are
        no more, a kick will come with as many as ``pace`` asks for, by what came now.
        """
        receiver, pop = self._receiver, self._ring.pop
        connections = receiver.connections
        heads: list[int] = []
        batched: VirtioConnection | None = None  # whose payload was collected and not yet handed on
        views: list[memoryview] = []
        length = 0
        payload_bytes = 0  # bytes of payload
        counted = False
        more = True
        cid, capture = self._cid, self._capture
        turn = 0 if receiver.backpressured else VIRTIO_PACKETS_PER_TURN_MAX
        while turn:
            turn -= 1
            chain = pop()
            if chain is None:
                if batched is not None and coalescing.packets == 1:  # an answer may be waited for
                    batched.forward(views, length)
                    receiver.mark_dirty(batched)
                    batched, views, length = None, [], 0
                if not counted:  # those that come just now are not counted
                    coalescing.on_packets(len(heads), payload_bytes, monotonic())
                    counted = True
                if self._ring.enable_notification(coalescing.packets):
                    continue
                more = False
                break
            head, parts, writable = chain
            if writable:
                raise RingError("a buffer of the transmit queue that is not to be read")
            heads.append(head)
            # As Linux has it, without a call: the header apart from the payload.
            if len(parts) == 2 and len(parts[0]) == HEADER_SIZE:
                fields = _unpack_header(parts[0])
                del parts[0]
            else:
                fields = _pop_header(parts)
            if capture.recorders:
                record(capture, HEADER.pack(*fields), parts)
            src_cid, dst_cid, src_port, dst_port, size, type_, op, flags, alloc, fwd = fields
            connection = connections.get((dst_cid, dst_port, src_port))
            if connection is not None and connection.type == type_ and src_cid == cid:
                connection.send.update(alloc, fwd)
                if op == _RW:
                    payload_bytes += size
                    if (len(parts) != 1 or len(parts[0]) != size) and not _truncate(parts, size):
                        connection.reset()
                    elif connection.on_payload(size):
                        if type_ != _STREAM:
                            connection.forward_fragment(parts, size, flags)
                        elif size:
                            if (
                                connection is not batched
                                or len(views) + len(parts) > IO_VECTORS_MAX
                            ):
                                if batched is not None:
                                    batched.forward(views, length)
                                    receiver.mark_dirty(batched)
                                batched, views, length = connection, parts, size
                            else:
                                views += parts
                                length += size
                            continue
                    receiver.mark_dirty(connection)
                    continue
            if batched is not None:  # first what came first
                batched.forward(views, length)
                receiver.mark_dirty(batched)
                batched, views, length = None, [], 0
            receiver.receive(Header(*fields), connection)
            if receiver.backpressured:
                break
        if batched is not None:
            batched.forward(views, length)
            receiver.mark_dirty(batched)
        push = self._ring.push
        for head in heads:
            push(head, 0)
        self.packets = len(heads)
        return more, self._ring.publish()


def _pop_header(parts: list[memoryview]) -> tuple[int, ...]:
    """Read the header, once, and take it off ``parts``."""
    if not parts:
        raise RingError("a packet without a header")
    first = parts[0]
    if len(first) >= HEADER_SIZE:
        fields = _unpack_header(first)
        if len(first) == HEADER_SIZE:
            del parts[0]
        else:
            parts[0] = first[HEADER_SIZE:]
        return fields
    data = b""
    while parts and len(data) < HEADER_SIZE:
        part = parts.pop(0)
        missing = HEADER_SIZE - len(data)
        data += part[:missing]
        if len(part) > missing:
            parts.insert(0, part[missing:])
    if len(data) < HEADER_SIZE:
        raise RingError(f"a packet of {len(data)} bytes")
    return _unpack_header(data)


def _truncate(parts: list[memoryview], size: int) -> bool:
    """Make ``parts`` ``size`` bytes long; False when they are shorter."""
    there = len(parts[0]) if len(parts) == 1 else total_length(parts)
    while there > size:
        excess = there - size
        last = parts.pop()
        if len(last) > excess:
            parts.append(last[:-excess])
            return True
        there -= len(last)
    return there == size
