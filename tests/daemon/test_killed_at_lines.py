"""vsockd is killed within requests, at lines of its code in turn: each request is done once.

``make test-every-line`` leaves out no line, in five minutes.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets import AF_VSOCK, Attachment
from vsockets.protocol import Op, Record, Request

from .continuity import PATIENCE, datagram
from .killed_at_lines import Killed, add_guest, killed_vsockd
from .raw_client import ask, bind, enter, listen

#: How often vsockd is killed in each test, and the lines that it executes more each time.
KILLS = int(os.environ.get("VSOCKETS_TEST_KILLS", "4"))
STEP = 67 if KILLS < 100 else 1


class World:
    """A vsockd that is killed again and again, a guest, and two servers of the host."""

    def __init__(self, killed: Killed, stack: contextlib.ExitStack) -> None:
        self.killed = killed
        self.host = Attachment(killed.folder / "2")
        self.guest = Attachment(add_guest(killed.folder))
        self.server = stack.enter_context(vsockets.create_server((2, 5000), context=self.host))
        self.packets = stack.enter_context(self.socket(self.host, socket.SOCK_SEQPACKET))
        self.packets.bind((2, 5001))
        self.packets.listen()
        for one in (self.server, self.packets):
            one.settimeout(PATIENCE)

    @staticmethod
    def socket(context: Attachment, type_: int = socket.SOCK_STREAM) -> vsockets.socket:
        sock = vsockets.socket(AF_VSOCK, type_, context=context)
        sock.settimeout(PATIENCE)
        return sock


@contextlib.contextmanager
def new_world(first: int, step: int, function: str = "") -> Iterator[World]:
    with contextlib.ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="vk-", dir="/tmp"))
        killed = stack.enter_context(killed_vsockd(Path(scratch), first, step, function))
        yield World(killed, stack)


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    with new_world(STEP, STEP) as world:
        yield world


def exchange(client: vsockets.socket, server: vsockets.socket) -> None:
    """Exchange data with the next connection of ``server``, which is to be the client's."""
    accepted, peer = server.accept()
    with accepted:
        assert peer == client.getsockname()
        for one, other in ((client, accepted), (accepted, client)):
            data = os.urandom(8)
            one.settimeout(PATIENCE)
            other.settimeout(PATIENCE)
            one.send(data)
            assert other.recv(100) == data


def connect(world: World) -> None:
    with vsockets.create_connection((2, 5000), context=world.guest) as client:
        exchange(client, world.server)


def connect_without_blocking(world: World) -> None:
    with world.socket(world.guest) as client:
        client.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            client.connect((2, 5000))
        assert select.select([], [client], [], PATIENCE)[1]
        assert client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
        exchange(client, world.server)


def connect_after_a_refusal(world: World) -> None:
    with world.socket(world.guest) as client:
        with pytest.raises(ConnectionResetError):
            client.connect((2, 5999))
        client.connect((2, 5000))
        exchange(client, world.server)


def connect_with_packets(world: World) -> None:
    with world.socket(world.guest, socket.SOCK_SEQPACKET) as client:
        client.connect((2, 5001))
        exchange(client, world.packets)


def connect_to_a_server_that_does_not_read(world: World) -> None:
    """The client is connected, and then sees the end, as without a kill."""
    with enter(world.host) as server:
        assert ask(server, bind(5002)).status == 0
        assert ask(server, listen()).status == 0
        server.shutdown(socket.SHUT_RD)
        with enter(world.guest) as client:
            client.send(Request(Op.CONNECT, 0, 0, 0, 2, 5002, 0, 65536, 128, 262144).encode())
            reply = client.recv(1000)
            assert Record.decode(reply).status == 0
            assert client.recv(1000) == b""


def serve(world: World) -> None:
    with vsockets.create_server((world.guest.cid, 6000), context=world.guest) as server:
        server.settimeout(PATIENCE)
        with vsockets.create_connection((world.guest.cid, 6000), context=world.host) as client:
            exchange(client, server)


def send_datagrams(world: World) -> None:
    guest = world.guest
    with datagram(guest, (guest.cid, 6001)) as one, datagram(guest, (guest.cid, 6002)) as two:
        one.sendto(b"hello", (guest.cid, 6002))
        assert two.recvfrom(10) == (b"hello", (guest.cid, 6001))


@pytest.mark.parametrize(
    "operation",
    [
        connect,
        connect_without_blocking,
        connect_after_a_refusal,
        connect_with_packets,
        connect_to_a_server_that_does_not_read,
        serve,
        send_datagrams,
    ],
)
def test_every_request_is_done_once(world: World, operation: Callable[[World], None]) -> None:
    kills = world.killed.kills + KILLS
    while world.killed.kills < kills:
        operation(world)


def test_a_request_is_not_served_again_after_its_last_step() -> None:
    """The killed vsockd has dropped the listener of a connect that it could not announce."""
    with new_world(14, 1000, "drop") as world:  # the line after the journal's entry
        connect_to_a_server_that_does_not_read(world)
        assert world.killed.kills == 1
