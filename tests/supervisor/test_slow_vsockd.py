"""A vsockd that is stopped for a while, which exposes states that are usually too short."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import vsockets
from cli.vsock import Vsock
from vsockets.supervisor.arch import this_architecture
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
assert poll.poll(0) == []  # not connected yet
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
def vsock(fabric: PrivateFabric, interceptor: str) -> Iterator[Vsock]:
    with Vsock(fabric.folder) as vsock:
        yield vsock


def test_a_slow_connect_delays_no_other_call(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path
) -> None:
    for name, program in (("connect", CONNECT), ("other", OTHER)):
        (tmp_path / name).write_text(program)
    # Both under one supervisor.
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


KNOCK = """
import ctypes, fcntl, os, socket, struct, sys
sock = socket.socket(40, 1)
libc = ctypes.CDLL(None, use_errno=True)
if sys.argv[2] != "0":
    timeout = struct.pack("qq", *divmod(int(sys.argv[2]), 1_000_000))
    assert libc.setsockopt(sock.fileno(), 40, 6, timeout, 16) == 0
sock.setblocking(sys.argv[1] == "blocking")
before = fcntl.fcntl(sock, fcntl.F_GETFL)
print("ready", flush=True)
sys.stdin.readline()
try:
    sock.connect((2, 7502))
    print(sock.recv(100), flush=True)
except OSError as error: print(error.errno, flush=True)
assert fcntl.fcntl(sock, fcntl.F_GETFL) == before
timeout, size = ctypes.create_string_buffer(16), ctypes.c_int(16)
assert libc.getsockopt(sock.fileno(), 1, socket.SO_SNDTIMEO, timeout, ctypes.byref(size)) == 0
assert timeout.raw == bytes(16)
"""


@contextmanager
def full_control_socket(door: Path) -> Iterator[None]:
    """Replace vsockd's control socket with one whose backlog is full."""
    aside = door.with_name("aside")
    door.rename(aside)
    try:
        with (
            socket.socket(socket.AF_UNIX) as listener,
            socket.socket(socket.AF_UNIX) as first,
            socket.socket(socket.AF_UNIX) as second,
        ):
            listener.bind(str(door))
            listener.listen(0)
            first.setblocking(False)
            first.connect(str(door))
            second.setblocking(False)
            with pytest.raises(BlockingIOError):
                second.connect(str(door))
            yield
            aside.rename(door)
    finally:
        if aside.exists():
            aside.rename(door)


@pytest.mark.parametrize("outcome", ["room", "timeout", "at once"])
def test_a_full_backlog_delays_no_other_call(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path, outcome: str
) -> None:
    guest = fabric.guest(74)
    for name, program in (("knock", KNOCK), ("other", OTHER)):
        (tmp_path / name).write_text(program)
    mode = "polling" if outcome == "at once" else "blocking"
    # A minute, within which there is room again.
    microseconds = {"room": 60_000_000, "timeout": 500_000, "at once": 0}[outcome]
    script = f"""
mkfifo {tmp_path}/fifo
{sys.executable} {tmp_path}/other <{tmp_path}/fifo >{tmp_path}/said &
exec 9>{tmp_path}/fifo
{sys.executable} {tmp_path}/knock {mode} {microseconds}
"""
    said = tmp_path / "said"
    with vsockets.create_server((2, 7502), context=fabric.host) as server:
        running = vsock.start("run", "--cid", "74", "sh", "-c", script)
        assert running.read_line() == "ready"
        wait_until(lambda: said.read_text() == "ready\n", "the other program")
        os.kill(fabric.pid, signal.SIGSTOP)
        try:
            with full_control_socket(guest.folder / "stream"):
                running.write(b"\n")
                if outcome != "room":
                    code = errno.ETIMEDOUT if outcome == "timeout" else errno.ENOBUFS
                    assert running.read_line() == str(code)
                else:
                    knocking = f"{tmp_path}/knock"
                    wait_until(lambda: is_waiting_in_connect(knocking), "connect() to wait")
                    with open(tmp_path / "fifo", "w") as other:
                        other.write("now\n")
                    wait_until(lambda: said.read_text() == "ready\nTrue\n", "the other one served")
        finally:
            os.kill(fabric.pid, signal.SIGCONT)
        if outcome == "room":
            server.settimeout(20)
            accepted, _ = server.accept()
            with accepted:
                accepted.sendall(b"room at last")
                assert running.read_line() == "b'room at last'"
        running.finish()


def is_waiting_in_connect(argument: str) -> bool:
    """Return whether a process with this argument waits in connect()."""
    number = this_architecture().connect
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            if argument.encode() in words and (folder / "syscall").read_text().startswith(
                f"{number} "
            ):
                return True
        except OSError:
            continue
    return False


#: ``vsock run`` with a kernel that always does what the real one does within nanoseconds: it
#: accepts the answer to a call that a signal has just interrupted, and drops it.
DROPPING = """
import sys
from vsockets.supervisor import arch, notification, process
from vsockets.cli import main

processes = process.Processes(arch.this_architecture())

class Dropping(notification.Listener):
    threads = {}

    def receive(self):
        received = super().receive()
        self.threads[received.id] = received.pid
        return received

    def answer(self, id_, value, flags=0):
        try:
            super().answer(id_, value, flags)
        except notification.CallInterrupted:
            if not processes.has_signal(self.threads[id_]):
                raise  # the thread has handled the signal: the real kernel reports that too

notification.Listener = Dropping
notification.SUPERVISOR_SIGNAL_WAIT_SECONDS = 60.0  # longer than the test takes
sys.exit(main())
"""
INTERRUPTED = """
import ctypes, os, signal, socket, struct, sys
sock = socket.socket(40, 1)
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
signal.siginterrupt(signal.SIGUSR1, False)
address = struct.pack("=HHIIB3s", 40, 0, 7503, 2, 0, bytes(3))
print(os.getpid(), flush=True)
sys.stdin.readline()
print(libc.connect(sock.fileno(), address, len(address)), ctypes.get_errno(), flush=True)
"""


@pytest.mark.notify_only("a stopped thread loses no answer")
def test_an_answer_lost_to_a_signal_is_given_again(
    vsock: Vsock, fabric: PrivateFabric, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, program in (("connect", INTERRUPTED), ("other", OTHER)):
        (tmp_path / name).write_text(program)
    script = f"""
mkfifo {tmp_path}/fifo
{sys.executable} {tmp_path}/other <{tmp_path}/fifo >{tmp_path}/said &
exec 9>{tmp_path}/fifo
{sys.executable} {tmp_path}/connect
"""
    said = tmp_path / "said"

    def let_the_supervisor_catch_up() -> None:
        """Wait until the supervisor has answered a later call of the other program."""
        before = said.read_text()
        with open(tmp_path / "fifo", "w") as other:
            other.write("now\n")
        wait_until(lambda: said.read_text() == f"{before}True\n", "the other one served", 30)

    with vsockets.create_server((2, 7503), context=fabric.host) as server:
        monkeypatch.setattr("cli.vsock.PROGRAM", (sys.executable, "-c", DROPPING))
        running = vsock.start("run", "sh", "-c", script)
        pid = int(running.read_line())
        wait_until(lambda: said.read_text() == "ready\n", "the other program")
        os.kill(fabric.pid, signal.SIGSTOP)
        try:
            running.write(b"\n")
            wait_until(lambda: is_waiting_in_connect(f"{tmp_path}/connect"), "connect() to wait")
            let_the_supervisor_catch_up()
            # The thread is woken, and has not handled the other signal yet.
            os.kill(pid, signal.SIGSTOP)
            wait_until(lambda: status_of(pid, "State").startswith("T"), "it to stop")
            os.kill(pid, signal.SIGUSR1)
        finally:
            os.kill(fabric.pid, signal.SIGCONT)
        server.settimeout(20)
        accepted, _ = server.accept()
        with accepted:
            let_the_supervisor_catch_up()
            os.kill(pid, signal.SIGCONT)
            assert running.read_line() == "0 0"
        running.finish()


def status_of(pid: int, field: str) -> str:
    """Return a field of a process's status in /proc."""
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(row.partition(":")[2].strip() for row in rows if row.startswith(f"{field}:"))


GIVES_UP = """
import ctypes, errno, os, signal, socket, struct, sys, threading
type_, call = sys.argv[1:]
sock, other = socket.socket(40, int(type_)), socket.socket(40, 1)
def look():
    # A stopped thread takes no signal of the process: this one must not take it either.
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
    while open(f"/proc/self/task/{os.getpid()}/syscall").read().split()[0] != call:
        pass
    other.getsockname()  # the supervisor serves bind() by then
    print("waits", flush=True)
libc = ctypes.CDLL(None, use_errno=True)
signal.signal(signal.SIGUSR1, lambda number, frame: None)
address = struct.pack("=HHIIB3s", 40, 0, 7504, 0xFFFFFFFF, 0, bytes(3))
print(os.getpid(), flush=True)
sys.stdin.readline()
threading.Thread(target=look).start()
result = libc.bind(sock.fileno(), address, len(address))
print(result, errno.errorcode[ctypes.get_errno()], sock.getsockname(), flush=True)
for line in sys.stdin:
    print(sock.getsockname(), flush=True)
"""


@pytest.mark.parametrize("type_", [socket.SOCK_STREAM, socket.SOCK_DGRAM])
def test_a_bind_interrupted_by_a_signal_takes_effect(
    vsock: Vsock, fabric: PrivateFabric, type_: int
) -> None:
    """bind() fails with EINTR, and the program goes on."""
    command = sys.executable, "-c", GIVES_UP, int(type_), this_architecture().bind
    running = vsock.start("run", "--cid", "host", *command)
    pid = int(running.read_line())
    os.kill(fabric.pid, signal.SIGSTOP)
    try:
        running.write(b"\n")
        assert running.read_line() == "waits"
        os.kill(pid, signal.SIGUSR1)
        assert running.read_line() == "-1 EINTR (4294967295, 4294967295)"
    finally:
        os.kill(fabric.pid, signal.SIGCONT)

    def is_bound() -> bool:
        running.write(b"\n")
        return running.read_line() == "(2, 7504)"

    wait_until(is_bound, "the socket to be bound")
    running.finish()
