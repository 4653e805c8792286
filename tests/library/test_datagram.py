"""Datagrams (the guide's chapter 4)."""

from __future__ import annotations

import errno
import os
import socket as stdlib
from collections.abc import Iterator
from typing import Any

import pytest

import vsockets
from vsockets import MAX_DATAGRAM, VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL
from vsockets.limits import DATAGRAM_ROUTES_MAX
from vsockets.testing import PrivateFabric

from .conftest import ANY, running


def datagram(
    context: vsockets.Attachment, address: tuple[int, int] | None = None
) -> vsockets.socket:
    sock = vsockets.socket(type=stdlib.SOCK_DGRAM, context=context)
    sock.settimeout(10)
    if address is not None:
        sock.bind(address)
    return sock


@pytest.fixture
def server(host: vsockets.Attachment) -> Iterator[vsockets.socket]:
    with datagram(host, ANY) as sock:
        yield sock


@pytest.fixture
def client(guest: vsockets.Attachment) -> Iterator[vsockets.socket]:
    with datagram(guest) as sock:
        yield sock


def errno_of(call: Any, *arguments: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def test_datagrams_in_both_directions_by_address(
    server: vsockets.socket, client: vsockets.socket, guest: vsockets.Attachment
) -> None:
    assert server.getsockname()[0] == VMADDR_CID_HOST
    assert server.getsockname()[1] >= 1024
    assert client.sendto(b"question", server.getsockname()) == 8
    data, source = server.recvfrom(100)
    assert data == b"question"
    assert source == client.getsockname()
    assert source[0] == guest.cid
    server.sendto(b"answer", 0, source)
    assert client.recvfrom(100) == (b"answer", server.getsockname())


def test_connect_and_send(server: vsockets.socket, client: vsockets.socket) -> None:
    client.connect(server.getsockname())
    assert client.getpeername() == server.getsockname()
    assert client.getsockname() != ANY
    for _ in range(3):
        client.send(b"x")
        assert server.recvfrom(10) == (b"x", client.getsockname())
    client.sendall(b"y")
    assert client.sendmsg([b"a", b"b"]) == 2
    assert server.recv(10) == b"y"
    data, _, flags, source = server.recvmsg(10)
    assert (data, flags, source) == (b"ab", 0, client.getsockname())


def test_all_receive_calls(server: vsockets.socket, client: vsockets.socket) -> None:
    client.bind(ANY)
    me = client.getsockname()
    for _ in range(5):
        client.sendto(b"12345", server.getsockname())
    buffer = bytearray(10)
    assert server.recv_into(buffer) == 5
    assert server.recvfrom_into(buffer) == (5, me)
    assert server.recvmsg_into([buffer]) == (5, [], 0, me)
    data, _, flags, source = server.recvmsg(3)
    assert (data, source) == (b"123", me)
    assert flags & stdlib.MSG_TRUNC
    assert server.recvfrom(10, stdlib.MSG_PEEK) == (b"12345", me)
    assert server.recvfrom(10) == (b"12345", me)
    client.sendmsg([b"6", b"7"], [], 0, server.getsockname())
    assert server.recvfrom(10) == (b"67", me)


@pytest.mark.parametrize("size", [0, 1, 1472, 4096, 65507, MAX_DATAGRAM])
def test_sizes(server: vsockets.socket, client: vsockets.socket, size: int) -> None:
    data = os.urandom(size)
    client.sendto(data, server.getsockname())
    assert server.recv(MAX_DATAGRAM + 1) == data


def test_too_large(server: vsockets.socket, client: vsockets.socket) -> None:
    assert MAX_DATAGRAM == 69_608
    for data in (bytes(MAX_DATAGRAM + 1), memoryview(bytearray(2 * MAX_DATAGRAM)).cast("Q")):
        assert errno_of(client.sendto, data, server.getsockname()) == errno.EMSGSIZE
    client.sendto(b"still works", server.getsockname())
    assert server.recv(100) == b"still works"


def test_closed_port_refuses_datagrams(
    client: vsockets.socket, host: vsockets.Attachment, server: vsockets.socket
) -> None:
    address = server.getsockname()
    client.sendto(b"before", address)
    server.close()
    assert errno_of(client.sendto, b"after", address) == errno.ECONNREFUSED
    assert errno_of(client.sendto, b"x", (VMADDR_CID_HOST, 9)) == errno.ECONNREFUSED
    # Another socket takes the port: the old route must not be used.
    with datagram(host, address) as successor:
        client.sendto(b"again", address)
        assert successor.recvfrom(100) == (b"again", client.getsockname())


def test_guests_cannot_reach_each_other(
    vsock_fabric: PrivateFabric, client: vsockets.socket
) -> None:
    other = vsock_fabric.guest()
    with datagram(other, ANY) as sock:
        assert errno_of(client.sendto, b"x", sock.getsockname()) == errno.EHOSTUNREACH
        assert errno_of(client.sendto, b"x", (99, 5)) == errno.EHOSTUNREACH


def test_each_sender_has_its_own_address(
    server: vsockets.socket, vsock_fabric: PrivateFabric
) -> None:
    senders = [datagram(vsock_fabric.guest()) for _ in range(5)]
    for number, sender in enumerate(senders):
        sender.sendto(b"%d" % number, server.getsockname())
    for number, sender in enumerate(senders):
        assert server.recvfrom(10) == (b"%d" % number, sender.getsockname())
        sender.close()


def test_binding(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with datagram(guest, (VMADDR_CID_ANY, 5000)) as first, datagram(guest) as second:
        assert first.getsockname() == (guest.cid, 5000)
        assert errno_of(second.bind, (VMADDR_CID_ANY, 5000)) == errno.EADDRINUSE
        assert errno_of(second.bind, (VMADDR_CID_HOST, 5001)) == errno.EADDRNOTAVAIL
        assert errno_of(first.bind, (VMADDR_CID_ANY, 5002)) == errno.EINVAL
        with vsockets.socket(context=guest) as stream:  # streams have their own ports
            stream.bind((VMADDR_CID_ANY, 5000))
        first.close()
        second.bind((VMADDR_CID_ANY, 5000))
    with datagram(host, (VMADDR_CID_LOCAL, 5000)) as local, datagram(guest) as outsider:
        assert errno_of(outsider.sendto, b"x", (VMADDR_CID_HOST, 5000)) == errno.ECONNREFUSED
        with datagram(host) as insider:
            insider.sendto(b"x", (VMADDR_CID_LOCAL, 5000))
            assert local.recv(5) == b"x"


def test_calls_for_streams_only(client: vsockets.socket) -> None:
    assert errno_of(client.listen) == errno.EOPNOTSUPP
    assert errno_of(client.accept) == errno.EOPNOTSUPP
    assert errno_of(client.send, b"no address") == errno.EINVAL
    assert errno_of(client.getpeername) == errno.ENOTCONN
    assert errno_of(client.shutdown, stdlib.SHUT_WR) == errno.ENOTCONN


def test_full_receiver(server: vsockets.socket, client: vsockets.socket) -> None:
    client.setblocking(False)
    sent = 0
    with pytest.raises(OSError) as caught:
        while True:
            client.sendto(b"%d" % sent, server.getsockname())
            sent += 1
    assert caught.value.errno == errno.ENOBUFS
    assert [server.recv(10) for _ in range(sent)] == [b"%d" % number for number in range(sent)]
    client.settimeout(0.01)
    with pytest.raises(TimeoutError):
        for _ in range(sent + 1):
            client.sendto(b"x", server.getsockname())


def test_blocking_sender_waits_without_loss(
    server: vsockets.socket, client: vsockets.socket
) -> None:
    def send() -> None:
        for number in range(2000):
            client.sendto(b"%d" % number, server.getsockname())

    with running(send):
        assert [server.recv(10) for _ in range(2000)] == [b"%d" % n for n in range(2000)]


def test_shutdown(server: vsockets.socket, client: vsockets.socket) -> None:
    client.connect(server.getsockname())
    client.send(b"x")
    client.shutdown(stdlib.SHUT_WR)
    # As in Linux: the peer is reset, and sends to an address still work.
    assert errno_of(client.send, b"y") == errno.EINVAL
    assert errno_of(client.getpeername) == errno.ENOTCONN
    client.sendto(b"z", server.getsockname())
    assert [server.recv(10) for _ in range(2)] == [b"x", b"z"]


def test_more_peers_than_cached_routes(
    vsock_fabric: PrivateFabric, host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    count = DATAGRAM_ROUTES_MAX + 20
    with datagram(host, ANY) as server:
        before = len(os.listdir("/proc/self/fd"))
        clients = [datagram(guest) for _ in range(count)]
        for client in clients:
            client.sendto(b"hello", server.getsockname())
            server.sendto(b"hello yourself", server.recvfrom(10)[1])
        for client in clients:
            assert client.recvfrom(20) == (b"hello yourself", server.getsockname())
        for client in reversed(clients):
            server.sendto(b"again", client.getsockname())
            assert client.recv(20) == b"again"
        kept = len(os.listdir("/proc/self/fd")) - before - 2 * count
        assert kept <= DATAGRAM_ROUTES_MAX
        for client in clients:
            client.close()
    assert vsock_fabric.control.status()["datagram_sockets"] == 0


def test_route_is_revoked_with_its_socket(
    host: vsockets.Attachment, guest: vsockets.Attachment, server: vsockets.socket
) -> None:
    """A program that keeps a route cannot send in the name of the port's next owner."""
    with datagram(guest, (VMADDR_CID_ANY, 5000)) as old:
        old.sendto(b"x", server.getsockname())
        assert server.recv(10) == b"x"
        (route,) = vars(old)["_routes"].values()
        kept = route.dup()
    with datagram(guest, (VMADDR_CID_ANY, 5000)), kept:
        assert errno_of(kept.send, b"in another's name") == errno.EPIPE


def test_datagrams_of_two_fabrics(vsock_fabric: PrivateFabric) -> None:
    """Names of routes are shared in a network namespace; those of two fabrics must not collide."""
    with PrivateFabric() as other:
        for fabric in (vsock_fabric, other, vsock_fabric):
            with (
                datagram(fabric.host, (VMADDR_CID_HOST, 5001)) as server,
                datagram(fabric.guest()) as client,
            ):
                for _ in range(3):
                    client.sendto(b"question", server.getsockname())
                    server.sendto(b"answer", server.recvfrom(100)[1])
                    assert client.recv(100) == b"answer"


def test_datagram_socket_is_reachable_by_vsockd_only(
    vsock_fabric: PrivateFabric, server: vsockets.socket
) -> None:
    with stdlib.socket(fileno=os.dup(server.fileno())) as raw:
        name = raw.getsockname()
    with stdlib.socket(stdlib.AF_UNIX, stdlib.SOCK_DGRAM) as forger:
        forger.bind(b"\0vsock:9:9:1")
        for path in (name, f"{vsock_fabric.folder}/private/{name}"):
            with pytest.raises(FileNotFoundError):
                forger.sendto(b"forged", path)
