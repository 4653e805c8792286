"""The client side of vsockd's control protocol, without I/O.

Each function named after an operation returns the bytes of its request.  The caller sends them,
and passes what it receives to :func:`decode_reply`.  Three clients share this module: the library
(``transports/fabric``), the devices (``devices/client.py``) and the supervisor.

============= =================== ===============================================================
request       sent with           reply
============= =================== ===============================================================
bind                              the local address
bind_datagram the datagram socket the local address
bind_socket   the stream socket   the local address
listen                            empty; then a record and a descriptor for each new stream
connect                           the established stream; its data follows on the same connection
update                            (not answered; nor is a repeated listen)
resize                            empty
route         the datagram socket the local address, and the descriptor of a socket to send with
catch_all     a datagram socket   empty
query                             the socket's role, addresses and buffer sizes
local_cid                         the context's CID, and which of its sockets are trusted
capture                           empty, and the descriptor of a socket to read records from
settle        the refused stream  (not answered)
============= =================== ===============================================================

A device also receives messages on its link to vsockd: :func:`decode_notification` and
:func:`decode_handoff`.
"""

from __future__ import annotations

import errno
import os
from typing import NamedTuple

from ..model.buffers import BufferSizes
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from .messages import (
    MAGIC,
    PADDING,
    REQUEST_LAYOUT,
    Op,
    ProtocolError,
    Record,
    Request,
    RequestFlag,
    Role,
)

_pack = REQUEST_LAYOUT.pack
_UNSET = (0, 0)
_UNBOUND = (VMADDR_CID_ANY, VMADDR_PORT_ANY)
_POLLING, _UNPRIVILEGED = int(RequestFlag.POLLING), int(RequestFlag.UNPRIVILEGED)
_OK_LINE, _CONNECT = int(RequestFlag.OK_LINE), int(Op.CONNECT)

# Requests


def _encode(
    op: Op,
    *,
    flags: int = 0,
    local: tuple[int, int] = _UNSET,
    peer: tuple[int, int] = _UNSET,
    backlog: int = 0,
    sizes: tuple[int, int, int] = (0, 0, 0),
    cookie: int = 0,
    inode: int = 0,
) -> bytes:
    return Request(op, flags, *local, *peer, backlog, *sizes, cookie, inode).encode()


def bind(address: tuple[int, int], *, sizes: BufferSizes, cookie: int) -> bytes:
    """Request a port for the connection; vsockd fills in the wildcards of ``address``."""
    return _encode(Op.BIND, local=address, sizes=sizes, cookie=cookie)


def bind_datagram(address: tuple[int, int], *, unprivileged: bool = False) -> bytes:
    """Request a port for a datagram socket.

    ``unprivileged``: the program has no CAP_NET_BIND_SERVICE, even if the sender has.
    """
    return _encode(Op.BIND_DATAGRAM, flags=_UNPRIVILEGED if unprivileged else 0, local=address)


def bind_socket(
    address: tuple[int, int], *, sizes: BufferSizes, secret: int, unprivileged: bool = False
) -> bytes:
    """Request a port for a stream or packet socket that is not connected to vsockd.

    The connection that sends the request holds the port.  A :func:`connect` with the same
    ``secret`` comes from that port.
    """
    flags = _UNPRIVILEGED if unprivileged else 0
    return _encode(Op.BIND_SOCKET, flags=flags, local=address, sizes=sizes, cookie=secret)


def listen(backlog: int, sizes: BufferSizes) -> bytes:
    """Request new streams, with at most ``backlog`` of them not accepted yet."""
    return _encode(Op.LISTEN, backlog=backlog, sizes=sizes)


def connect(
    peer: tuple[int, int],
    sizes: BufferSizes,
    cookie: int,
    polling: bool = False,
    secret: int = 0,
) -> bytes:
    """Request a stream to ``peer``.

    With ``polling`` the bytes end with PADDING, so that the connection polls as not writable
    until vsockd has replied.  ``secret`` is that of :func:`bind_socket`, if the socket is bound.
    """
    cid, port = peer
    size, minimum, maximum = sizes
    # Hot path: packed without a Request, which would take twice as long.
    if polling:
        fields = 0, 0, cid, port, 0, size, minimum, maximum, cookie, secret
        return _pack(MAGIC, _CONNECT, _POLLING, *fields) + PADDING
    return _pack(MAGIC, _CONNECT, 0, 0, 0, cid, port, 0, size, minimum, maximum, cookie, secret)


def connect_from_guest(port: int, peer: tuple[int, int], sizes: BufferSizes) -> bytes:
    """Request a stream from the guest's ``port`` (VMADDR_PORT_ANY: vsockd's choice) to ``peer``."""
    return _encode(Op.CONNECT, local=(VMADDR_CID_ANY, port), peer=peer, sizes=sizes)


def update(sizes: BufferSizes) -> bytes:
    """Report the buffer sizes that a listening socket gives its streams from now on."""
    return _encode(Op.UPDATE, sizes=sizes)


def resize(size: int, *, cookie: int, inode: int) -> bytes:
    """Report that an established stream's buffer now holds ``size`` bytes."""
    return _encode(Op.RESIZE, sizes=(size, 0, 0), cookie=cookie, inode=inode)


def route(destination: tuple[int, int]) -> bytes:
    """Request a socket that sends to ``destination`` from the datagram socket sent along."""
    return _encode(Op.ROUTE, local=_UNBOUND, peer=destination)


def catch_all() -> bytes:
    """Request the datagrams to all ports of the guest that no other socket is bound to."""
    return _encode(Op.CATCH_ALL)


def query(*, cookie: int, inode: int = 0) -> bytes:
    """Request the state of a socket.  The reply is ENOTCONN for a socket unknown to vsockd."""
    return _encode(Op.QUERY, cookie=cookie, inode=inode)


def local_cid(peer_cid: int = 0, *, cookie: int = 0) -> bytes:
    """Request the context's CID, and whether ``peer_cid`` trusts the program's sockets.

    ``cookie``: that of a bound socket, which stays as trusted as it was when it was bound.
    """
    return _encode(Op.LOCAL_CID, peer=(peer_cid, 0), cookie=cookie)


def capture(cid: int, *, port: int, limit: int) -> bytes:
    """Request a copy of the traffic of a guest's device.

    At most ``limit`` bytes of each payload are copied, and only those of one ``port`` unless it is
    VMADDR_PORT_ANY.
    """
    return _encode(Op.CAPTURE, peer=(cid, port), sizes=(limit, 0, 0))


def settle(
    local: tuple[int, int], peer: tuple[int, int], *, size: int = 0, error: int = 0
) -> bytes:
    """Report the outcome of a :class:`PendingConnect`: its buffer size, or the errno it fails with.

    The client's descriptor is sent along when the connect has failed.
    """
    return _encode(Op.SETTLE, local=local, peer=peer, backlog=error, sizes=(size, 0, 0))


# Replies


def decode_reply(data: bytes) -> Record:
    """Return vsockd's reply.

    Raises OSError with the errno that vsockd replied; ENETDOWN if the connection is closed;
    EPROTO if vsockd is of another version.
    """
    if not data:
        raise OSError(errno.ENETDOWN, "vsockd has closed the connection")
    try:
        record = Record.decode(data)
    except ProtocolError as error:
        raise OSError(errno.EPROTO, f"vsockd and this library do not match: {error}") from None
    if record.status:
        raise OSError(record.status, os.strerror(record.status))
    return record


def missing_descriptor() -> OSError:
    """Return the error for a reply whose descriptor was not received.

    The kernel drops a descriptor if the receiver has reached its limit of descriptors.
    """
    return OSError(errno.EMFILE, "descriptor limit reached: the socket from vsockd was dropped")


# Messages on a device's link


class PendingConnect(NamedTuple):
    """A client's connect to the guest, for the device to establish or refuse.

    The client's end of the stream comes with it.
    """

    port: int  #: the guest's
    peer: tuple[int, int]  #: the client's address
    sizes: BufferSizes  #: requested by the client
    polling: bool  #: PADDING has to be read from the client's end, after the reply was written
    ok_line: bool  #: the client expects the OK line of hybrid vsock instead of a record


class CaptureStart(NamedTuple):
    """The start of a capture.  The socket for its records comes with it."""

    port: int  #: the only port captured, or VMADDR_PORT_ANY
    limit: int  #: bytes of each payload


class BufferResized(NamedTuple):
    """A new receive buffer size of a stream's host side."""

    port: int  #: the guest's
    peer: tuple[int, int]
    size: int  #: in bytes


class PortAvailability(NamedTuple):
    """A port of the host that the guest can, or can no longer, connect to."""

    port: int
    is_listening: bool


def decode_notification(data: bytes) -> BufferResized | PortAvailability:
    """Return a message that a device received on its link without a descriptor.

    Raises OSError as :func:`decode_reply` does, and EPROTO for a message of another kind.
    """
    record = decode_reply(data)
    role = record.role
    if role == Role.BUFFER:
        return BufferResized(record.local_port, record.peer, record.size)
    if role in (Role.LISTENING, Role.NOT_LISTENING):
        return PortAvailability(record.local_port, role == Role.LISTENING)
    raise OSError(errno.EPROTO, f"vsockd sent a message with role {role} and no descriptor")


def decode_handoff(data: bytes) -> PendingConnect | CaptureStart:
    """Return a message that a device received on its link with a descriptor.

    Raises OSError as :func:`decode_reply` does.
    """
    record = decode_reply(data)
    if record.role == Role.CAPTURE:
        return CaptureStart(record.local_port, record.size)
    polling, ok_line = record.flags & _POLLING != 0, record.flags & _OK_LINE != 0
    return PendingConnect(record.local_port, record.peer, record.sizes, polling, ok_line)
