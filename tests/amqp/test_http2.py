"""HTTP/2 connections and their streams, over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import hpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vsockets.amqp import http2 as module
from vsockets.amqp.http2 import FrameCounter, H2Connection, H2Stream, StreamRefused
from vsockets.amqp.limits import (
    AMQP_SESSION_UNSENT_MAX_BYTES,
    AMQP_SESSION_WINDOW_BYTES,
    AMQP_UPLINK_FRAMES_PER_TURN_MAX,
)
from vsockets.amqp.routing import Headers, connect_request

REQUEST = connect_request("rabbitmq:5672", 3)
DATA = os.urandom(3 << 20)

#: Time for each test, in seconds.
PATIENCE = 30.0


class End(asyncio.Protocol):
    """The protocol of one end of a stream, which records its events."""

    def __init__(self) -> None:
        self.received = bytearray()
        self.ended = asyncio.Event()
        self.lost: asyncio.Future[Exception | None] = asyncio.get_running_loop().create_future()
        self.paused = False
        self.transport: asyncio.Transport
        self._progress = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._progress.set()

    def eof_received(self) -> bool:
        self.ended.set()
        return True

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set_result(error)

    def pause_writing(self) -> None:
        self.paused = True

    def resume_writing(self) -> None:
        self.paused = False

    async def has(self, size: int) -> bytes:
        """Wait until ``size`` bytes were received; return all received bytes."""
        while len(self.received) < size:
            self._progress.clear()
            await self._progress.wait()
        return bytes(self.received)


class Pair:
    """Two connected connections; the server's ends of streams are put into ``served``."""

    def __init__(
        self, client: H2Connection, served: asyncio.Queue[End], server: H2Connection
    ) -> None:
        self.client, self.served, self.server = client, served, server

    async def stream(self) -> tuple[End, End]:
        """Open a stream; return its ends at the client and at the server."""
        end = End()
        await self.client.open(REQUEST, end)
        return end, await self.served.get()


@contextlib.asynccontextmanager
async def connected(status: int = 200) -> AsyncIterator[Pair]:
    loop = asyncio.get_running_loop()
    served: asyncio.Queue[End] = asyncio.Queue()

    def on_request(connection: H2Connection, stream: H2Stream, headers: Headers) -> None:
        assert headers[b"vsock-cid"] == b"3"
        connection.answer(stream, status)
        if status == 200:
            end = End()
            stream.set_protocol(end)
            served.put_nowait(end)

    one, other = socket.socketpair()
    _, server = await loop.connect_accepted_socket(lambda: H2Connection(on_request), one)
    _, client = await loop.create_connection(H2Connection, sock=other)
    await client.ready
    try:
        yield Pair(client, served, server)
    finally:
        client.close()
        server.close()


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(PATIENCE):
            await test()

    asyncio.run(limited())


def test_bytes_and_half_close_pass_in_both_directions() -> None:
    async def test() -> None:
        async with connected() as pair:
            ends = [await pair.stream() for _ in range(3)]
            for number, (here, there) in enumerate(ends):
                here.transport.write(DATA[number:])
                there.transport.write(DATA[: -1 - number])
                here.transport.write_eof()
            for number, (here, there) in enumerate(ends):
                assert await there.has(len(DATA) - number) == DATA[number:]
                await there.ended.wait()
                assert await here.has(len(DATA) - 1 - number) == DATA[: -1 - number]
                assert not here.lost.done()
                there.transport.write(b"more")
                there.transport.write_eof()
                assert await here.lost is await there.lost is None
                assert here.received.endswith(b"more")
            assert pair.client.sessions == pair.server.sessions == 0

    run(test)


def test_unread_stream_does_not_block_other_streams() -> None:
    async def test() -> None:
        async with connected() as pair:
            slow, to_slow = await pair.stream()
            fast, to_fast = await pair.stream()
            slow.transport.pause_reading()
            to_slow.transport.write(DATA)
            assert to_slow.paused
            for _ in range(7):  # more than the connection's whole window
                to_fast.transport.write(DATA)
                await fast.has(len(DATA))
                assert fast.received == DATA
                fast.received.clear()
            assert len(slow.received) <= AMQP_SESSION_WINDOW_BYTES
            assert (
                to_slow.transport.get_write_buffer_size() >= len(DATA) - AMQP_SESSION_WINDOW_BYTES
            )
            slow.transport.resume_reading()
            assert await slow.has(len(DATA)) == DATA
            assert not to_slow.paused

    run(test)


def test_full_buffer_pauses_the_writer() -> None:
    async def test() -> None:
        async with connected() as pair:
            here, there = await pair.stream()
            there.transport.write(bytes(AMQP_SESSION_UNSENT_MAX_BYTES))
            assert not there.paused
            there.transport.write(b"x")
            assert there.paused
            await here.has(AMQP_SESSION_UNSENT_MAX_BYTES + 1)
            assert not there.paused

    run(test)


def test_close_sends_pending_bytes_and_abort_discards_them() -> None:
    async def test() -> None:
        async with connected() as pair:
            here, there = await pair.stream()
            there.transport.write(DATA)
            there.transport.close()
            assert await here.has(len(DATA)) == DATA
            await here.ended.wait()
            assert await there.lost is None
            assert isinstance(await here.lost, ConnectionResetError)
            here, there = await pair.stream()
            there.transport.write(DATA)
            there.transport.abort()
            assert isinstance(await here.lost, ConnectionResetError)
            assert len(here.received) < len(DATA)

    run(test)


@pytest.mark.parametrize("status", [403, 503])
def test_refused_request_raises_stream_refused(status: int) -> None:
    async def test() -> None:
        async with connected(status) as pair:
            for _ in range(3):
                with pytest.raises(StreamRefused, match=str(status)):
                    await pair.client.open(REQUEST, End())
            assert pair.client.sessions == pair.server.sessions == 0

    run(test)


def test_too_many_streams_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AMQP_SESSIONS_MAX", 2)

    async def test() -> None:
        async with connected() as pair:
            first = [await pair.stream() for _ in range(2)]
            with pytest.raises(StreamRefused, match="no further sessions"):
                await pair.client.open(REQUEST, End())
            first[0][0].transport.abort()
            await first[0][1].lost
            await pair.stream()

    run(test)


@pytest.mark.parametrize("politely", [True, False])
def test_all_streams_end_with_the_connection(politely: bool) -> None:
    async def test() -> None:
        async with connected() as pair:
            ends = [await pair.stream() for _ in range(3)]
            if politely:
                pair.server.close()
            else:
                pair.server.abort(ConnectionError("broken"))
            for here, there in ends:
                assert isinstance(await here.lost, ConnectionError)
                assert isinstance(await there.lost, OSError)
            assert isinstance(await pair.client.closed, ConnectionError)
            with pytest.raises(OSError, match="ended"):
                await pair.client.open(REQUEST, End())

    run(test)


def test_silent_peer_is_probed_and_the_connection_aborted_without_an_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "AMQP_UPLINK_SILENCE_SECONDS", 1.0)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        other.setblocking(False)
        with other:
            _, connection = await loop.create_connection(H2Connection, sock=one)
            await loop.sock_sendall(other, frame(4))
            for _ in range(2):
                received = b""
                while frame(6, b"answer?!") not in received:
                    received += await loop.sock_recv(other, 65_536)
                await loop.sock_sendall(other, frame(6, b"answer?!", flags=1))
            assert isinstance(await connection.closed, TimeoutError)

    run(test)


async def converse(*said: bytes) -> tuple[bytes, Exception | None]:
    """Send bytes to a server; return its answer and the reason for its end, if any."""
    loop = asyncio.get_running_loop()
    one, other = socket.socketpair()
    other.setblocking(False)
    with other:
        _, connection = await loop.connect_accepted_socket(
            lambda: H2Connection(
                lambda connection, stream, headers: connection.answer(stream, 503)
            ),
            one,
        )
        for data in said:
            with contextlib.suppress(OSError):
                await loop.sock_sendall(other, data)
        with contextlib.suppress(OSError):
            other.shutdown(socket.SHUT_WR)
        answer = b""
        with contextlib.suppress(OSError):
            while data := await loop.sock_recv(other, 65_536):
                answer += data
        return answer, await connection.closed


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0"


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60), max_size=4), st.booleans())
def test_invalid_bytes_end_the_connection(said: list[bytes], begun: bool) -> None:
    async def test() -> None:
        _, why = await converse(*([PREFACE] if begun else []), *said)
        assert isinstance(why, ConnectionError)

    run(test)


def test_unread_answers_end_the_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AMQP_UPLINK_UNREAD_MAX_BYTES", 65_536)

    async def test() -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        other.setblocking(False)
        with other:
            _, connection = await loop.connect_accepted_socket(
                lambda: H2Connection(lambda connection, stream, headers: None), one
            )
            ping = b"\0\0\x08\6\0\0\0\0\0" + b"question"
            with contextlib.suppress(OSError):
                await loop.sock_sendall(other, PREFACE)
                while not connection.closed.done():
                    await loop.sock_sendall(other, ping * 1000)
            assert "does not read" in str(await connection.closed)

    run(test)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return len(payload).to_bytes(3) + bytes([kind, flags]) + stream.to_bytes(4) + payload


@given(
    st.lists(st.binary(max_size=40), max_size=20),
    st.lists(st.integers(1, 60), max_size=20),
    st.integers(1, 5),
    st.sampled_from([0, 24]),
)
def test_frame_counter_finds_frame_boundaries(
    payloads: list[bytes], pieces: list[int], most: int, preface: int
) -> None:
    whole = [frame(6, payload) for payload in payloads]
    data = bytes(preface) + b"".join(whole)
    ends = {preface + len(b"".join(whole[:number])) for number in range(len(whole) + 1)}
    frames, position = FrameCounter(preface), 0
    for size in [*pieces, len(data)]:
        piece = data[position : position + size]
        while piece:
            end = frames.end(piece, most)
            taken, piece = piece[:end], piece[end:]
            if piece:  # more than ``most``: cut at a boundary
                assert position + len(taken) in ends
            inside = {end for end in ends if position < end < position + len(taken)}
            assert len(inside) <= most
            position += len(taken)
    assert position == len(data)


@pytest.mark.parametrize(
    "flood",
    [
        frame(6, b"question"),
        frame(8, b"\0\0\0\1"),  # WINDOW_UPDATE
        frame(4),
        frame(0, stream=1),
    ],
    ids=["PING", "WINDOW_UPDATE", "SETTINGS", "empty DATA"],
)
def test_flood_of_frames_does_not_starve_the_loop(flood: bytes) -> None:
    """Other tasks run between the frames of one peer."""

    async def test() -> None:
        loop = asyncio.get_running_loop()
        one, other = socket.socketpair()
        other.setblocking(False)
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        with other:
            _, connection = await loop.connect_accepted_socket(
                lambda: H2Connection(lambda connection, stream, headers: None), one
            )
            counting = asyncio.create_task(count())
            encoder = hpack.Encoder()
            opened = encoder.encode([(":method", "CONNECT"), (":authority", "x:1")])
            said = PREFACE + frame(1, opened, 4, 1) + flood * 3000 + frame(6, b"the last")
            sending = asyncio.create_task(loop.sock_sendall(other, said))
            answer = b""
            while b"the last" not in answer:
                answer = answer[-100:] + await loop.sock_recv(other, 65_536)
            await sending
            counting.cancel()
            assert turns >= 3000 / AMQP_UPLINK_FRAMES_PER_TURN_MAX
            connection.close()

    run(test)
