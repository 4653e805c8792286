"""Connects per second: connect, wait for the server to close, close."""

from __future__ import annotations

import resource
import socket
import tempfile
from collections.abc import Callable
from typing import Any, Protocol

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_PORT_ANY

from . import bare_broker
from .harness import child, processor_time, run_children


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


def bare(connects: int, clients: int) -> float:
    """Brokered by nothing but the system calls it takes: see :mod:`.bare_broker`."""
    with (
        tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as door,
    ):
        path = f"{folder}/door"
        door.bind(path)
        door.listen(128)
        service, link = socket.socketpair()

        def client() -> None:
            for _ in range(connects):
                with socket.socket(socket.AF_UNIX) as sock:
                    bare_broker.connect(sock, path)
                    sock.recv(1)

        with service, link, child(lambda: bare_broker.serve(door, link)):
            return rate(bare_broker.Service(service), client, connects, clients)


class Accepting(Protocol):
    """What the server of a benchmark does with its socket."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Wait for a connection."""


def rate(server: Accepting, client: Callable[[], None], connects: int, clients: int) -> float:
    """How many a second ``clients`` processes make, with one that serves them."""

    def serve() -> None:
        while True:
            server.accept()[0].close()

    with child(serve):
        return connects * clients / run_children([client] * clients)


def cost(run: Callable[[int, int], float], connects: int, clients: int, broker: int = 0) -> float:
    """Processor time of all processes together for each connect of ``run``, in microseconds.

    ``broker`` is the process of a broker that is not a child of this one.
    """

    def spent() -> float:
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return (
            of_children.ru_utime
            + of_children.ru_stime
            + (processor_time(broker) if broker else 0.0)
        )

    before = spent()
    run(connects, clients)
    return (spent() - before) / (connects * clients) * 1e6
