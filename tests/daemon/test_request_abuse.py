"""Requests that are malformed, out of order or out of range harm only their sender.

Each test's fixture also checks that others are served promptly, during the abuse and after it, that
vsockd has no more descriptors at the end than at the start, and that it logs no error.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket

import pytest

from vsockets.daemon.limits import DAEMON_UNREAD_REPLIES_MAX
from vsockets.protocol import (
    PADDING,
    RECORD_SIZE,
    REQUEST_SIZE,
    Op,
    Record,
    Request,
    RequestFlag,
    Role,
)
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    ANY,
    LOCAL_CID,
    PROMPT,
    SIZES,
    SOCKET_TYPES,
    ask,
    ask_once,
    assert_serves,
    bind,
    bind_datagram,
    connect,
    enter,
    guest_of,
    has_ended,
    listen,
    paused,
    route,
)

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)

WRONG_MAGIC = b"vsk\x02"[::-1] + LOCAL_CID.encode()[4:]
MALFORMED = {
    "one byte": b"\x01",
    "a byte short": LOCAL_CID.encode()[:-1],
    "zeros": bytes(REQUEST_SIZE),
    "ones": b"\xff" * REQUEST_SIZE,
    "text": b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n".ljust(REQUEST_SIZE),
    "wrong magic": WRONG_MAGIC,
    "operation 0": Request(0).encode(),
    "unknown operation": Request(9).encode(),
    "operation 65535": Request(65535).encode(),
    "a record": Record(0, 0, 2, 5000).encode(),
}


# Malformed requests


@both_types
@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_request(shared_fabric: PrivateFabric, sock_type: int, what: str) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        sock.send(MALFORMED[what])
        assert has_ended(sock)


@both_types
def test_malformed_request_after_a_good_one(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        assert ask(sock, bind(5000)).local == (2, 5000)
        sock.send(WRONG_MAGIC)
        assert has_ended(sock)
    # The port went with it.
    assert ask_once(shared_fabric.host, bind(5000)).status == 0


def test_request_that_is_too_long(shared_fabric: PrivateFabric) -> None:
    # A packet is one request, and what is behind it is not looked at.
    with enter(shared_fabric.host, SEQPACKET) as sock:
        sock.send(LOCAL_CID.encode() + bytes(100_000))
        assert Record.decode(sock.recv(RECORD_SIZE)).local_cid == 2
    # On a stream the rest is the next request, and no good one.
    with enter(shared_fabric.host, STREAM) as sock:
        sock.send(bind(5000).encode() + b"and more")
        assert Record.decode(sock.recv(RECORD_SIZE)).local == (2, 5000)
        assert has_ended(sock)


@both_types
def test_a_flood_of_garbage(shared_fabric: PrivateFabric, sock_type: int) -> None:
    for _ in range(200):
        with enter(shared_fabric.host, sock_type) as sock, contextlib.suppress(OSError):
            while True:
                sock.send(os.urandom(4096), socket.MSG_DONTWAIT)


@both_types
def test_connections_without_a_request(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(500):
            silent.enter_context(enter(shared_fabric.host, sock_type))
        assert_serves(shared_fabric)


@both_types
def test_closed_before_vsockd_reads_the_request(
    shared_fabric: PrivateFabric, sock_type: int
) -> None:
    with paused(shared_fabric.pid):
        for request in (LOCAL_CID, bind(5000), listen(), connect(2, 5000), Request(9)):
            with enter(shared_fabric.host, sock_type) as sock:
                sock.send(request.encode())
        enter(shared_fabric.host, sock_type).close()


@both_types
def test_closed_after_a_request(shared_fabric: PrivateFabric, sock_type: int) -> None:
    """The same on connections that vsockd keeps."""
    for request in (LOCAL_CID, bind(5001), listen(), connect(2, 5000), Request(9)):
        with enter(shared_fabric.host, sock_type) as sock:
            assert ask(sock, bind(5000)).status == 0
            with paused(shared_fabric.pid):
                sock.send(request.encode())
                sock.close()
        wait_until(lambda: shared_fabric.control.sockets() == [], "vsockd to notice", PROMPT)


@both_types
def test_a_reply_that_is_not_read(shared_fabric: PrivateFabric, sock_type: int) -> None:
    """Unread replies are kernel memory: after a few, vsockd drops the client."""
    with enter(shared_fabric.host, sock_type) as sock:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            for _ in range(20_000):
                sock.send(bind(5000).encode())
                assert_serves(shared_fabric)
        answers = 0
        with contextlib.suppress(ConnectionResetError):
            while sock.recv(RECORD_SIZE):
                answers += 1
        assert answers <= 2 * DAEMON_UNREAD_REPLIES_MAX
    assert_serves(shared_fabric)


@both_types
def test_an_update_of_an_unbound_socket(shared_fabric: PrivateFabric, sock_type: int) -> None:
    """Otherwise vsockd would keep a connection that no limit counts."""
    with enter(shared_fabric.host, sock_type) as sock:
        sock.send(Request(Op.UPDATE, 0, 0, 0, 0, 0, 0, *SIZES).encode())
        assert has_ended(sock)


# Operations out of order


@both_types
def test_listen_without_bind(shared_fabric: PrivateFabric, sock_type: int) -> None:
    assert ask_once(shared_fabric.host, listen(), sock_type).status == errno.EINVAL


@both_types
def test_bind_twice(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, bind(5001)).status == errno.EINVAL
        assert len(shared_fabric.control.sockets()) == 1


@both_types
def test_connect_on_a_listening_socket(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, listen()).status == 0
        sock.send(connect(2, 5000).encode())
        assert has_ended(sock)


@both_types
def test_connect_to_the_own_port(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET


@both_types
def test_a_refused_program_may_try_again(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        for _ in range(3):
            assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET
            assert ask(sock, listen()).status == errno.EINVAL
        assert ask(sock, bind(5000)).status == 0


@pytest.mark.parametrize("request_", [bind_datagram(), route(2, 5000)])
def test_datagram_request_on_a_stream(shared_fabric: PrivateFabric, request_: Request) -> None:
    with enter(shared_fabric.host, STREAM) as sock:
        sock.send(request_.encode())
        assert has_ended(sock)


@both_types
def test_polling_flag_without_padding(shared_fabric: PrivateFabric, sock_type: int) -> None:
    with enter(shared_fabric.host, sock_type) as sock:
        request = connect(2, 5000)._replace(flags=RequestFlag.POLLING)
        assert ask(sock, request).status == errno.ECONNRESET


@both_types
def test_polling_flag_on_other_requests(shared_fabric: PrivateFabric, sock_type: int) -> None:
    for op in Op:
        with enter(shared_fabric.host, sock_type) as sock:
            sock.send(Request(op, 0xFFFF, 9, 9, 9, 9, 9, *SIZES).encode() + PADDING)
            if op not in (Op.UPDATE, Op.COUNT):  # these are not answered
                with contextlib.suppress(ConnectionResetError):
                    sock.recv(RECORD_SIZE)


# Numbers out of range


HUGE = 2**64 - 1


@both_types
@pytest.mark.parametrize("backlog", [0, 1, 2**31 - 1, 2**32 - 1])
def test_backlog_of_any_size(shared_fabric: PrivateFabric, sock_type: int, backlog: int) -> None:
    with enter(shared_fabric.host, sock_type) as server:
        ask(server, bind(5000))
        assert ask(server, listen(backlog)).role == Role.LISTENING
        # As in Linux, even a backlog of 0 lets one connection wait.
        with enter(shared_fabric.host, sock_type) as client:
            assert ask(client, connect(2, 5000)).status == 0


@both_types
@pytest.mark.parametrize("size", [0, 1, 2**31, 2**32, 2**63, HUGE])
def test_buffers_of_any_size(shared_fabric: PrivateFabric, sock_type: int, size: int) -> None:
    sizes = {"size": size, "minimum": 0, "maximum": HUGE}
    with (
        enter(shared_fabric.host, sock_type) as server,
        enter(shared_fabric.host, sock_type) as client,
    ):
        ask(server, bind(5000)._replace(**sizes))
        assert ask(server, listen()._replace(**sizes)).status == 0
        answer = ask(client, connect(2, 5000)._replace(**sizes))
        assert (answer.status, answer.size) == (0, size)


@both_types
def test_every_field_at_its_largest(shared_fabric: PrivateFabric, sock_type: int) -> None:
    for op in Op:
        request = Request(op, 0xFFFF, *[2**32 - 1] * 5, *[HUGE] * 5)
        with enter(shared_fabric.host, sock_type) as sock:
            sock.send(request.encode())
        with enter(shared_fabric.host, sock_type) as sock:
            ask(sock, bind())
            sock.send(request.encode())


# False names of sockets


def test_a_socket_is_found_by_its_cookie(shared_fabric: PrivateFabric) -> None:
    host = shared_fabric.host
    query = Request(Op.QUERY, cookie=1234)
    assert ask_once(host, query).status == errno.ENOTCONN
    with enter(host) as server, enter(host) as client:
        ask(server, bind(5000, cookie=1234))
        assert ask_once(host, query)[:7] == (0, 0, 2, 5000, ANY, ANY, Role.BOUND)
        ask(server, listen())
        assert ask_once(host, query).role == Role.LISTENING
        local = ask(client, connect(2, 5000)._replace(cookie=4321)).local
        found = ask_once(host, Request(Op.QUERY, cookie=4321))
        assert (found.local, found.peer, found.role) == (local, (2, 5000), Role.CONNECTED)
    wait_until(lambda: shared_fabric.control.sockets() == [], "the sockets to be released", PROMPT)
    assert ask_once(host, query).status == errno.ENOTCONN


def test_a_false_cookie_has_effect_in_its_own_context_only(
    shared_fabric: PrivateFabric,
) -> None:
    """A guest that guesses the host's cookies neither hides its sockets nor sees them."""
    guest = guest_of(shared_fabric)
    query = Request(Op.QUERY, cookie=1234)
    with enter(guest) as theirs, enter(shared_fabric.host) as mine:
        assert ask_once(guest, query).status == errno.ENOTCONN
        assert ask(theirs, bind(6000, cookie=1234)).status == 0
        assert ask(mine, bind(5000, cookie=1234)).status == 0
        assert ask_once(shared_fabric.host, query).local == (2, 5000)
        assert ask_once(guest, query).local == (guest.cid, 6000)
