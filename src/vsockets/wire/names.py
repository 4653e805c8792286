"""The kernel names of datagram routes: how a receiver learns the true source.

Only vsockd can connect a socket to a program's datagram socket, and it binds each such socket
to a name made here, so the name the kernel reports with a datagram is the sender's address.
"""

from __future__ import annotations

import re

_NAME = re.compile(rb"\x00vsock:(\d+):(\d+):[0-9a-f]+")


def encode_source(address: tuple[int, int], serial: int) -> bytes:
    """The abstract socket name of a route from ``address``; ``serial`` makes it unique."""
    return b"\0vsock:%d:%d:%x" % (*address, serial)


def decode_source(name: object) -> tuple[int, int] | None:
    """The ``(cid, port)`` a route's name spells, or None for any other name."""
    if isinstance(name, bytes) and (match := _NAME.fullmatch(name)):
        return int(match[1]), int(match[2])
    return None
