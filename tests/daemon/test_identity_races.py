"""vsockd's conclusions about a process hold although it changes meanwhile.

vsockd reads several files of a process, and the process may change between any two system calls:
here it does so before each of them in turn, so every interleaving is tried deterministically.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

from vsockets.daemon.credentials import Peer, peer_credentials
from vsockets.fabric import CAP_NET_ADMIN, CAP_NET_BIND_SERVICE, Grant

from .raw_client import PROMPT, compiled
from .test_identity_processes import become_nobody
from .users import NOBODY, as_root

pytestmark = as_root

_CLONE_NEWUSER = 0x1000_0000
_PR_SET_DUMPABLE = 4

#: More system calls than one check takes.
_MOST_STEPS = 60


class Suspect:
    """A connected process without privileges that changes on request."""

    def __init__(self, folder: Path) -> None:
        self.order, theirs = socket.socketpair()
        self.order.settimeout(PROMPT)
        ours, connection = socket.socketpair()
        ours.close()
        connection.close()
        path = os.fspath(folder / "door")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            os.chmod(path, 0o666)
            listener.listen()
            self.pid = os.fork()
            if self.pid == 0:
                self._be_it(path, theirs, folder)
            theirs.close()
            self.order.recv(1)
            self.sock, _ = listener.accept()
        os.unlink(path)

    def _be_it(self, path: str, order: socket.socket, folder: Path) -> None:
        try:
            become_nobody()
            # As any program that a user has started: changing its user made it another kind.
            ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 1)
            connection = socket.socket(socket.AF_UNIX)
            connection.connect(path)
            order.send(b"c")
            step = order.recv(1)
            if step == b"u":
                made = ctypes.CDLL(None).unshare(_CLONE_NEWUSER)
                order.send(b"u" if made == 0 else b"!")
                order.recv(1)
            elif step == b"x":
                os.dup2(order.fileno(), 3)
                os.execv(folder / "privileged", ["privileged", str(folder / "plain")])
        finally:
            os._exit(1)

    def become(self, step: bytes) -> bytes:
        """Apply the next change; return when it is done."""
        self.order.send(step)
        return self.order.recv(1)

    def close(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        self.order.close()
        self.sock.close()


@pytest.fixture(scope="module")
def folder(programs: Path) -> Path:
    program = compiled("turncoat.c", programs)
    shutil.copy(program, programs / "plain")
    shutil.copy(program, programs / "privileged")
    (programs / "privileged").chmod(0o4755)
    return programs


@contextlib.contextmanager
def before_system_call(number: int, act: Callable[[int], None]) -> Iterator[None]:
    """Call ``act`` with 0 before the ``number``-th C function called within this context, and with
    1, 2, and so on before the following ones: each makes at most one system call.
    """
    calls = 0

    def note(frame: FrameType, event: str, argument: Any) -> None:
        nonlocal calls
        if event == "c_call" and argument is not sys.setprofile:
            if calls >= number:
                act(calls - number)
            calls += 1

    sys.setprofile(note)
    try:
        yield
    finally:
        sys.setprofile(None)


def ask(
    folder: Path, question: Callable[[Peer], bool], steps: dict[int, bytes]
) -> tuple[bool, int]:
    """Return the answer about a process that changes before the calls with these numbers, and how
    many of them were reached.
    """
    suspect = Suspect(folder)
    reached = 0

    def act(call: int) -> None:
        nonlocal reached
        if call in steps:
            reached += 1
            assert suspect.become(steps[call]) != b"!"

    try:
        peer = Peer(suspect.sock, peer_credentials(suspect.sock))
        with before_system_call(0, act):
            answer = question(peer)
    finally:
        suspect.close()
    return answer, reached


def has_rights(peer: Peer) -> bool:
    return peer.has_capability(CAP_NET_BIND_SERVICE) or peer.has_capability(CAP_NET_ADMIN)


def may_make_user_namespaces() -> bool:
    pid = os.fork()
    if pid == 0:
        become_nobody()
        os._exit(0 if ctypes.CDLL(None).unshare(_CLONE_NEWUSER) == 0 else 1)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


def test_a_process_that_does_not_change(folder: Path) -> None:
    """An unchanging process can be examined, and the findings count."""
    executable = os.path.realpath(sys.executable)
    grant = Grant(NOBODY, None, executable, stream=True, datagram=True, domains=None)
    assert ask(folder, lambda peer: peer.matches(grant), {}) == (True, 0)
    assert ask(folder, has_rights, {}) == (False, 0)


def test_leaving_the_user_namespace(folder: Path) -> None:
    """The process then has all capabilities, of its own namespace."""
    if not may_make_user_namespaces():
        pytest.skip("users may make no user namespaces here")
    for call in range(_MOST_STEPS):
        answer, reached = ask(folder, has_rights, {call: b"u"})
        assert not answer, f"granted with unshare() before call {call}"
        if not reached:
            break
    assert 5 < call < _MOST_STEPS - 1


def test_executing_a_privileged_program(folder: Path) -> None:
    for call in range(_MOST_STEPS):
        answer, reached = ask(folder, has_rights, {call: b"x"})
        assert not answer, f"granted with execve() before call {call}"
        if not reached:
            break
    assert 5 < call < _MOST_STEPS - 1


def test_executing_a_privileged_program_and_returning(folder: Path) -> None:
    """As ``newgrp`` does: before and after, it is a program of its user."""

    def may_bind(peer: Peer) -> bool:
        return peer.has_capability(CAP_NET_BIND_SERVICE)

    calls = next(n for n in range(_MOST_STEPS) if not ask(folder, may_bind, {n: b"x"})[1])
    for there in range(calls):
        for back in range(there + 1, calls):
            answer, _ = ask(folder, may_bind, {there: b"x", back: b"y"})
            assert not answer, f"granted with execve() before call {there} and call {back}"


def test_executing_the_program_of_a_grant_that_is_privileged(folder: Path) -> None:
    """A program with file capabilities has the rights of its file, not those of its user."""
    program = os.fspath(folder / "privileged")
    grant = Grant(NOBODY, None, program, stream=True, datagram=True, domains=None)
    for call in range(_MOST_STEPS):
        answer, reached = ask(folder, lambda peer: peer.matches(grant), {call: b"x"})
        assert not answer, f"granted with execve() before call {call}"
        if not reached:
            break
    assert 5 < call < _MOST_STEPS - 1
