"""Moving bytes between guest memory and a socket: one system call, no copy of our own."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from socket import MSG_DONTWAIT, MSG_NOSIGNAL

# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TAKE = int(MSG_DONTWAIT)


def push(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """Send what fits of ``views``; returns the bytes sent, 0 when there is no room now.

    ConnectionError when nobody reads there any more.
    """
    try:
        return sock.sendmsg(views, (), _SEND)
    except BlockingIOError:
        return 0


def pull(sock: socket.socket, views: Sequence[memoryview]) -> int | None:
    """Fill ``views`` from ``sock``; returns the bytes received, 0 at the end, None for nothing
    now.

    A connection that was reset has ended.
    """
    try:
        return sock.recvmsg_into(views, 0, _TAKE)[0]
    except BlockingIOError:
        return None
    except ConnectionError:
        return 0
