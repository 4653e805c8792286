"""A supervised socket answers as a kernel's AF_VSOCK does: every call in every state.

The kernel's answers are in ``tests/af_vsock.txt``, the program that asks is ``answers.c``.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

import answers
from answers import Cell
from cli.vsock import Vsock
from vsockets.testing import PrivateFabric

from .conftest import Compile

#: What a unix socket answers by itself, because no call that moves data is trapped.
BY_ITSELF = (
    *("read", "readv", "recv", "recv of 0 bytes", "recv MSG_PEEK", "recv MSG_TRUNC", "recvfrom"),
    *("recvmsg", "write", "writev", "send", "send MSG_NOSIGNAL", "send of 0 bytes"),
    *("send MSG_EOR", "sendto", "sendto of 15 bytes' address", "sendmsg"),
    *("sendmsg with an address", "FIONREAD", "poll", "epoll"),
)

#: Where the fabric's sockets answer otherwise: types, call, states, the answer.
FILLED_IN = "bound listening waiting connected data peer-closed peer-closed-data peer-shut-wr"
_STREAMS = "stream seqpacket"
DEVIATIONS = [
    # A socket's own CID is shown, not what it was bound to (guide page 15).
    (
        "stream seqpacket dgram",
        "getsockname",
        f"{FILLED_IN} peer-shut-rd shut-rd shut-wr shut-rdwr",
        "0 cid:own",
    ),
    # A failed connect leaves no port behind: the socket is as before.
    (_STREAMS, "getsockname", "refused refused-later refused-asked connecting", "0 any:any"),
    (_STREAMS, "bind", "refused", "0"),
    (_STREAMS, "bind, reserved", "refused", "0"),
    (_STREAMS, "bind, zero[0]", "refused", "0"),
    (_STREAMS, "bind to a stranger's CID", "refused", "EADDRNOTAVAIL"),
    (_STREAMS, "bind to a port that is held", "refused", "EADDRINUSE"),
    (_STREAMS, "listen", "refused", "EINVAL"),
    (_STREAMS, "listen, -1", "refused", "EINVAL"),
    (_STREAMS, "SIOCOUTQ", "refused", "EOPNOTSUPP"),
]


def expected(kind: str, connecting: bool) -> answers.Answers:
    wanted = {
        cell: said
        for cell, said in answers.read_table().items()
        if cell.kind == kind and (cell.state == "connecting") == connecting
    }
    for kinds, call, states, said in DEVIATIONS:
        if kind in kinds.split():
            cells = (Cell(kind, call, state) for state in states.split())
            wanted.update({cell: said for cell in cells if cell in wanted})
    return without(wanted)


def without(found: answers.Answers) -> answers.Answers:
    return {cell: said for cell, said in found.items() if cell.call not in BY_ITSELF}


@pytest.fixture(scope="module")
def program(compile_c: Compile) -> Path:
    return compile_c("answers.c", "-O1")


@pytest.mark.parametrize("kind", answers.KINDS)
def test_answers_of_the_kernel(vsock: Vsock, program: Path, kind: str) -> None:
    found = answers.parse(vsock("run", "--cid", "90", program, kind, "1").stdout)
    assert answers.differences(expected(kind, False), without(found)) == {}


def test_answers_while_connecting(vsock: Vsock, fabric: PrivateFabric, program: Path) -> None:
    running = vsock.start("run", "--cid", "91", program, "stream", "1", "5000")
    assert running.read_line() == "ready"
    os.kill(fabric.pid, signal.SIGSTOP)
    try:
        said = running.finish(b"\n")[0].decode()
    finally:
        os.kill(fabric.pid, signal.SIGCONT)
    found = answers.parse(said)
    assert answers.differences(expected("stream", True), without(found)) == {}
