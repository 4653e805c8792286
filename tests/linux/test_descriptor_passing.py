"""Protection against descriptors in messages, on kernels with and without SO_PASSRIGHTS."""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from vsockets._linux import descriptor_passing
from vsockets._linux.sockets import HAS_PASSRIGHTS
from vsockets.limits import DESCRIPTOR_CLOSE_THREADS_MAX

PATIENCE = 20.0
STREAM, DGRAM = socket.SOCK_STREAM, socket.SOCK_DGRAM


from_linux_6_16 = pytest.mark.skipif(not HAS_PASSRIGHTS, reason="takes Linux 6.16")


@pytest.fixture
def old_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulate a kernel before Linux 6.16."""
    monkeypatch.setattr(descriptor_passing, "refuse_descriptors", lambda sock: False)
    monkeypatch.setattr(descriptor_passing, "_refuses", lambda sock: False)


def pair(kind: int = STREAM) -> tuple[socket.socket, socket.socket]:
    """Yield two connected sockets, of which the second is guarded."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    theirs.settimeout(PATIENCE)
    return ours, descriptor_passing.guard(theirs)


def send_with(sock: socket.socket, data: bytes, *descriptors: int) -> None:
    rights = array.array("i", descriptors)
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])


@contextlib.contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    reader, writer = os.pipe()
    try:
        yield reader, writer
    finally:
        os.close(reader)


@from_linux_6_16
@pytest.mark.parametrize("kind", [STREAM, DGRAM])
def test_kernel_refuses_descriptors_with_eperm(kind: int) -> None:
    ours, theirs = pair(kind)
    with ours, theirs:
        assert not descriptor_passing.is_guarded(theirs)
        with pytest.raises(PermissionError):
            send_with(ours, b"x", 0)
        ours.send(b"data")
        assert theirs.recv(100) == b"data"


@from_linux_6_16
def test_descriptors_sent_before_accept_are_closed() -> None:
    with pipe() as (reader, writer), socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        with socket.socket(socket.AF_UNIX) as ours:
            ours.connect(listener.getsockname())
            send_with(ours, b"early", writer)
            os.close(writer)
            theirs = descriptor_passing.guard_accepted(listener.accept()[0])
            with theirs, pytest.raises(PermissionError):
                send_with(ours, b"late", 0)
            assert descriptor_passing.is_guarded(theirs)
        assert os.read(reader, 1) == b""


@pytest.mark.usefixtures("old_kernel")
class TestOlderKernels:
    @pytest.mark.parametrize("number", [1, 253])
    @pytest.mark.parametrize("kind", [STREAM, DGRAM])
    @pytest.mark.parametrize("how", ["recv", "recvfrom", "recv_into", "close"])
    def test_received_descriptors_are_closed(self, kind: int, how: str, number: int) -> None:
        with pipe() as (reader, writer):
            ours, theirs = pair(kind)
            with ours, theirs:
                assert descriptor_passing.is_guarded(theirs)
                send_with(ours, b"data", *[writer] * number)
                os.close(writer)
                buffer = bytearray(100)
                if how == "recv":
                    assert theirs.recv(100) == b"data"
                elif how == "recvfrom":
                    assert theirs.recvfrom(100)[0] == b"data"
                elif how == "recv_into":
                    assert theirs.recv_into(buffer) == 4
                    assert buffer[:4] == b"data"
                else:
                    theirs.close()
                # The pipe ends when the last descriptor of its write end is closed.
                assert os.read(reader, 1) == b""

    def test_peer_sees_the_end_after_close(self) -> None:
        ours, theirs = pair()
        with ours:
            ours.settimeout(PATIENCE)
            theirs.close()
            theirs.close()
            assert ours.recv(1) == b""
            assert theirs.fileno() == -1

    def test_tcp_socket_is_not_guarded(self) -> None:
        with socket.socket() as sock:
            assert not descriptor_passing.is_guarded(descriptor_passing.guard(sock))

    def test_blocking_closes_delay_neither_the_receiver_nor_other_closes(self) -> None:
        """Send a socket that lingers, and sockets with one that lingers in their queue."""
        with contextlib.ExitStack() as stack:
            for number in range(DESCRIPTOR_CLOSE_THREADS_MAX // 2):
                slow = stack.enter_context(lingering())
                if number:
                    slow = nested(slow)
                ours, theirs = pair()
                with ours, theirs:
                    send_with(ours, b"x", slow.fileno())
                    slow.close()
                    assert theirs.recv(1) == b"x"
            for _ in range(3):
                with pipe() as (reader, writer):
                    descriptor_passing.dispose(writer)
                    assert os.read(reader, 1) == b""


@contextlib.contextmanager
def lingering() -> Iterator[socket.socket]:
    """Yield a TCP socket whose last close() blocks for half a minute, or until the context ends."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        sock = socket.create_connection(server.getsockname())
        peer, _ = server.accept()
    with peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 30))
        sock.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                sock.send(bytes(65_536))
        yield sock


def nested(sock: socket.socket) -> socket.socket:
    """Yield a socket with an unread message that carries ``sock``."""
    outer, sender = socket.socketpair(socket.AF_UNIX, DGRAM)
    with sender, sock:
        send_with(sender, b"x", sock.fileno())
    return outer
