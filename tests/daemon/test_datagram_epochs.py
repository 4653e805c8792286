"""Datagram sockets do not outlive their vsockd, after which their addresses are reused."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vsockets
from vsockets.daemon import datagram_epochs
from vsockets.daemon.datagram_epochs import EarlierEpochs, end_sockets
from vsockets.daemon.scheduling import DeferredWork
from vsockets.eventloop.loop import EventLoop
from vsockets.testing import PrivateFabric

from .raw_client import ask_for_route, unix_datagrams
from .users import as_administrator, as_network_administrator

DATAGRAM = socket.SOCK_DGRAM


def restart(fabric: PrivateFabric) -> None:
    fabric.stop()
    fabric.start()


def crash(fabric: PrivateFabric) -> None:
    fabric.kill()
    fabric.start()


def crash_twice(fabric: PrivateFabric) -> None:
    """Kill two vsockds in turn, the second before it has ended the first one's sockets."""
    fabric.kill()
    record = fabric.folder / "private" / "lives"
    record.write_text(f"{record.read_text()}\n{'f' * 16}")
    fabric.start()


ends = pytest.mark.parametrize("end", [restart, crash, crash_twice])
#: Without the capability a crashed vsockd's receivers get no error (docs/internals/design.md).
ends_with_an_error = pytest.mark.parametrize(
    "end",
    [restart, *(pytest.param(end, marks=as_network_administrator) for end in (crash, crash_twice))],
)
End = Callable[[PrivateFabric], None]


@pytest.fixture
def receiver(vsock_fabric: PrivateFabric) -> Iterator[vsockets.socket]:
    """Yield the host's service."""
    with vsockets.socket(type=DATAGRAM, context=vsock_fabric.host) as sock:
        sock.bind((2, 5000))
        sock.settimeout(10)
        yield sock


@pytest.fixture
def route(vsock_fabric: PrivateFabric, receiver: vsockets.socket) -> Iterator[socket.socket]:
    """Yield a program of guest 3 that has sent a datagram and keeps the route."""
    with unix_datagrams() as sender:
        route = ask_for_route(vsock_fabric.guest(3), sender, (2, 5000))
        with route:
            route.send(b"before")
            assert receiver.recvfrom(100)[0] == b"before"
            yield route


@ends_with_an_error
def test_a_route_ends(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket, end: End
) -> None:
    end(vsock_fabric)
    vsock_fabric.guest(3)  # another one's by now
    with pytest.raises(BrokenPipeError):
        route.send(b"from the old guest 3")
    with pytest.raises(ConnectionResetError):
        receiver.recvfrom(100)
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recvfrom(100)


@ends_with_an_error
def test_a_hidden_route_reaches_nobody(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket, end: End
) -> None:
    """A descriptor in a message that is not received is in no process."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        socket.send_fds(ours, [b"x"], [route.fileno()])
        route.close()
        end(vsock_fabric)
        _, fds, _, _ = socket.recv_fds(theirs, 1, 1)
    with socket.socket(fileno=fds[0]) as found, pytest.raises((PermissionError, BrokenPipeError)):
        found.send(b"from the old guest 3")
    with pytest.raises(ConnectionResetError):
        receiver.recvfrom(100)
    receiver.setblocking(False)
    with pytest.raises(BlockingIOError):
        receiver.recvfrom(100)


@ends_with_an_error
def test_queued_datagrams_are_read_and_a_blocked_receiver_is_woken(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket, end: End
) -> None:
    poll = select.poll()
    poll.register(receiver, 0)  # errors alone
    route.send(b"in time")
    assert not poll.poll(0)
    end(vsock_fabric)
    assert poll.poll(0)
    with pytest.raises(ConnectionResetError):
        receiver.recvfrom(100)
    assert receiver.recvfrom(100)[0] == b"in time"


@ends
def test_a_socket_of_an_earlier_epoch_gets_a_clear_error(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket, end: End
) -> None:
    receiver.sendto(b"to itself", (2, 5000))
    end(vsock_fabric)
    with pytest.raises(OSError) as refused:
        receiver.sendto(b"to itself", (2, 5000))
    assert refused.value.errno == errno.ENETDOWN
    with vsockets.socket(type=DATAGRAM, context=vsock_fabric.host) as sock:
        sock.bind((2, 5000))
        sock.sendto(b"to itself", (2, 5000))
        assert sock.recvfrom(100) == (b"to itself", (2, 5000))


def test_a_revoked_route_is_not_used_again(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket
) -> None:
    """vsockd keeps no duplicate of a revoked route; the route is shut down by then."""
    vsock_fabric.control.suspend(3)
    restart(vsock_fabric)
    with pytest.raises(BrokenPipeError):
        route.send(b"x")


@as_network_administrator
def test_sockets_are_ended_twice(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket
) -> None:
    record = vsock_fabric.folder / "private" / "lives"
    first = record.read_text()
    crash(vsock_fabric)
    record.write_text(first)
    crash(vsock_fabric)
    with pytest.raises(BrokenPipeError):
        route.send(b"x")
    with pytest.raises(ConnectionResetError):
        receiver.recvfrom(100)


def test_other_fabrics_and_epochs_are_not_affected(vsock_fabric: PrivateFabric) -> None:
    with (
        PrivateFabric() as other,
        unix_datagrams() as sender,
        vsockets.socket(type=DATAGRAM, context=other.host) as receiver,
    ):
        receiver.bind((2, 5000))
        with ask_for_route(other.guest(3), sender, (2, 5000)) as route:
            crash(vsock_fabric)
            restart(vsock_fabric)
            route.send(b"still here")
            assert receiver.recvfrom(100)[0] == b"still here"


def test_only_sockets_of_the_epoch_are_ended(
    vsock_fabric: PrivateFabric, receiver: vsockets.socket, route: socket.socket
) -> None:
    """A name may contain newlines, and imitate lines of /proc/net/unix about other sockets."""
    epoch = bytes(route.getsockname()).split(b":")[3]
    ours, theirs = socket.socketpair(type=DATAGRAM)
    with ours, theirs, unix_datagrams() as bystander:
        bystander.bind(b"\0vsockets-test-%d" % os.getpid())
        for sock, name in ((ours, b"@vsock:3:1:%s:1" % epoch), (bystander, b"%s.2.1.1" % epoch)):
            inode = os.fstat(sock.fileno()).st_ino
            with unix_datagrams() as forger:
                line = b"\n0: 00000002 00000000 00000000 0002 01 %d %s" % (inode, name)
                forger.bind(b"\0x" + line)
                crash(vsock_fabric)
        theirs.send(b"still here")
        assert ours.recv(100) == b"still here"
        ours.send(b"still here")
        assert theirs.recv(100) == b"still here"
        with unix_datagrams() as sender:
            sender.sendto(b"still here", bystander.getsockname())
        assert bystander.recv(100) == b"still here"


RECEIVER = """
import socket, vsockets
sock = vsockets.socket(type=socket.SOCK_DGRAM)
sock.bind((3, 5000))
sock.settimeout(10)
print("bound", flush=True)
try:
    print(sock.recvfrom(100))
except OSError as error:
    print(error.errno)
"""


@as_administrator
@ends
def test_in_another_network_namespace(vsock_fabric: PrivateFabric, end: End) -> None:
    guest = vsock_fabric.guest(3)
    with subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", RECEIVER],
        env=vsock_fabric.environment(guest),
        stdout=subprocess.PIPE,
        text=True,
    ) as program:
        assert program.stdout is not None
        assert program.stdout.readline() == "bound\n"
        with (
            unix_datagrams() as sender,
            ask_for_route(vsock_fabric.host, sender, (3, 5000)) as route,
        ):
            end(vsock_fabric)
            with pytest.raises(BrokenPipeError):
                route.send(b"x")
        assert program.stdout.readline() == f"{errno.ECONNRESET}\n"


def test_an_epoch_is_recorded_until_its_sockets_are_ended(
    vsock_fabric: PrivateFabric,
) -> None:
    record = vsock_fabric.folder / "private" / "lives"
    first = record.read_text()
    crash(vsock_fabric)
    second = record.read_text()
    assert len(first) == len(second) == 16
    assert first != second


EPOCH = "0123456789abcdef"
MANY = 640  # descriptors: ten steps of a search

HOLDER = """
import os, sys
for _ in range(int(sys.argv[2])):
    os.dup(int(sys.argv[1]))
print("ready", flush=True)
sys.stdin.read()
"""


def route_of(port: int) -> socket.socket:
    """Return a socket with the name of a route, connected to itself."""
    sock = unix_datagrams()
    sock.bind(f"\0vsock:3:{port}:{EPOCH}:{os.getpid():x}".encode())
    sock.connect(sock.getsockname())
    return sock


@contextlib.contextmanager
def held_elsewhere(sock: socket.socket, copies: int) -> Iterator[socket.socket]:
    """Run a process with so many copies of ``sock``."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(sock.fileno()), str(copies)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        pass_fds=[sock.fileno()],
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield sock
        process.communicate("")


def test_processes_with_few_descriptors_are_searched_first() -> None:
    with (
        route_of(1) as hidden,
        held_elsewhere(hidden, MANY),
        route_of(2) as route,
        held_elsewhere(route, 1),
    ):
        inodes = [os.fstat(sock.fileno()).st_ino for sock in (hidden, route)]
        left = {
            inode: os.fsdecode(sock.getsockname())
            for inode, sock in zip(inodes, (hidden, route), strict=True)
        }
        ours = [os.dup(route.fileno()) for _ in range(2 * MANY)]
        try:
            for _ in end_sockets(left):
                if inodes[1] not in left:
                    break
            assert inodes[0] in left
            for _ in end_sockets(left):
                pass
            assert not left
        finally:
            for fd in ours:
                os.close(fd)
        for sock in (hidden, route):
            with pytest.raises(BrokenPipeError):
                sock.send(b"x")


def test_a_search_that_takes_long_continues_while_vsockd_serves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datagram_epochs, "DATAGRAM_END_AT_ONCE_SECONDS", 0)
    file = tmp_path / "lives"
    file.write_text(EPOCH)
    loop, steps = EventLoop(), 0
    deferred = DeferredWork(loop)

    def serve() -> None:
        nonlocal steps
        steps += 1
        if file.read_text() == "f" * 16:
            loop.stop()
        else:
            loop.call_later(0, serve)

    with route_of(1) as route, held_elsewhere(route, MANY):
        EarlierEpochs(file).end(loop, deferred, "f" * 16)
        route.send(b"x")
        loop.call_later(0, serve)
        loop.run()
        assert steps > 1
        with pytest.raises(BrokenPipeError):
            route.send(b"x")
