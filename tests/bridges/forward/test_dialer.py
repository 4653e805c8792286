"""Reaching targets: how often it is tried, and what is made of a hybrid vsock's answers."""

from __future__ import annotations

import asyncio
import errno
import ipaddress
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from vsockets.bridges.forward.dialer import Dialer, NotAdmitted
from vsockets.locator import Inet, Proxy, Unix, VsockMux

PATIENCE = 20.0


def run(main: Callable[[Dialer], Awaitable[None]]) -> None:
    async def with_dialer() -> None:
        async with asyncio.timeout(PATIENCE):
            await main(Dialer())

    asyncio.run(with_dialer())


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (b"", errno.ECONNRESET),  # nobody listens: every device just closes
        (b"OK", errno.ECONNRESET),
        (b"OK x\n", errno.EPROTO),
        (b"ERROR 5\n", errno.EPROTO),
        (b"O" * 100, errno.EPROTO),
    ],
)
def test_hybrid_vsock_that_does_not_connect(tmp_path: Path, answer: bytes, code: int) -> None:
    async def main(dialer: Dialer) -> None:
        async def device(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            assert await reader.readline() == b"CONNECT 52\n"
            writer.write(answer)
            writer.close()

        async with await asyncio.start_unix_server(device, tmp_path / "v"):
            with pytest.raises(OSError) as caught:
                await dialer.connect(VsockMux(str(tmp_path / "v"), 52), timeout=PATIENCE)
            assert caught.value.errno == code

    run(main)


def test_a_device_that_says_nothing_is_given_up(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        with socket.socket(socket.AF_UNIX) as device:
            device.bind(str(tmp_path / "v"))
            device.listen()
            with pytest.raises(OSError) as caught:
                await dialer.connect(VsockMux(str(tmp_path / "v"), 52), timeout=0.05)
            assert caught.value.errno == errno.ETIMEDOUT

    run(main)


def test_waiting_ends(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        with pytest.raises(FileNotFoundError):
            await dialer.connect(Unix(str(tmp_path / "none")), timeout=1, wait=0.05)

    run(main)


def test_what_waiting_cannot_change_is_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")

    async def main(dialer: Dialer) -> None:
        for locator in (Unix(str(tmp_path / "file" / "x")), Proxy("socks5")):
            with pytest.raises(OSError):
                await dialer.connect(locator, timeout=1, wait=PATIENCE * 10)

    run(main)


def test_a_full_backlog_of_a_unix_socket_is_waited_for(tmp_path: Path) -> None:
    async def main(dialer: Dialer) -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path)
            server.listen(0)
            first = await dialer.connect(Unix(path), timeout=PATIENCE)
            second = asyncio.create_task(dialer.connect(Unix(path), timeout=PATIENCE))
            await asyncio.sleep(0)
            assert not second.done()
            server.accept()[0].close()
            with first, await second:
                server.accept()[0].close()

    run(main)


def test_only_admitted_addresses_are_connected_to() -> None:
    async def main(dialer: Dialer) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            target = Inet("localhost", server.getsockname()[1])
            with pytest.raises(NotAdmitted):
                await dialer.connect(target, timeout=PATIENCE, admits=lambda address: False)
            sock = await dialer.connect(
                target, timeout=PATIENCE, admits=ipaddress.ip_address("127.0.0.1").__eq__
            )
            with sock:
                assert sock.getpeername() == server.getsockname()

    run(main)
