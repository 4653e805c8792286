"""Transfer of bytes between guest memory and a socket: one system call, no copy in Python."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from socket import MSG_DONTWAIT, MSG_NOSIGNAL

# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TAKE = int(MSG_DONTWAIT)


def push(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """Send ``views`` as far as the socket has room; return the bytes sent, possibly 0.

    Raises ConnectionError when the peer has closed.
    """
    try:
        return sock.sendmsg(views, (), _SEND)
    except BlockingIOError:
        return 0


def pull(sock: socket.socket, views: Sequence[memoryview]) -> int | None:
    """Fill ``views`` from ``sock``; return the bytes received, or None without data.

    The result is 0 at end of file.  A reset connection counts as end of file.
    """
    try:
        return sock.recvmsg_into(views, 0, _TAKE)[0]
    except BlockingIOError:
        return None
    except ConnectionError:
        return 0
