"""Sockets of other processes are shut down without pidfd_getfd, by ptrace or their supervisor."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from vsockets._linux.sockets import cookie_of
from vsockets.supervisor.remote_shutdown import Attempt, Requests, RequestServer, Target
from vsockets.supervisor.scheduler import CoroutineScheduler
from vsockets.testing.waiting import wait_until


def may_trace_any() -> bool:
    """Return whether Yama lets this process trace one that is not its descendant."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return os.geteuid() == 0 or not scope.exists() or scope.read_text().strip() == "0"


pytestmark = pytest.mark.skipif(not may_trace_any(), reason="Yama restricts ptrace")

HOLDER = """
import socket, sys, threading
def run():
    sock = socket.socket(fileno=int(sys.argv[1]))
    print(sock.recv(1), flush=True)
if sys.argv[2] == "thread":
    threading.Thread(target=run, daemon=True).start()
    print("ready", flush=True)
    while True: pass
print("ready", flush=True)
run()
"""


@contextmanager
def holder(how: str = "main") -> Iterator[tuple[subprocess.Popen[str], socket.socket, Target]]:
    """A process that reads from one end of a pair; the other end; and the former's identity."""
    ours, theirs = socket.socketpair()
    with ours:
        with theirs:
            target = Target(os.fstat(theirs.fileno()).st_ino, cookie_of(theirs))
            process = subprocess.Popen(
                [sys.executable, "-c", HOLDER, str(theirs.fileno()), how],
                pass_fds=[theirs.fileno()],
                stdout=subprocess.PIPE,
                text=True,
            )
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process, ours, target
        finally:
            process.kill()
            process.communicate()


def attempt(pid: int, *targets: Target) -> tuple[list[Target], str]:
    one = Attempt(pid, targets)
    assert one.is_over(20)
    return one.result()


def state(process: subprocess.Popen[str]) -> str:
    with open(f"/proc/{process.pid}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("known_by", ["inode", "cookie"])
@pytest.mark.parametrize("how", ["main", "thread"])
def test_a_socket_is_shut_down_and_the_program_goes_on(known_by: str, how: str) -> None:
    """The first thread waits in the kernel, or runs and makes no system call at all."""
    with holder(how) as (process, ours, target):
        wanted = Target(target.inode) if known_by == "inode" else Target(0, target.cookie)
        assert attempt(process.pid, Target(1, 1), wanted) == ([wanted], "")
        assert ours.recv(1) == b""
        assert process.stdout is not None
        assert process.stdout.readline() == "b''\n"
        assert how == "thread" or process.wait() == 0


def test_other_attempts_do_not_disturb_a_program() -> None:
    with holder() as (process, ours, _):
        for _ in range(20):
            assert attempt(process.pid, Target(1), Target(0, 1)) == ([], "")
        ours.send(b"x")
        assert process.stdout is not None
        assert process.stdout.readline() == "b'x'\n"
        assert process.wait() == 0


def test_a_stopped_process_remains_stopped() -> None:
    with holder() as (process, ours, target):
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: state(process) == "T", "the process to stop")
        assert attempt(process.pid, target) == ([target], "")
        assert ours.recv(1) == b""
        wait_until(lambda: state(process) == "T", "the process to stop again")
        process.send_signal(signal.SIGCONT)
        assert process.wait() == 0


def test_a_traced_process_cannot_be_made_to() -> None:
    traced = subprocess.Popen(
        [sys.executable, "-c", "import ctypes; ctypes.CDLL(None).ptrace(0, 0, 0, 0); input()"],
        stdin=subprocess.PIPE,
    )
    try:
        with open(f"/proc/{traced.pid}/status") as status:
            wait_until(
                lambda: (status.seek(0), f"TracerPid:\t{os.getpid()}" in status.read())[1],
                "the process to be traced",
            )
        assert attempt(traced.pid, Target(1)) == ([], "Operation not permitted")
    finally:
        traced.kill()
        traced.communicate()


def test_a_supervisor_serves_its_user_and_root_alone() -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root, to be another user")
    scheduler = CoroutineScheduler()
    served: list[Target] = []

    def serve(target: Target) -> bool:
        served.append(target)
        return True

    with closing(RequestServer(scheduler, serve)):
        child = os.fork()
        if child == 0:
            os.setresuid(65534, 65534, 65534)
            stranger = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            stranger.bind("")
            stranger.sendto(bytes(16), b"\0vsockets-supervisor-%d" % os.getppid())
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        with closing(Requests()) as requests:
            assert requests.send(os.getpid(), Target(7, 8))
            assert not requests.send(1 << 22, Target(7, 8))  # no such process
            while not served:
                scheduler.poll()
            assert served == requests.confirmed() == [Target(7, 8)]
