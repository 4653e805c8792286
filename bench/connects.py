"""Connects per second: connect, wait for the server to close, close."""

from __future__ import annotations

import socket
from collections.abc import Callable

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY

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

        return rate(server, client, connects, clients)


def vsock(
    host: vsockets.Attachment, guest: vsockets.Attachment, connects: int, clients: int
) -> float:
    """From a guest to a service of the host, brokered by vsockd."""
    with vsockets.create_server(
        (VMADDR_CID_ANY, VMADDR_PORT_ANY), backlog=128, context=host
    ) as server:
        address = server.getsockname()

        def client() -> None:
            for _ in range(connects):
                with vsockets.socket(context=guest) as sock:
                    sock.connect(address)
                    sock.recv(1)

        return rate(server, client, connects, clients)


def rate(server: socket.socket, client: Callable[[], None], connects: int, clients: int) -> float:
    """How many a second ``clients`` processes make, with one that serves them."""

    def serve() -> None:
        while True:
            server.accept()[0].close()

    with child(serve):
        return connects * clients / run_children([client] * clients)
