"""Listening sockets of supervised programs: they yield connections alone."""

from __future__ import annotations

import errno
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vsockets
from cli.vsock import Vsock
from vsockets._linux.sockets import HAS_PASSRIGHTS
from vsockets.testing import PrivateFabric

#: The beginning of every program here.
COMMON = """
import errno, os, select, socket, sys, threading, time
ANY = 0xFFFFFFFF
TYPES = {"stream": socket.SOCK_STREAM, "seqpacket": socket.SOCK_SEQPACKET}
def bound(port=ANY, kind="stream"):
    sock = socket.socket(40, TYPES[kind])
    sock.bind((ANY, port))
    return sock
def listener(port=ANY, backlog=5, kind="stream"):
    sock = bound(port, kind)
    sock.listen(backlog)
    return sock
def attempt(call, *arguments):
    try: return call(*arguments)
    except OSError as error: return errno.errorcode[error.errno]
"""


def run(vsock: Vsock, program: str, *arguments: object, cid: object = "host") -> list[str]:
    done = vsock("run", "--cid", cid, sys.executable, "-c", COMMON + program, *arguments)
    return done.stdout.splitlines()


def test_a_number_that_is_used_again_is_another_socket(vsock: Vsock) -> None:
    """The supervisor expects that a thread's descriptor is the socket of its last call."""
    program = """
import ctypes, struct
libc = ctypes.CDLL(None, use_errno=True)
def call(function, *arguments):
    result = function(*arguments)
    return errno.errorcode[ctypes.get_errno()] if result < 0 else "ok"
def connect(address): return call(libc.connect, number, address, len(address))
def accept(): return call(libc.accept, number, None, None)
def use(sock):
    os.dup2(sock.fileno(), number)
    sock.close()
server = listener()
vsock = struct.pack("=HHIIB3s", 40, 0, server.getsockname()[1], 1, 0, bytes(3))
inet = struct.pack("=H", socket.AF_INET) + struct.pack("!H", 1) + bytes((127, 0, 0, 1)) + bytes(8)
number = 100
def kinds():
    yield socket.socket(40, socket.SOCK_STREAM)
    yield socket.socket(40, socket.SOCK_STREAM)
    yield socket.socket(40, socket.SOCK_SEQPACKET)
    yield socket.socket(40, socket.SOCK_DGRAM)
    yield socket.socket()
    yield open("/dev/null")
    waiting = listener()
    waiting.setblocking(False)
    yield waiting
for sock in kinds():
    use(sock)
    print(connect(vsock), connect(vsock), accept(), connect(inet), accept())
os.close(number)
print(call(libc.connect, number, None, len(vsock)), connect(vsock), accept())
"""
    assert run(vsock, program) == [
        "ok EISCONN EINVAL EISCONN EINVAL",
        "ok EISCONN EINVAL EISCONN EINVAL",
        "ECONNRESET ECONNRESET EINVAL EINVAL EINVAL",
        "ok ok ENOTSUP EINVAL ENOTSUP",
        "EAFNOSUPPORT EAFNOSUPPORT EINVAL ECONNREFUSED EINVAL",
        "ENOTSOCK ENOTSOCK ENOTSOCK ENOTSOCK ENOTSOCK",
        "EINVAL EINVAL EAGAIN EINVAL EAGAIN",
        "EBADF EBADF EBADF",
    ]


def test_a_copy_of_another_socket_leaves_it_unchanged(vsock: Vsock) -> None:
    """The supervisor copies the descriptor because its number was a vSockets socket's."""
    program = """
import struct
vsock = socket.socket(40, socket.SOCK_STREAM)
server = socket.create_server(("127.0.0.1", 0))
number = vsock.fileno()
vsock.close()
client = socket.socket()
assert client.fileno() == number
linger = struct.pack("ii", 1, 3)
client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
client.connect(server.getsockname())
time.sleep(0.3)  # the supervisor closes its copy later
print(client.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8) == linger)
"""
    assert run(vsock, program) == ["True"]


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_reading_and_writing_do_not_affect_a_listener(
    vsock: Vsock, fabric: PrivateFabric, kind: str
) -> None:
    """A program does so whose service manager passes the listener as standard input."""
    program = """
server = listener(7100, 500, sys.argv[1])
os.dup2(server.fileno(), 0)
said = set()
def read_and_write():
    while not done:
        for call in (lambda: os.read(0, 500), lambda: os.write(0, b"x" * 64)):
            said.add(attempt(call))
done = False
threads = [threading.Thread(target=read_and_write) for _ in range(3)]
for thread in threads: thread.start()
print("listening", flush=True)
for number in range(300):
    sock, (cid, port) = server.accept()
    assert cid == 2
    with sock: sock.sendall(sock.recv(100))
done = True
for thread in threads: thread.join()
print(sorted(said))
"""
    running = vsock.start(
        "run", "--cid", "host", sys.executable, "-c", COMMON + program, kind, stdin=subprocess.PIPE
    )
    assert running.read_line() == "listening"
    type_ = socket.SOCK_STREAM if kind == "stream" else socket.SOCK_SEQPACKET
    for number in range(300):
        with vsockets.socket(type=type_, context=fabric.host) as client:
            client.settimeout(20)
            client.connect((2, 7100))
            client.sendall(b"%d" % number)
            assert client.recv(100) == b"%d" % number
    # A read from an unconnected unix stream fails with EINVAL.
    expected = "['EINVAL', 'ENOTCONN']" if kind == "stream" else "['ENOTCONN']"
    assert running.read_line() == expected
    running.finish()


def test_closing_a_listener_releases_its_port(vsock: Vsock) -> None:
    program = """
for number in range(50):
    server = listener(7101)
    client = socket.socket(40)
    client.connect((1, 7101))
    server.close()
    assert attempt(client.recv, 1) in (b"", "ECONNRESET")
    assert attempt(socket.socket(40).connect, (1, 7101)) == "ECONNRESET"
print("free")
"""
    assert run(vsock, program) == ["free"]


def test_another_program_can_bind_a_released_port(vsock: Vsock, fabric: PrivateFabric) -> None:
    program = """
while True:
    server = listener(7102)
    print("listening", flush=True)
    sys.stdin.readline()
    server.close()
    print("closed", flush=True)
    sys.stdin.readline()
"""
    running = vsock.start("run", "--cid", "host", sys.executable, "-c", COMMON + program)
    for _ in range(20):
        assert running.read_line() == "listening"
        with (
            vsockets.socket(context=fabric.host) as ours,
            pytest.raises(OSError, match="in use"),
        ):
            ours.bind((2, 7102))
        running.write(b"\n")
        assert running.read_line() == "closed"
        with vsockets.socket(context=fabric.host) as ours:
            assert ours.connect_ex((2, 7102)) == errno.ECONNRESET
        with vsockets.socket(context=fabric.host) as ours:
            ours.bind((2, 7102))
        running.write(b"\n")


def test_the_backlog_limits_pending_connections(vsock: Vsock) -> None:
    program = """
server = listener(7103, 2)
def connect():
    sock = socket.socket(40)
    return sock if attempt(sock.connect, (1, 7103)) is None else "refused"
def connects(number):
    clients.extend(connect() for _ in range(number))
    print(*(int(client != "refused") for client in clients[-number:]))
clients = []
connects(5)
server.accept()[0].close()
connects(2)
server.listen(4)
connects(3)
"""
    assert run(vsock, program) == ["1 1 1 0 0", "1 0", "1 1 0"]


def test_a_listener_polls_readable_when_a_connection_is_pending(vsock: Vsock) -> None:
    program = """
server = listener(7104)
server.setblocking(False)
poll = select.epoll()
poll.register(server, select.EPOLLIN | select.EPOLLOUT | select.EPOLLET)
assert poll.poll(0) == []
clients = []
for _ in range(3):
    clients.append(socket.socket(40))
    clients[-1].connect((1, 7104))
    assert poll.poll(10) == [(server.fileno(), select.EPOLLIN)]
for _ in range(3): server.accept()
assert attempt(server.accept) == "EAGAIN"
print("as it should be")
"""
    assert run(vsock, program) == ["as it should be"]


def test_several_processes_can_accept(vsock: Vsock) -> None:
    program = """
server = listener(7105, 100)
workers = []
for _ in range(4):
    if (pid := os.fork()) == 0:
        for _ in range(25):
            sock = server.accept()[0]
            with sock: sock.sendall(sock.recv(10))
        os._exit(0)
    workers.append(pid)
for number in range(100):
    with socket.socket(40) as client:
        client.connect((1, 7105))
        client.sendall(b"%d" % number)
        assert client.recv(10) == b"%d" % number
for pid in workers: assert os.waitpid(pid, 0)[1] == 0
print("done")
"""
    assert run(vsock, program) == ["done"]


@pytest.mark.parametrize("how", [PrivateFabric.stop, PrivateFabric.kill])
def test_a_listener_is_lost_with_vsockd(how: Callable[[PrivateFabric], None]) -> None:
    program = """
waiting, polled, bound = listener(7106), listener(7107), bound(7108)
poll = select.poll()
poll.register(polled, select.POLLIN)
def wait(): print(attempt(waiting.accept), flush=True)
thread = threading.Thread(target=wait)
thread.start()
print("listening", flush=True)
thread.join()
assert poll.poll(20_000)
print(attempt(polled.accept), attempt(polled.listen), attempt(bound.listen), flush=True)
"""
    with PrivateFabric() as fabric, Vsock(fabric.folder) as vsock:
        running = vsock.start("run", "--cid", "host", sys.executable, "-c", COMMON + program)
        assert running.read_line() == "listening"
        how(fabric)
        assert running.read_line() == "ENETDOWN"
        assert running.read_line() == "ENETDOWN ENETDOWN ENETDOWN"


def test_power_off_ends_a_listener(vsock: Vsock, fabric: PrivateFabric) -> None:
    program = """
server = listener(7109)
print("listening", flush=True)
print(attempt(server.accept), flush=True)
"""
    fabric.control.add_context(92)
    try:
        running = vsock.start("run", "--cid", "92", sys.executable, "-c", COMMON + program)
        assert running.read_line() == "listening"
        fabric.control.power_off(92)
        assert running.read_line() == "ENETDOWN"
    finally:
        fabric.control.remove_context(92)


def test_a_bound_socket_connects_from_its_port(vsock: Vsock, fabric: PrivateFabric) -> None:
    program = """
client = bound(7110)
for _ in range(3):
    assert attempt(client.connect, (2, 7111)) == "ECONNRESET"
    assert client.getsockname()[1] == 7110
print("refused", flush=True)
sys.stdin.readline()
client.connect((2, 7111))
client.sendall(b"hello")
assert attempt(bound, 7110) == "EADDRINUSE"
assert client.recv(10) == b"hello"
client.close()
bound(7110).close()
print("free", flush=True)
"""
    running = vsock.start("run", "--cid", "93", sys.executable, "-c", COMMON + program)
    assert running.read_line() == "refused"
    with vsockets.create_server((2, 7111), context=fabric.host) as server:
        running.write(b"\n")
        server.settimeout(20)
        connection, peer = server.accept()
        with connection:
            assert peer == (93, 7110)
            connection.sendall(connection.recv(10))
            assert connection.recv(10) == b""
    assert running.read_line() == "free"


def test_a_listener_passed_to_a_program_of_the_library_works(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    program = """
server = listener(7112)
with socket.socket(socket.AF_UNIX) as channel:
    channel.connect(sys.argv[1])
    socket.send_fds(channel, [b"x"], [server.fileno()])
sys.stdin.readline()
"""
    path = str(tmp_path / "channel")
    with socket.socket(socket.AF_UNIX) as channel:
        channel.bind(path)
        channel.listen()
        running = vsock.start("run", "--cid", "host", sys.executable, "-c", COMMON + program, path)
        with channel.accept()[0] as passing:
            (fd,) = socket.recv_fds(passing, 1, 1)[1]
    with vsockets.socket(fileno=fd, context=fabric.host) as server:
        server.settimeout(20)
        assert server.getsockname() == (2, 7112)
        with vsockets.create_connection((2, 7112), context=fabric.host) as client:
            accepted, peer = server.accept()
            with accepted:
                assert peer == client.getsockname()
                client.sendall(b"hello")
                assert accepted.recv(10) == b"hello"
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()
    running.finish(b"\n")


@pytest.mark.skipif(not HAS_PASSRIGHTS, reason="takes Linux 6.16")
def test_accepted_streams_carry_no_descriptors(vsock: Vsock) -> None:
    program = """
server = listener(7300)
client = socket.socket(40, socket.SOCK_STREAM)
client.connect((2, 7300))
accepted, _ = server.accept()
for ours, theirs in ((client, accepted), (accepted, client)):
    print(attempt(socket.send_fds, ours, [b"x"], [0]))
    ours.send(b"data")
    print(theirs.recv(10))
"""
    assert run(vsock, program) == ["EPERM", "b'data'"] * 2
