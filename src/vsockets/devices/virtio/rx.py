"""The guest's receive queue: packets to the guest, in the buffers that the guest provides.

One system call moves a stream's bytes from the host's socket into as many of the guest's buffers
as its credit allows; then each buffer gets its header.
"""

from __future__ import annotations

import select
import socket
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import islice
from socket import MSG_CTRUNC, MSG_DONTWAIT, MSG_PEEK, MSG_TRUNC

from ..capture import CaptureSink
from ..guest_memory import pull
from ..limits import IO_VECTORS_MAX, VIRTIO_MERGED_PACKET_MAX_BYTES
from .connection import BOTH, VirtioConnection
from .packet import HEADER, HEADER_SIZE, Op, Sequenced, Shutdown, Type, record
from .ring import Buffer, Ring

_RW, _STREAM = int(Op.RW), int(Type.STREAM)
_SHUT_SEND = int(Shutdown.SEND)
_END_OF_MESSAGE, _END_OF_RECORD = int(Sequenced.END_OF_MESSAGE), int(Sequenced.END_OF_RECORD)
_PEEK_FLAGS = int(MSG_PEEK | MSG_TRUNC | MSG_DONTWAIT)
_RECEIVE_FLAGS = int(MSG_DONTWAIT)

#: Numbers of guest buffers that one connection fills in one turn: at least, after it has used all
#: credit, and at most.  A guest that has waited for data gets the first of it soon, and handles it
#: while the device copies the rest with one more system call.
_SMALLEST_BURST, _FIRST_BURST, _LARGEST_BURST = 2, 16, 64

#: Messages of a sequenced-packet connection that are sent in one turn.
_MESSAGES_PER_TURN = 16


class ReceiveQueue:
    """Sender of packets to the guest ``cid``."""

    def __init__(self, ring: Ring, cid: int, capture: CaptureSink) -> None:
        self._ring = ring
        self._cid = cid
        self._capture = capture
        self._buffers: deque[Buffer] = deque()  # parsed buffers that hold no packet yet

    def stop(self) -> int:
        """Drop all views of guest memory; return the ring's base (:attr:`.Vring.base`)."""
        self._ring.rewind()
        self._buffers.clear()
        self._ring.publish()
        return self._ring.base

    def publish(self) -> bool:
        """Make sent packets visible to the guest; return whether the guest must be notified."""
        return self._ring.publish()

    def prefetch(self) -> None:
        """Parse the guest's next buffers in advance."""
        self._fetch(_SMALLEST_BURST)

    def has_buffers(self) -> bool:
        """Return whether a guest buffer is available; if not, request a kick for the next."""
        return bool(self._fetch(1) or (self._ring.enable_notification() and self._fetch(1)))

    def send_raw(self, header: bytes) -> None:
        """Send the encoded ``header`` as a packet without payload.

        The caller has checked that a buffer is available.
        """
        head, header_view, parts, _ = self._buffers.popleft()
        if header_view is not None:
            header_view[:HEADER_SIZE] = header
        else:
            _scatter(header, parts)
        self._ring.push(head, HEADER_SIZE)
        if self._capture.recorders:
            record(self._capture, header)

    def send(self, connection: VirtioConnection) -> bool:
        """Send packets of ``connection`` for one turn; return whether they included payload."""
        while connection.pending_tx:
            if not self._fetch(1):
                return False
            packet = connection.next_packet()
            assert packet is not None
            op, flags = packet
            self.send_raw(self._header(connection, 0, op, flags))
        if not connection.can_send:
            if connection.readable and connection.peer_closed:
                connection.readable = False
                connection.shut_down(BOTH)
            return False
        if connection.type == _STREAM:
            return connection.readable and self._send_stream(connection)
        return self._send_messages(connection)

    def _header(self, connection: VirtioConnection, length: int, op: int, flags: int) -> bytes:
        receive = connection.receive
        return HEADER.pack(
            connection.peer[0], self._cid, connection.peer[1], connection.guest_port,
            length, connection.type, op, flags, receive.size, receive.announce(),
        )  # fmt: skip

    def _fetch(self, wanted: int) -> int:
        """Parse buffers until ``wanted`` are available; return the number of available buffers."""
        buffers = self._buffers
        missing = wanted - len(buffers)
        if missing > 0:
            buffers += self._ring.pop_buffers(missing, HEADER_SIZE)
        return len(buffers)

    # Payload

    def _send_stream(self, connection: VirtioConnection) -> bool:  # noqa: C901 - hot loop
        credit = connection.send.available()
        sock = connection.sock
        if sock is None or not credit or not self._fetch(connection.burst):
            return False
        buffers: Iterable[Buffer] = islice(self._buffers, connection.burst)
        small = False
        if connection.send.is_half_full:
            most = self._packet_size(connection)
            if not most:
                return False
            small = most == VIRTIO_MERGED_PACKET_MAX_BYTES
            if small:
                buffers = _cap_buffers(buffers, most)
        views: list[memoryview] = []
        room = 0
        for _, header, parts, size in buffers:
            if len(views) + len(parts) > IO_VECTORS_MAX:
                break
            views += parts if header is not None else _skip_header(parts)
            room += size
            if room >= credit:
                break
        if room > credit:
            _trim(views, room - credit)
            room = credit
        if not room:  # buffers with room for headers only
            self._return_unused()
            return False
        received = pull(sock, views)
        if received is None:
            connection.readable = False
            return False
        if received == 0:
            connection.readable = False
            connection.shut_down(BOTH if connection.peer_closed else _SHUT_SEND)
            return False
        used = (
            self._write_merged_headers(connection, received)
            if small
            else self._write_headers(connection, received)
        )
        if received == room:
            connection.burst = _LARGEST_BURST if room < credit else _FIRST_BURST
            return True
        connection.burst = max(_SMALLEST_BURST, used)
        # Less than the room: the socket is empty.  Only end of file would not be reported again.
        connection.readable = connection.read_closed
        return True

    def _packet_size(self, connection: VirtioConnection) -> int:
        """Return the maximum payload of the next packets, in bytes.

        Queue a CREDIT_REQUEST when one is due or the guest must read first.
        """
        send = connection.send
        most = send.packet_size(self._buffers[0][3] or 1)
        if send.is_half_full and (send.take_request_due() or send.is_full):
            connection.queue_credit_request()
        return most

    def _write_headers(self, connection: VirtioConnection, received: int) -> int:
        """Write headers to the buffers that hold the ``received`` bytes of payload.

        Return the number of buffers.
        """
        take, recorders = self._buffers.popleft, self._capture.recorders
        total_length, room = received, 0
        encoded, encoded_length = b"", -1  # headers of packets of one size are equal
        used: list[tuple[int, int]] = []
        while received > 0:
            head, header, parts, room = take()
            length = room if room < received else received
            received -= length
            if length != encoded_length:
                encoded, encoded_length = self._header(connection, length, _RW, 0), length
            if header is None:
                _scatter(encoded, parts)
            else:
                header[:HEADER_SIZE] = encoded
            used.append((head, HEADER_SIZE + length))
            if recorders:
                payload = parts if header is not None else _skip_header(parts)
                record(self._capture, encoded, payload)
        self._ring.push_all(used)
        connection.send.spend(total_length, len(used), room - length)
        return len(used)

    def _write_merged_headers(self, connection: VirtioConnection, received: int) -> int:
        """Write headers of packets with at most VIRTIO_MERGED_PACKET_MAX_BYTES bytes of payload.

        Return the number of buffers that hold the ``received`` bytes.
        """
        used = 0
        while received:
            room = self._buffers[0][3]
            if not room:
                self._return_unused()
                continue
            length = min(room, VIRTIO_MERGED_PACKET_MAX_BYTES, received)
            used += self._write_headers(connection, length)
            received -= length
        return used

    def _send_messages(self, connection: VirtioConnection) -> bool:
        sent = False
        for _ in range(_MESSAGES_PER_TURN):
            if not self._fetch(1) or (not connection.unsent and not self._read_message(connection)):
                break
            self._send_fragment(connection)
            sent = True
            while connection.unsent and self._fetch(1):
                self._send_fragment(connection)
            if connection.unsent:
                break
        return sent

    def _read_message(self, connection: VirtioConnection) -> bool:
        """Read the next message into ``connection.unsent``; return whether a message was read.

        A message for which the guest has no credit stays in the socket.
        """
        sock = connection.sock
        if sock is None or not connection.readable:
            return False
        try:
            size = sock.recv_into(bytearray(1), 0, _PEEK_FLAGS)
            if size > connection.send.buffer:
                connection.reset()  # the guest could never receive so large a message
                return False
            if size > connection.send.available():
                connection.credit_needed = size
                return False
            connection.credit_needed = 1
            room = self._buffers[0][3] or 1
            if not connection.send.admits_message(-(-size // room) or 1):
                connection.queue_credit_request()
                return False
            data, _, message_flags, _ = sock.recvmsg(max(size, 1), 0, _RECEIVE_FLAGS)
            # The message came with a marker (see VirtioConnection.attach).
            connection.ends_record = bool(message_flags & MSG_CTRUNC)
        except BlockingIOError:
            connection.readable = False
            return False
        except ConnectionError:
            data = b""
        if not data and _is_at_eof(sock):  # else a message without content
            connection.readable = False
            connection.shut_down(BOTH if connection.peer_closed else _SHUT_SEND)
            return False
        if not data and not connection.send.admits_empty_message():
            return False  # Linux's own sockets send no empty messages
        connection.unsent = memoryview(data)
        return True

    def _send_fragment(self, connection: VirtioConnection) -> None:
        """Send as much of ``connection.unsent`` as fits in the first available buffer."""
        head, header_view, parts, room = self._buffers[0]
        if not room and connection.unsent:
            self._return_unused()
            return
        part = connection.unsent[:room]
        connection.unsent = connection.unsent[room:]
        flags = 0
        if not connection.unsent:
            flags = _END_OF_MESSAGE | (_END_OF_RECORD if connection.ends_record else 0)
        header = self._header(connection, len(part), _RW, flags)
        if header_view is not None:
            header_view[:HEADER_SIZE] = header
            _scatter(part, parts)
        else:
            _scatter(header + part, parts)
        self._buffers.popleft()
        connection.send.spend(len(part))
        self._ring.push(head, HEADER_SIZE + len(part))
        if self._capture.recorders:
            record(self._capture, header, (part,))

    def _return_unused(self) -> None:
        self._ring.push(self._buffers.popleft()[0], 0)


def _is_at_eof(sock: socket.socket) -> bool:
    poll = select.poll()
    poll.register(sock, select.POLLRDHUP)
    return bool(poll.poll(0))


def _trim(views: list[memoryview], excess: int) -> None:
    """Remove ``excess`` bytes from the end of ``views``."""
    while excess >= len(views[-1]):
        excess -= len(views.pop())
        if not views:
            return
    if excess:
        views[-1] = views[-1][:-excess]


def _cap_buffers(buffers: Iterable[Buffer], size: int) -> Iterator[Buffer]:
    """Yield the buffers, each limited to ``size`` bytes of payload."""
    for head, header, parts, room in buffers:
        if room > size:
            parts = parts if header is not None else _skip_header(parts)
            cut: list[memoryview] = []
            left = size
            for part in parts:
                cut.append(part[:left])
                left -= len(cut[-1])
                if not left:
                    break
            yield head, memoryview(b""), cut, size
        else:
            yield head, header, parts, room


def _skip_header(parts: list[memoryview]) -> list[memoryview]:
    left = HEADER_SIZE
    rest = []
    for part in parts:
        if left >= len(part):
            left -= len(part)
        else:
            rest.append(part[left:])
            left = 0
    return rest


def _scatter(data: bytes | memoryview, parts: list[memoryview]) -> None:
    at = 0
    for part in parts:
        piece = data[at : at + len(part)]
        part[: len(piece)] = piece
        at += len(piece)
        if at >= len(data):
            return
