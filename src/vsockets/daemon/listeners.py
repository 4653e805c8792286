"""Listening sockets: their backlogs, and the records that announce connections to programs.

A socket of the library is connected to vsockd.  vsockd sends a record for each connection over it,
with the descriptor (:class:`AnnouncedListener`).

A socket of an unmodified program must not deliver anything but connections to the program, and must
not deliver anything the program writes to vsockd.  So it is a listening unix socket, which vsockd
reaches by name (:class:`NamedListener`).  For each connection vsockd connects a *token* socket to
it, over which it sends the record and the descriptor.  The kernel then treats the program's socket
as any listening socket: it polls readable while a token is in its backlog, and read() and write()
fail.
"""

from __future__ import annotations

import _socket
import errno
import struct
from collections import deque
from collections.abc import Callable, Iterable
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
    SOCK_SEQPACKET,
    SOL_SOCKET,
    socketpair,
)

from .._linux.inspection import unread_bytes
from ..eventloop.loop import EventLoop
from ..fabric import Connection, Endpoint, EndpointKind, Party, Refused
from ..limits import LISTEN_BACKLOG_MAX
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..protocol import RECORD_SIZE, Record, RequestFlag, Role, encode_stream
from .channel import SHORTAGE, Channel, Listener, send_descriptor
from .handover import Reader, Saved, Writer
from .in_flight import InFlight, Step
from .limit_checks import require_unreserved
from .limits import DAEMON_ANNOUNCE_RETRY_SECONDS, DAEMON_UNREAD_REPLIES_MAX
from .named_sockets import NamedSocket

_FD = struct.Struct("i")
# Plain integers: `|` of enum flags costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TOKEN_FLAGS = int(SOCK_NONBLOCK | SOCK_CLOEXEC)
_ANNOUNCE = Step.ANNOUNCE
_SOCKET, _RIGHTS, _DATAGRAM = int(SOL_SOCKET), int(SCM_RIGHTS), int(SOCK_DGRAM)


class AnnouncedListener(Listener):
    """A listening socket of the library, connected to vsockd."""

    def __init__(self, channel: Channel) -> None:
        super().__init__(channel)
        self._sock = channel.sock

    def prepare(self, backlog: int) -> None:
        """Enlarge the send buffer for ``backlog`` announcements."""
        backlog = min(backlog, LISTEN_BACKLOG_MAX)
        wanted = (backlog + 2) * ANNOUNCEMENT_COST
        if self._sock.getsockopt(SOL_SOCKET, SO_SNDBUF) < wanted:
            self._sock.setsockopt(SOL_SOCKET, SO_SNDBUF, wanted)
        room = self._sock.getsockopt(SOL_SOCKET, SO_SNDBUF) // ANNOUNCEMENT_COST - 1
        self._capacity = max(0, min(backlog, room))

    def recount_pending(self) -> None:
        """Update the count of pending connections: one for each announcement not read yet."""
        # The kernel is asked only when the count reaches a limit.
        left = unread_bytes(self._sock.fileno()) // ANNOUNCEMENT_COST
        self._remove_pending(len(self._pending) - left)

    def is_open(self) -> bool:
        """Return whether the program has not closed its socket."""
        return not self.channel.has_hung_up()

    def recover_pending(self, parties: Iterable[Party]) -> None:
        """Count the announcements that the program has not read."""
        for party in parties:
            self._add_pending(party)
        left = unread_bytes(self._sock.fileno()) // ANNOUNCEMENT_COST
        self._remove_pending(max(0, len(self._pending) - left))

    def announce(
        self, record: bytes, fd: int, party: Party, in_flight: InFlight | None = None
    ) -> None:
        """Send the record and the descriptor over the listening socket."""
        if in_flight is None:
            self._sock.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
        else:
            in_flight.send(_ANNOUNCE, self._sock, record, fd)
        self._add_pending(party)


class NamedListener(Listener):
    """A listening unix socket of an unmodified program, which gets tokens: see above."""

    marks_records = True

    def __init__(self, channel: Channel, sock: NamedSocket, type_: int) -> None:
        """Listen on ``sock``, a socket of type ``type_``."""
        super().__init__(channel)
        self._named = sock
        self._type = type_
        self._tokens: deque[_socket.socket] = deque()  # tokens of the pending connections
        self._next_token: _socket.socket | None = None  # the token for the next connection
        self._idle_token: _socket.socket | None = None  # a connected token without a record yet

    def save(self, writer: Writer) -> Saved:
        """Return the listener's state for the next vsockd."""
        # They come and go with each connection; without them, pending ones are counted from zero.
        kept = not writer.lasting
        tokens = [writer.descriptor(token.fileno()) for token in self._tokens if kept]
        return {
            **super().save(writer),
            "name": self._named.name,
            # An endpoint that a connect has moved refers to its listener after that has closed.
            "node": None if self._named.node < 0 else writer.descriptor(self._named.node),
            "type": self._type,
            "tokens": tokens,
            "next_token": writer.descriptor_of(self._next_token if kept else None),
            "idle_token": writer.descriptor_of(self._idle_token if kept else None),
        }

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Restore the state that the previous vsockd has saved."""
        super().restore(reader, saved)
        for token in saved["tokens"]:
            self._tokens.append(reader.socket(token, self._type))
        self._next_token = reader.socket_or_none(saved["next_token"], self._type)
        self._idle_token = reader.socket_or_none(saved["idle_token"], self._type)

    def replace(self, sock: NamedSocket, type_: int) -> NamedSocket:
        """Replace the program's socket by another one that it has created for the same endpoint."""
        before, self._named, self._type = self._named, sock, type_
        self._drop_unused()
        return before

    def prepare(self, backlog: int) -> None:
        """Set the maximum of pending connections."""
        self._capacity = min(backlog, LISTEN_BACKLOG_MAX)

    def has_room(self) -> bool:
        """Return whether the backlog has space; if so, create a token socket for the connection."""
        if not super().has_room() or not self.is_open():
            return False
        if self._next_token is None:
            self._next_token = self._new_token()
        return True

    def recount_pending(self) -> None:
        """Update the count of pending connections: one for each token not accepted yet."""
        # A token stays open until the program has read its record, or closed it.
        while self._tokens and not unread_bytes(self._tokens[0].fileno()):
            self._tokens.popleft().close()
            self._remove_pending(1)

    @property
    def next_token(self) -> int:
        """The descriptor of the token for the next connection."""
        token = self._idle_token or self._next_token
        return -1 if token is None else token.fileno()

    def set_token(self, fd: int) -> None:
        """Set the token for the next connection."""
        self._next_token = _socket.socket(AF_UNIX, self._type, 0, fd)

    def announce(
        self, record: bytes, fd: int, party: Party, in_flight: InFlight | None = None
    ) -> None:
        """Connect a token socket to the program's; send the record and the descriptor over it."""
        token, self._idle_token = self._idle_token, None
        connected = was_idle = token is not None
        if token is None:
            token, self._next_token = self._next_token or self._new_token(), None
        try:
            if not was_idle:
                self._connect(token)
                connected = True
            if in_flight is None:
                token.sendmsg((record,), ((_SOCKET, _RIGHTS, _FD.pack(fd)),), _SEND)
            else:
                in_flight.send(_ANNOUNCE, token, record, fd)
        except OSError as error:
            if connected and error.errno in SHORTAGE:
                self._idle_token = token  # the program has accepted it and waits for the record
                raise
            token.close()
            if was_idle:  # the program has closed the idle token
                self.announce(record, fd, party, in_flight)
                return
            raise
        self._tokens.append(token)
        self._add_pending(party)
        self.recount_pending()

    def _connect(self, token: _socket.socket) -> None:
        try:
            self._named.connect(token)
        except OSError as error:
            if error.errno != errno.EISCONN:  # by the vsockd before, which was killed then
                raise

    def _new_token(self) -> _socket.socket:
        token = _socket.socket(AF_UNIX, self._type | _TOKEN_FLAGS)
        try:
            require_unreserved(token.fileno())
            token.shutdown(SHUT_RD)  # the program cannot send to vsockd over it
        except BaseException:
            token.close()
            raise
        return token

    def is_open(self) -> bool:
        """Return whether any process has the listening socket open."""
        return self._named.is_open(_DATAGRAM)

    def close(self) -> None:
        """Release the pending connections, and close the path to the socket."""
        super().close()
        for token in self._tokens:
            token.close()
        self._tokens.clear()
        self._drop_unused()
        self._named.close()

    def _drop_unused(self) -> None:
        for token in (self._next_token, self._idle_token):
            if token is not None:
                token.close()
        self._next_token = self._idle_token = None


class Unannounced:
    """The listeners with connections that could not be announced at once."""

    def __init__(
        self,
        loop: EventLoop,
        drop: Callable[[Listener], None],
        record: Callable[[Channel], None],
    ) -> None:
        """Start without listeners.

        ``drop`` is called with a listener whose program cannot receive announcements, ``record``
        with each channel whose listener has changed.
        """
        self._loop = loop
        self._drop = drop
        self._record = record
        self.targets: dict[Listener, None] = {}
        self._cannot_send = False  # True if the last descriptor could not be sent to any process

    def add(self, target: Listener, error: OSError) -> None:
        """Announce the connections of ``target`` later, which ``error`` has prevented now."""
        self.targets[target] = None
        if len(self.targets) == 1:
            self.retry_later()
        self._cannot_send |= error.errno != errno.EAGAIN  # EAGAIN concerns this listener only

    def retry_later(self) -> None:
        """Announce the connections later, if there are any."""
        if self.targets:
            self._loop.call_later(DAEMON_ANNOUNCE_RETRY_SECONDS, self._retry)

    def _retry(self) -> None:
        for target in list(self.targets):
            try:
                if target.announce_held(self._record):
                    self.targets.pop(target, None)
            except OSError:
                self._drop(target)
        self.retry_later()

    def require_announceable(self, channel: Channel, target: object) -> None:
        """Raise Refused if a connection could not be announced, because earlier ones still wait.

        The client then gets an errno at once, instead of an established stream that waits.
        """
        if self._cannot_send:
            ours, theirs = socketpair(AF_UNIX, SOCK_SEQPACKET)
            with ours, theirs:
                try:
                    send_descriptor(ours, b"\0", channel.sock.fileno())
                except OSError as error:
                    reason = f"cannot send a descriptor: {error.strerror}"
                    raise Refused(errno.ENOBUFS, reason) from None
            self._cannot_send = False
        if target in self.targets:
            raise Refused(errno.ENOBUFS, "connections to this listener wait to be announced")


def restore_listener(reader: Reader, channel: Channel, saved: Saved) -> Listener:
    """Give a channel the listener that the previous vsockd has saved; return it."""
    listener = channel.listener
    if listener is None and saved["class"] == AnnouncedListener.__name__:
        listener = AnnouncedListener(channel)
    elif listener is None:
        node = -1 if saved["node"] is None else reader.descriptors[saved["node"]]
        named = NamedSocket(saved["name"], node)
        listener = NamedListener(channel, named, saved["type"])
    channel.listener = listener
    listener.restore(reader, saved)
    return listener


def _announcement_cost() -> int:
    """Return how many bytes of the send buffer one announcement takes.

    The kernel accounts for more than the message has.
    """
    ours, theirs = socketpair()
    with ours, theirs:
        ours.sendmsg((bytes(RECORD_SIZE),), ((SOL_SOCKET, SCM_RIGHTS, _FD.pack(ours.fileno())),))
        return unread_bytes(ours.fileno())


ANNOUNCEMENT_COST = _announcement_cost()


def leaves_replies_unread(channel: Channel) -> bool:
    """Return whether more replies are unread than a well-behaved client leaves unread."""
    announced = isinstance(channel.listener, AnnouncedListener)
    return (
        not announced
        and unread_bytes(channel.sock.fileno()) > DAEMON_UNREAD_REPLIES_MAX * ANNOUNCEMENT_COST
    )


# The two records of every connect spell out their arguments: starred ones cost a function call.
_CONNECTED = int(Role.CONNECTED)


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """Encode a bound socket."""
    role = Role.BOUND
    if endpoint.kind is EndpointKind.DATAGRAM:
        role = Role.DATAGRAM
    elif endpoint.listening:
        role = Role.LISTENING
    return Record(
        0,
        int(RequestFlag.NAMED) if isinstance(endpoint.handle, NamedListener) else 0,
        *endpoint.address,
        VMADDR_CID_ANY,
        VMADDR_PORT_ANY,
        role,
        *endpoint.owner,
        *endpoint.sizes,
    ).encode()


def encode_connecting(stream: Connection) -> bytes:
    """Encode a stream as seen from its connecting side."""
    cid, port = stream.local
    peer_cid, peer_port = stream.peer
    pid, uid, gid = stream.listener.owner
    _, minimum, maximum = stream.sizes
    return encode_stream(
        cid, port, peer_cid, peer_port, _CONNECTED, pid, uid, gid, stream.size, minimum, maximum
    )


def encode_offer(stream: Connection, flags: int, polling: bool) -> bytes:
    """Encode a pending connection for a device, with the requested buffer sizes."""
    if polling:
        flags |= RequestFlag.POLLING
    return Record(
        0, flags, *stream.peer, *stream.local, Role.CONNECTED, *stream.owner, *stream.sizes
    ).encode()


def encode_accepting(stream: Connection) -> bytes:
    """Encode a stream as seen from its accepting side."""
    cid, port = stream.peer
    peer_cid, peer_port = stream.local
    pid, uid, gid = stream.owner
    _, minimum, maximum = stream.listener.sizes
    return encode_stream(
        cid, port, peer_cid, peer_port, _CONNECTED, pid, uid, gid, stream.size, minimum, maximum
    )
