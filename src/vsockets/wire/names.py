"""The kernel names of datagram routes: how a receiver learns the true source.

Only vsockd can connect a socket to a program's datagram socket, and it binds each such socket
to a name made here, so the name the kernel reports with a datagram is the sender's address.
"""

from __future__ import annotations

import re

from ..address import LARGEST

_NUMBER = rb"(0|[1-9][0-9]{0,9})"
_NAME = re.compile(rb"\x00vsock:" + _NUMBER + b":" + _NUMBER + rb":(?:0|[1-9a-f][0-9a-f]{0,15})")


def encode_source(address: tuple[int, int], serial: int) -> bytes:
    """The abstract name of a route from ``address``; ``serial``, of 64 bits, makes it unique."""
    return b"\0vsock:%d:%d:%x" % (*address, serial)


def decode_source(name: object) -> tuple[int, int] | None:
    """The ``(cid, port)`` a route's name spells, or None for any other name."""
    if isinstance(name, bytes) and (match := _NAME.fullmatch(name)):
        address = int(match[1]), int(match[2])
        if max(address) <= LARGEST:
            return address
    return None
