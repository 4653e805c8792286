"""What cannot be supervised says so; nothing gets to the machine's own AF_VSOCK."""

from __future__ import annotations

import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tools.vsock import PROGRAM, Vsock

from .conftest import Compile

x86_only = pytest.mark.skipif(platform.machine() != "x86_64", reason="an x86-64 matter")


def test_no_such_program(vsock: Vsock) -> None:
    line = vsock.fails("run", "no-such-program", status=127)
    assert line == "no-such-program: No such file or directory"


def test_no_such_context(vsock: Vsock) -> None:
    vsock.fail(("run --cid 1 true", 1, "CID 1 is not a guest's"))


def test_within_another(vsock: Vsock) -> None:
    done = vsock("run", "sh", "-c", f"{' '.join(PROGRAM)} run echo inner", expect=1)
    assert done.stdout == ""
    assert done.stderr.startswith("vsock: cannot supervise echo: a supervisor is at work already")


def test_a_kernel_without_seccomp(vsock: Vsock) -> None:
    # As containers have it: a filter that says there is no such call.
    script = f"""
import ctypes, os, struct, sys
from vsockets.supervisor.filter import Rule, assemble, refuse
from vsockets.supervisor.machine import this_machine
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


def test_a_program_with_a_filter_of_its_own(vsock: Vsock, compile_c: Compile) -> None:
    done = vsock("run", compile_c("own_filter.c"))
    assert done.stdout.splitlines() == ["Operation not permitted", "1", "16"]  # EBUSY


def test_no_way_to_the_machines_own(vsock: Vsock, compile_c: Compile) -> None:
    lines = vsock("run", compile_c("doors.c")).stdout.splitlines()
    x32 = ["x32: Function not implemented"] if platform.machine() == "x86_64" else []
    assert lines == [
        *["socket: ours"] * 3,
        "io_uring: Function not implemented",
        *x32,
        "hypervisor: Operation not permitted",
        "socketpair: Operation not supported",
    ]


def test_the_supervisor_never_lets_a_vsock_call_through(vsock: Vsock, tmp_path: Path) -> None:
    """Under the tests' own filter such a call would fail with ENOSYS; here it must not get that
    far, whatever the arguments are.
    """
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


def test_when_the_supervisor_is_gone_there_is_no_vsock_at_all(vsock: Vsock) -> None:
    program = """
import os, signal, socket, sys
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(os.getppid(), flush=True)
sys.stdin.readline()
try: socket.socket(40, 1)
except OSError as error: print(error.errno, flush=True)
"""
    # Its first process has ended, so nothing is left that would kill the rest.
    command = f"exec 3<&0; {sys.executable} -c '{program}' <&3 & exit 0"
    running = vsock.start("run", "sh", "-c", command)
    running.process.wait(20)
    running.read_line()
    (supervisor,) = supervisors(vsock)
    os.kill(supervisor, signal.SIGKILL)
    running.write(b"\n")
    assert running.read_line() == "38"  # ENOSYS


def supervisors(vsock: Vsock) -> list[int]:
    """The supervisors of programs on this fabric."""
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


@x86_only
def test_a_32_bit_program(vsock: Vsock, compile_c: Compile) -> None:
    options = ("-m32", "-static", "-nostdlib", "-O1", "-fno-pic", "-no-pie")
    program = compile_c("thirtytwo.c", *options)
    try:
        subprocess.run([program], check=False)  # the tests' own filter makes it fail
    except OSError:
        pytest.skip("this kernel runs no 32-bit programs")
    done = vsock("run", program, expect=-signal.SIGKILL)
    assert done.stderr == f"vsock run: {program}: 32-bit programs are not supported, it is killed\n"


def test_reserved_ports_need_the_programs_own_privilege(vsock: Vsock) -> None:
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
