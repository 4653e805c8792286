"""A vsockd that does not answer for a while, which makes visible what is usually too quick."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import vsockets
from tools.vsock import Vsock
from vsockets.testing import PrivateFabric, wait_until

CONNECT = """
import errno, select, socket, sys
sock = socket.socket(40, 1)
sock.setblocking(False)
print("ready", flush=True)
sys.stdin.readline()
assert sock.connect_ex((2, 7500)) == errno.EINPROGRESS
poll = select.poll()
poll.register(sock, select.POLLOUT)
assert poll.poll(0) == []  # honest: it has not finished
assert sock.connect_ex((2, 7500)) == errno.EALREADY
assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
print("in progress", flush=True)
((_, events),) = poll.poll(20_000)
assert events == select.POLLOUT, events
assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) == 0
sock.setblocking(True)
print(sock.recv(100), sock.getpeername(), flush=True)
"""
TIMEOUT = """
import ctypes, struct, socket, sys
libc = ctypes.CDLL(None, use_errno=True)
sock = socket.socket(40, 1)
assert libc.setsockopt(sock.fileno(), 40, 6, struct.pack("qq", 0, 200_000), 16) == 0
print("ready", flush=True)
sys.stdin.readline()
try: sock.connect((2, 7501))
except OSError as error: print(error.errno)
"""
OTHER = """
import socket, sys
one = socket.socket(40, 1)
print("ready", flush=True)
for line in sys.stdin:
    print(one.getsockname() == socket.socket(40, 2).getsockname(), flush=True)
"""


@pytest.fixture
def fabric() -> Iterator[PrivateFabric]:
    with PrivateFabric() as fabric:
        yield fabric


@pytest.fixture
def vsock(fabric: PrivateFabric) -> Iterator[Vsock]:
    with Vsock(fabric.folder) as vsock:
        yield vsock


def test_connecting_takes_its_time_and_holds_nobody_up(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    for name, program in (("connect", CONNECT), ("other", OTHER)):
        (tmp_path / name).write_text(program)
    # One supervisor for both.
    script = f"""
mkfifo {tmp_path}/fifo
{sys.executable} {tmp_path}/other <{tmp_path}/fifo >{tmp_path}/said &
exec 9>{tmp_path}/fifo
{sys.executable} {tmp_path}/connect
"""
    with vsockets.create_server((2, 7500), context=fabric.host) as server:
        running = vsock.start("run", "sh", "-c", script)
        assert running.read_line() == "ready"
        wait_until(lambda: (tmp_path / "said").read_text() == "ready\n", "the other program")
        os.kill(fabric.pid, signal.SIGSTOP)
        try:
            running.write(b"\n")
            assert running.read_line() == "in progress"
            with open(tmp_path / "fifo", "w") as other:
                other.write("now\n")
            wait_until(
                lambda: (tmp_path / "said").read_text() == "ready\nTrue\n", "the other one served"
            )
        finally:
            os.kill(fabric.pid, signal.SIGCONT)
        server.settimeout(20)
        accepted, _ = server.accept()
        with accepted:
            accepted.sendall(b"data first")
            assert running.read_line() == "b'data first' (2, 7500)"
        running.finish()


def test_connecting_times_out(vsock: Vsock, fabric: PrivateFabric) -> None:
    with vsockets.create_server((2, 7501), context=fabric.host):
        running = vsock.start("run", sys.executable, "-c", TIMEOUT)
        running.read_line()
        os.kill(fabric.pid, signal.SIGSTOP)
        try:
            running.write(b"\n")
            assert running.read_line() == "110"
        finally:
            os.kill(fabric.pid, signal.SIGCONT)
        running.finish()
