"""Limits of one user of the host: others are served as before meanwhile.

Root, and the user vsockd runs as, are administrators, and have no limits.
"""

from __future__ import annotations

import contextlib
import errno
import socket

import pytest

import vsockets
from vsockets.protocol import Request
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    LOCAL_CID,
    PROMPT,
    SOCKET_TYPES,
    adopt,
    ask,
    ask_once,
    bind,
    connect,
    enter,
    listen,
    unix_datagrams,
)
from .test_limits import is_closed
from .users import NOBODY, as_root, user

pytestmark = as_root

OTHER = NOBODY - 1
STREAM = socket.SOCK_STREAM


@pytest.fixture
def limited(fabric: PrivateFabric) -> PrivateFabric:
    """Yield a fabric whose users may have three sockets and two pending connections."""
    (fabric.configuration / "host.toml").write_text(
        "[host]\nlimits = { sockets = 3, pending_connects = 2 }\n"
    )
    fabric.control.reload()
    return fabric


def assert_others_are_served(fabric: PrivateFabric) -> None:
    """Check that another user, root and a guest can bind and connect."""
    for uid in (OTHER, 0):
        with user(uid):
            assert ask_once(fabric.host, bind()).status == 0
            assert ask_once(fabric.host, LOCAL_CID).status == 0
    with user(0):
        guest = fabric.guest(9)
        with (
            vsockets.create_server((2, 9000), context=fabric.host) as server,
            vsockets.create_connection((2, 9000), context=guest),
        ):
            server.accept()[0].close()
        fabric.control.power_off(9)
        fabric.control.remove_context(9)


def test_sockets(limited: PrivateFabric) -> None:
    """Bound ones, datagrams, and streams it opened; closing one makes space for another."""
    host = limited.host
    with (
        contextlib.ExitStack() as held,
        vsockets.create_server((2, 5000), context=host),
        user(NOBODY),
    ):
        bound = held.enter_context(enter(host))
        assert ask(bound, bind(5001)).status == 0
        datagrams = held.enter_context(unix_datagrams())
        assert adopt(host, datagrams, 5001).status == 0
        client = held.enter_context(enter(host, STREAM))
        assert ask(client, connect(2, 5000)).status == 0
        for one_more in (bind(), connect(2, 5000)):
            assert ask_once(host, one_more, STREAM).status == errno.ENOBUFS
        with unix_datagrams() as another:
            assert adopt(host, another).status == errno.ENOBUFS
        assert_others_are_served(limited)
        for closed in (bound, datagrams, client):
            closed.close()
            assert wait_until(lambda: ask_once(host, bind()).status == 0, "room", PROMPT)
    assert "user 65534 of the host has 3 sockets [sockets, ENOBUFS]; pid " in limited.log


@pytest.mark.parametrize("sock_type", SOCKET_TYPES)
def test_connections_without_a_request(limited: PrivateFabric, sock_type: int) -> None:
    with contextlib.ExitStack() as silent, user(NOBODY):
        for _ in range(2):
            silent.enter_context(enter(limited.host, sock_type))
        for _ in range(20):
            with enter(limited.host, sock_type) as one_too_many:
                assert one_too_many.recv(1000)  # the refusal
                assert one_too_many.recv(1000) == b""
        assert_others_are_served(limited)
        silent.close()
        wait_until(lambda: ask_once(limited.host, bind()).status == 0, "it to be served", PROMPT)


def test_connections_that_are_not_accepted(limited: PrivateFabric) -> None:
    host = limited.host
    with contextlib.ExitStack() as held, user(NOBODY):
        server = held.enter_context(enter(host, STREAM))
        ask(server, bind(5000))
        ask(server, listen())
        answers = []
        for _ in range(4):
            client = held.enter_context(enter(host, STREAM))
            answers.append(ask(client, connect(2, 5000)).status)
        assert answers == [0, 0, errno.ENOBUFS, errno.ENOBUFS]
        assert_others_are_served(limited)
        with user(OTHER):
            assert ask_once(host, connect(2, 5000), STREAM).status == 0


def test_a_program_that_is_refused_keeps_no_more_connections_than_sockets(
    limited: PrivateFabric,
) -> None:
    with contextlib.ExitStack() as held, user(NOBODY):
        refused = []
        for _ in range(8):  # one after the other: connections without a request are limited, too
            sock = held.enter_context(enter(limited.host))
            assert ask(sock, connect(2, 5999)).status == errno.ECONNRESET
            refused.append(sock)
        assert sum(map(is_closed, refused)) == 5


def test_request_rate(fabric: PrivateFabric) -> None:
    (fabric.configuration / "host.toml").write_text("[host.limits]\nrequest_rate = 10\n")
    fabric.control.reload()
    requests: list[Request] = [LOCAL_CID, bind(), connect(2, 5999)]
    with user(NOBODY):
        for request in requests:
            assert errno.ENOBUFS in {ask_once(fabric.host, request).status for _ in range(50)}
    assert_others_are_served(fabric)


def test_reload_changes_limits(limited: PrivateFabric) -> None:
    """A user that holds something gets other limits at once."""
    with contextlib.ExitStack() as held, user(NOBODY):

        def binds() -> bool:
            sock = held.enter_context(enter(limited.host))
            return ask(sock, bind()).status == 0

        assert [binds() for _ in range(4)] == [True, True, True, False]
        with user(0):
            (limited.configuration / "host.toml").write_text("[host.limits]\nsockets = 4\n")
            limited.control.reload()
        assert [binds() for _ in range(2)] == [True, False]
