"""The virtio-vsock device: its queues, its connections, and their sockets on the host."""

from __future__ import annotations

import errno
import logging
import os
import select
import socket
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

from ..byte_reports import ByteReports
from ..capture import CaptureSink
from ..guest_memory import GuestMemory
from ..limits import (
    VIRTIO_BUFFER_BYTES,
    VIRTIO_CLOSE_TIMEOUT_SECONDS,
    VIRTIO_CONNECT_TIMEOUT_SECONDS,
    VIRTIO_CONNECTIONS_MAX,
    VIRTIO_CREDIT_RETRY_SECONDS,
    VIRTIO_LARGE_BUFFERS_MAX,
    VIRTIO_SMALL_BUFFER_BYTES,
    VIRTIO_WAITING_RESETS_MAX,
)
from ..loop import DeviceLoop
from ..vhost_user import Vring
from .connection import SOCKET_TYPES, VSOCK_TYPES, Action, ConnectionState, VirtioConnection
from .packed_ring import PackedRing
from .packet import CONFIGURATION, F_SEQPACKET, F_STREAM, TRANSPORT_RESET, Header, Op, Type
from .ring import (
    F_IN_ORDER,
    F_RING_EVENT_IDX,
    F_RING_INDIRECT_DESC,
    F_RING_PACKED,
    F_VERSION_1,
    Ring,
    RingError,
    SplitRing,
)
from .rx import ReceiveQueue
from .tx import TransmitQueue, TxPoll

log = logging.getLogger(__name__)

RECEIVE, TRANSMIT, EVENT = range(3)

_ESTABLISHED, _CLOSING, _CLOSED = (
    ConnectionState.ESTABLISHED,
    ConnectionState.CLOSING,
    ConnectionState.CLOSED,
)
#: Events of an eventfd that is never read: edge-triggered, so each write is reported.
_EACH_KICK = select.EPOLLIN | select.EPOLLET
_READING = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
_WRITING = _READING | select.EPOLLOUT
_READABLE = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_READ_CLOSED = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR
_PEER_CLOSED = select.EPOLLHUP | select.EPOLLERR


class Fabric(Protocol):
    """Interface to the fabric, which connects the guest to peers."""

    def connect(
        self,
        kind: int,
        port: int,
        peer: tuple[int, int],
        done: Callable[[socket.socket | None], None],
    ) -> Callable[[], None]:
        """Connect a socket of type ``kind`` from the guest's ``port`` to ``peer`` (CID, port).

        ``done`` is called with the established socket, or with None if the connect fails.  Return a
        function that abandons the attempt; after its call ``done`` is not called.
        """


class VirtioVsock:
    """The virtio-vsock device of the guest ``cid``; see :class:`.vhost_user.session.Device`."""

    features = F_STREAM | F_SEQPACKET | F_VERSION_1 | F_IN_ORDER
    features |= F_RING_INDIRECT_DESC | F_RING_EVENT_IDX | F_RING_PACKED
    queues = 3

    def __init__(self, loop: DeviceLoop, cid: int, fabric: Fabric) -> None:
        self.cid = cid
        self.memory = GuestMemory()
        self.connections: dict[tuple[int, int, int], VirtioConnection] = {}
        self._loop = loop
        self._fabric = fabric
        self.capture = CaptureSink(loop)
        self.byte_reports = ByteReports(loop, cid, lambda message: None)
        self._in_use = 0
        self._vrings: dict[int, Vring] = {}
        self._bases: dict[int, int] = {}  # positions of stopped rings
        self._receive: ReceiveQueue | None = None
        self._is_paused = False  #: the guest has stopped its receive ring: it may continue
        self._transmit: TxPoll | None = None
        self._events: Ring | None = None
        #: connections that have packets for the guest, in the order of their turns
        self._ready_connections: deque[VirtioConnection] = deque()
        self.resets: deque[bytes] = deque()  #: encoded RSTs without a connection
        self._replies: dict[VirtioConnection, Callable[[int], None]] = {}
        self._attempts: dict[VirtioConnection, Callable[[], None]] = {}
        self._busy = False
        self._marker = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        self._poll_event = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        loop.watch_for(self._poll_event, self.poll, _EACH_KICK)

    def close(self) -> None:
        """Close all connections and descriptors; the caller has stopped the rings."""
        self._discard_connections()
        self._loop.unwatch(self._poll_event)
        os.close(self._poll_event)
        os.close(self._marker)

    # vhost-user

    def configuration(self) -> bytes:
        """Return the encoded configuration space: the guest's CID."""
        return CONFIGURATION.pack(self.cid)

    def set_features(self, features: int) -> None:
        """Implement :class:`.session.Device`."""
        self._in_use = features

    def start_ring(self, index: int, vring: Vring, addresses: tuple[int, int, int]) -> None:
        """Implement :class:`.session.Device`."""
        if self._bases.pop(index, vring.base) != vring.base:
            log.info("the guest has restarted")
            self._discard_connections()
        kind = PackedRing if self._in_use & F_RING_PACKED else SplitRing
        event_index = bool(self._in_use & F_RING_EVENT_IDX)
        try:
            ring: Ring = kind(self.memory, vring.size, addresses, vring.base, event_index)
        except RingError as error:
            raise OSError(errno.EINVAL, f"ring {index}: {error}") from None
        self._vrings[index] = vring
        assert vring.kick is not None
        self._loop.watch_for(vring.kick, self.poll, _EACH_KICK)
        if index == RECEIVE:
            self._is_paused = False
            self._receive = ReceiveQueue(ring, self.cid, self.capture)
        elif index == TRANSMIT:
            queue = TransmitQueue(ring, self.cid, self, self.capture)
            self._transmit = TxPoll(self._loop, queue, vring, self.poll)
        else:
            self._events = ring
        # Buffers that the driver added before the device watched are announced by no kick.
        self._schedule_poll()

    def stop_ring(self, index: int) -> int:
        """Implement :class:`.session.Device`."""
        vring = self._vrings.pop(index, None)
        if vring is None:  # it was disabled
            return self._bases[index]
        assert vring.kick is not None
        self._loop.unwatch(vring.kick)
        if index == RECEIVE:
            assert self._receive is not None
            base = self._receive.stop()
            self._receive = None
            self._is_paused = True
        elif index == TRANSMIT:
            assert self._transmit is not None
            base = self._transmit.stop()
            self._transmit = None
        else:
            assert self._events is not None
            base = self._events.base
            self._events = None
        self._bases[index] = base
        return base

    def reset(self) -> None:
        """Implement :class:`.session.Device`."""
        self._discard_connections()
        self._bases.clear()
        self._is_paused = False

    # The host

    def connect_to_guest(
        self,
        sock: socket.socket,
        peer: tuple[int, int],
        port: int,
        reply: Callable[[int], None],
    ) -> None:
        """Connect ``sock`` to the guest's ``port``; take ownership of ``sock``.

        ``peer`` is the client's CID and port.  ``reply`` is called with 0 when the guest accepts,
        else with the errno for the client, after which ``sock`` is closed.  While the guest is
        paused, the connect waits for it to continue.
        """
        key = (*peer, port)
        is_off = self._receive is None and not self._is_paused
        if is_off or key in self.connections or len(self.connections) >= VIRTIO_CONNECTIONS_MAX:
            reply(errno.EHOSTUNREACH if is_off else errno.ECONNRESET)
            sock.close()
            return
        connection = VirtioConnection(
            ConnectionState.LOCAL_INIT, VSOCK_TYPES[int(sock.type)], peer, port, self._buffer_size()
        )
        connection.sock = sock
        self.connections[key] = connection
        self._replies[connection] = reply
        self._loop.call_later(
            VIRTIO_CONNECT_TIMEOUT_SECONDS,
            partial(self._time_out, connection, ConnectionState.LOCAL_INIT),
        )
        self.mark_dirty(connection)
        self._process()

    def reset_connections(self) -> None:
        """Reset all connections after a suspension or migration, which no connection survives."""
        if self._events is not None and self._send_transport_reset():
            self._discard_connections()
            return
        for connection in list(self.connections.values()):
            connection.reset()
            self._close_host_side(connection)
            self.mark_dirty(connection)
        self._process()

    # Queues

    @property
    def backpressured(self) -> bool:
        """Backpressure flag: true while too many resets wait for receive buffers of the guest."""
        return len(self.resets) >= VIRTIO_WAITING_RESETS_MAX

    def _schedule_poll(self) -> None:
        """Schedule another turn of the device after the callbacks of other ready descriptors."""
        os.eventfd_write(self._poll_event, 1)

    def poll(self, events: int = 0) -> None:
        """Run one turn: receive packets from the guest, then send pending packets to the guest."""
        self._process(self._transmit)

    def _process(self, transmit: TxPoll | None = None) -> None:
        """Receive packets from ``transmit``, if given, then send pending packets."""
        if self._busy:  # called from within a turn, which sends the packets later
            return
        self._busy = True
        try:
            if transmit is not None:
                index = TRANSMIT
                if transmit.run() and not self.backpressured:
                    self._schedule_poll()
            if self._ready_connections or self.resets:
                index = RECEIVE
                self._send_pending()
        except RingError as error:
            self._disable_ring(index, error)
        finally:
            self._busy = False

    def _send_pending(self) -> None:
        """Send pending packets of all connections as long as the guest provides buffers."""
        queue, ready = self._receive, self._ready_connections
        if queue is None:
            return
        was_backpressured = self.backpressured
        budget = 2 * len(ready) + len(self.resets) + 1
        while (ready or self.resets) and budget and queue.has_buffers():
            budget -= 1
            if self.resets:
                queue.send_raw(self.resets.popleft())
                continue
            connection = ready.popleft()
            connection.queued = False
            if queue.send(connection) and self._transmit is not None:
                self._transmit.coalescing.on_reply()
            if queue.publish():  # the guest handles these while the device fetches more
                self._vrings[RECEIVE].call()
            if connection.pending_tx and connection.send.is_full and not connection.credit_retry:
                connection.credit_retry = True
                self._loop.call_later(
                    VIRTIO_CREDIT_RETRY_SECONDS, partial(self._retry_credit, connection)
                )
            self.mark_dirty(connection)
            if connection.state is ConnectionState.CLOSING:
                self._loop.call_later(
                    VIRTIO_CLOSE_TIMEOUT_SECONDS,
                    partial(self._time_out, connection, ConnectionState.CLOSING),
                )
        if queue.publish():
            self._vrings[RECEIVE].call()
        queue.prefetch()
        is_unfinished = not budget and (ready or self.resets)
        if is_unfinished or (was_backpressured and not self.backpressured):
            self._schedule_poll()

    def _retry_credit(self, connection: VirtioConnection) -> None:
        """Request credit again for a connection that still waits for the guest to read.

        Linux sends a CREDIT_UPDATE when packets are read; other guests may delay it until half of
        the buffer was read.
        """
        connection.credit_retry = False
        if connection.state is _ESTABLISHED and connection.send.is_full:
            connection.send.retry()
            self.mark_dirty(connection)
            self._process()

    def _disable_ring(self, index: int, error: RingError) -> None:
        """Disable a ring whose rules the driver has violated; only its own guest is affected."""
        log.warning("context %d: ring %d disabled: %s", self.cid, index, error)
        vring = self._vrings[index]
        self.stop_ring(index)
        self._is_paused = False
        vring.report_error()
        self._discard_connections()

    def _send_transport_reset(self) -> bool:
        """Send TRANSPORT_RESET; return whether the guest needs no further reset.

        The result is False when the guest provides no event buffer.
        """
        ring, vring = self._events, self._vrings[EVENT]
        assert ring is not None
        try:
            chain = ring.pop()
            if chain is None:
                return False
            head, _, parts = chain
            if not parts or len(parts[0]) < len(TRANSPORT_RESET):
                raise RingError("buffer in the event queue without room for an event")
            parts[0][: len(TRANSPORT_RESET)] = TRANSPORT_RESET
            ring.push(head, len(TRANSPORT_RESET))
            if ring.publish():
                vring.call()
        except RingError as error:
            self._disable_ring(EVENT, error)
        return True

    # Packets of the guest, as TransmitQueue's receiver

    def receive(self, header: Header, connection: VirtioConnection | None) -> None:
        """Implement :class:`.tx.Receiver`."""
        if connection is None or connection.type != header.type or header.src_cid != self.cid:
            if header.op == Op.REQUEST and connection is None and header.src_cid == self.cid:
                self._request(header)
            elif header.op != Op.RST:
                self._refuse(header)
            return
        if header.op == Op.REQUEST and connection.state in (
            ConnectionState.CLOSING,
            ConnectionState.CLOSED,
        ):
            # The guest has dropped the old connection.  Drop it without RST, which would reset the
            # new connection of the same ports.
            connection.discard()
            self._close_host_side(connection)
            self._remove(connection)
            self._request(header)
            return
        action = connection.on_packet(header.op, header.flags)
        if action:
            self._perform(connection, action)
        self.mark_dirty(connection)

    def mark_dirty(self, connection: VirtioConnection) -> None:
        """Implement :class:`.tx.Receiver`."""
        state = connection.state
        if state is not _ESTABLISHED and (state is _CLOSED or state is _CLOSING):
            self._close_host_side(connection)
            if connection.is_finished:
                self._remove(connection)
                return
        elif connection.has_backlog != connection.watches_writable:
            # Watch for room only while payload waits: a socket nearly always has room.
            connection.watches_writable = connection.has_backlog
            assert connection.sock is not None
            events = _WRITING if connection.watches_writable else _READING
            self._loop.change(connection.sock.fileno(), events)
        if not connection.queued and connection.has_output:
            connection.queued = True
            self._ready_connections.append(connection)

    def _request(self, header: Header) -> None:
        kind = SOCKET_TYPES.get(header.type)  # type: ignore[call-overload]
        if kind is None or len(self.connections) >= VIRTIO_CONNECTIONS_MAX or header.dst_cid >> 32:
            self._refuse(header)
            return
        peer = (header.dst_cid, header.dst_port)
        connection = VirtioConnection(
            ConnectionState.PEER_INIT, Type(header.type), peer, header.src_port, self._buffer_size()
        )
        connection.send.update(header.buf_alloc, header.fwd_cnt)
        self.connections[(*peer, header.src_port)] = connection
        self._attempts[connection] = lambda: None
        cancel = self._fabric.connect(
            int(kind), header.src_port, peer, partial(self._connected, connection)
        )
        if connection in self._attempts:
            self._attempts[connection] = cancel
            self._loop.call_later(
                VIRTIO_CONNECT_TIMEOUT_SECONDS,
                partial(self._time_out, connection, ConnectionState.PEER_INIT),
            )

    def _connected(self, connection: VirtioConnection, sock: socket.socket | None) -> None:
        self._attempts.pop(connection, None)
        if sock is None:
            connection.refuse()
        else:
            connection.accept()
            self._attach(connection, sock)
        self.mark_dirty(connection)
        self._process()

    def _attach(self, connection: VirtioConnection, sock: socket.socket) -> None:
        connection.attach(sock, self._marker)
        connection.watched = True
        sample = partial(_moved, connection)
        self.byte_reports.add((connection.guest_port, connection.peer), sample)
        self._loop.watch_for(sock.fileno(), partial(self._on_ready, connection), _READING)

    def _refuse(self, header: Header) -> None:
        """Queue RST as the reply to a packet that belongs to no connection and is not RST."""
        reply = Header(
            header.dst_cid, header.src_cid, header.dst_port, header.src_port,
            type=header.type, op=Op.RST,
        )  # fmt: skip
        self.resets.append(reply.encode())

    def _perform(self, connection: VirtioConnection, action: Action) -> None:
        if action & Action.ACCEPT:
            reply = self._replies.pop(connection)
            assert connection.sock is not None
            self._attach(connection, connection.sock)
            reply(0)
        if action & Action.REFUSE:
            self._replies.pop(connection)(errno.ECONNRESET)
        if action & Action.SHUTDOWN_READ:
            connection.shut_down_reading()
        if action & Action.SHUTDOWN_WRITE or action & Action.SHUTDOWN_READ:
            connection.finish_if_drained()

    # Sockets of the host

    def _on_ready(self, connection: VirtioConnection, events: int) -> None:
        if events & _READABLE:
            connection.readable = True
            if events & _READ_CLOSED:
                connection.read_closed = True
                if events & _PEER_CLOSED:
                    connection.peer_closed = True
        if events & select.EPOLLOUT and connection.has_backlog:
            connection.flush()
        self.mark_dirty(connection)
        self._process()

    # Ends

    def _time_out(self, connection: VirtioConnection, state: ConnectionState) -> None:
        """Reset a connection that is still in ``state`` when its timeout has expired."""
        if (
            connection.state is state
            and self.connections.get((*connection.peer, connection.guest_port)) is connection
        ):
            connection.reset()
            self.mark_dirty(connection)
            self._process()

    def _close_host_side(self, connection: VirtioConnection) -> None:
        """Close the host's side of a connection: its socket, or the pending connect."""
        cancel = self._attempts.pop(connection, None)
        if cancel is not None:
            cancel()
        reply = self._replies.pop(connection, None)
        if reply is not None:
            reply(errno.ECONNRESET)
        if connection.sock is not None:
            if connection.watched:
                self._loop.unwatch(connection.sock.fileno())
                self.byte_reports.remove((connection.guest_port, connection.peer))
            connection.close()

    def _remove(self, connection: VirtioConnection) -> None:
        key = (*connection.peer, connection.guest_port)
        if self.connections.get(key) is connection:
            del self.connections[key]

    def _discard_connections(self) -> None:
        """Drop all connections without RST: the guest has dropped them, too."""
        for connection in list(self.connections.values()):
            connection.discard()
            self._close_host_side(connection)
        self.connections.clear()
        self._ready_connections.clear()
        self.resets.clear()

    def _buffer_size(self) -> int:
        full = len(self.connections) < VIRTIO_LARGE_BUFFERS_MAX
        return VIRTIO_BUFFER_BYTES if full else VIRTIO_SMALL_BUFFER_BYTES


def _moved(connection: VirtioConnection) -> tuple[int, int]:
    """Return the bytes that the guest has sent and received, modulo 2**32."""
    return connection.receive.forwarded, connection.send.sent
