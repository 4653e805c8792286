"""Unread packets of a guest's program, counted as Linux counts them.

Since Linux 6.12.92 (059b7dbd20a6, c6087c5aaad6) a socket is reset by a packet with which

    (packets in its queue + 1) * SKB_TRUESIZE(0) > buf_alloc

where a stream's packet of at most 128 bytes (GOOD_COPY_LEN) is copied into the last one, if there
is room behind that.
"""

from __future__ import annotations

import os
import socket
from collections import deque

import pytest

from support.virtio_guest import GuestStream, connect
from vsockets.devices.limits import VIRTIO_BUFFER_BYTES, VIRTIO_PACKET_OVERHEAD_BYTES
from vsockets.devices.virtio import device
from vsockets.devices.virtio.packet import HEADER_SIZE, Op, Sequenced, Type
from vsockets.testing.waiting import wait_until

from .conftest import Rig

HOST = (2, 5000)
ROOM = 4096  # of the simulated guest's buffers
GOOD_COPY_LEN = 128
END = int(Sequenced.END_OF_MESSAGE)
SOCKET_TYPES = {socket.SOCK_STREAM: Type.STREAM, socket.SOCK_SEQPACKET: Type.SEQPACKET}
SIZES = [1, 8, 100, 129, 200, 400, 1000, 4096, 65_536]
#: SKB_TRUESIZE(0), as Debian has it, and with CONFIG_MAX_SKB_FRAGS=45.
USUAL, LARGE = 576, 1024


class LinuxSocket:
    """A guest's socket whose program reads on request."""

    def __init__(self, stream: GuestStream, overhead: int) -> None:
        self._stream = stream
        self._overhead = overhead
        self._queue: deque[list[int]] = deque()  # for each packet: bytes, room behind, flags
        self.most = 0  #: largest number of packets at once
        self.requests = 0  #: number of CREDIT_REQUESTs

    @property
    def unread(self) -> int:
        """Return the number of bytes in the queue."""
        return sum(packet[0] for packet in self._queue)

    def has(self, size: int) -> bool:
        """Return whether ``size`` bytes are unread, including those that have just arrived."""
        self.take()
        return self.unread == size

    def take(self) -> None:
        """Queue arrived packets, as virtio_transport_recv_enqueue() does."""
        guest = self._stream.guest
        while guest.arrived or guest.take():
            header, payload = guest.arrived.popleft()
            if header.op == Op.CREDIT_REQUEST:
                self.requests += 1
                self._stream.send_packet(Op.CREDIT_UPDATE)
            if header.op != Op.RW:
                assert header.op != Op.RST
                continue
            assert (len(self._queue) + 1) * self._overhead <= self._stream.buf_alloc, "ENOBUFS"
            assert self.unread + len(payload) <= self._stream.buf_alloc, "beyond the credit"
            last = self._queue[-1] if self._queue else [0, 0, END]
            if len(payload) <= GOOD_COPY_LEN and len(payload) < last[1] and not last[2] & END:
                last[0] += len(payload)
                last[1] -= len(payload)
                last[2] |= header.flags
            else:
                self._queue.append([len(payload), ROOM - len(payload), header.flags])
                self.most = max(self.most, len(self._queue))

    def read(self, size: int) -> None:
        """Read ``size`` bytes, all of the first packet, and announce it."""
        assert self._queue.popleft()[0] == size
        self._stream.received += size
        self._stream.send_packet(Op.CREDIT_UPDATE)

    def read_all(self, told: bool = True) -> int:
        """Read everything; return the number of bytes.

        ``told``: announce it, too, as SEQPACKET's recv() does.
        """
        size = self.unread
        self._queue.clear()
        self._stream.received += size
        if told and size:
            self._stream.send_packet(Op.CREDIT_UPDATE)
        return size


def opened(
    rig: Rig, kind: int, overhead: int, buffer: int = VIRTIO_BUFFER_BYTES
) -> tuple[LinuxSocket, socket.socket]:
    rig.host.open_ports.add(5000)
    stream = connect(
        rig.guest(), 1024, HOST, type=SOCKET_TYPES[socket.SocketKind(kind)], buf_alloc=buffer
    )
    sock = rig.host.accepted[-1]
    sock.setblocking(False)
    return LinuxSocket(stream, overhead), sock


def send(rig: Rig, guest: LinuxSocket, sock: socket.socket, size: int, count: int) -> int:
    """Send single messages to a guest that queues them and reads none.

    Return the number of bytes that the guest had to read before all could be sent.
    """
    received = 0
    for _ in range(count):
        while True:
            try:
                sock.send(bytes(size))
                break
            except BlockingIOError:
                rig.call(lambda: None)
                guest.take()
                received += guest.read_all()
        rig.call(lambda: None)  # the device has seen it
        guest.take()
    return received


@pytest.mark.parametrize("size", SIZES)
def test_stream_uses_its_credit_with_packets_of_any_size(rig: Rig, size: int) -> None:
    guest, sock = opened(rig, socket.SOCK_STREAM, LARGE)
    count = min(VIRTIO_BUFFER_BYTES // size, 1000)
    send(rig, guest, sock, size, count)
    wait_until(lambda: guest.has(size * count), "all of it to arrive")


@pytest.mark.parametrize("size", SIZES)
def test_messages_wait_for_their_reader(rig: Rig, size: int) -> None:
    guest, sock = opened(rig, socket.SOCK_SEQPACKET, LARGE)
    count = min(VIRTIO_BUFFER_BYTES // size, 600)
    received = send(rig, guest, sock, size, count)
    if size < VIRTIO_PACKET_OVERHEAD_BYTES // 2:
        assert guest.most == VIRTIO_BUFFER_BYTES // VIRTIO_PACKET_OVERHEAD_BYTES

    def all_arrived() -> bool:
        nonlocal received
        guest.take()
        received += guest.read_all()
        return received == size * count

    wait_until(all_arrived, "all of it to arrive")


@pytest.mark.parametrize("kind", list(SOCKET_TYPES))
@pytest.mark.parametrize("buffer", [600, 1024, 1500, 2048, 5000, 10_000, 65_536])
def test_small_buffers(rig: Rig, kind: int, buffer: int) -> None:
    """Linux announces its credit at each read of a socket with less than 64 KiB."""
    guest, sock = opened(rig, kind, USUAL, buffer)
    sent = received = 0
    for size in (1, 200, 5, 500, 100, 3, 128, 129) * 5:
        received += send(rig, guest, sock, size, 1)
        sent += size

    def all_arrived() -> bool:
        nonlocal received
        guest.take()
        received += guest.read_all()
        return received == sent

    wait_until(all_arrived, "all of it to arrive")


def test_reading_guest_gets_unsplit_packets(rig: Rig) -> None:
    """The guest replies to CREDIT_REQUEST, so no packet is split into small ones."""
    guest, sock = opened(rig, socket.SOCK_STREAM, LARGE)
    for _ in range(1000):
        sock.send(bytes(250))
        wait_until(lambda: guest.has(250), "it to arrive")
        assert guest.most == 1
        guest.read_all(told=False)


def test_guest_that_announces_its_reads_is_not_asked_for_credit(rig: Rig) -> None:
    """A CREDIT_REQUEST costs the guest a packet in each direction."""
    guest, sock = opened(rig, socket.SOCK_STREAM, LARGE)
    sock.send(bytes(250))
    for _ in range(1000):
        wait_until(lambda: guest.has(250), "it to arrive")
        sock.send(bytes(250))
        wait_until(lambda: guest.has(500), "the next to arrive")
        guest.read(250)
    assert not guest.requests


def test_silent_guest_is_asked_for_credit_again(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "VIRTIO_CREDIT_RETRY_SECONDS", 0.01)
    guest, sock = opened(rig, socket.SOCK_SEQPACKET, LARGE)
    count = VIRTIO_BUFFER_BYTES // VIRTIO_PACKET_OVERHEAD_BYTES
    send(rig, guest, sock, 8, count + 5)
    assert guest.unread == 8 * count
    guest.read_all(told=False)
    wait_until(lambda: guest.has(40), "the rest")


def test_empty_messages(rig: Rig) -> None:
    """The guest does not report that they were read; Linux's sockets send none."""
    guest, sock = opened(rig, socket.SOCK_SEQPACKET, LARGE)
    for _ in range(3):
        send(rig, guest, sock, 0, 600)
        assert guest.most > 100
        sock.send(bytes(8))
        wait_until(lambda: guest.has(8), "the one with content")
        guest.read_all()


def test_small_packets_in_buffers_of_any_size(rig: Rig) -> None:
    """Each buffer has the payload of its header, also where it takes less than a small packet."""
    guest = rig.guest(refill=False)
    rig.host.open_ports.add(5000)

    def offer_buffers(*sizes: int) -> None:
        for size in sizes:
            guest.offer_buffer(guest.memory.allocate(HEADER_SIZE + size), HEADER_SIZE + size)
        guest.receive.publish()

    def received() -> bytes:
        rig.call(lambda: None)
        guest.take()
        for header, payload in guest.arrived:
            assert len(payload) == header.length
        data = b"".join(payload for _, payload in guest.arrived)
        guest.arrived.clear()
        return data

    offer_buffers(ROOM)
    stream = connect(guest, 1024, HOST, buf_alloc=VIRTIO_BUFFER_BYTES)
    sock = rig.host.accepted[-1]
    sent = os.urandom(300 * 200)
    many = 200 * 200
    sock.sendall(sent[:many])
    data = b""
    while len(data) < many:  # a packet for each message
        offer_buffers(200)
        data += received()
    sock.sendall(sent[many:])
    while len(data) < len(sent):
        offer_buffers(ROOM, 10, 0, 128, 1, ROOM, 127, 300)
        more = received()
        if not more:  # with this number of packets the device must know what was read
            stream.received = len(data)
            stream.send_packet(Op.CREDIT_UPDATE)
        data += more
    assert data == sent
