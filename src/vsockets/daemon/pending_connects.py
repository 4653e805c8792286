"""Pending connections: streams whose listener only a device or hybrid relay knows.

vsockd has done its own checks, and does not know whether the port has a listener; the guest's
kernel does, through its device, or a unix socket of the host, through the hybrid relay.  The device
or relay receives each pending connection over its *link*: the accepting end of the stream, with a
record.  It replies to the client directly, and reports the outcome to vsockd with SETTLE.

SETTLE for a refused connection returns the descriptor, so that the client may retry on the same
socket; vsockd recognises it by its cookie.  vsockd keeps no copy of the descriptor meanwhile: only
one process reads from the client, and the client sees EOF whichever side fails.
"""

from __future__ import annotations

import _socket
import logging
from socket import CMSG_LEN, MSG_CMSG_CLOEXEC, MSG_DONTWAIT
from typing import TYPE_CHECKING, NamedTuple

from .._linux.sockets import cookie_of, descriptor_in
from ..eventloop.loop import EventLoop
from ..fabric import Context, Party
from ..limits import LISTEN_BACKLOG_MAX
from ..protocol import REQUEST_SIZE, Op, ProtocolError, Record, Request
from .channel import Channel, close_unwanted, has_too_many_unwanted, send_descriptor

if TYPE_CHECKING:
    from .broker import Broker

log = logging.getLogger(__name__)


class PendingConnect(NamedTuple):
    """A connection that waits for the device's decision."""

    channel: Channel  #: the client's; its socket has been sent over the link
    cookie: int  #: of that socket


class HandoffLink:
    """A link to a device or relay, open until either side closes it."""

    def __init__(
        self, loop: EventLoop, broker: Broker, context: Context, link: _socket.socket
    ) -> None:
        """Serve the link of a device or relay that decides about ports of ``context``."""
        self._loop = loop
        self._broker = broker
        self._context = context
        self._sock = link
        self._sender = Party(f"the device of context {context.cid}", None)
        #: pending connections by listening port and the client's address
        self._pending: dict[tuple[int, int, int], PendingConnect] = {}
        link.setblocking(False)
        loop.watch(link.fileno(), self._ready)

    @property
    def is_open(self) -> bool:
        """True until the link is closed."""
        return self._sock.fileno() >= 0

    def close(self) -> None:
        """Close the link.  The clients of pending connections see EOF."""
        if self.is_open:
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            for pending in self._pending.values():
                pending.channel.party.pending -= 1
            self._pending.clear()

    def has_room(self) -> bool:
        """Return whether another connection may be pending."""
        return len(self._pending) < LISTEN_BACKLOG_MAX

    def recount_pending(self) -> None:
        """Do nothing: the device reports each outcome, so there is nothing to recount."""

    def hand_over(self, record: bytes, source: Channel) -> None:
        """Hand off a connection of ``source`` to the device."""
        send_descriptor(self._sock, record, source.sock.fileno())
        source.last_device = self
        sent = Record.decode(record)
        self._pending[sent.local_port, *sent.peer] = PendingConnect(source, cookie_of(source.sock))
        source.party.pending += 1

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
        settlement = _decode_settle(data)
        if settlement is not None:
            self._complete(settlement, fd)
        elif fd is not None:
            self._admit(fd, data)
        else:
            self.close()

    def _admit(self, fd: int, data: bytes) -> None:
        """Handle a descriptor that came with ``data`` and is not a SETTLE."""
        self._close_unwanted(fd)

    def _close_unwanted(self, fd: int) -> None:
        """Close a descriptor sent without reason; close the link if there are too many."""
        close_unwanted(fd, self._sender)
        if has_too_many_unwanted(self._sender):
            log.warning("%s sends invalid descriptors: closing its link", self._sender.name)
            self.close()

    def _complete(self, request: Request, fd: int | None) -> None:
        peer = request.peer_cid, request.peer_port
        pending = self._pending.pop((request.local_port, *peer), None)
        refused = False
        if pending is not None:
            pending.channel.party.pending -= 1
            size = 0 if request.backlog else request.size
            waits = self._broker.fabric.complete_pending(
                self._context, request.local_port, peer, size
            )
            refused = waits and not size
        if fd is None:
            return
        if pending is not None and refused and _has_cookie(fd, pending.cookie):
            pending.channel.sock = _socket.socket(fileno=fd)
            self._broker.resume(pending.channel)
        else:
            self._close_unwanted(fd)


def _decode_settle(data: bytes) -> Request | None:
    try:
        request = Request.decode(data)
    except ProtocolError:
        return None
    return request if request.op == Op.SETTLE else None


def _has_cookie(fd: int, cookie: int) -> bool:
    """Return whether ``fd`` is the socket with this cookie, which the kernel never reuses."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return cookie_of(sock) == cookie
    finally:
        sock.detach()
