"""Links to devices: vsockd's side of the sockets of a virtual machine.

vsockd knows each socket of a guest that consists of processes.  The sockets of a virtual machine
are known to its kernel only.  That kernel is represented by a *device*: a process that an
administrator attached to the context (``context.device``).  The connection between the device and
vsockd is the *link*.

The device sends descriptors over the link.  Each descriptor becomes a new channel, as if vsockd had
accepted it on the context's control socket, with two differences: the guest's kernel has chosen the
port that the channel's requests bind or connect from, and has checked the privilege for a reserved
port.

A descriptor may come together with its request.  Then the descriptor is one end of the stream
itself, and the program at the other end does not use vsockd's protocol: vsockd hands the descriptor
off to the listener or closes it, and never writes to it.

In the other direction vsockd sends pending connections and, if the device asked for them, the ports
of the host that its guest can connect to (:class:`HostPorts`).

*Pending connections.*  vsockd checks what it can, and does not know whether the port has a
listener.  A device knows it from the guest's kernel, the hybrid relay from a unix socket of the
host.  The device or relay receives each pending connection over its link: a record, and the
accepting end of the stream.  The device or relay replies to the client on that end, and reports the
outcome to vsockd with SETTLE.  If the connection is refused, SETTLE also returns the descriptor, so
that the client may retry on the same socket; vsockd recognises the socket by its cookie.  Meanwhile
vsockd keeps no copy of the descriptor: only one process reads from the client, and the client sees
EOF whichever process fails.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import logging
import os
from collections.abc import Iterable
from dataclasses import replace
from select import EPOLLOUT
from socket import (
    AF_UNIX,
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SO_SNDBUF,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
    SocketKind,
    socketpair,
)
from time import monotonic
from typing import NamedTuple, Protocol

from .._linux.sockets import SO_SNDBUFFORCE, cookie_of, descriptor_in, refuse_descriptors
from ..eventloop.loop import READABLE, EventLoop
from ..fabric import (
    CAP_NET_BIND_SERVICE,
    Context,
    Credentials,
    DeviceDatagrams,
    DevicePorts,
    Endpoint,
    EndpointKind,
    Fabric,
    Grant,
    Party,
    Program,
    Refused,
    policy,
)
from ..limits import CAPTURE_PAYLOAD_MAX_BYTES, LISTEN_BACKLOG_MAX
from ..model.constants import VMADDR_CID_HOST, VMADDR_PORT_ANY
from ..model.rates import ByteMeter, Moved
from ..protocol import REQUEST_SIZE, Op, ProtocolError, Record, Request, Role
from .channel import (
    PEEK,
    READ,
    Channel,
    close_unwanted,
    has_too_many_unwanted,
    send_descriptor,
    take_message,
)
from .datagrams import DatagramSocket
from .handover import Reader, Saved, Writer
from .in_flight import InFlight, Step
from .journal import Journal
from .limits import CAPTURE_BUFFER_MAX_BYTES
from .socket_queries import moved_in, report_bytes

log = logging.getLogger(__name__)

_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)


class HostPorts:
    """Reports to a device: the ports of the host that its guest can connect to, and each change.

    Devices of hybrid vsock request the reports: they create a unix socket for each port.  The
    guest's rights are checked again when the guest connects.  A port's state is looked up when the
    link has space for the report: a device that reads slowly gets fewer reports, and never outdated
    ones.
    """

    def __init__(
        self,
        loop: EventLoop,
        fabric: Fabric,
        guest: Context,
        program: Program,
        link: _socket.socket,
        reported: Iterable[int] | None = None,
    ) -> None:
        """Report over ``link`` the host's ports that ``guest`` can connect to.

        ``program`` stands for the programs of the guest in access checks.  The ports ``reported``
        were reported by an earlier vsockd.
        """
        self._loop = loop
        self._fabric = fabric
        self._guest = guest
        self._program = program
        self._link = link
        self.reported = set(reported or ())
        self._unchecked: dict[int, None] = {}  # ports to look up, in order
        self._link_full = False  # True: reports wait for space on the link
        fabric.watchers.append(self._changed)
        if reported is None:
            self.refresh()

    def close(self) -> None:
        """Stop reporting; call it before the link is closed."""
        self._fabric.watchers.remove(self._changed)

    def refresh(self) -> None:
        """Check all ports again after a change of the guest's state or isolation."""
        host = self._fabric.contexts.host
        listening = [
            holder.port
            for holder in host.connected.values()
            if isinstance(holder, Endpoint) and holder.listening
        ]
        self._unchecked.update(dict.fromkeys([*self.reported, *listening]))
        self.send_changes()

    def _changed(self, endpoint: Endpoint) -> None:
        self._unchecked[endpoint.port] = None
        self.send_changes()

    def send_changes(self) -> None:
        """Send reports until the link is full; continue when it has space again."""
        while self._unchecked:
            port = next(iter(self._unchecked))
            there = self._is_reachable(port)
            if there != (port in self.reported):
                role = Role.LISTENING if there else Role.NOT_LISTENING
                try:
                    self._link.send(Record(0, 0, VMADDR_CID_HOST, port, role=role).encode(), _SEND)
                except BlockingIOError:
                    break
                except OSError:
                    return  # the link is closed: its reader gets end of file
                self.reported ^= {port}
            del self._unchecked[port]
        if self._link_full != bool(self._unchecked):
            self._link_full = not self._link_full
            self._loop.change(self._link.fileno(), READABLE | (EPOLLOUT if self._link_full else 0))

    def _is_reachable(self, port: int) -> bool:
        wanted = self._guest, EndpointKind.STREAM, VMADDR_CID_HOST, port, self._program
        try:
            return not self._fabric.find_listener(*wanted).pending
        except Refused:
            return False


_KINDS = {SOCK_STREAM: EndpointKind.STREAM, SOCK_SEQPACKET: EndpointKind.SEQPACKET}


class LinkCallbacks(Protocol):
    """The part of the broker that links use."""

    fabric: Fabric
    journal: Journal | None
    in_flight: InFlight | None

    def serve_first(self, channel: Channel, link: HandoffLink | None = None) -> None:
        """Serve the first request on a new channel, or keep the channel until it arrives.

        ``link`` is the link that the channel's descriptor has come over.
        """

    def resume(self, channel: Channel) -> None:
        """Continue with a channel whose connection a device refused."""


class PendingConnect(NamedTuple):
    """A connection that waits for the device's decision."""

    channel: Channel  #: the client's; its socket has been sent over the link
    cookie: int  #: SO_COOKIE of the client's socket


class HandoffLink:
    """A link over which vsockd hands pending connections to a device or relay.

    The link is open until either side closes it.
    """

    def __init__(
        self, loop: EventLoop, broker: LinkCallbacks, context: Context, link: _socket.socket
    ) -> None:
        """Serve ``link``; the device or relay accepts or refuses connections to ``context``."""
        self._loop = loop
        self._broker = broker
        self._context = context
        self._sock = link
        self._sender = Party(f"the device of context {context.cid}", None)
        #: pending connections by listening port and the client's address
        self._pending: dict[tuple[int, int, int], PendingConnect] = {}
        link.setblocking(False)
        loop.watch(link.fileno(), self._ready)

    def _record(self) -> None:
        """Record a change of the link in the journal."""
        if self._broker.journal is not None:
            self._broker.journal.link(self)

    def save(self, writer: Writer) -> Saved:
        """Return the link's state for the next vsockd."""
        return {
            "context": self._context.cid,
            "socket": writer.descriptor(self._sock.fileno()),
            "pending": [
                (key, writer.channel(one.channel), one.cookie) for key, one in self._pending.items()
            ],
        }

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Add the pending connections that the previous vsockd has saved."""
        for key, channel, cookie in saved["pending"]:
            pending = PendingConnect(reader.channels[channel], cookie)
            self._pending[key] = pending
            pending.channel.party.pending += 1

    @property
    def is_open(self) -> bool:
        """True until the link is closed."""
        return self._sock.fileno() >= 0

    def close(self) -> None:
        """Close the link.  The clients of pending connections see EOF."""
        if self.is_open:
            self._loop.unwatch(self._sock.fileno())
            journal = self._broker.journal
            if journal is not None:
                journal.forget_link(self)
                journal.commit()
            self._sock.close()
            for pending in self._pending.values():
                pending.channel.party.pending -= 1
            self._pending.clear()

    def has_room(self) -> bool:
        """Return whether another connection may be pending."""
        return len(self._pending) < LISTEN_BACKLOG_MAX

    def require_settled(self, port: int, context: Context, bound: Endpoint | None) -> None:
        """Refuse a connect to ``port`` from an address whose last connect to it is not settled.

        The client of that last connect has closed, or a change of state has ended the connect, and
        the device has yet to report on it.  The report has addresses only, and would be taken for
        one on the next connect.  A socket without an address will get a port without such a
        connect.

        Raises Refused with ECONNRESET if ``bound`` has the address, and with EADDRNOTAVAIL if no
        port of ``context`` is free.
        """
        pending = self._pending
        if bound is None:
            cid = context.cid
            context.connected.find_ephemeral(lambda own: (port, cid, own) in pending)
        elif (port, *bound.address) in pending:
            raise Refused(errno.ECONNRESET, "the device has not settled the port's last connect")

    def recount_pending(self) -> None:
        """Do nothing: the device reports each outcome, so there is nothing to recount."""

    def expect(self, record: bytes, source: Channel) -> None:
        """Expect a report on a connection of ``source``, which is handed off next."""
        source.last_device = self
        sent = Record.decode(record)
        self._pending[sent.local_port, *sent.peer] = PendingConnect(source, cookie_of(source.sock))
        source.party.pending += 1

    def forget(self, record: bytes) -> None:
        """Expect no report: the connection could not be handed off."""
        sent = Record.decode(record)
        pending = self._pending.pop((sent.local_port, *sent.peer))
        pending.channel.party.pending -= 1

    def hand_over(
        self, record: bytes, sock: _socket.socket, in_flight: InFlight | None = None
    ) -> None:
        """Hand off a connection to the device, only once for the request being served.

        Raises OSError.
        """
        if in_flight is None:
            send_descriptor(self._sock, record, sock.fileno())
        else:
            in_flight.send(Step.ANNOUNCE, self._sock, record, sock.fileno())

    def fileno(self) -> int:
        """Return the link's descriptor, or -1."""
        return self._sock.fileno()

    def _ready(self, events: int) -> None:
        if self._broker.in_flight is not None:
            self._broker.in_flight.begin(self._sock.fileno())
        self.serve_message()
        if self._broker.journal is not None:
            self._broker.journal.end_request()

    def serve_message(self) -> None:
        """Serve the next message, which a vsockd that was killed may have begun with."""
        try:
            data, fd = self._receive()
        except BlockingIOError:
            return
        request = _decode_report(data)
        if request is not None and request.op == Op.SETTLE:
            fd = self._complete(request, fd)
        elif request is not None and fd is None:
            self._count(request)
        elif fd is None:
            self.close()
            return
        elif (channel := self._new_channel(fd, data)) is not None:
            self._broker.serve_first(channel, self)
            return
        self.take()
        if fd is not None:
            self._close_unwanted(fd)

    def _receive(self) -> tuple[bytes, int | None]:
        """Return the next message, and the descriptor that came with it.

        With a journal, the message stays in the socket until :meth:`take`.

        Raises BlockingIOError if no message has arrived.
        """
        flags = READ if self._broker.in_flight is None else PEEK
        try:
            data, ancillary, _, _ = self._sock.recvmsg(
                REQUEST_SIZE, CMSG_LEN(4), flags | MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            raise
        except OSError:
            return b"", None
        return data, descriptor_in(ancillary)

    def take(self) -> None:
        """Remove the message being served from the link, after its changes are in the journal."""
        in_flight, journal = self._broker.in_flight, self._broker.journal
        if in_flight is not None and journal is not None and self.is_open:
            journal.commit(("done", self._sock.fileno()))
            take_message(in_flight, self._sock, self._sender)

    def reopen(self, fd: int) -> Channel | None:
        """Return a channel for ``fd``, whose request a vsockd that was killed has decided.

        Its message is still on the link.
        """
        try:
            data, copy = self._receive()
        except BlockingIOError:
            return None
        if copy is not None:
            os.close(copy)
        return self._new_channel(fd, data)

    def _new_channel(self, fd: int, data: bytes) -> Channel | None:
        """Return a channel for a descriptor received with ``data``, which is a request or empty.

        None: the descriptor is invalid, and still open.
        """
        return None

    def _close_unwanted(self, fd: int) -> None:
        """Close a descriptor sent without reason; close the link if there are too many."""
        close_unwanted(fd, self._sender)
        if has_too_many_unwanted(self._sender):
            log.warning("%s sends invalid descriptors: closing its link", self._sender.name)
            self.close()

    def _count(self, request: Request) -> None:
        """Store the reported bytes of a stream of the context, or of all its streams together."""
        moved, now = moved_in(request), monotonic()
        local = self._context.cid, request.local_port
        if request.local_port == VMADDR_PORT_ANY:
            self._count_all(moved, now)
            return
        peer = request.peer_cid, request.peer_port
        with contextlib.suppress(Refused):  # the connection has ended
            stream = self._broker.fabric.find_connection(local, peer)
            report_bytes(stream, moved if stream.local == local else moved.reversed(), now)
            if self._broker.journal is not None:
                self._broker.journal.moved(stream)

    def _count_all(self, moved: Moved, now: float) -> None:
        """Ignore the report: a relay's streams are not all streams of the host."""

    def _complete(self, request: Request, fd: int | None) -> int | None:
        """Handle a report on a pending connection; return ``fd`` if it is not used."""
        peer = request.peer_cid, request.peer_port
        pending = self._pending.pop((request.local_port, *peer), None)
        refused = False
        self._record()
        if pending is not None:
            pending.channel.party.pending -= 1
            size = 0 if request.backlog else request.size
            waits = self._broker.fabric.complete_pending(
                self._context, request.local_port, peer, size
            )
            refused = waits and not size
            if waits and size and self._broker.journal is not None:
                local = self._context.cid, request.local_port
                self._broker.journal.completed(self._broker.fabric.find_connection(local, peer))
        if fd is None or pending is None or not refused or not _has_cookie(fd, pending.cookie):
            return fd
        pending.channel.sock = _socket.socket(fileno=fd)
        self._broker.resume(pending.channel)
        return None


class DeviceChannel(Channel):
    """A channel whose descriptor came over a device's link."""

    is_device = True

    def read(self) -> bytes:
        """Return the next request, without the writer's credentials: they give no rights."""
        try:
            if self.kind is EndpointKind.SEQPACKET:
                return self.sock.recv(REQUEST_SIZE, PEEK)
            if self.in_flight is not None:
                return self.in_flight.read(self.sock)[0]
            return self.sock.recv(REQUEST_SIZE, READ)
        except ConnectionError:
            return b""

    def may_retry(self) -> bool:
        """Return False: after a refusal the device closes its end."""
        return False

    def receive_credentials(self, expected: bool) -> None:
        """Do nothing: requests are read without their writer's credentials."""

    def has_capability(self, capability: int) -> bool:
        """Return True for CAP_NET_BIND_SERVICE only, which the guest's kernel has checked."""
        return capability == CAP_NET_BIND_SERVICE

    def matches(self, grant: Grant) -> bool:
        """Return False: grants are for programs of the host."""
        return False


class HandoffChannel(DeviceChannel):
    """A connection that came with its request, and to which vsockd never replies."""

    request = b""
    has_requests = False

    def read(self) -> bytes:
        """Return the request that came with the descriptor; in later calls return no bytes."""
        request, self.request = self.request, b""
        return request

    def send(self, record: bytes, in_flight: InFlight | None = None) -> None:
        """Discard the record: the device replies on the connection itself."""


class DeviceLink(HandoffLink):
    """A device's link to vsockd."""

    def save(self, writer: Writer) -> Saved:
        """Return the link's state for the next vsockd."""
        device, ports, datagrams = self._context.device, self._host_ports, self._datagrams
        assert device is not None
        return {
            **super().save(writer),
            "credentials": (*self._credentials,),
            "seqpacket": device.seqpacket,
            "host_ports": None if ports is None else sorted(ports.reported),
            "before": (*self._before,),
            "datagrams": (
                writer.receiver(datagrams) if isinstance(datagrams, DatagramSocket) else None
            ),
        }

    def restore(self, reader: Reader, saved: Saved) -> None:
        """Restore the state that the previous vsockd has saved."""
        super().restore(reader, saved)
        self._before = Moved(*saved.get("before", (0, 0)))  # a predecessor may not report it
        if saved["datagrams"] is not None:
            self.set_datagrams(reader.receivers[saved["datagrams"]])

    def __init__(
        self,
        loop: EventLoop,
        broker: LinkCallbacks,
        context: Context,
        link: _socket.socket,
        credentials: Credentials,
        seqpacket: bool,
        host_ports: bool,
        reported: Iterable[int] | None = None,
    ) -> None:
        """Attach a device to ``context``.

        ``seqpacket``: the guest supports SOCK_SEQPACKET.  ``host_ports``: report the host's
        listening ports to the device, except those ``reported`` by an earlier vsockd.

        Raises Refused with EINVAL (``context`` is not a guest's) or EBUSY (it has a device).
        """
        if not context.is_guest:
            raise Refused(errno.EINVAL, f"context {context.cid} is not a virtual machine")
        if context.device is not None:
            raise Refused(errno.EBUSY, f"context {context.cid} has a device")
        super().__init__(loop, broker, context, link)
        self._credentials = credentials
        self._datagrams: DeviceDatagrams | None = None
        self._host_ports: HostPorts | None = None
        #: the guest's bytes that were moved by earlier devices
        self._before = context.meter.total if context.meter is not None else Moved(0, 0)
        context.device = DevicePorts(credentials, self, None, seqpacket)
        self._record()
        if host_ports:
            program = DeviceChannel(link, context, EndpointKind.STREAM, credentials)
            self._host_ports = HostPorts(loop, broker.fabric, context, program, link, reported)

    def close(self) -> None:
        """Detach the device from its context, so that no program can reach the guest's ports."""
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

    def _count_all(self, moved: Moved, now: float) -> None:
        """Add to the guest's bytes what the device has moved since its last report."""
        if self._context.meter is None:
            self._context.meter = ByteMeter()
        self._context.meter.report(self._before.plus(*moved), now)
        if self._broker.journal is not None:
            self._broker.journal.moved_by(self._context)

    def set_datagrams(self, datagrams: DeviceDatagrams) -> None:
        """Set the socket that receives datagrams to the guest's ports."""
        if self._datagrams is not None:
            self._datagrams.close()
        self._datagrams = datagrams
        assert self._context.device is not None
        self._context.device = replace(self._context.device, datagrams=datagrams)
        self._record()

    def send_capture(self, fd: int, limit: int, port: int) -> None:
        """Send ``fd`` to the device, which writes captured records to it.

        Raises OSError when the link is full.
        """
        record = Record(0, 0, self._context.cid, port, role=Role.CAPTURE, size=limit).encode()
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

    def _new_channel(self, fd: int, data: bytes) -> Channel | None:
        try:
            sock = _socket.socket(fileno=fd)
        except OSError:
            return None
        kind = _KINDS.get(SocketKind(sock.type))
        if sock.family != AF_UNIX or kind is None:
            sock.detach()
            return None
        if kind is EndpointKind.STREAM:
            refuse_descriptors(sock)  # the program that gets this socket expects none
        arguments = sock, self._context, kind, self._credentials
        if len(data) < REQUEST_SIZE:
            return DeviceChannel(*arguments)
        given = HandoffChannel(*arguments)
        given.request = data
        return given


def capture(fabric: Fabric, channel: Channel, request: Request) -> _socket.socket:
    """Return the socket on which the client receives records (:mod:`.protocol.vsockmon`).

    vsockd creates a socket pair, sends one end to the device, and returns the other, which the
    caller sends to the client.  vsockd keeps neither.

    Raises Refused with EACCES (the client may not capture), ENOENT (no such context), ENOTSUP (it
    has no device) or ENOBUFS (the device's link is full).
    """
    policy.require_capture(channel.context, channel.asker, fabric.settings)
    context = fabric.contexts.require(request.peer_cid)
    if context.device is None:
        raise Refused(errno.ENOTSUP, f"context {context.cid} has no device")
    theirs, ours = socketpair(AF_UNIX, SOCK_SEQPACKET)
    with ours:
        try:
            ours.setsockopt(SOL_SOCKET, SO_SNDBUF, CAPTURE_BUFFER_MAX_BYTES)
            with contextlib.suppress(PermissionError):  # above net.core.wmem_max
                ours.setsockopt(SOL_SOCKET, SO_SNDBUFFORCE, CAPTURE_BUFFER_MAX_BYTES)
            limit = min(request.size, CAPTURE_PAYLOAD_MAX_BYTES)
            context.device.streams.send_capture(ours.fileno(), limit, request.peer_port)
        except OSError:
            theirs.close()
            raise Refused(errno.ENOBUFS, "the device's link is full") from None
    return theirs


def _decode_report(data: bytes) -> Request | None:
    try:
        request = Request.decode(data)
    except ProtocolError:
        return None
    return request if request.op in (Op.SETTLE, Op.COUNT) else None


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
