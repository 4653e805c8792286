"""vsockd's resources after ten thousand programs: no more than before."""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import socket
from collections.abc import Callable
from itertools import count

import pytest

import vsockets
from vsockets.protocol import RECORD_SIZE
from vsockets.testing import PrivateFabric, wait_until

from .raw_client import (
    PROMPT,
    SOCKET_TYPES,
    adopt,
    ask,
    ask_once,
    assert_serves,
    bind,
    connect,
    enter,
    has_ended,
    no_descriptor_left_behind,
    resident,
    unix_datagrams,
)

CYCLES = 10_000
WARM_UP = 1000
#: Allowed difference of vsockd's resident memory, in bytes.
TOLERANCE = 8 << 20


def cycle_binding(fabric: PrivateFabric) -> None:
    with enter(fabric.host) as sock:
        sock.send(bind().encode())
        sock.recv(RECORD_SIZE)


def cycle_refused(fabric: PrivateFabric) -> None:
    with enter(fabric.host) as sock:
        sock.send(connect(2, 4999).encode())
        sock.recv(RECORD_SIZE)


def cycle_datagrams(fabric: PrivateFabric) -> None:
    with vsockets.socket(type=socket.SOCK_DGRAM, context=fabric.host) as sock:
        sock.bind((2, 2**32 - 1))


@pytest.mark.parametrize("cycle", [cycle_binding, cycle_refused, cycle_datagrams])
def test_opening_and_closing(
    vsock_fabric: PrivateFabric, cycle: Callable[[PrivateFabric], None]
) -> None:
    for _ in range(WARM_UP):
        cycle(vsock_fabric)
    before = resident(vsock_fabric.pid)
    with no_descriptor_left_behind(vsock_fabric):
        for _ in range(CYCLES - WARM_UP):
            cycle(vsock_fabric)
    wait_until(lambda: vsock_fabric.control.sockets() == [], "no socket to be left", PROMPT)
    assert abs(resident(vsock_fabric.pid) - before) < TOLERANCE


def test_senders_closed_before_their_datagrams_are_read(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest()
    with vsockets.socket(type=socket.SOCK_DGRAM, context=vsock_fabric.host) as receiver:
        receiver.bind((2, 5000))
        with no_descriptor_left_behind(vsock_fabric):
            for context in [vsock_fabric.host, guest] * 5:
                with vsockets.socket(type=socket.SOCK_DGRAM, context=context) as sender:
                    sender.sendto(b"x", (2, 5000))
            vsock_fabric.control.status()
            for _ in range(10):
                receiver.recvfrom(10)


def test_connections(vsock_fabric: PrivateFabric) -> None:
    guest = vsock_fabric.guest()

    def cycle(times: int) -> None:
        for number in range(times):
            client = vsockets.create_connection((2, 5000), context=guest)
            accepted, _ = server.accept()
            # Either side closes first.
            for sock in (client, accepted) if number % 2 else (accepted, client):
                sock.close()

    with vsockets.create_server((2, 5000), context=vsock_fabric.host) as server:
        cycle(WARM_UP)
        before = resident(vsock_fabric.pid)
        with no_descriptor_left_behind(vsock_fabric):
            cycle(CYCLES - WARM_UP)
        (listener,) = vsock_fabric.control.sockets()
        assert listener["state"] == "listening"
        assert {row["usage"]["sockets"] for row in vsock_fabric.control.contexts()} == {0, 1}
        assert abs(resident(vsock_fabric.pid) - before) < TOLERANCE


def test_many_at_once(vsock_fabric: PrivateFabric) -> None:
    """Hundreds of streams are open, and vsockd has none of them open."""
    with (
        no_descriptor_left_behind(vsock_fabric),
        vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
        contextlib.ExitStack() as streams,
    ):
        for _ in range(400):
            streams.enter_context(vsockets.create_connection((2, 5000), context=vsock_fabric.host))
            streams.enter_context(server.accept()[0])
        status = vsock_fabric.control.status()
        assert status["streams"] == 400
        assert status["descriptors"] < 40


def test_guests_come_and_go(vsock_fabric: PrivateFabric) -> None:
    with no_descriptor_left_behind(vsock_fabric):
        for _ in range(500):
            guest = vsock_fabric.guest()
            cycle_binding(vsock_fabric)
            vsock_fabric.control.remove_context(guest.cid)
    assert len(vsock_fabric.control.contexts()) == 1


def test_no_descriptor_is_left(vsock_fabric: PrivateFabric) -> None:
    """vsockd lets clients wait while it has no descriptor for them, and logs it at times."""
    soft, hard = resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE)
    with (
        vsockets.create_server((2, 5000), context=vsock_fabric.host) as server,
        vsockets.create_connection((2, 5000), context=vsock_fabric.host) as client,
        server.accept()[0] as accepted,
    ):
        resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (8, hard))
        with enter(vsock_fabric.host), socket.socket(socket.AF_UNIX) as administrator:
            administrator.connect(os.fspath(vsock_fabric.folder / "control"))
            # Longer than the second after which vsockd looks for streams that have ended.
            wait_until(lambda: "more were left out" in vsock_fabric.log, "vsockd to try again")
            assert vsock_fabric.log.count("waits: Too many open files") < 20
            client.sendall(b"untouched")
            assert accepted.recv(100) == b"untouched"
        resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (soft, hard))
        assert_serves(vsock_fabric)


def test_clients_take_all_descriptors(vsock_fabric: PrivateFabric) -> None:
    """Except the reserve: all requests that keep none are served, also other guests' connects."""
    _, hard = resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE)
    guest = vsock_fabric.guest()
    host = vsock_fabric.host
    with vsockets.create_server((2, 5000), context=host) as server, enter(guest) as early:
        resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (72, hard))
        with contextlib.ExitStack() as hoarded:
            bound = []
            for _ in range(100):
                sock = hoarded.enter_context(enter(host))
                bound.append(ask(sock, bind()).status)
            assert bound == [*[0] * bound.count(0), *[errno.ENOBUFS] * bound.count(errno.ENOBUFS)]
            assert 20 < bound.count(0) < 72
            for kind in SOCKET_TYPES:
                for _ in range(100):  # more that say nothing
                    hoarded.enter_context(enter(host, kind))
            for _ in range(50):
                assert_serves(vsock_fabric)
                with (
                    vsockets.create_connection((2, 5000), context=guest) as client,
                    server.accept()[0] as accepted,
                ):
                    client.sendall(b"x")
                    assert accepted.recv(10) == b"x"
            assert ask_once(guest, bind()).status == errno.ENOBUFS
            with unix_datagrams() as datagrams:
                assert adopt(guest, datagrams).status == errno.ENOBUFS
            # Who was there before needs no descriptor.
            assert ask(early, bind()).status == 0
            assert vsock_fabric.control.status()["descriptors"] < 72
        wait_until(lambda: vsock_fabric.control.status()["descriptors"] < 32, "it to recover")
        assert ask_once(guest, bind()).status == 0
    assert "Too many open files" not in vsock_fabric.log
    assert vsock_fabric.log.count("few descriptors are left") < 20


def test_silent_client_gets_no_last_descriptor(vsock_fabric: PrivateFabric) -> None:
    """The epoll for the first client of a guest needs a descriptor, too."""
    guest = vsock_fabric.guest(3)
    soft, hard = resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE)
    taken = {int(name) for name in os.listdir(f"/proc/{vsock_fabric.pid}/fd")}
    lowest = next(number for number in count() if number not in taken)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(PROMPT)
        resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (lowest + 1, hard))
        try:
            sock.connect(os.fspath(guest.folder / "stream"))
            assert has_ended(sock)
        finally:
            resource.prlimit(vsock_fabric.pid, resource.RLIMIT_NOFILE, (soft, hard))
    (row,) = [row for row in vsock_fabric.control.contexts() if row["cid"] == 3]
    assert row["usage"]["pending_connects"] == 0
