"""Requests and records, both of one fixed size.

A program writes one :class:`Request` on a connection to its context's control socket.
vsockd answers with one :class:`Record`.  When the request was a successful CONNECT the
connection itself then *is* the stream: nothing of the protocol remains on it.  A listening
socket reads one Record per new connection, the connection's descriptor riding along.

Both ends are on one machine, so all fields have the machine's byte order.

A change of the layout is a new version in MAGIC; ``tests/wire`` holds the layout still.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from enum import IntEnum, IntFlag
from functools import partial
from typing import NamedTuple

from ..model.buffers import BufferSizes

#: "vsk" and the protocol's version.
MAGIC = int.from_bytes(b"vsk\x01", "big")

#: A request's fields, in the order of :class:`Request`, after MAGIC.
REQUEST_LAYOUT = struct.Struct("=IHHIIIIQQQQQQ")
_RECORD = struct.Struct("=IHHIIIIIIIIQQQ")
REQUEST_SIZE = REQUEST_LAYOUT.size
RECORD_SIZE = _RECORD.size
# What comes after MAGIC.
_START = struct.pack("=I", MAGIC)
_REQUEST_FIELDS = struct.Struct("=4xHHIIIIQQQQQQ")
_RECORD_FIELDS = struct.Struct("=4xHHIIIIIIIIQQQ")

#: What follows a request whose sender polls instead of blocking: enough that the kernel
#: calls the socket not writable until vsockd has read it, which it does last of all.  So
#: POLLOUT means "connect has finished", as it does for TCP.
PADDING = bytes(3072)


class ProtocolError(Exception):
    """The peer sent something that is not this protocol; the text says what."""


class Op(IntEnum):
    """What a program asks of vsockd."""

    BIND = 1  #: give this connection a port; it is held while the connection lives
    LISTEN = 2  #: hand new connections to this connection
    CONNECT = 3  #: make this connection a stream to the peer address
    UPDATE = 4  #: new buffer sizes of a listening socket; not answered
    BIND_DATAGRAM = 5  #: give the datagram socket sent along a port
    ROUTE = 6  #: a socket from the datagram socket sent along to the peer address
    QUERY = 7  #: what is the socket with this cookie and inode?
    LOCAL_CID = 8  #: which context is this, and is its program trusted (by the peer CID)?
    #: a device: what became of an offer (backlog: 0 or the errno, and the stream's end is sent
    #: along); not answered
    SETTLE = 9
    CATCH_ALL = 10  #: a device: datagrams to every port nobody has come to the socket sent along
    CAPTURE = 11  #: a socket on which comes what passes the device of the peer CID (vsockmon.py)
    RESIZE = 12  #: the established stream with this cookie and inode has a buffer of this size now
    #: give the stream or packet socket sent along a port; it is held while this connection lives
    #: and the socket is open.  Again: another socket takes the place of the first.  The cookie is
    #: a secret number; a CONNECT that has it as its inode comes from the port.
    BIND_SOCKET = 13


class RequestFlag(IntFlag):
    """Notes on a request or a record."""

    POLLING = 1  #: request: PADDING follows; an offer: it has yet to be taken off
    TRUSTED_STREAM = 2  #: record: the program's stream sockets are trusted (guide page 24)
    TRUSTED_DATAGRAM = 4  #: record: its datagram sockets are
    OK_LINE = 8  #: an offer: who connects waits for a line of hybrid vsock instead of a record
    #: request: BIND and BIND_DATAGRAM are for a program without CAP_NET_BIND_SERVICE, whatever
    #: their sender has
    UNPRIVILEGED = 16
    #: record: of a socket that BIND_SOCKET has bound.  If it listens, each connection comes in as a
    #: unix connection on which a record waits, with the stream's descriptor.
    NAMED = 32


# Module aliases of enum members: looking a member up in its enum is slow.
_POLLING, _NAMED = int(RequestFlag.POLLING), int(RequestFlag.NAMED)
_TRUSTED_STREAM = int(RequestFlag.TRUSTED_STREAM)
_TRUSTED_DATAGRAM = int(RequestFlag.TRUSTED_DATAGRAM)
# A named tuple's own __new__ and _make are functions in Python; this is what they call.
_new = tuple.__new__


class Role(IntEnum):
    """In a QUERY's answer: what the socket is.  To a device: whether there is one like it."""

    BOUND = 1
    LISTENING = 2  #: to a device: its guest can connect to the local address
    CONNECTED = 3
    DATAGRAM = 4
    GONE = 5  #: to a device: it can no longer
    TAP = 6  #: to a device: send what passes to the socket sent along, ``size`` bytes of each
    BUFFER = 7  #: to a device: the peer of its guest's local port has room for ``size`` bytes now


class Request(NamedTuple):
    """One request.  Fields an operation does not use are zero."""

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
    cookie: int = 0  #: the sender's name for its socket: SO_COOKIE
    #: The socket's inode number.  QUERY: what is asked about.  CONNECT: see BIND_SOCKET.
    inode: int = 0

    def encode(self) -> bytes:
        """The request's REQUEST_SIZE bytes."""
        return REQUEST_LAYOUT.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Request:
        """Raises ProtocolError on anything :meth:`encode` cannot have made."""
        if len(data) != REQUEST_SIZE:
            raise ProtocolError(f"request of {len(data)} bytes, expected {REQUEST_SIZE}")
        if data[:4] != _START:
            raise ProtocolError(f"request starts with {data[:4]!r}, expected {_START!r}")
        return _new(cls, _REQUEST_FIELDS.unpack(data))

    @property
    def polling(self) -> bool:
        """Whether PADDING follows."""
        return self.flags & _POLLING != 0

    def sizes(self) -> BufferSizes:
        """The three buffer sizes together."""
        return _new(BufferSizes, self[7:10])


class Record(NamedTuple):
    """An answer, or the announcement of a new connection."""

    status: int  #: 0, or the errno the program gets
    flags: int = 0
    local_cid: int = 0
    local_port: int = 0
    peer_cid: int = 0
    peer_port: int = 0
    role: int = 0
    pid: int = 0  #: the peer's credentials, as the kernel told vsockd
    uid: int = 0
    gid: int = 0
    size: int = 0  #: buffer sizes in force, in bytes
    minimum: int = 0
    maximum: int = 0

    def encode(self) -> bytes:
        """The record's RECORD_SIZE bytes."""
        return _RECORD.pack(MAGIC, *self)

    @classmethod
    def decode(cls, data: bytes) -> Record:
        """Raises ProtocolError on anything :meth:`encode` cannot have made."""
        if len(data) != RECORD_SIZE:
            raise ProtocolError(f"record of {len(data)} bytes, expected {RECORD_SIZE}")
        if data[:4] != _START:
            raise ProtocolError(f"record starts with {data[:4]!r}, expected {_START!r}")
        return _new(cls, _RECORD_FIELDS.unpack(data))

    @property
    def local(self) -> tuple[int, int]:
        """This side's address."""
        return self.local_cid, self.local_port

    @property
    def peer(self) -> tuple[int, int]:
        """The other side's address."""
        return self.peer_cid, self.peer_port

    @property
    def sizes(self) -> BufferSizes:
        """The three buffer sizes together."""
        return _new(BufferSizes, self[10:13])

    @property
    def is_named(self) -> bool:
        """Whether the socket was bound by BIND_SOCKET."""
        return self.flags & _NAMED != 0

    def is_trusted(self, datagram: bool) -> bool:
        """Return whether the program's sockets, of datagrams or of streams, are trusted."""
        return self.flags & (_TRUSTED_DATAGRAM if datagram else _TRUSTED_STREAM) != 0


#: The record of an established stream, encoded.  Its arguments are a record's fields, from
#: ``local_cid`` on.
encode_stream: Callable[..., bytes] = partial(_RECORD.pack, MAGIC, 0, 0)
