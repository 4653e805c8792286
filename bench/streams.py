"""An established stream between two processes: throughput and round trips."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import vsockets

from .harness import child

_CHUNK = bytes(65536)
_MESSAGE = bytes(64)

Pair = tuple[socket.socket, socket.socket]


@contextlib.contextmanager
def unix() -> Iterator[Pair]:
    """Yield an AF_UNIX socketpair, the kernel object of a vSockets stream."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@contextlib.contextmanager
def tcp() -> Iterator[Pair]:
    """Yield a TCP connection over loopback, with TCP_NODELAY."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    with one, other:
        for sock in (one, other):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        yield one, other


@contextlib.contextmanager
def vsock(host: vsockets.Attachment, guest: vsockets.Attachment) -> Iterator[Pair]:
    """Yield a stream from a guest to the host."""
    address = (vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY)
    with vsockets.create_server(address, context=host) as server:
        one = vsockets.create_connection(server.getsockname(), context=guest)
        other, _ = server.accept()
    with one, other:
        yield one, other


def throughput(pair: contextlib.AbstractContextManager[Pair], chunks: int) -> float:
    """Return the MB/s (a million bytes) of writes of 64 KiB, until the reader has all of them."""
    with pair as (one, other):

        def read() -> None:
            buffer = bytearray(len(_CHUNK))
            left = chunks * len(_CHUNK)
            while left:
                left -= other.recv_into(buffer)
            other.send(b"!")
            other.recv(1)

        with child(read):
            begin = time.perf_counter()
            for _ in range(chunks):
                one.sendall(_CHUNK)
            one.recv(1)
            return chunks * len(_CHUNK) / (time.perf_counter() - begin) / 1e6


def round_trip(pair: contextlib.AbstractContextManager[Pair], trips: int) -> float:
    """Return the microseconds of a round trip of 64 bytes."""
    with pair as (one, other):

        def echo() -> None:
            while data := other.recv(64):
                other.send(data)

        with child(echo):
            begin = time.perf_counter()
            for _ in range(trips):
                one.send(_MESSAGE)
                one.recv(64)
            return (time.perf_counter() - begin) / trips * 1e6
