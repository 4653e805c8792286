"""Requests and records of the control protocol, each of a fixed size.

A program sends a :class:`Request` on a connection to its context's control socket, and vsockd
replies with a :class:`Record`.  After a successful CONNECT the connection *is* the stream, without
any protocol on it.  A listening socket receives one Record per new stream, with its descriptor.

Both ends are on one machine, so all fields have the machine's byte order.

A change of the layout needs a new version in MAGIC; ``tests/protocol`` checks the layout.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import partial
from typing import NamedTuple

from ..model.buffers import BufferSizes

#: "vsk" and the version of the protocol.
MAGIC = int.from_bytes(b"vsk\x01", "big")

#: A request's fields, in the order of :class:`Request`, after MAGIC.
REQUEST_LAYOUT = struct.Struct("=IHHIIIIQQQQQQ")
_RECORD = struct.Struct("=IHHIIIIIIIIQQQ")
REQUEST_SIZE = REQUEST_LAYOUT.size
RECORD_SIZE = _RECORD.size
# The fields after MAGIC.
_START = struct.pack("=I", MAGIC)
_REQUEST_FIELDS = struct.Struct("=4xHHIIIIQQQQQQ")
_RECORD_FIELDS = struct.Struct("=4xHHIIIIIIIIQQQ")

#: Bytes sent after a request by a client that polls instead of blocking.  They fill the send
#: buffer, so that the socket polls as not writable until vsockd has read them, after it has
#: replied.  POLLOUT then means that the connect has completed, as for TCP.
PADDING = bytes(3072)


class ProtocolError(Exception):
    """Violation of the protocol by the peer, described in the text."""


class Op(IntEnum):
    """The operation that a request asks for."""

    BIND = 1  #: bind this connection to a port, until the connection is closed
    LISTEN = 2  #: send new streams to this connection
    CONNECT = 3  #: turn this connection into a stream to the peer address
    UPDATE = 4  #: change the buffer sizes of a listening socket; not answered
    BIND_DATAGRAM = 5  #: bind the datagram socket sent along to a port
    ROUTE = 6  #: return a socket that sends from the datagram socket sent along to the peer
    QUERY = 7  #: return the state of the socket with this cookie and inode
    LOCAL_CID = 8  #: return the context's CID, and whether the peer CID trusts its program
    #: from a device: complete a pending connect (backlog: 0, or the errno; then the client's end of
    #: the stream is sent along); not answered
    SETTLE = 9
    CATCH_ALL = 10  #: from a device: send datagrams to its unbound ports to the socket sent along
    CAPTURE = 11  #: return a socket with the traffic of the peer CID's device (vsockmon.py)
    RESIZE = 12  #: report the buffer size of the stream with this cookie and inode
    #: bind the stream or packet socket sent along to a port, while this connection and the socket
    #: are open.  Repeated, it replaces the socket.  The cookie is a secret number; a CONNECT with
    #: that number as its inode comes from the port.
    BIND_SOCKET = 13
    #: report the bytes that the sender has moved for the stream with this cookie and inode (from a
    #: device: with these addresses, or for the whole guest); size: sent, minimum: received; not
    #: answered
    COUNT = 14


class RequestFlag(IntFlag):
    """Flags of a request or a record."""

    POLLING = 1  #: request: PADDING follows; pending connect: PADDING has to be read
    TRUSTED_STREAM = 2  #: record: the program's stream sockets are trusted (guide page 24)
    TRUSTED_DATAGRAM = 4  #: record: the program's datagram sockets are trusted
    OK_LINE = 8  #: pending connect: the client expects the OK line of hybrid vsock, not a record
    #: request: the program has no CAP_NET_BIND_SERVICE for a bind, even if the sender has
    UNPRIVILEGED = 16
    #: record: BIND_SOCKET has bound the socket.  If it listens, it accepts a unix connection for
    #: each stream, from which the record and the stream's descriptor are read.
    NAMED = 32


# Module aliases of enum members: looking a member up in its enum is slow.
_POLLING, _NAMED = int(RequestFlag.POLLING), int(RequestFlag.NAMED)
_TRUSTED_STREAM = int(RequestFlag.TRUSTED_STREAM)
_TRUSTED_DATAGRAM = int(RequestFlag.TRUSTED_DATAGRAM)
# What a named tuple's __new__ and _make, which are functions in Python, call.
_new = tuple.__new__


class Role(IntEnum):
    """The kind of a socket in the reply to QUERY, or of a message to a device."""

    BOUND = 1
    LISTENING = 2  #: also to a device: its guest can connect to the local address
    CONNECTED = 3
    DATAGRAM = 4
    NOT_LISTENING = 5  #: to a device: its guest can no longer connect to the local address
    CAPTURE = 6  #: to a device: capture to the socket sent along, ``size`` bytes of each payload
    BUFFER = 7  #: to a device: the peer of its guest's local port has a buffer of ``size`` bytes


class Request(NamedTuple):
    """A request.  Fields that its operation does not use are zero."""

    op: int
    flags: int = 0
    local_cid: int = 0
    local_port: int = 0
    peer_cid: int = 0
    peer_port: int = 0
    backlog: int = 0
    size: int = 0  #: buffer sizes, in bytes
    minimum: int = 0
    maximum: int = 0
    cookie: int = 0  #: SO_COOKIE of the socket, or the secret of BIND_SOCKET
    #: the socket's inode number; in CONNECT, the secret of BIND_SOCKET
    inode: int = 0

    def encode(self) -> bytes:
        """Return the REQUEST_SIZE bytes of the request."""
        return REQUEST_LAYOUT.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Return the decoded message.  Raises ProtocolError for an invalid size or MAGIC."""
        if len(data) != REQUEST_SIZE:
            raise ProtocolError(f"request of {len(data)} bytes, expected {REQUEST_SIZE}")
        if data[:4] != _START:
            raise ProtocolError(f"request starts with {data[:4]!r}, expected {_START!r}")
        return _new(cls, _REQUEST_FIELDS.unpack(data))

    @property
    def polling(self) -> bool:
        """True if PADDING follows the request."""
        return self.flags & _POLLING != 0

    def sizes(self) -> BufferSizes:
        """Return the three buffer sizes together."""
        return _new(BufferSizes, self[7:10])


class Record(NamedTuple):
    """A reply, the announcement of a new stream, or a message to a device."""

    status: int  #: 0, or the errno for the program
    flags: int = 0
    local_cid: int = 0
    local_port: int = 0
    peer_cid: int = 0
    peer_port: int = 0
    role: int = 0
    pid: int = 0  #: the peer's credentials, as the kernel reported them to vsockd
    uid: int = 0
    gid: int = 0
    size: int = 0  #: buffer sizes, in bytes
    minimum: int = 0
    maximum: int = 0

    def encode(self) -> bytes:
        """Return the RECORD_SIZE bytes of the record."""
        return _RECORD.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Return the decoded message.  Raises ProtocolError for an invalid size or MAGIC."""
        if len(data) != RECORD_SIZE:
            raise ProtocolError(f"record of {len(data)} bytes, expected {RECORD_SIZE}")
        if data[:4] != _START:
            raise ProtocolError(f"record starts with {data[:4]!r}, expected {_START!r}")
        return _new(cls, _RECORD_FIELDS.unpack(data))

    @property
    def local(self) -> tuple[int, int]:
        """The local address."""
        return self.local_cid, self.local_port

    @property
    def peer(self) -> tuple[int, int]:
        """The peer's address."""
        return self.peer_cid, self.peer_port

    @property
    def sizes(self) -> BufferSizes:
        """The three buffer sizes together."""
        return _new(BufferSizes, self[10:13])

    @property
    def ends(self) -> tuple[tuple[int, int], tuple[int, int], BufferSizes]:
        """The local address, the peer's, and the buffer sizes, of every stream."""
        return self[2:4], self[4:6], _new(BufferSizes, self[10:13])

    @property
    def is_named(self) -> bool:
        """True if the socket was bound by BIND_SOCKET."""
        return self.flags & _NAMED != 0

    def is_trusted(self, datagram: bool) -> bool:
        """Return whether the program's sockets are trusted: datagram sockets, or streams."""
        return self.flags & (_TRUSTED_DATAGRAM if datagram else _TRUSTED_STREAM) != 0


#: Return the encoded record of an established stream, from the fields of :class:`Record` from
#: ``local_cid`` on.  Every connect needs it: a Record costs twice as much.
encode_stream: Callable[..., bytes] = partial(_RECORD.pack, MAGIC, 0, 0)
