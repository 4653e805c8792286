"""The device, with a simulated guest."""

from __future__ import annotations

import errno
import hashlib
import os
import socket
import threading

import pytest

from support.virtio_guest import GuestStream, SimulatedGuest, accept, connect
from vsockets._linux.sockets import refuse_descriptors
from vsockets.devices.limits import VIRTIO_BUFFER_BYTES, VIRTIO_WAITING_RESETS_MAX
from vsockets.devices.virtio.packet import (
    F_SEQPACKET,
    TRANSPORT_RESET,
    Header,
    Op,
    Sequenced,
    Shutdown,
    Type,
)
from vsockets.devices.virtio.ring import F_RING_EVENT_IDX, F_RING_INDIRECT_DESC, F_VERSION_1
from vsockets.testing.waiting import wait_until

from .conftest import CID, Rig

HOST = (2, 5000)
BOTH = int(Shutdown.SEND | Shutdown.RECEIVE)
SEND, RECEIVE = int(Shutdown.SEND), int(Shutdown.RECEIVE)


def opened(
    rig: Rig, guest: SimulatedGuest | None = None, **fields: int
) -> tuple[GuestStream, socket.socket]:
    rig.host.open_ports.add(5000)
    stream = connect(guest or rig.guest(), 1024, HOST, **fields)
    return stream, rig.host.accepted[-1]


def receive_all(sock: socket.socket, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        more = sock.recv(1 << 16)
        assert more, "an early end"
        data += more
    return bytes(data)


def test_configuration_space_has_the_cid(rig: Rig) -> None:
    assert rig.guest().configured_cid() == CID


def test_connect_by_the_guest(rig: Rig) -> None:
    stream, sock = opened(rig)
    assert rig.host.asked == [(socket.SOCK_STREAM, 1024, HOST)]
    stream.send(b"from the guest")
    assert sock.recv(100) == b"from the guest"
    sock.send(b"from the host")
    assert stream.receive(13) == b"from the host"


def test_port_without_listener_refuses_at_once(rig: Rig) -> None:
    """Debian's Rust back end 0.3.0 sends nothing."""
    guest = rig.guest()
    with pytest.raises(ConnectionResetError):
        connect(guest, 1024, HOST)
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")


def test_connect_to_the_guest(rig: Rig) -> None:
    guest = rig.guest()
    sock, answers = rig.connect_to_guest(700)
    stream = accept(guest)
    assert (stream.local, stream.peer) == (700, (2, 9700))
    wait_until(lambda: answers == [0], "the host to be told")
    sock.send(b"hello")
    assert stream.receive(5) == b"hello"


def test_connect_to_a_guest_port_without_listener(rig: Rig) -> None:
    guest = rig.guest()
    sock, answers = rig.connect_to_guest(700)
    header, _ = guest.next_packet()
    guest.send(guest.header(Op.RST, header.dst_port, (header.src_cid, header.src_port)))
    wait_until(lambda: answers == [errno.ECONNRESET], "the host to be told")
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")
    _can_be_reused(sock, rig)


def test_connect_before_the_guest_runs_is_unreachable(rig: Rig) -> None:
    sock, answers = rig.connect_to_guest(700)
    assert answers == [errno.EHOSTUNREACH]
    _can_be_reused(sock, rig)


def _can_be_reused(sock: socket.socket, rig: Rig) -> None:
    """Assert that a refused client continues with vsockd, without the device."""
    (refused,) = rig.host.refused
    sock.send(b"again")
    assert refused.recv(100) == b"again"
    refused.close()
    assert sock.recv(1) == b""


@pytest.mark.parametrize("indirect", [0, F_RING_INDIRECT_DESC], ids=["direct", "indirect"])
@pytest.mark.parametrize("event_index", [0, F_RING_EVENT_IDX], ids=["flags", "event index"])
@pytest.mark.parametrize("split", [True, False], ids=["header apart", "one buffer"])
def test_bulk_data_in_both_directions(
    rig: Rig, indirect: int, event_index: int, split: bool
) -> None:
    guest = rig.guest(features=F_VERSION_1 | indirect | event_index, split=split, regions=4)
    stream, sock = opened(rig, guest)
    data = os.urandom(1 << 20) * 3
    digests = []

    def host() -> None:
        digests.append(hashlib.sha256(receive_all(sock, len(data))).digest())
        sock.sendall(data)

    thread = threading.Thread(target=host)
    thread.start()
    stream.send(data, step=50_000)
    assert stream.receive(len(data)) == data
    thread.join()
    assert digests == [hashlib.sha256(data).digest()]


@pytest.mark.parametrize(
    "cuts",
    [[], [10], [44], [1, 2, 3, 40, 44, 45], list(range(44, 65_536 + 44, 4096)), [60_000]],
    ids=["one", "within the header", "usual", "tiny", "pages", "within the payload"],
)
def test_packets_span_any_number_of_descriptors(rig: Rig, cuts: list[int]) -> None:
    """Debian's Rust back end 0.3.0 hangs on 64 KiB from Linux 7.3: 17 descriptors and more."""
    guest = rig.guest(features=F_VERSION_1)
    stream, sock = opened(rig, guest)
    data = os.urandom(65_536)
    guest.send(stream.packet(Op.RW, len(data)), data, cuts=cuts)
    assert receive_all(sock, len(data)) == data


@pytest.mark.parametrize("size", [1, 43, 44, 45, 50, 4096, 70_000])
def test_receive_buffers_of_any_size(rig: Rig, size: int) -> None:
    """Also buffers with room for a part of a header, or for a header alone."""
    guest = rig.guest(features=F_VERSION_1, buffer=100, split=False)
    stream, sock = opened(rig, guest)
    sock.send(b"x" * 1000)
    assert stream.receive(1000) == b"x" * 1000
    # Earlier buffers are used first; among the new ones is an odd one.
    odd = guest.memory.allocate(size)
    pieces = [(odd + at, min(20, size - at)) for at in range(0, size, 20)]
    if size < 44:
        return  # no header fits: see test_broken_rings
    while guest.receive.has_room(len(pieces) if len(pieces) < 100 else 1):
        place = guest.memory.allocate(size)
        parts = [(place + at, min(20, size - at)) for at in range(0, size, 20)]
        guest.places[guest.receive.add(parts[:100] or [(place, size)], writable=True)] = place
        break
    guest.receive.publish()
    sock.send(b"y" * 20_000)
    assert stream.receive(20_000) == b"y" * 20_000


# Credit


def test_guest_with_a_small_buffer_is_not_overrun(rig: Rig) -> None:
    stream, sock = opened(rig, buf_alloc=1000)
    sock.send(b"x" * 5000)
    header = stream.receive_packet()
    assert header.length == 1000
    with pytest.raises(TimeoutError):
        stream.guest.next_packet(0.1)
    stream.send_packet(Op.CREDIT_UPDATE)
    assert stream.receive_packet().length == 1000
    assert stream.receive(2000) == b"x" * 2000


def test_slow_reader_blocks_only_its_own_stream(rig: Rig) -> None:
    """Firecracker#1751, libkrun#772: head-of-line blocking and stalls."""
    guest = rig.guest()
    slow, slow_sock = opened(rig, guest)
    sent = 0
    while True:
        while slow.credit:
            data = bytes(min(slow.credit, 65_536))
            guest.send(slow.packet(Op.RW, len(data)), data)
            slow.sent += len(data)
            sent += len(data)
        try:
            slow.note_credit(guest.next_packet(0.3)[0])
        except TimeoutError:
            break
        assert sent < 4 << 20, "credit without end"
    other = connect(guest, 1025, HOST)
    other.send(b"I go on")
    assert rig.host.accepted[-1].recv(10) == b"I go on"
    assert len(receive_all(slow_sock, sent)) == sent
    header = slow.receive_packet()
    assert header.op == Op.CREDIT_UPDATE
    assert slow.credit > VIRTIO_BUFFER_BYTES // 4


def test_guest_with_own_in_flight_limit_gets_credit_in_time(rig: Rig) -> None:
    """Linux 7.3 never has more in flight than its own buffer's size."""
    stream, sock = opened(rig, buf_alloc=1024)
    stream.send(bytes(1024))
    assert receive_all(sock, 1024) == bytes(1024)
    assert stream.receive_packet().op == Op.CREDIT_UPDATE
    assert stream.forwarded == 1024


def test_one_way_flow_gets_credit_updates(rig: Rig) -> None:
    """asterinas#2885: a guest that only sends never got an update."""
    stream, sock = opened(rig)
    thread = threading.Thread(target=receive_all, args=(sock, 5 << 20))
    thread.start()
    stream.send(bytes(5 << 20))
    thread.join(10)
    assert not thread.is_alive()


def test_payload_beyond_the_credit_resets(rig: Rig) -> None:
    stream, _ = opened(rig)
    guest = stream.guest
    for _ in range(40):  # the host reads nothing; its socket takes some hundred KiB at most
        guest.send(stream.packet(Op.RW, 65_536), bytes(65_536))
    while not stream.is_reset:
        stream.receive_packet()
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")


def test_credit_request_is_answered(rig: Rig) -> None:
    stream, sock = opened(rig)
    stream.send(b"1234")
    assert sock.recv(9) == b"1234"
    stream.send_packet(Op.CREDIT_REQUEST)
    assert stream.receive_packet().op == Op.CREDIT_UPDATE
    assert (stream.forwarded, stream.alloc) == (4, VIRTIO_BUFFER_BYTES)


@pytest.mark.parametrize("forwarded", [1, 1000, 0x8000_0000])
def test_false_count_gives_no_credit(rig: Rig, forwarded: int) -> None:
    """CVE-2026-23069."""
    stream, sock = opened(rig, buf_alloc=100)
    guest = stream.guest
    guest.send(guest.header(Op.CREDIT_UPDATE, stream.local, HOST, buf_alloc=100, fwd_cnt=forwarded))
    guest.send(stream.packet(Op.CREDIT_REQUEST)._replace(fwd_cnt=forwarded, buf_alloc=100))
    stream.receive_packet()
    sock.send(bytes(5000))
    with pytest.raises(TimeoutError):
        guest.next_packet(0.1)


# Ends


def test_half_close_by_the_guest(rig: Rig) -> None:
    stream, sock = opened(rig)
    stream.send(b"last words")
    stream.send_packet(Op.SHUTDOWN, SEND)
    assert receive_all(sock, 10) == b"last words"
    assert sock.recv(1) == b""
    sock.send(b"an answer")
    assert stream.receive(9) == b"an answer"


def test_half_close_by_the_host(rig: Rig) -> None:
    stream, sock = opened(rig)
    sock.send(b"last words")
    sock.shutdown(socket.SHUT_WR)
    assert stream.receive(10) == b"last words"
    while not stream.ended:
        stream.receive_packet()
    assert stream.ended == SEND
    stream.send(b"an answer")
    assert sock.recv(99) == b"an answer"


def test_close_by_the_guest(rig: Rig) -> None:
    stream, sock = opened(rig)
    stream.send(b"last words")
    stream.send_packet(Op.SHUTDOWN, BOTH)
    assert stream.receive_packet().op == Op.RST
    assert receive_all(sock, 10) == b"last words"
    assert sock.recv(1) == b""
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")


def test_data_before_close_waits_for_a_slow_reader(rig: Rig) -> None:
    stream, sock = opened(rig)
    data = os.urandom(VIRTIO_BUFFER_BYTES)
    stream.send(data)
    stream.send_packet(Op.SHUTDOWN, BOTH)
    assert receive_all(sock, len(data)) == data
    while not stream.is_reset:
        stream.receive_packet()


def test_close_by_the_host(rig: Rig) -> None:
    stream, sock = opened(rig)
    sock.send(b"last words")
    sock.close()
    assert stream.receive(10) == b"last words"
    while stream.ended != BOTH:
        stream.receive_packet()
    stream.send_packet(Op.RST)
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")


def test_reset_by_the_guest_is_forwarded_and_not_answered(rig: Rig) -> None:
    stream, sock = opened(rig)
    stream.send_packet(Op.RST)
    assert sock.recv(1) == b""
    with pytest.raises(TimeoutError):
        stream.guest.next_packet(0.1)
    stream.send_packet(Op.RST)
    with pytest.raises(TimeoutError):
        stream.guest.next_packet(0.1)


def test_packet_without_a_connection_is_reset(rig: Rig) -> None:
    guest = rig.guest()
    guest.send(guest.header(Op.RW, 77, HOST, 3), b"abc")
    header, _ = guest.next_packet()
    assert header == Header(2, CID, 5000, 77, type=Type.STREAM, op=Op.RST)


def test_false_source_cid_is_refused(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    guest.send(guest.header(Op.REQUEST, 77, HOST)._replace(src_cid=CID + 1))
    header, _ = guest.next_packet()
    assert header.op == Op.RST
    assert rig.host.asked == []


def test_ports_are_reused_at_once(rig: Rig) -> None:
    """moby's Cloud Hypervisor #8692."""
    guest = rig.guest()
    for _ in range(20):
        stream, sock = opened(rig, guest)
        stream.send(b"x")
        assert sock.recv(1) == b"x"
        sock.close()
        while stream.ended != BOTH:
            stream.receive_packet()


def test_reset_abandons_a_pending_connect(rig: Rig) -> None:
    rig.host.hold = True
    guest = rig.guest()
    guest.send(guest.header(Op.REQUEST, 77, HOST))
    wait_until(lambda: bool(rig.host.held), "the attempt")
    guest.send(guest.header(Op.RST, 77, HOST))
    wait_until(lambda: rig.host.given_up == 1, "the attempt to be given up")
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")


def test_request_flood_waits_for_receive_buffers(rig: Rig) -> None:
    guest = rig.guest(refill=False)
    for number in range(3 * VIRTIO_WAITING_RESETS_MAX):
        guest.send(guest.header(Op.REQUEST, number + 1, HOST), publish=True)
        if number == VIRTIO_WAITING_RESETS_MAX - 1:
            break
    more = 100
    for number in range(more):
        guest.transmit.collect()
        guest.send(guest.header(Op.REQUEST, VIRTIO_WAITING_RESETS_MAX + number + 1, HOST))
        if not guest.transmit.has_room(2):
            break
    assert len(rig.device.resets) + len(rig.device.connections) <= 2 * VIRTIO_WAITING_RESETS_MAX
    guest.refills = True
    guest.refill()
    for _ in range(VIRTIO_WAITING_RESETS_MAX):
        assert guest.next_packet()[0].op == Op.RST


# Sequenced packets


def test_messages_keep_their_boundaries(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    guest = rig.guest()
    stream = connect(guest, 1024, HOST, type=Type.SEQPACKET)
    (sock,) = rig.host.accepted
    assert sock.type == socket.SOCK_SEQPACKET
    for size in (1, 100, 65_536, 200_000):
        data = os.urandom(size)
        stream.send(data, flags=int(Sequenced.END_OF_MESSAGE | Sequenced.END_OF_RECORD))
        assert sock.recv(1 << 20) == data
    sizes = (1, 4096, 4097, 100_000)
    for size in sizes:
        sock.send(bytes([size % 251]) * size)
    for size in sizes:
        message = bytearray()
        while True:
            header = stream.receive_packet()
            message += stream.data
            stream.data.clear()
            if header.op == Op.RW and header.flags & Sequenced.END_OF_MESSAGE:
                break
        assert message == bytes([size % 251]) * size
    sock.close()
    while stream.ended != BOTH:
        stream.receive_packet()


def test_end_of_a_record_for_a_socket_that_refuses_descriptors(rig: Rig) -> None:
    """The packet arrives without the mark."""
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST, type=Type.SEQPACKET)
    (sock,) = rig.host.accepted
    refuse_descriptors(sock)
    for number in range(3):
        data = b"message %d" % number
        stream.send(data, flags=int(Sequenced.END_OF_MESSAGE | Sequenced.END_OF_RECORD))
        assert sock.recv(100) == data


def test_ends_of_records(rig: Rig) -> None:
    """A unix socket carries no MSG_EOR: a descriptor stands for it."""
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST, type=Type.SEQPACKET)
    (sock,) = rig.host.accepted
    for end in (Sequenced.END_OF_RECORD, 0):
        stream.send(b"message", flags=int(Sequenced.END_OF_MESSAGE | end))
        data, _, flags, _ = sock.recvmsg(100)
        assert data == b"message"
        assert bool(flags & socket.MSG_CTRUNC) is bool(end)
    with open(os.devnull) as marker:
        socket.send_fds(sock, [b"to the guest"], [marker.fileno()])
    sock.send(b"and on")
    for end in (Sequenced.END_OF_RECORD, 0):
        assert stream.receive_packet().flags == Sequenced.END_OF_MESSAGE | end


def test_message_as_large_as_the_buffer_is_delivered(rig: Rig) -> None:
    """Bytes forwarded before it began are announced, however few."""
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST, type=Type.SEQPACKET)
    (sock,) = rig.host.accepted
    for size in (1, VIRTIO_BUFFER_BYTES, 100, VIRTIO_BUFFER_BYTES):
        stream.send(bytes(size), flags=int(Sequenced.END_OF_MESSAGE))
        assert len(sock.recv(1 << 20)) == size


def test_empty_message_is_not_end_of_file(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST, type=Type.SEQPACKET)
    (sock,) = rig.host.accepted
    sock.send(b"")
    sock.send(b"x")
    header = stream.receive_packet()
    assert (header.op, header.length, header.flags) == (Op.RW, 0, Sequenced.END_OF_MESSAGE)
    assert stream.receive(1) == b"x"


def test_message_larger_than_the_guests_buffer_resets(rig: Rig) -> None:
    rig.host.open_ports.add(5000)
    stream = connect(rig.guest(), 1024, HOST, type=Type.SEQPACKET, buf_alloc=1000)
    rig.host.accepted[0].send(bytes(1001))
    assert stream.receive_packet().op == Op.RST


def test_connect_to_the_guest_with_sequenced_packets(rig: Rig) -> None:
    guest = rig.guest()
    sock, answers = rig.connect_to_guest(700, socket.SOCK_SEQPACKET)
    stream = accept(guest)
    assert stream.type == Type.SEQPACKET
    wait_until(lambda: answers == [0], "the host to be told")
    stream.send(b"one", flags=1)
    stream.send(b"two", flags=1)
    assert (sock.recv(9), sock.recv(9)) == (b"one", b"two")


def test_wrong_type_is_reset(rig: Rig) -> None:
    stream, _ = opened(rig)
    stream.guest.send(stream.packet(Op.RW, 1)._replace(type=Type.SEQPACKET), b"x")
    header, _ = stream.guest.next_packet()
    assert (header.op, header.type) == (Op.RST, Type.SEQPACKET)
    stream.guest.send(stream.packet(Op.RW, 1)._replace(type=9), b"x")
    header, _ = stream.guest.next_packet()
    assert (header.op, header.type) == (Op.RST, 9)


def test_seqpacket_feature_is_offered(rig: Rig) -> None:
    assert rig.guest().features & F_SEQPACKET


# Life cycle


def test_suspension_sends_a_transport_reset(rig: Rig) -> None:
    stream, sock = opened(rig)
    rig.call(rig.device.reset_connections)
    assert stream.guest.next_event() == TRANSPORT_RESET
    assert sock.recv(1) == b""
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")
    opened(rig, stream.guest)


def test_suspension_without_event_queue_resets_connections(rig: Rig) -> None:
    """QEMU keeps the event queue to itself."""
    stream, sock = opened(rig)
    stream.guest.front_end.stop_ring(2)
    rig.call(rig.device.reset_connections)
    assert sock.recv(1) == b""
    assert stream.receive_packet().op == Op.RST


def test_paused_guest_keeps_its_connections(rig: Rig) -> None:
    stream, sock = opened(rig)
    guest = stream.guest
    stream.send(b"before")
    assert receive_all(sock, 6) == b"before"
    bases = [guest.front_end.stop_ring(index) for index in range(3)]
    sock.send(b"meanwhile")
    for index, ring in enumerate(guest.rings):
        guest.front_end.set_ring(index, ring, bases[index])
    assert stream.receive(9) == b"meanwhile"
    stream.send(b"after")
    assert receive_all(sock, 5) == b"after"


def test_restarted_guest_has_no_connections(rig: Rig) -> None:
    stream, sock = opened(rig)
    guest = stream.guest
    for index in range(3):
        guest.front_end.stop_ring(index)
    fresh = [type(ring)(guest.memory, 16) for ring in guest.rings]
    for index, ring in enumerate(fresh):
        guest.front_end.set_ring(index, ring)
    assert sock.recv(1) == b""
    for ring in fresh:
        ring.close()


def test_connect_to_a_paused_guest_waits(rig: Rig) -> None:
    guest = rig.guest()
    bases = [guest.front_end.stop_ring(index) for index in range(3)]
    sock, answers = rig.connect_to_guest(700)
    assert answers == []
    for index, ring in enumerate(guest.rings):
        guest.front_end.set_ring(index, ring, bases[index])
    stream = accept(guest)
    wait_until(lambda: answers == [0], "the host to be told")
    sock.send(b"hello")
    assert stream.receive(5) == b"hello"


def test_connect_to_a_guest_that_restarts_is_refused(rig: Rig) -> None:
    stream, _ = opened(rig)
    guest = stream.guest
    for index in range(3):
        guest.front_end.stop_ring(index)
    _, answers = rig.connect_to_guest(700)
    fresh = [type(ring)(guest.memory, 16) for ring in guest.rings]
    for index, ring in enumerate(fresh):
        guest.front_end.set_ring(index, ring)
    wait_until(lambda: answers == [errno.ECONNRESET], "the host to be told")
    for ring in fresh:
        ring.close()


def test_machine_reconnects(rig: Rig) -> None:
    stream, sock = opened(rig)
    stream.guest.front_end.close()
    assert sock.recv(1) == b""
    wait_until(lambda: not rig.device.connections, "the connection to be forgotten")
    stream, sock = opened(rig)
    stream.send(b"again")
    assert sock.recv(9) == b"again"


def test_memory_changes_while_the_device_runs(rig: Rig) -> None:
    stream, sock = opened(rig)
    guest = stream.guest
    guest.front_end.set_memory(guest.memory)
    stream.send(b"still here")
    assert sock.recv(99) == b"still here"
    sock.send(b"me too")
    assert stream.receive(6) == b"me too"


def test_many_concurrent_connections(rig: Rig) -> None:
    guest = rig.guest()
    rig.host.open_ports.add(5000)
    streams = [connect(guest, 2000 + number, HOST) for number in range(200)]
    for number, stream in enumerate(streams):
        stream.send(b"%d" % number)
    for number, sock in enumerate(rig.host.accepted):
        assert sock.recv(9) == b"%d" % number
        sock.close()
