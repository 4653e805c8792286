"""Offers: streams to ports that no program of the context has.

vsockd has done all of its own checks, and decided that there may be one.  Whether there is,
somebody else knows: a guest's kernel behind its device, or a unix socket of the host.  Who speaks
for them has a *link*, a socket on which the accepted ends of such streams come, each with a record.
He writes the answer to who connected, and tells vsockd (SETTLE).
"""

from __future__ import annotations

import _socket
import array
from socket import (
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SOL_SOCKET,
)

from ..fabric import Context, Fabric
from ..limits import MAX_BACKLOG
from ..wire import REQUEST_SIZE, Op, ProtocolError, Record, Request
from .channel import descriptor_in
from .disposal import dispose
from .loop import Loop


class OfferLink:
    """A link, there until its other end is closed.  The target of a connect; see Channel."""

    def __init__(self, loop: Loop, fabric: Fabric, context: Context, link: _socket.socket) -> None:
        """``context``: whose ports are spoken for."""
        self._loop = loop
        self._fabric = fabric
        self._context = context
        self._sock = link
        #: who waits for an answer, by both ports and the peer's context
        self._offers: dict[tuple[int, int, int], Context] = {}
        link.setblocking(False)
        loop.watch(link.fileno(), self._ready)

    @property
    def is_open(self) -> bool:
        """Whether somebody decides."""
        return self._sock.fileno() >= 0

    def close(self) -> None:
        """Nobody decides any more."""
        if self.is_open:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            for source in self._offers.values():
                source.pending -= 1
            self._offers.clear()

    def has_room(self) -> bool:
        """Whether another offer can be made."""
        return len(self._offers) < MAX_BACKLOG

    def count_waiting(self) -> None:
        """It is told by itself."""

    def announce(self, record: bytes, fd: int, source: Context) -> None:
        """Offer a stream."""
        self.send_descriptor(record, fd)
        offer = Record.decode(record)
        self._offers[offer.local_port, *offer.peer] = source
        source.pending += 1

    def send_descriptor(self, record: bytes, fd: int) -> None:
        """Send a record with a descriptor.  OSError when there is no room, or nobody."""
        rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))]
        self._sock.sendmsg([record], rights, MSG_DONTWAIT | MSG_NOSIGNAL)

    def _ready(self, events: int) -> None:
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                REQUEST_SIZE, CMSG_LEN(4), MSG_DONTWAIT | MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            data, ancillary = b"", []
        fd = descriptor_in(ancillary)
        if fd is not None:
            self._admit(fd, data)
        elif not data or not self._settle(data):
            self.close()

    def _admit(self, fd: int, data: bytes) -> None:
        """A descriptor came with ``data``."""
        dispose(fd)

    def _settle(self, data: bytes) -> bool:
        try:
            request = Request.decode(data)
        except ProtocolError:
            return False
        if request.op != Op.SETTLE:
            return False
        peer = request.peer_cid, request.peer_port
        source = self._offers.pop((request.local_port, *peer), None)
        if source is not None:
            source.pending -= 1
            size = 0 if request.backlog else request.size
            self._fabric.settle(self._context, request.local_port, peer, size)
        return True
