"""What a program would inherit and a filter cannot take away: sockets made before it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def inherited_sockets(family: int) -> list[int]:
    """The descriptors of this process that ``exec`` keeps and that are sockets of ``family``."""
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        # OSError: it was the listing's own descriptor, or it is no socket.
        with suppress(OSError):
            if os.get_inheritable(fd) and _family_of(fd) == family:
                found.append(fd)
    return found


def _family_of(fd: int) -> int:
    # The kernel is asked: the family an object is made with is what Python believes.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    finally:
        sock.detach()
