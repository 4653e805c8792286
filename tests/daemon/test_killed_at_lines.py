"""vsockd is killed within requests, at lines of its code in turn: each request is done once.

``make test-every-line`` leaves out no line, in ten minutes.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import select
import socket
import struct
import tempfile
import termios
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import vsockets
from vsockets import AF_VSOCK, Attachment
from vsockets.control import Control
from vsockets.protocol import RECORD_SIZE, Op, Record, Request
from vsockets.testing import wait_until

from .continuity import PATIENCE, datagram
from .killed_at_lines import Killed, add_guest, killed_vsockd
from .raw_client import ask, bind, enter, listen
from .test_device_link import SIZES, Device

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
        self.control = stack.enter_context(Control(killed.folder))
        self.device = Device(self, Attachment(add_guest(killed.folder)))
        stack.enter_context(self.device.link)
        self._ports = itertools.count(10_000)
        self.hybrid = killed.folder.parent / "hybrid"
        behind = Attachment(add_guest(killed.folder, hybrid=str(self.hybrid)))
        self.guests = stack.enter_context(
            vsockets.create_server((behind.cid, 6000), context=behind)
        )
        self.guests.settimeout(PATIENCE)

    def port(self) -> int:
        """Return a port of the device's guest that was not used before."""
        return next(self._ports)

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


def connect_bound_packets(world: World) -> None:
    """vsockd keeps the client's connection between its two requests."""
    with world.socket(world.guest, socket.SOCK_SEQPACKET) as client:
        client.bind((world.guest.cid, world.port()))
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


def exchange_with_device(world: World, stream: socket.socket, address: tuple[int, int]) -> None:
    """Exchange data with the next connection of the servers, which is to be the device's."""
    server = world.server if stream.type == socket.SOCK_STREAM else world.packets
    accepted, peer = server.accept()
    with accepted:
        assert peer == address
        converse(stream, accepted)


def converse(one: socket.socket, other: socket.socket) -> None:
    other.settimeout(PATIENCE)
    for sender, receiver in ((one, other), (other, one)):
        data = os.urandom(8)
        sender.send(data)
        assert receiver.recv(100) == data


def connect_from_a_device(world: World) -> None:
    port = world.port()
    with world.device.connect(port, 2, 5000) as stream:
        record = Record.decode(stream.recv(RECORD_SIZE))
        assert (record.status, record.local) == (0, (world.device.cid, port))
        exchange_with_device(world, stream, record.local)


def connect_from_a_device_with_packets(world: World) -> None:
    port = world.port()
    with world.device.hand_over(socket.SOCK_SEQPACKET) as stream:
        stream.send(connect_request(port, 5001))
        assert Record.decode(stream.recv(RECORD_SIZE)).status == 0
        exchange_with_device(world, stream, (world.device.cid, port))


def connect_request(port: int, to: int) -> bytes:
    return Request(Op.CONNECT, 0, vsockets.VMADDR_CID_ANY, port, 2, to, 0, *SIZES).encode()


def hand_off_from_a_device(world: World, kind: int = socket.SOCK_STREAM) -> None:
    """The descriptor comes with its request, and data is sent before vsockd has it."""
    port = world.port()
    ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
    with ours:
        ours.settimeout(PATIENCE)
        with theirs:
            ours.send(b"early")
            request = connect_request(port, 5000 if kind == socket.SOCK_STREAM else 5001)
            socket.send_fds(world.device.link, [request], [theirs.fileno()])
        server = world.server if kind == socket.SOCK_STREAM else world.packets
        accepted, peer = server.accept()
        with accepted:
            assert peer == (world.device.cid, port)
            accepted.settimeout(PATIENCE)
            assert accepted.recv(100) == b"early"
            converse(ours, accepted)


def hand_off_packets_from_a_device(world: World) -> None:
    hand_off_from_a_device(world, socket.SOCK_SEQPACKET)


def refuse_a_device(world: World) -> None:
    with world.device.connect(world.port(), 2, 5999) as stream:
        assert Record.decode(stream.recv(RECORD_SIZE)).status == errno.ECONNRESET
        assert stream.recv(RECORD_SIZE) == b""


def bind_for_a_device(world: World) -> None:
    """The channel stays open for another request."""
    address = world.device.cid, world.port()
    with world.device.hand_over(socket.SOCK_STREAM) as channel:
        channel.send(Request(Op.BIND, 0, *address, 0, 0, 0, *SIZES).encode())
        assert Record.decode(channel.recv(RECORD_SIZE)).local == address
        channel.send(Request(Op.LISTEN, 0, 0, 0, 0, 0, 5, *SIZES).encode())
        assert Record.decode(channel.recv(RECORD_SIZE)).status == 0


COUNT = Request(Op.COUNT, 0, 0, 0, 0, 0, 0, 0, 0, 0).encode()


def connect_from_a_kept_channel(world: World) -> None:
    """vsockd keeps the device's channel after its first request."""
    port = world.port()
    with world.device.hand_over(socket.SOCK_SEQPACKET) as stream:
        stream.send(COUNT)
        stream.send(connect_request(port, 5001))
        assert Record.decode(stream.recv(RECORD_SIZE)).status == 0
        exchange_with_device(world, stream, (world.device.cid, port))


def refuse_a_kept_channel(world: World) -> None:
    with world.device.hand_over(socket.SOCK_SEQPACKET) as stream:
        stream.send(COUNT)
        stream.send(connect_request(world.port(), 5999))
        assert Record.decode(stream.recv(RECORD_SIZE)).status == errno.ECONNRESET
        assert stream.recv(RECORD_SIZE) == b""


def accept_by_a_device(world: World) -> None:
    """The device refuses the first connect, and accepts the second on the same socket."""
    address = world.device.cid, world.port()
    with world.socket(world.host) as client, ThreadPoolExecutor(1) as pool:
        refused = pool.submit(client.connect, address)
        world.device.refuse()
        with pytest.raises(ConnectionResetError):
            refused.result()
        connected = pool.submit(client.connect, address)
        _, stream = world.device.accept()
        with stream:
            connected.result()
            converse(stream, client)


def connect_to_a_hybrid_socket(world: World) -> None:
    """The CONNECT line is read in pieces, and data follows it at once."""
    with socket.socket(socket.AF_UNIX) as stream:
        stream.settimeout(PATIENCE)
        stream.connect(str(world.hybrid))
        for piece in (b"CON", b"NECT"):
            stream.send(piece)
            wait_until(lambda: not unsent(stream), "vsockd to read the piece")
        stream.send(b" 6000\nearly")
        accepted, (_, port) = world.guests.accept()
        with accepted:
            accepted.settimeout(PATIENCE)
            assert stream.recv(100) == b"OK %d\n" % port
            assert accepted.recv(100) == b"early"
            converse(stream, accepted)


def unsent(sock: socket.socket) -> int:
    """Return the size of what the other end has not read (SIOCOUTQ)."""
    (size,) = struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))
    return int(size)


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
        connect_bound_packets,
        connect_to_a_server_that_does_not_read,
        connect_from_a_device,
        connect_from_a_device_with_packets,
        hand_off_from_a_device,
        hand_off_packets_from_a_device,
        refuse_a_device,
        bind_for_a_device,
        connect_from_a_kept_channel,
        refuse_a_kept_channel,
        accept_by_a_device,
        connect_to_a_hybrid_socket,
        serve,
        send_datagrams,
    ],
)
def test_every_request_is_done_once(world: World, operation: Callable[[World], None]) -> None:
    kills = world.killed.kills + KILLS
    while world.killed.kills < kills:
        operation(world)


@pytest.mark.parametrize("function", ["serve_message", "take"])
def test_every_message_of_a_link_is_served_once(function: str) -> None:
    """vsockd is killed at each line of the functions that serve a device's messages."""
    with new_world(1, 1, function) as world:
        operations = [
            connect_from_a_device,
            hand_off_from_a_device,
            refuse_a_device,
            accept_by_a_device,
        ]
        while world.killed.kills < 12:
            for operation in operations:
                operation(world)


@pytest.mark.parametrize("function", ["complete", "_serve", "consume"])
def test_a_request_of_a_kept_channel_is_served_once(function: str) -> None:
    with new_world(1, 1, function) as world:
        while world.killed.kills < 12:
            connect_from_a_kept_channel(world)
            refuse_a_kept_channel(world)


@pytest.mark.parametrize("function", ["_read_line", "continue_kept", "complete"])
def test_a_handshake_under_way_goes_on(function: str) -> None:
    """vsockd is killed while it reads the CONNECT line and sends the OK line."""
    with new_world(1, 1, function) as world:
        while world.killed.kills < 9:
            connect_to_a_hybrid_socket(world)


def test_a_packet_of_a_bound_client_is_not_its_request() -> None:
    """A killed vsockd has decided a connect, and not yet removed it from the packet socket."""
    with new_world(1, 1000, "complete") as world:
        connect_bound_packets(world)
        assert world.killed.kills == 1


def test_a_request_is_not_served_again_after_its_last_step() -> None:
    """The killed vsockd has dropped the listener of a connect that it could not announce."""
    with new_world(14, 1000, "drop") as world:  # the line after the journal's entry
        connect_to_a_server_that_does_not_read(world)
        assert world.killed.kills == 1
