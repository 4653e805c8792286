"""One guest takes all it can of vsockd: another one's connects succeed meanwhile, and once the
first has exited vsockd has what it had before.

How long those connects take is printed, and not asserted; ``python -m daemon.exhaustion`` measures.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.daemon.limits import DAEMON_UNWANTED_DESCRIPTORS_MAX
from vsockets.protocol import RECORD_SIZE, Op, Record, Request
from vsockets.testing import PrivateFabric, wait_until

from . import exhaustion
from .exhaustion import Attack, lingering_socket, measure, processes, witnessed
from .raw_client import (
    adopt,
    ask,
    ask_for_route,
    ask_once,
    bind,
    bind_datagram,
    connect,
    descriptors,
    enter,
    has_ended,
    listen,
    paused,
    send_with,
    unix_datagrams,
)
from .users import NOBODY, as_nobody

SEQPACKET, DATAGRAM = socket.SOCK_SEQPACKET, socket.SOCK_DGRAM

#: Seconds for which another guest connects repeatedly.
WHILE = 0.5

#: Seconds, longer than the timers after which vsockd releases closed sockets.
TIMERS = 30.0


def row(fabric: PrivateFabric, cid: int) -> dict[str, Any]:
    return next(row for row in fabric.control.contexts() if row["cid"] == cid)


@contextlib.contextmanager
def given_back(fabric: PrivateFabric) -> Iterator[None]:
    """Check that vsockd then has as many descriptors as before, without a further request."""
    before = descriptors(fabric.pid)
    yield
    what = f"vsockd to be back at {before} descriptors"
    wait_until(lambda: descriptors(fabric.pid) <= before, what, TIMERS)


ATTACKS: dict[str, tuple[Attack, dict[str, int]]] = {
    "routes": (partial(exhaustion.routes, sockets=40), {"sockets": 400}),
    "datagram sockets": (exhaustion.datagram_sockets, {"sockets": 400}),
    "bind of a held port": (partial(exhaustion.bind_held, streams=300), {}),
    "query": (partial(exhaustion.query, streams=300), {}),
    "deaf listener": (exhaustion.deaf_listener, {}),
    "many channels": (partial(exhaustion.many_channels, number=300), {}),
    "pending connects": (partial(exhaustion.pending, number=100), {"pending_connects": 124}),
    "unread answers": (partial(exhaustion.unread_answers, number=300), {}),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_another_guest_connects_meanwhile(vsock_fabric: PrivateFabric, name: str) -> None:
    attack, limits = ATTACKS[name]
    with witnessed(vsock_fabric, **limits) as guests:
        with given_back(vsock_fabric):
            with processes(*attack(guests)):
                latency = measure(vsock_fabric, WHILE)
                print(f"{name}: {latency}")
            assert not latency.failed
            assert len(latency.times) > 1
        for guest in guests:
            assert ask_once(guest, bind()).status == 0


class TestRoutes:
    """vsockd has a descriptor from each datagram socket to each of its destinations."""

    LIMIT = 20

    @pytest.fixture
    def guest(self, vsock_fabric: PrivateFabric) -> Attachment:
        return vsock_fabric.guest(3, limits={"sockets": self.LIMIT})

    @pytest.fixture
    def receivers(self, vsock_fabric: PrivateFabric) -> Iterator[list[vsockets.socket]]:
        with contextlib.ExitStack() as stack:
            made = []
            for port in range(5000, 5050):
                receiver = vsockets.socket(type=DATAGRAM, context=vsock_fabric.host)
                made.append(stack.enter_context(receiver))
                receiver.bind((2, port))
            yield made

    def test_are_limited_like_sockets(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        before = descriptors(vsock_fabric.pid)
        with contextlib.ExitStack() as stack:
            for number in range(4):
                sender = stack.enter_context(unix_datagrams())
                assert adopt(guest, sender).status == 0
                for receiver in receivers:
                    ask_for_route(guest, sender, receiver.getsockname()).close()
                most = before + number + 1 + self.LIMIT
                wait_until(lambda: descriptors(vsock_fabric.pid) <= most, f"{most} descriptors")  # noqa: B023

    def test_routes_of_a_user_of_the_host_are_limited(
        self, vsock_fabric: PrivateFabric, receivers: list[vsockets.socket]
    ) -> None:
        (vsock_fabric.configuration / "limits.toml").write_text("[host.limits]\nsockets = 20\n")
        vsock_fabric.control.reload()
        vsock_fabric.folder.parent.chmod(0o755)
        before = descriptors(vsock_fabric.pid)
        with unix_datagrams() as sender:
            if os.geteuid() == 0:
                os.seteuid(NOBODY)
            try:
                if adopt(vsock_fabric.host, sender).status:
                    pytest.skip("needs to be a user with limits")
                for receiver in receivers:
                    ask_for_route(vsock_fabric.host, sender, receiver.getsockname()).close()
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
            if os.geteuid() == 0:
                most = before + self.LIMIT + 1
                wait_until(lambda: descriptors(vsock_fabric.pid) <= most, f"{most} descriptors")

    def test_are_evicted_for_new_ones(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        """Programs do not notice: the library requests a revoked route again."""
        with vsockets.socket(type=DATAGRAM, context=guest) as sender:
            for receiver in receivers * 2:
                sender.sendto(b"x", receiver.getsockname())
                assert receiver.recvfrom(10) == (b"x", sender.getsockname())
            assert row(vsock_fabric, 3)["denials"] == {}

    def test_with_unread_datagrams_are_not_evicted(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        """The routes' descriptors measure unread bytes, so routes count until those are read."""
        with unix_datagrams() as sender, contextlib.ExitStack() as stack:
            assert adopt(guest, sender).status == 0
            sent = 0
            with pytest.raises(OSError, match="buffer space"):
                for receiver in receivers:
                    way = ask_for_route(guest, sender, receiver.getsockname())
                    stack.enter_context(way).send(b"x")
                    sent += 1
            assert set(row(vsock_fabric, 3)["denials"]) == {"sockets"}
            assert sent == self.LIMIT
            for receiver in receivers[:sent]:
                receiver.recv(10)
            ask_for_route(guest, sender, receivers[-1].getsockname()).close()

    def test_replaced_with_unread_datagrams_count(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        before = descriptors(vsock_fabric.pid)
        with unix_datagrams() as sender:
            assert adopt(guest, sender).status == 0
            for receiver in receivers:
                with contextlib.suppress(OSError):  # at the limit
                    for _ in range(3):
                        with ask_for_route(guest, sender, receiver.getsockname()) as way:
                            way.send(b"x")
            most = before + self.LIMIT + 1
            wait_until(lambda: descriptors(vsock_fabric.pid) <= most, f"{most} descriptors")

    def test_of_a_program_that_has_ended_are_closed(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        """A timer closes them, without any request to vsockd."""
        with given_back(vsock_fabric), contextlib.ExitStack() as stack:
            for _ in range(5):
                sender = stack.enter_context(unix_datagrams())
                assert adopt(guest, sender).status == 0
                for receiver in receivers:
                    ask_for_route(guest, sender, receiver.getsockname()).close()

    def test_are_closed_without_a_free_descriptor(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        soft, hard = resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE)
        with given_back(vsock_fabric), unix_datagrams() as sender:
            assert adopt(guest, sender).status == 0
            for receiver in receivers[:10]:
                ask_for_route(guest, sender, receiver.getsockname()).close()
            resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (3, hard))
        resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (soft, hard))


def test_descriptors_that_are_slow_to_close(vsock_fabric: PrivateFabric) -> None:
    """A party has only a limited number of them in vsockd at a time."""
    guest, other = vsock_fabric.guest(3), vsock_fabric.guest(4)
    request = bind_datagram().encode()
    before = descriptors(vsock_fabric.pid)
    with contextlib.ExitStack() as stack:
        asked = []
        with paused(vsock_fabric.pid):  # it is to close them last
            for _ in range(DAEMON_UNWANTED_DESCRIPTORS_MAX):
                lingers, peer = lingering_socket()
                ours, theirs = socket.socketpair()
                asked.append(stack.enter_context(enter(guest, SEQPACKET)))
                stack.enter_context(peer)
                with lingers, ours, theirs:
                    send_with(ours, b"x", [lingers.fileno()])
                    send_with(asked[-1], request, [theirs.fileno()])
        assert all(map(has_ended, asked))
        refused = 0
        for _ in range(100):
            with enter(guest, SEQPACKET) as sock:
                send_with(sock, request, [0])
                # No reply: on a busy machine a close was interrupted, and made room for this one.
                if reply := sock.recv(RECORD_SIZE):
                    assert Record.decode(reply).status == errno.ENOBUFS
                    refused += 1
        assert refused >= 100 - DAEMON_UNWANTED_DESCRIPTORS_MAX
        most = before + DAEMON_UNWANTED_DESCRIPTORS_MAX + 1  # an epoll
        wait_until(lambda: descriptors(vsock_fabric.pid) <= most, f"{most} descriptors")
        # Others are not concerned.
        with unix_datagrams() as datagrams:
            assert adopt(other, datagrams).status == 0
    wait_until(lambda: descriptors(vsock_fabric.pid) <= before, f"{before} descriptors", TIMERS)
    with unix_datagrams() as datagrams:
        assert adopt(guest, datagrams).status == 0


class TestDatagramSockets:
    def test_at_the_limit_are_probed_for_one_more(self, vsock_fabric: PrivateFabric) -> None:
        """With any number of them: some at once, the others as deferred work."""
        guest = vsock_fabric.guest(3, limits={"sockets": 300})
        with contextlib.ExitStack() as stack:
            socks = [stack.enter_context(unix_datagrams()) for _ in range(300)]
            assert {adopt(guest, sock).status for sock in socks} == {0}
            for closed in socks[::50]:
                with unix_datagrams() as one_too_many:
                    assert adopt(guest, one_too_many).status == errno.ENOBUFS
                closed.close()
                more = stack.enter_context(unix_datagrams())
                wait_until(lambda more=more: adopt(guest, more).status == 0, "room")  # type: ignore[misc]

    def test_that_are_closed_leave_few(self, vsock_fabric: PrivateFabric) -> None:
        """Each new one causes probes of others, so only open ones meet a limit."""
        guest = vsock_fabric.guest(3, limits={"sockets": 60})
        with contextlib.ExitStack() as stack:
            for _ in range(30):
                assert adopt(guest, stack.enter_context(unix_datagrams())).status == 0
            for _ in range(1000):
                with unix_datagrams() as sock:
                    assert adopt(guest, sock).status == 0


class TestStreams:
    def test_a_port_is_free_when_its_stream_has_ended(self, vsock_fabric: PrivateFabric) -> None:
        """Also if the accepting side ended first, among many others: vsockd gets no report."""
        guest = vsock_fabric.guest(3)
        with (
            vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
            contextlib.ExitStack() as stack,
        ):
            for _ in range(300):
                stack.enter_context(vsockets.create_connection((2, 5000), context=guest))
                stack.enter_context(server.accept()[0])
            for _ in range(20):
                with vsockets.socket(context=guest) as client:
                    client.bind((3, 7000))
                    client.connect((2, 5000))
                    assert ask_once(guest, bind(7000)).status == errno.EADDRINUSE
                    server.accept()[0].close()
                    assert client.recv(1) == b""

    def test_their_inodes_are_found(self, vsock_fabric: PrivateFabric) -> None:
        host = vsock_fabric.host
        with (
            vsockets.create_server((2, 5000), context=host) as server,
            contextlib.ExitStack() as stack,
        ):
            for _ in range(300):
                client = stack.enter_context(vsockets.create_connection((2, 5000), context=host))
                accepted = stack.enter_context(server.accept()[0])
                inode = os.fstat(accepted.fileno()).st_ino
                found = ask_once(host, Request(Op.QUERY, cookie=1, inode=inode))
                assert (found.local, found.peer) == ((2, 5000), client.getsockname())


def test_a_guest_with_many_listeners_may_connect_once_they_have_accepted(
    vsock_fabric: PrivateFabric,
) -> None:
    guest = vsock_fabric.guest(3, limits={"pending_connects": 40})
    host = vsock_fabric.host
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(vsockets.create_server((2, port), context=host))
            for port in range(5000, 5040)
        ]
        for server in servers:
            client = vsockets.create_connection(server.getsockname(), context=guest)
            stack.enter_context(client)
        assert ask_once(guest, connect(2, 5000), socket.SOCK_STREAM).status == errno.ENOBUFS
        stack.enter_context(servers[-1].accept()[0])

        def connects() -> bool:
            return ask_once(guest, connect(2, 5000), socket.SOCK_STREAM).status == 0

        wait_until(connects, "the listener that has accepted to have its turn")


def test_listeners_that_are_closed_with_connections_that_wait(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"pending_connects": 4})
    for _ in range(20):
        with enter(guest) as server, contextlib.ExitStack() as stack:
            assert ask(server, bind(5000)).status == 0
            assert ask(server, listen()).status == 0
            for _ in range(4):
                assert ask(stack.enter_context(enter(guest)), connect(3, 5000)).status == 0
        wait_until(lambda: row(vsock_fabric, 3)["usage"]["pending_connects"] == 0, "none to wait")


@pytest.mark.parametrize("listens", [False, True])
def test_a_port_is_free_once_its_holder_is_closed_among_many(
    vsock_fabric: PrivateFabric, listens: bool
) -> None:
    """Many connections have been closed, each with many requests that need no reply."""
    guest = vsock_fabric.guest(3)
    many = [enter(guest, SEQPACKET) for _ in range(150)]
    for sock in many:
        assert ask(sock, bind()).status == 0
    holder = enter(guest, SEQPACKET)
    assert ask(holder, bind(5000)).status == 0
    if listens:
        assert ask(holder, listen()).status == 0
    with paused(vsock_fabric.pid), contextlib.ExitStack() as stack:
        for sock in many:
            sock.setblocking(False)
            with contextlib.suppress(BlockingIOError):
                while True:
                    sock.send(bind(5000).encode())
            sock.close()
        holder.close()
        asks = stack.enter_context(enter(guest, SEQPACKET))
        asks.send(bind(5000).encode())
        stack.pop_all()
    with asks:
        assert Record.decode(asks.recv(RECORD_SIZE)).status == 0


def test_descriptors_in_flight() -> None:
    """A connect that cannot be announced is refused, or waits; it does not end at once.

    Only the same user's fabric is affected: the kernel counts descriptors in flight per user, so a
    guest can cause refusals in its own user's fabric alone.
    """
    command = as_nobody(sys.executable, "-m", "daemon.in_flight")
    done = subprocess.run(
        ["prlimit", "--nofile=2000:2000", *command],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONDONTWRITEBYTECODE": "1"},
        stdout=subprocess.PIPE,
        timeout=60,
        check=True,
    )
    seen = json.loads(done.stdout)
    assert seen["connects"] == [0, *[errno.ENOBUFS] * 19]
    assert not seen["ended"]
    assert seen["datagram"] == errno.ENOBUFS
    assert seen["waiting"] == 1
    assert seen["received"] == ["early", "answer"]
    assert seen["afterwards"]
    assert seen["datagram afterwards"] == 0
    assert seen["log"] == []
