"""Calls on sockets are intercepted from a program's first vSockets socket on."""

from __future__ import annotations

import array
import socket
import sys
from pathlib import Path

import pytest

import vsockets
from cli.vsock import Vsock
from vsockets.testing import PrivateFabric

PROGRAMS = Path(__file__).parent / "programs"

#: Prints how many seccomp filters the process has.
FILTERS = """
def filters():
    with open("/proc/self/status") as status:
        return int(status.read().split("Seccomp_filters:")[1].split()[0])
"""

#: Switches of the supervisor, which is the parent, during two hundred TCP connections.
OTHER_SOCKETS = """
import os, socket
def switches():
    with open(f"/proc/{os.getppid()}/status") as status:
        return int(status.read().split("\\nvoluntary_ctxt_switches:")[1].split()[0])
server = socket.create_server(("127.0.0.1", 0))
address = server.getsockname()
before = switches()
for _ in range(200):
    with socket.socket() as sock:
        sock.connect(address)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted, _ = server._accept()
        sock.shutdown(socket.SHUT_RDWR)
        os.close(accepted)
print(switches() - before)
"""


def test_other_sockets_are_not_intercepted(vsock: Vsock) -> None:
    done = vsock("run", "--cid", "host", sys.executable, "-c", OTHER_SOCKETS)
    assert int(done.stdout) < 100


def test_a_program_has_the_second_filter_from_its_first_socket_on(vsock: Vsock) -> None:
    script = f"""{FILTERS}
import socket
before = filters()
numbers = [socket.socket(40).detach() for _ in range(3)]
print(filters() - before, [b - a for a, b in zip(numbers, numbers[1:])])
"""
    done = vsock("run", "--cid", "host", sys.executable, "-c", script)
    assert done.stdout == "1 [1, 1]\n"


def test_first_sockets_of_many_threads_and_processes(vsock: Vsock) -> None:
    done = vsock("run", "--cid", "host", sys.executable, PROGRAMS / "first_sockets.py", "4")
    assert done.stdout == "0 of 12 failed\n"


#: A child that is stopped by a signal while its parent makes the first vSockets socket.
STOPPED = """
import os, signal, socket
reader, writer = os.pipe()
child = os.fork()
if child == 0:
    os.read(reader, 1)
    with socket.socket(40) as sock:
        print(sock.getsockname(), flush=True)
    os._exit(7)
os.kill(child, signal.SIGSTOP)
print(os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]), flush=True)
socket.socket(40).close()
os.write(writer, b"x")
print(os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG), flush=True)
os.kill(child, signal.SIGCONT)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_process_that_a_signal_has_stopped_stays_so(vsock: Vsock) -> None:
    done = vsock("run", "--cid", "host", sys.executable, "-c", STOPPED)
    assert done.stdout == "True\nNone\n(4294967295, 4294967295)\n7\n"


#: Makes a vSockets socket in a child that its parent traces, as a debugger does.
TRACED = """
import ctypes, os, signal, socket
libc = ctypes.CDLL(None, use_errno=True)
child = os.fork()
if child == 0:
    assert libc.ptrace(0, 0, 0, 0) == 0  # PTRACE_TRACEME
    os.kill(os.getpid(), signal.SIGSTOP)
    with socket.socket(40) as sock:
        os._exit(sock.getsockname() == (0xFFFFFFFF, 0xFFFFFFFF))
assert os.WIFSTOPPED(os.waitpid(child, 0)[1])
assert libc.ptrace(7, child, 0, 0) == 0  # PTRACE_CONT
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.notify_only("all processes are traced")
def test_a_program_may_be_debugged_before_its_first_socket(vsock: Vsock) -> None:
    assert vsock("run", "--cid", "host", sys.executable, "-c", TRACED).stdout == "1\n"


#: Forbids seccomp() by a filter of its own, before it makes a vSockets socket.
FORBIDDING = """
import ctypes, socket, struct
libc = ctypes.CDLL(None, use_errno=True)
from vsockets.supervisor.arch import this_architecture
from vsockets._linux.bpf import *
program = b"".join([
    instruction(LOAD, NUMBER), instruction(IF_EQUAL, this_architecture().seccomp, 0, 1),
    instruction(RETURN, refuse(1)), instruction(RETURN, ALLOW)])
text = ctypes.create_string_buffer(program)
filter = SOCK_FPROG.pack(len(program) // 8, ctypes.addressof(text))
assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.prctl(22, 2, filter, 0, 0) == 0
with socket.socket(40) as sock:
    print(sock.getsockname())
"""


def test_a_program_may_install_a_filter_before_its_first_socket(vsock: Vsock) -> None:
    done = vsock("run", "--cid", "host", sys.executable, "-c", FORBIDDING)
    assert done.stdout == "(4294967295, 4294967295)\n"


#: Receives a listener from outside, as its only vSockets socket.
RECEIVING = """
import socket, sys
with socket.socket(fileno=0) as channel:
    _, (number,), _, _ = socket.recv_fds(channel, 1, 1)
with socket.socket(fileno=number) as listener:
    print(listener.family, listener.getsockname()[1], flush=True)
    connection, peer = listener.accept()
    print(peer[0], connection.recv(10))
"""


def test_a_socket_from_outside_is_the_first(vsock: Vsock, fabric: PrivateFabric) -> None:
    ours, theirs = socket.socketpair()
    with ours, vsockets.create_server((vsockets.VMADDR_CID_ANY, 7171), context=fabric.host) as own:
        with theirs:
            running = vsock.start(
                "run", "--cid", "host", sys.executable, "-c", RECEIVING, stdin=theirs.fileno()
            )
        ours.sendmsg(
            [b"x"],
            [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [own.fileno()]))],
        )
        assert running.read_line() == "40 7171"
        with vsockets.socket(context=fabric.host) as client:
            client.connect((2, 7171))
            client.sendall(b"text")
            assert running.read_line() == "2 b'text'"
