"""Connects of a guest whose user has too many descriptors in flight (unix(7)).

Run as an ordinary user: the kernel counts descriptors in flight per user, and does not limit root.
Prints its observations as JSON.
"""

from __future__ import annotations

import contextlib
import errno
import json
import socket
from collections.abc import Callable
from functools import partial
from typing import Any

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import send_with


def fill() -> list[socket.socket]:
    """Send as many descriptors as the kernel allows to sockets that receive none."""
    kept: list[socket.socket] = []
    while True:
        kept += socket.socketpair()
        try:
            send_with(kept[-1], b"x", [0] * 253)
        except OSError as error:
            if error.errno != errno.ETOOMANYREFS:
                raise
            return kept


def code_of(work: Callable[[], object]) -> int:
    try:
        work()
    except OSError as error:
        return error.errno or -1
    return 0


def main() -> None:
    seen: dict[str, Any] = {}
    with PrivateFabric() as fabric, contextlib.ExitStack() as stack:
        guest, host = fabric.guest(3), fabric.host
        server = stack.enter_context(vsockets.create_server((2, 5000), context=host))
        receiver = stack.enter_context(vsockets.socket(type=socket.SOCK_DGRAM, context=host))
        receiver.bind((2, 5000))
        sender = stack.enter_context(vsockets.socket(type=socket.SOCK_DGRAM, context=guest))
        sender.bind((3, 6000))
        in_flight = fill()
        connected, refused = [], []
        for _ in range(20):
            client = stack.enter_context(vsockets.socket(context=guest))
            refused.append(code_of(partial(client.connect, (2, 5000))))
            if not refused[-1]:
                connected.append(client)
        for client in connected:  # it can be used, as any that waits to be accepted
            client.setblocking(False)
            seen["ended"] = code_of(partial(client.recv, 1)) != errno.EAGAIN
            client.send(b"early")
        seen["connects"] = refused
        seen["datagram"] = code_of(partial(sender.sendto, b"x", (2, 5000)))
        seen["waiting"] = next(
            row["receive_queue"] for row in fabric.control.sockets() if row["state"] == "listening"
        )
        for sock in in_flight:
            sock.close()
        received = []
        for client in connected:
            accepted = stack.enter_context(server.accept()[0])
            received.append(accepted.recv(10).decode())
            accepted.send(b"answer")
            client.setblocking(True)
            received.append(client.recv(10).decode())
        seen["received"] = received

        def connects() -> bool:
            with vsockets.socket(context=guest) as client:
                return not code_of(partial(client.connect, (2, 5000)))

        seen["afterwards"] = wait_until(connects, "connects to succeed again")
        seen["datagram afterwards"] = code_of(partial(sender.sendto, b"x", (2, 5000)))
        seen["log"] = [line for line in fabric.log.splitlines() if "ERROR" in line]
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
