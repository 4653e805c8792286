"""The receiver's rate of datagrams of 64 bytes, to a destination with a cached route.

Every contestant uses sendto() and recvfrom(), and the receiver sees the sender's address.
"""

from __future__ import annotations

import os
import socket
import tempfile
import time
from typing import Any

import vsockets

from .harness import child

_MESSAGE = bytes(64)
_ANY = (vsockets.VMADDR_CID_ANY, vsockets.VMADDR_PORT_ANY)


def unix(count: int) -> float:
    """Return the rate of AF_UNIX datagrams between two bound sockets."""
    with (
        tempfile.TemporaryDirectory() as folder,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(os.path.join(folder, "receiver"))
        sender.bind(os.path.join(folder, "sender"))
        return _rate(receiver, sender, receiver.getsockname(), count)


def udp(count: int) -> float:
    """Return the rate of UDP datagrams over loopback; lost ones are not counted."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind(("127.0.0.1", 0))
        return _rate(receiver, sender, receiver.getsockname(), count)


def vsock(host: vsockets.Attachment, guest: vsockets.Attachment, count: int) -> float:
    """Return the rate of datagrams from a guest to the host."""
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=host) as receiver,
        vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sender,
    ):
        receiver.bind(_ANY)
        return _rate(receiver, sender, receiver.getsockname(), count)


def _rate(receiver: socket.socket, sender: socket.socket, address: Any, count: int) -> float:
    def send() -> None:
        while True:
            sender.sendto(_MESSAGE, address)

    sender.sendto(_MESSAGE, address)  # caches the route to the destination
    with child(send):
        receiver.recvfrom(64)
        begin = time.perf_counter()
        for _ in range(count):
            receiver.recvfrom(64)
        return count / (time.perf_counter() - begin)
