"""Programs that do not keep to the protocol harm themselves only.

The fixture of every test adds: others are served promptly, during the abuse and after it;
vsockd has no descriptor more in the end than in the beginning, and it logs no error.
"""

from __future__ import annotations

import array
import contextlib
import errno
import os
import socket
import struct
from collections.abc import Callable

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until
from vsockets.wire import PADDING, RECORD_SIZE, REQUEST_SIZE, Flag, Op, Record, Request, Role

from .raw_client import (
    ANY,
    DOORS,
    LOCAL_CID,
    PROMPT,
    SIZES,
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
    send_with,
)

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
both_doors = pytest.mark.parametrize("door", DOORS)

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


# Requests that are none


@both_doors
@pytest.mark.parametrize("what", MALFORMED)
def test_malformed_request(shared_fabric: PrivateFabric, door: int, what: str) -> None:
    with enter(shared_fabric.host, door) as sock:
        sock.send(MALFORMED[what])
        assert has_ended(sock)


@both_doors
def test_malformed_request_after_a_good_one(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
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


@both_doors
def test_a_flood_of_garbage(shared_fabric: PrivateFabric, door: int) -> None:
    for _ in range(200):
        with enter(shared_fabric.host, door) as sock, contextlib.suppress(OSError):
            while True:
                sock.send(os.urandom(4096), socket.MSG_DONTWAIT)


@both_doors
def test_a_request_that_is_not_sent(shared_fabric: PrivateFabric, door: int) -> None:
    with contextlib.ExitStack() as silent:
        for _ in range(500):
            silent.enter_context(enter(shared_fabric.host, door))
        assert_serves(shared_fabric)


@both_doors
def test_gone_before_it_is_looked_at(shared_fabric: PrivateFabric, door: int) -> None:
    with paused(shared_fabric.pid):
        for request in (LOCAL_CID, bind(5000), listen(), connect(2, 5000), Request(9)):
            with enter(shared_fabric.host, door) as sock:
                sock.send(request.encode())
        enter(shared_fabric.host, door).close()


@both_doors
def test_gone_after_a_request_while_connected(shared_fabric: PrivateFabric, door: int) -> None:
    """As before, on connections that vsockd knows already."""
    for request in (LOCAL_CID, bind(5001), listen(), connect(2, 5000), Request(9)):
        with enter(shared_fabric.host, door) as sock:
            assert ask(sock, bind(5000)).status == 0
            with paused(shared_fabric.pid):
                sock.send(request.encode())
                sock.close()
        wait_until(lambda: shared_fabric.control.sockets() == [], "vsockd to notice", PROMPT)


@both_doors
def test_an_answer_that_is_not_read(shared_fabric: PrivateFabric, door: int) -> None:
    """Sooner or later the answers do not fit; that is the program's loss alone."""
    with enter(shared_fabric.host, door) as sock:
        sock.setblocking(False)
        sent = 0
        while sent < 20_000:
            try:
                sock.send(bind(5000).encode())
            except BlockingIOError:
                break
            sent += 1
        assert_serves(shared_fabric)


# Operations out of their order


@both_doors
def test_listen_without_bind(shared_fabric: PrivateFabric, door: int) -> None:
    assert ask_once(shared_fabric.host, listen(), door).status == errno.EINVAL


@both_doors
def test_bind_twice(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, bind(5001)).status == errno.EINVAL
        assert len(shared_fabric.control.sockets()) == 1


@both_doors
def test_connect_on_a_listening_socket(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, listen()).status == 0
        sock.send(connect(2, 5000).encode())
        assert has_ended(sock)


@both_doors
def test_connect_to_oneself(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
        assert ask(sock, bind(5000)).status == 0
        assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET


@both_doors
def test_a_refused_program_may_try_again(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
        for _ in range(3):
            assert ask(sock, connect(2, 5000)).status == errno.ECONNRESET
            assert ask(sock, listen()).status == errno.EINVAL
        assert ask(sock, bind(5000)).status == 0


@pytest.mark.parametrize("request_", [bind_datagram(), route(2, 5000)])
def test_datagram_request_on_a_stream(shared_fabric: PrivateFabric, request_: Request) -> None:
    with enter(shared_fabric.host, STREAM) as sock:
        sock.send(request_.encode())
        assert has_ended(sock)


@both_doors
def test_polling_flag_without_padding(shared_fabric: PrivateFabric, door: int) -> None:
    with enter(shared_fabric.host, door) as sock:
        request = connect(2, 5000)._replace(flags=Flag.POLLING)
        assert ask(sock, request).status == errno.ECONNRESET


@both_doors
def test_polling_flag_where_nobody_polls(shared_fabric: PrivateFabric, door: int) -> None:
    for op in Op:
        with enter(shared_fabric.host, door) as sock:
            sock.send(Request(op, 0xFFFF, 9, 9, 9, 9, 9, *SIZES).encode() + PADDING)
            if op is not Op.UPDATE:  # that is not answered
                with contextlib.suppress(ConnectionResetError):
                    sock.recv(RECORD_SIZE)


# Numbers out of their range


HUGE = 2**64 - 1


@both_doors
@pytest.mark.parametrize("backlog", [0, 1, 2**31 - 1, 2**32 - 1])
def test_backlog_of_any_size(shared_fabric: PrivateFabric, door: int, backlog: int) -> None:
    with enter(shared_fabric.host, door) as server:
        ask(server, bind(5000))
        assert ask(server, listen(backlog)).role == Role.LISTENING
        # As in Linux, even a backlog of 0 lets one connection wait.
        with enter(shared_fabric.host, door) as client:
            assert ask(client, connect(2, 5000)).status == 0


@both_doors
@pytest.mark.parametrize("size", [0, 1, 2**31, 2**32, 2**63, HUGE])
def test_buffers_of_any_size(shared_fabric: PrivateFabric, door: int, size: int) -> None:
    sizes = {"size": size, "minimum": 0, "maximum": HUGE}
    with enter(shared_fabric.host, door) as server, enter(shared_fabric.host, door) as client:
        ask(server, bind(5000)._replace(**sizes))
        assert ask(server, listen()._replace(**sizes)).status == 0
        answer = ask(client, connect(2, 5000)._replace(**sizes))
        assert (answer.status, answer.size) == (0, size)


@both_doors
def test_every_field_at_its_largest(shared_fabric: PrivateFabric, door: int) -> None:
    for op in Op:
        request = Request(op, 0xFFFF, *[2**32 - 1] * 5, *[HUGE] * 5)
        with enter(shared_fabric.host, door) as sock:
            sock.send(request.encode())
        with enter(shared_fabric.host, door) as sock:
            ask(sock, bind())
            sock.send(request.encode())


# Descriptors nobody asked for


def adopt(fabric: PrivateFabric, datagrams: socket.socket, port: int) -> Record:
    """Have vsockd bind a datagram socket, in the orderly way."""
    with enter(fabric.host, SEQPACKET) as sock:
        send_with(sock, bind_datagram(port).encode(), [datagrams.fileno()])
        return Record.decode(sock.recv(RECORD_SIZE))


@both_doors
def test_descriptors_unasked(shared_fabric: PrivateFabric, door: int) -> None:
    reader, writer = os.pipe()
    with enter(shared_fabric.host, door) as sock:
        try:
            send_with(sock, bind(5000).encode(), [writer] * 100)
        except PermissionError:  # vsockd takes none there, the kernel says
            sock.send(bind(5000).encode())
        assert Record.decode(sock.recv(RECORD_SIZE)).local == (2, 5000)
        os.close(writer)
        # The pipe ends as soon as nobody has its other end.
        assert os.read(reader, 1) == b""
        try:
            send_with(sock, b"x", [reader] * 100)
        except PermissionError:
            sock.send(b"x")
        assert has_ended(sock)
    os.close(reader)


@pytest.mark.parametrize("request_", [bind_datagram(5000), route(2, 5000)])
class TestDatagramRequests:
    def test_without_a_descriptor(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        with enter(shared_fabric.host, SEQPACKET) as sock:
            sock.send(request_.encode())
            assert has_ended(sock)

    def test_with_a_pipe(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        reader, writer = os.pipe()
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [writer])
            assert has_ended(sock)
        os.close(writer)
        assert os.read(reader, 1) == b""
        os.close(reader)

    @pytest.mark.parametrize("kind", [STREAM, SEQPACKET])
    def test_with_a_connected_socket(
        self, shared_fabric: PrivateFabric, request_: Request, kind: int
    ) -> None:
        mine, theirs = socket.socketpair(socket.AF_UNIX, kind)
        mine.settimeout(PROMPT)
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [theirs.fileno()])
            assert has_ended(sock)
        theirs.close()
        assert mine.recv(1) == b""
        mine.close()

    def test_with_an_internet_socket(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            send_with(sock, request_.encode(), [udp.fileno()])
            assert has_ended(sock)

    def test_with_a_folder(self, shared_fabric: PrivateFabric, request_: Request) -> None:
        folder = os.open("/", os.O_PATH)
        with enter(shared_fabric.host, SEQPACKET) as sock:
            send_with(sock, request_.encode(), [folder])
            assert has_ended(sock)
        os.close(folder)

    def test_with_a_socket_that_has_a_name(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as taken,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            assert adopt(shared_fabric, receiver, 5000).status == 0
            taken.bind("")  # the kernel picks one
            send_with(sock, request_._replace(local_port=5001).encode(), [taken.fileno()])
            assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EINVAL

    def test_with_several_descriptors(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        reader, writer = os.pipe()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as datagrams,
            enter(shared_fabric.host, SEQPACKET) as sock,
        ):
            # The first is the socket; the others are not even received.
            send_with(sock, request_.encode(), [datagrams.fileno(), writer, writer])
            assert Record.decode(sock.recv(RECORD_SIZE)).status in (0, errno.ECONNREFUSED)
            os.close(writer)
            assert os.read(reader, 1) == b""
        os.close(reader)

    def test_gone_before_it_is_looked_at(
        self, shared_fabric: PrivateFabric, request_: Request
    ) -> None:
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
            enter(shared_fabric.host, SEQPACKET) as known,
        ):
            assert adopt(shared_fabric, receiver, 5000).status == 0
            assert ask(known, bind()).status == 0
            request = request_._replace(local_port=ANY)
            with paused(shared_fabric.pid):
                for sock in (enter(shared_fabric.host, SEQPACKET), known):
                    send_with(sock, request.encode(), [sender.fileno()])
                    sock.close()
            assert_serves(shared_fabric)


def ask_for_route(fabric: PrivateFabric, sender: socket.socket, port: int) -> socket.socket:
    """The way from a datagram socket to one of the host's, in the orderly way."""
    with enter(fabric.host, SEQPACKET) as sock:
        send_with(sock, route(2, port).encode(), [sender.fileno()])
        data, (descriptor,), _, _ = socket.recv_fds(sock, RECORD_SIZE, 1)
        assert Record.decode(data).status == 0
        return socket.socket(fileno=descriptor)


def lingering_socket() -> tuple[socket.socket, Callable[[], None]]:
    """A TCP socket whose last close() takes five seconds, and a function that ends the wait."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 5))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))
    return sock, peer.close


def nested(sock: socket.socket) -> socket.socket:
    """A datagram socket, with a message waiting in it that carries ``sock``."""
    outer, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender:
        send_with(sender, b"x", [sock.fileno()])
    return outer


class TestDescriptorsThatAreSlowToClose:
    """Whoever closes a socket last waits as long as the socket's maker likes: never vsockd.

    A process that closes a descriptor of a lingering TCP socket, or of a file on a file system
    made for the purpose, sleeps in the kernel.  That includes descriptors which ride along with
    a message: the kernel closes them in whoever receives the message, or throws it away.
    """

    def attack(
        self,
        fabric: PrivateFabric,
        door: int,
        messages: list[bytes],
        wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock,
    ) -> None:
        slow, hurry = lingering_socket()
        wrapped = wrap(slow)
        try:
            with paused(fabric.pid):
                with enter(fabric.host, door) as sock:
                    for message in messages[:-1]:
                        sock.send(message)
                    # A vsockd that takes no descriptors at all makes this fail: good, too.
                    try:
                        send_with(sock, messages[-1], [wrapped.fileno()])
                    except PermissionError:
                        hurry()
                slow.close()
                wrapped.close()
            assert_serves(fabric)  # PROMPT is less than what the socket lingers
        finally:
            hurry()

    @both_doors
    def test_with_a_request(self, shared_fabric: PrivateFabric, door: int) -> None:
        self.attack(shared_fabric, door, [LOCAL_CID.encode()])

    @both_doors
    def test_with_garbage(self, shared_fabric: PrivateFabric, door: int) -> None:
        self.attack(shared_fabric, door, [b"x"])

    @both_doors
    def test_with_a_message_that_is_never_received(
        self, shared_fabric: PrivateFabric, door: int
    ) -> None:
        self.attack(shared_fabric, door, [b"x", b"x"])

    def test_as_the_datagram_socket(self, shared_fabric: PrivateFabric) -> None:
        self.attack(shared_fabric, SEQPACKET, [bind_datagram().encode()])

    @pytest.mark.parametrize("cid", [0, ANY], ids=["refused", "granted"])
    def test_within_the_datagram_socket(self, shared_fabric: PrivateFabric, cid: int) -> None:
        self.attack(
            shared_fabric, SEQPACKET, [bind_datagram()._replace(local_cid=cid).encode()], nested
        )

    def test_within_a_route(self, shared_fabric: PrivateFabric) -> None:
        """Who is sent a datagram sees the route's name, and could send something to it."""
        slow, hurry = lingering_socket()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            assert adopt(shared_fabric, receiver, 5000).status == 0
            with ask_for_route(shared_fabric, sender, 5000) as made:
                made.send(b"x")
            _, name = receiver.recvfrom(1)
            rights = array.array("i", [slow.fileno()])
            try:
                receiver.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)], 0, name)
            except OSError:  # better still
                hurry()
            slow.close()
            try:
                # vsockd makes a new route in place of the old one, which it closes.
                ask_for_route(shared_fabric, sender, 5000).close()
                assert_serves(shared_fabric)
            finally:
                hurry()


# Names that were given already


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
    wait_until(lambda: shared_fabric.control.sockets() == [], "the sockets to be gone", PROMPT)
    assert ask_once(host, query).status == errno.ENOTCONN


def test_a_cookie_that_is_a_lie_is_one_in_its_own_context_only(
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


def test_somebody_elses_datagram_socket(shared_fabric: PrivateFabric) -> None:
    """A socket bound in one context is nothing in another, whoever holds its descriptor."""
    guest = guest_of(shared_fabric)
    with vsockets.socket(type=socket.SOCK_DGRAM, context=shared_fabric.host) as datagrams:
        datagrams.bind((2, 5000))
        with enter(guest, SEQPACKET) as sock:
            send_with(sock, route(2, 5000).encode(), [datagrams.fileno()])
            assert Record.decode(sock.recv(RECORD_SIZE)).status == errno.EINVAL


def test_a_route_is_for_its_destination_only(shared_fabric: PrivateFabric) -> None:
    """A program cannot turn a route round, or give it another name."""
    with (
        vsockets.socket(type=socket.SOCK_DGRAM, context=shared_fabric.host) as receiver,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
    ):
        receiver.bind((2, 5000))
        assert adopt(shared_fabric, sender, 5001).status == 0
        with ask_for_route(shared_fabric, sender, 5000) as made:
            with pytest.raises(OSError, match="Invalid argument"):
                made.bind("\0vsock:2:1:1")
            made.send(b"from me")
            assert receiver.recvfrom(100) == (b"from me", (2, 5001))
