"""A connection to vsockd, and what may be written on it."""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
import struct
from collections import deque
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
    SO_SNDBUF,
    SOCK_DGRAM,
    SOL_SOCKET,
    socketpair,
)
from termios import TIOCOUTQ  # the same ioctl as SIOCOUTQ: bytes sent and not yet read

from ..fabric import Context, Credentials, Endpoint, Kind, Party
from ..limits import MAX_BACKLOG
from ..passing import dispose
from ..wire import PADDING, RECORD_SIZE, REQUEST_SIZE, ProtocolError
from .credentials import UCRED, Author, Deputy, Peer

_FD = struct.Struct("i")
#: Room for the credentials of the process that wrote a request, and for nothing else.
_AUTHOR = CMSG_LEN(UCRED.size)
#: And for a descriptor that rides along.
_AUTHOR_AND_FD = CMSG_SPACE(UCRED.size) + CMSG_LEN(_FD.size)
# A name of our own: looking a member up in its enum costs as much as a short function.
_SEQPACKET = Kind.SEQPACKET
# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
#: How a request is read: from a stream, and from a packet socket.
TAKE = int(MSG_DONTWAIT)
LOOK = int(MSG_DONTWAIT | MSG_PEEK)
_SOCKET, _RIGHTS = int(SOL_SOCKET), int(SCM_RIGHTS)
_PASSCRED = int(SO_PASSCRED)


class Channel(Peer):
    """One program's socket, seen from vsockd's end of it."""

    sock: _socket.socket
    # What most channels never have is the class's.
    endpoint: Endpoint | None = None
    sender: Endpoint | None = None  # of the datagram socket that came with its request
    silent = False  # it is kept, and nothing was read from it yet
    is_kernel = False  # it speaks for a guest's kernel, which chooses the ports it connects from
    asks_once = False  # after a refusal there is nothing more to be said
    deputy: Deputy | None = None  # another process wrote the request that was read last
    offer_flags = 0  # of :class:`..wire.Flag`: how a device answers who connects
    lent_to: object = None  # the link (:mod:`.offers`) at whose other end its socket has been
    _capacity = -1  # of the backlog; -1: the socket does not listen
    #: of a listening socket: whose connections were announced, and not taken as far as is known
    _waiting: deque[Party]

    def __init__(
        self, sock: _socket.socket, context: Context, kind: Kind, credentials: Credentials
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

    def send(self, record: bytes) -> None:
        """Write an answer.  A program that reads nothing loses its answer, nothing else."""
        try:
            self.sock.send(record, _SEND)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise

    def send_descriptor(self, record: bytes, fd: int) -> None:
        """Write an answer with a descriptor; as :meth:`send`."""
        try:
            self.sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise

    # A listening socket

    def prepare_backlog(self, backlog: int) -> None:
        """Get room for ``backlog`` announcements, or for as many as the kernel allows.

        To be called before the first announcement, and again for another backlog.
        """
        if not self.is_listening:
            self._waiting = deque()
        backlog = min(backlog, MAX_BACKLOG)
        wanted = (backlog + 2) * ANNOUNCEMENT_COST
        if self.sock.getsockopt(SOL_SOCKET, SO_SNDBUF) < wanted:
            self.sock.setsockopt(SOL_SOCKET, SO_SNDBUF, wanted)
        room = self.sock.getsockopt(SOL_SOCKET, SO_SNDBUF) // ANNOUNCEMENT_COST - 1
        self._capacity = max(0, min(backlog, room))

    def has_room(self) -> bool:
        """Whether the program may be sent another connection, within its backlog."""
        if len(self._waiting) <= self._capacity:
            return True
        self.count_waiting()
        return len(self._waiting) <= self._capacity

    @property
    def is_listening(self) -> bool:
        """Whether there can be announcements."""
        return self._capacity >= 0

    @property
    def backlog(self) -> tuple[int, int]:
        """How many connections wait to be accepted, as of now, and how many may."""
        assert self.is_listening
        self.count_waiting()
        return len(self._waiting), self._capacity

    def count_waiting(self) -> None:
        """Find out which connections the program has taken: the first ones.

        The kernel knows how much of what was announced it has read; it is asked only when the
        count since the last asking reaches a limit.
        """
        left = _unread(self.sock.fileno()) // ANNOUNCEMENT_COST
        self._take(len(self._waiting) - left)

    def forget_waiting(self) -> None:
        """Nobody will accept the connections that wait."""
        self._take(len(self._waiting))

    def _take(self, number: int) -> None:
        for _ in range(number):
            self._waiting.popleft().pending -= 1

    def announce(self, record: bytes, source: Channel) -> None:
        """Tell a listening program of a new connection, and give it the socket."""
        fd = source.sock.fileno()
        self.sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
        self._waiting.append(source.party)
        source.party.pending += 1


def consume(sock: _socket.socket, kind: Kind, polling: bool) -> None:
    """Take what is left of a request off ``sock``; its sender's socket becomes writable."""
    try:
        if kind is Kind.SEQPACKET:  # requests there are peeked at: a message is read whole
            sock.recv(1, TAKE)
        elif polling:  # request and padding were one write: it is all here
            sock.recv(len(PADDING), TAKE)
    except (BlockingIOError, ConnectionError):
        pass  # there was no more, it was taken with a descriptor, or the sender has gone


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


def take_datagram_socket(channel: Channel) -> _socket.socket:
    """Take the request off the channel, and the datagram socket that rides along."""
    if channel.kind is not Kind.SEQPACKET:
        raise ProtocolError("a datagram request on a stream")
    fd = receive_with_descriptor(channel.sock)
    if fd is None:
        raise ProtocolError("a datagram request without a descriptor")
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        dispose(fd)
        raise ProtocolError("a datagram request with something that is no socket") from None
    if (sock.family, sock.type) != (AF_UNIX, SOCK_DGRAM):
        dispose(sock.detach())
        raise ProtocolError(f"a datagram request with a socket of {sock.family=} {sock.type=}")
    return sock


def _unread(fd: int) -> int:
    answer = array.array("i", [0])
    fcntl.ioctl(fd, TIOCOUTQ, answer)
    return answer[0]


def _announcement_cost() -> int:
    """What the kernel charges for one announcement, in bytes of send buffer."""
    ours, theirs = socketpair()
    with ours, theirs:
        ours.sendmsg((bytes(RECORD_SIZE),), ((SOL_SOCKET, SCM_RIGHTS, _FD.pack(ours.fileno())),))
        return _unread(ours.fileno())


ANNOUNCEMENT_COST = _announcement_cost()
