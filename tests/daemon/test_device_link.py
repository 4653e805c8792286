"""A device's link to vsockd: rights of the device, and hostile ones."""

from __future__ import annotations

import array
import contextlib
import errno
import os
import select
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import pytest

import vsockets
from vsockets import (
    AF_VSOCK,
    SO_VM_SOCKETS_BUFFER_MAX_SIZE,
    SO_VM_SOCKETS_BUFFER_SIZE,
    VMADDR_CID_ANY,
    VMADDR_PORT_ANY,
    Attachment,
)
from vsockets.control import Control
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, RequestFlag, Role, decode_route
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import assert_serves, descriptors, has_ended

SIZES = (65_536, 128, 262_144)


class Controlled(Protocol):
    """A fabric, with an administrator's connection."""

    @property
    def control(self) -> Control: ...


class Device:
    """A device's link, byte by byte."""

    def __init__(self, fabric: Controlled, guest: Attachment) -> None:
        self.cid = guest.cid
        self.link = fabric.control.attach_device(guest.cid)
        self.link.settimeout(10)

    def hand_over(self, kind: int) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.settimeout(10)
        with theirs:
            self._give(theirs)
        return ours

    def _give(self, sock: socket.socket) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [sock.fileno()]))]
        self.link.sendmsg([b"\0"], rights)

    def connect(self, port: int, cid: int, peer: int) -> socket.socket:
        sock = self.hand_over(socket.SOCK_STREAM)
        sock.send(Request(Op.CONNECT, 0, VMADDR_CID_ANY, port, cid, peer, 0, *SIZES).encode())
        return sock

    def offer(self) -> tuple[Record, socket.socket]:
        data, fds, _, _ = socket.recv_fds(self.link, RECORD_SIZE, 1)
        return Record.decode(data), socket.socket(fileno=fds[0])

    def settle(self, offer: Record, error: int = 0, size: int = 65_536) -> None:
        request = Request(Op.SETTLE, 0, *offer.local, *offer.peer, error, size)
        self.link.send(request.encode())

    def refuse(self, given_back: socket.socket | None = None) -> None:
        """Refuse the next pending connection, and return its socket, or ``instead``."""
        offer, stream = self.offer()
        stream.send(Record(errno.ECONNRESET).encode())
        if offer.flags & RequestFlag.POLLING:
            stream.recv(3072)
        request = Request(Op.SETTLE, 0, *offer.local, *offer.peer, errno.ECONNRESET)
        socket.send_fds(self.link, [request.encode()], [(given_back or stream).fileno()])
        stream.close()

    def count(self, stream: tuple[int, int, int] | None, sent: int, received: int) -> None:
        """Report bytes of a stream, by its port and peer, or of all the guest's streams."""
        port, cid, peer = stream or (VMADDR_PORT_ANY, 0, 0)
        self.link.send(Request(Op.COUNT, 0, 0, port, cid, peer, 0, sent, received).encode())

    def is_detached(self, fabric: PrivateFabric) -> bool:
        return _attaches(fabric, self.cid)

    def told(self) -> tuple[int, tuple[int, int], int]:
        """Return the reported buffer: the guest's port, the peer, and the size."""
        while True:
            record = Record.decode(self.link.recv(RECORD_SIZE))
            assert record.role == Role.BUFFER and record.local_cid == self.cid
            if record.size >= 1 << 20:  # it grows with its maximum or after it
                return record.local_port, record.peer, record.size

    def accept(self) -> tuple[Record, socket.socket]:
        offer, stream = self.offer()
        record = Record(0, 0, *offer.peer, *offer.local, Role.CONNECTED, 1, 2, 3, *SIZES)
        stream.send(record.encode())
        if offer.flags & RequestFlag.POLLING:
            stream.recv(3072)
        self.settle(offer)
        return offer, stream


@pytest.fixture
def device(private_fabric: PrivateFabric) -> Iterator[Device]:
    device = Device(private_fabric, private_fabric.guest())
    yield device
    device.link.close()


@pytest.fixture
def private_fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


def test_a_guest_has_one_device(private_fabric: PrivateFabric, device: Device) -> None:
    with pytest.raises(OSError) as refused:
        private_fabric.control.attach_device(device.cid)
    assert refused.value.errno == errno.EBUSY
    with pytest.raises(OSError) as refused:
        private_fabric.control.attach_device(2)
    assert refused.value.errno == errno.EINVAL
    with pytest.raises(OSError) as refused:
        private_fabric.control.attach_device(99)
    assert refused.value.errno == errno.ENOENT
    device.link.close()
    wait_until(lambda: _attaches(private_fabric, device.cid), "the device to be detached")


def _attaches(fabric: PrivateFabric, cid: int) -> bool:
    try:
        fabric.control.attach_device(cid).close()
    except OSError:
        return False
    return True


def test_the_guest_connects_from_a_port_of_its_own(
    private_fabric: PrivateFabric, device: Device
) -> None:
    with vsockets.create_server((2, 5000), context=private_fabric.host) as server:
        sock = device.connect(700, 2, 5000)
        record = Record.decode(sock.recv(RECORD_SIZE))
        assert record.status == 0 and record.local == (device.cid, 700) and record.size == 65_536
        accepted, peer = server.accept()
        assert peer == (device.cid, 700)
        sock.send(b"x")
        assert accepted.recv(1) == b"x"
        again = device.connect(700, 2, 5000)
        assert Record.decode(again.recv(RECORD_SIZE)).status == errno.EADDRINUSE
        sock.close()
        again.close()
        again = device.connect(700, 2, 5000)
        assert Record.decode(again.recv(RECORD_SIZE)).status == 0
        again.close()
        accepted.close()
    refused = device.connect(701, 2, 5000)
    assert Record.decode(refused.recv(RECORD_SIZE)).status == errno.ECONNRESET
    refused.close()


def test_the_device_gets_larger_buffer_sizes_of_listeners(
    private_fabric: PrivateFabric, device: Device
) -> None:
    with vsockets.create_server((2, 5000), context=private_fabric.host) as server:
        sock = device.connect(700, 2, 5000)
        accepted, _ = server.accept()
        _enlarge(accepted, 1 << 20)
        assert device.told() == (700, (2, 5000), 1 << 20)
        # One that is large already when the guest connects.
        _enlarge(server, 1 << 21)
        wait_until(
            lambda: (1 << 21) in {row["buffer"] for row in private_fabric.control.sockets()},
            "vsockd to know the listener's buffer",
        )
        other = device.connect(701, 2, 5000)
        assert device.told() == (701, (2, 5000), 1 << 21)
        other.close()
        accepted.close()
        sock.close()


def test_the_device_gets_larger_buffer_sizes_of_clients(
    private_fabric: PrivateFabric, device: Device
) -> None:
    with vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host) as sock:
        with _connecting(sock, device.cid, False) as connected:
            offer, stream = device.accept()
            assert connected() == 0
        _enlarge(sock, 1 << 20)
        assert device.told() == (80, offer.peer, 1 << 20)
        stream.close()


def _enlarge(sock: vsockets.socket, size: int) -> None:
    for option in (SO_VM_SOCKETS_BUFFER_MAX_SIZE, SO_VM_SOCKETS_BUFFER_SIZE):
        sock.setsockopt(AF_VSOCK, option, size)


def test_a_stream_to_the_guest(private_fabric: PrivateFabric, device: Device) -> None:
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    sock.setblocking(False)
    assert sock.connect_ex((device.cid, 80)) == errno.EINPROGRESS
    offer, stream = device.offer()
    assert offer.local == (device.cid, 80) and offer.flags & RequestFlag.POLLING
    assert (offer.size, offer.minimum, offer.maximum) == SIZES
    assert offer.pid == os.getpid()
    stream.send(Record(0, 0, *offer.peer, *offer.local, Role.CONNECTED, 1, 2, 3, *SIZES).encode())
    stream.recv(3072)
    device.settle(offer, size=4096)
    stream.send(b"hello")
    sock.settimeout(10)
    assert sock.recv(5) == b"hello"
    rows = private_fabric.control.sockets()
    assert {row["buffer"] for row in rows if row["state"] == "established"} == {4096}
    sock.close()
    stream.close()


def test_the_guest_refuses_a_stream(private_fabric: PrivateFabric, device: Device) -> None:
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    sock.setblocking(False)
    sock.connect_ex((device.cid, 80))
    offer, stream = device.offer()
    stream.send(Record(errno.ECONNRESET).encode())
    stream.recv(3072)
    device.settle(offer, errno.ECONNRESET)
    stream.close()
    wait_until(lambda: _error(sock) == errno.ECONNRESET, "the connect to fail")
    wait_until(lambda: not private_fabric.control.status()["streams"], "the stream to be forgotten")
    sock.close()


def _error(sock: vsockets.socket) -> int:
    return int(sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("polling", [False, True], ids=["blocking", "polling"])
def test_a_refused_client_retries_on_the_same_socket(
    private_fabric: PrivateFabric, device: Device, bound: bool, polling: bool
) -> None:
    before = descriptors(private_fabric.pid)
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    if bound:
        sock.bind((2, 6000))
    for _ in range(3):  # of one that did not wait for its failure Linux makes no stream
        with _connecting(sock, device.cid, False) as connected:
            device.refuse()
            assert connected() == errno.ECONNRESET
    with _connecting(sock, device.cid, polling) as connected:
        offer, stream = device.accept()
        assert connected() == 0
    assert (offer.peer_port == 6000) == bound
    assert sock.getsockname() == offer.peer
    sock.setblocking(True)
    sock.send(b"hello")
    assert stream.recv(5) == b"hello"
    # vsockd is out of it: each end sees the end of the other.
    stream.close()
    assert sock.recv(1) == b""
    sock.close()
    wait_until(lambda: not private_fabric.control.status()["streams"], "the stream to be forgotten")
    wait_until(lambda: descriptors(private_fabric.pid) <= before, "no descriptor left behind")


@contextlib.contextmanager
def _connecting(sock: vsockets.socket, cid: int, polling: bool) -> Iterator[Callable[[], int]]:
    """Connect to port 80 in the background; yield a function that waits for the result."""
    if polling:
        sock.setblocking(False)
        assert sock.connect_ex((cid, 80)) == errno.EINPROGRESS

        def ended() -> int:
            assert select.select([], [sock], [], 10)[1]
            return _error(sock)

        yield ended
    else:
        with ThreadPoolExecutor() as threads:
            yield threads.submit(sock.connect_ex, (cid, 80)).result


def test_a_refused_socket_keeps_its_port(private_fabric: PrivateFabric, device: Device) -> None:
    with vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host) as sock:
        sock.bind((2, 6000))
        with _connecting(sock, device.cid, False) as connected:
            device.refuse()
            assert connected() == errno.ECONNRESET
        wait_until(
            lambda: [row["state"] for row in private_fabric.control.sockets()] == ["bound"],
            "the socket to be bound again",
        )
        with (
            vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host) as other,
            pytest.raises(OSError) as refused,
        ):
            other.bind((2, 6000))
        assert refused.value.errno == errno.EADDRINUSE
    wait_until(lambda: not private_fabric.control.sockets(), "the port to be free")


def test_a_reused_port_waits_for_the_outcome_of_its_last_connect(
    private_fabric: PrivateFabric, device: Device
) -> None:
    """The device's report would end the second stream, or complete it before the guest does."""
    first = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    first.bind((2, 6000))
    with _connecting(first, device.cid, False) as connected:
        offer, stream = device.offer()
        private_fabric.control.migrate(device.cid)
        stream.close()
        assert connected() != 0
    first.close()
    second = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    wait_until(lambda: _binds(second, 6000), "the port to be free")
    assert second.connect_ex((device.cid, 80)) == errno.ECONNRESET
    device.settle(offer, errno.ECONNRESET)
    # vsockd has read the report when it replies to what came after it.
    with device.connect(700, 2, 9) as next_request:
        assert Record.decode(next_request.recv(RECORD_SIZE)).status == errno.ECONNRESET
    with _connecting(second, device.cid, False) as connected:
        _, stream = device.accept()
        assert connected() == 0
    third = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    assert not _binds(third, 6000)
    third.close()
    stream.close()
    second.close()


def test_a_port_is_not_assigned_while_its_last_connect_has_no_outcome(
    private_fabric: PrivateFabric, device: Device
) -> None:
    """The report on the last connect would be taken for one on the next."""
    with vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host) as last:
        last.bind((2, VMADDR_PORT_ANY))
        following = last.getsockname()[1] + 1
    first = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    first.bind((2, following))
    with _connecting(first, device.cid, False) as connected:
        earlier, stream = device.offer()
        private_fabric.control.migrate(device.cid)
        stream.close()
        assert connected() != 0
    first.close()
    second = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    with _connecting(second, device.cid, False) as connected:
        offer, stream = device.offer()
        assert offer.peer[1] not in (following, VMADDR_PORT_ANY)
        device.settle(earlier, errno.ECONNRESET)
        stream.send(Record(0, 0, *offer.peer, *offer.local, Role.CONNECTED, 0, 0, 0).encode())
        device.settle(offer)
        assert connected() == 0
    stream.close()
    second.close()
    wait_until(lambda: not _pending(private_fabric), "both reports to be read")


def _pending(fabric: PrivateFabric) -> int:
    (host,) = (row for row in fabric.control.contexts() if row["cid"] == 2)
    return int(host["usage"]["pending_connects"])


def test_a_connect_that_a_full_link_refuses_leaves_the_socket_bound(
    private_fabric: PrivateFabric, device: Device
) -> None:
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    sock.bind((2, 6000))
    waiting: list[vsockets.socket] = []
    while not select.select([], waiting, [], 0)[1]:  # the device reads nothing
        other = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
        waiting.append(other)
        other.setblocking(False)
        assert other.connect_ex((device.cid, 80)) == errno.EINPROGRESS
    assert sock.connect_ex((device.cid, 80)) == errno.ENOBUFS
    assert sock.getsockname() == (2, 6000)
    held = [row for row in private_fabric.control.sockets() if row["port"] == 6000]
    assert [row["state"] for row in held] == ["bound"]
    for other in waiting:
        other.close()
    while select.select([device.link], [], [], 0)[0]:
        device.offer()[1].close()
    with _connecting(sock, device.cid, False) as connected:
        _, stream = device.accept()
        assert connected() == 0 and sock.getsockname() == (2, 6000)
    stream.close()
    sock.close()


def _binds(sock: vsockets.socket, port: int) -> bool:
    try:
        sock.bind((2, port))
    except OSError:
        return False
    return True


def test_a_refused_socket_is_for_that_guest_only(
    private_fabric: PrivateFabric, device: Device
) -> None:
    """The refusing device may have kept a duplicate, and could use a stream to another guest."""
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    with _connecting(sock, device.cid, False) as connected:
        device.refuse()
        assert connected() == errno.ECONNRESET
    with vsockets.create_server((2, 5000), context=private_fabric.host):
        assert sock.connect_ex((2, 5000)) == errno.ECONNRESET
    with _connecting(sock, device.cid, False) as connected:
        _, stream = device.accept()
        assert connected() == 0
    stream.close()
    sock.close()


def test_another_socket_is_not_taken_for_the_refused_one(
    private_fabric: PrivateFabric, device: Device
) -> None:
    """A device cannot act as a program of the host."""
    ours, theirs = socket.socketpair()
    ours.settimeout(10)
    sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
    with ours, sock:
        with theirs, _connecting(sock, device.cid, False) as connected:
            device.refuse(theirs)
            assert connected() == errno.ECONNRESET
        assert ours.recv(1) == b""
        with pytest.raises(OSError):
            sock.connect((device.cid, 80))


def test_a_guest_without_seqpacket_refuses_it(
    private_fabric: PrivateFabric, device: Device
) -> None:
    with (
        vsockets.socket(AF_VSOCK, socket.SOCK_SEQPACKET, context=private_fabric.host) as sock,
        pytest.raises(ConnectionResetError),
    ):
        sock.connect((device.cid, 80))


def test_listeners_of_programs_take_precedence_over_the_device(
    private_fabric: PrivateFabric, device: Device
) -> None:
    context = Attachment(private_fabric.folder / str(device.cid))
    with (
        vsockets.create_server((device.cid, 5000), context=context) as server,
        vsockets.create_connection((device.cid, 5000), context=private_fabric.host) as sock,
    ):
        server.accept()[0].close()
        assert sock.recv(1) == b""


def test_datagrams_to_every_port(private_fabric: PrivateFabric, device: Device) -> None:
    host = vsockets.socket(AF_VSOCK, socket.SOCK_DGRAM, context=private_fabric.host)
    host.bind((2, 600 if os.geteuid() == 0 else 6000))
    with pytest.raises(ConnectionRefusedError):
        host.sendto(b"x", (device.cid, 9))
    everything = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    everything.settimeout(10)
    channel = device.hand_over(socket.SOCK_SEQPACKET)
    socket.send_fds(channel, [Request(Op.CATCH_ALL).encode()], [everything.fileno()])
    assert Record.decode(channel.recv(RECORD_SIZE)).status == 0
    channel.close()
    for port in (9, 1_000_000):
        host.sendto(b"hello", (device.cid, port))
        data, name = everything.recvfrom(100)
        assert data == b"hello"
        assert decode_route(name) == (host.getsockname(), port)
    private_fabric.control.suspend(device.cid)
    with pytest.raises(OSError):
        host.sendto(b"x", (device.cid, 9))
    everything.close()
    host.close()


def test_programs_may_not_send_device_requests(private_fabric: PrivateFabric) -> None:
    guest = private_fabric.guest()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.settimeout(10)
        sock.connect(os.fspath(guest.folder / "seqpacket"))
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            socket.send_fds(sock, [Request(Op.CATCH_ALL).encode()], [other.fileno()])
            assert has_ended(sock)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(10)
        sock.connect(os.fspath(guest.folder / "stream"))
        sock.send(Request(Op.SETTLE, 0, guest.cid, 80, 2, 5000, 0, 4096).encode())
        assert has_ended(sock)


def test_a_hostile_device(private_fabric: PrivateFabric) -> None:
    """A hostile device affects no other client, and leaves nothing behind."""
    guest = private_fabric.guest()
    before = descriptors(private_fabric.pid)
    for nasty in range(5):
        device = Device(private_fabric, guest)
        if nasty == 0:
            device.link.send(b"garbage")
        elif nasty == 1:
            device.link.send(Request(Op.SETTLE, 0, guest.cid, 1, 2, 2, 0, 5).encode())
            device.link.send(Request(Op.BIND).encode())
        elif nasty == 2:
            with open(os.devnull) as file:
                socket.send_fds(device.link, [b"\0"], [file.fileno()])
            with socket.socket(socket.AF_INET) as sock:
                socket.send_fds(device.link, [b"\0"], [sock.fileno()])
        elif nasty == 3:
            for _ in range(100):
                device.hand_over(socket.SOCK_STREAM).close()
                silent = device.hand_over(socket.SOCK_SEQPACKET)
                silent.send(b"no request")
                silent.close()
        else:
            sock = vsockets.socket(AF_VSOCK, socket.SOCK_STREAM, context=private_fabric.host)
            sock.setblocking(False)
            sock.connect_ex((guest.cid, 80))
            device.offer()[1].close()
            sock.close()
        device.link.close()
        wait_until(lambda: _attaches(private_fabric, guest.cid), "the device to be detached")
    assert_serves(private_fabric)
    wait_until(lambda: descriptors(private_fabric.pid) <= before, "no descriptor left behind")


def test_removing_a_context_detaches_its_device(
    private_fabric: PrivateFabric, device: Device
) -> None:
    private_fabric.control.power_off(device.cid)
    assert device.link.recv(1) == b""
