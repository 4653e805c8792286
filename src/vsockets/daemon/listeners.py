"""Listening sockets: connections that wait to be accepted, and how a program learns of them.

A socket of the library is connected to vsockd.  vsockd writes a record for each connection on it,
with the descriptor (:class:`AnnouncedListener`).

Of a socket of an unmodified program nothing may be read that is not a connection's, and nothing
written to it may come to vsockd.  So it is a listening unix socket, which vsockd reaches by a name
(:class:`NamedListener`).  vsockd connects a *token* to it, on which it sends the record and the
descriptor.  So the kernel answers as for a listening socket: it is readable while a token waits to
be accepted, and read() and write() fail.
"""

from __future__ import annotations

import _socket
import array
import errno
import fcntl
import os
import struct
from collections import deque
from socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SHUT_RD,
    SO_SNDBUF,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
    socketpair,
)
from termios import TIOCOUTQ  # the same ioctl as SIOCOUTQ: bytes sent and not yet read

from ..fabric import Party, Refused
from ..limits import LISTEN_BACKLOG_MAX
from ..protocol import RECORD_SIZE
from . import reserve
from .channel import Channel
from .limits import DAEMON_UNREAD_REPLIES_MAX
from .named_sockets import NamedSocket

_FD = struct.Struct("i")
# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TOKEN_FLAGS = int(SOCK_NONBLOCK | SOCK_CLOEXEC)
#: Why a connection cannot be announced now, although it can later: its user has too many
#: descriptors in flight already, or memory is short, or the program has not read what was announced
#: before.
SHORTAGE = (errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)

_SOCKET, _RIGHTS, _DATAGRAM = int(SOL_SOCKET), int(SCM_RIGHTS), int(SOCK_DGRAM)


class Listener:
    """A listening socket, or one that has been bound to a name and may listen later."""

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._capacity = -1  # of the backlog; -1: the socket does not listen (yet)
        #: whose connections wait, as far as is known: the first ones may have been accepted
        self._waiting: deque[Party] = deque()
        self._parties: set[Party] = set()  # that have some among those, or had
        #: those that could not be announced: the record, the socket's descriptor, whose it is
        self._held: deque[tuple[bytes, int, Party]] = deque()

    @property
    def is_listening(self) -> bool:
        """Whether there can be connections."""
        return self._capacity >= 0

    @property
    def backlog(self) -> tuple[int, int]:
        """How many connections wait to be accepted, as of now, and how many may."""
        self.count_waiting()
        return len(self._waiting) + len(self._held), self._capacity

    def prepare(self, backlog: int) -> None:
        """Get room for ``backlog`` connections, or for as many as the kernel allows.

        To be called before the first connection, and again for another backlog.
        """
        raise NotImplementedError

    def has_room(self) -> bool:
        """Return whether the program may be sent another connection, within its backlog."""
        if len(self._waiting) <= self._capacity and not self._held:
            return True
        self.count_waiting()
        return len(self._waiting) + len(self._held) <= self._capacity

    def count_waiting(self) -> None:
        """Find out which connections the program has accepted: the first ones."""
        raise NotImplementedError

    def announce(self, record: bytes, fd: int, party: Party) -> None:
        """Send the program a new connection of ``party``, and its record.  OSError."""
        raise NotImplementedError

    def hold(self, record: bytes, fd: int, party: Party) -> None:
        """Keep a connection that cannot be announced now, to be announced later."""
        self._held.append((record, os.dup(fd), party))
        party.pending += 1

    def announce_held(self) -> bool:
        """Announce what :meth:`hold` has kept; return whether it was all.

        OSError if the program will never learn of it.
        """
        while self._held:
            record, fd, party = self._held[0]
            try:
                self.announce(record, fd, party)
            except Refused:  # few descriptors are left
                return False
            except OSError as error:
                if error.errno in SHORTAGE:
                    return False
                raise
            party.pending -= 1  # it was counted already
            self._held.popleft()
            os.close(fd)
        return True

    def is_open(self) -> bool:
        """Return whether any process has the socket open."""
        raise NotImplementedError

    def close(self) -> None:
        """Forget the connections that wait: they will not be accepted."""
        for _, fd, party in self._held:
            os.close(fd)
            party.pending -= 1
        self._held.clear()
        self._take(len(self._waiting))

    def _add(self, party: Party) -> None:
        self._waiting.append(party)
        party.pending += 1
        if party not in self._parties:
            self._parties.add(party)
            party.awaited[self] = None

    def _take(self, number: int) -> None:
        for _ in range(number):
            self._waiting.popleft().pending -= 1
        if not self._waiting:
            for party in self._parties:
                del party.awaited[self]
            self._parties.clear()


class AnnouncedListener(Listener):
    """A socket that is connected to vsockd."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._sock = channel.sock

    def prepare(self, backlog: int) -> None:
        backlog = min(backlog, LISTEN_BACKLOG_MAX)
        wanted = (backlog + 2) * ANNOUNCEMENT_COST
        if self._sock.getsockopt(SOL_SOCKET, SO_SNDBUF) < wanted:
            self._sock.setsockopt(SOL_SOCKET, SO_SNDBUF, wanted)
        room = self._sock.getsockopt(SOL_SOCKET, SO_SNDBUF) // ANNOUNCEMENT_COST - 1
        self._capacity = max(0, min(backlog, room))

    def count_waiting(self) -> None:
        # The kernel knows how much of what was announced the program has read; it is asked only
        # when the count since the last asking reaches a limit.
        left = unread(self._sock.fileno()) // ANNOUNCEMENT_COST
        self._take(len(self._waiting) - left)

    def is_open(self) -> bool:
        return not self.channel.has_hung_up()

    def announce(self, record: bytes, fd: int, party: Party) -> None:
        self._sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
        self._add(party)


class NamedListener(Listener):
    """A listening unix socket."""

    def __init__(self, channel: Channel, sock: NamedSocket, type_: int) -> None:
        """``type_``: the socket's."""
        super().__init__(channel)
        self._named = sock
        self._type = type_
        self._tokens: deque[_socket.socket] = deque()  # of the connections that wait
        self._next: _socket.socket | None = None  # the next token
        self._silent: _socket.socket | None = None  # one that is connected, and was sent nothing

    def replace(self, sock: NamedSocket, type_: int) -> None:
        """Let another socket of the program take the place of this one."""
        self._named.close()
        self._named, self._type = sock, type_
        self._drop_next()

    def prepare(self, backlog: int) -> None:
        self._capacity = min(backlog, LISTEN_BACKLOG_MAX)

    def has_room(self) -> bool:
        if not super().has_room() or not self.is_open():
            return False
        if self._next is None:
            self._next = self._new_token()
        return True

    def count_waiting(self) -> None:
        # A token stays with vsockd until the program has read what is on it, or closed it.
        while self._tokens and not unread(self._tokens[0].fileno()):
            self._tokens.popleft().close()
            self._take(1)

    def announce(self, record: bytes, fd: int, party: Party) -> None:
        token, self._silent = self._silent, None
        connected = was_silent = token is not None
        if token is None:
            token, self._next = self._next or self._new_token(), None
        try:
            if not was_silent:
                self._named.connect(token)
                connected = True
            token.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
        except OSError as error:
            if connected and error.errno in SHORTAGE:
                self._silent = token  # the program waits for what will be sent on it
                raise
            token.close()
            if was_silent:  # the program did not wait so long
                self.announce(record, fd, party)
                return
            raise
        self._tokens.append(token)
        self._add(party)
        self.count_waiting()

    def _new_token(self) -> _socket.socket:
        token = _socket.socket(AF_UNIX, self._type | _TOKEN_FLAGS)
        try:
            reserve.require_free(token.fileno())
            token.shutdown(SHUT_RD)  # nothing can be sent to vsockd on it
        except BaseException:
            token.close()
            raise
        return token

    def is_open(self) -> bool:
        return self._named.is_open(_DATAGRAM)

    def close(self) -> None:
        super().close()
        for token in self._tokens:
            token.close()
        self._tokens.clear()
        self._drop_next()
        self._named.close()

    def _drop_next(self) -> None:
        for token in (self._next, self._silent):
            if token is not None:
                token.close()
        self._next = self._silent = None


def unread(fd: int) -> int:
    """Return how much of what was sent on a socket waits to be read, as the kernel counts."""
    answer = array.array("i", [0])
    fcntl.ioctl(fd, TIOCOUTQ, answer)
    return answer[0]


def _announcement_cost() -> int:
    """Return what the kernel charges for one announcement, in bytes of send buffer."""
    ours, theirs = socketpair()
    with ours, theirs:
        ours.sendmsg((bytes(RECORD_SIZE),), ((SOL_SOCKET, SCM_RIGHTS, _FD.pack(ours.fileno())),))
        return unread(ours.fileno())


ANNOUNCEMENT_COST = _announcement_cost()


def leaves_answers_unread(channel: Channel) -> bool:
    """Return whether more answers wait for a program than it would leave unread that means well."""
    announced = isinstance(channel.listener, AnnouncedListener)
    return (
        not announced
        and unread(channel.sock.fileno()) > DAEMON_UNREAD_REPLIES_MAX * ANNOUNCEMENT_COST
    )
