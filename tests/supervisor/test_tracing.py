"""Traced processes behave as untraced ones."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from cli.vsock import Vsock
from vsockets.testing import wait_until

from .conftest import Compile
from .test_descriptors import COMMON, run

MORE = (
    COMMON
    + """
import ctypes, signal, time
server = datagram()
def waits(pid):
    # In ppoll, in which a thread waits for its answer.
    return open(f"/proc/{pid}/syscall").read().split()[0] in ("271", "73")
def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)
def receiver():
    if (pid := os.fork()) == 0:
        data = server.recvfrom(10)[0]
        os._exit(data[0])
    wait_for(lambda: waits(pid))
    return pid
"""
)


def test_signals_interrupt_and_restart_waiting_calls(vsock: Vsock, compile_c: Compile) -> None:
    program = compile_c("datagrams.c", "-static", "-pthread")
    assert vsock("run", program).stdout.splitlines() == [
        "without SA_RESTART: -1 Interrupted system call",
        "with SA_RESTART: 4 after three signals",
        "with SO_RCVTIMEO: -1 Resource temporarily unavailable",
        "stormy",
        "copied",
    ]


def test_a_waiting_process_can_be_stopped_and_continued(vsock: Vsock) -> None:
    program = (
        MORE[len(COMMON) :]
        + """
pid = receiver()
os.kill(pid, signal.SIGSTOP)
assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
datagram().sendto(bytes([42]), address(server))
assert os.waitpid(pid, os.WNOHANG) == (0, 0)
os.kill(pid, signal.SIGCONT)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert run(vsock, program) == ["42"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGSEGV])
def test_a_waiting_process_can_be_killed(vsock: Vsock, number: signal.Signals) -> None:
    program = (
        MORE[len(COMMON) :]
        + f"""
pid = receiver()
os.kill(pid, {int(number)})
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
assert works(datagram(), server)
"""
    )
    assert run(vsock, program) == [str(-number)]


def test_stopping_the_program_stops_the_front(vsock: Vsock) -> None:
    program = (
        MORE
        + """
print(os.getpid(), flush=True)
os.kill(os.getpid(), signal.SIGSTOP)
print("on again", works(datagram(), server), flush=True)
"""
    )
    running = vsock.start("run", sys.executable, "-c", program)
    running.read_line()
    front = running.process.pid

    def state() -> str:
        return Path(f"/proc/{front}/stat").read_text().rpartition(")")[2].split()[0]

    wait_until(lambda: state() == "T", "the front to stop")
    os.kill(front, signal.SIGCONT)
    assert running.read_line() == "on again True"
    running.finish()


def test_exit_status_and_signals_are_kept(vsock: Vsock) -> None:
    program = (
        MORE
        + """
os.kill(os.getpid(), signal.SIGUSR1)
"""
    )
    done = vsock("run", sys.executable, "-c", program, expect=None)
    assert done.returncode == -signal.SIGUSR1
    done = vsock("run", sys.executable, "-c", MORE + "sys.exit(37)", expect=None)
    assert done.returncode == 37


def test_tracees_end_with_the_supervisor(vsock: Vsock) -> None:
    program = (
        MORE
        + """
print(os.getpid(), os.getppid(), flush=True)
server.recvfrom(10)
"""
    )
    running = vsock.start("run", sys.executable, "-c", program)
    pid, supervisor = map(int, running.read_line().split())
    os.kill(supervisor, signal.SIGKILL)
    assert running.process.wait(20) == -signal.SIGKILL
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the program to end")


def test_a_thread_can_execute_a_program(vsock: Vsock) -> None:
    program = (
        MORE[len(COMMON) :]
        + """
def execute():
    os.execv(sys.executable, [sys.executable, "-c", "print('executed')"])
readers = [threading.Thread(target=server.recvfrom, args=(10,)) for _ in range(5)]
for thread in readers: thread.start()
threading.Thread(target=execute).start()
for thread in readers: thread.join()
"""
    )
    assert run(vsock, program) == ["executed"]


def test_many_threads_and_processes_are_traced(vsock: Vsock) -> None:
    program = (
        MORE[len(COMMON) :]
        + """
for _ in range(300):
    thread = threading.Thread(target=int)
    thread.start()
    thread.join()
for _ in range(100):
    if os.fork() == 0: os._exit(0)
while True:
    try: assert os.wait()[1] == 0
    except ChildProcessError: break
print(works(datagram(), server))
"""
    )
    assert run(vsock, program) == ["True"]


@pytest.mark.notify_only("all processes are traced: they can have no other tracer")
def test_a_process_with_a_tracer_is_reported(vsock: Vsock) -> None:
    program = """
import ctypes, signal
libc = ctypes.CDLL(None, use_errno=True)
if (pid := os.fork()) == 0:
    libc.ptrace(0, 0, 0, 0)  # PTRACE_TRACEME
    for kind in (DATAGRAM, DATAGRAM, PACKET):
        try: socket.socket(40, kind); print("made", flush=True)
        except OSError as error: print(errno.errorcode[error.errno], flush=True)
    os._exit(0)
while True:
    _, status = os.waitpid(pid, 0)
    if not os.WIFSTOPPED(status): break
    libc.ptrace(7, pid, 0, os.WSTOPSIG(status))
"""
    done = vsock("run", sys.executable, "-c", COMMON + program)
    assert done.stdout.splitlines() == ["EPERM", "EPERM", "made"]
    what = f"vsock run: {os.path.realpath(sys.executable)!r} may not be traced"
    why = "(Yama's ptrace_scope, or it has a tracer)"
    assert sorted(done.stderr.splitlines()) == [
        f"{what} {why}: datagram sockets do not work",
        f"{what} {why}: packet sockets lose MSG_EOR",
    ]


def test_a_programs_own_tracing_filter_fails_calls_with_enosys(vsock: Vsock) -> None:
    """Calls that it traces fail as without supervision, although the process has a tracer."""
    program = (
        MORE[len(COMMON) :]
        + """
from vsockets.supervisor.filter import Rule, ArgumentCondition as Test, When, assemble
from vsockets.supervisor.arch import this_architecture as this_machine
machine = this_machine()
rules = [Rule(machine.writev, 0x7FF0_0000), Rule(machine.recvmsg, 0x7FF0_0007)]
program = assemble(machine, rules, is_first=False)
class P(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(len(program) // 8, program)), 0, 0) == 0
for call in (lambda: os.writev(1, [b"x"]), lambda: socket.socketpair()[0].recvmsg(1)):
    try: call()
    except OSError as error: print(errno.errorcode[error.errno])
print(works(datagram(), server))
"""
    )
    assert run(vsock, program) == ["ENOSYS", "ENOSYS", "True"]


def test_a_program_that_forbids_further_filters_gets_eperm(vsock: Vsock) -> None:
    program = (
        MORE[len(COMMON) :]
        + """
from vsockets._linux.bpf import refuse
from vsockets.supervisor.filter import Rule, assemble
from vsockets.supervisor.arch import this_architecture as this_machine
machine = this_machine()
program = assemble(machine, [Rule(machine.seccomp, refuse(1))], is_first=False)
class P(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(len(program) // 8, program)), 0, 0) == 0
made = []
try:
    while True: made.append(datagram())
except OSError as error: print(errno.errorcode[error.errno])
print(all(works(sock, server) for sock in made))
"""
    )
    assert run(vsock, program) == ["EPERM", "True"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can change its user")
def test_a_process_that_has_changed_its_user_is_traced(vsock: Vsock) -> None:
    """Afterwards the process has no privileges, and has not set no_new_privs."""
    program = (
        MORE[len(COMMON) :]
        + """
os.setgid(65534)
os.setuid(65534)
socks = [datagram() for _ in range(40)]
print(all(works(sock, server) for sock in socks))
"""
    )
    assert run(vsock, program) == ["True"]
