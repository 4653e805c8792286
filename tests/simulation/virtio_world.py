"""The virtio device's connections, credit and receive queue, with simulated guests and sockets."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from random import Random
from typing import Any, ClassVar, cast

from vsockets.devices.capture import CaptureSink
from vsockets.devices.limits import VIRTIO_MERGED_PACKET_MAX_BYTES, VIRTIO_PACKET_OVERHEAD_BYTES
from vsockets.devices.virtio.connection import ConnectionState, VirtioConnection
from vsockets.devices.virtio.packet import HEADER, HEADER_SIZE, Header, Op, Type
from vsockets.devices.virtio.ring import Buffer, Chain, split_header
from vsockets.devices.virtio.rx import ReceiveQueue

from .engine import World

CONNECTIONS = 3
GUEST_BUFFER, DEVICE_BUFFER = 16_384, 65_536
SOCKET_ROOM = 3000
#: payloads of the buffers of Linux, and of a guest whose buffers are of all sizes
ROOMS, MIXED_ROOMS = (1500,), (1500, 200, 60)


def pattern(start: int, length: int) -> bytes:
    """Return bytes of a stream, by their position."""
    return bytes((at * 7 + at // 251) & 255 for at in range(start, start + length))


class SimulatedSocket:
    """The device's end of a unix socket."""

    def __init__(self) -> None:
        self.inbox = bytearray()  # from the program
        self.outbox = bytearray()  # for the program

    def sendmsg(self, parts: Sequence[memoryview], _: object, __: int) -> int:
        data = b"".join(parts)[: SOCKET_ROOM - len(self.outbox)]
        if not data:
            raise BlockingIOError
        self.outbox += data
        return len(data)

    def recvmsg_into(self, views: Sequence[memoryview], _: int, __: int) -> tuple[int]:
        if not self.inbox:
            raise BlockingIOError
        moved = 0
        for view in views:
            part = self.inbox[: len(view)]
            view[: len(part)] = part
            del self.inbox[: len(part)]
            moved += len(part)
        return (moved,)

    def setsockopt(self, *_: int) -> None:
        """Sizes are fixed."""


class SimulatedRing:
    """A receive queue: the guest posts buffers, the device fills them in order."""

    base = 0

    def __init__(self) -> None:
        self.posted: deque[tuple[int, bytearray]] = deque()
        self.popped: dict[int, bytearray] = {}
        #: used buffers: what was written, and the room for payload; then those the guest can see
        self.pushed: deque[tuple[bytes, int]] = deque()
        self.used: deque[tuple[bytes, int]] = deque()
        self.heads = 0

    def post(self, room: int) -> None:
        self.heads += 1
        self.posted.append((self.heads, bytearray(HEADER_SIZE + room)))

    def pop(self) -> Chain | None:
        if not self.posted:
            return None
        head, data = self.posted.popleft()
        self.popped[head] = data
        view = memoryview(data)
        return head, [], [view[:HEADER_SIZE], view[HEADER_SIZE:]]

    def pop_buffers(self, count: int, header: int) -> list[Buffer]:
        buffers: list[Buffer] = []
        while len(buffers) < count and (chain := self.pop()) is not None:
            buffers.append(split_header(chain, header))
        return buffers

    def push(self, head: int, length: int) -> None:
        buffer = self.popped.pop(head)
        self.pushed.append((bytes(buffer[:length]), len(buffer) - HEADER_SIZE))

    def push_all(self, used: Sequence[tuple[int, int]]) -> None:
        for head, length in used:
            self.push(head, length)

    def publish(self) -> bool:
        self.used += self.pushed
        self.pushed.clear()
        return True

    def rewind(self) -> None:
        """The device is never stopped."""

    def enable_notification(self, chains: int = 1) -> bool:
        return bool(self.posted)


class SimulatedGuestSocket:
    """A guest's socket; that of Linux counts its unread packets, and merges small ones."""

    def __init__(self, counts_packets: bool) -> None:
        self.counts_packets = counts_packets
        self.queue: deque[list[int]] = deque()  # bytes, and bytes that can be merged into them
        self.unread = bytearray()
        self.received = self.read = self.sent = self.announced = 0
        self.device_buffer, self.device_forwarded = DEVICE_BUFFER, 0

    def take(self, payload: bytes, room: int) -> None:
        length = len(payload)
        assert payload == pattern(self.received, length), "bytes lost or out of order"
        self.received += length
        assert self.received - self.read <= GUEST_BUFFER, "beyond the guest's credit"
        self.unread += payload
        if self.queue and length <= VIRTIO_MERGED_PACKET_MAX_BYTES and length < self.queue[-1][1]:
            self.queue[-1][0] += length
            self.queue[-1][1] -= length
            return
        used = (len(self.queue) + 1) * VIRTIO_PACKET_OVERHEAD_BYTES
        assert used <= GUEST_BUFFER or not self.counts_packets, (
            "the guest resets the connection (ENOBUFS)"
        )
        self.queue.append([length, room - length])

    def room(self) -> int:
        """Return the bytes that the guest may send: of its own buffer's size at most, as Linux."""
        return min(self.device_buffer, GUEST_BUFFER) - (self.sent - self.device_forwarded)


class VirtioWorld(World):
    """Streams in both directions over a device whose queues and sockets are often full."""

    actions: ClassVar[dict[str, int]] = {
        "write": 10,
        "wake": 10,
        "device_send": 14,
        "guest_receive": 12,
        "guest_read": 6,
        "post": 8,
        "guest_write": 8,
        "device_receive": 12,
        "read": 8,
        "flush": 4,
        "retry": 2,
        "delay": 3,
    }
    faults = frozenset({"delay"})

    def __init__(self) -> None:
        self.ring = SimulatedRing()
        self.queue = ReceiveQueue(self.ring, 3, CaptureSink(cast(Any, None)))
        self.transmit: deque[tuple[Header, bytes]] = deque()
        is_linux = random.random() < 0.7
        self.rooms = ROOMS if is_linux else MIXED_ROOMS
        self.guests = [SimulatedGuestSocket(is_linux) for _ in range(CONNECTIONS)]
        self.sockets = [SimulatedSocket() for _ in range(CONNECTIONS)]
        self.written = [0] * CONNECTIONS
        self.taken = [0] * CONNECTIONS
        self.connections = []
        for port, sock in enumerate(self.sockets):
            state = ConnectionState.PEER_INIT
            connection = VirtioConnection(state, Type.STREAM, (2, port), port, DEVICE_BUFFER)
            connection.send.update(GUEST_BUFFER, 0)
            connection.attach(cast(Any, sock), 0)
            connection.accept()
            self.connections.append(connection)

    def do_post(self, chance: Random) -> None:
        for _ in range(chance.randrange(1, 20)):
            self.ring.post(chance.choice(self.rooms))

    def do_write(self, chance: Random) -> None:
        """A program writes, often little."""
        at = chance.randrange(CONNECTIONS)
        sock = self.sockets[at]
        length = chance.choice([1, 50, 100, 200, 2000, 5000])
        length = max(min(length, SOCKET_ROOM - len(sock.inbox)), 0)
        sock.inbox += pattern(self.written[at], length)
        self.written[at] += length

    def do_wake(self, chance: Random) -> None:
        at = chance.randrange(CONNECTIONS)
        self.connections[at].readable |= bool(self.sockets[at].inbox)

    def do_device_send(self, chance: Random) -> None:
        connection = chance.choice(self.connections)
        if connection.has_output:
            self.queue.send(connection)
            self.ring.publish()

    def do_guest_receive(self, chance: Random) -> None:
        for _ in range(min(chance.randrange(1, 8), len(self.ring.used))):
            data, room = self.ring.used.popleft()
            header = Header(*HEADER.unpack_from(data))
            guest = self.guests[header.dst_port]
            assert header.src_port == header.dst_port and header.dst_cid == 3, "wrong source"
            assert header.op != Op.RST, "the device resets a faultless connection"
            guest.device_buffer, guest.device_forwarded = header.buf_alloc, header.fwd_cnt
            if header.op == Op.RW:
                guest.take(data[HEADER_SIZE:], room)
            elif header.op == Op.CREDIT_REQUEST:
                self._send(header.dst_port, Op.CREDIT_UPDATE)

    def do_guest_read(self, chance: Random) -> None:
        at = chance.randrange(CONNECTIONS)
        guest = self.guests[at]
        for _ in range(chance.randrange(1, 6)):
            if guest.queue:
                length, _ = guest.queue.popleft()
                del guest.unread[:length]
                guest.read += length
        if guest.read - guest.announced >= GUEST_BUFFER // 4:
            self._send(at, Op.CREDIT_UPDATE)

    def do_guest_write(self, chance: Random) -> None:
        at = chance.randrange(CONNECTIONS)
        guest = self.guests[at]
        length = min(chance.choice([1, 100, 1000, 4096]), guest.room())
        if length > 0:
            self._send(at, Op.RW, pattern(guest.sent, length))
            guest.sent += length

    def _send(self, at: int, op: Op, payload: bytes = b"") -> None:
        guest = self.guests[at]
        guest.announced = guest.read
        header = Header(3, 2, at, at, len(payload), Type.STREAM, op, 0, GUEST_BUFFER, guest.read)
        self.transmit.append((header, payload))

    def do_device_receive(self, chance: Random) -> None:
        for _ in range(min(chance.randrange(1, 8), len(self.transmit))):
            header, payload = self.transmit.popleft()
            connection = self.connections[header.src_port]
            connection.send.update(header.buf_alloc, header.fwd_cnt)
            if header.op == Op.RW:
                if connection.on_payload(len(payload)):
                    connection.forward([memoryview(payload)], len(payload))
            elif header.op != Op.CREDIT_UPDATE:
                connection.on_packet(header.op, header.flags)

    def do_read(self, chance: Random) -> None:
        """A program reads."""
        at = chance.randrange(CONNECTIONS)
        outbox = self.sockets[at].outbox
        data = bytes(outbox[: chance.choice([1, 500, 5000])])
        del outbox[: len(data)]
        assert data == pattern(self.taken[at], len(data)), "bytes lost or out of order"
        self.taken[at] += len(data)

    def do_flush(self, chance: Random) -> None:
        connection = chance.choice(self.connections)
        if connection.has_backlog:
            connection.flush()

    def do_retry(self, chance: Random) -> None:
        """The device's timer for a guest that was full."""
        connection = chance.choice(self.connections)
        if connection.send.is_full:
            connection.send.retry()

    def do_delay(self, chance: Random) -> None:
        """The guest reads nothing for a while."""
        for _ in range(40):
            for name in ("write", "wake", "post", "device_send", "guest_receive"):
                getattr(self, f"do_{name}")(chance)

    def check(self) -> None:
        for connection, guest in zip(self.connections, self.guests, strict=True):
            assert connection.state is ConnectionState.ESTABLISHED, "the connection was reset"
            free = GUEST_BUFFER - (connection.send.sent - guest.read)
            assert 0 <= connection.send.available() <= free, "more than was granted"
            assert connection.receive.held <= DEVICE_BUFFER
            assert guest.sent - connection.receive.forwarded <= DEVICE_BUFFER, "overcommitted"

    def quiesce(self) -> None:
        """Without faults, every byte arrives, and each side can send again."""
        chance = Random(0)
        for at, guest in enumerate(self.guests):
            wanted = guest.sent + 2 * GUEST_BUFFER
            for _ in range(3000):
                if guest.sent < wanted and guest.room() > 0:
                    length = min(guest.room(), wanted - guest.sent)
                    self._send(at, Op.RW, pattern(guest.sent, length))
                    guest.sent += length
                for name in self.actions:
                    if name not in ("write", "guest_write", "delay"):
                        getattr(self, f"do_{name}")(chance)
                self.check()
                done = guest.received == self.written[at] and self.taken[at] == guest.sent
                if done and guest.sent == wanted:
                    break
            assert guest.received == self.written[at], "stuck: host to guest"
            assert guest.sent == wanted and self.taken[at] == wanted, "stuck: guest to host"
