"""The HTTP server of metrics and web: slow, numerous and invalid clients."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.cli import http_server
from vsockets.cli.http_server import HttpServer, Request, Response, _receive
from vsockets.cli.limits import HTTP_BODY_MAX_BYTES, HTTP_CLIENTS_MAX, HTTP_HEAD_MAX_BYTES

PATIENCE = 30.0

GET = b"GET /echo?a=1&b=%20 HTTP/1.1\r\nHost: here\r\n\r\n"


async def echo(request: Request) -> Response:
    if request.path == "/stream":
        return Response(200, "text/plain", pieces())
    words = f"{request.method} {request.path} {dict(request.query)} {request.body.decode()}"
    return http_server.text(200, words)


async def pieces() -> AsyncIterator[bytes]:
    for piece in (b"one ", b"two ", b"three"):
        yield piece


Connect = Callable[[], Coroutine[Any, Any, tuple[asyncio.StreamReader, asyncio.StreamWriter]]]


def serve(test: Callable[[Connect], Coroutine[Any, Any, None]]) -> None:
    """Run ``test`` with a function that connects to a server."""

    async def run() -> None:
        with socket.create_server(("127.0.0.1", 0), backlog=500) as listener:
            listener.setblocking(False)
            port = listener.getsockname()[1]
            serving = asyncio.create_task(HttpServer(listener, echo).serve())
            async with asyncio.timeout(PATIENCE):
                await test(lambda: asyncio.open_connection("127.0.0.1", port))
            serving.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await serving

    asyncio.run(run())


async def ask(connect: Connect, request: bytes) -> bytes:
    """Return the whole response to ``request``."""
    reader, writer = await connect()
    writer.write(request)
    answer = await reader.read()
    writer.close()
    return answer


def test_parts_of_a_request() -> None:
    async def test(connect: Connect) -> None:
        answer = await ask(connect, GET)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert answer.endswith(b"GET /echo {'a': '1', 'b': ' '} \n")
        post = b"POST /x HTTP/1.1\r\nHost: here\r\nContent-Length: 4\r\n\r\nbody"
        assert (await ask(connect, post)).endswith(b"POST /x {} body\n")

    serve(test)


def test_a_streamed_response() -> None:
    async def test(connect: Connect) -> None:
        answer = await ask(connect, GET.replace(b"/echo", b"/stream"))
        assert answer.endswith(b"4\r\none \r\n4\r\ntwo \r\n5\r\nthree\r\n0\r\n\r\n")

    serve(test)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\0\1\2\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\n\r\n", 400),  # no Host
        (b"GET / HTTP/1.1\r\nHost: here\r\nContent-Length: many\r\n\r\n", 400),
        (b"GET /" + b"a" * HTTP_HEAD_MAX_BYTES, 431),
        (b"GET / HTTP/1.1\r\nHost: here\r\n" + b"A: b\r\n" * HTTP_HEAD_MAX_BYTES, 431),
        (
            b"POST / HTTP/1.1\r\nHost: here\r\nContent-Length: %d\r\n\r\n"
            % (HTTP_BODY_MAX_BYTES + 1)
            + b"a" * (HTTP_BODY_MAX_BYTES + 1),
            413,
        ),
    ],
    ids=["no HTTP", "no Host", "no length", "a long line", "a long head", "a long body"],
)
def test_invalid_requests_are_rejected(request_: bytes, status: int) -> None:
    async def test(connect: Connect) -> None:
        assert (await ask(connect, request_)).startswith(b"HTTP/1.1 %d " % status)
        assert (await ask(connect, GET)).startswith(b"HTTP/1.1 200 ")

    serve(test)


@settings(max_examples=200)
@given(
    st.lists(
        st.one_of(
            st.binary(max_size=20),
            st.sampled_from(
                [GET, b"POST //[?=%ff& HTTP/1.1\r\n", b"Host: x\r\n", b"Content-Length: 3\r\n"]
                + [b"Transfer-Encoding: chunked\r\n", b"\r\n", b"3\r\nabc\r\n0\r\n\r\n"]
            ),
        ),
        max_size=8,
    )
)
def test_any_input_is_a_request_or_rejected(pieces: list[bytes]) -> None:
    async def receive() -> None:
        reader = asyncio.StreamReader()
        reader.feed_data(b"".join(pieces))
        reader.feed_eof()
        try:
            request = await _receive(h11.Connection(h11.SERVER), reader)
        except (h11.RemoteProtocolError, ConnectionResetError):
            return
        assert "?" not in request.path and len(request.body) <= HTTP_BODY_MAX_BYTES

    asyncio.run(receive())


def test_a_slow_request_delays_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    """Single bytes do not extend the time limit, and other clients do not wait."""
    monkeypatch.setattr(http_server, "HTTP_REQUEST_TIMEOUT_SECONDS", 1.0)

    async def test(connect: Connect) -> None:
        reader, writer = await connect()

        async def trickle() -> None:
            while True:
                writer.write(b"G")
                await asyncio.sleep(0.01)

        writer.write(b"GET / HTTP/1.1\r\nX: ")
        trickling = asyncio.create_task(trickle())
        assert (await ask(connect, GET)).startswith(b"HTTP/1.1 200 ")
        assert (await reader.readline()).startswith(b"HTTP/1.1 408 ")
        trickling.cancel()
        writer.close()

    serve(test)


def test_a_client_that_does_not_read_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_server, "HTTP_WRITE_TIMEOUT_SECONDS", 0.2)
    ended = []

    async def endless() -> AsyncIterator[bytes]:
        try:
            while True:
                yield b"a" * 65_536
        finally:
            ended.append(True)

    async def test(connect: Connect) -> None:
        monkeypatch.setattr(f"{__name__}.pieces", endless)
        _, writer = await connect()
        writer.write(GET.replace(b"/echo", b"/stream"))
        while not ended:
            await asyncio.sleep(0.01)
        writer.close()

    serve(test)


def test_several_at_once_and_a_limit() -> None:
    async def test(connect: Connect) -> None:
        silent = [await connect() for _ in range(HTTP_CLIENTS_MAX)]
        assert (await ask(connect, GET)).startswith(b"HTTP/1.1 200 ")
        reader, writer = silent.pop(0)  # the oldest, displaced by the last one
        with contextlib.suppress(ConnectionError):
            assert await reader.read() == b""
        writer.close()
        reader, writer = silent[0]
        writer.write(GET)
        assert (await reader.read()).startswith(b"HTTP/1.1 200 ")
        for _, writer in silent:
            writer.close()

    serve(test)
