"""A device's client of vsockd, while vsockd does not read the link."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator
from socket import AF_UNIX, MSG_DONTWAIT, SOCK_SEQPACKET, SOCK_STREAM

import pytest

from vsockets._linux import sockets
from vsockets.devices.client import ConnectRequest, DeviceClient
from vsockets.devices.loop import DeviceLoop
from vsockets.model.buffers import BufferSizes
from vsockets.protocol import RECORD_SIZE, REQUEST_SIZE, Op, Record, Request
from vsockets.testing import wait_until

CID, HOST, PORTS = 11, 2, range(5000, 5003)
FILLING = b"full"


class Busy:
    """A client whose simulated vsockd has not read the link for a long time."""

    def __init__(self) -> None:
        self.loop = DeviceLoop()
        link, self.vsockd = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
        self.vsockd.settimeout(30)
        self.attachment = DeviceClient(self.loop, link, CID, datagrams=False)
        try:
            while True:
                link.send(FILLING, MSG_DONTWAIT)
        except BlockingIOError:
            pass

    def settle(self, port: int, error: int) -> socket.socket:
        """Settle a connect request; return the client's end."""
        client, sock = socket.socketpair(AF_UNIX)
        client.settimeout(30)
        with sock:
            request = ConnectRequest(sock, port, (HOST, 1024), BufferSizes(), polling=False)
            self.attachment.settle(request, size=4096, error=error)
        return client

    def next(self) -> tuple[Request, list[int]]:
        """Return vsockd's next message and its descriptors."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.vsockd, REQUEST_SIZE, 1)
            if data != FILLING:
                return Request.decode(data), fds
            self.loop.turn()


@pytest.fixture
def busy() -> Iterator[Busy]:
    busy = Busy()
    yield busy
    busy.attachment.close()
    busy.vsockd.close()
    busy.loop.close()


def test_outcomes_wait_until_vsockd_has_room(busy: Busy) -> None:
    errors = (0, errno.ECONNRESET, 0)
    clients = [busy.settle(port, error) for port, error in zip(PORTS, errors, strict=True)]
    for port, error, client in zip(PORTS, errors, clients, strict=True):
        message, fds = busy.next()
        assert (message.op, message.local_port, message.backlog) == (Op.SETTLE, port, error)
        assert Record.decode(client.recv(RECORD_SIZE)).status == error
        assert len(fds) == bool(error), "who was refused may try again, on the same socket"
        for fd in fds:
            os.write(fd, b"again")
            assert client.recv(10) == b"again"
            os.close(fd)
        client.close()


def test_link_works_after_the_queue_is_flushed(busy: Busy) -> None:
    for round in range(2):
        with busy.settle(PORTS[round], 0):
            message, _ = busy.next()
            assert message.local_port == PORTS[round]
        busy.loop.turn()


@pytest.mark.parametrize("error", [0, errno.ECONNRESET])
def test_established_stream_carries_no_credentials(busy: Busy, error: int) -> None:
    """vsockd receives a client's credentials, also when a refused client connects again."""
    client, sock = socket.socketpair(AF_UNIX)
    with client, sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        request = ConnectRequest(sock, PORTS[0], (HOST, 1024), BufferSizes(), polling=False)
        busy.attachment.settle(request, size=4096, error=error)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED) == bool(error)
        for fd in busy.next()[1]:
            os.close(fd)


def test_queued_outcomes_are_dropped_when_vsockd_closes(busy: Busy) -> None:
    with busy.settle(PORTS[0], errno.ECONNRESET) as client:
        client.recv(RECORD_SIZE)
        lost: list[bool] = []
        busy.attachment.on_lost = lambda: lost.append(True)
        busy.vsockd.close()

        def has_closed() -> bool:
            busy.loop.turn()
            return bool(lost)

        wait_until(has_closed, "the link to end")
        assert client.recv(1) == b"", "the end that was to go back is closed"


@pytest.mark.parametrize("kind", [SOCK_STREAM, SOCK_SEQPACKET])
def test_record_marker_passes_only_through_seqpackets(kind: int) -> None:
    """A descriptor stands for MSG_EOR; streams carry none, and refuse it where the kernel can."""
    link, vsockd = socket.socketpair(AF_UNIX, SOCK_SEQPACKET)
    client, end = socket.socketpair(AF_UNIX, kind)
    with contextlib.ExitStack() as stack:
        loop = DeviceLoop()
        stack.callback(loop.close)
        attachment = DeviceClient(loop, link, CID, datagrams=False)
        stack.callback(attachment.close)
        for sock in (vsockd, client, end, copy := end.dup()):
            stack.enter_context(sock)
        request = ConnectRequest(end, PORTS[0], (HOST, 1024), BufferSizes(), polling=False)
        client.send(bytes(RECORD_SIZE))  # a sequenced-packet client pads its request
        attachment.settle(request, size=4096)
        connected = stack.enter_context(
            attachment.connect(PORTS[1], (HOST, 1024), BufferSizes(), kind)
        )
        *_, (_, fds, _, _) = (socket.recv_fds(vsockd, REQUEST_SIZE, 1) for _ in range(2))
        program = stack.enter_context(socket.socket(fileno=fds[0]))
        for sender, receiver in ((client, copy), (program, connected)):
            with receiver.dup() as copy:
                refuses = kind == SOCK_STREAM and sockets.refuse_descriptors(copy)
            with pytest.raises(PermissionError) if refuses else contextlib.nullcontext():
                socket.send_fds(sender, [b"end"], [vsockd.fileno()])
