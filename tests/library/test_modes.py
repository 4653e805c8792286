"""Blocking, non-blocking and timeout modes; readiness; asyncio."""

from __future__ import annotations

import asyncio
import errno
import os
import select
import selectors
import signal
import socket as stdlib
import threading
from typing import Any

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .conftest import ANY, STREAMS, Pair, running


@pytest.fixture
def stopped(vsock_fabric: PrivateFabric) -> Any:
    """Stop vsockd during the test, so that calls to it wait."""
    os.kill(vsock_fabric.pid, signal.SIGSTOP)
    yield vsock_fabric
    os.kill(vsock_fabric.pid, signal.SIGCONT)


@pytest.mark.parametrize("sock_type", STREAMS)
def test_non_blocking_connect_becomes_writable(
    vsock_fabric: PrivateFabric,
    host: vsockets.Attachment,
    guest: vsockets.Attachment,
    sock_type: int,
) -> None:
    with (
        vsockets.create_server(ANY, type=sock_type, context=host) as server,
        vsockets.socket(type=sock_type, context=guest) as client,
    ):
        client.setblocking(False)
        os.kill(vsock_fabric.pid, signal.SIGSTOP)
        try:
            assert client.connect_ex(server.getsockname()) == errno.EINPROGRESS
            assert select.select([], [client], [], 0.05) == ([], [], [])
            assert client.connect_ex(server.getsockname()) == errno.EALREADY
            assert client.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR) == 0
            with pytest.raises(OSError) as caught:
                client.send(b"too early")
            assert caught.value.errno == errno.ENOTCONN
        finally:
            os.kill(vsock_fabric.pid, signal.SIGCONT)
        assert select.select([], [client], [], 10) == ([], [client], [])
        assert client.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR) == 0
        assert client.getpeername() == server.getsockname()
        accepted, _ = server.accept()
        with accepted:
            client.send(b"first")
            assert accepted.recv(100) == b"first"
            assert client.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_SNDBUF) > 100_000


@pytest.mark.parametrize("sock_type", STREAMS)
def test_failed_non_blocking_connect(guest: vsockets.Attachment, sock_type: int) -> None:
    with vsockets.socket(type=sock_type, context=guest) as client:
        client.setblocking(False)
        assert client.connect_ex((2, 4)) == errno.EINPROGRESS
        assert select.select([], [client], [], 10)[1]
        reported = client.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR)
        assert reported == errno.ECONNRESET
        assert client.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR) == 0
        assert client.connect_ex((2, 4)) == errno.EALREADY  # permanently, as in Linux
        with pytest.raises(OSError) as caught:
            client.send(b"x")
        assert caught.value.errno == errno.ENOTCONN


@pytest.mark.parametrize("timeout", [None, 10])
def test_blocking_connect_can_be_retried(
    host: vsockets.Attachment, guest: vsockets.Attachment, timeout: float | None
) -> None:
    with vsockets.socket(context=guest) as client:
        client.settimeout(timeout)
        for _ in range(2):
            assert client.connect_ex((2, 4)) == errno.ECONNRESET
        with vsockets.create_server(ANY, context=host) as server:
            client.connect(server.getsockname())


def test_data_sent_during_the_connect_is_not_lost(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with vsockets.create_server(ANY, context=host) as server:
        for _ in range(100):
            with vsockets.socket(context=guest) as client:
                client.setblocking(False)
                assert client.connect_ex(server.getsockname()) == errno.EINPROGRESS
                accepted, _ = server.accept()
                with accepted:
                    accepted.send(b"welcome")
                    client.settimeout(10)
                    client.send(b"thanks")  # finishes the connect first
                    assert client.recv(100) == b"welcome"
                    assert accepted.recv(100) == b"thanks"


def test_connect_times_out(stopped: PrivateFabric, host: vsockets.Attachment) -> None:
    timeval = bytes(8) + (100_000).to_bytes(8, "little")
    with vsockets.socket(context=host) as sock:
        sock.setsockopt(vsockets.AF_VSOCK, vsockets.SO_VM_SOCKETS_CONNECT_TIMEOUT, timeval)
        with pytest.raises(TimeoutError) as caught:
            sock.connect((2, 1))
        assert caught.value.errno == errno.ETIMEDOUT
    with vsockets.socket(context=host) as sock:
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):
            sock.connect((2, 1))
        with pytest.raises(OSError, match="not connected"):
            sock.recv(1)


def test_accept_and_receive_with_timeout(pair: Pair) -> None:
    for sock, call in ((pair.server, "accept"), (pair.client, "recv")):
        arguments = () if call == "accept" else (1,)
        sock.settimeout(0.02)
        with pytest.raises(TimeoutError):
            getattr(sock, call)(*arguments)
        sock.setblocking(False)
        with pytest.raises(BlockingIOError):
            getattr(sock, call)(*arguments)


def test_accepted_sockets_block_with_a_non_blocking_listener(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with vsockets.create_server(ANY, context=host) as server:
        server.setblocking(False)
        with vsockets.create_connection(server.getsockname(), context=guest) as client:
            select.select([server], [], [], 10)
            accepted, _ = server.accept()
            with accepted:
                assert accepted.gettimeout() is None
                assert os.get_blocking(accepted.fileno())
                client.send(b"x")
                assert accepted.recv(1) == b"x"


def test_readiness_by_select_poll_epoll_and_selectors(pair: Pair) -> None:
    def ready(sock: vsockets.socket) -> list[bool]:
        poll, epoll = select.poll(), select.epoll()
        poll.register(sock, select.POLLIN)
        epoll.register(sock, select.EPOLLIN)
        with selectors.DefaultSelector() as selector, epoll:
            selector.register(sock, selectors.EVENT_READ)
            return [
                bool(select.select([sock], [], [], 0)[0]),
                bool(poll.poll(0)),
                bool(epoll.poll(0)),
                bool(selector.select(0)),
            ]

    for sock in (pair.server, pair.client, pair.accepted):
        assert ready(sock) == [False] * 4
    another = vsockets.socket(type=pair.server.type, context=pair.guest)
    with another:
        another.connect(pair.server.getsockname())
        # The connecting side is notified first: docs/internals/design.md explains why.
        wait_until(lambda: ready(pair.server) == [True] * 4, "the listener to be ready")
        pair.server.accept()[0].close()
        assert ready(pair.server) == [False] * 4
    pair.accepted.send(b"x")
    # Over a kernel's AF_VSOCK, data arrives with a delay.
    wait_until(lambda: ready(pair.client) == [True] * 4, "what was sent")
    assert select.select([], [pair.client], [], 0)[1]


def test_epoll_registration_before_connect_stays_valid(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    with (
        vsockets.create_server(ANY, context=host) as server,
        vsockets.socket(context=guest) as client,
        select.epoll() as epoll,
    ):
        fd = client.fileno()
        epoll.register(fd, select.EPOLLIN)
        client.connect(server.getsockname())
        accepted, _ = server.accept()
        with accepted:
            accepted.send(b"x")
            assert epoll.poll(10) == [(fd, select.EPOLLIN)]


CALLS = {
    "recv": lambda pair: pair.client.recv(1),
    "recv_into": lambda pair: pair.client.recv_into(bytearray(1)),
    "recvmsg": lambda pair: pair.client.recvmsg(1)[0],
    "send": lambda pair: pair.client.sendall(bytes(1 << 22)),
    "accept": lambda pair: pair.server.accept(),
}


@pytest.mark.parametrize(
    ("call", "how"),
    # A listening socket cannot be shut down.
    [(call, "close") for call in CALLS]
    + [(call, "shutdown") for call in CALLS if call != "accept"],
)
def test_close_or_shutdown_during_a_call_of_another_thread(
    stream: Pair, call: str, how: str
) -> None:
    """VMware's first release crashed the guest in this case."""
    entered = threading.Event()
    sock = stream.server if call == "accept" else stream.client
    sock.settimeout(0.5)  # closing a descriptor wakes no thread, as in Linux

    def blocked() -> None:
        entered.set()
        with pytest.raises((OSError, ValueError)):
            assert not CALLS[call](stream)
            raise OSError("the end of the stream is a valid result, too")

    with running(blocked):
        entered.wait(10)
        wait_until(lambda: _is_in_a_system_call(), "the call")
        if how == "shutdown":
            sock.shutdown(stdlib.SHUT_RDWR)
        else:
            sock.close()
    assert stream.accepted.fileno() >= 0


def _is_in_a_system_call() -> bool:
    tasks = os.listdir("/proc/self/task")
    states = []
    for task in tasks:
        if int(task) != threading.get_native_id():
            with open(f"/proc/self/task/{task}/stat") as stat:
                states.append(stat.read().rsplit(")", 1)[1].split()[0])
    return "S" in states


def test_asyncio_streams(host: vsockets.Attachment, guest: vsockets.Attachment) -> None:
    async def talk() -> None:
        peers = []

        async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            peers.append(writer.get_extra_info("peername"))
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
            writer.close()
            await writer.wait_closed()

        server = await vsockets.start_server(echo, context=host)
        address = server.sockets[0].getsockname()

        async def client(number: int) -> None:
            reader, writer = await vsockets.open_connection(*address, context=guest)
            data = bytes([number]) * 300_000
            writer.write(data)
            writer.write_eof()
            assert await reader.read() == data
            writer.close()
            await writer.wait_closed()

        await asyncio.gather(*(client(number) for number in range(50)))
        assert len(set(peers)) == 50
        assert {cid for cid, _ in peers} == {guest.cid}
        with pytest.raises(ConnectionResetError):
            await vsockets.open_connection(2, 4, context=guest)
        server.close()
        await server.wait_closed()

    asyncio.run(asyncio.wait_for(talk(), 30))


def test_asyncio_socket_calls_and_datagrams(
    host: vsockets.Attachment, guest: vsockets.Attachment
) -> None:
    async def talk() -> None:
        loop = asyncio.get_running_loop()
        with (
            vsockets.create_server(ANY, context=host) as server,
            vsockets.socket(context=guest) as client,
        ):
            server.setblocking(False)
            client.setblocking(False)
            accepting = loop.create_task(loop.sock_accept(server))
            await loop.sock_connect(client, server.getsockname())
            accepted, peer = await accepting
            assert peer == client.getsockname()
            await loop.sock_sendall(client, b"hello")
            assert await loop.sock_recv(accepted, 100) == b"hello"
            accepted.close()

        class Echo(asyncio.DatagramProtocol):
            def connection_made(self, transport: Any) -> None:
                self.transport = transport

            def datagram_received(self, data: bytes, addr: Any) -> None:
                self.transport.sendto(data, addr)

        class Collect(asyncio.DatagramProtocol):
            def __init__(self) -> None:
                self.got = loop.create_future()

            def datagram_received(self, data: bytes, addr: Any) -> None:
                self.got.set_result((data, addr))

        one = vsockets.socket(type=stdlib.SOCK_DGRAM, context=host)
        one.bind(ANY)
        other = vsockets.socket(type=stdlib.SOCK_DGRAM, context=guest)
        other.bind(ANY)
        for sock in (one, other):
            sock.setblocking(False)
        echo, _ = await loop.create_datagram_endpoint(Echo, sock=one)
        sender, collect = await loop.create_datagram_endpoint(Collect, sock=other)
        sender.sendto(b"over asyncio", one.getsockname())
        assert await collect.got == (b"over asyncio", one.getsockname())
        sender.close()
        echo.close()
        await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(talk(), 30))
