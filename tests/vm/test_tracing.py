"""Tracing under Yama, as in Debian's kernels: by an ordinary user, in a fabric inside a guest."""

from __future__ import annotations

import pytest

from . import downloads
from .conftest import Machines
from .machine import Machine

pytestmark = pytest.mark.timeout(300)

#: Runs a program under a supervisor as user 65534, in its own fabric.
_RUN = """
import subprocess, sys
supervise = '''
import os, sys
from vsockets import Attachment
from vsockets.supervisor.launch import launch
from vsockets.supervisor.mechanism import choose
from vsockets.testing import PrivateFabric
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
with PrivateFabric() as fabric:
    context = fabric.guest()
    if (pid := os.fork()) == 0:
        def become(): os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
        launch(become, context, None, False, choose("notify").mechanism)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
'''
with open("/proc/sys/kernel/yama/ptrace_scope", "w") as file: file.write(str(scope))
os.chmod("/tmp", 0o1777)
done = subprocess.run(
    [sys.executable, "-c", supervise, program],
    stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100,
)
result = done.returncode, done.stdout, done.stderr
"""

_PROGRAM = """
import errno, os, socket, subprocess, sys, threading
ANY = 0xFFFFFFFF, 0xFFFFFFFF
def datagram():
    sock = socket.socket(40, socket.SOCK_DGRAM)
    sock.bind(ANY)
    return sock
try: server, sock = datagram(), datagram()
except OSError as error: print(errno.errorcode[error.errno]), sys.exit()
def works(sock):
    sock.sendto(b"works", (1, server.getsockname()[1]))
    assert server.recvfrom(10) == (b"works", sock.getsockname())
works(sock)
thread = threading.Thread(target=works, args=(sock,))
thread.start()
thread.join()
if os.fork() == 0:
    works(sock)
    works(datagram())
    os._exit(0)
assert os.wait()[1] == 0
print("works", os.getuid())
"""


@pytest.fixture(scope="module")
def machine(machines: Machines) -> Machine:
    machine = machines.get("newest", "virtio")
    machine.put(downloads.ctypes_library())
    return machine


@pytest.mark.parametrize("scope", [0, 1])
def test_tracing_is_permitted_for_children(machine: Machine, scope: int) -> None:
    assert machine.run(_RUN, 120, program=_PROGRAM, scope=scope) == (0, "works 65534\n", "")


def test_tracing_is_forbidden(machine: Machine) -> None:
    """The process is inaccessible then; the supervisor cannot even write to its standard error."""
    assert machine.run(_RUN, 120, program=_PROGRAM, scope=2) == (0, "EPERM\n", "")
