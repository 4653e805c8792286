"""The ptrace interceptor with real processes: calls answered, injected and made to wait."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import NoReturn

import pytest

from vsockets._linux.bpf import NOTIFY, refuse
from vsockets._linux.inspection import SYS_PIDFD_GETFD
from vsockets.supervisor.arch import ARCHITECTURES, this_architecture
from vsockets.supervisor.filter import ArgumentCondition, Rule, When, assemble
from vsockets.supervisor.interception import (
    CallInterrupted,
    InterceptedCall,
    Interruption,
    Surroundings,
)
from vsockets.supervisor.launch import _block_as_descriptor as blocked_as_descriptor
from vsockets.supervisor.notification import install
from vsockets.supervisor.process import Processes
from vsockets.supervisor.ptrace import LAYOUTS, WAIT_FOR_ALL, Registers
from vsockets.supervisor.scheduler import CoroutineScheduler
from vsockets.supervisor.trace_interceptor import TraceInterceptor, TraceMechanism
from vsockets.testing import wait_until

MACHINE = this_architecture()
WAIT = os.WNOHANG | WAIT_FOR_ALL
#: A family of sockets that no kernel has, in the place of AF_VSOCK.
FAMILY = 45
RULES = [
    Rule(MACHINE.socket, NOTIFY, (When(0, ArgumentCondition.EQUAL, FAMILY),)),
    Rule(MACHINE.listen, NOTIFY),
]
#: What the containers' profiles do.
FORBIDDING = [
    Rule(MACHINE.socket, refuse(1), (When(0, ArgumentCondition.EQUAL, FAMILY),)),
    Rule(SYS_PIDFD_GETFD, refuse(1)),
]

Serve = Callable[[TraceInterceptor, InterceptedCall], None]


def serves_no_data(pid: int, fd: int) -> bool:
    return False


def ignore_stop(pid: int) -> None:
    pass


def tick(sock: socket.socket) -> None:
    """Send a byte every 5 ms until the peer is closed."""
    with sock, contextlib.suppress(OSError):
        while True:
            sock.send(b"t")
            time.sleep(0.005)


class Traced:
    """A program that is traced, and served by ``serve`` until it has ended."""

    def __init__(self, program: str, serve: Serve, forbidden: bool) -> None:
        ours, theirs = socket.socketpair()
        self.output, output = os.pipe()
        self.serve = serve
        self.status: int | None = None  #: the exit status, negative for a signal
        #: Only a thread that has made no child of its own may be the tracer.
        self.pid = os.fork()
        if self.pid == 0:
            with contextlib.suppress(BaseException):
                os.dup2(output, 1)
                self._become(program, theirs, forbidden)
            os._exit(99)
        os.close(output)
        theirs.close()
        processes = Processes(MACHINE)
        self.scheduler = CoroutineScheduler()
        self._children = blocked_as_descriptor(signal.SIGCHLD)
        self.scheduler.watch(self._children, self._on_child)
        # Another thread of this process, which pytest-xdist has, may take the signal.
        self._ticks, ticks = socket.socketpair()
        self.scheduler.watch(self._ticks.fileno(), self._on_tick)
        threading.Thread(target=tick, args=(ticks,), daemon=True).start()
        surroundings = Surroundings(
            MACHINE,
            processes,
            self.scheduler,
            {},
            self._deliver,
            lambda pid, fd: False,
            lambda pid: None,
        )
        self.interceptor = TraceInterceptor(surroundings)
        if forbidden:
            self.interceptor._descriptors._may_get = False
        assert ours.recv(1) == b"i"
        self.interceptor.begin(self.pid)
        ours.send(b"g")
        ours.close()

    def _become(self, program: str, starting: socket.socket, forbidden: bool) -> NoReturn:
        if forbidden:
            install(MACHINE, assemble(MACHINE, FORBIDDING, is_first=False), 0)
        TraceMechanism().install(MACHINE, RULES)
        starting.send(b"i")
        starting.recv(1)
        os.execv(sys.executable, [sys.executable, "-c", program])

    def _deliver(self, call: InterceptedCall) -> None:
        with contextlib.suppress(CallInterrupted):
            try:
                self.serve(self.interceptor, call)
            except OSError as error:
                self.interceptor.conclude(call, -(error.errno or errno.EIO))

    def run(self) -> list[str]:
        """Serve it until it has ended; returns the lines that it has printed."""
        self._reap()
        # Not the interceptor's is_running: this process has children of other tests.
        while self.status is None:
            self.scheduler.poll()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGCHLD])
        os.close(self._children)
        self._ticks.close()
        self.interceptor.close()
        with open(self.output) as output:
            return output.read().splitlines()

    def _on_child(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._children, 128)
        self._reap()

    def _on_tick(self, events: int) -> None:
        self._ticks.recv(4096)
        self._reap()

    def _reap(self) -> None:
        unread = self.interceptor.unread
        while self.status is None:
            number, status = unread.popleft() if unread else os.waitpid(-1, WAIT)
            if number == 0:
                return
            handled = self.interceptor.on_wait_status(number, status)
            if not handled and number == self.pid and not os.WIFSTOPPED(status):
                self.status = os.waitstatus_to_exitcode(status)


def traced(program: str, serve: Serve, forbidden: bool) -> list[str]:
    running = Traced(program, serve, forbidden)
    lines = running.run()
    assert running.status == 0, (running.status, lines)
    return lines


COMMON = f"""
import ctypes, os, signal, socket, sys, threading, errno
libc = ctypes.CDLL(None, use_errno=True)
def make(type=1):
    fd = libc.socket({FAMILY}, type, 0)
    if fd < 0: raise OSError(ctypes.get_errno(), "socket")
    return fd
def listen(fd, n=0):
    result = libc.listen(fd, n)
    if result < 0: raise OSError(ctypes.get_errno(), "listen")
    return result
"""


@pytest.fixture(params=[False, True], ids=["free", "forbidden"])
def forbidden(request: pytest.FixtureRequest) -> bool:
    """True if another filter refuses the family and pidfd_getfd."""
    return bool(request.param)


def creating(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
    if call.number == MACHINE.socket:
        interceptor.create_socket(call, call.arguments[1], None, lambda inode, cookie: None)
    else:
        interceptor.answer(call, 42)


def test_a_call_is_answered(forbidden: bool) -> None:
    program = COMMON + "print(make(), listen(0))"

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        interceptor.answer(call, 1000 if call.number == MACHINE.socket else -9)

    program = (
        COMMON
        + """
print(make())
try: listen(0)
except OSError as error: print(errno.errorcode[error.errno])
"""
    )
    assert traced(program, serve, forbidden) == ["1000", "EBADF"]


def test_the_program_makes_the_socket_itself(forbidden: bool) -> None:
    made: list[int] = []

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        interceptor.create_socket(
            call, call.arguments[1], None, lambda inode, cookie: made.append(inode)
        )

    program = (
        COMMON
        + """
for _ in range(3):
    sock = socket.socket(fileno=make(2 | socket.SOCK_NONBLOCK))
    print(sock.fileno(), sock.family == socket.AF_UNIX, sock.type == socket.SOCK_DGRAM,
        os.get_blocking(sock.fileno()), os.fstat(sock.fileno()).st_ino)
    keep = sock.detach()
"""
    )
    lines = traced(program, serve, forbidden)
    assert lines == [f"{3 + n} True True False {made[n]}" for n in range(3)]


@pytest.mark.parametrize("begin", ["", "signal.signal(signal.SIGTRAP, signal.SIG_IGN)"])
def test_an_ignored_trap_signal_stays_ignored(forbidden: bool, begin: str) -> None:
    """A SIGTRAP ends injected calls, but not where the kernel would take SIG_IGN away for it."""
    ignored = """
def ignored():
    with open("/proc/self/status") as status:
        mask = int(next(line for line in status if line.startswith("SigIgn")).split()[1], 16)
    return bool(mask >> signal.SIGTRAP - 1 & 1)
"""
    last = COMMON + ignored + "make(2); print(ignored())"
    program = (
        COMMON
        + ignored
        + begin
        + f"""
make(2), make(2)
if os.fork() == 0:
    make(2)
    print(ignored(), flush=True)
    os._exit(0)
os.wait()
print(ignored(), flush=True)
signal.signal(signal.SIGTRAP, signal.SIG_IGN)
make(2)
print(ignored(), flush=True)
os.execv({sys.executable!r}, [{sys.executable!r}, "-c", {last!r}])
"""
    )
    before = str(bool(begin))
    assert traced(program, creating, forbidden) == [before, before, "True", "True"]


def test_a_trap_signal_from_a_process_is_delivered(forbidden: bool) -> None:
    program = (
        COMMON
        + """
came = 0
def handle(number, frame):
    global came
    came += 1
signal.signal(signal.SIGTRAP, handle)
confirmed, confirm = os.pipe()
rounds = 300
if os.fork() == 0:
    for _ in range(rounds):
        os.kill(os.getppid(), signal.SIGTRAP)
        os.read(confirmed, 1)
    os._exit(0)
done = 0
while done < rounds:
    os.close(make(2))
    if came > done:
        done += 1
        os.write(confirm, b"c")
print(came, os.wait()[1])
"""
    )
    assert traced(program, creating, forbidden) == ["300 0"]


def test_descriptors_pass_both_ways(forbidden: bool) -> None:
    ours, theirs = socket.socketpair()

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        if call.number == MACHINE.socket:
            interceptor.answer_with_descriptor(call, theirs.fileno(), bool(call.arguments[1]), None)
            return
        fd = interceptor.duplicate(call.pid, call.arguments[0])
        with socket.socket(fileno=fd) as copy:
            ours.send(copy.getsockopt(socket.SOL_SOCKET, socket.SO_TYPE).to_bytes(1, "little"))
        interceptor.answer(call, fd >= 0)

    program = (
        COMMON
        + """
def opened(): return {int(name) for name in os.listdir("/proc/self/fd")}
before = opened()
fd = make(1)
print(fd, os.get_inheritable(fd), listen(fd), os.read(fd, 9))
os.close(fd)
fd = make(0)
print(fd, os.get_inheritable(fd), opened() - before)
"""
    )
    with ours, theirs:
        lines = traced(program, serve, forbidden)
    assert lines == ["3 False 1 b'\\x01'", "3 True {4}"]  # the listing itself had 3 before


@pytest.mark.parametrize(
    ("number", "result"), [(0, "4"), (1, "EINTR")], ids=["with SA_RESTART", "without"]
)
def test_a_waiting_call_is_interrupted_as_by_the_kernel(
    forbidden: bool, number: int, result: str
) -> None:
    """Three signals interrupt it, and then it is answered."""
    served = 0

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        nonlocal served
        served += 1
        if served == 4:
            interceptor.answer(call, 4)
        else:
            # That its thread was stopped and made calls changes nothing.
            os.close(interceptor.duplicate(call.pid, 1))
            interceptor.suspend(call, Interruption.RESTART, lambda: None)

    program = (
        COMMON
        + f"""
came = []
signal.signal(signal.SIGALRM, lambda *_: came.append(1))
libc.siginterrupt(signal.SIGALRM, {number})
main = threading.get_native_id()
def is_asleep():
    return open(f"/proc/self/task/{{main}}/syscall").read().startswith("{MACHINE.ppoll} ")
def is_pending():
    status = open(f"/proc/self/task/{{main}}/status").read()
    return int(status.partition("SigPnd:")[2].split()[0], 16)
def interrupt():
    for _ in range({1 if number else 3}):
        while not is_asleep(): os.sched_yield()
        libc.tgkill(os.getpid(), main, signal.SIGALRM)
        while is_pending(): os.sched_yield()
thread = threading.Thread(target=interrupt)
thread.start()
try: print(listen(0))
except OSError as error: print(errno.errorcode[error.errno])
thread.join()
"""
    )
    assert traced(program, serve, forbidden) == [result]


def test_a_thread_is_roused_and_answered(forbidden: bool) -> None:
    """Signals that it blocks stay blocked, and those that came meanwhile are delivered."""
    waits: list[int] = []

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        if call.arguments[1]:
            answer(interceptor, first[0])
            interceptor.answer(call, 0)
        else:
            first.append(call)
            interceptor.suspend(call, Interruption.RESTART, lambda: waits.append(1))

    first: list[InterceptedCall] = []

    def answer(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        assert interceptor.resume(call, lambda: None)
        os.close(interceptor.duplicate(call.pid, 1))
        interceptor.answer(call, 17)

    program = (
        COMMON
        + f"""
main = threading.get_native_id()
def is_asleep():
    return open(f"/proc/self/task/{{main}}/syscall").read().startswith("{MACHINE.ppoll} ")
def answer():
    while not is_asleep(): os.sched_yield()
    libc.tgkill(os.getpid(), main, signal.SIGUSR1)
    listen(0, 1)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
thread = threading.Thread(target=answer)
thread.start()
print(listen(0), signal.pthread_sigmask(signal.SIG_BLOCK, []), signal.sigpending())
thread.join()
"""
    )
    blocked = f"{{<Signals.SIGUSR1: {int(signal.SIGUSR1)}>}}"
    assert traced(program, serve, forbidden) == [f"17 {blocked} {blocked}"]
    assert not waits


def test_a_program_with_a_handler_of_sigsys(forbidden: bool) -> None:
    program = (
        COMMON
        + """
came = []
signal.signal(signal.SIGSYS, lambda *_: came.append(1))
print(make())
os.kill(os.getpid(), signal.SIGSYS)
print(len(came))
signal.signal(signal.SIGSYS, signal.SIG_IGN)
print(make())
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
print(make())
"""
    )
    assert traced(program, creating, forbidden) == ["3", "1", "4", "5"]


def test_threads_children_and_programs(forbidden: bool) -> None:
    program = (
        COMMON
        + """
import subprocess
def many():
    for _ in range(50): os.close(make())
threads = [threading.Thread(target=many) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
for _ in range(10):
    if os.fork() == 0:
        os._exit(make() != 3)
    assert os.wait()[1] == 0
if len(sys.argv) == 1:
    script = open(f"/proc/self/cmdline").read().split(chr(0))[2]
    print(subprocess.run([sys.executable, "-c", script, "x"]).returncode, flush=True)
    os.execv(sys.executable, [sys.executable, "-c", script, "x"])
print("done", flush=True)
"""
    )
    assert traced(program, creating, forbidden) == ["done", "0", "done"]


def test_a_stopped_program_goes_on(forbidden: bool) -> None:
    program = (
        COMMON
        + """
pid = os.fork()
if pid == 0:
    while True: os.close(make())
for _ in range(20):
    os.kill(pid, signal.SIGSTOP)
    assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
    assert open(f"/proc/{pid}/stat").read().rpartition(")")[2].split()[0] in "tT"
    os.kill(pid, signal.SIGCONT)
    assert os.WIFCONTINUED(os.waitpid(pid, os.WCONTINUED)[1])
os.kill(pid, signal.SIGTERM)
print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    )
    assert traced(program, creating, forbidden) == ["-15"]


def test_processes_that_are_killed(forbidden: bool) -> None:
    """At whatever stop, and in the middle of injected calls."""
    program = (
        COMMON
        + """
def work():
    while True: os.close(make())
def begin():
    pid = os.fork()
    if pid: return pid
    for _ in range(3): threading.Thread(target=work).start()
    work()
for _ in range(50):
    pid = begin()
    os.sched_yield()
    os.kill(pid, signal.SIGKILL)
    assert os.waitpid(pid, 0)[1] == signal.SIGKILL
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        for _ in range(3): threading.Thread(target=work).start()
        os.execv("/bin/true", ["true"])
    assert os.waitpid(pid, 0)[1] == 0
print(make())
"""
    )
    assert traced(program, creating, forbidden) == ["3"]


def test_a_filter_of_the_programs_own(forbidden: bool) -> None:
    """A filter of the program that traps or traces works as without a tracer."""
    program = (
        COMMON
        + """
from vsockets.supervisor.filter import Rule, assemble
from vsockets.supervisor.arch import ARCHITECTURES, this_architecture
machine = this_architecture()
rules = [Rule(machine.getpeername, 0x7FF0_0000), Rule(machine.getsockname, 0x0003_0007)]
program = assemble(machine, rules, is_first=False)
class P(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(len(program) // 8, program)), 0, 0) == 0
came = []
signal.signal(signal.SIGSYS, lambda *_: came.append(1))
libc.getsockname(0, 0, 0)
print(libc.getpeername(0, 0, 0), errno.errorcode[ctypes.get_errno()], len(came), make())
"""
    )
    assert traced(program, creating, forbidden) == ["-1 ENOSYS 1 3"]


@pytest.mark.parametrize(
    ("machine", "result_register", "program_counter", "trap"),
    [("x86_64", 10, 16, 2), ("aarch64", 0, 32, 4)],
)
def test_registers_are_changed_as_the_architecture_has_them(
    machine: str, result_register: int, program_counter: int, trap: int
) -> None:
    """Of both architectures; the numbers are those of struct user_regs_struct and user_pt_regs."""
    layout = LAYOUTS[ARCHITECTURES[machine].architecture]
    registers = Registers(layout, list(range(1000, 1000 + layout.size)), 7)
    before = registers.copy()
    registers.prepare(41, (1, 2, 3, 4, 5, (1 << 64) - 1))
    assert registers.arguments == (1, 2, 3, 4, 5, (1 << 64) - 1)
    registers.result = -4
    assert registers.result == -4
    assert registers.values[result_register] == (1 << 64) - 4
    registers.rewind()
    assert registers.values[program_counter] == 1000 + program_counter - trap
    assert registers.entered == -1
    assert before.values == list(range(1000, 1000 + layout.size)) and before.entered == 7


def test_the_interrupted_call_as_the_architecture_shows_it() -> None:
    """arch/arm64/kernel/signal.c moves back to the call before a tracer sees the stop."""
    arguments = (1000, 1001, 1002, 1003, 1004, 1005)
    layout = LAYOUTS[ARCHITECTURES["aarch64"].architecture]
    registers = Registers(layout, list(range(1000, 1000 + layout.size)), -1)
    assert registers.rewind_interrupted(arguments) == 1008
    assert registers.instruction == 1032
    assert registers.rewind_interrupted((*arguments[:5], 7)) is None
    layout = LAYOUTS[ARCHITECTURES["x86_64"].architecture]
    registers = Registers(layout, list(range(1000, 1000 + layout.size)), 7)
    assert registers.rewind_interrupted(arguments) is None
    registers.result = -512  # ERESTARTSYS
    assert registers.rewind_interrupted(arguments) == 7
    assert registers.instruction == 1016 - 2
    assert registers.rewind_interrupted(arguments) is None


def test_a_socket_of_a_stopped_process_is_shut_down(forbidden: bool) -> None:
    """The process remains stopped."""
    inodes: list[int] = []

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        if call.number == MACHINE.socket:
            interceptor.create_socket(
                call, call.arguments[1], None, lambda inode, cookie: inodes.append(inode)
            )
        else:
            interceptor.answer(call, int(interceptor.shut_down(inodes[0], insists=False)))

    program = (
        COMMON
        + """
pid = os.fork()
if pid == 0:
    sock = socket.socket(fileno=make(socket.SOCK_DGRAM))
    os.kill(os.getpid(), signal.SIGSTOP)
    os._exit(len(sock.recv(1)))
assert os.WIFSTOPPED(os.waitpid(pid, os.WUNTRACED)[1])
print(listen(0))
print(os.waitpid(pid, os.WNOHANG))
os.kill(pid, signal.SIGCONT)
print(os.waitpid(pid, 0)[1])
"""
    )
    assert traced(program, serve, forbidden) == ["1", "(0, 0)", "0"]


@pytest.mark.parametrize(
    "does", ["os.read(0, 1)", "[0 for _ in iter(int, 1)]"], ids=["waits", "computes"]
)
@pytest.mark.parametrize("forbidden", [False, True], ids=["free", "forbidden"])
def test_a_thread_without_an_intercepted_call_is_stopped(forbidden: bool, does: str) -> None:
    """No system call instruction of the program is known then.

    On arm64 a thread that waits in a call stops at the call's instruction, and not behind it.
    """

    def serve(interceptor: TraceInterceptor, call: InterceptedCall) -> None:
        child = call.arguments[0]
        wait_until(lambda: runs(child) == ("iter" in does), "the child to begin")
        for _ in range(3):
            fd = interceptor.duplicate(child, 1)
            os.write(fd, b"!")
            os.close(fd)
        interceptor.answer(call, 0)

    program = (
        COMMON
        + f"""
stays_open = os.pipe()
output, its_output = os.pipe()
pid = os.fork()
if pid == 0:
    os.dup2(stays_open[0], 0)
    os.dup2(its_output, 1)
    os.execv(sys.executable, [sys.executable, "-c", "import os; os.write(1, b'r'); {does}"])
assert os.read(output, 1) == b"r"
listen(pid)
print(os.read(output, 10).decode())
os.kill(pid, signal.SIGKILL)
print(os.waitpid(pid, 0)[1])
"""
    )
    assert traced(program, serve, forbidden) == ["!!!", "9"]


def runs(pid: int) -> bool:
    """Return whether a process is in no system call."""
    with open(f"/proc/{pid}/syscall") as state:
        return state.read() == "running\n"
