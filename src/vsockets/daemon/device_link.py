"""Devices: how the sockets of a virtual machine's kernel take part in the fabric.

vsockd knows a process guest's sockets.  A virtual machine's sockets are known to its kernel, which
is represented by a device: a process that an administrator attached to the context
(``context.device``).  The device has one connection to vsockd, its link.  It sends descriptors over
the link; each becomes a new channel, as if it had been accepted on the context's control socket,
except that the guest's kernel has chosen the ports that it binds or connects from, and has checked
the privilege for reserved ones.

A descriptor may come together with its request.  It is then a connection whose other end does not
use vsockd's protocol, and is already the stream: vsockd hands it off or closes it, and never writes
to it.

In the other direction vsockd sends pending connections (:mod:`.pending_connects`), and, if the
device asked for it, the ports of the host that its guest can connect to (:mod:`.host_ports`).
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

from .._linux.sockets import refuse_descriptors
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
from ..protocol import REQUEST_SIZE, Record, Role
from .channel import PEEK, READ, Channel, send_descriptor
from .datagrams import DatagramSocket
from .host_ports import HostPorts
from .pending_connects import HandoffLink

if TYPE_CHECKING:
    from .broker import Broker

log = logging.getLogger(__name__)

_KINDS = {SOCK_STREAM: EndpointKind.STREAM, SOCK_SEQPACKET: EndpointKind.SEQPACKET}


class DeviceChannel(Channel):
    """A channel whose descriptor came over a device's link."""

    is_kernel = True
    single_request = True

    def read(self) -> bytes:
        """Return the next request, without its writer: a device's processes lend it no rights."""
        try:
            return self.sock.recv(
                REQUEST_SIZE, PEEK if self.kind is EndpointKind.SEQPACKET else READ
            )
        except ConnectionError:
            return b""

    def has_capability(self, capability: int) -> bool:
        """Return whether the capability is for reserved ports, which the guest has checked."""
        return capability == CAP_NET_BIND_SERVICE

    def matches(self, grant: Grant) -> bool:
        """Return False: grants are for programs of the host."""
        return False


class HandoffChannel(DeviceChannel):
    """A connection that came with its request, and to which vsockd never replies."""

    request = b""

    def read(self) -> bytes:
        """Return the request that came with the descriptor, once."""
        request, self.request = self.request, b""
        return request

    def send(self, record: bytes) -> None:
        """Discard the record: the device replies on the connection itself."""


class DeviceLink(HandoffLink):
    """A device's link to vsockd."""

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
        """Attach a device to ``context``.

        ``seqpacket``: the guest supports SOCK_SEQPACKET.  ``host_ports``: report the host's
        listening ports to the device.

        Raises Refused with EINVAL (not a guest) or EBUSY (the guest has a device).
        """
        if not context.is_guest:
            raise Refused(errno.EINVAL, f"context {context.cid} is not a virtual machine")
        if context.device is not None:
            raise Refused(errno.EBUSY, f"context {context.cid} has a device")
        super().__init__(loop, broker, context, link)
        self._credentials = credentials
        self._datagrams: DatagramSocket | None = None
        self._host_ports: HostPorts | None = None
        context.device = DevicePorts(credentials, self, None, seqpacket)
        if host_ports:
            program = DeviceChannel(link, context, EndpointKind.STREAM, credentials)
            self._host_ports = HostPorts(loop, broker.fabric, context, program, link)

    def close(self) -> None:
        """Detach the device: its guest's ports cannot be reached any longer."""
        if self._context.device is not None and self._context.device.streams is self:
            log.info("the device of context %d is detached", self._context.cid)
            self._context.device = None
            if self._host_ports is not None:
                self._host_ports.close()
            super().close()
            if self._datagrams is not None:
                self._datagrams.close()

    def refresh(self) -> None:
        """Report the host's ports again after a change of the guest's state or isolation."""
        if self._host_ports is not None:
            self._host_ports.refresh()

    def set_datagrams(self, datagrams: DatagramSocket) -> None:
        """Set the socket that receives datagrams to the guest's ports."""
        if self._datagrams is not None:
            self._datagrams.close()
        self._datagrams = datagrams
        assert self._context.device is not None
        self._context.device = replace(self._context.device, datagrams=datagrams)

    def send_capture(self, fd: int, limit: int, port: int) -> None:
        """Send ``fd`` to the device, which writes captured records to it.

        Raises OSError when the link is full.
        """
        record = Record(0, 0, self._context.cid, port, role=Role.TAP, size=limit).encode()
        send_descriptor(self._sock, record, fd)

    def send_buffer_size(self, own: tuple[int, int], peer: tuple[int, int], size: int) -> None:
        """Report the size of the receive buffer that ``peer`` has for the guest's address ``own``.

        Raises OSError when the link is full.
        """
        record = Record(0, 0, *own, *peer, Role.BUFFER, size=size).encode()
        self._sock.send(record, MSG_DONTWAIT | MSG_NOSIGNAL)

    def _ready(self, events: int) -> None:
        if events & EPOLLOUT and self._host_ports is not None:
            self._host_ports.send_changes()
        if events & ~EPOLLOUT:
            super()._ready(events)

    def _admit(self, fd: int, data: bytes) -> None:
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            self._close_unwanted(fd)
            return
        kind = _KINDS.get(SocketKind(sock.type))
        if sock.family != AF_UNIX or kind is None:
            self._close_unwanted(sock.detach())
            return
        if kind is EndpointKind.STREAM:
            # Before the socket is handed off to its program.
            refuse_descriptors(sock)
        arguments = sock, self._context, kind, self._credentials
        if len(data) < REQUEST_SIZE:
            self._broker.serve_first(DeviceChannel(*arguments))
        else:
            given = HandoffChannel(*arguments)
            given.request = data
            self._broker.serve_first(given)
