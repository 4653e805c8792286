"""Devices: how a virtual machine's kernel is part of the fabric.

A process guest's sockets are known here.  A virtual machine's are known to its kernel, which a
device speaks for: a process that an administrator attached to the context (``context.device``).
It has one connection to vsockd, its link.  Over it the device sends descriptors, each a new
channel as if it had come in through the context's control socket, but for one thing: the ports
it connects from and binds are the guest's kernel's choice, who has minded the reserved ones.

The other way come offers: streams to ports that no process of the context has.  vsockd has
decided that there may be one; whether there is, the guest says.  The device writes the answer to
who connected, and tells (SETTLE).
"""

from __future__ import annotations

import _socket
import array
import errno
import logging
from dataclasses import replace
from socket import (
    AF_UNIX,
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
    SocketKind,
)
from typing import TYPE_CHECKING

from ..fabric import CAP_NET_BIND_SERVICE, Context, Credentials, Grant, Kernel, Kind, Refused
from ..limits import MAX_BACKLOG
from ..wire import REQUEST_SIZE, Op, ProtocolError, Record, Request, Role
from .channel import Channel, descriptor_in
from .datagrams import DatagramSocket
from .disposal import dispose
from .loop import Loop

if TYPE_CHECKING:
    from .broker import Broker

log = logging.getLogger(__name__)

_KINDS = {SOCK_STREAM: Kind.STREAM, SOCK_SEQPACKET: Kind.SEQPACKET}


class KernelChannel(Channel):
    """A channel that came over a link."""

    is_kernel = True

    def has_capability(self, capability: int) -> bool:
        return capability == CAP_NET_BIND_SERVICE

    def matches(self, grant: Grant) -> bool:
        return False


class KernelLink:
    """One device, and its link.  It is there until its end of the link is closed."""

    def __init__(
        self,
        loop: Loop,
        broker: Broker,
        context: Context,
        link: _socket.socket,
        credentials: Credentials,
        seqpacket: bool,
    ) -> None:
        """``seqpacket``: whether the guest has such sockets.

        Refused with EINVAL (not a guest), EBUSY (it has a device)."""
        if not context.is_guest:
            raise Refused(errno.EINVAL, f"context {context.cid} is no virtual machine")
        if context.kernel is not None:
            raise Refused(errno.EBUSY, f"context {context.cid} has a device")
        self._loop = loop
        self._broker = broker
        self._context = context
        self._sock = link
        self._credentials = credentials
        self._datagrams: DatagramSocket | None = None
        #: who waits for the guest's answer, by both ports and the peer's context
        self._offers: dict[tuple[int, int, int], Context] = {}
        context.kernel = Kernel(credentials, self, None, seqpacket)
        link.setblocking(False)
        loop.watch(link.fileno(), self._ready)

    def close(self) -> None:
        """The guest's kernel is not part of the fabric any more."""
        if self._context.kernel is not None and self._context.kernel.streams is self:
            self._context.kernel = None
            self._loop.unwatch(self._sock.fileno())
            self._sock.close()
            for source in self._offers.values():
                source.pending -= 1
            self._offers.clear()
            if self._datagrams is not None:
                self._datagrams.close()

    def catches(self, datagrams: DatagramSocket) -> None:
        """Where datagrams to the guest go."""
        if self._datagrams is not None:
            self._datagrams.close()
        self._datagrams = datagrams
        assert self._context.kernel is not None
        self._context.kernel = replace(self._context.kernel, datagrams=datagrams)

    # As the target of a connect; see Channel.

    def has_room(self) -> bool:
        """Whether another offer can be made."""
        return len(self._offers) < MAX_BACKLOG

    def count_waiting(self) -> None:
        """The device tells by itself."""

    def announce(self, record: bytes, fd: int, source: Context) -> None:
        """Offer a stream."""
        rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))]
        self._sock.sendmsg([record], rights, MSG_DONTWAIT | MSG_NOSIGNAL)
        offer = Record.decode(record)
        self._offers[offer.local_port, *offer.peer] = source
        source.pending += 1

    def send_tap(self, fd: int, limit: int, port: int) -> None:
        """Have what passes sent to ``fd`` (:mod:`vsockets.devices.tap`).  OSError when the device
        has too much to do."""
        record = Record(0, 0, self._context.cid, port, role=Role.TAP, size=limit).encode()
        rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))]
        self._sock.sendmsg([record], rights, MSG_DONTWAIT | MSG_NOSIGNAL)

    # What the device says

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
            self._admit(fd)
        elif not data or not self._settle(data):
            log.info("the device of context %d has gone", self._context.cid)
            self.close()

    def _admit(self, fd: int) -> None:
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            dispose(fd)
            return
        kind = _KINDS.get(SocketKind(sock.type))
        if sock.family != AF_UNIX or kind is None:
            dispose(sock.detach())
            return
        self._broker.take(KernelChannel(sock, self._context, kind, self._credentials))

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
            self._broker.fabric.settle(self._context, request.local_port, peer, size)
        return True
