"""The event loop, and vsockd's timers."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from vsockets.daemon.admin.audit import Audit, Events
from vsockets.daemon.broker import Broker
from vsockets.daemon.channel import Channel
from vsockets.daemon.limits import DAEMON_SILENT_CLIENT_SECONDS
from vsockets.eventloop.loop import Acceptor, EventLoop, Timer
from vsockets.fabric import EndpointKind, Fabric
from vsockets.protocol import RECORD_SIZE, Op, Record, Request

from .exhaustion import lingering_socket
from .raw_client import bind_datagram, send_with

KINDS = {EndpointKind.STREAM: socket.SOCK_STREAM, EndpointKind.SEQPACKET: socket.SOCK_SEQPACKET}


def end(loop: EventLoop) -> Callable[[], None]:
    """Return a callback that stops ``loop`` by an event, as vsockd is stopped."""
    reader, writer = os.pipe()

    def stop(events: int) -> None:
        loop.unwatch(reader)
        os.close(reader)
        loop.stop()

    loop.watch(reader, stop)
    return lambda: os.close(writer)


def run_once(loop: EventLoop) -> None:
    """Serve the events that are ready."""
    loop._running = True  # vsockd's never runs again after it was stopped
    loop.call_later(0.0, end(loop))
    loop.run()


def test_a_timer_can_stop_it() -> None:
    loop = EventLoop()
    loop.call_later(0.0, loop.stop)
    loop.run()


def test_timers_run_in_their_order() -> None:
    loop, calls = EventLoop(), list[str]()
    loop.call_later(0.002, lambda: calls.append("second"))
    loop.call_later(0.001, lambda: calls.append("first"))
    loop.call_later(0.0, lambda: calls.append("never")).cancel()
    loop.call_later(0.003, lambda: calls.append("third"))
    loop.call_later(0.003, end(loop))
    loop.run()
    assert calls == ["first", "second", "third"]


def test_a_cancelled_timer_does_not_wake_the_loop() -> None:
    loop, waits = EventLoop(), list[float | None]()
    poll = loop._poll

    def wait(timeout: float | None = None, maxevents: int = -1) -> list[tuple[int, int]]:
        waits.append(timeout)
        loop.stop()
        return poll(0, maxevents)

    loop._poll = wait
    for number in range(3):
        loop.call_later(number, loop.stop).cancel()
    loop.run()
    assert waits == [None]


@pytest.mark.parametrize("when", ["an event", "a timer"])
def test_a_callback_that_fails_is_logged_and_not_fatal(
    when: str, caplog: pytest.LogCaptureFixture
) -> None:
    loop = EventLoop()
    one, other = socket.socketpair()

    def fail(*_: object) -> None:
        loop.unwatch(one.fileno())
        raise OSError("as a test")

    with one, other, caplog.at_level(logging.ERROR):
        if when == "an event":
            loop.watch(one.fileno(), fail)
            other.send(b"x")
        else:
            loop.call_later(0.0, fail)
        run_once(loop)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "as a test"


def test_hang_ups_are_served_before_requests() -> None:
    loop, seen = EventLoop(), list[str]()
    pairs = {name: socket.socketpair() for name in ("new", "ended")}
    for name, (mine, _) in pairs.items():

        def note(events: int, name: str = name, mine: socket.socket = mine) -> None:
            seen.append(name)
            loop.unwatch(mine.fileno())

        loop.watch(mine.fileno(), note)
    pairs["new"][1].send(b"x")
    pairs["ended"][1].close()
    run_once(loop)
    assert seen == ["ended", "new"]
    for pair in pairs.values():
        for sock in pair:
            sock.close()


@pytest.mark.parametrize("kind", KINDS)
def test_a_request_that_raises_is_served_once(
    kind: EndpointKind, caplog: pytest.LogCaptureFixture
) -> None:
    """The client is disconnected, or vsockd would serve the request for ever."""

    def fail(channel: Channel, request: Request) -> bool:
        raise OverflowError("as a test")

    loop, fabric = EventLoop(), Fabric(0)
    broker = Broker(loop, fabric, Audit(Events(), 1))
    broker._operations[Op.BIND] = fail
    program, ours = socket.socketpair(socket.AF_UNIX, KINDS[kind])
    with program:
        broker.admit(fabric.contexts.host, kind, ours.detach())
        program.send(Request(Op.BIND, 0, 2, 5000).encode())
        run_once(loop)
        (record,) = caplog.records
        assert record.levelno == logging.ERROR
        program.settimeout(10)  # it may be let go by and by
        with contextlib.suppress(ConnectionResetError):  # as the request may not have been read
            assert program.recv(1) == b""


@pytest.fixture
def interrupts() -> Iterator[None]:
    """Interrupt system calls, as the loop does while it is busy."""
    old = signal.signal(signal.SIGALRM, lambda number, frame: None)
    signal.setitimer(signal.ITIMER_REAL, 0.02, 0.02)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, old)


@pytest.mark.parametrize("request_", ["LOCAL_CID", "BIND_DATAGRAM", "invalid, and one more"])
@pytest.mark.parametrize("cid", [2, 3])
@pytest.mark.usefixtures("interrupts")
def test_a_descriptor_that_is_slow_to_close_postpones_the_next_connection(
    request_: str, cid: int
) -> None:
    """Except at the host's socket, where the next one may be of another user."""
    loop, fabric = EventLoop(), Fabric(0)
    broker = Broker(loop, fabric, Audit(Events(), 1))
    context = fabric.contexts.host if cid == 2 else fabric.contexts.add(cid, "guest", 0)
    slow, peer = lingering_socket()
    program, ours = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    with program, peer:
        if request_ == "LOCAL_CID":
            send_with(program, Request(Op.LOCAL_CID).encode(), [slow.fileno()])
        elif request_ == "BIND_DATAGRAM":  # the slow one is in the socket that it names
            inner, outer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
            with inner, outer:
                send_with(outer, b"x", [slow.fileno()])
                send_with(program, bind_datagram().encode(), [inner.fileno()])
        else:
            program.send(b"x")
            send_with(program, b"x", [slow.fileno()])
        slow.close()
        seconds = broker.admit(context, EndpointKind.SEQPACKET, ours.detach())
        assert bool(seconds) == (cid == 3)
        assert not context.party_of(os.getuid()).blocked
        broker.close_context(context)


class Clock(EventLoop):
    """A loop whose timers are run by the test."""

    def __init__(self) -> None:
        super().__init__()
        self.pending: list[tuple[float, Callable[[], None]]] = []

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        self.pending.append((seconds, callback))
        return super().call_later(seconds, callback)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("speaks", [False, True])
def test_a_client_without_a_request_is_disconnected(
    kind: EndpointKind, speaks: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = Clock()
    fabric = Fabric(0)
    broker = Broker(loop, fabric, Audit(Events(), 1))
    program, ours = socket.socketpair(socket.AF_UNIX, KINDS[kind])
    with program:
        broker.admit(fabric.contexts.host, kind, ours.detach())
        ((seconds, close_silent),) = loop.pending
        assert seconds == DAEMON_SILENT_CLIENT_SECONDS
        if speaks:
            program.send(Request(Op.BIND, 0, 2, 5000).encode())
            run_once(loop)
            assert Record.decode(program.recv(RECORD_SIZE)).local == (2, 5000)
        monkeypatch.setattr("vsockets.daemon.broker.monotonic", lambda: float("inf"))
        close_silent()
        program.setblocking(False)
        if speaks:
            with pytest.raises(BlockingIOError):
                program.recv(1)
            program.shutdown(socket.SHUT_RDWR)
            run_once(loop)
        assert program.recv(1) == b""


def test_an_acceptor_pauses_for_as_long_as_it_is_told() -> None:
    loop, admitted = Clock(), list[int]()

    def admit(fd: int) -> float:
        os.close(fd)
        admitted.append(fd)
        return 1000.0

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("")
        listener.listen()
        listener.setblocking(False)
        acceptor = Acceptor(loop, listener, "a test", admit)
        clients = [socket.socket(socket.AF_UNIX) for _ in range(2)]
        for client in clients:
            client.connect(listener.getsockname())
        run_once(loop)
        assert len(admitted) == 1
        resume = dict(loop.pending)[1000.0]
        resume()
        run_once(loop)
        assert len(admitted) == 2
        acceptor.close()
        for client in clients:
            client.close()
