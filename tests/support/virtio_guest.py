"""A simulated guest with a virtio-vsock driver: connections as a guest's kernel makes them."""

from __future__ import annotations

import itertools
import os
import select
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from vsockets.devices.vhost_user import messages
from vsockets.devices.vhost_user.messages import Protocol
from vsockets.devices.virtio.packet import F_SEQPACKET, HEADER, HEADER_SIZE, Header, Op, Type
from vsockets.devices.virtio.ring import (
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
)

from .packed_driver import PackedDriverRing
from .virtio_driver import DriverRing, FrontEnd, Memory

#: Features that a guest's kernel uses.
FEATURES = F_VERSION_1 | F_RING_EVENT_IDX | F_RING_INDIRECT_DESC | F_SEQPACKET

_PATIENCE = 20.0


class SimulatedGuest:
    """A guest with the CID ``cid`` whose monitor has connected to the device at ``path``.

    ``buffer`` is the payload of one receive buffer, in bytes; ``split`` puts header and payload
    into separate descriptors, as Linux before 6.3 does.  Without ``refill`` the guest provides
    only the receive buffers of :meth:`offer_buffer`.
    """

    def __init__(
        self,
        path: Path | str,
        cid: int,
        *,
        features: int = FEATURES,
        size: int = 128,
        buffer: int = 4096,
        split: bool = True,
        regions: int = 1,
        memory: int = 64 << 20,
        refill: bool = True,
    ) -> None:
        self.cid = cid
        self.memory = Memory(memory, regions)
        self.front_end = FrontEnd(path)
        self.features = self.front_end.negotiate(
            features, int(Protocol.MQ | Protocol.CONFIG | Protocol.REPLY_ACK)
        )
        event_index = bool(self.features & F_RING_EVENT_IDX)
        indirect = bool(self.features & F_RING_INDIRECT_DESC)
        kind = PackedDriverRing if self.features & F_RING_PACKED else DriverRing
        self.rings = [kind(self.memory, size, event_index, indirect) for _ in range(3)]
        self.receive, self.transmit, self.events = self.rings
        self._split = split
        self._buffer = HEADER_SIZE + buffer
        self.places: dict[int, int] = {}  # of receive buffers, by their heads
        self._event_places: dict[int, int] = {}
        self._spare: deque[int] = deque()
        self.refills = refill  #: True to provide each used buffer again
        self.arrived: deque[tuple[Header, bytes]] = deque()
        self.front_end.set_memory(self.memory)
        for index, ring in enumerate(self.rings):
            self.front_end.set_ring(index, ring)
        if refill:
            self.refill()
        self.configured_cid()  # answered after all earlier requests

    def close(self) -> None:
        """End the virtual machine at once."""
        self.front_end.close()
        for ring in self.rings:
            ring.close()
        self.memory.close()

    def configured_cid(self) -> int:
        """Return the CID from the device's configuration space."""
        wanted = messages.CONFIG.pack(0, 8, 0) + bytes(8)
        answer = self.front_end.request_reply(messages.RequestType.GET_CONFIG, wanted)
        return int.from_bytes(answer[messages.CONFIG.size :], "little")

    # Buffers for the device

    def refill(self) -> None:
        """Provide as many receive and event buffers as there is room for."""
        parts = 2 if self._split else 1
        while self.receive.has_room(parts):
            place = self._spare.popleft() if self._spare else self.memory.allocate(self._buffer)
            self.offer_buffer(place, self._buffer)
        self.receive.publish()
        while self.events.has_room(1):
            place = self.memory.allocate(8)
            self._event_places[self.events.add([(place, 8)], writable=True)] = place
        self.events.publish()

    def offer_buffer(self, place: int, size: int) -> None:
        """Add a buffer of ``size`` bytes at ``place``, header included, without publishing it."""
        chain = [(place, size)]
        if self._split and size > HEADER_SIZE:
            chain = [(place, HEADER_SIZE), (place + HEADER_SIZE, size - HEADER_SIZE)]
        self.places[self.receive.add(chain, writable=True)] = place

    # Packets

    def send(
        self,
        header: Header,
        payload: bytes = b"",
        cuts: Sequence[int] | None = None,
        publish: bool = True,
    ) -> None:
        """Send a packet; ``cuts`` are the ends of its descriptors, by default after the header."""
        data = header.encode() + payload
        parts = []
        edges = [0, *(cuts if cuts is not None else [HEADER_SIZE]), len(data)]
        place = self._room_for(len(data))
        self.memory.view[place : place + len(data)] = data
        for begin, end in itertools.pairwise(edges):
            if end > begin:
                parts.append((place + begin, end - begin))
        self._wait(lambda: bool(self.transmit.collect()) or self.transmit.has_room(len(parts)))
        self.transmit.add(parts, writable=False)
        if publish:
            self.transmit.publish()

    def _room_for(self, length: int) -> int:
        # Circular memory: old packets were read long ago.
        if not hasattr(self, "_circle"):
            self._circle = self.memory.allocate(16 << 20)
            self._at = 0
        if self._at + length > 16 << 20:
            self._wait(self._all_sent)
            self._at = 0
        place = self._circle + self._at
        self._at += length
        return place

    def _all_sent(self) -> bool:
        self.transmit.collect()
        return self.transmit.taken == self.transmit.next

    def take(self) -> bool:
        """Move arrived packets to ``arrived``; return whether there were any."""
        used = self.receive.collect()
        for head, length in used:
            place = self.places.pop(head)
            data = bytes(self.memory.view[place : place + length])
            if data:
                self.arrived.append((Header(*HEADER.unpack_from(data)), data[HEADER_SIZE:]))
            self._spare.append(place)
        if used and self.refills:
            self.refill()
        return bool(used)

    def next_packet(self, patience: float = _PATIENCE) -> tuple[Header, bytes]:
        """Return the next packet.

        Raises TimeoutError.
        """
        self._wait(lambda: bool(self.arrived) or self.take(), patience)
        return self.arrived.popleft()

    def next_event(self) -> bytes:
        """Return the next event of the event queue.

        Raises TimeoutError.
        """
        used: list[tuple[int, int]] = []
        self._wait(lambda: used.extend(self.events.collect()) or bool(used))  # type: ignore[func-returns-value]
        place = self._event_places[used[0][0]]
        return bytes(self.memory.view[place : place + used[0][1]])

    def _wait(self, condition: object, patience: float = _PATIENCE) -> None:
        assert callable(condition)
        deadline = time.monotonic() + patience
        while not condition():
            waits = [ring.call for ring in self.rings if not ring.enable_notification()]
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no packet from the device")
            if len(waits) == len(self.rings):
                for fd in select.select(waits, (), (), left)[0]:
                    os.eventfd_read(fd)

    # Connections

    def header(
        self, op: int, local: int, peer: tuple[int, int], length: int = 0, **fields: int
    ) -> Header:
        """Return a header from the port ``local``, by default with the credit of a large buffer."""
        fields = {"type": Type.STREAM, "buf_alloc": 1 << 20, "fwd_cnt": 0, **fields}
        return Header(self.cid, peer[0], local, peer[1], length, op=op, **fields)


class GuestStream:
    """An established connection of a simulated guest."""

    def __init__(
        self,
        guest: SimulatedGuest,
        local: int,
        peer: tuple[int, int],
        answer: Header,
        buf_alloc: int = 1 << 20,
        type: int = Type.STREAM,
    ) -> None:
        self.guest = guest
        self.local = local
        self.peer = peer
        self.type = type
        self.buf_alloc = buf_alloc
        self.sent = self.received = 0
        self.data = bytearray()
        self.ended = 0  #: directions that the host has shut down (Shutdown)
        self.is_reset = False
        self.note_credit(answer)

    def note_credit(self, header: Header) -> None:
        self.alloc, self.forwarded = header.buf_alloc, header.fwd_cnt

    @property
    def credit(self) -> int:
        """Number of bytes that may be sent."""
        return self.alloc - ((self.sent - self.forwarded) & 0xFFFF_FFFF)

    def packet(self, op: int, length: int = 0, flags: int = 0) -> Header:
        """Return a header of this connection."""
        return self.guest.header(
            op,
            self.local,
            self.peer,
            length,
            type=self.type,
            flags=flags,
            buf_alloc=self.buf_alloc,
            fwd_cnt=self.received & 0xFFFF_FFFF,
        )

    def send(self, data: bytes, step: int = 65536, flags: int = 0) -> None:
        """Send all of ``data`` in packets of at most ``step`` bytes, as credit allows."""
        at = 0
        while at < len(data):
            while not self.credit:
                self.receive_packet()
            part = data[at : at + min(step, self.credit)]
            last = flags if at + len(part) == len(data) else 0
            self.guest.send(self.packet(Op.RW, len(part), last), part)
            self.sent += len(part)
            at += len(part)

    def receive_packet(self) -> Header:
        """Receive the next packet and store its credit."""
        header, payload = self.guest.next_packet()
        assert (header.dst_port, header.src_cid, header.src_port) == (self.local, *self.peer)
        self.note_credit(header)
        if header.op == Op.RW:
            self.data += payload
            self.received += len(payload)
        elif header.op == Op.SHUTDOWN:
            self.ended |= header.flags
        elif header.op == Op.RST:
            self.is_reset = True
        elif header.op == Op.CREDIT_REQUEST:
            self.send_packet(Op.CREDIT_UPDATE)
        return header

    def send_packet(self, op: int, flags: int = 0) -> None:
        """Send a packet without payload."""
        self.guest.send(self.packet(op, 0, flags))

    def receive(self, size: int) -> bytes:
        """Receive exactly ``size`` bytes, with credit updates."""
        told = self.received
        while len(self.data) < size:
            self.receive_packet()
            assert not self.is_reset, "the connection was reset"
            if self.received - told > self.buf_alloc // 2:
                told = self.received
                self.send_packet(Op.CREDIT_UPDATE)
        data = bytes(self.data[:size])
        del self.data[:size]
        return data


@contextmanager
def simulated_guest(path: Path | str, cid: int, **options: int) -> Iterator[SimulatedGuest]:
    """Yield a simulated guest."""
    guest = SimulatedGuest(path, cid, **options)  # type: ignore[arg-type]
    try:
        yield guest
    finally:
        guest.close()


def connect(guest: SimulatedGuest, local: int, peer: tuple[int, int], **fields: int) -> GuestStream:
    """Connect to the host.

    Raises ConnectionResetError when the host refuses.
    """
    guest.send(guest.header(Op.REQUEST, local, peer, **fields))
    header, _ = guest.next_packet()
    if header.op == Op.RST:
        raise ConnectionResetError
    assert header.op == Op.RESPONSE, header
    return GuestStream(
        guest,
        local,
        peer,
        header,
        fields.get("buf_alloc", 1 << 20),
        fields.get("type", Type.STREAM),
    )


def accept(guest: SimulatedGuest, buf_alloc: int = 1 << 20) -> GuestStream:
    """Accept the host's next connect."""
    header, _ = guest.next_packet()
    assert header.op == Op.REQUEST, header
    stream = GuestStream(
        guest,
        header.dst_port,
        (header.src_cid, header.src_port),
        header,
        buf_alloc,
        header.type,
    )
    stream.send_packet(Op.RESPONSE)
    return stream
