"""HTTP over vSockets: httpx and aiohttp as clients, uvicorn as the server."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

import vsockets
from vsockets.testing import PrivateFabric, wait_until

from .conftest import EXAMPLES, example

PORT = 8000


@pytest.fixture(scope="module")
def server(fabric: PrivateFabric) -> Iterator[None]:
    """uvicorn on the host."""
    pytest.importorskip("uvicorn", reason="needs uvicorn")
    program = EXAMPLES / "uvicorn_server.py"
    process = subprocess.Popen(
        [sys.executable, program, str(PORT)],
        env=fabric.environment(fabric.host),
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_until(
            lambda: any(row["port"] == PORT for row in fabric.control.sockets()), "uvicorn", 30
        )
        yield
    finally:
        process.terminate()
        process.wait(30)


def test_httpx(server: None, guest: int) -> None:
    module = example("httpx_transport")
    with module.httpx.Client(transport=module.VsockTransport(), timeout=30) as client:
        for _ in range(2):  # the second over the same connection
            answer = client.get(f"http://2:{PORT}/path?query")
            assert answer.status_code == 200
            assert answer.text.startswith(f"you are context {guest}, port ")
        assert answer.text == client.post(f"http://2:{PORT}/", content=b"x" * 100_000).text
        with pytest.raises(module.httpx.ConnectError):
            client.get("http://2:8001/")


def test_aiohttp(server: None, guest: int) -> None:
    module = example("aiohttp_connector")

    async def ask() -> None:
        aiohttp = module.aiohttp
        timeout = aiohttp.ClientTimeout(total=30)
        async with aiohttp.ClientSession(
            connector=module.VsockConnector(), timeout=timeout
        ) as session:
            for _ in range(2):
                async with session.get(f"http://2:{PORT}/") as answer:
                    assert (await answer.text()).startswith(f"you are context {guest}, port ")
            with pytest.raises(aiohttp.ClientConnectorError):
                await session.get("http://2:8001/")

    asyncio.run(ask())


def test_process_is_in_the_guest(guest: int) -> None:
    assert vsockets.get_local_cid() == guest
