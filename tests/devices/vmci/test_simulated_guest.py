"""The device with a simulated guest: moves of real drivers and of hostile ones."""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import random
import socket
import struct
import sys
from collections.abc import Callable, Iterator

import pytest

from support.vmci_driver import CID, MEMORY, PAGE, MappingGuest, SimulatedGuest
from vsockets.devices.client import ConnectRequest
from vsockets.devices.limits import (
    VMCI_ATTACH_HOLD_SECONDS,
    VMCI_PENDING_STREAMS_MAX,
    VMCI_QUEUE_PAIRS_MAX,
)
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vfio_user import Region
from vsockets.devices.vmci.device import MMIO_REGISTERS, Caps, Cause, Control, Register
from vsockets.devices.vmci.flow_control import AttachOrdering
from vsockets.devices.vmci.packets import (
    Code,
    Datagram,
    Event,
    Handle,
    Hypercall,
    Kind,
    Packet,
    Shutdown,
    handle_value,
)
from vsockets.limits import MAX_DATAGRAM
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import Record
from vsockets.testing import wait_until

_COMMAND, _MASTER, _NO_MASTER = 4, b"\x06\x00", b"\x02\x00"


def turn_until(guest: SimulatedGuest, so: Callable[[], object]) -> None:
    def reached() -> bool:
        guest.loop.turn()
        return bool(so())

    wait_until(reached, "the device to do it")


class TestHypercalls:
    def test_hypercalls_of_a_starting_driver(self, guest: SimulatedGuest) -> None:
        query = struct.pack("<III", 1, 0, Hypercall.GET_CONTEXT_ID)
        assert guest.call(Hypercall.RESOURCES_QUERY, query) == 1
        query = struct.pack("<IIIII", 3, 0, 99, Hypercall.QUEUEPAIR_ALLOC, 1)
        assert guest.call(Hypercall.RESOURCES_QUERY, query) == 0b110
        assert guest.call(Hypercall.GET_CONTEXT_ID) == CID
        for event in range(5):
            payload = struct.pack("<II", event, 0)
            assert guest.call(Hypercall.EVENT_SUBSCRIBE, payload) == Code.SUCCESS
        assert guest.call(Hypercall.EVENT_SUBSCRIBE, bytes(7)) == Code.INVALID_ARGS
        assert guest.call(12) == Code.INVALID_RESOURCE

    def test_doorbells_set_the_bitmap(self, guest: SimulatedGuest) -> None:
        assert guest.call(Hypercall.SET_NOTIFY_BITMAP, struct.pack("<Q", 100)) == Code.SUCCESS
        handle = struct.pack("<II", CID, 7)
        link = handle + struct.pack("<Q", 33)
        assert guest.call(Hypercall.DOORBELL_LINK, link) == Code.SUCCESS
        assert guest.call(Hypercall.DOORBELL_LINK, link) == Code.ALREADY_EXISTS
        assert guest.call(Hypercall.DOORBELL_NOTIFY, handle) == Code.SUCCESS
        assert guest.memory[100 * PAGE + 33] == 1
        assert guest.call(Hypercall.DOORBELL_UNLINK, handle) == Code.SUCCESS
        assert guest.call(Hypercall.DOORBELL_NOTIFY, handle) == Code.NOT_FOUND
        beyond = handle + struct.pack("<Q", PAGE)
        assert guest.call(Hypercall.DOORBELL_LINK, beyond) == Code.INVALID_ARGS
        outside = struct.pack("<Q", MEMORY // PAGE)
        assert guest.call(Hypercall.SET_NOTIFY_BITMAP, outside) == Code.INVALID_ARGS

    def test_page_size_changes_while_pages_are_in_use(self, guest: SimulatedGuest) -> None:
        assert guest.call(Hypercall.SET_NOTIFY_BITMAP, struct.pack("<Q", 100)) == Code.SUCCESS
        queue_pair, doorbell = Handle(CID, 1), Handle(CID, 7)
        assert guest.alloc(queue_pair, PAGE, guest.pages(4)) == Code.QUEUEPAIR_CREATED
        guest.store(Register.GUEST_PAGE_SHIFT, 16)
        # The bitmap has one page of 4 KiB.
        link = struct.pack("<IIQ", *doorbell, PAGE)
        assert guest.call(Hypercall.DOORBELL_LINK, link) == Code.SUCCESS
        notify = struct.pack("<II", *doorbell)
        assert guest.call(Hypercall.DOORBELL_NOTIFY, notify) == Code.SUCCESS
        assert guest.memory[101 * PAGE] == 0
        assert guest.detach(queue_pair) == Code.SUCCESS
        assert guest.machine.hypervisor.is_idle

    @pytest.mark.parametrize(
        ("change", "code"),
        [
            ({"flags": 16}, Code.INVALID_ARGS),
            ({"produce": 0}, Code.INVALID_ARGS),
            ({"consume": 2**63}, Code.NO_RESOURCES),
            ({"count": 3}, Code.INVALID_ARGS),
            ({"count": 2**63}, Code.INVALID_ARGS),
            ({"pages": [1, 2, 3, 2**63]}, Code.INVALID_ARGS),
            ({"pages": [1, 2, 3, 3]}, Code.INVALID_ARGS),
            ({"pages": [1, 2, 3, MEMORY // PAGE]}, Code.INVALID_ARGS),
            ({"pages": [1, 2, 3]}, Code.INVALID_ARGS),
            ({"flags": 1}, Code.NOT_FOUND),
        ],
    )
    def test_invalid_queue_pairs_are_refused(
        self, guest: SimulatedGuest, change: dict[str, object], code: Code
    ) -> None:
        fields: dict[str, object] = {
            "flags": 0,
            "produce": 4096,
            "consume": 4096,
            "count": 4,
            "pages": [64, 65, 66, 67],
        }
        fields |= change
        pages = fields["pages"]
        assert isinstance(pages, list)
        payload = struct.pack(
            "<IIIIQQQ", CID, 9, 2, *(fields[n] for n in ("flags", "produce", "consume", "count"))
        )
        payload += struct.pack(f"<{len(pages)}Q", *pages)
        assert guest.call(Hypercall.QUEUEPAIR_ALLOC, payload) == code

    def test_queue_pairs_are_limited(self, guest: SimulatedGuest) -> None:
        codes = [
            guest.alloc(Handle(CID, n), 128, [64, 65, 66, 67])
            for n in range(VMCI_QUEUE_PAIRS_MAX + 1)
        ]
        assert codes[-2:] == [Code.QUEUEPAIR_CREATED, Code.NO_RESOURCES]
        assert guest.alloc(Handle(CID, 0), 128, [64, 65, 66, 67]) == Code.ALREADY_EXISTS
        assert guest.detach(Handle(CID, 0)) == guest.detach(Handle(9, 9)) == Code.SUCCESS
        assert guest.alloc(Handle(CID, 0), 128, [64, 65, 66, 67]) == Code.QUEUEPAIR_CREATED


class TestDatagrams:
    def test_interrupt_precedes_the_end_of_the_register_write(
        self, guest: SimulatedGuest, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The interrupt precedes the end of a waited-for write, and follows a posted one."""
        was_filled: list[bool] = []

        def trigger(vector: int) -> None:
            was_filled.append(guest.buffer_is_filled)

        monkeypatch.setattr(guest.device.interrupts, "trigger", trigger)
        guest.offer_buffer(posted=False)
        assert was_filled == [False] and guest.buffer_is_filled
        guest.offer_buffer(posted=True)
        assert was_filled == [False, True]

    def test_datagrams_of_every_size_in_both_directions(self, guest: SimulatedGuest) -> None:
        for size in (0, 1, 7, 8, 4096, MAX_DATAGRAM):
            payload = os.urandom(size)
            assert guest.send(Handle(2, 700), payload, Handle(CID, 800)) == 24 + size
            assert guest.fabric.datagrams.pop() == (800, (2, 700), payload)
            guest.fabric.on_datagram((2, 700), 800, payload)
            (one,) = guest.receive()
            assert one == Datagram(Handle(CID, 800), Handle(2, 700), payload)

    def test_queue_for_the_guest_is_bounded(self, guest: SimulatedGuest) -> None:
        deliver = guest.fabric.on_datagram
        assert deliver((2, 1), 2, bytes(MAX_DATAGRAM))
        assert not deliver((2, 1), 2, bytes(MAX_DATAGRAM))
        assert [len(one.payload) for one in guest.receive()] == [MAX_DATAGRAM] * 2
        assert deliver((2, 1), 2, b"")

    def test_buffer_of_several_elements_is_filled(self, guest: SimulatedGuest) -> None:
        """The elements have any sizes; datagrams that do not fit stay for the next buffer."""
        sizes = (7, 100, 1, 33)
        payloads = [bytes([number]) * number for number in (1, 8, 21, 50)]
        for payload in payloads:
            guest.fabric.on_datagram((2, 1), 2, payload)
        received = []
        for _ in range(3):
            at, elements = 0x21_000, b""
            for size in sizes:
                elements += struct.pack("<QQ", at, size)
                at += size + 50  # bytes between the elements, which stay as they are
            guest.memory[0x20_000:0x20_018] = struct.pack("<IIIIq", 0, 1, len(sizes), 0, 0)
            guest.memory[0x20_018 : 0x20_018 + len(elements)] = elements
            guest.memory[0x21_000 : at + PAGE] = b"\xee" * (at + PAGE - 0x21_000)
            guest.store(Register.DATA_IN_LOW, 0x20_000)
            data, at = b"", 0x21_000
            for size in sizes:
                data += bytes(guest.memory[at : at + size])
                assert set(guest.memory[at + size : at + size + 50]) == {0xEE}
                at += size + 50
            while (found := Datagram.decode(data)) and found.destination.resource != 0xFFFF_FFFF:
                if found.destination.context != CID:
                    break
                received.append(found.payload)
                data = data[24 + len(found.payload) + 7 & ~7 :]
        assert received == payloads

    def test_errors_are_reported_in_the_result(self, guest: SimulatedGuest) -> None:
        for error, code in [
            (errno.ECONNREFUSED, Code.INVALID_RESOURCE),
            (errno.ENOBUFS, Code.NO_RESOURCES),
            (errno.EACCES, Code.NO_ACCESS),
        ]:
            guest.fabric.error = error
            assert guest.send(Handle(2, 700), b"x", Handle(CID, 800)) == code

    def test_invalid_sizes_are_refused(self, guest: SimulatedGuest) -> None:
        for size in (0, 23, 69_633, 2**32 - 1):
            assert guest.send_raw(bytes(24), size) == Code.INVALID_ARGS
        lying = struct.pack("<IIIIQ", 2, 700, CID, 800, 2**64 - 24)
        assert guest.send_raw(lying) == Code.INVALID_ARGS
        assert guest.send_raw(bytes(24), at=MEMORY - 8) == Code.INVALID_ARGS


class TestMappedRegisters:
    @pytest.fixture
    def guest(self) -> Iterator[MappingGuest]:
        guest = MappingGuest()
        guest.probe()
        yield guest
        guest.close()
        guest.loop.close()

    def test_results_are_read_without_a_message(self, guest: MappingGuest) -> None:
        assert guest.call(Hypercall.GET_CONTEXT_ID) == CID
        assert guest.call(12) == Code.INVALID_RESOURCE
        assert guest.load(Register.RESULT_HIGH) == -1
        stream = guest.connect(1234, 4096)
        stream.write(b"mapped")
        guest.loop.turn()
        assert guest.fabric.streams[0].recv(9) == b"mapped"

    @pytest.mark.parametrize("caps", [Caps.DMA_DATAGRAM, Caps.DMA_DATAGRAM | Caps.PPN64])
    def test_capabilities_in_use(self, guest: MappingGuest, caps: Caps) -> None:
        guest.store(Register.CAPS, caps)
        assert guest.device.wide_pages == (Caps.PPN64 in caps)

    @staticmethod
    def vector_with_a_waiting_datagram(guest: MappingGuest) -> int:
        """Return a vector that is not raised, as the guest has not enabled interrupts."""
        (vector, *_) = guest.enable_messages()
        guest.store(Register.CONTROL, Control.INT_DISABLE)
        guest.machine.hypervisor.notify_removed(9)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(vector)
        return vector

    def test_interrupts_follow_control_and_mask(self, guest: MappingGuest) -> None:
        vector = self.vector_with_a_waiting_datagram(guest)
        guest.store(Register.CONTROL, Control.INT_ENABLE)
        guest.call(Hypercall.GET_CONTEXT_ID)
        assert os.eventfd_read(vector)
        assert guest.load(Register.ICR) == Cause.DATAGRAM and guest.load(Register.STATUS) == 1
        assert len(guest.receive()) == 1
        assert guest.load(Register.ICR) == Cause.DMA_DATAGRAM
        guest.store(Register.IMR, 0)
        guest.machine.hypervisor.notify_removed(9)
        with pytest.raises(BlockingIOError):
            os.eventfd_read(vector)

    def test_no_access_follows_when_interrupts_are_enabled(self, guest: MappingGuest) -> None:
        """A host's datagram may wait while Linux's driver starts."""
        vector = self.vector_with_a_waiting_datagram(guest)
        guest.store(Register.CONTROL, Control.INT_ENABLE)
        turn_until(guest, lambda: guest.load(Register.STATUS) == 1)
        assert os.eventfd_read(vector) and len(guest.receive()) == 1

    def test_interrupts_are_enabled_while_datagrams_wait(self, guest: MappingGuest) -> None:
        (vector, *_) = guest.enable_messages()
        guest.store(Register.CONTROL, Control.INT_DISABLE)
        guest.machine.hypervisor.notify_removed(8)
        guest.store(Register.CONTROL, Control.INT_ENABLE)
        guest.machine.hypervisor.notify_removed(9)
        assert os.eventfd_read(vector) and len(guest.receive()) == 2

    def test_control_changes_at_each_access(self, guest: MappingGuest) -> None:
        guest.machine.hypervisor.notify_removed(9)
        values = itertools.count(Control.INT_ENABLE, 8)
        sys.setprofile(lambda *_: guest.store(Register.CONTROL, next(values)))
        try:
            guest.device.read(Region.CONFIG, 0, 4)
        finally:
            sys.setprofile(None)
        assert len(guest.receive()) == 1

    def test_reset_waits_for_a_message(self, guest: MappingGuest) -> None:
        guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        theirs.setblocking(False)
        guest.store(Register.CONTROL, Control.RESET)
        # A reset within this call would end the stream that makes it.
        guest.machine.hypervisor.notify_removed(9)
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        guest.device.read(Region.CONFIG, 0, 4)
        assert theirs.recv(1) == b"" and guest.machine.hypervisor.is_idle
        assert guest.load(Register.CONTROL) == guest.load(Register.IMR) == 0
        guest.probe()
        guest.connect(1234, 4096)

    def test_former_client_cannot_write_the_registers(self, guest: MappingGuest) -> None:
        guest.device.on_disconnect()
        assert not guest.device.mapped, "the next client gets no memory"
        guest.store(Register.CONTROL, Control.INT_ENABLE)
        guest.store(Register.IMR, Cause.DATAGRAM)
        for register in (Register.STATUS, Register.IMR):
            assert guest.device.read(Region.BAR1, MMIO_REGISTERS + register, 4) == bytes(4)


class TestStreams:
    @pytest.mark.parametrize("size", [128, 129, 4096, 5000, 262_144])
    def test_stream_in_both_directions(self, guest: SimulatedGuest, size: int) -> None:
        stream = guest.connect(1234, size)
        theirs = guest.fabric.streams[0]
        rng = random.Random(size)
        sent, received = bytearray(), bytearray()
        back, got = bytearray(), bytearray()
        total = 4 * size + 1000
        while len(received) < total or len(got) < total:
            if len(sent) < total:
                data = rng.randbytes(min(rng.randint(1, size), total - len(sent)))
                sent += data[: stream.write(data)]
            if len(back) < total:
                data = rng.randbytes(min(rng.randint(1, 2 * size), total - len(back)))
                with contextlib.suppress(BlockingIOError):
                    back += data[: theirs.send(data)]
            guest.loop.turn()
            with contextlib.suppress(BlockingIOError):
                received += theirs.recv(1 << 20)
            guest.receive()
            got += stream.read()
        assert sent == received and back == got

    def test_flow_needs_few_notifications(self, guest: SimulatedGuest) -> None:
        """A flowing guest never finds its queue empty, and sends nothing."""
        stream = guest.connect(1234, 65_536)
        theirs = guest.fabric.streams[0]
        got = 0
        for number in range(200):
            assert stream.write(b"x" * 100) == 100
            if number == 150:  # a pause; everything must arrive without another notification
                turn_until(guest, lambda: _received_all(theirs, 15_100))
                got = 15_100
            guest.loop.turn()
        turn_until(guest, lambda: _received_all(theirs, 20_000 - got))
        assert len(stream.said) < 20

    def test_reply_is_polled(self, guest: SimulatedGuest) -> None:
        """Two sides that exchange messages are not notified: the device polls."""
        stream = guest.connect(1234, 65_536)
        theirs = guest.fabric.streams[0]
        for _ in range(20):
            stream.write(b"question")
            turn_until(guest, lambda: _received_all(theirs, 8))
            theirs.send(b"answer")
            turn_until(guest, lambda: stream.read() == b"answer")
        assert len(stream.said) < 10

    def test_reader_with_low_water_mark_is_notified_again(self, guest: SimulatedGuest) -> None:
        """SO_RCVLOWAT: the queue was not empty before, and yet the reader sleeps."""
        stream = guest.connect(1234, 65_536)
        stream.tell(Kind.READ)
        theirs = guest.fabric.streams[0]
        theirs.send(b"1")
        guest.loop.turn()
        assert [packet.kind for packet in guest.packets()] == [Kind.WROTE]
        theirs.send(b"2")
        told: list[int] = []

        def is_notified() -> bool:
            told.extend(packet.kind for packet in guest.packets())
            return bool(told)

        turn_until(guest, is_notified)
        assert told == [Kind.WROTE]

    def test_packets_wait_after_an_attach(self, guest: SimulatedGuest) -> None:
        """A connecting socket would fail; it can read data from the queue."""
        stream = guest.connect(1234, 65_536)
        theirs = guest.fabric.streams.pop()
        theirs.send(b"welcome")
        theirs.close()
        guest.loop.turn()
        assert guest.packets() == []
        assert stream.read() == b"welcome"
        told: list[int] = []

        def is_sent_all() -> bool:
            told.extend(packet.kind for packet in guest.packets())
            return len(told) == 2

        turn_until(guest, is_sent_all)
        assert told == [Kind.WROTE, Kind.SHUTDOWN]

    def test_packets_wait_longer_for_a_slow_guest(self) -> None:
        loop, sent, early = DeviceLoop(), list[Kind](), list[list[Kind]]()
        ordering = AttachOrdering(loop, lambda kind, value, offset: sent.append(kind), 1.0)
        ordering.send(Kind.WROTE, 0, 0)
        loop.call_later(2 * VMCI_ATTACH_HOLD_SECONDS, lambda: early.append(list(sent)))
        while not sent:
            loop.turn()
        loop.close()
        assert (early, sent) == ([[]], [Kind.WROTE])

    def test_packet_from_the_guest_ends_the_wait(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 65_536)
        guest.fabric.streams[0].send(b"welcome")
        guest.loop.turn()
        assert guest.packets() == []
        stream.write(b"hello")
        assert [packet.kind for packet in guest.packets()] == [Kind.WROTE]

    def test_ports_are_reused_while_the_old_queue_has_data(self, guest: SimulatedGuest) -> None:
        """The first stream's queue pair still exists: its data is not lost."""
        stream = guest.connect(1234, 65_536)
        stream.write(b"a word")
        stream.tell(Kind.WROTE)
        first = guest.fabric.streams[0]
        stream.write(b", and the last")
        guest.packet(Packet(Kind.REQUEST2, 1234, 5000, 65_536, 0, 1))
        assert [packet.kind for packet in guest.packets()] == [Kind.NEGOTIATE2]
        assert first.recv(100) == b"a word, and the last"
        assert first.recv(100) == b""
        guest.detach(stream.handle)
        turn_until(guest, lambda: not guest.packets())

    def test_ports_are_reused_after_the_program_has_closed(self, guest: SimulatedGuest) -> None:
        """Packets of the old stream would be taken for the new stream's."""
        stream = guest.connect(1235, 65_536)
        stream.tell(Kind.READ)
        guest.fabric.streams.pop().close()
        stream.set_indices(10, 0)  # ten bytes, without a notification
        guest.packet(Packet(Kind.REQUEST2, 1235, 5000, 65_536, 0, 1))
        assert [packet.kind for packet in guest.packets()] == [Kind.NEGOTIATE2]

    def test_closed_stream_sends_nothing(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 65_536)
        guest.fabric.streams[0].send(b"welcome")
        guest.loop.turn()
        guest.detach(stream.handle)
        passed: list[bool] = []
        guest.loop.call_later(2 * VMCI_ATTACH_HOLD_SECONDS, lambda: passed.append(True))
        turn_until(guest, lambda: passed)
        assert guest.packets() == []

    def test_guest_that_does_not_read_is_polled_then_notified(self, guest: SimulatedGuest) -> None:
        """The device polls for room, with a byte of the queue left; then it fills the queue."""
        stream = guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        theirs.send(bytes(10_000))
        guest.loop.turn()
        assert stream.unread == 4094
        turn_until(guest, lambda: stream.unread == 4095)
        got = len(stream.read())
        assert stream.said == [Kind.READ]
        while got < 10_000:
            guest.loop.turn()
            got += len(stream.read())
        assert got == 10_000

    def test_unread_data_survives_the_guests_close(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 262_144)
        theirs = guest.fabric.streams[0]
        total = 0
        for _ in range(10):
            total += stream.write(bytes(262_143))
        guest.detach(stream.handle)
        guest.memory[:] = bytes(MEMORY)
        turn_until(guest, lambda: _received_all(theirs, total))
        turn_until(guest, lambda: theirs.recv(1) == b"")

    def test_close_by_the_program(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 4096)
        theirs = guest.fabric.streams.pop()
        theirs.send(b"last words")
        theirs.close()
        stream.tell(Kind.READ)
        guest.loop.turn()
        received = guest.receive()
        kinds = [one.payload[1] for one in received if one.source.resource == 1]
        assert kinds == [Kind.WROTE, Kind.SHUTDOWN]
        events = [one for one in received if one.source.context == 0]
        assert [one.payload[0] for one in events] == [Event.QP_PEER_DETACH]
        assert stream.read() == b"last words"

    def test_shutdown_of_both_directions(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        stream.write(b"the last")
        stream.tell(Kind.SHUTDOWN, Shutdown.SEND)
        assert theirs.recv(100) == b"the last"
        assert theirs.recv(100) == b""
        theirs.send(b"an answer")
        guest.loop.turn()
        assert stream.read() == b"an answer"
        stream.tell(Kind.SHUTDOWN, Shutdown.RECEIVE)
        with pytest.raises(BrokenPipeError):
            theirs.send(b"x")

    @pytest.mark.parametrize("indices", [(4096, 0), (2**64 - 1, 0), (0, 4096), (5000, 5000)])
    def test_invalid_indices_abort_the_stream(
        self, guest: SimulatedGuest, indices: tuple[int, int]
    ) -> None:
        stream = guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        stream.set_indices(*indices)
        theirs.send(b"x")
        guest.loop.turn()
        stream.tell(Kind.WROTE)
        with contextlib.suppress(ConnectionResetError):  # its data was not received
            assert theirs.recv(1) == b""
        assert Kind.SHUTDOWN in [packet.kind for packet in guest.packets()]

    def test_unmapped_memory_ends_the_stream(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        guest.device.memory.unmap(0, MEMORY)
        guest.device.release_memory(0, MEMORY)
        guest.waits = False
        stream.tell(Kind.WROTE)
        assert theirs.recv(1) == b""

    def test_data_in_memory_that_is_unmapped_is_sent(self, guest: SimulatedGuest) -> None:
        """The device has looked at no byte of the queue before."""
        stream = guest.connect(1234, 4096)
        tail = stream.size - 6
        stream.produce[:tail] = data = os.urandom(tail)
        stream.set_indices(tail, 0)
        theirs = guest.fabric.streams[0]
        guest.device.memory.unmap(0, MEMORY)
        guest.device.release_memory(0, MEMORY)
        guest.loop.turn()
        assert theirs.recv(2 * stream.size) == data
        assert theirs.recv(1) == b""

    def test_handshakes_are_limited_and_counted_once(self, guest: SimulatedGuest) -> None:
        def request(port: int) -> int:
            guest.packet(Packet(Kind.REQUEST2, port, 5000, 128, 0, 1))
            (reply,) = guest.packets()
            guest.fabric.close()
            return reply.kind

        pending = range(10_000, 10_000 + VMCI_PENDING_STREAMS_MAX)
        assert {request(port) for port in pending} == {Kind.NEGOTIATE2}
        assert request(1) == Kind.RST
        assert request(pending[0]) == Kind.NEGOTIATE2  # replaces the one with this port
        assert request(1) == Kind.RST
        guest.packet(Packet(Kind.RST, pending[0], 5000))
        stream = guest.connect(2, 128)  # an established stream is not pending
        guest.fabric.close()
        assert request(3) == Kind.NEGOTIATE2
        assert request(4) == Kind.RST
        guest.detach(stream.handle)
        assert request(4) == Kind.RST
        guest.device.reset()
        guest.probe()
        assert request(4) == Kind.NEGOTIATE2

    def test_streams_go_on_while_the_fabric_connects(self, guest: SimulatedGuest) -> None:
        """vsockd's reply is outstanding; meanwhile the driver polls its buffer."""
        stream = guest.connect(1, 4096)
        theirs = guest.fabric.streams[0]
        guest.fabric.is_slow, guest.waits = True, False
        guest.packet(Packet(Kind.REQUEST2, 2, 5000, 4096, 0, 1))
        assert guest.memory[0] == 1  # busy
        theirs.send(b"meanwhile")
        guest.loop.turn()
        assert stream.read() == b"meanwhile" and guest.memory[0] == 1
        guest.fabric.reply()
        turn_until(guest, lambda: not guest.memory[0])
        assert guest.load(Register.RESULT_LOW) == 24 + 32
        assert Kind.NEGOTIATE2 in [packet.kind for packet in guest.packets()]

    def test_refusal_is_the_result_of_the_request(self, guest: SimulatedGuest) -> None:
        guest.fabric.is_slow, guest.waits = True, False
        guest.fabric.error = errno.EACCES
        guest.packet(Packet(Kind.REQUEST2, 2, 5000, 4096, 0, 1))
        guest.fabric.reply()
        turn_until(guest, lambda: not guest.memory[0])
        assert guest.load(Register.RESULT_LOW) == Code.NO_ACCESS
        assert guest.packets() == [] and guest.machine.sockets.is_idle

    def test_late_refusal_is_a_packet(self, guest: SimulatedGuest) -> None:
        """The guest's processor waits for VMCI_CONNECT_WAIT_SECONDS at most."""
        guest.fabric.is_slow = True
        guest.fabric.error = errno.EACCES
        assert guest.packet(Packet(Kind.REQUEST2, 2, 5000, 4096, 0, 1)) == 24 + 32
        guest.fabric.reply()
        guest.loop.turn()
        assert [packet.kind for packet in guest.packets()] == [Kind.RST]
        assert guest.machine.sockets.is_idle

    @pytest.mark.parametrize("how", ["request", "hypercall", "unmap", "reset"])
    def test_guest_that_does_not_wait_for_a_result(self, guest: SimulatedGuest, how: str) -> None:
        guest.fabric.is_slow, guest.waits = True, False
        guest.packet(Packet(Kind.REQUEST2, 2, 5000, 4096, 0, 1))
        if how == "request":
            request = Packet(Kind.REQUEST2, 3, 5000, 4096, 0, 1)
            datagram = Datagram(Handle(2, 1), Handle(CID, 1), request.encode())
            guest.send_raw(datagram.encode(), at=8 * PAGE)
            assert guest.memory[0] == 0 and guest.memory[8 * PAGE] == 1
        elif how == "hypercall":
            datagram = Datagram(Handle(0, Hypercall.GET_CONTEXT_ID), Handle(CID, 1), b"")
            assert guest.send_raw(datagram.encode(), at=8 * PAGE) == CID
            assert guest.memory[0] == 0 and guest.memory[8 * PAGE] == 0
        elif how == "unmap":
            guest.fabric.replies[0] = (guest.fabric.streams[0], Record(errno.EACCES).encode())
            guest.device.release_memory(MEMORY, PAGE)
            assert guest.memory[0] == 0
        else:
            guest.device.reset()
            guest.memory[0] = 1
        guest.fabric.reply()
        for _ in range(3):
            guest.loop.turn()
        if how == "hypercall":
            assert guest.load(Register.RESULT_LOW) == CID
        elif how == "unmap":
            assert [packet.kind for packet in guest.packets()] == [Kind.RST]
        elif how == "reset":
            assert guest.memory[0] == 1 and guest.load(Register.RESULT_LOW) == 0
        else:
            assert guest.memory[8 * PAGE] == 0 and guest.load(Register.RESULT_LOW) == 24 + 32
            assert [packet.kind for packet in guest.packets()] == [Kind.NEGOTIATE2] * 2

    def test_device_reset_closes_streams(self, guest: SimulatedGuest) -> None:
        stream = guest.connect(1234, 4096)
        stream.write(b"before")
        theirs = guest.fabric.streams[0]
        guest.device.reset()
        guest.loop.turn()
        assert theirs.recv(100) == b"before"
        assert theirs.recv(1) == b""
        guest.probe()
        guest.connect(1234, 4096)

    def test_kexec_revokes_memory_access(self, guest: SimulatedGuest) -> None:
        """A kernel does this to every device before kexec."""
        command, on, off = 4, b"\x06\x00", b"\x02\x00"
        guest.device.write(Region.CONFIG, command, on)
        stream = guest.connect(1234, 4096)
        stream.write(b"before")
        theirs = guest.fabric.streams[0]
        guest.device.write(Region.CONFIG, command, off)
        with contextlib.suppress(OSError):
            theirs.send(b"into memory that is somebody else's now")
        guest.loop.turn()
        assert theirs.recv(100) == b"before"
        assert theirs.recv(1) == b""
        assert stream.read() == b""

    @pytest.mark.parametrize("resets", [False, True], ids=["s2idle", "S3"])
    def test_registers_survive_sleep(self, guest: SimulatedGuest, resets: bool) -> None:
        """Linux restores configuration space and MSI-X, and nothing else of the device."""
        guest.device.write(Region.CONFIG, _COMMAND, _MASTER)
        guest.connect(1234, 4096)
        theirs = guest.fabric.streams[0]
        guest.device.write(Region.CONFIG, _COMMAND, _NO_MASTER)
        assert theirs.recv(1) == b""
        if resets:  # QEMU at wake-up
            guest.device.interrupts.close()
            guest.device.reset()
        else:
            guest.machine.hypervisor.notify_removed(9)  # a pending datagram
        eventfds = guest.enable_messages()
        guest.device.write(Region.CONFIG, _COMMAND, _MASTER)
        assert os.eventfd_read(eventfds[0])
        assert guest.load(Register.STATUS) == 1
        event = guest.receive()[-1]
        assert event.payload[:4] == struct.pack("<I", Event.QP_RESUMED)
        stream = guest.connect(1235, 4096)
        stream.write(b"awake")
        guest.loop.turn()
        assert guest.fabric.streams[1].recv(9) == b"awake"

    @pytest.mark.parametrize("how", ["kexec", "reboot after sleep", "reboot"])
    def test_new_kernel_finds_reset_registers(self, guest: SimulatedGuest, how: str) -> None:
        guest.device.write(Region.CONFIG, _COMMAND, _MASTER)
        if how != "reboot":
            guest.device.write(Region.CONFIG, _COMMAND, _NO_MASTER)
        guest.device.interrupts.close()
        if how != "kexec":
            guest.device.reset()
        guest.device.write(Region.CONFIG, _COMMAND, _MASTER)
        guest.enable_messages()
        assert guest.load(Register.IMR) == guest.load(Register.STATUS) == 0
        # the saved registers were not restored
        guest.device.write(Region.CONFIG, _COMMAND, _NO_MASTER)
        guest.device.write(Region.CONFIG, _COMMAND, _MASTER)
        assert guest.load(Register.IMR) == 0

    def test_packets_without_a_stream_are_reset(self, guest: SimulatedGuest) -> None:
        guest.packet(Packet(Kind.WROTE, 1, 2))
        assert [packet.kind for packet in guest.packets()] == [Kind.RST]
        guest.packet(Packet(Kind.RST, 1, 2))
        assert guest.packets() == []

    def test_connect_to_the_guest(self, guest: SimulatedGuest) -> None:
        ours, theirs = _pair()
        offer = ConnectRequest(ours, 80, (2, 5000), BufferSizes(4096, 128, 262_144), False)
        guest.machine.sockets.connect_to_guest(offer)
        (request,) = guest.packets()
        assert request.kind == Kind.REQUEST2 and request.value == 4096
        guest.packet(Packet(Kind.NEGOTIATE2, 80, 5000, 4096, 0, 1))
        (offered,) = guest.packets()
        wrong = [
            guest.alloc(offered.handle, 8192, [64, 65, 66, 67, 68, 69], flags=1),
            guest.alloc(offered.handle, 4096, [64, 65, 66, 67]),
        ]
        assert wrong == [Code.NOT_FOUND, Code.NO_ACCESS]
        assert guest.alloc(offered.handle, 4096, [64, 65, 66, 67], flags=1) == 5
        guest.packet(Packet(Kind.ATTACH, 80, 5000, handle_value(offered.handle)))
        assert guest.fabric.settled == [(4096, 0)]
        theirs.close()

    def test_default_size_is_proposed_as_the_guests_maximum(self, guest: SimulatedGuest) -> None:
        """The queue is as large as a guest's own; the program sees its default."""
        ours, theirs = _pair()
        guest.machine.sockets.connect_to_guest(
            ConnectRequest(ours, 80, (2, 5000), BufferSizes(), False)
        )
        (request,) = guest.packets()
        assert request.value == 262_144
        guest.packet(Packet(Kind.NEGOTIATE2, 80, 5000, 262_144, 0, 1))
        (offered,) = guest.packets()
        assert guest.alloc(offered.handle, 262_144, guest.pages(130), flags=1) == 5
        guest.packet(Packet(Kind.ATTACH, 80, 5000, handle_value(offered.handle)))
        assert guest.fabric.settled == [(65_536, 0)]
        theirs.close()

    def test_chosen_size_limits_are_kept(self, guest: SimulatedGuest) -> None:
        ours, theirs = _pair()
        sizes = BufferSizes().with_maximum(100_000)
        guest.machine.sockets.connect_to_guest(ConnectRequest(ours, 80, (2, 5000), sizes, False))
        assert [packet.value for packet in guest.packets()] == [100_000]
        theirs.close()

    def test_refused_client_returns_to_vsockd(self, guest: SimulatedGuest) -> None:
        """The client continues with vsockd, without the device."""
        ours, theirs = _pair()
        sizes = BufferSizes(4096, 128, 262_144)
        guest.machine.sockets.connect_to_guest(ConnectRequest(ours, 80, (2, 5000), sizes, False))
        guest.packet(Packet(Kind.RST, 80, 5000))
        assert guest.fabric.settled == [(0, errno.ECONNRESET)]
        (refused,) = guest.fabric.refused
        theirs.send(b"again")
        assert refused.recv(100) == b"again"
        refused.close()
        assert theirs.recv(1) == b""
        theirs.close()

    def test_guest_without_reply_times_out(self, guest: SimulatedGuest) -> None:
        ours, theirs = _pair()
        sizes = BufferSizes(4096, 128, 262_144)
        guest.machine.sockets.connect_to_guest(ConnectRequest(ours, 80, (2, 5000), sizes, False))
        turn_until(guest, lambda: guest.fabric.settled)
        assert guest.fabric.settled == [(0, errno.ETIMEDOUT)]
        assert [one.kind for one in guest.packets()] == [Kind.REQUEST2, Kind.RST]
        theirs.close()


def _pair() -> tuple[socket.socket, socket.socket]:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs


_taken: dict[int, int] = {}


def _received_all(sock: socket.socket, total: int) -> bool:
    """Receive data; return whether ``total`` bytes have arrived."""
    key = id(sock)
    with contextlib.suppress(BlockingIOError):
        _taken[key] = _taken.get(key, 0) + len(sock.recv(1 << 20))
    if _taken.get(key) == total:
        del _taken[key]
        return True
    return False
