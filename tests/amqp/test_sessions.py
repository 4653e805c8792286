"""Ends and limits of sessions, with proxies in this process and simulated far sides."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from pamqp import commands, frame

import vsockets
from vsockets.amqp import guest_proxy, host_proxy, session
from vsockets.amqp.amqp_proxy import AmqpProxy
from vsockets.amqp.frames import CLOSE_OK, PROTOCOL_HEADER
from vsockets.amqp.guest_proxy import ClientServer, GuestProxy
from vsockets.amqp.host_proxy import HostProxy
from vsockets.model.constants import VMADDR_CID_ANY, VMADDR_PORT_ANY
from vsockets.model.locator import Unix, Vsock
from vsockets.testing import PrivateFabric

from .strategies import commands_in

PATIENCE = 30.0

START = frame.marshal(commands.Connection.Start(), 0)
DELIVER = frame.marshal(commands.Basic.Deliver("c", 1, False, "", "q"), 1)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


#: Streams that a test has opened.
opened: list[asyncio.StreamWriter] = []


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            try:
                await test()
            finally:
                while opened:
                    with contextlib.suppress(OSError):
                        writer = opened.pop()
                        writer.close()
                        await writer.wait_closed()

    asyncio.run(limited())


async def dial(path: Path) -> Streams:
    reader, writer = await asyncio.open_unix_connection(path)
    opened.append(writer)
    return reader, writer


async def dial_host(guest: vsockets.Attachment, host: HostProxy) -> Streams:
    port = int(host.where.rpartition(":")[2])
    reader, writer = await vsockets.open_connection(2, port, context=guest)
    opened.append(writer)
    return reader, writer


class SimulatedServer:
    """A server whose connections the test handles itself."""

    def __init__(self) -> None:
        self.connections: asyncio.Queue[Streams] = asyncio.Queue()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        opened.append(writer)
        self.connections.put_nowait((reader, writer))


@contextlib.asynccontextmanager
async def in_a_guest(
    fabric: PrivateFabric, path: Path
) -> AsyncIterator[tuple[GuestProxy, SimulatedServer]]:
    """Yield a guest proxy and its simulated host proxy."""
    far_side = SimulatedServer()
    server = await vsockets.start_server(far_side.serve, context=fabric.host)
    port = server.sockets[0].getsockname()[1]
    proxy = GuestProxy(Unix(str(path)), Vsock(2, port), fabric.guest())
    try:
        yield proxy, far_side
    finally:
        proxy.close()
        server.close()


@contextlib.asynccontextmanager
async def on_the_host(
    fabric: PrivateFabric, folder: Path
) -> AsyncIterator[tuple[HostProxy, SimulatedServer]]:
    """Yield a host proxy and the simulated node of its AMQP proxy."""
    far_side = SimulatedServer()
    server = await asyncio.start_unix_server(far_side.serve, folder / "node")
    amqp = AmqpProxy(Unix(str(folder / "amqp")), [Unix(str(folder / "node"))])
    reader, writer = await far_side.connections.get()  # the health check
    assert await reader.readexactly(8) == PROTOCOL_HEADER
    writer.write(START)
    host = HostProxy(
        Vsock(VMADDR_CID_ANY, VMADDR_PORT_ANY), Unix(str(folder / "amqp")), context=fabric.host
    )
    try:
        yield host, far_side
    finally:
        host.close()
        amqp.close()
        server.close()


async def reply_code(reader: asyncio.StreamReader) -> int:
    """Read a connection.close; return its reply code."""
    head = await reader.readexactly(7)
    (close,) = commands_in(head + await reader.readexactly(int.from_bytes(head[3:]) + 1))
    assert isinstance(close, commands.Connection.Close)
    return close.reply_code or 0


def test_truncated_frame_is_not_delivered(vsock_fabric: PrivateFabric, tmp_path: Path) -> None:
    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (_, far_side):
            reader, writer = await dial(tmp_path / "amqp")
            writer.write(PROTOCOL_HEADER)
            far_reader, far_writer = await far_side.connections.get()
            assert await far_reader.readexactly(8) == PROTOCOL_HEADER
            far_writer.write(START + DELIVER + DELIVER[:-1])
            far_writer.close()
            assert await reader.readexactly(len(START + DELIVER)) == START + DELIVER
            assert await reply_code(reader) == 320
            writer.write(b"what was on its way" + CLOSE_OK)
            assert await reader.read() == b""

    run(test)


def test_close_of_the_broker_is_forwarded_alone(
    vsock_fabric: PrivateFabric, tmp_path: Path
) -> None:
    last = frame.marshal(commands.Connection.Close(403, "no", 0, 0), 0)

    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (_, far_side):
            reader, writer = await dial(tmp_path / "amqp")
            far_reader, far_writer = await far_side.connections.get()
            far_writer.write(last)
            assert await reader.readexactly(len(last)) == last
            writer.write(CLOSE_OK)
            assert await far_reader.readexactly(len(CLOSE_OK)) == CLOSE_OK
            far_writer.close()
            assert await reader.read() == b""

    run(test)


def test_invalid_bytes_from_the_far_side_close_the_session(
    vsock_fabric: PrivateFabric, tmp_path: Path
) -> None:
    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (_, far_side):
            reader, _ = await dial(tmp_path / "amqp")
            _, far_writer = await far_side.connections.get()
            far_writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            assert await reply_code(reader) == 501

    run(test)


def test_unreachable_far_side_closes_the_session(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guest_proxy, "AMQP_OPEN_TIMEOUT_SECONDS", 0.05)

    async def test() -> None:
        proxy = GuestProxy(Unix(str(tmp_path / "amqp")), Vsock(2, 9999), vsock_fabric.guest())
        reader, writer = await dial(tmp_path / "amqp")
        writer.write(PROTOCOL_HEADER)
        assert await reply_code(reader) == 320
        writer.write(CLOSE_OK)
        assert await reader.read() == b""
        proxy.close()

    run(test)


def test_client_without_close_ok_is_disconnected(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "AMQP_CLOSE_TIMEOUT_SECONDS", 0.05)

    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (_, far_side):
            reader, writer = await dial(tmp_path / "amqp")
            writer.write(PROTOCOL_HEADER)
            (await far_side.connections.get())[1].close()
            assert await reply_code(reader) == 320
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""

    run(test)


def test_drain_closes_each_session_with_connection_close(
    vsock_fabric: PrivateFabric, tmp_path: Path
) -> None:
    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (proxy, far_side):
            reader, writer = await dial(tmp_path / "amqp")
            far_reader, _ = await far_side.connections.get()
            draining = asyncio.ensure_future(proxy.drain())
            assert await reply_code(reader) == 320
            assert not draining.done()
            writer.write(CLOSE_OK)
            await draining
            assert await far_reader.read() == b""
            assert not (tmp_path / "amqp").exists()

    run(test)


def test_slow_handshake_is_aborted(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "AMQP_HANDSHAKE_TIMEOUT_SECONDS", 0.05)

    async def test() -> None:
        async with on_the_host(vsock_fabric, tmp_path) as (host, _):
            reader, writer = await dial_host(vsock_fabric.guest(), host)
            writer.write(PROTOCOL_HEADER)
            with contextlib.suppress(ConnectionError):
                assert await reader.read() == b""

    run(test)


def test_sessions_of_one_guest_are_limited(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_proxy, "AMQP_GUEST_SESSIONS_MAX", 2)
    guest, other = vsock_fabric.guest(), vsock_fabric.guest()

    async def test() -> None:
        async with on_the_host(vsock_fabric, tmp_path) as (host, far_side):

            async def greet(who: vsockets.Attachment) -> list[asyncio.StreamWriter]:
                """Begin a session; return its two ends, none if it is refused."""
                reader, writer = await dial_host(who, host)
                writer.write(PROTOCOL_HEADER)
                connecting = asyncio.ensure_future(far_side.connections.get())
                answer = asyncio.ensure_future(reader.read(1))
                await asyncio.wait((connecting, answer), return_when=asyncio.FIRST_COMPLETED)
                if not connecting.done():
                    connecting.cancel()
                    with contextlib.suppress(ConnectionError):
                        assert await answer == b""
                    return []
                far_reader, far_writer = await connecting
                assert await far_reader.readexactly(8) == PROTOCOL_HEADER
                far_writer.write(START)
                assert await answer + await reader.readexactly(len(START) - 1) == START
                return [writer, far_writer]

            first, second = await greet(guest), await greet(guest)
            assert first
            assert second
            assert not await greet(guest)
            assert await greet(other)
            for writer in first:
                writer.close()
            while not await greet(guest):  # until the proxy has noticed
                pass

    run(test)


def test_clients_of_a_full_proxy_wait_in_the_backlog(
    vsock_fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ClientServer.__module__ + ".AMQP_SESSIONS_MAX", 1)

    async def test() -> None:
        async with in_a_guest(vsock_fabric, tmp_path / "amqp") as (_, far_side):
            _, writer = await dial(tmp_path / "amqp")
            first, far_writer = await far_side.connections.get()
            _, waiting = await dial(tmp_path / "amqp")
            waiting.write(PROTOCOL_HEADER)
            assert far_side.connections.empty()
            writer.close()
            assert await first.read() == b""
            far_writer.close()
            far_reader, _ = await far_side.connections.get()
            assert await far_reader.readexactly(8) == PROTOCOL_HEADER

    run(test)
