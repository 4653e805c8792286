"""Connects per second: connect, wait for the server to close, close."""

from __future__ import annotations

import socket
from collections.abc import Callable
from functools import partial

import vsockets
from vsockets.testing.fabric import PrivateFabric

from .harness import child, run_children


def tcp(connects: int, clients: int) -> float:
    """TCP over loopback."""
    with socket.create_server(("127.0.0.1", 0), backlog=128) as server:
        address = server.getsockname()

        def client() -> None:
            for _ in range(connects):
                with socket.socket() as sock:
                    sock.connect(address)
                    sock.recv(1)

        return _rate(server, client, connects, clients)


def fabric(vsock: PrivateFabric, connects: int, clients: int) -> float:
    """vSockets through vsockd, host to host's service, from a guest."""
    guest = next(iter(vsock.guests))
    with vsockets.create_server(
        (vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY), backlog=128, context=vsock.host
    ) as server:
        address = server.getsockname()

        def client() -> None:
            for _ in range(connects):
                with vsockets.socket(context=guest) as sock:
                    sock.connect(address)
                    sock.recv(1)

        return _rate(server, client, connects, clients)


def _rate(server: socket.socket, client: Callable[[], None], connects: int, clients: int) -> float:
    def serve() -> None:
        while True:
            server.accept()[0].close()

    with child(serve):
        return connects * clients / run_children([client] * clients)


__all__ = ["fabric", "partial", "tcp"]
