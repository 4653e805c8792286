"""Time from a guest's suspension until both ends of all its streams are interrupted.

The requirement is 100 ms.  The accepting ends are in one process and the connecting ends in
another; each records the time at which its last stream ended.
"""

from __future__ import annotations

import contextlib
import os
import select
import struct
import time
from collections.abc import Callable, Iterator

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric

from .harness import child

_TIME = struct.Struct("d")


@contextlib.contextmanager
def suspends(streams: int) -> Iterator[Callable[[], float]]:
    """Start a fabric with a guest; yield a function that measures one suspension.

    The function opens ``streams`` streams from the guest to the host, suspends the guest, and
    returns the milliseconds from the request until the last end was interrupted.
    """
    with PrivateFabric(log_level="error") as fabric:
        guest = fabric.guest()
        server = vsockets.create_server(
            (VMADDR_CID_ANY, VMADDR_PORT_ANY), backlog=4096, context=fabric.host
        )

        def accept() -> list[vsockets.socket]:
            return [server.accept()[0] for _ in range(streams)]

        def connect() -> list[vsockets.socket]:
            address = server.getsockname()
            return [vsockets.create_connection(address, context=guest) for _ in range(streams)]

        def measure() -> float:
            with _watcher(accept) as of_servers, _watcher(connect) as of_clients:
                for pipe in (of_servers, of_clients):
                    os.read(pipe, 1)  # all streams are open
                begin = time.monotonic()
                fabric.control.suspend(guest.cid)
                ended = max(_time_from(pipe) for pipe in (of_servers, of_clients))
            fabric.control.resume(guest.cid)
            return (ended - begin) * 1000

        with server:
            yield measure


def _time_from(pipe: int) -> float:
    ended: float = _TIME.unpack(os.read(pipe, _TIME.size))[0]
    return ended


@contextlib.contextmanager
def _watcher(get: Callable[[], list[vsockets.socket]]) -> Iterator[int]:
    """Start a process with the sockets that ``get`` returns; yield a pipe from it.

    The process writes a byte once it has the sockets, then the time at which the last one ended.
    """
    reader, writer = os.pipe()

    def watch() -> None:
        socks = get()
        epoll = select.epoll()
        for sock in socks:
            epoll.register(sock, select.EPOLLIN | select.EPOLLONESHOT)
        os.write(writer, b"x")
        ended = 0
        while ended < len(socks):
            ended += len(epoll.poll())
        os.write(writer, _TIME.pack(time.monotonic()))
        time.sleep(60)  # until it is killed

    try:
        with child(watch):
            yield reader
    finally:
        os.close(reader)
        os.close(writer)
