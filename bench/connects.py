"""Rate of connects: connect, wait until the server closes, close."""

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
    """Return the rate of TCP connects over loopback."""
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


def hybrid(path: str, guest: vsockets.Attachment, connects: int, clients: int) -> float:
    """From the host to a service of a guest, by CONNECT at the unix socket ``path``."""
    with vsockets.create_server(
        (VMADDR_CID_ANY, VMADDR_PORT_ANY), backlog=128, context=guest
    ) as server:
        line = b"CONNECT %d\n" % server.getsockname()[1]

        def client() -> None:
            for _ in range(connects):
                with socket.socket(socket.AF_UNIX) as sock:
                    sock.connect(path)
                    sock.sendall(line)
                    while sock.recv(64):
                        pass

        return rate(server, client, connects, clients)


def bare(connects: int, clients: int) -> float:
    """Return the rate of connects through :mod:`.bare_broker`."""
    with (
        tempfile.TemporaryDirectory(prefix="vsock-", dir="/tmp") as folder,
        socket.socket(socket.AF_UNIX) as listener,
    ):
        path = f"{folder}/listener"
        listener.bind(path)
        listener.listen(128)
        service, link = socket.socketpair()

        def client() -> None:
            for _ in range(connects):
                with socket.socket(socket.AF_UNIX) as sock:
                    bare_broker.connect(sock, path)
                    sock.recv(1)

        with service, link, child(lambda: bare_broker.serve(listener, link)):
            return rate(bare_broker.Service(service), client, connects, clients)


class Acceptor(Protocol):
    """The interface of a benchmark's listening socket."""

    def accept(self) -> tuple[socket.socket, Any]:
        """Wait for a connection and return it."""


def rate(server: Acceptor, client: Callable[[], None], connects: int, clients: int) -> float:
    """Return the connects per second of ``clients`` processes to one server process."""

    def serve() -> None:
        while True:
            server.accept()[0].close()

    with child(serve):
        return connects * clients / run_children([client] * clients)


def cost(run: Callable[[int, int], float], connects: int, clients: int, broker: int = 0) -> float:
    """Return the processor time of all processes for each connect of ``run``, in microseconds.

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
