"""After a restart of vsockd, programs bind their datagram sockets again."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.model.locator import parse_locator
from vsockets.nfs import mount_protocol, rpc
from vsockets.nfs.nfs_client import mount_export
from vsockets.nfs.rpc_client import RpcClient
from vsockets.perf.protocol import Header, MessageKind
from vsockets.testing import PrivateFabric, wait_until

from .vsock import PATIENCE, Running, Vsock

NULL = rpc.encode_call(
    rpc.CallHeader(
        1, rpc.VERSION, mount_protocol.PROGRAM, mount_protocol.VERSION, 0, rpc.NO_AUTH, rpc.NO_AUTH
    ),
    b"",
)
PING = Header(MessageKind.PING, 1).encode()
GUEST = 7


@pytest.fixture
def fabric() -> Iterator[PrivateFabric]:
    """A fabric for each test."""
    with PrivateFabric() as fabric:
        fabric.guest(GUEST)
        yield fabric


@pytest.fixture(params=["stopped", "killed"])
def restart(request: pytest.FixtureRequest, fabric: PrivateFabric) -> Callable[[], None]:
    def restart() -> None:
        fabric.kill() if request.param == "killed" else fabric.stop()
        fabric.start()
        fabric.guest(GUEST)

    return restart


def asked(fabric: PrivateFabric, port: int, question: bytes) -> bytes:
    """Return the reply to a guest's new socket, which asks until the service is bound."""
    guest = vsockets.attach(fabric.folder / str(GUEST))
    with vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sock:
        sock.settimeout(PATIENCE)

        def ask() -> bool:
            try:
                sock.sendto(question, (2, port))
            except ConnectionRefusedError:
                return False
            return True

        wait_until(ask, f"port {port} to be bound", PATIENCE)
        return sock.recv(70_000)


def serves(
    fabric: PrivateFabric,
    running: Running,
    restart: Callable[[], None],
    port: int,
    question: bytes,
) -> None:
    """Check that a service replies before and after several restarts, and logs them."""
    before = asked(fabric, port, question)
    for _ in range(3):
        restart()
        assert "vsockd has ended" in running.error_line()
        assert "listening again" in running.error_line()
        assert asked(fabric, port, question) == before
    running.process.send_signal(signal.SIGTERM)
    running.process.wait(PATIENCE)


def test_nfs(
    vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None], tmp_path: Path
) -> None:
    export, state = tmp_path / "export", tmp_path / "state"
    export.mkdir()
    running = vsock.start("nfs", "serve", "--export", export, "--state", state)
    assert running.error_line() == "listening on vsock-dgram:2:2049"
    serves(fabric, running, restart, 2049, NULL)


def test_perf(vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None]) -> None:
    running = vsock.start("perf", "serve", "vsock-dgram::5201")
    assert running.error_line() == "listening on vsock-dgram:2:5201"
    serves(fabric, running, restart, 5201, PING)


@pytest.fixture
def udp_echo() -> Iterator[int]:
    """The port of an echo service over UDP."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))

        def serve() -> None:
            while (received := sock.recvfrom(70_000))[0]:
                sock.sendto(*received)

        thread = threading.Thread(target=serve)
        thread.start()
        yield sock.getsockname()[1]
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as end:
            end.sendto(b"", sock.getsockname())
        thread.join()


def test_a_forward_from_a_guest(
    vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None], udp_echo: int
) -> None:
    running = vsock.start("forward", "vsock-dgram::5353", f"udp:127.0.0.1:{udp_echo}")
    assert running.error_line() == "listening on vsock-dgram:2:5353"
    serves(fabric, running, restart, 5353, b"question")


def test_a_forward_to_a_guest(
    vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None]
) -> None:
    running = vsock.start("forward", "udp:127.0.0.1:0", f"vsock-dgram:{GUEST}:5300")
    port = int(running.error_line().rpartition(":")[2])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.connect(("127.0.0.1", port))
        for number in range(3):
            guest = vsockets.attach(fabric.folder / str(GUEST))
            with vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as service:
                service.settimeout(PATIENCE)
                service.bind((GUEST, 5300))
                client.send(b"question")
                question, source = service.recvfrom(100)
                assert question == b"question"
                service.sendto(b"answer %d" % number, source)
                assert client.recv(100) == b"answer %d" % number
                restart()
                assert "vsockd has ended" in running.error_line()
                assert "listening again" in running.error_line()


def test_listen(vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None]) -> None:
    running = vsock.start("listen", "any", "-u", "-d")
    port = running.port()
    for _ in range(3):
        guest = vsockets.attach(fabric.folder / str(GUEST))
        with vsockets.socket(type=socket.SOCK_DGRAM, context=guest) as sock:
            sock.sendto(b"question\n", (2, port))
        assert running.read_line() == "question"
        restart()
        assert running.error_line() == "vsockd has ended"
        assert running.error_line() == f"listening again on 2:{port}"


def test_a_client_of_nfs(
    vsock: Vsock, fabric: PrivateFabric, restart: Callable[[], None], tmp_path: Path
) -> None:
    """Calls continue from the same port, by which the server detects duplicates."""
    export, state = tmp_path / "export", tmp_path / "state"
    export.mkdir()
    running = vsock.start("nfs", "serve", "--export", export, "--state", state)
    running.error_line()
    guest = vsockets.attach(fabric.folder / str(GUEST))

    async def main() -> None:
        loop = asyncio.get_running_loop()
        client = RpcClient.connect(parse_locator("vsock-dgram:2:2049"), guest)
        try:
            handle = await mount_export(client, os.fsencode(export))
            own = client.address
            for _ in range(3):
                await loop.run_in_executor(None, restart)
                assert await mount_export(client, os.fsencode(export)) == handle
                assert client.address == own
        finally:
            client.close()

    asyncio.run(asyncio.wait_for(main(), PATIENCE))
