"""The identity and rights of a client, as the kernel reports them."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys

import pytest

from vsockets.protocol import RECORD_SIZE, Record, RequestFlag
from vsockets.testing import PrivateFabric

from .raw_client import LOCAL_CID, PROMPT, SOCKET_TYPES, ask, ask_once, bind, connect, enter, listen
from .users import CAP_NET_ADMIN, NOBODY, as_root, has_capability, user

pytestmark = as_root
both_types = pytest.mark.parametrize("sock_type", SOCKET_TYPES)


@both_types
def test_reserved_ports_need_a_capability(fabric: PrivateFabric, sock_type: int) -> None:
    with user(NOBODY):
        assert ask_once(fabric.host, bind(700), sock_type).status == errno.EACCES
        assert ask_once(fabric.host, bind(1024), sock_type).status == 0
    assert ask_once(fabric.host, bind(700), sock_type).status == 0


def test_an_exited_program_has_no_capability(fabric: PrivateFabric) -> None:
    """A connection outlives its creator, whose rights are then unknown."""
    script = (
        "import socket, sys; s = socket.socket(socket.AF_UNIX); s.connect(sys.argv[1]);"
        "pipe = socket.socket(fileno=int(sys.argv[2]));"
        "socket.send_fds(pipe, [b'x'], [s.fileno()])"
    )
    here, there = socket.socketpair()
    with here, there:
        subprocess.run(
            [
                *(sys.executable, "-c", script),
                *(str(fabric.host.folder / "stream"), str(there.fileno())),
            ],
            pass_fds=[there.fileno()],
            check=True,
        )
        _, descriptors, _, _ = socket.recv_fds(here, 1, 1)
        with socket.socket(fileno=descriptors[0]) as orphan:
            orphan.settimeout(PROMPT)
            assert ask(orphan, bind(700)).status == errno.EACCES
            assert ask(orphan, bind(7000)).status == 0


@both_types
def test_the_peers_credentials(fabric: PrivateFabric, sock_type: int) -> None:
    with enter(fabric.host, sock_type) as server:
        ask(server, bind(5000))
        ask(server, listen())
        with user(NOBODY):
            client = enter(fabric.host, sock_type)
            answer = ask(client, connect(2, 5000))
        with client:
            assert (answer.pid, answer.uid, answer.gid) == (os.getpid(), 0, 0)
        announced = Record.decode(server.recv(RECORD_SIZE))
        assert (announced.pid, announced.uid, announced.gid) == (os.getpid(), NOBODY, 0)


def test_trusted(fabric: PrivateFabric) -> None:
    """By CAP_NET_ADMIN, or as the user that owns the context (guide page 24)."""
    theirs = fabric.guest(8, owner=NOBODY)
    assert ask_once(fabric.host, LOCAL_CID).flags & RequestFlag.TRUSTED_STREAM
    privileged = has_capability(CAP_NET_ADMIN)  # root has it, except in most containers
    assert bool(ask_once(theirs, LOCAL_CID).flags & RequestFlag.TRUSTED_STREAM) == privileged
    with user(NOBODY):
        assert not ask_once(fabric.host, LOCAL_CID).flags & RequestFlag.TRUSTED_STREAM
        assert ask_once(theirs, LOCAL_CID).flags & RequestFlag.TRUSTED_STREAM
