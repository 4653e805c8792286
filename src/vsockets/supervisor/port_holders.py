"""Ports of programs' sockets, each held by a connection of the supervisor to vsockd.

A program's own socket is not connected to vsockd before it becomes a stream.  So the kernel fails
the program's reads and writes as on any unconnected unix socket, and none of vsockd's protocol
reaches the program (:mod:`vsockets.daemon.listeners`).
"""

from __future__ import annotations

import _socket
import errno
import os
import secrets
from collections.abc import Callable

from ..model.buffers import BufferSizes
from ..protocol import Record, client
from .scheduler import HUNG_UP, CoroutineScheduler
from .vsockd_client import SEND, Credentials, VsockdClient, receive_record, send, take_record


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

        It gets the socket's inode, and whether the reason is that the socket was closed.
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
        """Bind ``sock``, which may replace an earlier socket.  Raises OSError."""
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
        """Accept connections to the socket, up to ``backlog`` of them pending.  Raises OSError."""
        self._channel.send(client.listen(backlog, sizes), SEND)
        await receive_record(self._channel)

    def update(self, sizes: BufferSizes) -> None:
        """Set the buffer sizes of future connections.  Raises OSError."""
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
    """All port holders of a supervisor.  They outlive entries of :class:`.sockets.Sockets`."""

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
        """Bind ``sock``, a copy of a program's stream or packet socket.  Raises OSError."""
        holder = PortHolder(await self._vsockd.open(), self._scheduler, self._by_inode)
        try:
            record = await holder.bind(credentials, sock, address, sizes, unprivileged)
        except BaseException:
            holder.close()
            raise
        holder.watch(self._lost)
        return holder, record
