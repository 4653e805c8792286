"""What a device's process can do once it is shut in."""

from __future__ import annotations

import subprocess
import sys

import pytest

_SCRIPT = """
import ctypes, errno, mmap, os, socket
from vsockets.devices.sandbox import enter_sandbox
other = os.memfd_create("guest"); os.ftruncate(other, 4096)
enter_sandbox()
try:
    {attempt}
except OSError as error:
    print(error.errno)
else:
    print("done", os.geteuid() != 0)
"""


def attempt(code: str) -> str:
    script = _SCRIPT.format(attempt=code)
    child = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=30
    )
    return (child.stdout + child.stderr).strip()


@pytest.mark.parametrize(
    "code",
    [
        "open('/etc/passwd')",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.listdir('/')",
        "os.kill(1, 0)",
        "os.unlink('/nonexistent')",
        "socket.socket(socket.AF_INET)",
        "socket.socket().connect(('127.0.0.1', 1))",
        "socket.socketpair()[0].connect('/run/x')",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
        "os.setuid(0)",
        "os.pidfd_open(1)",
        "os.memfd_create('more')",
    ],
)
def test_it_cannot(code: str) -> None:
    assert attempt(code) == "1", "EPERM"


@pytest.mark.parametrize(
    "code",
    [
        "mmap.mmap(other, 4096)[0] = 1",
        "a, b = socket.socketpair(); a.send(b'x')",
        "socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).setblocking(False)",
        "print(end='', flush=True)",
    ],
)
def test_it_can(code: str) -> None:
    assert attempt(code).startswith("done True")
