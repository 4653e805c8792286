"""Names that vsockd binds unix sockets to: programs' own sockets, and datagram routes.

Only vsockd can connect a socket to a program's datagram socket, and it binds each route to a name
with the sender's address.  So the name that the kernel reports with a datagram is its source, which
a sender cannot forge.  For a socket that receives for many ports, the name also has the destination
port.

Each name contains the *epoch* of its vsockd, 64 random bits as 16 hexadecimal digits.  The next
vsockd recognizes sockets of an earlier epoch by it (``daemon/datagram_epochs.py``).
"""

from __future__ import annotations

import re

from ..model.address import LARGEST

_NUMBER = rb"(0|[1-9][0-9]{0,9})"
_EPOCH = rb"[0-9a-f]{16}"
_SERIAL = rb"(?:0|[1-9a-f][0-9a-f]{0,15})"
_NAME = re.compile(
    b":".join((rb"\x00vsock", _NUMBER, _NUMBER, _EPOCH, _SERIAL)) + b"(?::" + _NUMBER + b")?"
)


_OWN = re.compile(r"[0-9a-f]{16}\.(?:\d+\.(?:\d+|all)|stream)\.\d+")


def is_socket_name(name: str) -> bool:
    """Return whether ``name`` is that of a program's own socket, rather than of a route."""
    return bool(_OWN.fullmatch(name))


def encode_source(
    address: tuple[int, int], epoch: str, serial: int, port: int | None = None
) -> bytes:
    """Return the abstract name of a route from ``address``, for the vsockd of ``epoch``.

    ``serial``, of 64 bits, makes the name unique.  ``port`` is the destination port, if the
    receiving socket has many.
    """
    name = b"\0vsock:%d:%d:%s:%x" % (*address, epoch.encode(), serial)
    return name if port is None else b"%s:%d" % (name, port)


def decode_source(name: object) -> tuple[int, int] | None:
    """Return the source ``(cid, port)`` in a route's name, or None for any other name."""
    if isinstance(name, bytes) and (match := _NAME.fullmatch(name)):
        address = int(match[1]), int(match[2])
        if max(*address, int(match[3] or 0)) <= LARGEST:
            return address
    return None


def decode_route(name: object) -> tuple[tuple[int, int] | None, int | None]:
    """Return the source ``(cid, port)`` in a route's name and the destination port.

    Each is None if the name does not contain it.
    """
    source = decode_source(name)
    if source is None:
        return None, None
    assert isinstance(name, bytes)
    port = name.split(b":")[5:]
    return source, int(port[0]) if port else None
