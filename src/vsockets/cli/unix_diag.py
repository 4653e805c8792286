"""The kernel's records of unix sockets, by ``sock_diag(7)`` as in ``ss -x``.

Any user may read them.  They cover this network namespace only: sockets of programs in containers
are missing.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_DONE, _ERROR = 3, 2
_DUMP_REQUEST = 0x301  # NLM_F_REQUEST | NLM_F_DUMP
_EVERY_STATE = 0xFFFF_FFFF
_SHOW_PEER, _SHOW_QUEUES = 0x04, 0x10
_PEER, _QUEUES = 2, 4

_HEADER = struct.Struct("=IHHII")  # length, type, flags, sequence, port
_REQUEST = struct.Struct("=BBHIIIII")  # family, protocol, pad, states, inode, show, cookie
_SOCKET = struct.Struct("=BBBBIII")  # family, type, state, pad, inode, cookie
_ATTRIBUTE = struct.Struct("=HH")  # length, type

#: Seconds to wait for the kernel, which replies during the request.
_PATIENCE = 5.0


class UnixSocket(NamedTuple):
    """The record of one socket."""

    peer: int  #: inode of the connected socket; 0: not connected
    unread: int  #: bytes in the receive queue


def unix_sockets() -> dict[int, UnixSocket]:
    """Return the unix sockets of this network namespace, by inode.

    Raises OSError if the kernel refuses the request.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
        netlink.settimeout(_PATIENCE)
        show = _SHOW_PEER | _SHOW_QUEUES
        request = _REQUEST.pack(socket.AF_UNIX, 0, 0, _EVERY_STATE, 0, show, 0, 0)
        length = _HEADER.size + len(request)
        netlink.send(_HEADER.pack(length, _SOCK_DIAG_BY_FAMILY, _DUMP_REQUEST, 1, 0) + request)
        found: dict[int, UnixSocket] = {}
        while True:
            for kind, body in _messages(netlink.recv(1 << 16)):
                if kind == _DONE:
                    return found
                if kind == _ERROR:
                    raise OSError(-struct.unpack_from("=i", body)[0], "sock_diag")
                inode, sock = _decode(body)
                found[inode] = sock


def _messages(data: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + _HEADER.size <= len(data):
        length, kind, *_ = _HEADER.unpack_from(data, at)
        yield kind, data[at + _HEADER.size : at + length]
        at += _aligned(length)


def _decode(body: bytes) -> tuple[int, UnixSocket]:
    inode = _SOCKET.unpack_from(body)[4]
    peer = unread = 0
    at = _SOCKET.size
    while at + _ATTRIBUTE.size <= len(body):
        length, kind = _ATTRIBUTE.unpack_from(body, at)
        if kind == _PEER:
            (peer,) = struct.unpack_from("=I", body, at + _ATTRIBUTE.size)
        elif kind == _QUEUES:
            (unread,) = struct.unpack_from("=I", body, at + _ATTRIBUTE.size)
        at += _aligned(length)
    return inode, UnixSocket(peer, unread)


def _aligned(length: int) -> int:
    return (length + 3) & ~3


def fill_queues(rows: list[dict[str, Any]]) -> None:
    """Set the queues of streams, in bytes, in rows of :meth:`vsockets.control.Control.sockets`.

    The send queue of one end is the receive queue of the other.  A queue stays None where the
    kernel has no record of the socket.
    """
    try:
        known = unix_sockets()
    except OSError:
        return
    for row in rows:
        if row["peer"] is None:
            continue
        own, other = row["inode"], row["peer_inode"]
        if own is None and other in known:
            own = row["inode"] = known[other].peer
        elif other is None and own in known:
            other = row["peer_inode"] = known[own].peer
        else:
            continue
        row["receive_queue"] = known[own].unread if own in known else None
        row["send_queue"] = known[other].unread if other in known else None
