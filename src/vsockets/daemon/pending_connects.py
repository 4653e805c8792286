"""Offers: streams to ports that no program of the context has.

vsockd has done all of its own checks, and decided that there may be one.  Whether there is,
somebody else knows: a guest's kernel behind its device, or a unix socket of the host.  Who speaks
for them has a *link*, a socket on which the accepted ends of such streams come, each with a record.
He writes the answer to who connected, and tells vsockd (SETTLE).

Of a stream that was refused the end comes back with that, so that who connected may try again on
the same socket.  It is known by its cookie.  In between vsockd has no copy: who connects is not
read by two, and sees the end of a stream whatever happens to its other end.
"""

from __future__ import annotations

import _socket
import logging
from socket import CMSG_LEN, MSG_CMSG_CLOEXEC, MSG_DONTWAIT
from typing import TYPE_CHECKING, NamedTuple

from ..eventloop.loop import EventLoop
from ..fabric import Context, Party
from ..limits import LISTEN_BACKLOG_MAX
from ..protocol import REQUEST_SIZE, Op, ProtocolError, Record, Request
from .channel import Channel, descriptor_in, give_up, has_many_unwanted, send_descriptor
from .named_sockets import cookie_of

if TYPE_CHECKING:
    from .broker import Broker

log = logging.getLogger(__name__)


class PendingConnect(NamedTuple):
    """One that waits for an answer."""

    channel: Channel  #: who connects; its socket is at the other end of the link
    cookie: int  #: of that socket


class HandoffLink:
    """A link, there until its other end is closed.  The target of a connect; see Channel."""

    def __init__(
        self, loop: EventLoop, broker: Broker, context: Context, link: _socket.socket
    ) -> None:
        """``context``: whose ports are spoken for."""
        self._loop = loop
        self._broker = broker
        self._context = context
        self._sock = link
        self._sender = Party(f"the device of context {context.cid}", None)
        #: by both ports and the peer's context
        self._offers: dict[tuple[int, int, int], PendingConnect] = {}
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
            for offer in self._offers.values():
                offer.channel.party.pending -= 1
            self._offers.clear()

    def has_room(self) -> bool:
        """Whether another offer can be made."""
        return len(self._offers) < LISTEN_BACKLOG_MAX

    def count_waiting(self) -> None:
        """It is told by itself."""

    def announce(self, record: bytes, source: Channel) -> None:
        """Offer a stream."""
        send_descriptor(self._sock, record, source.sock.fileno())
        source.lent_to = self
        offer = Record.decode(record)
        self._offers[offer.local_port, *offer.peer] = PendingConnect(source, cookie_of(source.sock))
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
        settlement = _settlement(data)
        if settlement is not None:
            self._settle(settlement, fd)
        elif fd is not None:
            self._admit(fd, data)
        else:
            self.close()

    def _admit(self, fd: int, data: bytes) -> None:
        """A descriptor came with ``data``."""
        self._give_up(fd)

    def _give_up(self, fd: int) -> None:
        """Close a descriptor that should not have been sent, or the link when there are many."""
        give_up(fd, self._sender)
        if has_many_unwanted(self._sender):
            log.warning("%s sends wrong descriptors: its link is closed", self._sender.name)
            self.close()

    def _settle(self, request: Request, fd: int | None) -> None:
        peer = request.peer_cid, request.peer_port
        offer = self._offers.pop((request.local_port, *peer), None)
        refused = False
        if offer is not None:
            offer.channel.party.pending -= 1
            size = 0 if request.backlog else request.size
            waits = self._broker.fabric.settle(self._context, request.local_port, peer, size)
            refused = waits and not size
        if fd is None:
            return
        if offer is not None and refused and _is(fd, offer.cookie):
            offer.channel.sock = _socket.socket(fileno=fd)
            self._broker.resume(offer.channel)
        else:
            self._give_up(fd)


def _settlement(data: bytes) -> Request | None:
    try:
        request = Request.decode(data)
    except ProtocolError:
        return None
    return request if request.op == Op.SETTLE else None


def _is(fd: int, cookie: int) -> bool:
    """Whether ``fd`` is the socket with this cookie, which the kernel gives no other."""
    try:
        sock = _socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return cookie_of(sock) == cookie
    finally:
        sock.detach()
