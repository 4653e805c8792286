"""The supervisor's connections to vsockd: requests that do not block, and ports held for programs.

A port of a program's socket is held by a connection of the supervisor.  The socket itself is not
connected to vsockd before it becomes a stream: so the kernel fails the program's reads and writes
as on any unconnected unix socket, and none of vsockd's protocol reaches the program
(:mod:`vsockets.daemon.listeners`).
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import os
import secrets
import select
import struct
import time
from collections.abc import Callable
from enum import Enum, auto
from socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_CREDENTIALS,
    SO_SNDTIMEO,
    SOCK_CLOEXEC,
    SOCK_NONBLOCK,
    SOCK_SEQPACKET,
    SOL_SOCKET,
)
from typing import TypeVar, TypeVarTuple

from .._linux.libc import libc
from .._linux.sockets import TIMEVAL, with_descriptor
from ..attachment import Attachment, receive_reply, send_request
from ..limits import VSOCKD_REPLY_TIMEOUT_SECONDS
from ..model.buffers import BufferSizes
from ..protocol import Record, client, is_socket_name
from ..state_folder import SEQPACKET, STREAM
from .limits import (
    SUPERVISOR_LATE_REPLY_SECONDS,
    SUPERVISOR_RECONNECT_SECONDS,
    SUPERVISOR_REPLY_GRACE_SECONDS,
)
from .process import Processes
from .scheduler import HUNG_UP, CoroutineScheduler, pause, ready

T = TypeVar("T")
Ts = TypeVarTuple("Ts")

SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TAKE = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
#: The shortest possible SO_SNDTIMEO: the kernel rounds it up to one tick.
_ONE_TICK = TIMEVAL.pack(0, 1)
_set_option, _SOCKET_LEVEL = libc.setsockopt, int(SOL_SOCKET)
#: Credentials to send a request with: process, user and group.
Credentials = tuple[int, int, int]
_UCRED = struct.Struct("=iII")
#: A process and a user that exist and are not the supervisor's.
_INIT, _NOBODY = 1, 65_534


class Sendable(Enum):
    """The credentials (SCM_CREDENTIALS) that the kernel lets this process send."""

    OWN = auto()  #: its own process, user and group only
    USERS = auto()  #: any user and group, with its own process
    PROCESSES = auto()  #: any process, user and group


class VsockdClient:
    """A client of a context's vsockd."""

    def __init__(self, context: Attachment) -> None:
        self._context = context
        self._backlog_full = False  #: whether vsockd's backlog was full at the last attempt
        self._not_before = 0.0  #: ``time.monotonic`` from when :meth:`await_briefly` waits again
        self._sendable = _sendable()

    def sender(self, processes: Processes, pid: int) -> Credentials | None:
        """Return the credentials to send a request of a thread with, or None for the supervisor's.

        vsockd judges a request by the rights of the process that the kernel reports as its writer.
        The supervisor of root may name the program, which may have fewer rights, as the writer; in
        a container whose root lacks CAP_SYS_ADMIN it may name the program's user only.
        """
        if self._sendable is Sendable.OWN:
            return None
        credentials = processes.credentials(pid)
        if self._sendable is Sendable.USERS:
            credentials = os.getpid(), *credentials[1:]
        return credentials

    def attach(self, sock: _socket.socket, type_: int, blocks: bool) -> bool:
        """Connect a program's socket to the control socket of its type, if vsockd has room.

        ``blocks`` is whether the socket is a blocking one.  Returns False while vsockd's backlog is
        full.  Python also reports success for a connect that SIGCONT has interrupted; a send then
        fails with ENOTCONN.

        Raises OSError if vsockd cannot be reached.
        """
        try:
            if self._backlog_full:  # ask with a socket that cannot block
                with contextlib.closing(_own_socket(type_)) as probe:
                    self._context.open_channel(probe, type_)
            call_briefly(sock, SO_SNDTIMEO, blocks, self._context.open_channel, sock, type_)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            self._backlog_full = True
        else:
            self._backlog_full = False
        return not self._backlog_full

    def await_briefly(self, sock: _socket.socket) -> bool:
        """Block for a moment until vsockd's message can be received from ``sock``.

        Returns whether it can.  That saves the registration in an epoll.  While vsockd sends
        later, the supervisor does not block: other calls are served meanwhile.
        """
        if time.monotonic() < self._not_before:
            return False
        poll = select.poll()
        poll.register(sock.fileno(), select.POLLIN)
        if poll.poll(SUPERVISOR_REPLY_GRACE_SECONDS * 1000):
            return True
        self._not_before = time.monotonic() + SUPERVISOR_LATE_REPLY_SECONDS
        return False

    async def request(
        self, credentials: Credentials | None, request: bytes, fd: int | None = None
    ) -> tuple[Record, int | None]:
        """Send a request, with a descriptor if ``fd`` is given, on a connection of its own.

        Returns the reply, and the descriptor received with it.

        Raises OSError as :func:`receive_record`.
        """
        with contextlib.closing(await self.open()) as sock:
            send(sock, request, credentials, fd)
            return await receive_record(sock)

    async def open(self) -> _socket.socket:
        """Return a new connection to vsockd.

        Raises OSError if vsockd cannot be reached.
        """
        deadline = time.monotonic() + VSOCKD_REPLY_TIMEOUT_SECONDS
        sock = _own_socket(SOCK_SEQPACKET)
        try:
            while True:
                try:
                    self._context.open_channel(sock, SOCK_SEQPACKET)
                except OSError as error:
                    if error.errno != errno.ENOBUFS:
                        raise
                    await self.wait_for_room(deadline, VSOCKD_REPLY_TIMEOUT_SECONDS)
                else:
                    return sock
        except BaseException:
            sock.close()
            raise

    @staticmethod
    async def wait_for_room(deadline: float, seconds: float) -> None:
        """Wait until another attempt to connect is due.

        Raises OSError(ETIMEDOUT) past the ``deadline``, OSError(ENOBUFS) if ``seconds`` is 0: the
        caller does not wait.
        """
        if seconds <= 0:
            raise OSError(errno.ENOBUFS, os.strerror(errno.ENOBUFS))
        if time.monotonic() >= deadline:
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT))
        await pause(SUPERVISOR_RECONNECT_SECONDS)


def send(
    sock: _socket.socket, request: bytes, credentials: Credentials | None, fd: int | None = None
) -> None:
    """Send a request, with ``credentials`` and the descriptor ``fd`` if given.

    Raises OSError if vsockd has closed the connection.
    """
    ancillary: list[tuple[int, int, bytes]] = []
    if credentials is not None:
        ancillary.append((SOL_SOCKET, SCM_CREDENTIALS, _UCRED.pack(*credentials)))
    if fd is not None:
        ancillary.append(with_descriptor(fd))
    send_request(sock, request, ancillary, SEND)


def _sendable() -> Sendable:
    """Return the credentials that the kernel lets this process send."""

    def is_allowed(credentials: Credentials) -> bool:
        ours, theirs = _socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        with contextlib.closing(ours), contextlib.closing(theirs):
            try:
                send(ours, b"", credentials)
            except OSError as error:
                return error.errno == errno.EINVAL  # this user namespace lacks the user
        return True

    if is_allowed((_INIT, os.geteuid(), os.getegid())):
        return Sendable.PROCESSES
    return Sendable.USERS if is_allowed((os.getpid(), _NOBODY, _NOBODY)) else Sendable.OWN


def _own_socket(type_: int) -> _socket.socket:
    return _socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC | SOCK_NONBLOCK)


def call_briefly(
    sock: _socket.socket, option: int, blocks: bool, function: Callable[[*Ts], T], *arguments: *Ts
) -> T:
    """Call a function that uses a program's socket, and block for at most one kernel tick.

    ``option`` is SO_SNDTIMEO for a connect, SO_RCVTIMEO for an accept; ``blocks`` is whether the
    socket is a blocking one.  O_NONBLOCK would not do: the program shares it, and one of its
    threads might change it meanwhile.
    """
    if not blocks:
        return function(*arguments)
    before = sock.getsockopt(SOL_SOCKET, option, TIMEVAL.size)
    # Python's setsockopt() takes bytes for a number first, and then for None, by an exception each.
    _set_option(sock.fileno(), _SOCKET_LEVEL, option, _ONE_TICK, TIMEVAL.size)
    try:
        return function(*arguments)
    finally:
        _set_option(sock.fileno(), _SOCKET_LEVEL, option, before, TIMEVAL.size)


async def receive_record(
    sock: _socket.socket, seconds: float = VSOCKD_REPLY_TIMEOUT_SECONDS
) -> tuple[Record, int | None]:
    """Return vsockd's reply, and the descriptor received with it.

    Raises OSError with the errno of the reply, OSError(ETIMEDOUT) after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            return take_record(sock)
        except BlockingIOError:
            rest = max(0.0, deadline - time.monotonic())
            if not await ready(sock.fileno(), rest, defers_signals=True):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None


#: Return vsockd's reply, and the descriptor received with it, if they have arrived.
#:
#: Raises OSError with the errno of the reply, BlockingIOError if none has arrived.
take_record = functools.partial(receive_reply, flags=_TAKE)


def may_be_registered(sock: _socket.socket) -> bool:
    """Return whether vsockd may know a unix socket, by the names of the socket and its peer.

    Either vsockd has bound it, or it is connected to a vsockd, or was until it became a stream.
    """
    for name_of in (sock.getpeername, sock.getsockname):
        with contextlib.suppress(OSError):
            name = name_of()
            if isinstance(name, str) and (
                is_socket_name(name) or os.path.basename(name) in (STREAM, SEQPACKET)
            ):
                return True
    return False


class PortHolder:
    """A connection to vsockd that holds a socket's port, from :meth:`bind` to :meth:`close`."""

    def __init__(
        self,
        channel: _socket.socket,
        scheduler: CoroutineScheduler,
        by_inode: dict[int, PortHolder],
    ) -> None:
        """Take ownership of ``channel``, a connection to vsockd.

        The holder enters and removes itself in ``by_inode``, by its socket's inode.
        """
        self.secret = secrets.randbits(63) + 1  #: proves to vsockd that a connect is the socket's
        self.inode = 0
        self._channel = channel
        self._scheduler = scheduler
        self._by_inode = by_inode
        # A copy to watch: the epoll allows one registration for each, and replies are awaited on
        # the original.
        self._watched = os.dup(channel.fileno())
        self._key = 0

    def watch(self, lost: Callable[[int, bool], None]) -> None:
        """Call ``lost`` when vsockd releases the port.

        ``lost`` gets the socket's inode, and True if the reason is that the socket was closed.
        """

        def hung_up(events: int) -> None:
            try:
                while True:  # the reason comes last, after replies that were not awaited
                    take_record(self._channel)
            except OSError as error:
                closed = error.errno == errno.EBADF
            self.close()
            lost(self.inode, closed)

        self._key = self._scheduler.watch(self._watched, hung_up, HUNG_UP)

    async def bind(
        self,
        credentials: Credentials | None,
        sock: _socket.socket,
        address: tuple[int, int],
        sizes: BufferSizes,
        unprivileged: bool,
    ) -> Record:
        """Bind ``sock``, which may replace an earlier socket.

        Raises OSError with vsockd's errno.
        """
        request = client.bind_socket(
            address, sizes=sizes, secret=self.secret, unprivileged=unprivileged
        )
        send(self._channel, request, credentials, sock.fileno())
        record, _ = await receive_record(self._channel)
        self._by_inode.pop(self.inode, None)
        self.inode = os.fstat(sock.fileno()).st_ino
        self._by_inode[self.inode] = self
        return record

    async def listen(self, backlog: int, sizes: BufferSizes) -> None:
        """Accept connections to the socket, up to ``backlog`` of them pending.

        Raises OSError with vsockd's errno.
        """
        self._channel.send(client.listen(backlog, sizes), SEND)
        await receive_record(self._channel)

    def update(self, sizes: BufferSizes) -> None:
        """Set the buffer sizes of future connections.

        Raises OSError if vsockd has closed the connection.
        """
        self._channel.send(client.update(sizes), SEND)

    def close(self) -> None:
        """Release the port."""
        self._by_inode.pop(self.inode, None)
        if self._key:
            self._scheduler.unwatch(self._key, self._watched)
            self._key = 0
        os.close(self._watched)
        self._channel.close()


class PortHolders:
    """All port holders of a supervisor.  Holders outlive entries of :class:`.sockets.Sockets`."""

    def __init__(
        self,
        vsockd: VsockdClient,
        scheduler: CoroutineScheduler,
        lost: Callable[[int, bool], None],
    ) -> None:
        """Start without holders; for ``lost`` see :meth:`PortHolder.watch`."""
        self._vsockd = vsockd
        self._scheduler = scheduler
        self._lost = lost
        self._by_inode: dict[int, PortHolder] = {}

    def find(self, inode: int) -> PortHolder | None:
        """Return the holder of a socket's port, or None if this supervisor has none."""
        return self._by_inode.get(inode)

    async def bind(
        self,
        credentials: Credentials | None,
        sock: _socket.socket,
        address: tuple[int, int],
        sizes: BufferSizes,
        unprivileged: bool,
    ) -> tuple[PortHolder, Record]:
        """Bind ``sock``, a copy of a program's stream or packet socket.

        Raises OSError with vsockd's errno.
        """
        holder = PortHolder(await self._vsockd.open(), self._scheduler, self._by_inode)
        try:
            record = await holder.bind(credentials, sock, address, sizes, unprivileged)
        except BaseException:
            holder.close()
            raise
        holder.watch(self._lost)
        return holder, record
