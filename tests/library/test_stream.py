"""Streams and sequenced packets (the guide's chapter 3)."""

from __future__ import annotations

import errno
import hashlib
import os
import socket as stdlib
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets import VMADDR_CID_ANY, VMADDR_CID_HOST, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from vsockets.testing import PrivateFabric, wait_until

from .conftest import ANY, STREAMS, Pair, running


def errno_of(call: Any, *arguments: Any) -> int | None:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    return caught.value.errno


def test_addresses_are_filled_in(host: vsockets.Attachment) -> None:
    with vsockets.socket(context=host) as sock:
        assert sock.getsockname() == (VMADDR_CID_ANY, VMADDR_PORT_ANY)
        sock.bind(ANY)
        cid, port = sock.getsockname()
        assert cid == VMADDR_CID_HOST
        assert 1024 <= port < VMADDR_PORT_ANY


def test_both_ends_report_both_addresses(pair: Pair, guest: vsockets.Attachment) -> None:
    assert pair.client.getsockname()[0] == guest.cid
    assert pair.client.getsockname()[1] >= 1024
    assert pair.peer == pair.accepted.getpeername() == pair.client.getsockname()
    assert pair.client.getpeername() == pair.accepted.getsockname() == pair.server.getsockname()
    assert pair.client.family == pair.accepted.family == vsockets.AF_VSOCK
    assert pair.client.type == pair.accepted.type == pair.server.type
    assert isinstance(pair.client, vsockets.socket)
    assert isinstance(pair.accepted, stdlib.socket)


def test_credentials_of_the_peer(pair: Pair) -> None:
    mine = (os.getpid(), os.getuid(), os.getgid())
    assert pair.accepted.peer_credentials() == mine
    assert pair.client.peer_credentials() == mine


def test_data_in_both_directions(pair: Pair) -> None:
    pair.client.sendall(b"to the host")
    assert pair.accepted.recv(100) == b"to the host"
    pair.accepted.sendall(b"to the guest")
    buffer = bytearray(100)
    assert pair.client.recv_into(buffer) == 12
    assert buffer[:12] == b"to the guest"
    assert pair.client.sendmsg([b"in ", b"parts"]) == 8
    assert pair.accepted.recvmsg(100) == (b"in parts", [], 0, None)
    pair.client.send(b"again")
    assert pair.accepted.recvfrom(100) == (b"again", None)
    pair.client.send(b"once more")
    into = bytearray(100)
    assert pair.accepted.recvmsg_into([into])[0] == 9
    pair.client.send(b"and")
    assert pair.accepted.recvfrom_into(into) == (3, None)


def test_peek_and_wait_all(stream: Pair) -> None:
    stream.client.sendall(b"0123456789")
    assert stream.accepted.recv(4, stdlib.MSG_PEEK) == b"0123"
    assert stream.accepted.recv(10, stdlib.MSG_WAITALL) == b"0123456789"


def test_message_boundaries_of_sequenced_packets(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    pair = Pair(host, guest, stdlib.SOCK_SEQPACKET)
    sizes = [1, 2, 4096, 1, 16384, 17]
    for size in sizes:
        pair.client.send(bytes(size))
    assert [len(pair.accepted.recv(1 << 17)) for _ in sizes] == sizes
    pair.client.send(bytes(100))
    data, _, flags, _ = pair.accepted.recvmsg(10)
    assert len(data) == 10
    assert flags & stdlib.MSG_TRUNC
    pair.close()


def test_half_close(pair: Pair) -> None:
    pair.client.sendall(b"the last word")
    pair.client.shutdown(stdlib.SHUT_WR)
    assert pair.accepted.recv(100) == b"the last word"
    assert pair.accepted.recv(100) == b""
    pair.accepted.sendall(b"an answer all the same")
    pair.accepted.close()
    assert pair.client.recv(100) == b"an answer all the same"
    assert pair.client.recv(100) == b""
    assert errno_of(pair.client.send, b"x") == errno.EPIPE


def test_close_is_end_of_file_for_the_peer(pair: Pair) -> None:
    pair.client.close()
    assert pair.accepted.recv(1) == b""
    assert errno_of(pair.accepted.send, b"x") in (errno.EPIPE, errno.ECONNRESET)


def test_megabytes_arrive_complete(stream: Pair) -> None:
    data = os.urandom(1 << 20) * 16
    digest = hashlib.sha256()

    def receive() -> None:
        while chunk := stream.accepted.recv(1 << 16):
            digest.update(chunk)

    with running(receive):
        stream.client.sendall(data)
        stream.client.shutdown(stdlib.SHUT_WR)
    assert digest.digest() == hashlib.sha256(data).digest()


def test_sendfile_and_makefile(stream: Pair, tmp_path: Path) -> None:
    content = b"a line\n" * 5000
    path = tmp_path / "file"
    path.write_bytes(content)

    def send() -> None:
        with path.open("rb") as file:
            assert stream.client.sendfile(file) == len(content)
        stream.client.shutdown(stdlib.SHUT_WR)

    with running(send), stream.accepted.makefile("rb") as lines:
        assert list(lines) == [b"a line\n"] * 5000
    with stream.accepted.makefile("w") as writer:
        writer.write("text, too\n")
        writer.flush()
    with stream.client.makefile("r") as reader:
        assert reader.readline() == "text, too\n"


@pytest.mark.parametrize("sock_type", STREAMS)
def test_connect_from_a_bound_port_twice(
    host: vsockets.Attachment, guest: vsockets.Attachment, sock_type: int
) -> None:
    with vsockets.create_server(ANY, type=sock_type, context=host) as server:
        for _ in range(20):
            with vsockets.socket(type=sock_type, context=guest) as client:
                client.bind((VMADDR_CID_ANY, 7777))
                client.connect(server.getsockname())
                accepted, peer = server.accept()
                assert peer == (guest.cid, 7777)
                accepted.close()


def test_bound_port_is_held_while_connected(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with (
        vsockets.create_server(ANY, context=host) as server,
        vsockets.socket(context=guest) as client,
        vsockets.socket(context=guest) as rival,
    ):
        client.bind((VMADDR_CID_ANY, 7777))
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        assert errno_of(rival.bind, (VMADDR_CID_ANY, 7777)) == errno.EADDRINUSE
        client.close()
        rival.bind((VMADDR_CID_ANY, 7777))
        accepted.close()


def test_refused_socket_can_connect(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with vsockets.socket(context=host) as server, vsockets.socket(context=guest) as client:
        server.bind(ANY)
        assert errno_of(client.connect, server.getsockname()) == errno.ECONNRESET
        assert client.connect_ex(server.getsockname()) == errno.ECONNRESET
        server.listen()
        client.connect(server.getsockname())
        assert client.getpeername() == server.getsockname()


def test_closed_listener_refuses_at_once(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    for _ in range(50):
        server = vsockets.create_server(ANY, context=host)
        address = server.getsockname()
        server.close()
        with vsockets.socket(context=guest) as client:
            assert errno_of(client.connect, address) == errno.ECONNRESET


def test_backlog(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    def connect() -> vsockets.socket:
        return vsockets.create_connection(server.getsockname(), context=guest)

    with vsockets.create_server(ANY, backlog=3, context=host) as server:
        waiting = [connect() for _ in range(4)]  # Linux accepts one more than the backlog
        for _ in range(3):
            assert errno_of(connect) == errno.ECONNRESET
        server.accept()[0].close()
        waiting.append(connect())
        assert errno_of(connect) == errno.ECONNRESET
        server.listen(10)
        waiting += [wait_until(lambda: _try(connect), "room in the backlog") for _ in range(3)]
        for sock in waiting:
            sock.close()


def _try(connect: Any) -> Any:
    try:
        return connect()
    except ConnectionResetError:
        return None


def test_unaccepted_streams_cost_vsockd_nothing(
    vsock_fabric: PrivateFabric, guest: vsockets.Attachment
) -> None:
    with vsockets.create_server(ANY, backlog=8, context=vsock_fabric.host) as server:
        clients = [
            vsockets.create_connection(server.getsockname(), context=guest) for _ in range(9)
        ]
        before = vsock_fabric.control.status()["descriptors"]
        for _ in range(300):
            with vsockets.socket(context=guest) as client:
                assert client.connect_ex(server.getsockname()) == errno.ECONNRESET
        wait_until(
            lambda: vsock_fabric.control.status()["descriptors"] <= before, "descriptors given back"
        )
        for client in clients:
            client.close()


def test_unreachable_contexts(vsock_fabric: PrivateFabric, guest: vsockets.Attachment) -> None:
    other = vsock_fabric.guest()
    with (
        vsockets.create_server(ANY, context=other) as server,
        vsockets.socket(context=guest) as client,
    ):
        # A guest cannot tell another guest from a missing one: the errno is the same.
        assert errno_of(client.connect, server.getsockname()) == errno.EHOSTUNREACH
        assert errno_of(client.connect, (99, 1)) == errno.EHOSTUNREACH
        with vsockets.create_connection(server.getsockname(), context=vsock_fabric.host) as sock:
            assert sock.getpeername() == (other.cid, server.getsockname()[1])


def test_connect_to_the_own_and_the_local_cid(guest: vsockets.Attachment) -> None:
    with vsockets.create_server(ANY, context=guest) as server:
        port = server.getsockname()[1]
        for cid in (guest.cid, VMADDR_CID_LOCAL):
            with vsockets.create_connection((cid, port), context=guest) as client:
                accepted, peer = server.accept()
                assert peer[0] == guest.cid
                assert client.getpeername() == (guest.cid, port)
                accepted.close()


def test_local_cid_is_reachable_from_its_context_only(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with vsockets.create_server((VMADDR_CID_LOCAL, VMADDR_PORT_ANY), context=guest) as server:
        cid, port = server.getsockname()
        assert cid == VMADDR_CID_LOCAL
        vsockets.create_connection((VMADDR_CID_LOCAL, port), context=guest).close()
        with vsockets.socket(context=host) as outsider:
            assert errno_of(outsider.connect, (guest.cid, port)) == errno.ECONNRESET


def test_types_cannot_be_mixed(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with (
        vsockets.create_server(ANY, type=stdlib.SOCK_SEQPACKET, context=host) as server,
        vsockets.socket(context=guest) as client,
    ):
        assert errno_of(client.connect, server.getsockname()) == errno.ECONNRESET


def test_socketpair(host: vsockets.Attachment) -> None:
    for sock_type in STREAMS:
        one, other = vsockets.socketpair(sock_type, context=host)
        with one, other:
            one.send(b"hello")
            assert other.recv(10) == b"hello"


def test_hundred_connections_at_once(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    with vsockets.create_server(ANY, backlog=100, context=host) as server:
        clients = [
            vsockets.create_connection(server.getsockname(), context=guest) for _ in range(100)
        ]
        arrivals = [server.accept() for _ in clients]
        accepted = {peer: sock for sock, peer in arrivals}
        assert len({client.getsockname() for client in clients}) == 100
        for number, client in enumerate(clients):
            client.send(b"%d" % number)
        for number, client in enumerate(clients):
            assert accepted[client.getsockname()].recv(10) == b"%d" % number
        for sock in [*clients, *accepted.values()]:
            sock.close()


def test_sockets_are_not_inherited_by_default(pair: Pair) -> None:
    for sock in (pair.server, pair.client, pair.accepted):
        assert not sock.get_inheritable()
