"""Throughput of the VMCI device alone, without a virtual machine.

A simulated guest in shared memory reports its queue as full, or empty, and touches no byte of it.
The figures cover the device, the kernel's copy and the program at the other end.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
from time import perf_counter

from support.vmci_driver import SimulatedGuest
from vsockets.devices.vmci.packets import Kind

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
