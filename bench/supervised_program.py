"""A program that measures its own sockets: ``FAMILY MEASURE COUNT``.

It uses unix or TCP sockets when run plainly, and AF_VSOCK when run by ``vsock run``.  It needs a
standard library with AF_VSOCK.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator

from bench import connects, streams
from bench.harness import processor_time


@contextlib.contextmanager
def _listener(family: str) -> Iterator[socket.socket]:
    with tempfile.TemporaryDirectory() as folder:
        if family == "tcp":
            server = socket.create_server(("127.0.0.1", 0), backlog=128)
        elif family == "unix":
            server = socket.socket(socket.AF_UNIX)
            server.bind(os.path.join(folder, "s"))
            server.listen(128)
        else:
            server = socket.socket(socket.AF_VSOCK)
            server.bind((1, 0xFFFFFFFF))
            server.listen(128)
        with server:
            yield server


@contextlib.contextmanager
def _pair(family: str) -> Iterator[streams.Pair]:
    with _listener(family) as server, socket.socket(server.family) as one:
        one.connect(server.getsockname())
        other, _ = server.accept()
        with other:
            yield one, other


def _connects(family: str, count: int) -> float:
    with _listener(family) as server:
        address = server.getsockname()

        def client() -> None:
            for _ in range(count):
                with socket.socket(server.family) as sock:
                    sock.connect(address)
                    sock.recv(1)

        return connects.rate(server, client, count, 1)


def _cost(family: str, count: int) -> float:
    """Return the processor time of the supervisor, the parent, for a connection, in microseconds.

    Pairs of ``socket()``, ``connect()`` and ``accept()``.
    """
    supervisor = os.getppid()
    _connects(family, count // 10)
    before = processor_time(supervisor)
    _connects(family, count)
    return (processor_time(supervisor) - before) / count * 1e6


def main(family: str, measure: str, count: int) -> float:
    """Return one figure, of :mod:`.streams` or :mod:`.connects`, or the supervisor's cost."""
    if measure == "throughput":
        return streams.throughput(_pair(family), count)
    if measure == "round trip":
        return streams.round_trip(_pair(family), count)
    if measure == "supervisor":
        return _cost(family, count)
    return _connects(family, count)


if __name__ == "__main__":
    print(main(sys.argv[1], sys.argv[2], int(sys.argv[3])))
