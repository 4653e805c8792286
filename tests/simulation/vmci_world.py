"""The VMCI device with its hypervisor, transport and queue pairs, below a guest like Linux's.

The guest handles packets late, and may handle those of a connecting socket in another order; its
programs sleep when a queue is empty or full, until a packet wakes them.
"""

from __future__ import annotations

import os
import random
from collections import deque
from random import Random
from typing import Any, ClassVar, cast

from support.vmci_driver import CID, PAGE, SimulatedGuest, SimulatedStream, StubFabric
from vsockets.devices.client import ConnectRequest
from vsockets.devices.vmci import stream as stream_module
from vsockets.devices.vmci import transport
from vsockets.devices.vmci.packets import Code, Event, Handle, Kind, Packet, Shutdown, handle_value
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import Record, Role

from .engine import World, pick
from .host_program import HostProgram
from .simulated_sockets import SimulatedLoop, SimulatedSockets, pattern

HOST = 2
OPEN, REFUSING = 5000, 5001
SIZES = (300, 4096)
STREAMS = 4
BOTH = int(Shutdown.SEND | Shutdown.RECEIVE)


class SimulatedFabric(StubFabric):
    """A fabric that replies when the world decides so, and gives out simulated sockets."""

    world: VmciWorld

    def connect(self, port: int, peer: tuple[int, int], sizes: BufferSizes) -> Any:
        stream = self.world.find(port, peer)
        assert stream is not None, "a connect of no socket"
        stream.sock, ours = self.world.sockets.pair()
        stream.waits = True
        if self.world.answers_at_once:
            self.world.answer(stream)
        return ours

    def settle(self, offer: ConnectRequest, size: int = 0, error: int = 0) -> None:
        self.world.settled(offer, error)


#: Seconds for which the guest's processor waits for the reply to a connect.
CONNECT_WAIT = 0.0005


class WaitingGuest(SimulatedGuest):
    """A guest whose processor waits for the result of a datagram while the device runs."""

    def turn(self) -> None:
        loop = cast(SimulatedLoop, self.loop)
        if not loop.turn(Random(random.random())):
            loop.advance(CONNECT_WAIT)


class GuestQueue(SimulatedStream):
    """The guest's queue pair, whose packets the world sends later."""

    world: VmciWorld
    peer_port = 0

    def tell(self, kind: int, value: int = 0) -> None:
        self.world.outbox.append(Packet(kind, self.port, self.peer_port, value))


class Stream(HostProgram):
    """A stream as its two programs see it."""

    def __init__(self, port: int, peer: tuple[int, int], size: int) -> None:
        super().__init__()
        self.port, self.peer, self.size = port, peer, size
        self.waits = False  #: the host's program, for the fabric's reply
        # The guest's socket.
        self.state = "connecting"  #: or accepting, open, closed
        self.queue: GuestQueue | None = None
        self.handle: Handle | None = None
        self.reader_sleeps = self.writer_sleeps = False
        self.pages: list[int] = []


class VmciWorld(World):
    """A guest and a host that connect to each other over a VMCI device."""

    actions: ClassVar[dict[str, int]] = {
        "turn": 40,
        "interrupt": 20,
        "handle": 40,
        "transmit": 30,
        "time": 14,
        "guest_connect": 5,
        "host_connect": 5,
        "answer": 8,
        "guest_write": 14,
        "guest_read": 14,
        "host_write": 14,
        "host_read": 14,
        "guest_shutdown": 1,
        "host_shutdown": 1,
        "guest_close": 2,
        "host_close": 3,
        "resume": 1,
        "reboot": 1,
        "lose_vsockd": 1,
    }
    faults = frozenset({"resume", "reboot", "lose_vsockd"})

    def __init__(self) -> None:
        self.sockets = SimulatedSockets()
        self.loop = SimulatedLoop(self.sockets)
        self.fabric = SimulatedFabric(cast(Any, self.loop))
        self.fabric.world = self
        self.guest = WaitingGuest(cast(Any, self.loop), self.fabric)
        self.streams: list[Stream] = []
        self.inbox: deque[Packet] = deque()  # received by the guest, and not handled
        self.outbox: deque[Packet] = deque()  # of the guest, not sent yet
        self.offers: list[ConnectRequest] = []
        self.free_pages: dict[int, list[list[int]]] = {}
        self.answers_at_once = random.random() < 0.5
        self.next_port = 1024
        self.handles = 0x1000
        self._probe()

    def _probe(self) -> None:
        self.guest.probe()
        self.irqs = self.guest.enable_messages()

    def patches(self) -> list[tuple[Any, str, Any]]:
        substitute = self.sockets.select()
        return [
            (stream_module, "select", substitute),
            (stream_module, "VMCI_PUMP_ROUNDS_PER_TURN", 2),
            (transport, "select", substitute),
            (transport, "VMCI_CONNECT_WAIT_SECONDS", CONNECT_WAIT),
        ]

    def close(self) -> None:
        for stream in self.streams:
            stream.excuse()
        self.guest.device.reset()
        self.guest.device.interrupts.close()
        self.loop.close()

    def find(self, port: int, peer: tuple[int, int]) -> Stream | None:
        for stream in self.streams:
            if (stream.port, stream.peer) == (port, peer):
                return stream
        return None

    # The device

    def do_turn(self, chance: Random) -> None:
        """The device serves an event."""
        self.loop.turn(chance)

    def do_time(self, chance: Random) -> None:
        seconds = chance.choice([0.0001, 0.0003, 0.001, 0.006, 0.02])
        if seconds > 0.001:  # the guest is not that slow
            self._catch_up(chance)
        self.loop.advance(seconds)

    def _catch_up(self, chance: Random) -> None:
        self._interrupt(True)
        while self.inbox or self.outbox:
            self.do_handle(chance)
            self.do_transmit(chance)
            self._interrupt(False)

    def do_resume(self, chance: Random) -> None:
        """The machine was suspended: vsockd ends its streams, and the device tells the guest."""
        for stream in self.streams:
            stream.excuse()
            if stream.sock is not None:
                stream.sock.shutdown(2)
        self.guest.machine.hypervisor.notify_resumed()

    def do_reboot(self, chance: Random) -> None:
        """The guest starts again, without a word to its peers."""
        for stream in self.streams:
            stream.to_guest_may_end = True
            if not self._is_established(stream):
                stream.excuse()
            self._forget(stream)
        self.inbox.clear()
        self.outbox.clear()
        self.guest.device.reset()
        self._probe()

    def do_lose_vsockd(self, chance: Random) -> None:
        """The link to vsockd is closed: the device ends all streams."""
        for stream in self.streams:
            stream.excuse()
        self.guest.machine.sockets.close_all()

    def _is_established(self, stream: Stream) -> bool:
        connections = self.guest.machine.sockets._connections
        connection = connections.get((stream.port, *stream.peer))
        return connection is not None and connection.stream is not None

    # The host: the device's fabric, and programs

    def do_answer(self, chance: Random) -> None:
        """The fabric answers a connect of the guest."""
        stream = pick(chance, [one for one in self.streams if one.waits])
        if stream is not None:
            self.answer(stream)

    def answer(self, stream: Stream) -> None:
        assert stream.sock is not None
        stream.waits = False
        error = 104 if stream.peer[1] == REFUSING else 0
        record = Record(error, 0, CID, stream.port, *stream.peer, Role.CONNECTED, size=stream.size)
        try:
            stream.sock.send(record.encode())
        except BrokenPipeError:
            stream.excuse()
        if error:
            stream.excuse()
            self._host_close(stream)

    def do_host_connect(self, chance: Random) -> None:
        if len(self._alive()) >= STREAMS:
            return
        self.next_port += 1
        size = chance.choice(SIZES)
        stream = Stream(chance.choice([OPEN, OPEN, REFUSING]), (HOST, self.next_port), size)
        stream.state = "accepting"
        self.streams.append(stream)
        stream.sock, theirs = self.sockets.pair()
        offer = ConnectRequest(
            cast(Any, theirs), stream.port, stream.peer, BufferSizes(size, 128, 262_144), False
        )
        self.guest.machine.sockets.connect_to_guest(offer)

    def settled(self, offer: ConnectRequest, error: int) -> None:
        if error:
            stream = self.find(offer.port, offer.peer)
            if stream is not None:
                assert stream.port == REFUSING or stream.to_host_may_end, "refused"
                stream.excuse()

    def _alive(self) -> list[Stream]:
        self.streams = [
            one
            for one in self.streams
            if one.state != "closed" or one.sock is not None or one.handle is not None
        ]
        return self.streams

    def _host(self, chance: Random) -> Stream | None:
        stream: Stream | None = pick(
            chance, [one for one in self.streams if one.sock is not None and not one.waits]
        )
        return stream

    def do_host_write(self, chance: Random) -> None:
        stream = self._host(chance)
        # A program writes once its connect has succeeded.
        if stream is None or stream.host_finished or stream.state == "accepting":
            return
        assert stream.sock is not None
        length = chance.choice([1, 100, 299, 1000, 3000])
        try:
            stream.host_wrote += stream.sock.send(pattern(stream.host_wrote, length))
        except BlockingIOError:
            return
        except BrokenPipeError:
            ended = stream.to_guest_may_end or stream.state == "closed"
            assert ended, "a program's write fails"
            stream.host_finished = True

    def do_host_read(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None:
            stream.read(chance.choice([1, 500, 3000]))

    def do_host_shutdown(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None and stream.sock is not None and stream.state != "accepting":
            stream.host_finished = True
            stream.sock.shutdown(1)

    def do_host_close(self, chance: Random) -> None:
        stream = self._host(chance)
        if stream is not None:
            self._host_close(stream)

    def _host_close(self, stream: Stream) -> None:
        assert stream.sock is not None
        stream.host_finished = True
        if stream.state == "accepting":
            stream.excuse()
        if not stream.host_ended:
            stream.to_host_may_end = True
        stream.sock.close()
        stream.sock = None

    # The guest's driver

    def do_interrupt(self, chance: Random) -> None:
        """The guest handles the interrupts that it got."""
        self._interrupt(False)

    def _interrupt(self, always: bool) -> None:
        interrupted = always
        for fd in self.irqs:
            try:
                os.eventfd_read(fd)
                interrupted = True
            except BlockingIOError:
                pass
        if not interrupted:
            return
        for datagram in self.guest.receive():
            if datagram.source.resource == 1:
                packet = Packet.decode(datagram.payload)
                assert packet is not None
                self.inbox.append(packet)
            else:
                self._on_event(datagram.payload)

    def _on_event(self, payload: bytes) -> None:
        """Handle an event, which overtakes packets."""
        event = int.from_bytes(payload[:4], "little")
        if event == Event.QP_RESUMED:
            for stream in self.streams:
                if stream.state == "open":
                    self._close(stream)
        elif event == Event.QP_PEER_DETACH:
            handle = Handle(
                int.from_bytes(payload[8:12], "little"), int.from_bytes(payload[12:16], "little")
            )
            for stream in self.streams:
                if stream.handle == handle:
                    assert stream.state != "connecting", "a connect fails that has succeeded"
                    stream.peer_shutdown = BOTH
                    stream.reader_sleeps = stream.writer_sleeps = False

    def do_handle(self, chance: Random) -> None:
        """The guest handles a packet; others of a connecting socket may overtake its ATTACH."""
        if not self.inbox:
            return
        first = self.inbox[0]
        if first.kind == Kind.ATTACH and chance.random() < 0.5:
            ports = first.source_port, first.destination_port
            for at, other in enumerate(self.inbox):
                if at and (other.source_port, other.destination_port) == ports:
                    del self.inbox[at]
                    self._handle(other)
                    return
        self._handle(self.inbox.popleft())

    def _handle(self, packet: Packet) -> None:
        peer = HOST, packet.source_port
        stream = self.find(packet.destination_port, peer)
        if stream is None or stream.state == "closed":
            if packet.kind == Kind.REQUEST2 or (stream is None and packet.kind != Kind.RST):
                self._tell(packet.destination_port, packet.source_port, Kind.RST)
            return
        if stream.state == "connecting":
            self._handle_connecting(stream, packet)
        elif stream.state == "accepting":
            self._handle_accepting(stream, packet)
        elif packet.kind == Kind.WROTE:
            stream.reader_sleeps = False
        elif packet.kind == Kind.READ:
            stream.writer_sleeps = False
        elif packet.kind == Kind.SHUTDOWN:
            stream.peer_shutdown |= packet.value
            stream.reader_sleeps = stream.writer_sleeps = False
        elif packet.kind == Kind.RST:
            assert stream.to_guest_may_end, "a faultless stream is reset"
            self._close(stream)

    def _tell(self, port: int, peer_port: int, kind: Kind, value: int = 0, *rest: int) -> None:
        self.outbox.append(Packet(kind, port, peer_port, value, *rest))

    def _handle_connecting(self, stream: Stream, packet: Packet) -> None:
        if packet.kind == Kind.NEGOTIATE2 and stream.handle is None:
            self.handles += 1
            stream.handle = Handle(CID, self.handles)
            stream.size = packet.value
            self._alloc(stream, 0, Code.QUEUEPAIR_CREATED)
            self._tell(stream.port, stream.peer[1], Kind.OFFER, handle_value(stream.handle))
        elif packet.kind == Kind.ATTACH:
            stream.state = "open"
        else:
            if packet.kind == Kind.RST and stream.handle is None:
                stream.excuse()
            # The driver's connect fails with EPROTO, or was reset.
            assert stream.to_guest_may_end, f"a connect fails by {Kind(packet.kind).name}"
            self._close(stream)

    def _handle_accepting(self, stream: Stream, packet: Packet) -> None:
        port, peer_port = stream.port, stream.peer[1]
        if packet.kind == Kind.REQUEST2:
            if port == REFUSING:
                stream.excuse()
                stream.state = "closed"
                self._tell(port, peer_port, Kind.RST)
            else:
                stream.size = packet.value
                self._tell(port, peer_port, Kind.NEGOTIATE2, packet.value, 0, 1)
        elif packet.kind == Kind.OFFER:
            stream.handle = packet.handle
            if self._alloc(stream, 1, Code.QUEUEPAIR_ATTACHED):
                stream.state = "open"
                self._tell(port, peer_port, Kind.ATTACH, handle_value(packet.handle))
            else:
                stream.handle = None
                stream.state = "closed"
        else:
            assert stream.to_guest_may_end, "a connect is reset"
            self._close(stream)

    def _alloc(self, stream: Stream, flags: int, expected: Code) -> bool:
        assert stream.handle is not None
        free = self.free_pages.setdefault(stream.size, [])
        number = 2 * (-(-stream.size // PAGE) + 1)
        pages = free.pop() if free else self.guest.pages(number)
        result = self.guest.alloc(stream.handle, stream.size, pages, flags)
        if result != expected:
            assert stream.to_guest_may_end, f"the queue pair is refused: {result}"
            free.append(pages)
            return False
        stream.queue = GuestQueue(self.guest, stream.port, stream.handle, stream.size, pages)
        stream.queue.world, stream.queue.peer_port = self, stream.peer[1]
        stream.pages = pages
        return True

    def do_transmit(self, chance: Random) -> None:
        """The guest sends a packet."""
        if self.outbox:
            packet = self.outbox.popleft()
            if packet.kind == Kind.SHUTDOWN and packet.value == 0:  # a detach, in its turn
                stream = self.find(packet.source_port, (HOST, packet.destination_port))
                if stream is not None:
                    self._detach(stream)
                return
            result = self.guest.packet(packet)
            if result < 0:
                stream = self.find(packet.source_port, (HOST, packet.destination_port))
                if stream is not None:
                    stream.excuse()
                    self._close(stream)

    def do_guest_connect(self, chance: Random) -> None:
        if len(self._alive()) >= STREAMS:
            return
        self.next_port += 1
        size = chance.choice(SIZES)
        peer = HOST, chance.choice([OPEN, OPEN, REFUSING])
        self.streams.append(Stream(self.next_port, peer, size))
        self._tell(self.next_port, peer[1], Kind.REQUEST2, size, 0, 1)

    def _guest(self, chance: Random) -> Stream | None:
        stream: Stream | None = pick(chance, [one for one in self.streams if one.state == "open"])
        return stream

    def do_guest_write(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is None or stream.writer_sleeps or stream.own_shutdown & Shutdown.SEND:
            return
        if not stream.peer_shutdown & Shutdown.RECEIVE:
            self._guest_write(stream, chance.choice([1, 100, 299, 4000]))

    def _guest_write(self, stream: Stream, length: int) -> None:
        assert stream.queue is not None
        sent = stream.queue.write(pattern(stream.guest_wrote, length))
        stream.guest_wrote += sent
        stream.writer_sleeps = sent < length

    def do_guest_read(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None and not stream.reader_sleeps:
            self._guest_read(stream)

    def _guest_read(self, stream: Stream) -> None:
        assert stream.queue is not None
        data = stream.queue.read()
        assert data == pattern(stream.guest_read, len(data)), "bytes lost or out of order"
        stream.guest_read += len(data)
        if not data:
            if stream.peer_shutdown & Shutdown.SEND:
                whole = stream.guest_read == stream.host_wrote
                assert whole or stream.to_guest_may_end, "an end before all bytes"
            else:
                stream.reader_sleeps = True

    def do_guest_shutdown(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None:
            stream.own_shutdown |= Shutdown.SEND
            self._tell(stream.port, stream.peer[1], Kind.SHUTDOWN, stream.own_shutdown)

    def do_guest_close(self, chance: Random) -> None:
        stream = self._guest(chance)
        if stream is not None:
            self._guest_close(stream)

    def _guest_close(self, stream: Stream) -> None:
        assert stream.queue is not None
        if stream.guest_read != stream.host_wrote or not stream.host_finished:
            stream.to_guest_may_end = True
        stream.own_shutdown = BOTH
        self._close(stream)

    def _close(self, stream: Stream) -> None:
        """Close a socket: its queue pair is detached after the packets that it has sent."""
        stream.state = "closed"
        if stream.handle is not None:
            self._tell(stream.port, stream.peer[1], Kind.SHUTDOWN, 0)

    def _detach(self, stream: Stream) -> None:
        if stream.handle is not None:
            assert self.guest.detach(stream.handle) == Code.SUCCESS
            self._release(stream)

    def _release(self, stream: Stream) -> None:
        if stream.queue is not None:
            self.free_pages[stream.size].append(stream.pages)
        stream.handle = stream.queue = None

    def _forget(self, stream: Stream) -> None:
        stream.own_shutdown = BOTH
        stream.state = "closed"
        self._release(stream)

    # Invariants

    def check(self) -> None:
        programs = {id(one.sock) for one in self.streams if one.sock is not None}
        programs |= {id(sock.peer) for sock in self.sockets.by_fd.values() if id(sock) in programs}
        machine = self.guest.machine
        ends = len([one for one in self.sockets.by_fd.values() if id(one) not in programs])
        held = len(machine.sockets._connections) + len(machine.sockets._unsent)
        assert ends <= held, "a socket of no connection"

    def _run(self, chance: Random) -> None:
        for _ in range(100):
            self.do_interrupt(chance)
            self.do_handle(chance)
            self.do_transmit(chance)
            self.do_answer(chance)
            if not self.loop.turn(chance) and not self.inbox and not self.outbox:
                break
        self.loop.advance(0.001)
        self.check()

    def quiesce(self) -> None:
        """All bytes arrive; then both sides close, and nothing is left."""
        chance = Random(0)
        for _ in range(60):
            self._run(chance)
            for stream in self.streams:
                if stream.sock is not None and not stream.waits:
                    stream.read(10_000)
                if stream.state == "open" and not stream.reader_sleeps:
                    self._guest_read(stream)
        for stream in self.streams:
            assert stream.state not in ("connecting", "accepting"), f"stuck: {stream.state}"
            if not stream.to_guest_may_end:
                assert stream.guest_read == stream.host_wrote, "stuck: host to guest"
            if not stream.to_host_may_end and stream.sock is not None:
                assert stream.host_read == stream.guest_wrote, "stuck: guest to host"
            if stream.state == "open" and not stream.to_host_may_end:
                assert not stream.writer_sleeps, "a writer sleeps beside an empty queue"
        for stream in self.streams:
            if stream.state == "open":
                self._guest_close(stream)
            if stream.sock is not None:
                self._host_close(stream)
        for _ in range(10):
            self._run(chance)
            self.loop.advance(2)
        machine = self.guest.machine
        assert machine.sockets.is_idle and machine.hypervisor.is_idle, "a stream is left"
        assert not self.sockets.by_fd, "a socket is left"
