"""System calls that a sandboxed device process can and cannot make."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

_SCRIPT = """
import ctypes, errno, mmap, os, socket
from vsockets.devices.sandbox import enter_sandbox
other = os.memfd_create("guest"); os.ftruncate(other, 4096)
enter_sandbox({arguments})
try:
    {attempt}
except OSError as error:
    print(error.errno)
else:
    print("done", os.geteuid() != 0)
"""


def attempt(code: str, arguments: str = "", folder: Path | None = None) -> str:
    script = _SCRIPT.format(attempt=code, arguments=arguments)
    child = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, timeout=30
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
def test_sandbox_refuses(code: str) -> None:
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
def test_sandbox_allows(code: str) -> None:
    assert attempt(code).startswith("done True")


#: Arguments for a device that has unix sockets with paths, in a folder of its own user.
WITH_PATHS = f"{os.geteuid()}, paths=True"


@pytest.mark.parametrize(
    "code",
    [
        "open('x', 'w')",
        "os.listdir('.')",
        "os.execv('/bin/true', ['true'])",
        "os.symlink('/etc/passwd', 'x')",
        "os.chmod('.', 0o777)",
        "socket.socket(socket.AF_INET)",
        "os.setuid(1)",
    ],
)
def test_sandbox_with_paths_refuses(code: str, tmp_path: Path) -> None:
    assert attempt(code, WITH_PATHS, tmp_path) == "1", "EPERM"


def test_sandbox_with_paths_allows_unix_sockets(tmp_path: Path) -> None:
    code = """
    a = socket.socket(socket.AF_UNIX); a.bind('a'); os.rename('a', 'b'); a.listen()
    c = socket.socket(socket.AF_UNIX); c.connect('b'); c.send(b'x'); r, w = os.pipe()
    s, _ = a.accept(); assert os.splice(s.fileno(), w, 1) == 1; os.unlink('b')"""
    assert attempt(code.strip(), WITH_PATHS, tmp_path).startswith("done")
    assert not os.listdir(tmp_path)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to give something up")
def test_root_keeps_no_capability(tmp_path: Path) -> None:
    os.chown(tmp_path, 54_321, -1)
    tmp_path.chmod(0o700)
    code = "socket.socket(socket.AF_UNIX).bind('a')"
    assert attempt(code, "0, paths=True", tmp_path) == "13", "EACCES: it is another user's folder"
