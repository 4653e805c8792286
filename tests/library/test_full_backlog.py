"""A stopped vsockd with a full backlog of waiting programs."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import vsockets
from vsockets import AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT
from vsockets.control import Control
from vsockets.testing import PrivateFabric, wait_until

#: The timeout in seconds that replaces two and ten.
SHORT = 0.1


def fill(path: str, kind: int) -> list[socket.socket]:
    """Connect to ``path`` until its backlog is full."""
    waiting = []
    with contextlib.suppress(BlockingIOError):
        while True:
            sock = socket.socket(socket.AF_UNIX, kind | socket.SOCK_NONBLOCK)
            waiting.append(sock)
            sock.connect(path)
    return waiting


@contextlib.contextmanager
def full(fabric: PrivateFabric) -> Iterator[None]:
    """Stop vsockd and fill its backlogs while the context lasts."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    waiting: list[socket.socket] = []
    os.kill(fabric.pid, signal.SIGSTOP)
    try:
        for name, kind in (
            *(("2/stream", socket.SOCK_STREAM), ("2/seqpacket", socket.SOCK_SEQPACKET)),
            ("control", socket.SOCK_STREAM),
        ):
            waiting += fill(os.fspath(fabric.folder / name), kind)
        yield
    finally:
        for sock in waiting:
            sock.close()
        os.kill(fabric.pid, signal.SIGCONT)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def set_reply_timeout(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    for module in ("attachment", "control", "transports.fabric.stream"):
        monkeypatch.setattr(f"vsockets.{module}.VSOCKD_REPLY_TIMEOUT_SECONDS", seconds)


@pytest.fixture
def short_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    set_reply_timeout(monkeypatch, SHORT)


@pytest.fixture
def long_timeouts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine twenty signals take a while."""
    set_reply_timeout(monkeypatch, 60.0)


def connect(sock: vsockets.socket) -> None:
    timeout = struct.pack("qq", 0, int(SHORT * 1e6))
    sock.setsockopt(AF_VSOCK, SO_VM_SOCKETS_CONNECT_TIMEOUT, timeout)
    sock.connect((2, 5000))


def bind(sock: vsockets.socket) -> None:
    sock.bind((2, 6000))


CALLS = [
    (connect, socket.SOCK_STREAM),
    (connect, socket.SOCK_SEQPACKET),
    (bind, socket.SOCK_STREAM),
    (bind, socket.SOCK_DGRAM),
]


@pytest.mark.usefixtures("short_timeouts")
def test_call_times_out(vsock_fabric: PrivateFabric) -> None:
    with full(vsock_fabric):
        for call, kind in CALLS:
            for timeout in (None, 10.0):
                with vsockets.socket(type=kind, context=vsock_fabric.host) as sock:
                    sock.settimeout(timeout)
                    with pytest.raises(TimeoutError) as late:
                        call(sock)
                    assert late.value.errno == errno.ETIMEDOUT
                    # The socket's settings are unchanged.
                    assert sock.gettimeout() == timeout
                    assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, 16) == bytes(16)
                    assert os.get_blocking(sock.fileno()) is (timeout is None)
        with pytest.raises(TimeoutError):
            vsockets.get_local_cid(context=vsockets.attach(vsock_fabric.host.folder))
        with pytest.raises(TimeoutError):
            Control(vsock_fabric.folder)


def test_non_blocking_call_fails_at_once(vsock_fabric: PrivateFabric) -> None:
    with full(vsock_fabric):
        for call, kind in ((connect, socket.SOCK_STREAM), (connect, socket.SOCK_SEQPACKET)):
            with vsockets.socket(type=kind, context=vsock_fabric.host) as sock:
                sock.setblocking(False)
                with pytest.raises(OSError, match="the backlog of vsockd") as refused:
                    call(sock)
                assert refused.value.errno == errno.ENOBUFS


@pytest.mark.usefixtures("long_timeouts")
@pytest.mark.parametrize("timeout", [None, 60.0])
def test_blocked_call_is_served_once_there_is_room(
    vsock_fabric: PrivateFabric, timeout: float | None
) -> None:
    """Signals interrupt the call, after which Python considers the socket connected."""
    interruptions: list[int] = []
    stat = Path(f"/proc/self/task/{threading.get_native_id()}/stat")
    main = threading.get_ident()

    def interrupt() -> None:
        for number in range(20):
            wait_until(lambda: ") S " in stat.read_text(), "the call to block")
            signal.pthread_kill(main, signal.SIGUSR1)
            wait_until(partial(is_longer, interruptions, number), "the interruption")
        os.kill(vsock_fabric.pid, signal.SIGCONT)

    before = signal.signal(signal.SIGUSR1, lambda *_: interruptions.append(1))
    try:
        with full(vsock_fabric):
            helper = threading.Thread(target=interrupt)
            helper.start()
            with vsockets.socket(context=vsock_fabric.host) as sock:
                sock.settimeout(timeout)
                sock.bind((2, 6000))
                assert sock.getsockname() == (2, 6000)
            helper.join()
    finally:
        signal.signal(signal.SIGUSR1, before)


def is_longer(found: list[int], number: int) -> bool:
    return len(found) > number
