"""Transport of one guest's vSockets: all its streams and datagrams."""

from __future__ import annotations

import errno
import logging
import select
import socket
from itertools import count
from socket import SO_SNDBUF, SOL_SOCKET

from ...limits import SEND_BUFFER_MAX_BYTES, STREAM_BUFFER_DEFAULT_BYTES, STREAM_BUFFER_MAX_BYTES
from ...model.buffers import BufferSizes
from ...model.constants import VMADDR_CID_HYPERVISOR
from ...protocol import RECORD_SIZE
from ...protocol.client import decode_reply
from ...protocol.vsockmon import Operation
from ..client import ConnectRequest, DeviceClient
from ..limits import (
    VMCI_CONNECT_STOP_SECONDS,
    VMCI_CONNECT_WAIT_SECONDS,
    VMCI_HANDSHAKE_TIMEOUT_SECONDS,
    VMCI_PENDING_STREAMS_MAX,
    VMCI_QUEUE_PAIR_MAX_BYTES,
    VMCI_UNSENT_MAX_BYTES,
)
from ..loop import DeviceLoop, Timer
from . import packets
from .flow_control import AttachOrdering
from .handshake import Accepting, Connecting, Step
from .hypervisor import Hypervisor
from .packets import HEADER, Code, Datagram, Handle, Kind, Packet, operation_of
from .queue_pair import QueuePair
from .stream import Stream

log = logging.getLogger(__name__)

#: Smallest and largest buffer size for a connecting guest: the guest itself checks the agreed size.
_SIZE_MIN, _SIZE_MAX = 1, VMCI_QUEUE_PAIR_MAX_BYTES

_CODES = {
    errno.EHOSTUNREACH: Code.INVALID_RESOURCE,
    errno.ENETDOWN: Code.INVALID_RESOURCE,
    errno.ECONNREFUSED: Code.INVALID_RESOURCE,
    errno.EACCES: Code.NO_ACCESS,
    errno.ENOBUFS: Code.NO_RESOURCES,
    errno.EMFILE: Code.NO_RESOURCES,
    errno.EADDRINUSE: Code.ALREADY_EXISTS,
}

#: Key of a stream in packets: the guest's port, the peer's context and port.
_Key = tuple[int, int, int]

_DONE = HEADER.size + packets.SIZE
_REQUESTS = (Kind.REQUEST, Kind.REQUEST2)


class _Connection:
    """A stream, from the first packet of its handshake on."""

    handshake: Accepting | Connecting | None
    stream: Stream | None = None
    timer: Timer | None = None
    request: ConnectRequest | None = None  # of a stream to the guest
    attach_ordering: AttachOrdering | None = None  # of a stream from the guest
    sent_at = 0.0  # time of the handshake's last packets to the guest

    def __init__(self, key: _Key, sock: socket.socket) -> None:
        self.key = key
        self.sock = sock


def _proposed_sizes(request: ConnectRequest) -> BufferSizes:
    """Return the sizes to propose to the guest.

    If the program has not chosen a size, STREAM_BUFFER_MAX_BYTES is proposed, Linux's own default:
    with the default of 64 KiB a guest sleeps and is woken four times as often.
    """
    if request.sizes.size != STREAM_BUFFER_DEFAULT_BYTES:
        return request.sizes
    return request.sizes.with_size(STREAM_BUFFER_MAX_BYTES)


def _reported_size(request: ConnectRequest, size: int) -> int:
    """Return the buffer size to report to the program, in bytes.

    A program that has not chosen a size gets the default, not the larger size that
    :func:`_proposed_sizes` has proposed to the guest.
    """
    return request.sizes.size if size == _proposed_sizes(request).size else size


class VmciTransport:
    """vSockets of the guest that ``hypervisor`` serves."""

    def __init__(
        self,
        loop: DeviceLoop,
        hypervisor: Hypervisor,
        fabric: DeviceClient,
        protocol_v1: bool = False,
    ) -> None:
        """Attach to ``fabric``; ``protocol_v1`` selects version 1 of the handshake."""
        self._loop = loop
        self._hypervisor = hypervisor
        self._fabric = fabric
        self._own_handle = Handle(hypervisor.cid, packets.RESOURCE)
        self._protocol_v1 = protocol_v1
        self._capture = fabric.capture
        self._connections: dict[_Key, _Connection] = {}
        self._pending: set[_Connection] = set()  # those without a stream
        self._awaited: _Connection | None = None  # the guest waits for the result of its request
        self._reply_timer: Timer | None = None
        self._by_handle: dict[Handle, _Connection] = {}
        self._expected_sizes: dict[Handle, int] = {}  # of queue pairs to attach to
        self._resources = count(1)
        self._unsent: set[Stream] = set()
        fabric.on_connect = self.connect_to_guest
        fabric.on_datagram = self._on_datagram
        fabric.on_lost = self.close_all

    @property
    def is_idle(self) -> bool:
        """Flag: true while no stream exists and the guest is not expected to attach."""
        return not (self._connections or self._by_handle or self._expected_sizes)

    # From the guest

    def receive(self, peer: int, packet: Packet) -> int | None:
        """Implement :class:`.hypervisor.Sockets`."""
        key = packet.source_port, peer, packet.destination_port
        if self._capture.recorders:
            self._record(operation_of(packet.kind), key, from_guest=True)
        connection = self._connections.get(key)
        if packet.kind in _REQUESTS:
            if self._protocol_v1 and packet.kind == Kind.REQUEST2:
                self._send(key, Kind.INVALID)
                return _DONE
            if connection is not None:
                self._on_guest_closed(connection)
            return self._accept(key, packet)
        if connection is None:
            if packet.kind not in (Kind.RST, Kind.INVALID):
                self._send(key, Kind.RST)
        elif connection.stream is not None:
            if connection.attach_ordering is not None:
                connection.attach_ordering.release()
            connection.stream.receive(packet.kind, packet.value)
        else:
            assert connection.handshake is not None
            self._apply(connection, connection.handshake.receive(packet))
        return _DONE

    def send_datagram(self, port: int, destination: tuple[int, int], payload: bytes) -> int:
        """Implement :class:`.hypervisor.Sockets`."""
        if self._capture.recorders:
            self._record_datagram((self._hypervisor.cid, port), destination, payload)
        try:
            self._fabric.send(port, destination, payload)
        except OSError as error:
            return _CODES.get(error.errno or 0, Code.INVALID_ARGS)
        return HEADER.size + len(payload)

    def expects(self, handle: Handle, sizes: tuple[int, int]) -> bool:
        """Implement :class:`.hypervisor.Sockets`."""
        size = self._expected_sizes.get(handle)
        return size is not None and sizes == (size, size)

    def on_detach(self, queue_pair: QueuePair) -> None:
        """Implement :class:`.hypervisor.Sockets`."""
        connection = self._by_handle.pop(queue_pair.handle, None)
        if connection is not None and connection.stream is not None:
            stream = connection.stream
            self._forget(connection)
            stream.on_detach()
            if self._capture.recorders:
                self._record(Operation.DISCONNECT, connection.key, from_guest=True)
            if stream.held_bytes:
                self._unsent.add(stream)
                if sum(one.held_bytes for one in self._unsent) > VMCI_UNSENT_MAX_BYTES:
                    stream.abort()

    def _on_datagram(self, source: tuple[int, int], port: int, payload: bytes) -> bool:
        """Deliver a datagram to the guest; return whether the guest has room for another."""
        if self._capture.recorders:
            self._record_datagram(source, (self._hypervisor.cid, port), payload)
        datagram = Datagram(Handle(self._hypervisor.cid, port), Handle(*source), payload)
        self._hypervisor.device.deliver(datagram.encode())
        return self._hypervisor.device.has_room

    # Streams from the guest

    def _accept(self, key: _Key, packet: Packet) -> int | None:
        handshake = Accepting(packet, self._find)
        port, *peer = key
        if not handshake.possible or len(self._pending) >= VMCI_PENDING_STREAMS_MAX:
            self._send(key, Kind.RST)
            return _DONE
        sizes = BufferSizes(handshake.wanted, _SIZE_MIN, _SIZE_MAX)
        try:
            sock = self._fabric.connect(port, (peer[0], peer[1]), sizes)
        except OSError as failure:
            return self._refuse(key, failure.errno or errno.EIO)
        connection = _Connection(key, sock)
        connection.handshake = handshake
        self._register(connection)
        # Most replies arrive at once, and then the guest's connect() gets the actual error.
        if self._reply_timer is not None:  # the guest has not waited for its last request
            self._reply_timer.cancel()
        self._awaited = connection
        goes_on = self._hypervisor.device.may_finish_later
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if poll.poll(1000 * (VMCI_CONNECT_STOP_SECONDS if goes_on else VMCI_CONNECT_WAIT_SECONDS)):
            self._on_reply(connection)
            return None
        self._loop.watch(sock.fileno(), lambda events: self._on_reply(connection))
        if goes_on:  # other streams of the guest are served meanwhile
            self._reply_timer = self._loop.call_later(
                VMCI_CONNECT_WAIT_SECONDS, lambda: self._finish(connection, _DONE)
            )
        else:
            self._finish(connection, _DONE)
        return None

    def _finish(self, connection: _Connection, result: int) -> None:
        """Report the result of the guest's request, unless it was reported."""
        if self._awaited is not connection:
            return
        self._awaited = None
        if self._reply_timer is not None:
            self._reply_timer.cancel()
            self._reply_timer = None
        self._hypervisor.device.finish(result)

    def _refuse(self, key: _Key, error: int) -> int:
        if error in (errno.ECONNRESET, errno.EINVAL, errno.EADDRINUSE):
            self._send(key, Kind.RST)
            return _DONE
        return _CODES.get(error, Code.UNAVAILABLE)

    def _on_reply(self, connection: _Connection) -> None:
        """Continue a handshake when vsockd has replied."""
        self._loop.unwatch(connection.sock.fileno())
        assert isinstance(connection.handshake, Accepting)
        size, error = self._read_reply(connection.sock)
        if error and self._awaited is connection and self._hypervisor.device.is_unfinished:
            self._fail(connection, error)
            self._finish(connection, self._refuse(connection.key, error))
        elif error:  # the guest does not wait any longer
            self._apply(connection, connection.handshake.refused(error))
        else:
            self._finish(connection, _DONE)
            self._apply(connection, connection.handshake.accepted(size))

    @staticmethod
    def _read_reply(sock: socket.socket) -> tuple[int, int]:
        """Read vsockd's reply; return the agreed buffer size and 0, or 0 and the errno."""
        try:
            data = sock.recv(RECORD_SIZE)
        except OSError:
            data = b""
        if not data:  # vsockd ended before it replied
            return 0, errno.ECONNRESET
        try:
            return decode_reply(data).size, 0
        except OSError as error:
            return 0, error.errno or errno.EIO

    # Streams to the guest

    def connect_to_guest(self, request: ConnectRequest) -> None:
        """Start the handshake of a client's connect to the guest."""
        key = request.port, *request.peer
        if key in self._connections or len(self._pending) >= VMCI_PENDING_STREAMS_MAX:
            self._fabric.settle(request, error=errno.ECONNRESET)
            return
        handle = Handle(request.peer[0], next(self._resources) & 0xFFFF_FFFF)
        connection = _Connection(key, request.sock)
        connection.request = request
        connection.handshake = Connecting(
            _proposed_sizes(request), handle, self._find, self._protocol_v1
        )
        self._register(connection)
        # A client that gives up closes the socket.  Only its padding can arrive before the reply.
        self._loop.watch_for(
            request.sock.fileno(), lambda events: self._on_client_closed(connection), 0
        )
        self._apply(connection, connection.handshake.begin())

    def _on_client_closed(self, connection: _Connection) -> None:
        self._send(connection.key, Kind.RST)
        self._fail(connection, errno.ECONNRESET)

    # Both directions

    def _register(self, connection: _Connection) -> None:
        self._connections[connection.key] = connection
        self._pending.add(connection)
        self._restart_timer(connection)

    def _restart_timer(self, connection: _Connection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
        connection.timer = self._loop.call_later(
            VMCI_HANDSHAKE_TIMEOUT_SECONDS, lambda: self._timed_out(connection)
        )

    def _timed_out(self, connection: _Connection) -> None:
        self._send(connection.key, Kind.RST)
        self._fail(connection, errno.ETIMEDOUT)

    def _apply(self, connection: _Connection, step: Step) -> None:
        """Send the packets of a handshake's step; after the last, establish or fail the stream."""
        handshake = connection.handshake
        assert handshake is not None
        if isinstance(handshake, Connecting) and handshake.size:
            self._expected_sizes[handshake.handle] = handshake.size
        if step.error:
            for kind, value, protocol in step.packets:
                self._send(connection.key, kind, value, protocol=protocol)
            self._fail(connection, step.error)
            return
        for kind, value, protocol in step.packets:
            self._send(connection.key, kind, value, protocol=protocol)
        if step.handle is None:
            connection.sent_at = self._loop.time()
            self._restart_timer(connection)
        else:
            self._establish(connection, step.handle, handshake.size, handshake.protocol_v1)

    def _establish(
        self, connection: _Connection, handle: Handle, size: int, protocol_v1: bool
    ) -> None:
        key, sock = connection.key, connection.sock
        queue_pair = self._hypervisor.queue_pair(handle)
        assert queue_pair is not None  # the handshake has checked that it exists
        self._stop_timer(connection)
        self._pending.discard(connection)
        connection.handshake = None
        self._by_handle[handle] = connection
        if size != STREAM_BUFFER_DEFAULT_BYTES:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, min(size, SEND_BUFFER_MAX_BYTES))
        if connection.request is not None:
            self._fabric.settle(connection.request, size=_reported_size(connection.request, size))

        def send(kind: Kind, value: int, offset: int) -> None:
            self._send(key, kind, value, offset)

        if connection.request is None:
            connection.attach_ordering = AttachOrdering(
                self._loop, send, self._loop.time() - connection.sent_at
            )
            send = connection.attach_ordering.send

        def finished() -> None:
            self._unsent.discard(stream)
            self._fabric.byte_reports.remove((key[0], key[1:]))

        def hung_up() -> None:
            # The event overtakes packets, and a guest that has not handled the device's ATTACH
            # treats the event as a reset.  So the event waits until the guest has sent a packet,
            # which shows that the ATTACH was handled, or has given up.
            if connection.request is not None or stream.was_used:
                self._hypervisor.notify_detached(queue_pair)
            else:
                self._loop.call_later(
                    VMCI_HANDSHAKE_TIMEOUT_SECONDS,
                    lambda: self._hypervisor.notify_detached(queue_pair),
                )

        stream = connection.stream = Stream(
            self._loop,
            sock,
            queue_pair,
            send,
            protocol_v1,
            hung_up=hung_up,
            finished=finished,
            capture=self._capture,
            guest=(self._hypervisor.cid, key[0]),
            peer=key[1:],
        )
        self._fabric.byte_reports.add((key[0], key[1:]), lambda: stream.moved)
        stream.start()

    def _fail(self, connection: _Connection, error: int) -> None:
        self._stop_timer(connection)
        self._forget(connection)
        if connection.request is not None:
            self._fabric.settle(connection.request, error=error)
        connection.sock.close()

    def _stop_timer(self, connection: _Connection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None
        self._loop.unwatch(connection.sock.fileno())
        if isinstance(connection.handshake, Connecting):
            self._expected_sizes.pop(connection.handshake.handle, None)

    def _drop(self, connection: _Connection) -> None:
        """Abort a stream, or fail its pending handshake."""
        if connection.stream is None:
            self._fail(connection, errno.ECONNRESET)
        else:
            self._forget(connection)
            connection.stream.abort()

    def _on_guest_closed(self, connection: _Connection) -> None:
        """End a stream that the guest's kernel has closed.

        The guest detaches the queue pair later.
        """
        if connection.stream is None:
            self._fail(connection, errno.ECONNRESET)
        else:
            self._forget(connection)
            connection.stream.receive(Kind.RST, 0)

    def _forget(self, connection: _Connection) -> None:
        if connection.attach_ordering is not None:
            connection.attach_ordering.discard()
        self._pending.discard(connection)
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]

    def close_all(self) -> None:
        """Close every stream after vsockd has closed the link."""
        for connection in list(self._connections.values()):
            if connection.stream is None:
                self._send(connection.key, Kind.RST)
            self._drop(connection)

    def reset(self) -> None:
        """Close every stream: the guest restarts, and its queue pairs were detached."""
        for connection in list(self._connections.values()):
            self._drop(connection)

    def _find(self, handle: Handle, size: int) -> bool:
        queue_pair = self._hypervisor.queue_pair(handle)
        return (
            queue_pair is not None
            and handle not in self._by_handle
            and queue_pair.sizes == (size, size)
        )

    def _send(
        self, key: _Key, kind: Kind, value: int = 0, offset: int = 0, protocol: int = 0
    ) -> None:
        port, peer, peer_port = key
        if self._capture.recorders:
            self._record(operation_of(kind), key, from_guest=False)
        packet = Packet(kind, peer_port, port, value, offset, protocol)
        resource = packets.RESOURCE
        if peer == VMADDR_CID_HYPERVISOR:
            resource = packets.HYPERVISOR_RESOURCE
        datagram = packet.encode_datagram(self._own_handle, Handle(peer, resource))
        self._hypervisor.device.deliver(datagram)

    def _record(self, operation: Operation, key: _Key, from_guest: bool) -> None:
        """Send a capture record of a packet without payload."""
        guest, peer = (self._hypervisor.cid, key[0]), key[1:]
        ends = (guest, peer) if from_guest else (peer, guest)
        self._capture.record(operation, *ends)

    def _record_datagram(
        self, source: tuple[int, int], destination: tuple[int, int], payload: bytes
    ) -> None:
        view = (memoryview(payload),)
        self._capture.record(Operation.PAYLOAD, source, destination, view, len(payload))
