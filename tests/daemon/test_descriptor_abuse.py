"""Descriptors that were not requested, and descriptors that close slowly.

Each test's fixture also checks that others are served promptly, during the abuse and after it, that
vsockd has no more descriptors at the end than at the start, and that it logs no error.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Callable

import pytest

from vsockets.protocol import RECORD_SIZE, Record
from vsockets.testing import PrivateFabric

from .raw_client import (
    ANY,
    LOCAL_CID,
    SOCKET_TYPES,
    adopt,
    ask_for_route,
    assert_serves,
    bind,
    bind_datagram,
    enter,
    has_ended,
    paused,
    send_with,
)

STREAM, SEQPACKET = socket.SOCK_STREAM, socket.SOCK_SEQPACKET
both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)


@both_types
def test_unrequested_descriptors_are_closed(shared_fabric: PrivateFabric, sock_type: int) -> None:
    reader, writer = os.pipe()
    with enter(shared_fabric.host, sock_type) as sock:
        try:
            send_with(sock, bind(5000).encode(), [writer] * 100)
        except PermissionError:  # vsockd takes none there, the kernel says
            sock.send(bind(5000).encode())
        assert Record.decode(sock.recv(RECORD_SIZE)).local == (2, 5000)
        os.close(writer)
        # The pipe reports its end once no process has its other end.
        assert os.read(reader, 1) == b""
        try:
            send_with(sock, b"x", [reader] * 100)
        except PermissionError:
            sock.send(b"x")
        assert has_ended(sock)
    os.close(reader)


def lingering_socket() -> tuple[socket.socket, Callable[[], None]]:
    """Return a TCP socket whose last close() takes half a minute, and a function to end that."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
    sock.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            sock.send(bytes(65_536))
    return sock, peer.close


def nested(sock: socket.socket) -> socket.socket:
    """Return a datagram socket with an unread message that carries ``sock``."""
    outer, sender = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with sender:
        send_with(sender, b"x", [sock.fileno()])
    return outer


class TestSlowClose:
    """The last close of a socket takes as long as its creator likes: vsockd must not wait for it.

    A process that closes a descriptor of a lingering TCP socket, or of a file on a file system
    made for the purpose, sleeps in the kernel.  That includes descriptors in a message: the kernel
    closes them in the process that receives the message, or discards it.
    """

    def attack(
        self,
        fabric: PrivateFabric,
        sock_type: int,
        messages: list[bytes],
        wrap: Callable[[socket.socket], socket.socket] = lambda sock: sock,
    ) -> None:
        slow, hurry = lingering_socket()
        wrapped = wrap(slow)
        try:
            with paused(fabric.pid):
                with enter(fabric.host, sock_type) as sock:
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

    @both_types
    def test_with_a_request(self, shared_fabric: PrivateFabric, sock_type: int) -> None:
        self.attack(shared_fabric, sock_type, [LOCAL_CID.encode()])

    @both_types
    def test_with_garbage(self, shared_fabric: PrivateFabric, sock_type: int) -> None:
        self.attack(shared_fabric, sock_type, [b"x"])

    @both_types
    def test_with_a_message_that_is_never_received(
        self, shared_fabric: PrivateFabric, sock_type: int
    ) -> None:
        self.attack(shared_fabric, sock_type, [b"x", b"x"])

    def test_as_the_datagram_socket(self, shared_fabric: PrivateFabric) -> None:
        self.attack(shared_fabric, SEQPACKET, [bind_datagram().encode()])

    @pytest.mark.parametrize("cid", [0, ANY], ids=["refused", "granted"])
    def test_within_the_datagram_socket(self, shared_fabric: PrivateFabric, cid: int) -> None:
        self.attack(
            shared_fabric, SEQPACKET, [bind_datagram()._replace(local_cid=cid).encode()], nested
        )

    def test_within_a_route(self, shared_fabric: PrivateFabric) -> None:
        """The receiver of a datagram sees the route's name, and could send a message to it."""
        slow, hurry = lingering_socket()
        with (
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender,
        ):
            assert adopt(shared_fabric.host, receiver, 5000).status == 0
            with ask_for_route(shared_fabric.host, sender, (2, 5000)) as made:
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
                ask_for_route(shared_fabric.host, sender, (2, 5000)).close()
                assert_serves(shared_fabric)
            finally:
                hurry()
