"""Client of vsockd for a device: its guest becomes a context of the fabric.

The device has one socket to vsockd, the *link*, which vsockd's administration socket provides.
The link carries these messages:

- To vsockd, a new channel: one end of a socket pair, on which the device sends the requests that a
  program sends to its context's control socket.  CONNECT names the guest's port; BIND_DATAGRAM and
  ROUTE serve the guest's ports that send datagrams; CATCH_ALL registers one socket that receives
  the datagrams to all other ports of the guest.
- From vsockd, a record: the peer of a stream has changed its buffer size.
- From vsockd, a capture (:mod:`.capture`): a record, and a socket to send records to.
- From vsockd, a connect request: a record, and the accepted end of a stream whose client waits for
  a reply.  The device asks its guest, writes the reply to that end, and reports the outcome to
  vsockd (SETTLE); if the guest refuses, it also returns the end to vsockd.
- To vsockd, an established stream of the guest with its CONNECT: vsockd hands the stream off to the
  listener, without a reply.  From vsockd, records without a descriptor: which ports of the host
  have gained or lost a listener.  Only devices with a unix socket for each stream (hybrid vsock)
  use these two messages.

This module is independent of the kind of device.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from select import EPOLLOUT
from socket import (
    AF_UNIX,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SO_PASSCRED,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)
from typing import TYPE_CHECKING, NamedTuple

from .._linux.sockets import DESCRIPTOR_SPACE, descriptor_in, refuse_descriptors, with_descriptor
from ..limits import MAX_DATAGRAM
from ..model.buffers import DEFAULT_SIZES, BufferSizes
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..protocol import PADDING, RECORD_SIZE, Record, Role, client, decode_route
from ..protocol.hybrid import ok_line
from .byte_reports import ByteReports
from .capture import CaptureSink
from .limits import (
    DEVICE_DATAGRAM_PORTS_MAX,
    DEVICE_UNSENT_DATAGRAM_MAX_BYTES,
    DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS,
)
from .loop import READABLE, DeviceLoop

if TYPE_CHECKING:
    from ..control import Events  # the hybrid relay, which starts often, needs no events

_RECEIVE_FLAGS = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)

#: Memory of a queued datagram beside its payload, in bytes, approximately.
_DATAGRAM_OVERHEAD_BYTES = 64

#: Errors of a route whose receiver has closed.
_ROUTE_CLOSED = (ConnectionRefusedError, BrokenPipeError, ConnectionResetError)


class ConnectRequest(NamedTuple):
    """A client's connect to the guest that waits for the guest's answer."""

    sock: socket.socket
    port: int  #: the guest's port
    peer: tuple[int, int]  #: the client's CID and port
    sizes: BufferSizes  #: buffer sizes that the client requests
    polling: bool  #: padding must be received from ``sock`` after the reply
    ok_line: bool = False  #: the client expects the OK line of hybrid vsock instead of a record


class _Route:
    """A socket to one receiver of datagrams, and the datagrams that wait for its room."""

    def __init__(self, loop: DeviceLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._waiting: deque[bytes] = deque()
        self._bytes = 0

    def send(self, payload: bytes) -> None:
        """Send a datagram, or queue it while the receiver's socket is full.

        Raises OSError: ENOBUFS when the queue is full; ECONNREFUSED, EPIPE or ECONNRESET when the
        receiver has closed.
        """
        if not self._waiting:
            try:
                self._sock.send(payload, MSG_DONTWAIT)
                return
            except BlockingIOError:
                self._loop.watch_for(self._sock.fileno(), self._flush, EPOLLOUT)
        # An empty datagram takes memory, too: count the overhead.
        if self._bytes + len(payload) + _DATAGRAM_OVERHEAD_BYTES > DEVICE_UNSENT_DATAGRAM_MAX_BYTES:
            raise OSError(errno.ENOBUFS, "the receiver's queue is full")
        self._waiting.append(payload)
        self._bytes += len(payload) + _DATAGRAM_OVERHEAD_BYTES

    @property
    def is_idle(self) -> bool:
        """Flag: true while no datagram is queued for the receiver."""
        return not self._waiting

    def _flush(self, events: int) -> None:
        try:
            while self._waiting:
                self._sock.send(self._waiting[0], MSG_DONTWAIT)
                self._bytes -= len(self._waiting.popleft()) + _DATAGRAM_OVERHEAD_BYTES
        except BlockingIOError:
            return
        except OSError:
            self._waiting.clear()  # the receiver has closed
            self._bytes = 0
        self._loop.unwatch(self._sock.fileno())

    def close(self) -> None:
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()


class _Port:
    """A datagram socket bound to a port of the guest, with a route for each destination."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.routes: dict[tuple[int, int], _Route] = {}

    @property
    def is_idle(self) -> bool:
        """Flag: true while no datagram of the port is queued."""
        return all(route.is_idle for route in self.routes.values())

    def close(self) -> None:
        for route in self.routes.values():
            route.close()
        self.sock.close()


class DeviceClient:
    """Connection of a device to vsockd; takes ownership of ``link``.

    The device sets the callbacks below before the loop runs.
    """

    #: connect a client to the guest; later call :meth:`DeviceClient.settle`
    on_connect: Callable[[ConnectRequest], None]
    #: deliver a datagram to the guest: source (CID, port), guest's port, payload; return whether
    #: the device has room for another datagram
    on_datagram: Callable[[tuple[int, int], int, bytes], bool]
    #: handle the end of the link
    on_lost: Callable[[], None]
    #: handle a change of a host's port: the port, and whether a program listens on it now; only
    #: devices that requested these reports receive them
    on_listening: Callable[[int, bool], None]

    def __init__(
        self, loop: DeviceLoop, link: socket.socket, cid: int, datagrams: bool = True
    ) -> None:
        """Attach the context ``cid``; without ``datagrams`` vsockd refuses datagrams to it."""
        self.cid = cid
        #: apply a peer's new buffer size: guest's port, peer (CID, port), size in bytes
        self.on_resized: Callable[[int, tuple[int, int], int], None] = lambda port, peer, size: None
        #: handle pending life-cycle events, so that an interruption never resets a newer stream
        self.drain_events: Callable[[], None] = lambda: None
        self._loop = loop
        self._link = link
        self._link.setblocking(False)
        self._owner = os.getpid(), os.geteuid(), os.getegid()
        self._ports: dict[int, _Port] = {}  # least recently used first
        self._catch_all = socket.socket(AF_UNIX, SOCK_DGRAM)
        refuse_descriptors(self._catch_all)
        self._catch_all.setblocking(False)
        self._paused: list[socket.socket] = []
        #: SETTLE messages for which the link had no room, each with the socket to return to vsockd
        #: if the guest refused the connect
        self._unsettled: deque[tuple[bytes, socket.socket | None]] = deque()
        self.capture = CaptureSink(loop)  #: running captures of the device's packets
        self.byte_reports = ByteReports(loop, cid, self._send_to_vsockd)
        loop.watch(link.fileno(), self.on_link_ready)
        if datagrams:
            self._request(client.catch_all(), self._catch_all)
            self._watch_datagrams(self._catch_all)

    @property
    def is_open(self) -> bool:
        """Flag: true while the link is open."""
        return self._link.fileno() >= 0

    def close(self) -> None:
        """Detach from the fabric and close all sockets."""
        if self.is_open:
            self._loop.unwatch(self._link.fileno())
            self._link.close()
            for _, sock in self._unsettled:
                if sock is not None:
                    sock.close()
            self._unsettled.clear()
            self._close_datagrams(self._catch_all)
            self.capture.close()
            while self._ports:
                self._close_port(next(iter(self._ports)))

    # Streams

    def connect(
        self, port: int, peer: tuple[int, int], sizes: BufferSizes, kind: int = SOCK_STREAM
    ) -> socket.socket:
        """Connect from the guest's ``port`` to ``peer``, with a socket of type ``kind``.

        ``peer`` is a CID and a port.  The first message on the returned, non-blocking socket is a
        record: vsockd's reply.

        Raises OSError when the link is closed.
        """
        self.drain_events()
        ours, theirs = socket.socketpair(AF_UNIX, kind)
        _refuse_descriptors(ours)
        with theirs:
            try:
                ours.setblocking(False)
                ours.send(client.connect_from_guest(port, peer, sizes))
                self._send_to_vsockd(b"", theirs)
            except OSError:
                ours.close()
                raise
        return ours

    def hand_off(self, sock: socket.socket, peer: tuple[int, int]) -> None:
        """Hand ``sock``, whose other end is the guest, off to the listener at ``peer``: CID, port.

        vsockd chooses the guest's port of the stream.

        Raises OSError when the link is closed, or vsockd does not read the link in time.
        """
        request = client.connect_from_guest(VMADDR_PORT_ANY, peer, DEFAULT_SIZES)
        try:
            self._send_to_vsockd(request, sock)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # vsockd reads a message in a tenth of a millisecond, and never waits for a device.
            select.select((), (self._link,), (), DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS)
            self._send_to_vsockd(request, sock)

    def settle(self, request: ConnectRequest, size: int = 0, error: int = 0) -> None:
        """Reply to a connect request: established, or refused with the errno ``error``.

        ``size`` is the agreed buffer size in bytes.  After a refusal ``request.sock`` is returned
        to vsockd, because the client may connect that socket again; the caller closes its own
        descriptor of the socket.
        """
        local, peer = (self.cid, request.port), request.peer
        if not error:  # a refused socket returns to vsockd, which receives descriptors
            _refuse_descriptors(request.sock)
        with contextlib.suppress(OSError):  # the client has closed its end
            if not error:  # vsockd needed the sender's credentials until now
                request.sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 0)
            request.sock.send(self._reply(request, size, error), MSG_DONTWAIT | MSG_NOSIGNAL)
            # The client's request carried padding, which no program must receive.
            if request.polling or request.sock.type == SOCK_SEQPACKET:
                request.sock.recv(len(PADDING), MSG_DONTWAIT)
        message = client.settle(local, peer, size=size, error=error)
        with contextlib.suppress(OSError):  # the link is closed; on_lost reports that
            self._send_or_queue(message, request.sock if error else None)

    def _send_or_queue(self, message: bytes, sock: socket.socket | None) -> None:
        """Send ``message`` with ``sock``, or queue both until the link has room.

        vsockd limits the pending connect requests, and thereby the length of the queue.
        """
        if not self._unsettled:
            try:
                self._send_to_vsockd(message, sock)
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise
            self._loop.change(self._link.fileno(), READABLE | EPOLLOUT)
        self._unsettled.append((message, None if sock is None else sock.dup()))

    def _flush_unsettled(self) -> None:
        with contextlib.suppress(OSError):  # the link is full or closed
            while self._unsettled:
                message, sock = self._unsettled[0]
                self._send_to_vsockd(message, sock)
                self._unsettled.popleft()
                if sock is not None:
                    sock.close()
            self._loop.change(self._link.fileno(), READABLE)

    def _reply(self, request: ConnectRequest, size: int, error: int) -> bytes:
        if request.ok_line:
            return b"" if error else ok_line(request.peer[1])
        if error:
            return Record(error).encode()
        minimum, maximum = request.sizes.minimum, request.sizes.maximum
        own, peer = (self.cid, request.port), request.peer
        return Record(
            0, 0, *peer, *own, Role.CONNECTED, *self._owner, size, minimum, maximum
        ).encode()

    # Datagrams

    def send(self, port: int, destination: tuple[int, int], payload: bytes) -> None:
        """Send a datagram from the guest's ``port``.

        Raises OSError: ECONNREFUSED, EHOSTUNREACH and others from vsockd; ENOBUFS when the
        receiver's queue is full; ENETDOWN when the link is closed.
        """
        found = self._ports.pop(port, None)
        if found is None:
            found = self._bind(port)
        self._ports[port] = found  # now the most recently used
        route = found.routes.get(destination)
        if route is not None:
            try:
                route.send(payload)
                return
            except _ROUTE_CLOSED:
                found.routes.pop(destination).close()
        self._new_route(found, destination).send(payload)

    def _bind(self, port: int) -> _Port:
        if len(self._ports) >= DEVICE_DATAGRAM_PORTS_MAX:
            idle = (number for number, found in self._ports.items() if found.is_idle)
            longest_idle = next(idle, None)
            if longest_idle is None:
                raise OSError(errno.ENOBUFS, "too many ports have queued datagrams")
            self._close_port(longest_idle)
        sock = socket.socket(AF_UNIX, SOCK_DGRAM)
        refuse_descriptors(sock)
        try:
            sock.setblocking(False)
            self._request(client.bind_datagram((VMADDR_CID_ANY, port)), sock)
        except OSError:
            sock.close()
            raise
        self._watch_datagrams(sock)
        return _Port(sock)

    def _new_route(self, port: _Port, destination: tuple[int, int]) -> _Route:
        fd = self._request(client.route(destination), port.sock)
        if fd is None:
            raise client.missing_descriptor()
        sock = socket.socket(AF_UNIX, SOCK_DGRAM, 0, fd)
        route = port.routes[destination] = _Route(self._loop, sock)
        if len(port.routes) > DEVICE_DATAGRAM_PORTS_MAX:
            port.routes.pop(next(iter(port.routes))).close()
        return route

    def _close_port(self, port: int) -> None:
        found = self._ports.pop(port)
        self._close_datagrams(found.sock)
        found.close()

    def _close_datagrams(self, sock: socket.socket) -> None:
        self._loop.unwatch(sock.fileno())
        if sock in self._paused:
            self._paused.remove(sock)
        sock.close()

    def _watch_datagrams(self, sock: socket.socket) -> None:
        self._loop.watch(sock.fileno(), lambda events: self._receive(sock))

    def _receive(self, sock: socket.socket) -> None:
        try:
            payload, name = sock.recvfrom(MAX_DATAGRAM)
        except OSError:
            return
        source, port = decode_route(name)
        if source is None:
            return
        if port is None:  # received by the socket of a port
            port = next((n for n, found in self._ports.items() if found.sock is sock), None)
        if port is not None and not self.on_datagram(source, port, payload):
            self._loop.unwatch(sock.fileno())
            self._paused.append(sock)

    def resume_datagrams(self) -> None:
        """Resume receiving datagrams, which stopped when :attr:`on_datagram` reported no room."""
        while self._paused:
            self._watch_datagrams(self._paused.pop())

    # The link

    def _send_to_vsockd(self, message: bytes, sock: socket.socket | None = None) -> None:
        if not self.is_open:
            raise OSError(errno.ENETDOWN, "the link to vsockd is closed")
        rights = []
        if sock is not None:
            rights = [with_descriptor(sock.fileno())]
        try:
            # An empty message would be the end of the link.
            self._link.sendmsg([message or b"\0"], rights, MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            raise OSError(errno.ENOBUFS, "vsockd does not read the link") from None

    def _request(self, request: bytes, sock: socket.socket) -> int | None:
        """Send a request about ``sock``; return the descriptor that came with the reply, or None.

        Raises OSError: the errno in the reply, or ENETDOWN when no reply arrives in time.
        """
        ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        with ours:
            with theirs:
                rights = [with_descriptor(sock.fileno())]
                ours.sendmsg([request], rights)
                self._send_to_vsockd(b"", theirs)
            ours.settimeout(DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS)
            try:
                data, fd = _receive(ours, MSG_CMSG_CLOEXEC)
            except TimeoutError:
                raise OSError(errno.ENETDOWN, "no reply from vsockd") from None
        client.decode_reply(data)
        return fd

    def on_link_ready(self, events: int) -> None:
        """Handle readiness of the link: send queued SETTLE messages, and receive one message."""
        if events & EPOLLOUT:
            self._flush_unsettled()
        try:
            data, fd = _receive(self._link, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        if fd is None:
            self._on_notification(data)
        else:
            self._on_handoff(data, socket.socket(fileno=fd))

    def _on_notification(self, data: bytes) -> None:
        try:
            message = client.decode_notification(data)
        except OSError:
            self._disconnect()
            return
        if isinstance(message, client.BufferResized):
            self.on_resized(*message)
        else:
            self.on_listening(*message)

    def _on_handoff(self, data: bytes, sock: socket.socket) -> None:
        try:
            message = client.decode_handoff(data)
        except OSError:
            sock.close()
            self._disconnect()
            return
        if isinstance(message, client.CaptureStart):
            self.capture.add(sock, message.limit, message.port)
            return
        sock.setblocking(False)
        self.drain_events()
        self.on_connect(ConnectRequest(sock, *message))

    def _disconnect(self) -> None:
        if self.is_open:
            self.close()
            self.on_lost()


def _receive(sock: socket.socket, flags: int) -> tuple[bytes, int | None]:
    """Return a message and its descriptor, or None; at end of file the message is empty."""
    try:
        data, ancillary, _, _ = sock.recvmsg(RECORD_SIZE, DESCRIPTOR_SPACE, flags)
    except ConnectionError:
        return b"", None
    return data, descriptor_in(ancillary)


def _refuse_descriptors(sock: socket.socket) -> None:
    """Make the socket of an established stream refuse descriptors from its other end.

    A sequenced-packet socket must accept descriptors: one marks the end of a record
    (``devices/virtio/connection.py``).
    """
    if sock.type != SOCK_SEQPACKET:
        refuse_descriptors(sock)


#: Changes after which the guest's connections are reset, all at once.
INTERRUPTIONS = ("resume", "migrate", "ft-on")


def subscribe(
    loop: DeviceLoop, fabric: DeviceClient, events: Events, on_event: Callable[[int, str], None]
) -> None:
    """Call ``on_event`` for each event: a context's CID, and the change (such as ``resume``).

    The subscription ends when vsockd closes ``events``.  Pending events are handled before
    ``fabric`` creates a stream, so that an interruption resets no stream that is opened after the
    interruption.
    """

    def drain() -> None:
        if not loop.watches(events.fileno()):
            return
        happened = events.take()
        if happened is None:
            loop.unwatch(events.fileno())
            return
        for event in happened:
            on_event(event["cid"], event["change"])

    loop.watch(events.fileno(), lambda readiness: drain())
    fabric.drain_events = drain
