"""How long until both ends of every stream of a suspended guest have been told.

The requirement is 100 ms.  The accepting ends are in one process and the connecting ends in
another, and each notes when it has been told of its last one.
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
    """A fabric with a guest, for a function that connects it to the host so many times.

    Then it suspends the guest, and tells in milliseconds how long after the request the last
    end of a stream was told.
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
                    os.read(pipe, 1)  # they are connected
                begin = time.monotonic()
                fabric.control.suspend(guest.cid)
                told = max(_time_from(pipe) for pipe in (of_servers, of_clients))
            fabric.control.resume(guest.cid)
            return (told - begin) * 1000

        with server:
            yield measure


def _time_from(pipe: int) -> float:
    told: float = _TIME.unpack(os.read(pipe, _TIME.size))[0]
    return told


@contextlib.contextmanager
def _watcher(get: Callable[[], list[vsockets.socket]]) -> Iterator[int]:
    """A process with the sockets that ``get`` returns.

    Yields a pipe, on which it writes a byte when it has them, and when the last one ended.
    """
    reader, writer = os.pipe()

    def watch() -> None:
        socks = get()
        epoll = select.epoll()
        for sock in socks:
            epoll.register(sock, select.EPOLLIN | select.EPOLLONESHOT)
        os.write(writer, b"x")
        told = 0
        while told < len(socks):
            told += len(epoll.poll())
        os.write(writer, _TIME.pack(time.monotonic()))
        time.sleep(60)  # until it is killed

    try:
        with child(watch):
            yield reader
    finally:
        os.close(reader)
        os.close(writer)
