"""The whole virtio device with split rings, below a guest's driver and sockets like Linux's.

A stream has a side on the host, a simulated socket, and a side in the guest, which exchanges
packets.  Each side sends bytes whose values follow from their positions.
"""

from __future__ import annotations

import os
import random
from collections import deque
from random import Random
from typing import Any, ClassVar, cast

from support.packed_driver import PackedDriverRing
from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from vsockets.devices.vhost_user import Vring
from vsockets.devices.virtio import device, rx, tx
from vsockets.devices.virtio.connection import ConnectionState
from vsockets.devices.virtio.device import VirtioVsock
from vsockets.devices.virtio.packet import HEADER, HEADER_SIZE, Header, Op, Shutdown, Type
from vsockets.devices.virtio.ring import (
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
)

from .engine import World, pick
from .host_program import HostProgram
from .simulated_sockets import SimulatedLoop, SimulatedSockets, pattern

CID, HOST = 3, 2
OPEN, REFUSING = 5000, 5001
ENTRIES = 16
GUEST_BUFFER, DEVICE_BUFFER = 8192, 20_000
ROOM = 1500  #: payload of a receive buffer
BOTH = int(Shutdown.RECEIVE | Shutdown.SEND)
FEATURES = F_VERSION_1 | F_RING_EVENT_IDX | F_RING_INDIRECT_DESC
STREAMS = 4


class Stream(HostProgram):
    """A stream as its two programs see it."""

    def __init__(self, port: int, peer: tuple[int, int]) -> None:
        super().__init__()
        self.port, self.peer = port, peer
        # The guest's socket.
        self.state = "connecting"  #: or accepting, open, closing, closed
        self.unread = bytearray()
        self.received = self.announced = 0
        self.device_buffer = self.device_forwarded = 0

    @property
    def is_excused(self) -> bool:
        return self.to_guest_may_end and self.to_host_may_end

    @property
    def key(self) -> tuple[int, int, int]:
        return *self.peer, self.port

    def room(self) -> int:
        """Return the number of bytes that the guest may send, as Linux computes it."""
        return min(self.device_buffer, GUEST_BUFFER) - (self.guest_wrote - self.device_forwarded)


class VirtioDeviceWorld(World):
    """A guest and a host that connect to each other over a device that may be reset or killed."""

    actions: ClassVar[dict[str, int]] = {
        "turn": 40,
        "interrupt": 25,
        "time": 8,
        "guest_connect": 4,
        "host_connect": 4,
        "answer": 6,
        "guest_write": 14,
        "guest_read": 14,
        "host_write": 14,
        "host_read": 14,
        "guest_shutdown": 2,
        "host_shutdown": 2,
        "guest_close": 3,
        "host_close": 3,
        "pause": 2,
        "migrate": 1,
        "kill": 1,
        "idle": 2,
    }
    faults = frozenset({"pause", "migrate", "kill", "idle"})

    def __init__(self) -> None:
        self.sockets = SimulatedSockets()
        self.loop = SimulatedLoop(self.sockets)
        self.memory = Memory(1 << 20)
        self.is_packed = random.random() < 0.3
        kind = PackedDriverRing if self.is_packed else DriverRing
        self.rings = [kind(self.memory, ENTRIES, True, True) for _ in range(3)]
        self.receive, self.transmit, self.events = self.rings
        #: QEMU does not pass the event queue to the device
        self.passed = random.choice([2, 3])
        self.vrings: list[Vring] = []
        self.streams: list[Stream] = []
        self.decisions: deque[tuple[Stream, Any]] = deque()  # of the host, on the guest's connects
        self.outbox: deque[bytes] = deque()  # packets for which the transmit queue has no entry
        self.places: dict[int, int] = {}
        self.event_places: dict[int, int] = {}
        self.spare: list[int] = []
        self.sent: dict[int, int] = {}  # places of packets in the transmit queue, by chain
        self.sent_spare: list[int] = []
        self.next_port = 1024
        self.device = self._start([ring.base for ring in self.rings])
        self._refill()

    def patches(self) -> list[tuple[Any, str, Any]]:
        return [
            (tx, "monotonic", self.loop.time),
            (rx, "select", self.sockets.select()),
            # Smaller, so that few bytes suffice for what takes many otherwise.
            (tx, "VIRTIO_BUFFER_BYTES", 2000),
            (tx, "VIRTIO_PACKETS_PER_TURN_MAX", 4),
            (device, "VIRTIO_BUFFER_BYTES", DEVICE_BUFFER),
            (device, "VIRTIO_WAITING_RESETS_MAX", 3),
        ]

    def close(self) -> None:
        self._stop()
        for ring in self.rings:
            ring.close()
        self.loop.close()
        self.memory.close()

    # The device's process

    def _start(self, bases: list[int]) -> VirtioVsock:
        self.device = VirtioVsock(cast(Any, self.loop), CID, self)
        self.device.set_features(FEATURES | (F_RING_PACKED if self.is_packed else 0))
        for address, size, _, offset in self.memory.regions:
            self.device.memory.map(address, size, True, self.memory.fd, offset)
        self.vrings = [Vring() for _ in self.rings[: self.passed]]
        for vring, ring, base in zip(self.vrings, self.rings, bases, strict=False):
            vring.size, vring.base = ring.size, base
            vring.take("kick", os.dup(ring.kick))
            vring.take("call", os.dup(ring.call))
            vring.take("error", os.dup(ring.error))
        self._start_rings()
        return self.device

    def _start_rings(self) -> None:
        for index, (vring, ring) in enumerate(zip(self.vrings, self.rings, strict=False)):
            parts = ring.descriptors, ring.available, ring.used
            addresses = cast(Any, tuple(GUEST_BASE + part for part in parts))
            self.device.start_ring(index, vring, addresses)
            vring.call()

    def _stop_rings(self) -> None:
        for index, vring in enumerate(self.vrings):
            vring.base = self.device.stop_ring(index)

    def _stop(self) -> None:
        self._stop_rings()
        for vring in self.vrings:
            vring.close()
        self.device.close()
        self.device.memory.clear()

    def do_turn(self, chance: Random) -> None:
        """The device serves an event."""
        self.loop.turn(chance)

    def do_time(self, chance: Random) -> None:
        self.loop.advance(chance.choice([0.0001, 0.001, 0.005, 0.02, 0.5]))

    def do_pause(self, chance: Random) -> None:
        """The monitor stops the rings, as for a snapshot, and starts them again."""
        self._stop_rings()
        self._start_rings()

    def do_migrate(self, chance: Random) -> None:
        """No stream survives a migration: the guest gets a transport reset."""
        self._excuse()
        self.device.reset_connections()

    def do_kill(self, chance: Random) -> None:
        """The device's process is killed, and started again by its service manager."""
        if self.is_packed:
            return  # the monitor does not find the device's position in a packed ring
        self._excuse()
        bases = [device_index(cast(DriverRing, ring)) for ring in self.rings]
        self.loop.forget()
        for vring in self.vrings:
            vring.close()
        self.device.close()
        self.decisions.clear()
        self._start(bases)

    def _excuse(self) -> None:
        for stream in self.streams:
            stream.excuse()

    # The host: the device's fabric, and programs

    def connect(self, kind: int, port: int, peer: tuple[int, int], done: Any) -> Any:
        """Implement the device's interface to the fabric."""
        (stream,) = [one for one in self.streams if (one.port, one.peer) == (port, peer)]
        decision = stream, done
        self.decisions.append(decision)

        def abandon() -> None:
            if decision in self.decisions:
                self.decisions.remove(decision)

        return abandon

    def do_answer(self, chance: Random) -> None:
        """The fabric answers a connect of the guest."""
        decision = pick(chance, self.decisions)
        if decision is None:
            return
        self.decisions.remove(decision)
        stream, done = decision
        if stream.peer[1] == REFUSING:
            stream.excuse()
            done(None)
        else:
            stream.sock, theirs = self.sockets.pair()
            done(theirs)

    def do_host_connect(self, chance: Random) -> None:
        if len(self._alive()) >= STREAMS:
            return
        self.next_port += 1
        stream = Stream(chance.choice([OPEN, OPEN, REFUSING]), (HOST, self.next_port))
        stream.state = "accepting"
        self.streams.append(stream)
        stream.sock, theirs = self.sockets.pair()
        self.device.connect_to_guest(
            cast(Any, theirs), stream.peer, stream.port, lambda error: self._reply(stream, error)
        )

    def _reply(self, stream: Stream, error: int) -> None:
        if error:
            stream.excuse()

    def _alive(self) -> list[Stream]:
        self.streams = [
            one for one in self.streams if one.state != "closed" or one.sock is not None
        ]
        return self.streams

    def _host(self, chance: Random) -> Stream | None:
        stream: Stream | None = pick(chance, [one for one in self.streams if one.sock is not None])
        return stream

    def do_host_write(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is None or stream.host_finished:
            return
        assert stream.sock is not None
        length = chance.choice([1, 100, 129, 1000, 3000])
        try:
            sent = stream.sock.send(pattern(stream.host_wrote, length))
        except BlockingIOError:
            return
        except BrokenPipeError:
            assert stream.to_guest_may_end, "a program's write fails"
            stream.host_finished = True
            return
        stream.host_wrote += sent

    def do_host_read(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None:
            stream.read(chance.choice([1, 500, 3000]))

    def do_host_shutdown(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None and stream.sock is not None:
            stream.host_finished = True
            stream.sock.shutdown(1)

    def do_host_close(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None:
            self._host_close(stream)

    def _host_close(self, stream: Stream) -> None:
        assert stream.sock is not None
        stream.host_finished = True
        if not stream.host_ended:
            stream.to_host_may_end = True
        stream.sock.close()
        stream.sock = None

    # The guest's driver

    def _refill(self) -> None:
        added = False
        while self.receive.has_room(2):
            place = self.spare.pop() if self.spare else self.memory.allocate(HEADER_SIZE + ROOM)
            parts = [(place, HEADER_SIZE), (place + HEADER_SIZE, ROOM)]
            self.places[self.receive.add(parts, writable=True)] = place
            added = True
        if added:
            self.receive.publish()
        added = False
        while self.events.has_room(1):
            place = self.memory.allocate(8)
            self.event_places[self.events.add([(place, 8)], writable=True)] = place
            added = True
        if added:
            self.events.publish()

    def do_interrupt(self, chance: Random) -> None:
        """The guest's driver handles the interrupts that it got."""
        for ring, handle in (
            (self.transmit, self._on_sent),
            (self.events, self._on_event),
            (self.receive, self._on_received),
        ):
            try:
                os.eventfd_read(ring.call)
            except BlockingIOError:
                continue
            while True:
                for head, length in ring.collect():
                    handle(head, length)
                if not ring.enable_notification():
                    break
        self._refill()
        self._flush()

    def _on_sent(self, head: int, _: int) -> None:
        self.sent_spare.append(self.sent.pop(head))

    def _on_received(self, head: int, length: int) -> None:
        place = self.places.pop(head)
        data = bytes(self.memory.view[place : place + length])
        self.spare.append(place)
        self._handle(Header(*HEADER.unpack_from(data)), data[HEADER_SIZE:])

    def _on_event(self, head: int, _: int) -> None:
        self.event_places.pop(head)
        for stream in self.streams:
            if stream.state in ("open", "closing"):
                assert stream.is_excused, "a transport reset of a new stream"
                self._reset(stream)

    def _flush(self) -> None:
        added = False
        while self.outbox and self.transmit.has_room(2):
            data = self.outbox.popleft()
            place = self.sent_spare.pop() if self.sent_spare else self.memory.allocate(4096)
            self.memory.view[place : place + len(data)] = data
            parts = [(place, HEADER_SIZE)]
            if len(data) > HEADER_SIZE:
                parts.append((place + HEADER_SIZE, len(data) - HEADER_SIZE))
            self.sent[self.transmit.add(parts, writable=False)] = place
            added = True
        if added:
            self.transmit.publish()

    def _send(self, stream: Stream, op: Op, payload: bytes = b"", flags: int = 0) -> None:
        stream.announced = stream.guest_read
        self._send_header(stream.port, stream.peer, op, payload, flags, stream.guest_read)

    def _send_header(
        self,
        port: int,
        peer: tuple[int, int],
        op: Op,
        payload: bytes = b"",
        flags: int = 0,
        forwarded: int = 0,
    ) -> None:
        header = Header(
            *(CID, peer[0], port, peer[1], len(payload), Type.STREAM, op, flags),
            *(GUEST_BUFFER, forwarded),
        )
        self.outbox.append(header.encode() + payload)
        self._flush()

    # The guest's sockets

    def _handle(self, header: Header, payload: bytes) -> None:
        assert header.dst_cid == CID, "wrong destination"
        peer = header.src_cid, header.src_port
        found = [
            one
            for one in self.streams
            if (one.port, one.peer) == (header.dst_port, peer) and one.state != "closed"
        ]
        if not found:
            if header.op != Op.RST:
                self._send_header(header.dst_port, peer, Op.RST)
            return
        stream = found[0]
        stream.device_buffer, stream.device_forwarded = header.buf_alloc, header.fwd_cnt
        if header.op == Op.RST:
            if stream.state == "connecting" and stream.sock is None:
                stream.excuse()  # the host has refused it, or did not answer in time
            whole = stream.received == stream.host_wrote and stream.host_finished
            assert stream.to_guest_may_end or whole, "a stream is reset before all bytes"
            self._reset(stream)
        elif header.op == Op.REQUEST:
            assert stream.state == "accepting"
            if stream.port == REFUSING:
                stream.excuse()
                stream.state = "closed"
                self._send(stream, Op.RST)
            else:
                stream.state = "open"
                self._send(stream, Op.RESPONSE)
        elif header.op == Op.RESPONSE:
            assert stream.state == "connecting", f"established while {stream.state}"
            stream.state = "open"
        elif header.op == Op.CREDIT_REQUEST:
            self._send(stream, Op.CREDIT_UPDATE)
        elif header.op == Op.SHUTDOWN:
            stream.peer_shutdown |= header.flags
            if stream.peer_shutdown & Shutdown.RECEIVE:
                discards = stream.to_host_may_end or stream.own_shutdown & Shutdown.SEND
                assert discards, "the host discards payload"
            if stream.peer_shutdown == BOTH and not stream.unread and stream.state == "open":
                self._send(stream, Op.RST)
                stream.state = "closed"
        elif header.op == Op.RW and stream.state == "open":
            assert payload == pattern(stream.received, len(payload)), "bytes lost or out of order"
            stream.received += len(payload)
            assert stream.received - stream.guest_read <= GUEST_BUFFER, "beyond the credit"
            stream.unread += payload

    def _reset(self, stream: Stream) -> None:
        stream.state = "closed"
        stream.unread.clear()

    def do_guest_connect(self, chance: Random) -> None:
        if len(self._alive()) >= STREAMS:
            return
        self.next_port += 1
        stream = Stream(self.next_port, (HOST, chance.choice([OPEN, OPEN, REFUSING])))
        self.streams.append(stream)
        self._send(stream, Op.REQUEST)

    def _guest(self, chance: Random) -> Stream | None:
        stream: Stream | None = pick(chance, [one for one in self.streams if one.state == "open"])
        return stream

    def do_guest_write(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is None or stream.own_shutdown & Shutdown.SEND:
            return
        if stream.peer_shutdown & Shutdown.RECEIVE:
            return
        length = min(chance.choice([1, 100, 1000, 4000]), stream.room())
        if length > 0:
            data = pattern(stream.guest_wrote, length)
            stream.guest_wrote += length
            self._send(stream, Op.RW, data)

    def do_guest_read(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None:
            self._guest_read(stream, chance.choice([1, 1000, 8000]))

    def _guest_read(self, stream: Stream, length: int) -> None:
        length = min(length, len(stream.unread))
        del stream.unread[:length]
        stream.guest_read += length
        # Linux announces its credit when a program reads from a buffer below 64 KiB.
        if stream.guest_read != stream.announced:
            self._send(stream, Op.CREDIT_UPDATE)
        if stream.peer_shutdown & Shutdown.SEND and not stream.to_guest_may_end:
            assert stream.received == stream.host_wrote, "an end before all bytes"

    def do_guest_shutdown(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None:
            stream.own_shutdown |= Shutdown.SEND
            self._send(stream, Op.SHUTDOWN, flags=stream.own_shutdown)

    def do_guest_close(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None:
            self._guest_close(stream)

    def _guest_close(self, stream: Stream) -> None:
        if stream.unread or stream.received != stream.host_wrote or not stream.host_finished:
            stream.to_guest_may_end = True
        stream.own_shutdown = BOTH
        stream.state = "closing"
        self._send(stream, Op.SHUTDOWN, flags=BOTH)

    def do_idle(self, chance: Random) -> None:
        """Programs write and read nothing for a while."""
        for _ in range(20):
            self.do_turn(chance)
            self.do_interrupt(chance)
        self.loop.advance(0.05)

    # Invariants

    def check(self) -> None:
        for ring in self.rings:
            try:
                os.eventfd_read(ring.error)
            except BlockingIOError:
                continue
            raise AssertionError("the device has disabled a ring")
        connections = self.device.connections
        by_key = {one.key: one for one in self.streams if one.state in ("open", "closing")}
        for key, connection in connections.items():
            stream = by_key.get(key)
            if stream is None or connection.state is not ConnectionState.ESTABLISHED:
                continue
            if stream.to_guest_may_end or stream.to_host_may_end:
                continue
            sent = connection.send.sent - stream.guest_read
            assert connection.send.available() <= max(GUEST_BUFFER - sent, 0), "not granted"
            assert connection.receive.held <= connection.receive.size
        ends = {id(one.sock) for one in connections.values() if one.sock is not None}
        programs = {id(one.sock) for one in self.streams if one.sock is not None}
        for sock in self.sockets.by_fd.values():
            assert id(sock) in ends or id(sock) in programs, "a socket of no connection"

    def _run(self, chance: Random) -> None:
        for _ in range(200):
            self.do_interrupt(chance)
            if self.decisions:
                self.do_answer(chance)
            if not self.loop.turn(chance) and not self.outbox:
                break
        self.loop.advance(0.02)
        self.check()

    def quiesce(self) -> None:
        """All bytes arrive; then both sides close, and nothing is left."""
        chance = Random(0)
        for _ in range(100):
            self._run(chance)
            for stream in self.streams:
                if stream.sock is not None:
                    stream.read(10_000)
                if stream.state == "open":
                    self._guest_read(stream, 10_000)
                    if stream.is_excused and not stream.own_shutdown and stream.room() > 0:
                        stream.guest_wrote += 1
                        self._send(stream, Op.RW, pattern(stream.guest_wrote - 1, 1))
        for stream in self.streams:
            if stream.is_excused and stream.state in ("connecting", "accepting"):
                stream.state = "closed"  # the connect has timed out
            assert stream.state not in ("connecting", "accepting"), f"stuck: {stream.state}"
            if not stream.to_guest_may_end:
                assert stream.received == stream.host_wrote, "stuck: host to guest"
            if not stream.to_host_may_end and stream.sock is not None:
                assert stream.host_read == stream.guest_wrote, "stuck: guest to host"
        for stream in self.streams:
            if stream.state == "open":
                self._guest_close(stream)
            if stream.sock is not None:
                self._host_close(stream)
        for _ in range(20):
            self._run(chance)
            self.loop.advance(1)
        assert not self.device.connections, f"stuck: {list(self.device.connections)}"
        assert not self.sockets.by_fd, "a socket is left"
        for stream in self.streams:
            assert stream.state in ("closed", "closing"), f"the guest waits: {stream.state}"


def device_index(ring: DriverRing) -> int:
    """Return the device's position, as a monitor finds it in the ring."""
    return int(ring._used[1])
