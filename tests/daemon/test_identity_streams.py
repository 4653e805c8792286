"""A stream shows its true client: attacks by that client.

Every test is one attack by a program of guest 3 that talks to vsockd without the library, on a
server of the host; the address that the server gets must be true.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

import vsockets
from vsockets import VMADDR_CID_LOCAL, Attachment
from vsockets.protocol import Op, Record, Request, Role
from vsockets.testing import PrivateFabric

from .raw_client import (
    GUEST,
    SOCKET_TYPES,
    ask,
    ask_once,
    bind,
    connect,
    cookie_of,
    enter,
    guest_of,
    has_ended,
    listen,
)

both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)


@pytest.fixture
def guest(shared_fabric: PrivateFabric) -> Attachment:
    return guest_of(shared_fabric)


@pytest.fixture
def server(shared_fabric: PrivateFabric) -> Iterator[vsockets.socket]:
    """Yield the host's service on port 5000."""
    with vsockets.create_server((2, 5000), context=shared_fabric.host) as server:
        yield server


def source_seen_by(server: vsockets.socket) -> tuple[int, int]:
    accepted, source = server.accept()
    with accepted:
        assert accepted.getpeername() == source
        assert accepted.peer_credentials().pid == os.getpid()
    return source


# Contents of requests


@pytest.mark.parametrize("cid", [0, 2, 4, VMADDR_CID_LOCAL])
def test_another_cid_in_a_connect(guest: Attachment, server: vsockets.socket, cid: int) -> None:
    """The field exists and is not used."""
    with enter(guest) as client:
        answer = ask(client, connect(2, 5000)._replace(local_cid=cid, local_port=700))
        assert answer.local_cid == GUEST and answer.local_port >= 1024
        assert source_seen_by(server) == answer.local


@both_types
@pytest.mark.parametrize("cid", [0, 2, 4])
def test_another_cid_in_a_bind(
    guest: Attachment, server: vsockets.socket, sock_type: int, cid: int
) -> None:
    request = bind(6000)._replace(local_cid=cid)
    assert ask_once(guest, request, sock_type).status == errno.EADDRNOTAVAIL


def test_the_local_cid_as_the_source(guest: Attachment, server: vsockets.socket) -> None:
    """To the host, CID 1 is the host."""
    with enter(guest) as client:
        assert ask(client, bind(6000)._replace(local_cid=VMADDR_CID_LOCAL)).local == (1, 6000)
        assert ask(client, connect(2, 5000)).status == errno.EHOSTUNREACH


def test_another_port_once_bound(guest: Attachment, server: vsockets.socket) -> None:
    with enter(guest) as client:
        assert ask(client, bind(6000)).status == 0
        request = connect(2, 5000)._replace(local_cid=2, local_port=6001)
        assert ask(client, request).local == (GUEST, 6000)
        assert source_seen_by(server) == (GUEST, 6000)


@both_types
def test_a_port_of_another_program(
    guest: Attachment, server: vsockets.socket, sock_type: int
) -> None:
    """A port may be bound, listening, or a connection's, for any type of socket."""
    with enter(guest) as bound, enter(guest) as listening, enter(guest) as client:
        assert ask(bound, bind(6000)).status == 0
        assert ask(listening, bind(6001)).status == 0
        assert ask(listening, listen()).status == 0
        port = ask(client, connect(2, 5000)).local_port
        for held in (6000, 6001, port):
            assert ask_once(guest, bind(held), sock_type).status == errno.EADDRINUSE
        assert source_seen_by(server) == (GUEST, port)


def test_replayed_requests(guest: Attachment, server: vsockets.socket) -> None:
    """Another client's bytes are the request of the process that sends them."""
    requests = [bind(6000, cookie=77), connect(2, 5000)._replace(cookie=77)]
    with enter(guest) as first, enter(guest) as second:
        assert [ask(first, request).status for request in requests] == [0, 0]
        assert ask(second, requests[0]).status == errno.EADDRINUSE
        replayed = ask(second, requests[1])
        assert replayed.local_cid == GUEST and replayed.local_port != 6000
        assert source_seen_by(server) == (GUEST, 6000)
        assert source_seen_by(server) == replayed.local


def test_a_second_connect_behind_the_first(guest: Attachment, server: vsockets.socket) -> None:
    """Bytes after a CONNECT are data of the stream, even if they form a request or record."""
    more = connect(2, 5000).encode() + Record(0, 0, 2, 5000, 0, 1, Role.CONNECTED).encode()
    with enter(guest) as client:
        client.sendall(connect(2, 5000).encode() + more)
        accepted, source = server.accept()
        with accepted:
            assert source[0] == GUEST
            accepted.settimeout(10)
            assert accepted.recv(1000) == more
            assert accepted.getpeername() == source


def test_a_listening_connection_cannot_announce(
    shared_fabric: PrivateFabric, guest: Attachment, server: vsockets.socket
) -> None:
    """A listener's writes to vsockd reach no other listener."""
    lie = Record(0, 0, 2, 5000, 0, 1, Role.CONNECTED).encode()
    with enter(guest) as listening:
        assert ask(listening, bind(6000)).status == 0
        assert ask(listening, listen()).status == 0
        listening.sendall(lie)
        assert has_ended(listening)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


# Names for sockets


@pytest.mark.parametrize("by", ["cookie", "inode", "both"])
def test_the_names_of_a_stream_of_the_host(
    shared_fabric: PrivateFabric, guest: Attachment, server: vsockets.socket, by: str
) -> None:
    """A guest learns nothing about the host's sockets by guessing cookies and inodes."""
    with vsockets.create_connection((2, 5000), context=shared_fabric.host) as client:
        accepted, _ = server.accept()
        with accepted:
            for sock in (client, accepted, server):
                cookie = cookie_of(sock) if by != "inode" else 0
                inode = os.fstat(sock.fileno()).st_ino if by != "cookie" else 0
                request = Request(Op.QUERY, cookie=cookie, inode=inode)
                assert ask_once(guest, request).status == errno.ENOTCONN


def test_a_cookie_claimed_before_its_socket_was_accepted(
    shared_fabric: PrivateFabric, guest: Attachment, server: vsockets.socket
) -> None:
    """Another program of the host cannot register a server's connection as its own."""
    with (
        vsockets.create_connection((2, 5000), context=guest) as client,
        enter(shared_fabric.host) as liar,
    ):
        accepted, _ = server.accept()
        with accepted:
            assert ask(liar, bind(4000, cookie=cookie_of(accepted))).status == 0
            # As a program does that inherits it.
            with vsockets.socket(
                fileno=os.dup(accepted.fileno()), context=shared_fabric.host
            ) as inherited:
                assert inherited.getpeername() == client.getsockname()
                assert inherited.getsockname() == (2, 5000)


# Ports that are reassigned


def test_the_port_of_a_stream_that_has_ended(guest: Attachment, server: vsockets.socket) -> None:
    """A new holder of the port is distinct from it: a server's old stream belongs to neither."""
    with enter(guest) as first:
        assert ask(first, bind(6000)).status == 0
        assert ask(first, connect(2, 5000)).status == 0
        old, source = server.accept()
    with old, enter(guest) as second:
        assert ask(second, bind(6000)).status == 0
        assert ask(second, connect(2, 5000)).local == source
        assert old.recv(10) == b""
        with pytest.raises(BrokenPipeError):
            old.send(b"x")
        assert source_seen_by(server) == source
