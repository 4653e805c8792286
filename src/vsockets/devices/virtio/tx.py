"""The guest's transmit queue: receive packets and forward their payload.

Consecutive packets of one stream are forwarded together, with one system call.
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
    """Interface of the device for received packets."""

    #: by the peer's CID and port and the guest's port
    connections: dict[tuple[int, int, int], VirtioConnection]

    @property
    def backpressured(self) -> bool:
        """True if the guest's packets must wait until the guest has received some."""

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        """Handle a packet without payload; its credit was stored already."""

    def mark_dirty(self, connection: VirtioConnection) -> None:
        """Reconsider a connection: what can be sent to the guest may have changed."""


class TransmitQueue:
    """Receiver of packets from the guest ``cid``."""

    def __init__(self, ring: Ring, cid: int, receiver: Receiver, capture: CaptureSink) -> None:
        self.packets = 0  #: received in the last turn
        self._ring = ring
        self._cid = cid
        self._receiver = receiver
        self._capture = capture

    def stop(self) -> int:
        """Release guest memory; return the ring's base."""
        self._ring.rewind()
        self._ring.publish()
        return self._ring.base

    def run(self, coalescing: KickCoalescing) -> tuple[bool, bool]:
        """Receive packets for one turn.

        Return whether more packets are available, and whether the guest expects a used-buffer
        notification.  When the queue is empty, a kick is requested after as many packets as
        ``coalescing`` decides from the packets of this turn.
        """
        receiver, pop = self._receiver, self._ring.pop
        connections = receiver.connections
        heads: list[int] = []
        # connection of the payload that was collected and not yet forwarded
        batched: VirtioConnection | None = None
        views: list[memoryview] = []
        length = 0
        payload_bytes = 0  # bytes
        counted = False
        more = True
        cid, capture = self._cid, self._capture
        turn = 0 if receiver.backpressured else VIRTIO_PACKETS_PER_TURN_MAX
        while turn:
            turn -= 1
            chain = pop()
            if chain is None:
                # the guest may wait for a reply
                if batched is not None and coalescing.packets == 1:
                    batched.forward(views, length)
                    receiver.mark_dirty(batched)
                    batched, views, length = None, [], 0
                if not counted:  # packets that arrive from now on are not counted
                    coalescing.on_packets(len(heads), payload_bytes, monotonic())
                    counted = True
                if self._ring.enable_notification(coalescing.packets):
                    continue
                more = False
                break
            head, parts, writable = chain
            if writable:
                raise RingError("writable buffer in the transmit queue")
            heads.append(head)
            # Linux's layout, handled without a call: the header separate from the payload.
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
            if batched is not None:  # in order of arrival
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
    """Read the header, once, and remove it from ``parts``."""
    if not parts:
        raise RingError("packet without a header")
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
        raise RingError(f"packet of {len(data)} bytes (expected a header of {HEADER_SIZE})")
    return _unpack_header(data)


def _truncate(parts: list[memoryview], size: int) -> bool:
    """Truncate ``parts`` to ``size`` bytes; return False when they are shorter."""
    there = len(parts[0]) if len(parts) == 1 else total_length(parts)
    while there > size:
        excess = there - size
        last = parts.pop()
        if len(last) > excess:
            parts.append(last[:-excess])
            return True
        there -= len(last)
    return there == size
