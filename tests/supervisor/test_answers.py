"""A supervised socket answers every call, in every state, as the kernel's AF_VSOCK does.

The kernel's answers are in ``tests/af_vsock.txt``; ``answers.c`` makes the calls.
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

#: Answers that differ on the fabric: types, call, states, the answer.
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
    # A failed connect releases the port: the socket is as before.
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


_REFUSED = "refused refused-later refused-asked connecting"
_NOT_CONNECTED = "new bound listening waiting"
_RECEIVE = ("read", "readv", "recv", "recv of 0 bytes", "recv MSG_PEEK", "recv MSG_TRUNC")
_SEND = ("write", "writev", "send", "send MSG_NOSIGNAL", "send MSG_EOR", "sendmsg")

#: Answers of the unix socket that differ (docs/run.md, "What cannot be done"), except for poll and
#: epoll, in the form of DEVIATIONS.
DEVIATIONS_BY_ITSELF = [
    *(("stream", call, _NOT_CONNECTED, "EINVAL") for call in (*_RECEIVE, "recvfrom", "recvmsg")),
    *((_STREAMS, call, _REFUSED, "EAGAIN") for call in (*_RECEIVE, "recvfrom", "recvmsg")),
    *((_STREAMS, call, _REFUSED, "4") for call in _SEND),
    (_STREAMS, "send of 0 bytes", _REFUSED, "0"),
    (_STREAMS, "recv of 0 bytes", "connected peer-shut-rd shut-wr", "EAGAIN"),
    *(
        ("stream", call, f"{_REFUSED} peer-closed shut-rdwr", "EISCONN")
        for call in ("sendto", "sendto of 15 bytes' address", "sendmsg with an address")
    ),
    *(
        ("seqpacket", call, "peer-closed shut-rdwr", "EISCONN")
        for call in ("sendto", "sendto of 15 bytes' address")
    ),
    ("seqpacket", "sendmsg with an address", f"{_REFUSED} connected data", "4"),
    ("seqpacket", "sendmsg with an address", "peer-shut-wr shut-rd", "4"),
    ("seqpacket", "sendmsg with an address", _NOT_CONNECTED, "ENOTCONN"),
    ("seqpacket", "sendmsg with an address", "peer-closed peer-closed-data", "EPIPE"),
    ("seqpacket", "sendmsg with an address", "peer-shut-rd shut-wr shut-rdwr", "EPIPE"),
    (_STREAMS, "FIONREAD", "new bound connecting", "0 0"),
    (_STREAMS, "FIONREAD", "listening waiting", "EINVAL"),
    *(
        ("stream", call, "data peer-closed-data", "4 address-of-9-bytes")
        for call in ("recvfrom", "recvmsg")
    ),
    *(
        ("seqpacket", call, "data peer-closed-data", "4 address-of-12-bytes")
        for call in ("recvfrom", "recvmsg")
    ),
    *(("dgram", call, "peer-closed", "ECONNREFUSED") for call in _SEND),
    ("dgram", "send of 0 bytes", "peer-closed", "ECONNREFUSED"),
    ("dgram", "sendto of 15 bytes' address", "peer-closed", "ECONNREFUSED"),
    ("dgram", "sendto", "new bound peer-closed", "ECONNREFUSED"),
    ("dgram", "sendmsg with an address", "new bound peer-closed", "ECONNREFUSED"),
    ("dgram", "recv MSG_TRUNC", "data", "4"),
    ("dgram", "FIONREAD", "new bound connected peer-closed shut-rd shut-wr shut-rdwr", "0 0"),
    ("dgram", "FIONREAD", "data", "0 4"),
]


def expected(kind: str, connecting: bool) -> answers.Answers:
    wanted = {
        cell: said
        for cell, said in answers.read_table().items()
        if cell.kind == kind and (cell.state == "connecting") == connecting
    }
    for kinds, call, states, said in (*DEVIATIONS, *DEVIATIONS_BY_ITSELF):
        if kind in kinds.split():
            cells = (Cell(kind, call, state) for state in states.split())
            wanted.update({cell: said for cell in cells if cell in wanted})
    return without_events(wanted)


def without_events(found: answers.Answers) -> answers.Answers:
    """Remove the results of poll and epoll, which differ between kernels' unix sockets."""
    return {cell: said for cell, said in found.items() if cell.call not in ("poll", "epoll")}


@pytest.fixture(scope="module")
def program(compile_c: Compile) -> Path:
    return compile_c("answers.c", "-O1")


@pytest.mark.parametrize("kind", answers.KINDS)
def test_answers_equal_the_kernels(vsock: Vsock, program: Path, kind: str) -> None:
    found = answers.parse(vsock("run", "--cid", "90", program, kind, "1").stdout)
    assert answers.differences(expected(kind, False), without_events(found)) == {}


def test_answers_while_connecting_equal_the_kernels(
    vsock: Vsock, fabric: PrivateFabric, program: Path
) -> None:
    running = vsock.start("run", "--cid", "91", program, "stream", "1", "5000")
    assert running.read_line() == "ready"
    os.kill(fabric.pid, signal.SIGSTOP)
    try:
        said = running.finish(b"\n")[0].decode()
    finally:
        os.kill(fabric.pid, signal.SIGCONT)
    found = answers.parse(said)
    assert answers.differences(expected("stream", True), without_events(found)) == {}
