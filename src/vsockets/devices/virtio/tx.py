"""The guest's transmit queue: receive packets and forward their payload.

:class:`TransmitQueue` forwards consecutive packets of one stream together, with one system call.
:class:`KickCoalescing` decides for how many packets the guest kicks once.
:class:`TxPoll` polls the queue between kicks, and notifies the guest of used buffers.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Protocol

from ..capture import CaptureSink
from ..limits import (
    IO_VECTORS_MAX,
    VIRTIO_BUFFER_BYTES,
    VIRTIO_KICK_DELAY_SECONDS,
    VIRTIO_PACKETS_PER_KICK_MAX,
    VIRTIO_PACKETS_PER_TURN_MAX,
    VIRTIO_USED_BATCH_PACKETS,
    VIRTIO_USED_BATCH_SECONDS,
)
from ..loop import DeviceLoop, Timer
from ..vhost_user import Vring
from .connection import VirtioConnection
from .packet import HEADER, HEADER_SIZE, Header, Op, Type, record
from .ring import Ring, RingError, total_length

#: Share of the guest's credit that one batch may use; the guest continues with the rest.
_BATCH_BYTES_MAX = VIRTIO_BUFFER_BYTES * 3 // 4

#: Delay of the device's own poll, in multiples of the expected arrival time of a batch.
_DELAY_FACTOR = 2


class KickCoalescing:
    """Coalescing of kicks from a streaming guest.

    ``packets`` is the number of packets after which the guest should kick next, from the recent
    arrival rate; if it is above 1, the device also polls the ring after ``delay`` seconds.

    A kick, the device's wake-up and reading the ring's index cost more than forwarding a packet.
    A streaming guest need not kick for each packet: the device requests a kick only after some
    packets, and polls the ring by itself in case no further packets arrive.

    A guest streams when it has sent more than its credit without receiving payload, so that a
    guest that waits for replies is never delayed.  ``packets`` doubles while as many packets arrive
    in time; otherwise it falls to the number of packets that arrived.
    """

    def __init__(self) -> None:
        self.packets = 1
        self.delay = 0.0
        self._bytes_since_reply = 0  # bytes since payload was last sent to the guest
        self._last_poll = 0.0

    def on_reply(self) -> None:
        """Stop coalescing kicks, because payload was sent to the guest."""
        self._bytes_since_reply = 0
        self.packets = 1

    def on_packets(self, packets: int, length: int, now: float) -> None:
        """Account for a poll that found ``packets`` packets with ``length`` bytes of payload.

        ``now`` is the monotonic time in seconds.
        """
        interval = max(now - self._last_poll, 1e-6) / max(packets, 1)
        self._last_poll = now
        self._bytes_since_reply += length
        if self._bytes_since_reply <= VIRTIO_BUFFER_BYTES or not length:
            self.packets = 1
            return
        wanted = min(
            2 * packets if packets >= self.packets else packets, VIRTIO_PACKETS_PER_KICK_MAX
        )
        wanted = min(
            wanted,
            _BATCH_BYTES_MAX * packets // length,
            int(VIRTIO_KICK_DELAY_SECONDS / interval / _DELAY_FACTOR),
        )
        self.packets = max(wanted, 1)
        self.delay = self.packets * interval * _DELAY_FACTOR


_unpack_header = HEADER.unpack_from
_RW, _CREDIT_UPDATE = int(Op.RW), int(Op.CREDIT_UPDATE)
_STREAM = int(Type.STREAM)


class Receiver(Protocol):
    """Interface of the device to the transmit queue."""

    #: connections by peer's CID, peer's port, guest's port
    connections: dict[tuple[int, int, int], VirtioConnection]

    @property
    def backpressured(self) -> bool:
        """Backpressure flag: true while too many resets wait for receive buffers of the guest.

        While the flag is true, the queue receives no packets from the guest.
        """

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        """Handle a packet that is not payload of ``connection``.

        The credit in ``header`` was stored in ``connection`` already.
        """

    def mark_dirty(self, connection: VirtioConnection) -> None:
        """Queue a connection for sending if it has packets for the guest; close ended ones."""


class TransmitQueue:
    """Receiver of packets from the guest ``cid``, which forwards their payload to sockets."""

    def __init__(self, ring: Ring, cid: int, receiver: Receiver, capture: CaptureSink) -> None:
        self.packets = 0  #: number of packets received in the last turn
        self._ring = ring
        self._cid = cid
        self._receiver = receiver
        self._capture = capture

    def stop(self) -> int:
        """Drop all views of guest memory; return the ring's base (:attr:`.Vring.base`)."""
        self._ring.rewind()
        self._ring.publish()
        return self._ring.base

    def run(self, coalescing: KickCoalescing) -> tuple[bool, bool]:  # noqa: C901, PLR0915 - hot loop
        """Receive packets for one turn.

        Return whether more packets are available, and whether the guest expects a used-buffer
        notification.  When the queue is empty, request the next kick after the number of packets
        that ``coalescing`` computes from the packets of this turn.
        """
        receiver, pop = self._receiver, self._ring.pop
        connections = receiver.connections
        heads: list[int] = []
        # Connection whose payload was collected and not yet forwarded.
        batched: VirtioConnection | None = None
        views: list[memoryview] = []
        length = 0
        payload_bytes = 0
        counted = False
        more = True
        cid, capture = self._cid, self._capture
        turn = 0 if receiver.backpressured else VIRTIO_PACKETS_PER_TURN_MAX
        while turn:
            turn -= 1
            chain = pop()
            if chain is None:
                # The guest may wait for a reply.
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
                if op == _CREDIT_UPDATE:  # a guest sends one for each read that leaves no data
                    receiver.mark_dirty(connection)
                    continue
            if batched is not None:  # earlier payload is forwarded before this packet
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
    """Read a packet's header once, remove it from ``parts``, and return its fields."""
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
    """Truncate ``parts`` to ``size`` bytes; return whether they have that many bytes."""
    length = len(parts[0]) if len(parts) == 1 else total_length(parts)
    while length > size:
        excess = length - size
        last = parts.pop()
        if len(last) > excess:
            parts.append(last[:-excess])
            return True
        length -= len(last)
    return length == size


class TxPoll:
    """Scheduler of ``queue``: polls between kicks, and batches used-buffer notifications.

    ``poll`` is called when the queue should be polled although the guest has not kicked.
    """

    def __init__(
        self, loop: DeviceLoop, queue: TransmitQueue, vring: Vring, poll: Callable[[], None]
    ) -> None:
        self.coalescing = KickCoalescing()
        self._loop = loop
        self._queue = queue
        self._vring = vring
        self._poll = poll
        self._poll_timer: Timer | None = None
        self._notify_timer: Timer | None = None
        self._unnotified = 0  # packets received since the last used-buffer notification
        self._notify_batch = min(VIRTIO_USED_BATCH_PACKETS, vring.size // 2)
        self._notify_due = False  # the guest expects a notification

    def run(self) -> bool:
        """Receive packets for one turn; return whether more are available."""
        queue = self._queue
        more, call = queue.run(self.coalescing)
        self._unnotified += queue.packets
        if call or self._notify_due:
            self._notify_due = True
            if self._unnotified >= self._notify_batch:
                self._notify()
            elif self._notify_timer is None:
                self._notify_timer = self._loop.call_later(VIRTIO_USED_BATCH_SECONDS, self._notify)
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        if not more and self.coalescing.packets > 1:
            self._poll_timer = self._loop.call_later(self.coalescing.delay, self._poll)
        return more

    def stop(self) -> int:
        """Cancel polling and drop all views of guest memory; return the ring's base."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        if self._notify_due:
            self._notify()
        return self._queue.stop()

    def _notify(self) -> None:
        if self._notify_timer is not None:
            self._notify_timer.cancel()
            self._notify_timer = None
        self._notify_due = False
        self._unnotified = 0
        self._vring.call()
