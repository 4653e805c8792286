"""Clients' connections to vsockd, and the backlogs of those that listen."""

from __future__ import annotations

import _socket
import errno
import os
import select
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from resource import RUSAGE_THREAD, getrusage
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
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)
from time import monotonic
from typing import ClassVar

from .._linux.descriptor_passing import dispose
from .._linux.sockets import HAS_PASSRIGHTS, descriptor_in
from ..fabric import Context, Credentials, Endpoint, EndpointKind, Party, Refused
from ..protocol import PADDING, REQUEST_SIZE, ProtocolError
from .credentials import UCRED, Author, Deputy, Peer
from .handover import Reader, Saved, Writer
from .in_flight import InFlight, Step
from .limit_checks import may_keep_descriptor
from .limits import DAEMON_NOTICED_CALL_SECONDS, DAEMON_UNWANTED_DESCRIPTORS_MAX
from .stream_liveness import Group

_FD = struct.Struct("i")
#: Ancillary space for the credentials of the process that wrote a request, and nothing else.
_AUTHOR = CMSG_LEN(UCRED.size)
#: Ancillary space for credentials and one descriptor.
_AUTHOR_AND_FD = CMSG_SPACE(UCRED.size) + CMSG_LEN(_FD.size)
# Module aliases of enum members: hot path.
_STREAM, _SEQPACKET = EndpointKind.STREAM, EndpointKind.SEQPACKET
# Plain integers: `|` of enum flags costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
#: Flags to read a request with: from a stream, and from a packet socket.
READ = int(MSG_DONTWAIT)
PEEK = int(MSG_DONTWAIT | MSG_PEEK)

#: Errors for which sending a descriptor can succeed later: its user has too many descriptors in
#: flight, memory is short, or the receiver has not read what was sent before.
SHORTAGE = (errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS, errno.EAGAIN)

_SOCKET, _RIGHTS = int(SOL_SOCKET), int(SCM_RIGHTS)
_PASSCRED = int(SO_PASSCRED)
_REPLY = Step.REPLY


class Channel(Peer):
    """One client's socket, seen from vsockd's end of the connection."""

    sock: _socket.socket
    # Class attributes: defaults that most channels never change.
    endpoint: Endpoint | None = None
    sender: Endpoint | None = None  # endpoint of the datagram socket that came with the request
    silent = False  # True while the channel is kept and no request has been read
    requests = 0  # read since the channel has been kept
    is_device = False  # True for a device: the guest's kernel chose the port it connects from
    deputy: Deputy | None = None  # set if another process wrote the request read last
    connect_flags = 0  # RequestFlag: how a device replies to the connecting client
    last_device: object = None  # the link (:mod:`.device_link`) its socket has been sent over
    listener: Listener | None = None  # set for a listening socket or a named one
    secret = 0  # the one of BIND_SOCKET
    #: for a named socket: the channel that a CONNECT has moved its endpoint to
    moved: Channel | None = None
    watch: Group | None = None  # the group its socket was registered in when it was handed off
    #: set for all channels of a vsockd with a journal
    in_flight: ClassVar[InFlight | None] = None
    #: whether its requests are read from its socket
    has_requests: ClassVar[bool] = True

    def __init__(
        self, sock: _socket.socket, context: Context, kind: EndpointKind, credentials: Credentials
    ) -> None:
        self.sock = sock
        self.context = context
        self.kind = kind
        self.credentials = credentials
        self.party = context.party_of(credentials.uid)

    @property
    def has_part(self) -> bool:
        """True if a part of a request has been read; always false where requests are read whole."""
        return False

    def begin(self, in_flight: InFlight) -> None:
        """Record that a request on this channel, which the journal has, is served next."""
        in_flight.begin(self.sock.fileno(), self.context.cid, self.kind is _SEQPACKET)

    def read(self) -> bytes:
        """Return the next request, or no bytes at the end.

        Raises BlockingIOError if no request has arrived.
        """
        # The kernel drops descriptors in the message, since there is no space for them.
        # A message of a packet socket is peeked at: reading a part of it would discard the rest,
        # and with it the padding that blocks a polling sender.
        author: tuple[int, ...] | None
        try:
            if self.in_flight is not None and self.kind is _STREAM:
                data, author = self.in_flight.read(self.sock)
            else:
                how = PEEK if self.kind is _SEQPACKET else READ
                data, came, _, _ = self.sock.recvmsg(REQUEST_SIZE, _AUTHOR, how)
                author = UCRED.unpack(came[0][2]) if came else None
        except ConnectionError:
            return b""
        if author is not None and author != self.credentials:
            self.deputy = Deputy(self, Author(Credentials(*author)))
        elif self.deputy is not None:
            self.deputy = None
        return data

    @property
    def asker(self) -> Peer | Deputy:
        """The process, or pair of processes, whose rights apply to the request read last."""
        return self.deputy or self

    def receive_credentials(self, expected: bool) -> None:
        """Enable or disable receiving the writer's credentials with each request (SO_PASSCRED)."""
        self.sock.setsockopt(_SOCKET, _PASSCRED, expected)

    def may_retry(self) -> bool:
        """Return whether the channel is kept after a refusal, for another request.

        A bound socket stays bound; of unbound ones a party may keep a limited number.
        """
        if self.endpoint is not None:
            return True
        limits = self.party.limits
        room = limits is None or self.party.channels < limits.sockets
        return room and may_keep_descriptor(self.sock.fileno())

    @property
    def version(self) -> object:
        """A value that differs after a change of a listening socket, or of its endpoint."""
        assert self.listener is not None
        return self.requests, self.listener.version

    def save(self, writer: Writer) -> Saved:
        """Return the channel's state for the next vsockd; after a hand-off it has no socket."""
        return {
            "class": type(self).__name__,
            "socket": (
                writer.descriptor(self.sock.fileno(), self.sock)
                if self.sock.fileno() >= 0
                else None
            ),
            "context": self.context.cid,
            "kind": self.kind.value,
            "credentials": (*self.credentials,),
            "endpoint": writer.endpoint(self.endpoint),
            "listener": self.listener and self.listener.save(writer),
            "secret": self.secret,
            "moved": writer.channel(self.moved),
            "silent": self.silent,
            "last_device": writer.link(self.last_device),
            "watch": writer.group(self.watch),
        }

    @classmethod
    def restore(cls, reader: Reader, saved: Saved) -> Channel:
        """Return a channel that the previous vsockd has saved, without its listener.

        The channel and the link that it refers to are set by :meth:`restore_references`.
        """
        kind = EndpointKind(saved["kind"])
        type_ = SOCK_STREAM if kind is EndpointKind.STREAM else SOCK_SEQPACKET
        sock = reader.socket_or_none(saved["socket"], type_)
        if sock is None:
            sock = _socket.socket(AF_UNIX, type_)
            sock.close()
        channel = cls(
            sock, reader.context(saved["context"]), kind, Credentials(*saved["credentials"])
        )
        channel.endpoint = reader.endpoint(saved["endpoint"])
        channel.secret = saved["secret"]
        channel.watch = reader.groups.get(saved["watch"])  # None: unset, or it is closed
        return channel

    def restore_references(self, reader: Reader, saved: Saved) -> None:
        """Set the other channel and the link that the channel refers to."""
        if saved["moved"] is not None:
            self.moved = reader.channels.get(saved["moved"])  # None: it is closed
        if saved["last_device"] is not None:
            self.last_device = reader.link(saved["last_device"])

    def close(self) -> None:
        """Close the socket, and with it descriptors in requests that have not been read."""
        if HAS_PASSRIGHTS and self.kind is _STREAM and not self.is_device and not self.last_device:
            self.sock.close()  # its receive queue has no descriptors: the kernel refused them
        else:
            close_socket(self.sock, self.party)

    def has_hung_up(self) -> bool:
        """Return whether the client has closed its socket."""
        poll = select.poll()
        poll.register(self.sock.fileno(), 0)
        return bool(poll.poll(0))

    def send(self, record: bytes, in_flight: InFlight | None = None) -> None:
        """Send a reply, which is lost if the client does not read its replies.

        With ``in_flight``, the record is the reply to the request being served, and is sent once.
        """
        try:
            if in_flight is None:
                self.sock.send(record, _SEND)
            else:
                in_flight.send(_REPLY, self.sock, record)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise

    def send_descriptor(self, record: bytes, fd: int) -> None:
        """Send a reply with a descriptor, which is lost as with :meth:`send`.

        Raises Refused with ENOBUFS when the descriptor cannot be sent now.
        """
        try:
            if self.in_flight is None:
                send_descriptor(self.sock, record, fd)
            else:
                self.in_flight.send(_REPLY, self.sock, record, fd)
        except OSError as error:
            if error.errno in (errno.ETOOMANYREFS, errno.ENOMEM, errno.ENOBUFS):
                raise Refused(errno.ENOBUFS, f"cannot send the reply: {error.strerror}") from None
            if error.errno not in (errno.EAGAIN, errno.EPIPE, errno.ECONNRESET):
                raise


class Listener:
    """A listening socket, or a named one that may listen later."""

    #: Whether its streams accept descriptors, which mark ends of records (MSG_EOR) in packets.
    marks_records = False

    def __init__(self, channel: Channel) -> None:
        self.channel = channel
        self._capacity = -1  # of the backlog; -1: the socket does not listen yet
        #: parties of the pending connections; accepted ones at the head are not yet recounted
        self._pending: deque[Party] = deque()
        self._parties: set[Party] = set()  # parties with connections in it at the last recount
        #: connections not announced yet: record, descriptor of the socket, party
        self._held: deque[tuple[bytes, int, Party]] = deque()

    @property
    def version(self) -> object:
        """A value that differs after a connection; requests change everything else."""
        return len(self._held), list(self._pending)

    def save(self, writer: Writer) -> Saved:
        """Return the listener's state for the next vsockd."""
        return {
            "class": type(self).__name__,
            "capacity": self._capacity,
            "pending": [] if writer.lasting else [writer.party(one) for one in self._pending],
            "held": [
                (record, writer.descriptor(fd), writer.party(party))
                for record, fd, party in self._held
            ],
        }

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Replace the state by a later one that the previous vsockd has saved."""
        Listener.close(self)
        self._capacity = saved["capacity"]
        for party in saved["pending"]:
            self._add_pending(reader.party(party))
        for record, fd, party in saved["held"]:
            self._held.append((record, reader.descriptors[fd], reader.party(party)))
            reader.party(party).pending += 1

    @property
    def next_token(self) -> int:
        """The descriptor of a socket for the next connection, or -1 if it needs none."""
        return -1

    def set_token(self, fd: int) -> None:
        """Set :attr:`next_token`, of a vsockd that was killed."""

    def recover_pending(self, parties: Iterable[Party]) -> None:
        """Count the pending connections of a vsockd that was killed.

        ``parties`` are those of the last connections, the oldest first.
        """

    @property
    def has_held(self) -> bool:
        """True if connections wait to be announced."""
        return bool(self._held)

    @property
    def is_listening(self) -> bool:
        """True if the socket accepts connections."""
        return self._capacity >= 0

    @property
    def backlog(self) -> tuple[int, int]:
        """Number of pending connections, as of now, and their maximum."""
        self.recount_pending()
        return len(self._pending) + len(self._held), self._capacity

    def prepare(self, backlog: int) -> None:
        """Provide space for ``backlog`` connections, or as many as the kernel allows.

        Called before the first connection, and again for each listen() with another backlog.
        """
        raise NotImplementedError

    def has_room(self) -> bool:
        """Return whether the backlog has space for another connection."""
        if len(self._pending) <= self._capacity and not self._held:
            return True
        self.recount_pending()
        return len(self._pending) + len(self._held) <= self._capacity

    def recount_pending(self) -> None:
        """Update the count of pending connections; a program accepts them in their order."""
        raise NotImplementedError

    def announce(
        self, record: bytes, fd: int, party: Party, in_flight: InFlight | None = None
    ) -> None:
        """Send the program the record and the descriptor of a new connection, opened by ``party``.

        With ``in_flight``, the connection is that of the request being served, and is sent once.

        Raises OSError when it cannot be sent.
        """
        raise NotImplementedError

    def hold(self, record: bytes, fd: int, party: Party) -> None:
        """Keep a connection that cannot be announced now, to be announced later."""
        self._held.append((record, os.dup(fd), party))
        party.pending += 1

    def announce_held(self, record_channel: Callable[[Channel], None]) -> bool:
        """Announce the connections that :meth:`hold` keeps; return whether all were announced.

        Raises OSError when the program cannot receive any announcement any longer.
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
            party.pending -= 1  # `hold` and `announce` have both counted it
            self._held.popleft()
            record_channel(self.channel)
            os.close(fd)
        return True

    def is_open(self) -> bool:
        """Return whether any process has the socket open."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the pending connections, which will not be accepted."""
        for _, fd, party in self._held:
            os.close(fd)
            party.pending -= 1
        self._held.clear()
        self._remove_pending(len(self._pending))

    def _add_pending(self, party: Party) -> None:
        self._pending.append(party)
        party.pending += 1
        if party not in self._parties:
            self._parties.add(party)
            party.pending_listeners[self] = None

    def _remove_pending(self, number: int) -> None:
        for _ in range(number):
            self._pending.popleft().pending -= 1
        if not self._pending:
            for party in self._parties:
                del party.pending_listeners[self]
            self._parties.clear()


def send_descriptor(sock: _socket.socket, record: bytes, fd: int) -> None:
    """Send a record with a descriptor.

    Raises OSError if the receiver has no space, or has closed.
    """
    sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)


def consume(channel: Channel, polling: bool) -> None:
    """Remove a parsed request's bytes from the socket; the client then polls as writable again."""
    if not channel.has_requests:
        return
    in_flight = channel.in_flight
    try:
        if channel.kind is _SEQPACKET:  # the request was peeked at: this reads all of it
            begin = _now()
            if in_flight is None:
                channel.sock.recv(1, READ)  # closes descriptors that came with it
            else:
                in_flight.consume(channel.sock, 1)
            _note_duration(channel.party, begin)
        elif polling:  # request and padding were one write, so the padding has arrived
            if in_flight is None:
                channel.sock.recv(len(PADDING), READ)
            else:
                in_flight.consume(channel.sock, len(PADDING))
    except (BlockingIOError, ConnectionError):
        pass  # the client has closed


def take_message(in_flight: InFlight, link: _socket.socket, party: Party) -> None:
    """Remove a served message of ``party``, and the descriptors in it, from a link, once."""
    begin = _now()
    with suppress(BlockingIOError, ConnectionError):
        in_flight.consume(link, 1, Step.TAKE)
    _note_duration(party, begin)


def close_socket(sock: _socket.socket, party: Party) -> None:
    """Close a socket, which may have unread messages of ``party`` with descriptors."""
    begin = _now()
    sock.close()
    _note_duration(party, begin)


def _now() -> tuple[float, int]:
    """Return the time, and how often this thread has slept."""
    return monotonic(), getrusage(RUSAGE_THREAD).ru_nvcsw


def _note_duration(party: Party, begin: tuple[float, int]) -> None:
    """Add to the time for which descriptors of ``party`` have blocked vsockd.

    Only the system call that closes the descriptors is timed: a longer period would often include
    other programs' use of the processor.
    """
    seconds = monotonic() - begin[0]
    # A call that has not slept was long because other programs used the processor.
    if seconds > DAEMON_NOTICED_CALL_SECONDS and getrusage(RUSAGE_THREAD).ru_nvcsw > begin[1]:
        party.blocked += seconds


#: The party of each unwanted descriptor closed by a thread since the last count.
_closed: deque[Party] = deque()


def close_unwanted(fd: int, party: Party) -> None:
    """Close a descriptor that ``party`` sent without reason, in a thread (closing may block)."""
    party.unwanted += 1
    dispose(fd, partial(_closed.append, party))


def has_too_many_unwanted(party: Party) -> bool:
    """Return whether a party has as many unwanted descriptors waiting to be closed as it may."""
    while _closed:
        _closed.popleft().unwanted -= 1
    return party.unwanted >= DAEMON_UNWANTED_DESCRIPTORS_MAX


def _peek_descriptor(sock: _socket.socket) -> int | None:
    """Return the descriptor that came with the next message, if any; the message stays unread.

    The ancillary space fits one descriptor: the kernel drops any others.
    """
    _, ancillary, _, _ = sock.recvmsg(1, _AUTHOR_AND_FD, PEEK | MSG_CMSG_CLOEXEC)
    return descriptor_in(ancillary)


@contextmanager
def take_socket(channel: Channel, *types: int) -> Iterator[_socket.socket]:
    """Yield the unix socket, of one of ``types``, that came with the request in the channel.

    The request stays in the channel until it is served, see :func:`consume`.  The socket is closed
    at the end of the with block.
    """
    sock = _take_socket(channel, types)
    try:
        yield sock
    finally:
        close_socket(sock, channel.party)


def _take_socket(channel: Channel, types: tuple[int, ...]) -> _socket.socket:
    if channel.kind is not EndpointKind.SEQPACKET:
        raise ProtocolError("request with a descriptor on a stream channel")
    # The request is consumed without space for the descriptor, which the kernel closes.
    if has_too_many_unwanted(channel.party):
        raise Refused(errno.ENOBUFS, f"{channel.party.name} sends invalid descriptors")
    begin = _now()
    fd = _peek_descriptor(channel.sock)
    _note_duration(channel.party, begin)
    if fd is None:
        raise ProtocolError("missing descriptor")
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        problem = "expected a unix socket"
    else:
        if sock.family == AF_UNIX and sock.type in types:
            return sock
        problem = f"{sock.family=} {sock.type=}"
        sock.detach()
    consume(channel, False)  # the unread request refers to the descriptor, too
    close_unwanted(fd, channel.party)
    raise ProtocolError(f"invalid descriptor: {problem}")
