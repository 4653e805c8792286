"""A device's attachment to vsockd: its guest becomes a context of the fabric.

The device has one socket to vsockd, its *link*, got from the administrator's socket.  Over it
go messages of these kinds:

- New channels go: one end of a socket pair, on which the device says what any program says on
  a connection to its context's control socket.  CONNECT has the guest's port in it; BIND_DATAGRAM
  and ROUTE serve the ports the guest sends datagrams from, CATCH_ALL has those to all others.
- A record tells that a program's buffer has another size now.
- A tap comes (:mod:`.tap`): a record, and a socket to send what passes to.
- An offer comes: a record, and the accepted end of a stream whose other end waits for an
  answer.  The device asks its guest, writes the answer to that end, and tells vsockd (SETTLE);
  with a refusal the end goes back.
- A stream of the guest's goes, as it stands, with the CONNECT that it is: vsockd hands it on to
  whoever listens, and nothing is answered.  Records without a descriptor tell which ports of the
  host somebody listens at.  Both are for devices that have a unix socket for each stream already.

Nothing here knows what kind of device it is.
"""

from __future__ import annotations

import array
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
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOCK_DGRAM,
    SOCK_SEQPACKET,
    SOCK_STREAM,
    SOL_SOCKET,
)
from typing import NamedTuple

from ..attachment import descriptor_in
from ..limits import MAX_DATAGRAM
from ..model.buffers import BufferSizes
from ..model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from ..pass_rights import refuse
from ..protocol import (
    PADDING,
    RECORD_SIZE,
    Op,
    ProtocolError,
    Record,
    Request,
    RequestFlag,
    Role,
    decode_route,
)
from ..protocol.hybrid import ok_line
from .capture import CaptureSink
from .limits import (
    DEVICE_DATAGRAM_PORTS_MAX,
    DEVICE_UNSENT_DATAGRAM_MAX_BYTES,
    DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS,
)
from .loop import READABLE, DeviceLoop

_RECEIVE_FLAGS = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
_ONE_DESCRIPTOR = CMSG_LEN(array.array("i").itemsize)

#: What a datagram takes besides its payload, in bytes, about.
_DATAGRAM_OVERHEAD_BYTES = 64

#: What a route says when it is no longer one.
_ROUTE_CLOSED = (ConnectionRefusedError, BrokenPipeError, ConnectionResetError)


class ConnectRequest(NamedTuple):
    """A stream that somebody wants to have with the guest."""

    sock: socket.socket
    port: int  #: the guest's
    peer: tuple[int, int]  #: who connects
    sizes: BufferSizes  #: what the peer asks for
    polling: bool  #: padding must be taken off ``sock``, last of all
    ok_line: bool = False  #: who connects waits for a line of hybrid vsock, not for a record


class _Route:
    """A way to one receiver, and what waits until it has room."""

    def __init__(self, loop: DeviceLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._sock = sock
        self._waiting: deque[bytes] = deque()
        self._bytes = 0

    def send(self, payload: bytes) -> None:
        """OSError: ENOBUFS when too much waits already, ECONNREFUSED and so on."""
        if not self._waiting:
            try:
                self._sock.send(payload, MSG_DONTWAIT)
                return
            except BlockingIOError:
                self._loop.watch_for(self._sock.fileno(), self._flush, EPOLLOUT)
        # An empty datagram takes memory, too.
        if self._bytes + len(payload) + _DATAGRAM_OVERHEAD_BYTES > DEVICE_UNSENT_DATAGRAM_MAX_BYTES:
            raise OSError(errno.ENOBUFS, "the receiver's queue is full")
        self._waiting.append(payload)
        self._bytes += len(payload) + _DATAGRAM_OVERHEAD_BYTES

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return not self._waiting

    def _flush(self, events: int) -> None:
        try:
            while self._waiting:
                self._sock.send(self._waiting[0], MSG_DONTWAIT)
                self._bytes -= len(self._waiting.popleft()) + _DATAGRAM_OVERHEAD_BYTES
        except BlockingIOError:
            return
        except OSError:
            self._waiting.clear()  # the receiver has gone
            self._bytes = 0
        self._loop.unwatch(self._sock.fileno())

    def close(self) -> None:
        self._loop.unwatch(self._sock.fileno())
        self._sock.close()


class _Port:
    """A datagram socket for a port of the guest, and where it can send to."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.routes: dict[tuple[int, int], _Route] = {}

    @property
    def is_idle(self) -> bool:
        """Whether nothing waits."""
        return all(route.is_idle for route in self.routes.values())

    def close(self) -> None:
        for route in self.routes.values():
            route.close()
        self.sock.close()


class DeviceClient:
    """``link`` becomes the attachment's.  Set the three functions before the loop runs."""

    on_connect: Callable[[ConnectRequest], None]
    #: a datagram: its source, the guest's port, the payload; whether there is room for more
    on_datagram: Callable[[tuple[int, int], int, bytes], bool]
    on_lost: Callable[[], None]
    #: whether the guest can connect to this port of the host, for who has asked to be told
    on_listening: Callable[[int, bool], None]

    def __init__(
        self, loop: DeviceLoop, link: socket.socket, cid: int, datagrams: bool = True
    ) -> None:
        """Without ``datagrams`` the guest has none, and who sends it one is refused."""
        self.cid = cid
        #: who is connected to this port of the guest's has a buffer of another size, in bytes
        self.on_resized: Callable[[int, tuple[int, int], int], None] = lambda port, peer, size: None
        #: hear first what has become of the context: what is new is not to share its end
        self.drain_events: Callable[[], None] = lambda: None
        self._loop = loop
        self._link = link
        self._link.setblocking(False)
        self._owner = os.getpid(), os.geteuid(), os.getegid()
        self._ports: dict[int, _Port] = {}  # the one longest unused first
        self._catch_all = socket.socket(AF_UNIX, SOCK_DGRAM)
        refuse(self._catch_all)
        self._catch_all.setblocking(False)
        self._paused: list[socket.socket] = []
        #: what vsockd had no room to be told, with the end of the stream it was offered
        self._unsettled: deque[tuple[bytes, socket.socket | None]] = deque()
        self.capture = CaptureSink(
            loop
        )  #: the device says there what passes, if anybody wants to know
        loop.watch(link.fileno(), self._on_link_ready)
        if datagrams:
            self._request(Request(Op.CATCH_ALL), self._catch_all)
            self._watch_datagrams(self._catch_all)

    @property
    def is_open(self) -> bool:
        """Whether vsockd is there."""
        return self._link.fileno() >= 0

    def close(self) -> None:
        """Leave the fabric."""
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
        """A connection of type ``kind`` from the guest's ``port``.  OSError when vsockd has gone.

        The first that can be read from it is a record: vsockd's answer.
        """
        self.drain_events()
        ours, theirs = socket.socketpair(AF_UNIX, kind)
        _refuse_descriptors(ours)
        with theirs:
            try:
                ours.setblocking(False)
                request = Request(Op.CONNECT, 0, VMADDR_CID_ANY, port, *peer, 0, *sizes)
                ours.send(request.encode())
                self._send_to_vsockd(b"", theirs)
            except OSError:
                ours.close()
                raise
        return ours

    def hand_off(self, sock: socket.socket, peer: tuple[int, int]) -> None:
        """Connect ``sock``, whose other end is the guest, to ``peer``; it is vsockd's then.

        The guest's port is vsockd's choice.  OSError when vsockd has gone, or has no time.
        """
        request = Request(
            Op.CONNECT, 0, VMADDR_CID_ANY, VMADDR_PORT_ANY, *peer, 0, *BufferSizes()
        ).encode()
        try:
            self._send_to_vsockd(request, sock)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            # It takes a tenth of a millisecond for each, and never waits for us.
            select.select((), (self._link,), (), DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS)
            self._send_to_vsockd(request, sock)

    def settle(self, request: ConnectRequest, size: int = 0, error: int = 0) -> None:
        """Answer an offer: the stream is established with ``size``, or there is none.

        Then ``offer.sock`` goes back to vsockd, to whom its other end may say more; close it.
        """
        local, peer = (self.cid, request.port), request.peer
        if not error:  # one that is refused is vsockd's again, which takes descriptors
            _refuse_descriptors(request.sock)
        with contextlib.suppress(OSError):  # who connected has gone; the stream says so
            if not error:  # until now vsockd was to be told who writes on it
                request.sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 0)
            request.sock.send(self._reply(request, size, error), MSG_DONTWAIT | MSG_NOSIGNAL)
            if request.polling or request.sock.type == SOCK_SEQPACKET:  # there, with the request
                request.sock.recv(len(PADDING), MSG_DONTWAIT)
        message = Request(Op.SETTLE, 0, *local, *peer, error, size).encode()
        with contextlib.suppress(OSError):  # vsockd has gone; the link says so
            self._send_or_queue(message, request.sock if error else None)

    def _send_or_queue(self, message: bytes, sock: socket.socket | None) -> None:
        """As soon as there is room for it.  vsockd makes no more offers than it remembers, so
        no more of these wait."""
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
        with contextlib.suppress(OSError):  # there is no more room, or vsockd has gone
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
        """Send from the guest's ``port``.

        OSError: ECONNREFUSED, EHOSTUNREACH and so on from vsockd; ENOBUFS: the receiver's queue
        is full; ENETDOWN: vsockd has gone.
        """
        found = self._ports.pop(port, None)
        if found is None:
            found = self._bind(port)
        self._ports[port] = found  # the one last used, now
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
                raise OSError(errno.ENOBUFS, "datagrams of too many ports wait")
            self._close_port(longest_idle)
        sock = socket.socket(AF_UNIX, SOCK_DGRAM)
        refuse(sock)
        try:
            sock.setblocking(False)
            self._request(Request(Op.BIND_DATAGRAM, 0, VMADDR_CID_ANY, port), sock)
        except OSError:
            sock.close()
            raise
        self._watch_datagrams(sock)
        return _Port(sock)

    def _new_route(self, port: _Port, destination: tuple[int, int]) -> _Route:
        cid, number = destination
        request = Request(Op.ROUTE, 0, VMADDR_CID_ANY, VMADDR_CID_ANY, cid, number)
        fd = self._request(request, port.sock)
        if fd is None:
            raise OSError(errno.EMFILE, "no descriptor for a route")
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
        if port is None:  # it came to a port's own socket
            port = next((n for n, found in self._ports.items() if found.sock is sock), None)
        if port is not None and not self.on_datagram(source, port, payload):
            self._loop.unwatch(sock.fileno())
            self._paused.append(sock)

    def resume_datagrams(self) -> None:
        """There is room for datagrams again."""
        while self._paused:
            self._watch_datagrams(self._paused.pop())

    # The link

    def _send_to_vsockd(self, message: bytes, sock: socket.socket | None = None) -> None:
        if not self.is_open:
            raise OSError(errno.ENETDOWN, "vsockd has gone")
        rights = []
        if sock is not None:
            rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [sock.fileno()]))]
        try:
            # Not empty: that would be the end of the link.
            self._link.sendmsg([message or b"\0"], rights, MSG_DONTWAIT | MSG_NOSIGNAL)
        except BlockingIOError:
            raise OSError(errno.ENOBUFS, "vsockd has too much to do") from None

    def _request(self, request: Request, sock: socket.socket) -> int | None:
        """Ask about ``sock``; returns the descriptor that came with the answer.  OSError."""
        ours, theirs = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        with ours:
            with theirs:
                rights = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [sock.fileno()]))]
                ours.sendmsg([request.encode()], rights)
                self._send_to_vsockd(b"", theirs)
            ours.settimeout(DEVICE_VSOCKD_REPLY_TIMEOUT_SECONDS)
            try:
                record, fd = _receive(ours, MSG_CMSG_CLOEXEC)
            except TimeoutError:
                raise OSError(errno.ENETDOWN, "vsockd does not answer") from None
        if record.status:
            raise OSError(record.status, os.strerror(record.status))
        return fd

    def _on_link_ready(self, events: int) -> None:
        if events & EPOLLOUT:
            self._flush_unsettled()
        try:
            record, fd = _receive(self._link, _RECEIVE_FLAGS)
        except BlockingIOError:
            return
        if fd is None:
            if record.status:
                self._disconnect()
            elif record.role == Role.BUFFER:
                self.on_resized(record.local_port, record.peer, record.size)
            elif record.role in (Role.LISTENING, Role.GONE):
                self.on_listening(record.local_port, record.role == Role.LISTENING)
            else:
                self._disconnect()
            return
        sock = socket.socket(fileno=fd)
        if record.role == Role.TAP:
            self.capture.add(sock, record.size, record.local_port)
            return
        sock.setblocking(False)
        sizes = BufferSizes(record.size, record.minimum, record.maximum)
        flags = bool(record.flags & RequestFlag.POLLING), bool(record.flags & RequestFlag.OK_LINE)
        self.drain_events()
        self.on_connect(ConnectRequest(sock, record.local_port, record.peer, sizes, *flags))

    def _disconnect(self) -> None:
        if self.is_open:
            self.close()
            self.on_lost()


def _receive(sock: socket.socket, flags: int) -> tuple[Record, int | None]:
    """A record and the descriptor that came with it; one that says ENETDOWN at the end."""
    try:
        data, ancillary, _, _ = sock.recvmsg(RECORD_SIZE, _ONE_DESCRIPTOR, flags)
        return Record.decode(data), descriptor_in(ancillary)
    except (ConnectionError, ProtocolError):
        return Record(errno.ENETDOWN), None


def _refuse_descriptors(sock: socket.socket) -> None:
    """Have an established connection refuse them, unless one is the mark of a record's end
    (``devices/virtio/host_stream.py``).
    """
    if sock.type != SOCK_SEQPACKET:
        refuse(sock)
