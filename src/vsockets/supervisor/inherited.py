"""Sockets that a program would inherit: a filter has no effect on those made before it."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


def inherited_sockets(family: int) -> list[int]:
    """Return the inheritable descriptors of this process that are sockets of ``family``."""
    found = []
    for fd in sorted(map(int, os.listdir("/proc/self/fd"))):
        # OSError: it is not a socket, or was the listing's own descriptor.
        with suppress(OSError):
            if os.get_inheritable(fd) and _family_of(fd) == family:
                found.append(fd)
    return found


def _family_of(fd: int) -> int:
    # Asks the kernel: a Python object has the family it was constructed with.
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, 0, fd)
    try:
        return sock.getsockopt(socket.SOL_SOCKET, socket.SO_DOMAIN)
    finally:
        sock.detach()
