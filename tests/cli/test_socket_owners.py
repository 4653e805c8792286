"""The process that owns a socket, among the one known to vsockd and its descendants."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from daemon.test_identity_processes import process_with_id
from daemon.users import as_administrator, as_root
from vsockets.cli.observation import Owner, Owners

SCRIPT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(15, sys.argv[1].encode(), 0, 0, 0)
print(flush=True)
signal.pause()
"""


@contextlib.contextmanager
def child_with(sock: socket.socket, name: str) -> Iterator[int]:
    """Run a child named ``name`` that inherits ``sock``; yield its pid."""
    command = [sys.executable, "-c", SCRIPT, name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, pass_fds=[sock.fileno()]) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.fixture
def sock() -> Iterator[tuple[socket.socket, int]]:
    """A socket for children to inherit, and its inode."""
    with socket.socket() as sock:
        yield sock, os.fstat(sock.fileno()).st_ino


def test_a_child_that_owns_the_socket(sock: tuple[socket.socket, int]) -> None:
    with child_with(sock[0], "worker") as pid:
        sock[0].close()
        expected = Owner(pid, os.geteuid(), "worker")
        assert Owners().find(os.getpid(), 7, sock[1]) == expected


def test_a_name_that_looks_like_a_row(sock: tuple[socket.socket, int]) -> None:
    """A program can choose its name, but not its uid."""
    name = "a\x0cUid:\t7 7"
    with child_with(sock[0], name) as pid:
        sock[0].close()
        expected = Owner(pid, os.geteuid(), name)
        assert Owners().find(os.getpid(), 7, sock[1]) == expected


@as_root
@as_administrator
def test_a_child_whose_pid_was_reused(sock: tuple[socket.socket, int]) -> None:
    owners = Owners()
    with child_with(sock[0], "worker") as pid:
        sock[0].close()
        assert owners.find(os.getpid(), 7, sock[1]).pid == pid
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        with process_with_id(pid) as reborn:
            assert reborn == pid
            found = owners.find(os.getpid(), 7, sock[1])
    assert (found.pid, found.uid) == (os.getpid(), 7)
