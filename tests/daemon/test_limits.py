"""Limits of one guest: enforced with a distinct errno, counted, and released.

Another guest is served as before meanwhile.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.protocol import Request
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    LOCAL_CID,
    adopt,
    ask,
    ask_for_route,
    ask_once,
    bind,
    connect,
    enter,
    listen,
    unix_datagrams,
)

STREAM, DATAGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


def row(fabric: PrivateFabric, cid: int) -> dict[str, Any]:
    return next(row for row in fabric.control.contexts() if row["cid"] == cid)


def assert_others_are_served(fabric: PrivateFabric) -> None:
    """Check that another guest can exchange a stream and a datagram with the host."""
    other = fabric.guest(9)
    with (
        vsockets.create_server((2, 9000), context=fabric.host) as server,
        vsockets.create_connection((2, 9000), context=other) as client,
        vsockets.socket(type=DATAGRAM, context=fabric.host) as receiver,
        vsockets.socket(type=DATAGRAM, context=other) as sender,
    ):
        accepted, source = server.accept()
        with accepted:
            assert source == client.getsockname()
        receiver.bind((2, 9000))
        sender.sendto(b"x", (2, 9000))
        assert receiver.recvfrom(10) == (b"x", sender.getsockname())
    assert row(fabric, 9)["denials"] == {}
    fabric.control.remove_context(9)


def assert_met(fabric: PrivateFabric, limit: str) -> None:
    """Check that the limit is counted and logged by name, and affects no other guest."""
    assert set(row(fabric, 3)["denials"]) == {limit}
    assert fabric.control.status()["limits_met"] >= 1
    assert f"[{limit}, ENOBUFS]" in fabric.log
    assert_others_are_served(fabric)


def test_sockets(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"sockets": 3})
    with (
        contextlib.ExitStack() as held,
        vsockets.create_server((2, 5000), context=vsock_fabric.host),
    ):
        stream = held.enter_context(enter(guest))
        assert ask(stream, bind(5000)).status == 0
        datagrams = held.enter_context(unix_datagrams())
        assert adopt(guest, datagrams, 5000).status == 0
        client = held.enter_context(enter(guest, STREAM))
        assert ask(client, connect(2, 5000)).status == 0
        assert row(vsock_fabric, 3)["usage"]["sockets"] == 3
        # One more of any kind is one too many.
        assert ask_once(guest, bind(5001)).status == errno.ENOBUFS
        assert ask_once(guest, connect(2, 5000), STREAM).status == errno.ENOBUFS
        with unix_datagrams() as another:
            assert adopt(guest, another).status == errno.ENOBUFS
        assert_met(vsock_fabric, "sockets")
        # Each that is closed makes room for one, of any kind.
        for closed in (stream, datagrams, client):
            closed.close()
            assert wait_until(lambda: binds(guest), "room for a socket")


def binds(guest: Attachment) -> bool:
    return ask_once(guest, bind()).status == 0


def test_a_refused_program_keeps_no_more_connections_than_sockets(
    vsock_fabric: PrivateFabric,
) -> None:
    """A connection to vsockd may be used again after a refusal, within limits."""
    guest = vsock_fabric.guest(3, limits={"sockets": 3})
    with contextlib.ExitStack() as held:
        kept = []
        for _ in range(6):
            sock = held.enter_context(enter(guest))
            assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET
            kept.append(sock)
        ended = [sock for sock in kept if is_closed(sock)]
        assert len(ended) == 3
        assert_others_are_served(vsock_fabric)


def is_closed(sock: socket.socket) -> bool:
    """Return whether vsockd has closed the connection; if not, send another request."""
    try:
        sock.send(connect(2, 5000).encode())
        return sock.recv(1000) == b""
    except (BrokenPipeError, ConnectionResetError):
        return True


def test_pending_connects(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"pending_connects": 2})
    with (
        vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
        vsockets.create_server((2, 5001), context=vsock_fabric.host) as second,
        vsockets.create_connection((2, 5000), context=guest),
        vsockets.create_connection((2, 5001), context=guest),
    ):
        assert row(vsock_fabric, 3)["usage"]["pending_connects"] == 2
        for port in (5000, 5001):
            with pytest.raises(OSError) as refusal:
                vsockets.create_connection((2, port), context=guest)
            assert refusal.value.errno == errno.ENOBUFS
        assert_met(vsock_fabric, "pending_connects")
        # Listeners' backlogs are not the guest's: others wait there.
        vsockets.create_connection((2, 5000), context=vsock_fabric.host).close()
        server.accept()[0].close()
        second.accept()[0].close()
        wait_until(lambda: connects(guest, (2, 5001)), "patience with the guest again")


def test_accepted_connections_are_not_shown_as_pending(vsock_fabric: PrivateFabric) -> None:
    """vsockd gets no report of an accept: it recounts when asked."""
    guest = vsock_fabric.guest(3)
    with vsockets.create_server((2, 5000), context=vsock_fabric.host) as server:
        clients = [vsockets.create_connection((2, 5000), context=guest) for _ in range(5)]
        assert row(vsock_fabric, 3)["usage"]["pending_connects"] == 5
        for client in clients:
            server.accept()[0].close()
            client.close()
        assert row(vsock_fabric, 3)["usage"]["pending_connects"] == 0


def connects(guest: Attachment, address: tuple[int, int]) -> bool:
    try:
        vsockets.create_connection(address, context=guest).close()
    except OSError as refusal:
        if refusal.errno != errno.ENOBUFS:
            raise
        return False
    return True


def test_connections_without_a_request_are_pending(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest(3, limits={"pending_connects": 2})
    with contextlib.ExitStack() as silent:
        for _ in range(2):
            silent.enter_context(enter(guest))
        wait_until(lambda: row(vsock_fabric, 3)["usage"]["pending_connects"] == 2, "two of them")
        with enter(guest) as one_too_many:
            assert one_too_many.recv(1000)  # the refusal
            assert one_too_many.recv(1000) == b""
        assert_met(vsock_fabric, "pending_connects")
        silent.close()
        wait_until(lambda: row(vsock_fabric, 3)["usage"]["pending_connects"] == 0, "none")
        assert ask_once(guest, LOCAL_CID).status == 0


@pytest.mark.parametrize("request_", [LOCAL_CID, bind(), connect(2, 5000)])
def test_request_rate(vsock_fabric: PrivateFabric, request_: Request) -> None:
    guest = vsock_fabric.guest(3, limits={"request_rate": 10})
    answers = {ask_once(guest, request_).status for _ in range(50)}
    assert errno.ENOBUFS in answers
    assert_met(vsock_fabric, "request_rate")
    # It is given back as time passes.
    wait_until(lambda: ask_once(guest, LOCAL_CID).status == 0, "the guest's next request")


def test_the_request_rate_of_one_connection(vsock_fabric: PrivateFabric) -> None:
    """Requests on an open connection count as those on new ones."""
    guest = vsock_fabric.guest(3, limits={"request_rate": 10})
    with enter(guest) as sock:
        ask(sock, bind(5000))
        answers = {ask(sock, bind(5000)).status for _ in range(30)}
        assert answers == {errno.EINVAL, errno.ENOBUFS}
        assert_met(vsock_fabric, "request_rate")


class TestDatagramBytes:
    """Many receivers that do not read: unread datagrams are memory of the host."""

    LIMIT = 1_000_000
    PAYLOAD = bytes(60_000)

    @pytest.fixture
    def guest(self, vsock_fabric: PrivateFabric) -> Attachment:
        return vsock_fabric.guest(3, limits={"datagram_bytes": self.LIMIT})

    @pytest.fixture
    def receivers(self, vsock_fabric: PrivateFabric) -> Iterator[list[vsockets.socket]]:
        with contextlib.ExitStack() as stack:
            made = []
            for port in range(5000, 5040):
                receiver = vsockets.socket(type=DATAGRAM, context=vsock_fabric.host)
                made.append(stack.enter_context(receiver))
                receiver.bind((2, port))
                receiver.setblocking(False)
            yield made

    def test_are_enforced_and_released(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        with (
            vsockets.socket(type=DATAGRAM, context=guest) as sender,
        ):
            sender.setblocking(False)
            refused = set()
            for receiver in receivers:
                with pytest.raises(OSError) as refusal:
                    while True:
                        sender.sendto(self.PAYLOAD, receiver.getsockname())
                refused.add(refusal.value.errno)
            assert refused == {errno.ENOBUFS}
            assert_met(vsock_fabric, "datagram_bytes")
            assert row(vsock_fabric, 3)["usage"]["datagram_bytes"] > self.LIMIT
            self.read_all(receivers)
            assert row(vsock_fabric, 3)["usage"]["datagram_bytes"] == 0
            # Every way is open again, the one that was taken back, too.
            for receiver in receivers:
                sender.sendto(b"again", receiver.getsockname())
                assert receiver.recvfrom(10) == (b"again", sender.getsockname())

    def test_of_routes_filled_after_their_creation(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        """Without the library, routes are filled after they were created: they are revoked."""
        with (
            contextlib.ExitStack() as stack,
            unix_datagrams() as sender,
        ):
            assert adopt(guest, sender, 6000).status == 0
            routes = []
            for receiver in receivers:
                way = ask_for_route(guest, sender, receiver.getsockname())
                routes.append(stack.enter_context(way))
                way.setblocking(False)

            def none_sends() -> bool:
                for way in routes:
                    with contextlib.suppress(BlockingIOError, BrokenPipeError):
                        while True:
                            way.send(self.PAYLOAD)
                return all(map(is_shut, routes))

            wait_until(none_sends, "every route to be taken back")
            assert row(vsock_fabric, 3)["denials"]["datagram_bytes"] >= 1
            with pytest.raises(OSError) as refusal:
                ask_for_route(guest, sender, (2, 5000))
            assert refusal.value.errno == errno.ENOBUFS
            assert_met(vsock_fabric, "datagram_bytes")
            self.read_all(receivers)
            assert row(vsock_fabric, 3)["usage"]["datagram_bytes"] == 0
            for receiver in receivers:
                with ask_for_route(guest, sender, receiver.getsockname()) as way:
                    way.send(b"again")
                assert receiver.recvfrom(10) == (b"again", (3, 6000))

    def test_unread_bytes_of_a_closed_socket_count(
        self, vsock_fabric: PrivateFabric, guest: Attachment, receivers: list[vsockets.socket]
    ) -> None:
        """Unread bytes count, also after their sender was closed."""
        sent = 0
        with contextlib.suppress(OSError):
            while sent < 1000:
                with vsockets.socket(type=DATAGRAM, context=guest) as sender:
                    sender.setblocking(False)
                    receiver = receivers[sent % len(receivers)]
                    sender.sendto(self.PAYLOAD, receiver.getsockname())
                sent += 1
        assert_met(vsock_fabric, "datagram_bytes")
        assert sent * len(self.PAYLOAD) < 2 * self.LIMIT
        self.read_all(receivers)
        with vsockets.socket(type=DATAGRAM, context=guest) as sender:
            sender.sendto(b"again", receivers[0].getsockname())

    @staticmethod
    def read_all(receivers: list[vsockets.socket]) -> None:
        for receiver in receivers:
            with contextlib.suppress(BlockingIOError):
                while True:
                    assert receiver.recvfrom(100_000)[1][0] == 3


def is_shut(way: socket.socket) -> bool:
    try:
        way.send(b"")
    except BrokenPipeError:
        return True
    except BlockingIOError:
        pass
    return False


# Origin of limits


def test_of_the_configuration_and_of_one_guest(vsock_fabric: PrivateFabric) -> None:
    """[limits] apply to all, a context's own override them; a reload changes both at once."""
    configured = vsock_fabric.configuration / "limits.toml"
    configured.write_text("[limits]\nsockets = 1\n[[context]]\ncid = 7\nlimits = { sockets = 2 }\n")
    vsock_fabric.control.reload()
    first, seventh = vsock_fabric.guest(3), Attachment(vsock_fabric.folder / "7")

    def most(guest: Attachment) -> int:
        with contextlib.ExitStack() as held:
            for number in range(10):
                sock = held.enter_context(enter(guest))
                if ask(sock, bind()).status == errno.ENOBUFS:
                    return number
        return 10

    assert (most(first), most(seventh)) == (1, 2)
    configured.write_text("[limits]\nsockets = 3\n[[context]]\ncid = 7\n")
    vsock_fabric.control.reload()
    wait_until(lambda: row(vsock_fabric, 7)["usage"]["sockets"] == 0, "them to be closed")
    wait_until(lambda: row(vsock_fabric, 3)["usage"]["sockets"] == 0, "them to be closed")
    assert (most(first), most(seventh)) == (3, 3)


def test_administrators_have_no_limits(vsock_fabric: PrivateFabric) -> None:
    (vsock_fabric.configuration / "limits.toml").write_text(
        "[limits]\nsockets = 1\npending_connects = 1\nrequest_rate = 1\n"
        "[host.limits]\nsockets = 1\npending_connects = 1\nrequest_rate = 1\n"
    )
    vsock_fabric.control.reload()
    host = vsock_fabric.host
    with enter(host) as server, contextlib.ExitStack() as held:
        ask(server, bind(5000))
        ask(server, listen())
        clients = [held.enter_context(enter(host)) for _ in range(20)]
        assert {ask(client, connect(2, 5000)).status for client in clients} == {0}
