"""The pump: its ends see of each other what directly connected sockets would see."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import resource
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsockets.forward.pump import AsyncioSplicePump, ForwardedConnection, PumpSelector

Sockets = tuple[socket.socket, socket.socket]

PATIENCE = 20.0


def unix() -> Sockets:
    return socket.socketpair()


def tcp() -> Sockets:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        return one, server.accept()[0]


class Harness:
    """A pump in a loop in a separate thread."""

    def __init__(self) -> None:
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()
        assert self._ready.wait(PATIENCE)

    def _run(self) -> None:
        selector = PumpSelector()
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(selector)) as runner:
            runner.run(self._main(selector))

    async def _main(self, selector: PumpSelector) -> None:
        self.loop = asyncio.get_running_loop()
        self.pump = AsyncioSplicePump(selector)
        self._stop = asyncio.Event()
        self._ready.set()
        await self._stop.wait()
        self.pump.close()

    def do(self, call: Callable[[], Any]) -> Any:
        async def calling() -> Any:
            result = call()
            return await result if isinstance(result, Awaitable) else result

        return asyncio.run_coroutine_threadsafe(calling(), self.loop).result(PATIENCE)

    def join(self, one: socket.socket, other: socket.socket, **options: Any) -> ForwardedConnection:
        connection: ForwardedConnection = self.do(lambda: self.pump.join(one, other, **options))
        return connection

    def end_of(self, connection: ForwardedConnection) -> OSError | None:
        why: OSError | None = self.do(lambda: connection.ended)
        return why

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(PATIENCE)


@pytest.fixture(scope="module")
def harness() -> Iterator[Harness]:
    harness = Harness()
    yield harness
    harness.close()


def joined(
    harness: Harness, left: Callable[[], Sockets], right: Callable[[], Sockets], **options: Any
) -> tuple[socket.socket, socket.socket, ForwardedConnection]:
    """Return two sockets that the pump joins, and their connection."""
    near, a = left()
    b, far = right()
    near.settimeout(PATIENCE)
    far.settimeout(PATIENCE)
    return near, far, harness.join(a, b, **options)


KINDS = pytest.mark.parametrize(
    ("left", "right"), [(unix, unix), (unix, tcp), (tcp, unix), (tcp, tcp)]
)


def read_all(sock: socket.socket) -> bytes:
    data = bytearray()
    while piece := sock.recv(1 << 16):
        data += piece
    return bytes(data)


@KINDS
def test_bytes_and_half_close_pass_in_both_directions(
    harness: Harness, left: Callable[[], Sockets], right: Callable[[], Sockets]
) -> None:
    near, far, connection = joined(harness, left, right)
    with near, far:
        near.sendall(b"question")
        assert far.recv(100) == b"question"
        near.shutdown(socket.SHUT_WR)
        assert far.recv(100) == b""
        far.sendall(b"answer")  # after the other direction has ended
        assert near.recv(100) == b"answer"
        far.shutdown(socket.SHUT_WR)
        assert near.recv(100) == b""
        assert harness.end_of(connection) is None
        assert connection.moved == (8, 6)


@KINDS
def test_large_data_in_both_directions_arrives_whole(
    harness: Harness, left: Callable[[], Sockets], right: Callable[[], Sockets]
) -> None:
    near, far, connection = joined(harness, left, right)
    data = os.urandom(1 << 20) * 12
    expected = hashlib.sha256(data).digest()

    def send(sock: socket.socket) -> None:
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)

    with near, far:
        senders = [threading.Thread(target=send, args=(sock,)) for sock in (near, far)]
        received: dict[socket.socket, bytes] = {}
        readers = [
            threading.Thread(
                target=lambda sock=sock: received.__setitem__(
                    sock, hashlib.sha256(read_all(sock)).digest()
                )
            )
            for sock in (near, far)
        ]
        for thread in senders + readers:
            thread.start()
        for thread in senders + readers:
            thread.join(PATIENCE)
        assert received == {near: expected, far: expected}
        assert harness.end_of(connection) is None


def test_slow_reader_blocks_the_sender_without_loss(harness: Harness) -> None:
    near, far, connection = joined(harness, unix, unix)
    with near, far:
        near.setblocking(False)
        sent = 0
        for _ in range(3):  # until the pump's buffers are full, too
            with pytest.raises(BlockingIOError):
                while True:
                    sent += near.send(bytes(8192))
            harness.do(lambda: asyncio.sleep(0))
        assert sent < 4 << 20
        near.close()  # sent bytes are still delivered
        assert len(read_all(far)) == sent
        far.close()
        assert harness.end_of(connection) is None


def test_early_bytes_arrive_first(harness: Harness) -> None:
    near, far, _ = joined(harness, unix, tcp, early=b"said before, ")
    with near, far:
        near.sendall(b"and after")
        near.shutdown(socket.SHUT_WR)
        assert read_all(far) == b"said before, and after"


@pytest.mark.parametrize("kind", [unix, tcp])
def test_reset_is_passed_on_to_tcp(harness: Harness, kind: Callable[[], Sockets]) -> None:
    near, far, connection = joined(harness, kind, tcp)
    with near:
        far.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        far.close()
        why = harness.end_of(connection)
        assert why is not None
        assert why.errno == errno.ECONNRESET
        if kind is tcp:
            with pytest.raises(ConnectionResetError):
                near.recv(1)
        else:
            assert near.recv(1) == b""


def test_answer_arrives_after_an_unread_question(harness: Harness) -> None:
    near, far, connection = joined(harness, tcp, unix)
    with near:
        near.sendall(b"a long question")
        assert far.recv(1) == b"a"
        far.sendall(b"no")
        far.close()  # with bytes unread: a unix socket's reset
        assert near.recv(100) == b"no"
        assert near.recv(100) == b""
    harness.end_of(connection)


def test_sender_gets_epipe_after_the_receiver_closed(harness: Harness) -> None:
    near, far, connection = joined(harness, unix, unix)
    far.close()
    with near:
        assert near.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            while True:  # until the pump has passed on the end
                near.send(b"x")
    assert harness.end_of(connection) is None


def test_closed_sink_leaves_the_other_direction_open(harness: Harness) -> None:
    near, far, _ = joined(harness, unix, unix)
    with near, far:
        far.shutdown(socket.SHUT_RD)
        with pytest.raises(BrokenPipeError):
            for _ in range(1000):
                near.sendall(bytes(8192))
        far.sendall(b"still")
        assert near.recv(100) == b"still"


def test_idle_connection_ends(harness: Harness) -> None:
    near, far, connection = joined(harness, unix, unix, idle=0.05)
    with near, far:
        assert far.recv(1) == b""
        assert near.recv(1) == b""
        why = harness.end_of(connection)
        assert why is not None
        assert why.errno == errno.ETIMEDOUT


def test_idle_connections_hold_no_pipes(harness: Harness) -> None:
    before = len(os.listdir("/proc/self/fd"))
    connections = [joined(harness, unix, unix) for _ in range(100)]
    for near, far, _ in connections:
        near.sendall(b"x")
        assert far.recv(1) == b"x"
    assert len(os.listdir("/proc/self/fd")) <= before + 400 + 2
    for near, far, connection in connections:
        near.close()
        far.close()
        harness.end_of(connection)
    harness.do(lambda: asyncio.sleep(0))
    assert len(os.listdir("/proc/self/fd")) <= before + 2
    assert not harness.pump.connections


def test_missing_descriptors_end_only_one_connection() -> None:
    harness = Harness()  # without spare pipes
    near, far, other_connection = joined(harness, unix, unix)
    one, other, connection = joined(harness, unix, unix)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.dup(one.fileno())
    os.close(lowest_free)
    with near, far, one, other:
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[1]))
        try:
            one.sendall(b"x")
            why = harness.end_of(connection)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        assert why is not None
        assert why.errno == errno.EMFILE
        near.sendall(b"still here")
        assert far.recv(100) == b"still here"
    harness.end_of(other_connection)
    harness.close()


def test_capture_gets_all_bytes_and_ends(harness: Harness) -> None:
    seen: list[tuple[bool, bytes]] = []
    near, far, connection = joined(
        harness,
        unix,
        unix,
        early=b"before",
        capture=lambda *one: seen.append(one),
    )
    with near, far:
        assert far.recv(100) == b"before"
        near.sendall(b"question")
        assert far.recv(100) == b"question"
        far.sendall(b"answer")
        far.shutdown(socket.SHUT_WR)
        assert read_all(near) == b"answer"
    assert harness.end_of(connection) is None
    assert seen == [
        *((True, b"before"), (True, b"question")),
        *((False, b"answer"), (False, b""), (True, b"")),
    ]


actions = st.lists(
    st.tuples(
        st.sampled_from(["near", "far"]),
        st.sampled_from(["send", "send", "send", "recv", "shut"]),
        st.integers(1, 100_000),
    ),
    max_size=30,
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(actions=actions)
def test_random_conversation_arrives_whole(
    harness: Harness, actions: list[tuple[str, str, int]]
) -> None:
    near, far, connection = joined(harness, unix, unix)
    with near, far:
        socks = {"near": near, "far": far}
        sent = {"near": bytearray(), "far": bytearray()}
        got = {"near": bytearray(), "far": bytearray()}
        shut = set()
        for sock in socks.values():
            sock.setblocking(False)
        for who, what, size in actions:
            if what == "recv":
                with contextlib.suppress(BlockingIOError):
                    got[who] += socks[who].recv(size)
            elif who in shut:
                continue
            elif what == "send":
                data = os.urandom(16) * (size // 16 + 1)
                with contextlib.suppress(BlockingIOError):
                    sent[who] += data[: socks[who].send(data)]
            else:
                socks[who].shutdown(socket.SHUT_WR)
                shut.add(who)
        for who in {"near", "far"} - shut:
            socks[who].shutdown(socket.SHUT_WR)
        for who, sock in socks.items():
            sock.settimeout(PATIENCE)
            got[who] += read_all(sock)
        assert got["near"] == sent["far"]
        assert got["far"] == sent["near"]
        assert harness.end_of(connection) is None
