"""Throughput of the VMCI device alone, without a virtual machine.

A simulated guest in shared memory reports its queue as full, or empty, and touches no byte of it.
The figures cover the device, the kernel's copy and the program at the other end.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import struct
from time import perf_counter, process_time

from support.vmci_driver import SimulatedGuest
from vsockets.devices.vfio_user import Region, messages
from vsockets.devices.vfio_user.messages import Command
from vsockets.devices.vfio_user.session import Session
from vsockets.devices.vmci.device import MMIO_REGISTERS
from vsockets.devices.vmci.packets import Handle, Kind

_QUEUE = 262_144
_BUFFER = 1 << 20

_fork = multiprocessing.get_context("fork")


def _drain(sock: socket.socket) -> None:
    sock.setblocking(True)
    buffer = bytearray(_BUFFER)
    while sock.recv_into(buffer):
        pass


def _fill(sock: socket.socket) -> None:
    sock.setblocking(True)
    buffer = bytearray(_BUFFER)
    try:
        while True:
            sock.sendall(buffer)
    except OSError:
        pass


def throughput(total: int, to_guest: bool) -> float:
    """Return the MB/s of one direction through a queue of 256 KiB."""
    guest = SimulatedGuest()
    guest.probe()
    stream = guest.connect(1024, _QUEUE)
    program = guest.fabric.streams.pop()
    child = _fork.Process(target=_fill if to_guest else _drain, args=(program,))
    child.start()
    program.close()
    ours, theirs = stream._ours, stream._theirs
    moved = at = 0
    began = perf_counter()
    while moved < total:
        if to_guest:
            tail = theirs[1]
            moved += (tail - at) % _QUEUE
            if at != tail:
                ours[2] = at = tail
                stream.tell(Kind.READ)
            else:
                guest.loop.turn()
            if guest.device.backpressured:
                guest.receive()
        else:
            head = theirs[2]
            moved += (head - at) % _QUEUE
            at = head
            ours[1] = (head - 1) % _QUEUE
            stream.tell(Kind.WROTE)
            guest.loop.turn()
            if guest.device.backpressured:
                guest.receive()
    seconds = perf_counter() - began
    guest.detach(stream.handle)
    guest.close()
    child.terminate()
    child.join()
    guest.loop.close()
    return moved / seconds / 1e6


def unix(total: int) -> float:
    """Return the MB/s of a unix stream between the same two processes, in writes of 64 KiB."""
    ours, program = socket.socketpair()
    child = _fork.Process(target=_drain, args=(program,))
    child.start()
    program.close()
    block = os.urandom(65_536)
    began = perf_counter()
    for _ in range(total // len(block)):
        ours.sendall(block)
    seconds = perf_counter() - began
    ours.close()
    child.terminate()
    child.join()
    return total / seconds / 1e6


class _MeteredGuest(SimulatedGuest):
    """A guest whose register accesses are vfio-user messages; counts the device's time."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = 0.0  #: processor time of the device
        self._session, self._decoder = Session(self.device), messages.Decoder()
        payload = struct.pack("<HH", 0, 1)
        self._send(Command.VERSION, payload)
        self.probe()

    def _send(self, command: int, payload: bytes) -> bytes:
        data = messages.HEADER.pack(1, command, messages.HEADER.size + len(payload), 0, 0) + payload
        began = process_time()
        (message,) = self._decoder.receive(data)
        reply = self._session.handle(message)
        self.seconds += process_time() - began
        assert reply is not None
        return reply

    def store(self, register: int, value: int, posted: bool = False) -> None:
        access = messages.ACCESS.pack(MMIO_REGISTERS + register, Region.BAR1, 4)
        self._send(Command.REGION_WRITE, access + (value & 0xFFFF_FFFF).to_bytes(4, "little"))

    def load(self, register: int) -> int:
        access = messages.ACCESS.pack(MMIO_REGISTERS + register, Region.BAR1, 4)
        return int.from_bytes(self._send(Command.REGION_READ, access)[-4:], "little", signed=True)

    def turn(self) -> None:
        began = process_time()
        super().turn()
        self.seconds += process_time() - began

    def pages(self, number: int) -> list[int]:
        """Return runs of two pages, in descending order, as a busy kernel allocates them."""
        pages = super().pages(number)
        return [page for at in range(len(pages) - 2, -2, -2) for page in pages[max(at, 0) :][:2]]


_LIVE = 12  # a guest detaches closed streams up to a second late


def connect_cost(count: int) -> float:
    """Return the processor time, in us, that a guest's connect and detach take the device."""
    guest = _MeteredGuest()
    live: list[tuple[Handle, socket.socket]] = []
    for port in range(1024, 1024 + count + _LIVE):
        if port == 1024 + _LIVE:
            guest.seconds = 0.0
        stream = guest.connect(port, _QUEUE)
        live.append((stream.handle, guest.fabric.streams.pop()))
        if len(live) > _LIVE:
            handle, program = live.pop(0)
            guest.detach(handle)
            program.close()
    for _, program in live:
        program.close()
    guest.close()
    guest.loop.close()
    return guest.seconds / count * 1e6
