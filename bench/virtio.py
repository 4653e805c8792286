"""Throughput of the virtio device alone, without a virtual machine.

A simulated guest in shared memory offers packets of 64 KiB, or buffers of 4 KiB as Linux does, and
touches none of their bytes.  The figures cover the device, the kernel's copy and the program at
the other end.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
from collections.abc import Callable
from time import perf_counter, process_time

from support.virtio_driver import GUEST_BASE, DriverRing, Memory
from vsockets.devices.loop import DeviceLoop
from vsockets.devices.vhost_user import Vring
from vsockets.devices.virtio.device import RECEIVE, TRANSMIT, VirtioVsock
from vsockets.devices.virtio.packet import HEADER, HEADER_SIZE, Header, Op
from vsockets.devices.virtio.ring import F_RING_PACKED

from .vmci import _drain, _fill

_CID = 3
_RING = 128
_PACKET = 65_536
_BUFFER = 4096
_PACKETS_AT_ONCE = 4  # the limit of a guest's credit

_fork = multiprocessing.get_context("fork")


class _Guest:
    """A device and a simulated guest with one connection to ``program``."""

    def __init__(self) -> None:
        self.loop = DeviceLoop()
        self.device = VirtioVsock(self.loop, _CID, self)
        self._memory = Memory(8 << 20)
        for address, size, _, offset in self._memory.regions:
            self.device.memory.map(address, size, True, self._memory.fd, offset)
        self.device.set_features(self.device.features & ~F_RING_PACKED)
        self.rings = [DriverRing(self._memory, _RING, indirect=True) for _ in range(2)]
        self._vrings = []
        for index, ring in enumerate(self.rings):
            vring = Vring()
            vring.size = _RING
            vring.take("kick", os.dup(ring.kick))
            vring.take("call", os.dup(ring.call))
            parts = (ring.descriptors, ring.available, ring.used)
            first, second, third = (GUEST_BASE + part for part in parts)
            self.device.start_ring(index, vring, (first, second, third))
            self._vrings.append(vring)
        self._packet = self._memory.allocate(HEADER_SIZE + _PACKET)
        self._buffers = [self._memory.allocate(HEADER_SIZE + _BUFFER) for _ in range(_RING)]
        self.refill()
        self.send(Op.REQUEST)
        self.publish()
        (self.connection,) = self.device.connections.values()

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        ours, self.program = socket.socketpair()
        ours.setblocking(False)
        done(ours)
        return lambda: None

    def send(self, op: int, length: int = 0, forwarded: int = 0) -> None:
        header = Header(_CID, 2, 1024, 5000, length, op=op, buf_alloc=1 << 18, fwd_cnt=forwarded)
        HEADER.pack_into(self._memory.view, self._packet, *header)
        parts = [(self._packet, HEADER_SIZE), (self._packet + HEADER_SIZE, length)]
        self.rings[TRANSMIT].add(parts if length else parts[:1], writable=False)

    def publish(self) -> None:
        transmit = self.rings[TRANSMIT]
        transmit.publish()
        self.device.poll()
        transmit.collect()

    def refill(self) -> int:
        """Collect received packets and offer their buffers again; return the bytes of payload."""
        receive = self.rings[RECEIVE]
        used = receive.collect()
        while receive.has_room(2):
            buffer = self._buffers[receive.next % _RING]
            parts = [(buffer, HEADER_SIZE), (buffer + HEADER_SIZE, _BUFFER)]
            receive.add(parts, writable=True)
        receive.publish()
        return sum(length - HEADER_SIZE for _, length in used)

    def close(self) -> None:
        for index in (RECEIVE, TRANSMIT):
            self.device.stop_ring(index)
        self.device.reset()
        self.device.close()
        for vring in self._vrings:
            vring.close()
        for ring in self.rings:
            ring.close()
        self._memory.close()


def throughput(total: int, to_guest: bool) -> float:
    """Return the MB/s of one direction of one connection."""
    guest = _Guest()
    child = _fork.Process(target=_fill if to_guest else _drain, args=(guest.program,))
    child.start()
    guest.program.close()
    moved = credited = 0
    began = perf_counter()
    while moved < total:
        if to_guest:
            guest.loop.turn()
            moved += guest.refill()
            if moved - credited > 1 << 17:
                credited = moved
                guest.send(Op.CREDIT_UPDATE, 0, moved & 0xFFFF_FFFF)
                guest.publish()
        elif guest.connection.has_backlog:
            guest.loop.turn()
            guest.refill()
        else:
            for _ in range(_PACKETS_AT_ONCE):
                guest.send(Op.RW, _PACKET)
            guest.publish()
            guest.refill()
            moved += _PACKETS_AT_ONCE * _PACKET
    seconds = perf_counter() - began
    child.terminate()
    child.join()
    guest.close()
    return moved / seconds / 1e6


def cost(total: int, of_driver: bool = False) -> float:
    """Return the processor time, in ms a GB, of the way to the guest.

    It is the device's, or the simulated driver's, which :func:`throughput` contains, too.
    """
    guest = _Guest()
    program = guest.program
    program.setblocking(False)
    block = bytes(1 << 17)
    moved = credited = 0
    device = driver = 0.0
    while moved < total:
        with contextlib.suppress(BlockingIOError):
            program.send(block)
        began = process_time()
        guest.loop.turn()
        ended = process_time()
        device += ended - began
        moved += guest.refill()
        if moved - credited > 1 << 17:
            credited = moved
            guest.send(Op.CREDIT_UPDATE, 0, moved & 0xFFFF_FFFF)
            guest.publish()
        driver += process_time() - ended
    program.close()
    guest.close()
    return (driver if of_driver else device) * 1000 / (total / 1e9)
