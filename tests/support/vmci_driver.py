"""A simulated guest with a VMCI driver on shared memory.

It calls the objects of a device in this process, without a virtual machine.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Callable, Sequence
from time import monotonic

from vsockets.devices.byte_reports import ByteReports
from vsockets.devices.capture import CaptureSink
from vsockets.devices.client import ConnectRequest
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vfio_user import Irq, Region
from vsockets.devices.vmci.device import MAPPED_REGISTERS, MMIO_REGISTERS, Control, Register
from vsockets.devices.vmci.machine import VmciMachine
from vsockets.devices.vmci.packets import (
    HEADER,
    LARGEST,
    Code,
    Datagram,
    Handle,
    Hypercall,
    Kind,
    Packet,
    handle_value,
)
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import Record, Role

PAGE = 4096
MEMORY = 8 << 20
CID = 3

ANONYMOUS = Handle(0xFFFF_FFFF, 0xFFFF_FFFF)
_OUT, _IN, _IN_DATA, _QUEUES = 0, 0x20_000, 0x21_000, 0x40_000


class StubFabric:
    """A fabric that accepts every stream and keeps every datagram."""

    on_datagram: Callable[[tuple[int, int], int, bytes], bool]  #: set by the device
    on_resized: Callable[[int, tuple[int, int], int], None]  #: set by the device

    def __init__(self, loop: DeviceLoop) -> None:
        self.streams: list[socket.socket] = []
        self.datagrams: list[tuple[int, tuple[int, int], bytes]] = []
        self.settled: list[tuple[int, int]] = []
        self.refused: list[socket.socket] = []  #: sockets returned to vsockd
        self.error = 0
        self.is_slow = False  #: replies to connects are sent by :meth:`reply`
        self.replies: list[tuple[socket.socket, bytes]] = []
        self.capture = CaptureSink(loop)
        self.byte_reports = ByteReports(loop, CID, lambda message: None)

    def connect(self, port: int, peer: tuple[int, int], sizes: BufferSizes) -> socket.socket:
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        theirs.setblocking(False)
        size = sizes.size if 128 <= sizes.size <= 262_144 else 65_536
        local = (CID, port)
        record = Record(self.error, 0, *local, *peer, Role.CONNECTED, 0, 0, 0, size)
        self.replies.append((theirs, record.encode()))
        self.streams.append(theirs)
        if not self.is_slow:
            self.reply()
        return ours

    def reply(self) -> None:
        """Reply to the connects."""
        for stream, record in self.replies:
            with contextlib.suppress(OSError):  # the device has closed its end
                stream.send(record)
        self.replies.clear()

    def settle(self, offer: ConnectRequest, size: int = 0, error: int = 0) -> None:
        self.settled.append((size, error))
        if error:
            self.refused.append(offer.sock.dup())

    def send(self, port: int, destination: tuple[int, int], payload: bytes) -> None:
        if self.error:
            raise OSError(self.error, "as was asked for")
        self.datagrams.append((port, destination, payload))
        del self.datagrams[:-100]

    def resume_datagrams(self) -> None:
        pass

    def close(self) -> None:
        for stream in self.streams + self.refused:
            stream.close()
        self.streams.clear()
        self.refused.clear()
        self.capture.close()


def turn_until(turn: Callable[[], None], reached: Callable[[], bool]) -> None:
    """Call ``turn`` until ``reached`` is true; fail after ten seconds."""
    end = monotonic() + 10
    while not reached():
        assert monotonic() < end, "the device does not finish"
        turn()


class SimulatedGuest:
    """One guest with its device; :meth:`probe` does what a starting driver does."""

    waits = True  #: the driver polls the result of a datagram

    def __init__(self, loop: DeviceLoop | None = None, fabric: StubFabric | None = None) -> None:
        self.loop = loop or DeviceLoop()
        self.fabric = fabric or StubFabric(self.loop)
        self.machine = VmciMachine(self.loop, self.fabric, CID)  # type: ignore[arg-type]
        self.device = self.machine.device
        fd = os.memfd_create("guest")
        os.ftruncate(fd, MEMORY)
        self.device.memory.map(0, MEMORY, True, fd, 0)
        os.close(fd)
        self.memory = self.device.memory.view(0, MEMORY)
        self._page = _QUEUES // PAGE

    def close(self) -> None:
        self.device.reset()
        self.fabric.close()
        self.loop.turn()

    # Registers

    def store(self, register: int, value: int, posted: bool = False) -> None:
        data = (value & 0xFFFF_FFFF).to_bytes(4, "little")
        self.device.write(Region.BAR1, MMIO_REGISTERS + register, data, posted)

    def load(self, register: int) -> int:
        data = self.device.read(Region.BAR1, MMIO_REGISTERS + register, 4)
        return int.from_bytes(data, "little", signed=True)

    def probe(self) -> None:
        self.store(Register.CAPS, self.load(Register.CAPS))
        self.store(Register.GUEST_PAGE_SHIFT, 12)
        self.store(Register.DATA_IN_HIGH, 0)
        self.store(Register.DATA_OUT_HIGH, 0)
        self.store(Register.IMR, 7)
        self.enable_messages()
        self.store(Register.CONTROL, Control.INT_ENABLE)

    def enable_messages(self) -> list[int]:
        """Enable MSI-X; return the eventfds of its vectors, which the device owns."""
        eventfds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(3)]
        self.device.interrupts.set(0x24, Irq.MSIX, 0, 3, eventfds)
        return eventfds

    # Datagrams

    def send_raw(self, data: bytes, size: int | None = None, at: int = _OUT) -> int:
        header = struct.pack("<IIIIq", 1, 0, len(data) if size is None else size, 0, 0)
        if 0 <= at <= MEMORY - len(header) - len(data):
            self.memory[at : at + len(header) + len(data)] = header + data
            self.memory[at] = 1  # busy
        self.store(Register.DATA_OUT_LOW, at)
        if self.waits and 0 <= at <= MEMORY - len(header) - len(data):
            turn_until(self.turn, lambda: not self.memory[at])
        return self.load(Register.RESULT_LOW)

    def turn(self) -> None:
        """Run the device's loop once."""
        self.loop.turn()

    def send(self, destination: Handle, payload: bytes, source: Handle = ANONYMOUS) -> int:
        return self.send_raw(Datagram(destination, source, payload).encode())

    def call(self, hypercall: int, payload: bytes = b"") -> int:
        return self.send(Handle(0, hypercall), payload)

    def packet(self, packet: Packet, peer: int = 2) -> int:
        return self.send(Handle(peer, 1), packet.encode(), Handle(CID, 1))

    def offer_buffer(self, posted: bool = False) -> None:
        """Provide the buffer for datagrams to the device."""
        self.memory[_IN : _IN + 24] = struct.pack("<IIIIq", 0, 1, 1, 0, 0)
        self.memory[_IN + 24 : _IN + 40] = struct.pack("<QQ", _IN_DATA, LARGEST)
        self.store(Register.DATA_IN_LOW, _IN, posted)

    @property
    def buffer_is_filled(self) -> bool:
        """True once the device has filled the buffer."""
        return self.memory[_IN] == 1

    def receive(self) -> list[Datagram]:
        """Return the datagrams that wait for the guest."""
        received: list[Datagram] = []
        while True:
            self.offer_buffer()
            assert self.buffer_is_filled, "it is done"
            at, before = 0, len(received)
            while at + HEADER.size <= LARGEST:
                data = bytes(self.memory[_IN_DATA + at : _IN_DATA + LARGEST])
                datagram = Datagram.decode(data)
                if datagram is None or datagram.destination.resource == 0xFFFF_FFFF:
                    break
                received.append(datagram)
                at += (HEADER.size + len(datagram.payload) + 7) & ~7
            if len(received) == before:
                return received

    def packets(self) -> list[Packet]:
        """Return the control packets that wait for the guest."""
        decoded = (Packet.decode(one.payload) for one in self.receive() if one.source.resource == 1)
        return [packet for packet in decoded if packet is not None]

    # Streams

    def pages(self, number: int) -> list[int]:
        first = self._page
        self._page += number
        if self._page > MEMORY // PAGE:
            first, self._page = _QUEUES // PAGE, _QUEUES // PAGE + number
        return list(range(first, first + number))

    def alloc(self, handle: Handle, size: int, pages: Sequence[int], flags: int = 0) -> int:
        payload = struct.pack("<IIIIQQQ", *handle, 2, flags, size, size, len(pages))
        return self.call(
            Hypercall.QUEUEPAIR_ALLOC, payload + struct.pack(f"<{len(pages)}Q", *pages)
        )

    def connect(self, port: int, size: int) -> SimulatedStream:
        """Connect as a guest does; the other end is the fabric's newest stream."""
        self.packet(Packet(Kind.REQUEST2, port, 5000, size, 0, 1))
        (answer,) = self.packets()
        assert answer.kind == Kind.NEGOTIATE2, answer
        size = answer.value
        handle = Handle(CID, 0x1000 + port)
        pages = self.pages(2 * (-(-size // PAGE) + 1))
        assert self.alloc(handle, size, pages) == Code.QUEUEPAIR_CREATED
        self.packet(Packet(Kind.OFFER, port, 5000, handle_value(handle)))
        (answer,) = self.packets()
        assert answer.kind == Kind.ATTACH, answer
        return SimulatedStream(self, port, handle, size, pages)

    def detach(self, handle: Handle) -> int:
        return self.call(Hypercall.QUEUEPAIR_DETACH, struct.pack("<II", *handle))


class MappingGuest(SimulatedGuest):
    """A guest whose monitor maps registers."""

    def __init__(self) -> None:
        super().__init__()
        self._words = self.device.mapped[Region.BAR1].view.cast("I")

    def store(self, register: int, value: int, posted: bool = False) -> None:
        if register < MAPPED_REGISTERS:
            self._words[register >> 2] = value & 0xFFFF_FFFF
        else:
            super().store(register, value, posted)

    def load(self, register: int) -> int:
        assert register < MAPPED_REGISTERS
        value: int = self._words[register >> 2]
        return value - (value >> 31 << 32)


class SimulatedStream:
    """The guest's end of a stream, with adjacent pages."""

    def __init__(
        self, guest: SimulatedGuest, port: int, handle: Handle, size: int, pages: Sequence[int]
    ) -> None:
        self._guest = guest
        self.port = port
        self.handle = handle
        self.size = size
        self.said: list[int] = []  #: kinds of the control packets sent
        half = len(pages) // 2
        start, second = pages[0] * PAGE, pages[half] * PAGE
        self._ours = guest.memory[start : start + 24].cast("Q")
        self._theirs = guest.memory[second : second + 24].cast("Q")
        self.produce = guest.memory[start + PAGE : start + PAGE + size]
        self._consume = guest.memory[second + PAGE : second + PAGE + size]

    def set_indices(self, tail: int, head: int) -> None:
        self._ours[1], self._ours[2] = tail, head

    def tell(self, kind: int, value: int = 0) -> None:
        self.said.append(kind)
        self._guest.packet(Packet(kind, self.port, 5000, value))

    def write(self, data: bytes) -> int:
        """Write as much of ``data`` as the queue has room for."""
        tail, head = self._ours[1], self._theirs[2]
        count = min(len(data), (head - tail - 1) % self.size)
        first = min(count, self.size - tail)
        self.produce[tail : tail + first] = data[:first]
        self.produce[: count - first] = data[first:count]
        self._ours[1] = (tail + count) % self.size
        if count and (self._ours[1] - self._theirs[2]) % self.size == count:
            self.tell(Kind.WROTE)
        return count

    @property
    def unread(self) -> int:
        """Return the number of bytes to read."""
        return int(self._theirs[1] - self._ours[2]) % self.size

    def read(self) -> bytes:
        """Read all data."""
        head, tail = self._ours[2], self._theirs[1]
        if tail >= head:
            data = bytes(self._consume[head:tail])
        else:
            data = bytes(self._consume[head:]) + bytes(self._consume[:tail])
        self._ours[2] = tail
        if data and (tail - self._theirs[1] - 1) % self.size == len(data):
            self.tell(Kind.READ)
        return data
