"""The guest's sockets and those of the fabric, joined: every stream and datagram of one guest."""

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
from ...protocol import RECORD_SIZE, ProtocolError, Record
from ...protocol.vsockmon import Operation
from ..client import DeviceClient, Offer
from ..loop import DeviceLoop, Timer
from . import packets
from .attach_ordering import AfterAttach
from .capture import operation_of
from .datagrams import HEADER, Code, Datagram, Handle
from .handshake import Accepting, Connecting, Step
from .hypervisor import Hypervisor
from .limits import (
    VMCI_CONNECT_WAIT_SECONDS,
    VMCI_HANDSHAKE_TIMEOUT_SECONDS,
    VMCI_PENDING_STREAMS_MAX,
    VMCI_QUEUE_PAIR_MAX_BYTES,
    VMCI_UNSENT_MAX_BYTES,
)
from .packets import Kind, Packet
from .queue_pair import QueuePair
from .stream import Stream

log = logging.getLogger(__name__)

#: What a guest that connects leaves open: it will itself see whether the answer suits it.
_SMALLEST, _LARGEST = 1, VMCI_QUEUE_PAIR_MAX_BYTES

_CODES = {
    errno.EHOSTUNREACH: Code.INVALID_RESOURCE,
    errno.ENETDOWN: Code.INVALID_RESOURCE,
    errno.ECONNREFUSED: Code.INVALID_RESOURCE,
    errno.EACCES: Code.NO_ACCESS,
    errno.ENOBUFS: Code.NO_RESOURCES,
    errno.EMFILE: Code.NO_RESOURCES,
    errno.EADDRINUSE: Code.ALREADY_EXISTS,
}

#: A stream, as its packets name it: the guest's port, the peer's context and port.
_Key = tuple[int, int, int]

_DONE = HEADER.size + packets.SIZE
_REQUESTS = (Kind.REQUEST, Kind.REQUEST2)


class _Connection:
    """A stream, from its first packet on."""

    handshake: Accepting | Connecting | None
    stream: Stream | None = None
    timer: Timer | None = None
    offer: Offer | None = None  # of one that somebody made to the guest
    after_attach: AfterAttach | None = None  # of one that the guest made

    def __init__(self, key: _Key, sock: socket.socket) -> None:
        self.key = key
        self.sock = sock


def _proposal(offer: Offer) -> BufferSizes:
    """What the guest is asked for.  Where nobody chose a size it is the largest by default, as
    Linux's own: with 64 KiB a guest sleeps, and is woken, four times as often.
    """
    if offer.sizes.size != STREAM_BUFFER_DEFAULT_BYTES:
        return offer.sizes
    return offer.sizes.with_size(STREAM_BUFFER_MAX_BYTES)


def _as_told(offer: Offer, size: int) -> int:
    """What the program hears of it: the default it has is the default it keeps."""
    return offer.sizes.size if size == _proposal(offer).size else size


class VmciSockets:
    """vSockets of the guest that ``hypervisor`` serves."""

    def __init__(
        self,
        loop: DeviceLoop,
        hypervisor: Hypervisor,
        fabric: DeviceClient,
        older: bool = False,
    ) -> None:
        """With ``older`` the first version of the handshake is used, also by the guest."""
        self._loop = loop
        self._hypervisor = hypervisor
        self._fabric = fabric
        self._older = older
        self._tap = fabric.tap
        self._connections: dict[_Key, _Connection] = {}
        self._by_handle: dict[Handle, _Connection] = {}
        self._offered: dict[Handle, int] = {}  # and the size agreed on
        self._names = count(1)
        self._unsent: set[Stream] = set()
        fabric.offered = self.connect_to_guest
        fabric.received = self._deliver
        fabric.lost = self.end_all

    # What the guest sends

    def receive(self, peer: int, packet: Packet) -> int:
        """As :class:`.hypervisor.Sockets` says."""
        key = packet.source_port, peer, packet.destination_port
        if self._tap.sinks:
            self._record(operation_of(packet.kind), key, from_guest=True)
        connection = self._connections.get(key)
        if packet.kind in _REQUESTS:
            if self._older and packet.kind == Kind.REQUEST2:
                self._send(key, Kind.INVALID)
                return _DONE
            if connection is not None:
                self._is_over(connection)
            return self._accept(key, packet)
        if connection is None:
            if packet.kind not in (Kind.RST, Kind.INVALID):
                self._send(key, Kind.RST)
        elif connection.stream is not None:
            if connection.after_attach is not None:
                connection.after_attach.release()
            connection.stream.receive(packet.kind, packet.value)
        else:
            assert connection.handshake is not None
            self._follow(connection, connection.handshake.receive(packet))
        return _DONE

    def send_datagram(self, port: int, destination: tuple[int, int], payload: bytes) -> int:
        """As :class:`.hypervisor.Sockets` says."""
        if self._tap.sinks:
            self._record_datagram((self._hypervisor.cid, port), destination, payload)
        try:
            self._fabric.send(port, destination, payload)
        except OSError as error:
            return _CODES.get(error.errno or 0, Code.INVALID_ARGS)
        return HEADER.size + len(payload)

    def expects(self, handle: Handle, sizes: tuple[int, int]) -> bool:
        """As :class:`.hypervisor.Sockets` says."""
        size = self._offered.get(handle)
        return size is not None and sizes == (size, size)

    def detached(self, queue_pair: QueuePair) -> None:
        """As :class:`.hypervisor.Sockets` says."""
        connection = self._by_handle.pop(queue_pair.handle, None)
        if connection is not None and connection.stream is not None:
            stream = connection.stream
            self._forget(connection)
            stream.detached()
            if self._tap.sinks:
                self._record(Operation.DISCONNECT, connection.key, from_guest=True)
            if stream.left:
                self._unsent.add(stream)
            if sum(one.left for one in self._unsent) > VMCI_UNSENT_MAX_BYTES:
                stream.abort()

    def _deliver(self, source: tuple[int, int], port: int, payload: bytes) -> bool:
        """A datagram for the guest; returns whether there is room for another."""
        if self._tap.sinks:
            self._record_datagram(source, (self._hypervisor.cid, port), payload)
        datagram = Datagram(Handle(self._hypervisor.cid, port), Handle(*source), payload)
        self._hypervisor.device.deliver(datagram.encode())
        return self._hypervisor.device.has_room

    # Streams that the guest begins

    def _accept(self, key: _Key, packet: Packet) -> int:
        handshake = Accepting(packet, self._find)
        port, *peer = key
        if not handshake.possible or self._pending() >= VMCI_PENDING_STREAMS_MAX:
            self._send(key, Kind.RST)
            return _DONE
        sizes = BufferSizes(handshake.wanted, _SMALLEST, _LARGEST)
        try:
            sock = self._fabric.connect(port, (peer[0], peer[1]), sizes)
        except OSError as error:
            return self._refuse(key, error.errno or errno.EIO)
        connection = _Connection(key, sock)
        connection.handshake = handshake
        # Most answers are there at once, and then the guest's connect() can say why it failed.
        poll = select.poll()
        poll.register(sock, select.POLLIN)
        if poll.poll(1000 * VMCI_CONNECT_WAIT_SECONDS):
            record = self._read_answer(sock)
            if record.status:
                sock.close()
                return self._refuse(key, record.status)
            self._begin(connection)
            self._follow(connection, handshake.accepted(record.size))
        else:
            self._begin(connection)
            self._loop.watch(sock.fileno(), lambda events: self._answered(connection))
        return _DONE

    def _refuse(self, key: _Key, error: int) -> int:
        if error in (errno.ECONNRESET, errno.EINVAL, errno.EADDRINUSE):
            self._send(key, Kind.RST)
            return _DONE
        return _CODES.get(error, Code.UNAVAILABLE)

    def _answered(self, connection: _Connection) -> None:
        """The fabric's answer has come, later than usual."""
        self._loop.unwatch(connection.sock.fileno())
        assert isinstance(connection.handshake, Accepting)
        record = self._read_answer(connection.sock)
        if record.status:
            self._follow(connection, connection.handshake.refused(record.status))
        else:
            self._follow(connection, connection.handshake.accepted(record.size))

    @staticmethod
    def _read_answer(sock: socket.socket) -> Record:
        try:
            return Record.decode(sock.recv(RECORD_SIZE))
        except (OSError, ProtocolError):
            return Record(errno.ECONNRESET)

    # Streams to the guest

    def connect_to_guest(self, offer: Offer) -> None:
        """Somebody connects to a port of the guest."""
        key = offer.port, *offer.peer
        if key in self._connections or self._pending() >= VMCI_PENDING_STREAMS_MAX:
            self._fabric.settle(offer, error=errno.ECONNRESET)
            return
        handle = Handle(offer.peer[0], next(self._names) & 0xFFFF_FFFF)
        connection = _Connection(key, offer.sock)
        connection.offer = offer
        connection.handshake = Connecting(_proposal(offer), handle, self._find, self._older)
        self._begin(connection)
        # Who gives up hangs up.  Nothing but its padding can come before it is answered.
        self._loop.watch_for(offer.sock.fileno(), lambda events: self._gave_up(connection), 0)
        self._follow(connection, connection.handshake.begin())

    def _gave_up(self, connection: _Connection) -> None:
        self._send(connection.key, Kind.RST)
        self._fail(connection, errno.ECONNRESET)

    # Both

    def _begin(self, connection: _Connection) -> None:
        self._connections[connection.key] = connection
        self._wait(connection)

    def _wait(self, connection: _Connection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
        connection.timer = self._loop.call_later(
            VMCI_HANDSHAKE_TIMEOUT_SECONDS, lambda: self._timed_out(connection)
        )

    def _timed_out(self, connection: _Connection) -> None:
        self._send(connection.key, Kind.RST)
        self._fail(connection, errno.ETIMEDOUT)

    def _follow(self, connection: _Connection, step: Step) -> None:
        """Do what the handshake says."""
        handshake = connection.handshake
        assert handshake is not None
        if isinstance(handshake, Connecting) and handshake.size:
            self._offered[handshake.handle] = handshake.size
        if step.error:
            for kind, value, protocol in step.packets:
                self._send(connection.key, kind, value, protocol=protocol)
            self._fail(connection, step.error)
            return
        for kind, value, protocol in step.packets:
            self._send(connection.key, kind, value, protocol=protocol)
        if step.handle is None:
            self._wait(connection)
        else:
            self._establish(connection, step.handle, handshake.size, handshake.older)

    def _establish(self, connection: _Connection, handle: Handle, size: int, older: bool) -> None:
        key, sock = connection.key, connection.sock
        queue_pair = self._hypervisor.queue_pair(handle)
        assert queue_pair is not None  # the handshake has found it
        self._stop_waiting(connection)
        connection.handshake = None
        self._by_handle[handle] = connection
        if size != STREAM_BUFFER_DEFAULT_BYTES:
            sock.setsockopt(SOL_SOCKET, SO_SNDBUF, min(size, SEND_BUFFER_MAX_BYTES))
        if connection.offer is not None:
            self._fabric.settle(connection.offer, size=_as_told(connection.offer, size))

        def send(kind: Kind, value: int, offset: int) -> None:
            self._send(key, kind, value, offset)

        if connection.offer is None:
            connection.after_attach = AfterAttach(self._loop, send)
            send = connection.after_attach.send

        def finished() -> None:
            self._unsent.discard(stream)

        def hung_up() -> None:
            # The event overtakes packets: a guest that has not yet seen our ATTACH takes it for
            # a reset.  Once it has said something it has; or it has given up.
            if connection.offer is not None or stream.was_used:
                self._hypervisor.tell_detached(queue_pair)
            else:
                self._loop.call_later(
                    VMCI_HANDSHAKE_TIMEOUT_SECONDS,
                    lambda: self._hypervisor.tell_detached(queue_pair),
                )

        stream = connection.stream = Stream(
            self._loop,
            sock,
            queue_pair,
            send,
            older,
            hung_up=hung_up,
            finished=finished,
            tap=self._tap,
            guest=(self._hypervisor.cid, key[0]),
            peer=key[1:],
        )
        stream.begin()

    def _fail(self, connection: _Connection, error: int) -> None:
        self._stop_waiting(connection)
        self._forget(connection)
        if connection.offer is not None:
            self._fabric.settle(connection.offer, error=error)
        connection.sock.close()

    def _stop_waiting(self, connection: _Connection) -> None:
        if connection.timer is not None:
            connection.timer.cancel()
            connection.timer = None
        self._loop.unwatch(connection.sock.fileno())
        if isinstance(connection.handshake, Connecting):
            self._offered.pop(connection.handshake.handle, None)

    def _drop(self, connection: _Connection) -> None:
        """The guest does not know this stream any more."""
        if connection.stream is None:
            self._fail(connection, errno.ECONNRESET)
        else:
            self._forget(connection)
            connection.stream.abort()

    def _is_over(self, connection: _Connection) -> None:
        """The guest's kernel has closed this stream, and will detach its queue pair in its time."""
        if connection.stream is None:
            self._fail(connection, errno.ECONNRESET)
        else:
            self._forget(connection)
            connection.stream.receive(Kind.RST, 0)

    def _forget(self, connection: _Connection) -> None:
        if connection.after_attach is not None:
            connection.after_attach.forget()
        if self._connections.get(connection.key) is connection:
            del self._connections[connection.key]

    def end_all(self) -> None:
        """The fabric has gone: every stream ends."""
        for connection in list(self._connections.values()):
            if connection.stream is None:
                self._send(connection.key, Kind.RST)
            self._drop(connection)

    def reset(self) -> None:
        """The guest starts anew.  Its streams' queue pairs were detached before."""
        for connection in list(self._connections.values()):
            self._drop(connection)

    def _pending(self) -> int:
        return sum(connection.stream is None for connection in self._connections.values())

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
        if self._tap.sinks:
            self._record(operation_of(kind), key, from_guest=False)
        packet = Packet(kind, peer_port, port, value, offset, protocol)
        resource = packets.RESOURCE
        if peer == VMADDR_CID_HYPERVISOR:
            resource = packets.HYPERVISOR_RESOURCE
        destination = Handle(self._hypervisor.cid, packets.RESOURCE)
        datagram = Datagram(destination, Handle(peer, resource), packet.encode())
        self._hypervisor.device.deliver(datagram.encode())

    def _record(self, operation: Operation, key: _Key, from_guest: bool) -> None:
        """Tell who captures of something that is no payload."""
        guest, peer = (self._hypervisor.cid, key[0]), key[1:]
        ends = (guest, peer) if from_guest else (peer, guest)
        self._tap.record(operation, *ends)

    def _record_datagram(
        self, source: tuple[int, int], destination: tuple[int, int], payload: bytes
    ) -> None:
        view = (memoryview(payload),)
        self._tap.record(Operation.PAYLOAD, source, destination, view, len(payload))
