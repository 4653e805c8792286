"""Devices: how a virtual machine's kernel is part of the fabric.

A process guest's sockets are known here.  A virtual machine's are known to its kernel, which a
device speaks for: a process that an administrator attached to the context (``context.device``).
It has one connection to vsockd, its link.  Over it the device sends descriptors, each a new
channel as if it had come in through the context's control socket, but for one thing: the ports
it connects from and binds are the guest's kernel's choice, who has minded the reserved ones.

A descriptor may also come with its request.  Then it is a connection whose other end knows nothing
of vsockd, and which is a stream already: it is handed on or closed, and no word is said on it.

The other way come offers (:mod:`.offers`), and, if the device asked for it, which ports of the host
its guest can connect to (:mod:`.host_ports`).
"""

from __future__ import annotations

import _socket
import errno
import logging
from dataclasses import replace
from select import EPOLLOUT
from socket import (
    AF_UNIX,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SocketKind,
)
from typing import TYPE_CHECKING

from ..eventloop.loop import EventLoop
from ..fabric import (
    CAP_NET_BIND_SERVICE,
    Context,
    Credentials,
    DevicePorts,
    EndpointKind,
    Grant,
    Refused,
)
from ..pass_rights import refuse
from ..protocol import REQUEST_SIZE, Record, Role
from .channel import LOOK, TAKE, Channel, send_descriptor
from .datagrams import DatagramSocket
from .host_ports import HostPorts
from .pending_connects import HandoffLink

if TYPE_CHECKING:
    from .broker import Broker

log = logging.getLogger(__name__)

_KINDS = {SOCK_STREAM: EndpointKind.STREAM, SOCK_SEQPACKET: EndpointKind.SEQPACKET}


class DeviceChannel(Channel):
    """A channel that came over a link."""

    is_kernel = True
    asks_once = True

    def read(self) -> bytes:
        # Whoever writes on it: the device has no rights by its processes.
        try:
            return self.sock.recv(
                REQUEST_SIZE, LOOK if self.kind is EndpointKind.SEQPACKET else TAKE
            )
        except ConnectionError:
            return b""

    def has_capability(self, capability: int) -> bool:
        return capability == CAP_NET_BIND_SERVICE

    def matches(self, grant: Grant) -> bool:
        return False


class HandoffChannel(DeviceChannel):
    """A connection that came with its request, and is told nothing."""

    request = b""

    def read(self) -> bytes:
        request, self.request = self.request, b""
        return request

    def send(self, record: bytes) -> None:
        """It says by itself whether it goes on."""


class DeviceLink(HandoffLink):
    """One device, and its link."""

    def __init__(
        self,
        loop: EventLoop,
        broker: Broker,
        context: Context,
        link: _socket.socket,
        credentials: Credentials,
        seqpacket: bool,
        host_ports: bool,
    ) -> None:
        """``seqpacket``: whether the guest has such sockets.  ``host_ports``: whether the device
        is told of the host's listening ports.

        Refused with EINVAL (not a guest), EBUSY (it has a device)."""
        if not context.is_guest:
            raise Refused(errno.EINVAL, f"context {context.cid} is no virtual machine")
        if context.kernel is not None:
            raise Refused(errno.EBUSY, f"context {context.cid} has a device")
        super().__init__(loop, broker, context, link)
        self._credentials = credentials
        self._datagrams: DatagramSocket | None = None
        self._host_ports: HostPorts | None = None
        context.kernel = DevicePorts(credentials, self, None, seqpacket)
        if host_ports:
            kernel = DeviceChannel(link, context, EndpointKind.STREAM, credentials)
            self._host_ports = HostPorts(loop, broker.fabric, context, kernel, link)

    def close(self) -> None:
        """The guest's kernel is not part of the fabric any more."""
        if self._context.kernel is not None and self._context.kernel.streams is self:
            log.info("the device of context %d has gone", self._context.cid)
            self._context.kernel = None
            if self._host_ports is not None:
                self._host_ports.close()
            super().close()
            if self._datagrams is not None:
                self._datagrams.close()

    def refresh(self) -> None:
        """The guest's state, or what it may, has changed."""
        if self._host_ports is not None:
            self._host_ports.refresh()

    def catches(self, datagrams: DatagramSocket) -> None:
        """Where datagrams to the guest go."""
        if self._datagrams is not None:
            self._datagrams.close()
        self._datagrams = datagrams
        assert self._context.kernel is not None
        self._context.kernel = replace(self._context.kernel, datagrams=datagrams)

    def send_tap(self, fd: int, limit: int, port: int) -> None:
        """Have what passes sent to ``fd`` (:mod:`vsockets.devices.capture`).  OSError when the
        device has too much to do."""
        record = Record(0, 0, self._context.cid, port, role=Role.TAP, size=limit).encode()
        send_descriptor(self._sock, record, fd)

    def send_size(self, own: tuple[int, int], peer: tuple[int, int], size: int) -> None:
        """Tell of the buffer that ``peer`` has for what the guest sends from ``own``.  OSError."""
        record = Record(0, 0, *own, *peer, Role.BUFFER, size=size).encode()
        self._sock.send(record, MSG_DONTWAIT | MSG_NOSIGNAL)

    def _ready(self, events: int) -> None:
        if events & EPOLLOUT and self._host_ports is not None:
            self._host_ports.tell()
        if events & ~EPOLLOUT:
            super()._ready(events)

    def _admit(self, fd: int, data: bytes) -> None:
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            self._give_up(fd)
            return
        kind = _KINDS.get(SocketKind(sock.type))
        if sock.family != AF_UNIX or kind is None:
            self._give_up(sock.detach())
            return
        if kind is EndpointKind.STREAM:
            refuse(sock)  # what is sent to the program that it will be handed to
        arguments = sock, self._context, kind, self._credentials
        if len(data) < REQUEST_SIZE:
            self._broker.take(DeviceChannel(*arguments))
        else:
            given = HandoffChannel(*arguments)
            given.request = data
            self._broker.take(given)
