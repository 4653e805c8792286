"""anyio's and trio's streams over vSockets."""

from __future__ import annotations

import pytest

from .conftest import Serve, echo, example

DATA = bytes(range(256)) * 2000


@pytest.mark.parametrize("backend", ["asyncio", "trio"])
def test_anyio(guest: int, serve: Serve, backend: str) -> None:
    module = example("anyio_stream")
    pytest.importorskip(backend, reason=f"needs {backend}")
    port = serve(echo)
    anyio = module.anyio

    async def talk() -> None:
        with anyio.fail_after(30):
            async with await module.connect(2, port) as stream, anyio.create_task_group() as tasks:
                tasks.start_soon(stream.send, DATA)
                received = b""
                while len(received) < len(DATA):
                    received += await stream.receive()
                assert received == DATA
                await stream.send_eof()
                with pytest.raises(anyio.EndOfStream):
                    await stream.receive()

    anyio.run(talk, backend=backend)


def test_trio(guest: int, serve: Serve) -> None:
    module = example("trio_stream")
    port = serve(echo)
    trio = module.trio

    async def talk() -> None:
        with trio.fail_after(30):
            async with await module.connect(2, port) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(stream.send_all, DATA)
                received = b""
                while len(received) < len(DATA):
                    received += await stream.receive_some()
                assert received == DATA
                await stream.send_eof()
                assert await stream.receive_some() == b""

    trio.run(talk)
