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
count                             (not answered)
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
from ..model.rates import Moved
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
    """Return a request to bind the connection to ``address``; vsockd replaces wildcards."""
    return _encode(Op.BIND, local=address, sizes=sizes, cookie=cookie)


def bind_datagram(address: tuple[int, int], *, unprivileged: bool = False) -> bytes:
    """Return a request to bind a datagram socket to ``address``.

    With ``unprivileged`` the program has no CAP_NET_BIND_SERVICE, although the process that sends
    the request may have it.
    """
    return _encode(Op.BIND_DATAGRAM, flags=_UNPRIVILEGED if unprivileged else 0, local=address)


def bind_socket(
    address: tuple[int, int], *, sizes: BufferSizes, secret: int, unprivileged: bool = False
) -> bytes:
    """Return a request to bind a stream or packet socket that is not connected to vsockd.

    The connection that sends the request holds the port.  A :func:`connect` with the same
    ``secret`` comes from that port.
    """
    flags = _UNPRIVILEGED if unprivileged else 0
    return _encode(Op.BIND_SOCKET, flags=flags, local=address, sizes=sizes, cookie=secret)


def listen(backlog: int, sizes: BufferSizes) -> bytes:
    """Return a request for new streams, at most ``backlog`` of them not accepted yet."""
    return _encode(Op.LISTEN, backlog=backlog, sizes=sizes)


def connect(
    peer: tuple[int, int],
    sizes: BufferSizes,
    cookie: int,
    polling: bool = False,
    secret: int = 0,
) -> bytes:
    """Return a request for a stream to ``peer``.

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
    """Return a device's request for a stream from the guest's ``port`` to ``peer``.

    vsockd chooses the port if it is VMADDR_PORT_ANY.
    """
    return _encode(Op.CONNECT, local=(VMADDR_CID_ANY, port), peer=peer, sizes=sizes)


def update(sizes: BufferSizes) -> bytes:
    """Return a report of the buffer sizes for future streams of a listening socket."""
    return _encode(Op.UPDATE, sizes=sizes)


def resize(size: int, *, cookie: int, inode: int) -> bytes:
    """Return a report that an established stream's buffer now holds ``size`` bytes.

    ``cookie`` and ``inode`` identify the stream's socket.
    """
    return _encode(Op.RESIZE, sizes=(size, 0, 0), cookie=cookie, inode=inode)


def count(
    moved: Moved,
    *,
    local: tuple[int, int] = _UNSET,
    peer: tuple[int, int] = _UNSET,
    cookie: int = 0,
    inode: int = 0,
) -> bytes:
    """Return a report of the bytes that the sender has moved for one end of a stream.

    A program identifies its end by ``cookie`` and ``inode``, a device its guest's end by the
    addresses; with the port VMADDR_PORT_ANY it reports all of the guest's streams together.
    """
    sent, received = map(int, moved)
    sizes = sent, received, 0
    return _encode(Op.COUNT, local=local, peer=peer, sizes=sizes, cookie=cookie, inode=inode)


def route(destination: tuple[int, int]) -> bytes:
    """Return a request for a socket that sends to ``destination``.

    The datagrams come from the datagram socket that is sent along with the request.
    """
    return _encode(Op.ROUTE, local=_UNBOUND, peer=destination)


def catch_all() -> bytes:
    """Return a device's request for all datagrams to ports of its guest that are not bound."""
    return _encode(Op.CATCH_ALL)


def query(*, cookie: int, inode: int = 0) -> bytes:
    """Return a request for the state of a socket; ENOTCONN if vsockd does not know the socket."""
    return _encode(Op.QUERY, cookie=cookie, inode=inode)


def local_cid(peer_cid: int = 0, *, cookie: int = 0) -> bytes:
    """Return a request for the context's CID and the program's trust towards ``peer_cid``.

    With the ``cookie`` of a bound socket, the reply has the trust decided at the bind.
    """
    return _encode(Op.LOCAL_CID, peer=(peer_cid, 0), cookie=cookie)


def capture(cid: int, *, port: int, limit: int) -> bytes:
    """Return a request for a copy of the traffic of the device of guest ``cid``.

    At most ``limit`` bytes of each payload are copied, and only those of one ``port`` unless it is
    VMADDR_PORT_ANY.
    """
    return _encode(Op.CAPTURE, peer=(cid, port), sizes=(limit, 0, 0))


def settle(
    local: tuple[int, int], peer: tuple[int, int], *, size: int = 0, error: int = 0
) -> bytes:
    """Return a device's report of the outcome of a :class:`PendingConnect`.

    The outcome is the stream's buffer size in bytes, or the errno that the connect fails with.  If
    it fails, the device sends the client's descriptor along.
    """
    return _encode(Op.SETTLE, local=local, peer=peer, backlog=error, sizes=(size, 0, 0))


# Replies


def decode_reply(data: bytes) -> Record:
    """Return the record in ``data``, vsockd's reply.

    Raises OSError with the errno that vsockd replied; ENETDOWN if the connection is closed;
    EPROTO if vsockd is of another version.
    """
    if not data:
        raise OSError(errno.ENETDOWN, "vsockd has closed the connection")
    try:
        record = Record.decode(data)
    except ProtocolError as error:
        why = f"vsockd is of another version: {error} (replace it: vsock up --replace)"
        raise OSError(errno.EPROTO, why) from None
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

    The descriptor of the client's end of the stream comes with this message.
    """

    port: int  #: the guest's
    peer: tuple[int, int]  #: the client's address
    sizes: BufferSizes  #: requested by the client
    polling: bool  #: PADDING has to be read from the client's end, after the reply was written
    ok_line: bool  #: the client expects the OK line of hybrid vsock instead of a record


class CaptureStart(NamedTuple):
    """The start of a capture; the descriptor of the socket for records comes with this message."""

    port: int  #: the only port captured, or VMADDR_PORT_ANY
    limit: int  #: bytes to copy of each payload


class BufferResized(NamedTuple):
    """A new receive buffer size of a stream's host side."""

    port: int  #: the guest's
    peer: tuple[int, int]
    size: int  #: in bytes


class PortAvailability(NamedTuple):
    """The start or the end of a guest's access to a port of the host."""

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
