"""A connection to vsockd, and what may be written on it."""

from __future__ import annotations

import _socket
import errno
import select
import struct
from collections import deque
from functools import partial
from socket import (
    AF_UNIX,
    CMSG_LEN,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    MSG_PEEK,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOL_SOCKET,
)
from typing import TYPE_CHECKING

from .._linux.descriptor_passing import dispose
from ..fabric import Context, Credentials, Endpoint, EndpointKind, Party, Refused
from ..protocol import PADDING, REQUEST_SIZE, ProtocolError
from .credentials import UCRED, Author, Deputy, Peer
from .limits import DAEMON_UNWANTED_DESCRIPTORS_MAX
from .stream_liveness import Group

if TYPE_CHECKING:
    from .listeners import Listener

_FD = struct.Struct("i")
#: Room for the credentials of the process that wrote a request, and for nothing else.
_AUTHOR = CMSG_LEN(UCRED.size)
#: And for a descriptor that rides along.
_AUTHOR_AND_FD = CMSG_SPACE(UCRED.size) + CMSG_LEN(_FD.size)
# A name of our own: looking a member up in its enum costs as much as a short function.
_SEQPACKET = EndpointKind.SEQPACKET
# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
#: How a request is read: from a stream, and from a packet socket.
TAKE = int(MSG_DONTWAIT)
LOOK = int(MSG_DONTWAIT | MSG_PEEK)

#: Why a descriptor cannot be sent now, although it can later: its user has too many in flight
#: already, or memory is short, or the receiver has not read what was sent before.
SHORTAGE = (errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)

_SOCKET, _RIGHTS = int(SOL_SOCKET), int(SCM_RIGHTS)
_PASSCRED = int(SO_PASSCRED)


class Channel(Peer):
    """One program's socket, seen from vsockd's end of it."""

    sock: _socket.socket
    # What most channels never have is the class's.
    endpoint: Endpoint | None = None
    sender: Endpoint | None = None  # of the datagram socket that came with its request
    silent = False  # it is kept, and nothing was read from it yet
    requests = 0  # that were read from it since it has been kept
    is_kernel = False  # it speaks for a guest's kernel, which chooses the ports it connects from
    asks_once = False  # after a refusal there is nothing more to be said
    deputy: Deputy | None = None  # another process wrote the request that was read last
    offer_flags = 0  # of :class:`..wire.Flag`: how a device answers who connects
    lent_to: object = None  # the link (:mod:`.offers`) at whose other end its socket has been
    listener: Listener | None = None  # of a socket that listens, or has been bound to a name
    secret = 0  # of BIND_SOCKET
    #: the channel of the socket itself, which its endpoint went to with a CONNECT
    moved: Channel | None = None
    watch: Group | None = None  # that its socket was registered in when it was lent

    def __init__(
        self, sock: _socket.socket, context: Context, kind: EndpointKind, credentials: Credentials
    ) -> None:
        self.sock = sock
        self.context = context
        self.kind = kind
        self.credentials = credentials
        self.party = context.party_of(credentials.uid)

    def read(self) -> bytes:
        """The next request, no bytes at the end; BlockingIOError."""
        # Descriptors that ride along are dropped by the kernel, unseen: there is no room for them.
        # A message of a packet socket is only looked at, because reading a part of it would
        # take the whole, and with it what keeps a polling sender waiting.
        how = LOOK if self.kind is _SEQPACKET else TAKE
        try:
            data, came, _, _ = self.sock.recvmsg(REQUEST_SIZE, _AUTHOR, how)
        except ConnectionError:
            return b""
        if came and (author := UCRED.unpack(came[0][2])) != self.credentials:
            self.deputy = Deputy(self, Author(Credentials(*author)))
        elif self.deputy is not None:
            self.deputy = None
        return data

    @property
    def asker(self) -> Peer | Deputy:
        """Whose rights the request that was read last has."""
        return self.deputy or self

    def expect_requests(self, expected: bool) -> None:
        """Be told by the kernel who wrote what is read from now on, or, of a stream, no more."""
        self.sock.setsockopt(_SOCKET, _PASSCRED, expected)

    def has_hung_up(self) -> bool:
        """Return whether the program has closed its socket."""
        poll = select.poll()
        poll.register(self.sock.fileno(), 0)
        return bool(poll.poll(0))

    def send(self, record: bytes) -> None:
        """Write an answer.  A program that reads nothing loses its answer, nothing else."""
        try:
            self.sock.send(record, _SEND)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise

    def send_descriptor(self, record: bytes, fd: int) -> None:
        """Write an answer with a descriptor; as :meth:`send`.

        Refused with ENOBUFS where the descriptor cannot be sent now.
        """
        try:
            send_descriptor(self.sock, record, fd)
        except OSError as error:
            if error.errno in (errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS):
                raise Refused(errno.ENOBUFS, f"the answer cannot be sent: {error}") from None
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise


def send_descriptor(sock: _socket.socket, record: bytes, fd: int) -> None:
    """Send a record with a descriptor.  OSError when there is no room, or no receiver."""
    sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)


def consume(sock: _socket.socket, kind: EndpointKind, polling: bool) -> None:
    """Take what is left of a request off ``sock``; its sender's socket becomes writable."""
    try:
        if kind is EndpointKind.SEQPACKET:  # requests there are peeked at: a message is read whole
            sock.recv(1, TAKE)
        elif polling:  # request and padding were one write: it is all here
            sock.recv(len(PADDING), TAKE)
    except (BlockingIOError, ConnectionError):
        pass  # there was no more, it was taken with a descriptor, or the sender has gone


#: Of each party's unwanted descriptors that threads have closed, since that was counted.
_closed: deque[Party] = deque()


def give_up(fd: int, party: Party) -> None:
    """Have a descriptor closed that ``party`` sent and should not have."""
    party.unwanted += 1
    dispose(fd, partial(_closed.append, party))


def has_many_unwanted(party: Party) -> bool:
    """Return whether so many of a party's descriptors wait to be closed that none may be added."""
    while _closed:
        _closed.popleft().unwanted -= 1
    return party.unwanted >= DAEMON_UNWANTED_DESCRIPTORS_MAX


def receive_with_descriptor(sock: _socket.socket) -> int | None:
    """Take a message off a packet socket; returns the descriptor that came with it, if any.

    There is room for one: the kernel drops the rest, unseen.
    """
    _, ancillary, _, _ = sock.recvmsg(1, _AUTHOR_AND_FD, MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
    return descriptor_in(ancillary)


def descriptor_in(ancillary: list[tuple[int, int, bytes]]) -> int | None:
    """The descriptor in a received ancillary message, if there is one."""
    for level, kind, data in ancillary:
        if level == SOL_SOCKET and kind == SCM_RIGHTS and len(data) >= _FD.size:
            fd: int = _FD.unpack_from(data)[0]
            return fd
    return None


def take_socket(channel: Channel, *types: int) -> _socket.socket:
    """Take the request off the channel, and the unix socket of one of ``types`` sent along."""
    if channel.kind is not EndpointKind.SEQPACKET:
        raise ProtocolError("a request with a descriptor on a stream")
    if has_many_unwanted(channel.party):  # the kernel closes this one, where it is quicker
        raise Refused(errno.ENOBUFS, f"{channel.party.name} sends wrong descriptors")
    fd = receive_with_descriptor(channel.sock)
    if fd is None:
        raise ProtocolError("the descriptor of the request is missing")
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        give_up(fd, channel.party)
        raise ProtocolError("the descriptor of the request is not a socket") from None
    if sock.family != AF_UNIX or sock.type not in types:
        give_up(sock.detach(), channel.party)
        raise ProtocolError(f"the request has a socket of {sock.family=} {sock.type=}")
    return sock
