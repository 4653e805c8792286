"""Stream and packet sockets that vsockd reaches by name, as supervisors have them bound."""

from __future__ import annotations

import errno
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

import vsockets
from vsockets import Attachment
from vsockets._linux.sockets import HAS_PASSRIGHTS
from vsockets.protocol import RECORD_SIZE, Op, Record, Request, RequestFlag, Role
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    ANY,
    PROMPT,
    SIZES,
    ask,
    ask_once,
    connect,
    cookie_of,
    enter,
    guest_of,
    has_ended,
    listen,
    paused,
    send_with,
)

SECRET = 0x1234_5678_9ABC_DEF0
HOST = 2


def bind_socket(port: int = ANY, secret: int = SECRET) -> Request:
    return Request(Op.BIND_SOCKET, 0, HOST, port, 0, 0, 0, *SIZES, secret)


class Holder:
    """A program's socket, and its supervisor's connection to vsockd."""

    def __init__(
        self, context: Attachment, port: int, kind: int = socket.SOCK_STREAM, secret: int = SECRET
    ) -> None:
        self.sock = socket.socket(socket.AF_UNIX, kind)
        self.channel = enter(context, socket.SOCK_SEQPACKET)
        self.record = self.bind(self.sock, port, secret)

    def bind(self, sock: socket.socket, port: int, secret: int = SECRET) -> Record:
        send_with(self.channel, bind_socket(port, secret).encode(), [sock.fileno()])
        return Record.decode(self.channel.recv(RECORD_SIZE))

    def listen(self, backlog: int = 5) -> None:
        self.sock.listen(backlog)
        assert ask(self.channel, listen(backlog)).status == 0

    def accept(self) -> tuple[Record, socket.socket]:
        self.sock.settimeout(PROMPT)
        with self.sock.accept()[0] as token:
            data, (fd,), _, _ = socket.recv_fds(token, RECORD_SIZE, 1)
        return Record.decode(data), socket.socket(fileno=fd)

    def assert_given_up(self, closed: bool) -> None:
        """Check that vsockd has closed the channel, with an errno."""
        expected = Record(errno.EBADF).encode() if closed else b""
        assert self.channel.recv(RECORD_SIZE) == expected
        assert self.channel.recv(RECORD_SIZE) == b""

    def close(self) -> None:
        self.sock.close()
        self.channel.close()


@pytest.fixture
def holder(shared_fabric: PrivateFabric) -> Iterator[Holder]:
    """Yield a listening socket at port 5000 of the host."""
    holder = Holder(shared_fabric.host, 5000)
    holder.listen()
    yield holder
    holder.close()


@pytest.fixture
def private_fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


def errno_of_connecting(context: Attachment, port: int = 5000) -> int:
    with vsockets.socket(context=context) as sock:
        return sock.connect_ex((HOST, port))


@pytest.mark.parametrize("kind", [socket.SOCK_STREAM, socket.SOCK_SEQPACKET])
def test_connections_come_in_with_their_records(shared_fabric: PrivateFabric, kind: int) -> None:
    holder = Holder(shared_fabric.host, 5000, kind)
    assert (holder.record.local, holder.record.role) == ((HOST, 5000), Role.BOUND)
    assert holder.record.flags == RequestFlag.NAMED
    holder.listen()
    query = Request(Op.QUERY, cookie=cookie_of(holder.sock))
    known = ask_once(shared_fabric.host, query)
    assert (known.role, known.flags) == (Role.LISTENING, RequestFlag.NAMED)
    with vsockets.socket(type=kind, context=guest_of(shared_fabric)) as client:
        client.connect((HOST, 5000))
        client.send(b"hello")
        record, stream = holder.accept()
        with stream:
            assert record.peer == client.getsockname()
            assert stream.recv(10) == b"hello"
    holder.close()


@pytest.mark.parametrize(
    ("flags", "replies"), [(0, [0, 0]), (RequestFlag.UNPRIVILEGED, [errno.EACCES, 0, 0])]
)
def test_each_request_is_consumed_once(
    shared_fabric: PrivateFabric, flags: int, replies: list[int]
) -> None:
    """A request that arrives while the one before is served is not discarded with that.

    The first one has flags if a program of an ordinary user binds under ``vsock run``.
    """
    with (
        socket.socket(socket.AF_UNIX) as sock,
        enter(shared_fabric.host, socket.SOCK_SEQPACKET) as channel,
    ):
        with paused(shared_fabric.pid):
            for port in (80, 5000)[-len(replies) + 1 :]:  # the first of two is refused
                binding = bind_socket(port)._replace(flags=flags)
                send_with(channel, binding.encode(), [sock.fileno()])
            channel.send(listen().encode())
        assert [Record.decode(channel.recv(RECORD_SIZE)).status for _ in replies] == replies


def test_pending_connections_are_counted(shared_fabric: PrivateFabric, holder: Holder) -> None:
    def waiting() -> list[int]:
        rows = shared_fabric.control.sockets()
        return [row["receive_queue"] for row in rows if row["state"] == "listening"]

    guest = guest_of(shared_fabric)
    with ExitStack() as clients:
        for number in range(6):
            client = clients.enter_context(vsockets.socket(context=guest))
            assert client.connect_ex((HOST, 5000)) == 0
            assert waiting() == [number + 1]
        assert errno_of_connecting(guest) == errno.ECONNRESET
        for number in range(5, -1, -1):
            holder.accept()[1].close()
            assert waiting() == [number]


def test_nothing_can_be_sent_to_vsockd(shared_fabric: PrivateFabric, holder: Holder) -> None:
    """Closing it could block vsockd."""
    with vsockets.socket(context=guest_of(shared_fabric)) as client:
        client.connect((HOST, 5000))
        with holder.sock.accept()[0] as token, pytest.raises(BrokenPipeError):
            send_with(token, b"x", [token.fileno()])


def test_a_closed_socket_has_no_port(shared_fabric: PrivateFabric, holder: Holder) -> None:
    holder.sock.close()
    assert errno_of_connecting(guest_of(shared_fabric)) == errno.ECONNRESET
    holder.assert_given_up(closed=True)


def test_its_port_can_be_bound_again_at_once(shared_fabric: PrivateFabric, holder: Holder) -> None:
    holder.sock.close()
    with vsockets.socket(context=shared_fabric.host) as other:
        other.bind((HOST, 5000))
    holder.assert_given_up(closed=True)


def test_a_closed_socket_is_not_listed(shared_fabric: PrivateFabric, holder: Holder) -> None:
    assert len(shared_fabric.control.sockets()) == 1
    holder.sock.close()
    assert shared_fabric.control.sockets() == []


def test_a_timer_detects_closed_sockets(shared_fabric: PrivateFabric, holder: Holder) -> None:
    holder.sock.close()
    holder.assert_given_up(closed=True)


def test_one_that_was_shut_down(shared_fabric: PrivateFabric, holder: Holder) -> None:
    """The program knows; a client finds that out late, as with a program that closes it."""
    holder.sock.shutdown(socket.SHUT_RDWR)
    guest = guest_of(shared_fabric)
    wait_until(lambda: errno_of_connecting(guest) == errno.ECONNRESET, "vsockd to find out")


def test_one_that_does_not_listen(shared_fabric: PrivateFabric) -> None:
    """Although its supervisor reports that it listens."""
    holder = Holder(shared_fabric.host, 5000)
    assert ask(holder.channel, listen()).status == 0
    guest = guest_of(shared_fabric)
    with vsockets.socket(context=guest) as client:
        assert client.connect_ex((HOST, 5000)) in (0, errno.ECONNRESET)
    assert errno_of_connecting(guest) == errno.ECONNRESET
    holder.assert_given_up(closed=True)
    holder.close()


def test_the_channel_holds_it(shared_fabric: PrivateFabric, holder: Holder) -> None:
    holder.channel.close()
    guest = guest_of(shared_fabric)
    wait_until(lambda: errno_of_connecting(guest) == errno.ECONNRESET, "the port to be free")
    assert shared_fabric.control.sockets() == []


def test_another_takes_its_place(shared_fabric: PrivateFabric) -> None:
    holder = Holder(shared_fabric.host, 5000)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as other:
        assert holder.bind(other, ANY).local == (HOST, 5000)
        holder.sock.close()
        holder.sock = other
        holder.listen()
        (row,) = shared_fabric.control.sockets()
        assert (row["type"], row["inode"]) == ("stream", os.fstat(other.fileno()).st_ino)
        with vsockets.socket(context=guest_of(shared_fabric)) as client:
            client.connect((HOST, 5000))
            _, stream = holder.accept()
            with stream:
                assert stream.type == socket.SOCK_STREAM
    holder.close()


class TestConnecting:
    """Connects from the port that a socket is bound to."""

    def attempt(self, context: Attachment, secret: int) -> Record:
        request = connect(HOST, 6000)._replace(inode=secret)
        with enter(context, socket.SOCK_STREAM) as sock:
            return ask(sock, request)

    def test_the_secret_proves_it(self, shared_fabric: PrivateFabric) -> None:
        holder = Holder(shared_fabric.host, 5000)
        with vsockets.create_server((HOST, 6000), context=shared_fabric.host):
            assert self.attempt(shared_fabric.host, SECRET).local == (HOST, 5000)
            # The port is released.
            assert self.attempt(shared_fabric.host, SECRET).status == errno.EINVAL
        holder.close()

    def test_the_secret_cannot_be_guessed(self, shared_fabric: PrivateFabric) -> None:
        holder = Holder(shared_fabric.host, 5000)
        with vsockets.create_server((HOST, 6000), context=shared_fabric.host):
            for secret in (1, SECRET + 1, cookie_of(holder.sock)):
                assert self.attempt(shared_fabric.host, secret).status == errno.EINVAL
            assert self.attempt(guest_of(shared_fabric), SECRET).status == errno.EINVAL
            assert self.attempt(shared_fabric.host, SECRET).local == (HOST, 5000)
        holder.close()

    def test_a_refusal_and_another_socket(self, shared_fabric: PrivateFabric) -> None:
        holder = Holder(shared_fabric.host, 5000)
        request = connect(HOST, 6000)._replace(inode=SECRET)
        with enter(shared_fabric.host, socket.SOCK_STREAM) as refused:
            for _ in range(2):
                assert ask(refused, request).status == errno.ECONNRESET
            with socket.socket(socket.AF_UNIX) as other:
                assert holder.bind(other, ANY).local == (HOST, 5000)
                holder.sock.close()
                holder.sock = other
                refused.close()
                holder.listen()
                with vsockets.create_connection((HOST, 5000), context=guest_of(shared_fabric)):
                    holder.accept()[1].close()
        holder.close()

    def test_a_listening_socket_cannot_connect(
        self, shared_fabric: PrivateFabric, holder: Holder
    ) -> None:
        with enter(shared_fabric.host, socket.SOCK_STREAM) as sock:
            sock.send(connect(HOST, 6000)._replace(inode=SECRET).encode())
            assert sock.recv(RECORD_SIZE) == b""
        with vsockets.create_connection((HOST, 5000), context=guest_of(shared_fabric)):
            holder.accept()[1].close()


class TestAbuse:
    @contextmanager
    def asking(
        self, context: Attachment, descriptors: list[int], secret: int = SECRET
    ) -> Iterator[socket.socket]:
        """Yield a connection with a request on it."""
        with enter(context, socket.SOCK_SEQPACKET) as sock:
            send_with(sock, bind_socket(5000, secret).encode(), descriptors)
            yield sock

    def test_other_descriptors(self, shared_fabric: PrivateFabric) -> None:
        host = shared_fabric.host
        with (
            tempfile.TemporaryFile() as file,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
            socket.socket(socket.AF_INET) as tcp,
        ):
            for other in (file, datagrams, tcp):
                with self.asking(host, [other.fileno()]) as sock:
                    assert has_ended(sock)
        with enter(host, socket.SOCK_SEQPACKET) as sock:
            sock.send(bind_socket(5000).encode())
            assert has_ended(sock)
        with enter(host, socket.SOCK_STREAM) as sock, socket.socket(socket.AF_UNIX) as other:
            if HAS_PASSRIGHTS:
                with pytest.raises(PermissionError):  # by the kernel: descriptors are refused
                    send_with(sock, bind_socket(5000).encode(), [other.fileno()])
                sock.send(bind_socket(5000).encode())
            else:
                send_with(sock, bind_socket(5000).encode(), [other.fileno()])
            assert has_ended(sock)

    def test_bound_sockets_are_refused(self, shared_fabric: PrivateFabric, holder: Holder) -> None:
        with self.asking(shared_fabric.host, [holder.sock.fileno()], SECRET + 1) as sock:
            assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EADDRINUSE
        with socket.socket(socket.AF_UNIX) as other:
            other.bind("")
            with enter(shared_fabric.host, socket.SOCK_SEQPACKET) as sock:
                send_with(sock, bind_socket(5001, SECRET + 1).encode(), [other.fileno()])
                assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EINVAL
        assert [row["port"] for row in shared_fabric.control.sockets()] == [5000]

    def test_invalid_secrets(self, shared_fabric: PrivateFabric, holder: Holder) -> None:
        with socket.socket(socket.AF_UNIX) as other:
            for secret in (0, SECRET):
                with self.asking(shared_fabric.host, [other.fileno()], secret) as sock:
                    assert has_ended(sock)
        with vsockets.create_connection((HOST, 5000), context=guest_of(shared_fabric)):
            holder.accept()[1].close()

    def test_very_many_leave_nothing(self, shared_fabric: PrivateFabric) -> None:
        with ExitStack() as held:
            for number in range(300):
                holder = Holder(shared_fabric.host, ANY, secret=SECRET + number)
                held.callback(holder.close)
                assert holder.record.status == 0
                holder.listen()
            for row in shared_fabric.control.sockets():
                assert errno_of_connecting(guest_of(shared_fabric), row["port"]) == 0


def test_connect_at_the_limit_finds_the_listener_closed(private_fabric: PrivateFabric) -> None:
    """vsockd releases what is closed at a party's limit, the requested listener included."""
    guest = private_fabric.guest(3, limits={"sockets": 1})
    holder = Holder(private_fabric.host, 5000)
    holder.listen()
    with vsockets.socket(context=guest) as bound:
        bound.bind((3, 6000))
        holder.sock.close()
        assert bound.connect_ex((HOST, 5000)) == errno.ECONNRESET
        assert bound.getsockname() == (3, 6000)
    holder.close()
