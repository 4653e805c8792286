"""The kernel names of programs' sockets, and of datagram routes: how a receiver learns the source.

A program's socket that vsockd reaches by a name is bound to one that contains the *life* of its
vsockd, 64 random bits in hexadecimal digits.

A socket that serves many ports learns from it, too, which of them was meant.

Only vsockd can connect a socket to a program's datagram socket, and it binds each such socket
to a name made here, so the name the kernel reports with a datagram is the sender's address.

A name contains the *life* of the vsockd that made it: 64 random bits as 16 hexadecimal digits.
The next vsockd recognizes the sockets of an earlier life by it (``daemon/datagram_lives.py``).
"""

from __future__ import annotations

import re

from ..model.address import LARGEST

_NUMBER = rb"(0|[1-9][0-9]{0,9})"
_LIFE = rb"[0-9a-f]{16}"
_SERIAL = rb"(?:0|[1-9a-f][0-9a-f]{0,15})"
_NAME = re.compile(
    b":".join((rb"\x00vsock", _NUMBER, _NUMBER, _LIFE, _SERIAL)) + b"(?::" + _NUMBER + b")?"
)


_OWN = re.compile(r"[0-9a-f]{16}\.(?:\d+\.(?:\d+|all)|stream)\.\d+")


def is_socket_name(name: str) -> bool:
    """Return whether a program's socket with this name may have been bound by a vsockd."""
    return bool(_OWN.fullmatch(name))


def encode_source(
    address: tuple[int, int], life: str, serial: int, port: int | None = None
) -> bytes:
    """Return the abstract name of a route from ``address``, made by the vsockd of ``life``.

    ``serial``, of 64 bits, makes it unique.  ``port`` is the destination's, for a socket that
    serves many.
    """
    name = b"\0vsock:%d:%d:%s:%x" % (*address, life.encode(), serial)
    return name if port is None else b"%s:%d" % (name, port)


def decode_source(name: object) -> tuple[int, int] | None:
    """The ``(cid, port)`` a route's name spells, or None for any other name."""
    if isinstance(name, bytes) and (match := _NAME.fullmatch(name)):
        address = int(match[1]), int(match[2])
        if max(*address, int(match[3] or 0)) <= LARGEST:
            return address
    return None


def decode_route(name: object) -> tuple[tuple[int, int] | None, int | None]:
    """The source a route's name spells, and the port it is for, where it says so."""
    source = decode_source(name)
    if source is None:
        return None, None
    assert isinstance(name, bytes)
    port = name.split(b":")[5:]
    return source, int(port[0]) if port else None
