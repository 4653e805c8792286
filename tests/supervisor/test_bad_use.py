"""Programs that cannot be supervised are reported, and none reaches the kernel's AF_VSOCK."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from cli.vsock import PROGRAM, Vsock
from vsockets.testing import PrivateFabric

from .conftest import Compile


def test_a_missing_program_is_reported(vsock: Vsock) -> None:
    line = vsock.fails("run", "no-such-program", status=127)
    assert line == "no-such-program: program not found (expected a path, or a name on PATH)"


def test_a_missing_context_is_reported(vsock: Vsock) -> None:
    vsock.fail(("run --cid 1 true", 2, "3 to 4294967294"))


def test_vsock_run_within_vsock_run_is_refused(vsock: Vsock) -> None:
    done = vsock("run", "sh", "-c", f"{' '.join(PROGRAM)} run echo inner", expect=1)
    assert done.stdout == ""
    assert done.stderr.startswith("vsock: cannot supervise echo: it has a supervisor already")


def test_a_kernel_without_notification_is_reported(vsock: Vsock) -> None:
    # As in containers: a filter that fails the call with ENOSYS.
    script = f"""
import ctypes, os, struct, sys
from vsockets._linux.bpf import refuse
from vsockets.supervisor.filter import Rule, assemble
from vsockets.supervisor.arch import this_architecture as this_machine
m = this_machine()
program = assemble(m, [Rule(m.seccomp, refuse(38))])
class P(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(len(program) // 8, program)), 0, 0) == 0
os.execv({sys.executable!r}, [{sys.executable!r}, *{list(PROGRAM[1:])!r}, "run", "true"])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=vsock.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vsock: cannot supervise true: this kernel has no seccomp")


def test_a_container_that_forbids_ptrace_is_reported(fabric: PrivateFabric) -> None:
    script = f"""
import ctypes, os, platform, sys
from vsockets._linux.bpf import refuse
from vsockets.supervisor.filter import Rule, assemble
from vsockets.supervisor.arch import this_architecture
ptrace = {{"x86_64": 101, "aarch64": 117}}[platform.machine()]
program = assemble(this_architecture(), [Rule(ptrace, refuse(1))], is_first=False)
class P(ctypes.Structure): _fields_ = [("n", ctypes.c_ushort), ("p", ctypes.c_char_p)]
libc = ctypes.CDLL(None)
libc.prctl(38, 1, 0, 0, 0)
assert libc.prctl(22, 2, ctypes.byref(P(len(program) // 8, program)), 0, 0) == 0
run = [*{list(PROGRAM[1:])!r}, "run", "--interceptor", "trace", "true"]
os.execv({sys.executable!r}, [{sys.executable!r}, *run])
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "VSOCKETS_DIR": str(fabric.folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("vsock: cannot supervise true: ptrace or process_vm_readv is")


def traced(vsock: Vsock, interceptor: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run ``vsock run`` below a tracer of all processes; its own messages are in a file."""
    if shutil.which("strace") is None:
        pytest.skip("no strace: apt install what .ci/run does")
    return subprocess.run(
        ["strace", "-f", "-o", "/dev/null", "-e", "trace=none", *PROGRAM, "run", *words],
        env={**vsock.environment, "VSOCKETS_INTERCEPTOR": interceptor},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_a_program_that_is_traced_already_is_refused(vsock: Vsock, interceptor: str) -> None:
    """Under seccomp notification it works."""
    done = traced(vsock, interceptor, "echo", "done")
    if interceptor == "notify":
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    else:
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("vsock: cannot supervise echo: it is traced already")


def test_a_tracer_inside_is_told_that_it_cannot(vsock: Vsock, interceptor: str) -> None:
    if shutil.which("strace") is None:
        pytest.skip("no strace: apt install what .ci/run does")
    command = ("strace", "-f", "-o", "/dev/null", "-e", "trace=none", "echo", "done")
    done = vsock("run", *command, expect=None)
    if interceptor == "notify":
        assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")
    else:
        path = os.path.realpath(shutil.which("strace") or "")
        line = f"vsock run: {path!r}: cannot trace programs of vsock run (try --interceptor notify)"
        assert done.returncode == 1
        assert done.stderr.splitlines().count(line) == 1


def test_processes_outside_can_be_traced(vsock: Vsock) -> None:
    """As far as the kernel lets the user."""
    source = "import ctypes, sys; print(ctypes.CDLL(None).ptrace(0x4206, int(sys.argv[1]), 0, 0))"
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as outside:
        command = (sys.executable, "-c", source, str(outside.pid))
        plainly = subprocess.run(command, capture_output=True, text=True, check=True)
        done = vsock("run", *command)
        assert (done.stdout, done.stderr) == (plainly.stdout, "")


def test_ignored_and_blocked_sigsys(vsock: Vsock) -> None:
    program = """
import signal, socket, threading
signal.signal(signal.SIGSYS, signal.SIG_IGN)
signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))
for _ in range(2):
    print(socket.socket(40, 1).family == 40)
thread = threading.Thread(target=lambda: print(socket.socket(40, 1).family == 40))
thread.start(); thread.join()
"""
    assert vsock("run", sys.executable, "-c", program).stdout == "True\n" * 3


def test_a_stopped_supervisor_delays_its_own_programs_alone(vsock: Vsock) -> None:
    program = """
import os, signal, socket, sys
print(os.getppid(), flush=True)
sys.stdin.readline()
print(socket.socket(40, 1).family, flush=True)
"""
    running = vsock.start("run", sys.executable, "-c", program)
    supervisor = int(running.read_line())
    os.kill(supervisor, signal.SIGSTOP)
    running.write(b"\n")
    other = vsock("run", sys.executable, "-c", "import socket; print(socket.socket(40, 1).family)")
    assert other.stdout == "40\n"
    os.kill(supervisor, signal.SIGCONT)
    assert running.read_line() == "40"


def test_two_thousand_threads(vsock: Vsock, compile_c: Compile) -> None:
    assert vsock("run", compile_c("threads.c", "-pthread"), patience=60).stdout == "2000\n"


def test_a_fork_bomb_harms_its_own_program_alone(vsock: Vsock) -> None:
    """A program outside the bomb is served meanwhile, and each process of the bomb is."""
    bomb = """
import os, socket
for _ in range(6):
    os.fork()
    socket.socket(40, 1)
os.write(1, b".")
"""
    running = vsock.start("run", sys.executable, "-c", bomb)
    other = vsock("run", sys.executable, "-c", "import socket; print(socket.socket(40, 1).family)")
    assert other.stdout == "40\n"
    assert running.finish() == (b"." * 64, "")


@pytest.mark.notify_only("tracing uses no listener: the program may have one")
def test_a_programs_own_filters_work_except_a_listener(vsock: Vsock, compile_c: Compile) -> None:
    done = vsock("run", compile_c("own_filter.c"))
    assert done.stdout.splitlines() == ["Operation not permitted", "1", "16"]  # EBUSY


def test_the_kernels_af_vsock_is_unreachable(vsock: Vsock, compile_c: Compile) -> None:
    lines = vsock("run", compile_c("doors.c")).stdout.splitlines()
    x32 = ["x32: Function not implemented"] if platform.machine() == "x86_64" else []
    assert lines == [
        *["socket: ours"] * 3,
        "io_uring: Function not implemented",
        *x32,
        "hypervisor: Operation not permitted",
        "socketpair: Operation not supported",
    ]


def test_no_vsock_call_is_let_through(vsock: Vsock, tmp_path: Path) -> None:
    """The tests' own filter would fail such a call with ENOSYS; no arguments may get it there."""
    program = """
import ctypes, itertools
libc = ctypes.CDLL(None, use_errno=True)
kinds = [0, 1, 2, 3, 5, 1 | 2048, 1 | 524288, 1 | 1 << 20, -1]
for kind, protocol in itertools.product(kinds, [0, 40, 1, -1]):
    result = libc.socket(40, kind, protocol)
    assert result >= 0 or ctypes.get_errno() != 38, (kind, protocol)
print("never")
"""
    assert vsock("run", sys.executable, "-c", program).stdout == "never\n"


@pytest.mark.notify_only("tracees end with the supervisor")
def test_af_vsock_fails_once_the_supervisor_has_ended(vsock: Vsock) -> None:
    program = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getppid(), flush=True)
sys.stdin.readline()
try: socket.socket(40, 1)
except OSError as error: print(error.errno, flush=True)
"""
    # The first process has ended: nothing is left to kill the others.
    command = f"exec 3<&0; {sys.executable} -c '{program}' <&3 & exit 0"
    running = vsock.start("run", "sh", "-c", command)
    running.process.wait(20)
    running.read_line()
    (supervisor,) = supervisors(vsock)
    os.kill(supervisor, signal.SIGKILL)
    running.write(b"\n")
    assert running.read_line() == "38"  # ENOSYS


def supervisors(vsock: Vsock) -> list[int]:
    """Return the supervisors of programs on this fabric."""
    found = []
    wanted = f"VSOCKETS_DIR={vsock.folder}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            listens = any(
                os.readlink(fd) == "anon_inode:seccomp notify" for fd in (folder / "fd").iterdir()
            )
            if listens and wanted in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.fixture
def thirty_two(compile_c: Compile) -> Path:
    """A 32-bit program; skips the test where none can be built."""
    if platform.machine() != "x86_64":
        pytest.skip("an x86-64 matter")
    options = ("-m32", "-static", "-nostdlib", "-O1", "-fno-pic", "-no-pie")
    program = compile_c("thirtytwo.c", *options)
    try:
        subprocess.run([program], check=False)  # the tests' own filter makes it fail
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    return program


def test_a_32_bit_program_is_killed_with_a_message(vsock: Vsock, thirty_two: Path) -> None:
    done = vsock("run", thirty_two, expect=-signal.SIGKILL)
    line = f"vsock run: '{thirty_two}': 32-bit programs are not supported; killed\n"
    assert done.stderr == line


#: Runs a 32-bit program, without privileges, with a standard error that it may not write to or that
#: is not read.
WITHOUT_RIGHTS = """
import os, signal, sys
how, victim, program = sys.argv[1:]
if how == "file":
    stderr = os.open(victim, os.O_PATH)
else:
    reader, stderr = os.pipe()
    os.set_blocking(stderr, False)
    try:
        while os.write(stderr, bytes(4096)): pass
    except BlockingIOError: pass
    os.set_blocking(stderr, True)
if os.geteuid() == 0:
    os.setgid(65534)
    os.setuid(65534)
if os.fork() == 0:
    os.dup2(stderr, 2)
    os.execv(program, [program])
print(os.waitstatus_to_exitcode(os.wait()[1]))
"""


@pytest.mark.parametrize("how", ["file", "full pipe"])
def test_messages_are_written_with_the_programs_rights(
    vsock: Vsock, thirty_two: Path, how: str
) -> None:
    """Standard error is a file of root's that the program may not write, or blocks the writer."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        victim = Path(folder, "victim")
        victim.write_text("root's\n")
        victim.chmod(0o600 if os.geteuid() == 0 else 0o400)
        # Unquoted, the path would be several lines.
        program = Path(folder, "x\nevil::0:0:::\n#")
        shutil.copy(thirty_two, program)
        done = vsock("run", sys.executable, "-c", WITHOUT_RIGHTS, how, victim, program)
        assert (done.stdout, done.stderr) == ("-9\n", "")
        assert victim.read_text() == "root's\n"


def test_a_programs_path_is_quoted_in_messages(vsock: Vsock, thirty_two: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "x\n\033[2J\udcff")
        shutil.copy(thirty_two, program)
        done = vsock("run", program, expect=-signal.SIGKILL)
    assert done.stderr == (
        f"vsock run: '{folder}/x\\n\\x1b[2J\\udcff': 32-bit programs are not supported; killed\n"
    )


def test_reserved_ports_need_the_programs_own_capability(vsock: Vsock) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root: the supervisor has the privilege, the program has not")
    program = """
import ctypes, os, socket, sys
if sys.argv[1] == "drop":
    os.setgid(65534)
    os.setuid(65534)
sock = socket.socket(40, 1)
try: sock.bind((0xFFFFFFFF, 80)); print("bound")
except OSError as error: print(error.errno)
"""
    assert vsock("run", sys.executable, "-c", program, "keep").stdout == "bound\n"
    assert vsock("run", sys.executable, "-c", program, "drop").stdout == "13\n"
