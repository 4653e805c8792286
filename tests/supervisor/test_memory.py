"""The supervisor reads and writes memory of the process that made the call alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import vsockets
from cli.vsock import Vsock
from vsockets.supervisor.arch import this_architecture
from vsockets.supervisor.process import open_memory, write_memory
from vsockets.testing import PrivateFabric

from .conftest import Compile

EXECUTES = """
import ctypes, os, sys
text = ctypes.create_string_buffer(b"text")
print(ctypes.addressof(text), flush=True)
sys.stdin.readline()
print(text.value.decode(), flush=True)
sys.stdin.readline()
os.execlp("sh", "sh", "-c", "echo executed; read line")
"""


def test_memory_is_read_from_the_program_that_made_the_call() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", EXECUTES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        address = int(process.stdout.readline())
        memory = open_memory(process.pid)
        try:
            assert write_memory(memory, address, b"TEXT")
            with pytest.raises(OSError, match="Bad address"):
                write_memory(memory, 8, b"TEXT")
            with pytest.raises(OSError, match="Bad address"):
                write_memory(memory, (1 << 64) - 1, b"TEXT")
            for line in ("TEXT\n", "executed\n"):
                process.stdin.write("\n")
                process.stdin.flush()
                assert process.stdout.readline() == line
            assert not write_memory(memory, address, b"TEXT")
        finally:
            os.close(memory)


def test_memory_of_a_program_executed_meanwhile_is_not_written(
    vsock: Vsock, compile_c: Compile
) -> None:
    program = compile_c("executes.c", "-static", "-no-pie", "-pthread")
    done = vsock("run", program, "150")
    assert done.stdout == "150 untouched, 0 written to, 0 failed\n"


#: Replaces the listening socket by another with its number while accept() waits.
EXCHANGED = """
import os, socket, sys, threading
listener, other = (socket.socket(40, socket.SOCK_STREAM) for _ in range(2))
for sock in (listener, other):
    sock.bind((0xFFFFFFFF, 0xFFFFFFFF))
    sock.listen()
kept = listener.dup()
def accept():
    try: listener._accept(); print("accepted")
    except OSError as error: print(error.strerror, flush=True)
thread = threading.Thread(target=accept)
thread.start()
while open(f"/proc/self/task/{thread.native_id}/syscall").read().split()[0] != sys.argv[1]:
    pass
kept.getsockname()  # the supervisor serves accept() by then
os.dup2(other.fileno(), listener.fileno())
print(kept.getsockname()[1], flush=True)
thread.join()
"""


def test_another_socket_with_the_same_number_is_not_used(
    vsock: Vsock, fabric: PrivateFabric, interceptor: str
) -> None:
    # Of traced threads one whose accept() waits is seen in ppoll().
    machine = this_architecture()
    waits = machine.ppoll if interceptor == "trace" else machine.accept4
    running = vsock.start("run", "--cid", "host", sys.executable, "-c", EXCHANGED, waits)
    port = int(running.read_line())
    with vsockets.create_connection((2, port), context=fabric.host):
        assert running.read_line() == "Bad file descriptor"
    running.finish()
