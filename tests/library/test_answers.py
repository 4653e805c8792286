"""The library's sockets return what a kernel's AF_VSOCK does, for every call in every state.

The kernel's results are in ``tests/af_vsock.txt``.  Those of a plain unix socket are compared with
them in ``tests/supervisor/test_answers.py``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket as stdlib
import struct
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import answers
import vsockets
from answers import Cell
from vsockets import AF_VSOCK, VMADDR_CID_ANY, VMADDR_CID_LOCAL, VMADDR_PORT_ANY
from vsockets.model.constants import SO_VM_SOCKETS_CONNECT_TIMEOUT_OLD as CONNECT_TIMEOUT_SECONDS
from vsockets.testing import PrivateFabric

ANY = (VMADDR_CID_ANY, VMADDR_PORT_ANY)
TYPES = {
    "stream": stdlib.SOCK_STREAM,
    "seqpacket": stdlib.SOCK_SEQPACKET,
    "dgram": stdlib.SOCK_DGRAM,
}
MSG_ERRQUEUE = 0x2000


class Scene:
    """A socket in some state, with its peer and a destination."""

    def __init__(self, type_: int) -> None:
        self.type = type_
        self._open = contextlib.ExitStack()
        self.sock = self.make()
        self.peer: Any = None
        self.far: tuple[int, int] = ANY

    def make(self) -> Any:
        return self._open.enter_context(vsockets.socket(type=self.type))

    def close(self) -> None:
        self._open.close()

    def listen(self, sock: Any = None) -> Any:
        listener = self.make() if sock is None else sock
        listener.bind(ANY)
        listener.listen(4)
        return listener

    def connect_to(self, listener: Any, sock: Any = None) -> None:
        self.far = (VMADDR_CID_LOCAL, listener.getsockname()[1])
        (sock or self.sock).connect(self.far)

    def establish(self) -> None:
        listener = self.make() if self.type == stdlib.SOCK_DGRAM else self.listen()
        if self.type == stdlib.SOCK_DGRAM:
            listener.bind(ANY)
        self.connect_to(listener)
        self.peer = listener
        if self.type != stdlib.SOCK_DGRAM:
            self.peer = self._open.enter_context(listener.accept()[0])

    def have_data(self) -> None:
        if self.type == stdlib.SOCK_DGRAM:
            self.peer.sendto(b"data", self.sock.getsockname())
        else:
            self.peer.send(b"data")

    def refuse(self, state: str) -> None:
        with self.make() as unused:
            unused.bind(ANY)
            self.far = (VMADDR_CID_LOCAL, unused.getsockname()[1])
        self.sock.setblocking(state == "refused")
        assert self.sock.connect_ex(self.far) in (errno.ECONNRESET, errno.EINPROGRESS)
        if state != "refused":
            assert select.select([], [self.sock], [], 10)[1]
        if state == "refused-asked":
            self.sock.getsockopt(stdlib.SOL_SOCKET, stdlib.SO_ERROR)

    def bring_to(self, state: str) -> None:
        if state == "bound":
            self.sock.bind(ANY)
        elif state in ("listening", "waiting"):
            self.listen(self.sock)
            if state == "waiting":
                self.connect_to(self.sock, self.make())
                assert select.select([self.sock], [], [], 10)[0]
        elif state.startswith("refused"):
            self.refuse(state)
        elif state != "new":
            self.establish()
        if state in ("data", "peer-closed-data"):
            self.have_data()
        if state.startswith("peer-closed"):
            self.peer.close()
            if self.type != stdlib.SOCK_DGRAM:  # vsockd closes it as well
                poll = select.poll()
                poll.register(self.sock, select.POLLRDHUP)
                assert poll.poll(10_000)
        if state.startswith("peer-shut"):
            self.peer.shutdown(HOW[state.removeprefix("peer-")])
        if state in HOW:
            self.sock.shutdown(HOW[state])
        self.sock.setblocking(False)
        if self.far == ANY or state.startswith("refused"):
            if self.type == stdlib.SOCK_DGRAM:
                with self.make() as unused:
                    unused.bind(ANY)
                    self.far = (VMADDR_CID_LOCAL, unused.getsockname()[1])
            else:
                self.far = (VMADDR_CID_LOCAL, self.listen().getsockname()[1])


HOW = {"shut-rd": stdlib.SHUT_RD, "shut-wr": stdlib.SHUT_WR, "shut-rdwr": stdlib.SHUT_RDWR}

Action = Callable[[Scene], Any]


def option(level: int, name: int) -> Action:
    return lambda s: s.sock.getsockopt(level, name)


def timeout(*fields: int) -> Action:
    value = struct.pack("=qq", *fields)
    return lambda s: s.sock.setsockopt(AF_VSOCK, CONNECT_TIMEOUT_SECONDS, value)


#: By the names that the C program gives the calls.
CALLS: dict[str, Action] = {
    "recv": lambda s: s.sock.recv(64),
    "recv MSG_PEEK": lambda s: s.sock.recv(64, stdlib.MSG_PEEK),
    "recv MSG_OOB": lambda s: s.sock.recvmsg(64, 0, stdlib.MSG_OOB)[0],
    "recv MSG_ERRQUEUE": lambda s: s.sock.recvmsg(64, 0, MSG_ERRQUEUE)[0],
    "recvfrom": lambda s: s.sock.recvfrom(64)[0],
    "recvmsg": lambda s: s.sock.recvmsg(64)[0],
    "send": lambda s: s.sock.send(b"text"),
    "send of 0 bytes": lambda s: s.sock.send(b""),
    "send MSG_OOB": lambda s: s.sock.send(b"text", stdlib.MSG_OOB),
    "sendto": lambda s: s.sock.sendto(b"text", s.far),
    "sendmsg": lambda s: s.sock.sendmsg([b"text"]),
    "sendmsg with an address": lambda s: s.sock.sendmsg([b"text"], [], 0, s.far),
    "connect": lambda s: s.sock.connect(s.far),
    "connect to any CID": lambda s: s.sock.connect((VMADDR_CID_ANY, s.far[1])),
    "connect to any port": lambda s: s.sock.connect((VMADDR_CID_LOCAL, VMADDR_PORT_ANY)),
    "bind": lambda s: s.sock.bind(ANY),
    "bind to a stranger's CID": lambda s: s.sock.bind((4_000_000_000, VMADDR_PORT_ANY)),
    "listen": lambda s: s.sock.listen(4),
    "accept": lambda s: s.sock.accept()[0].close(),
    "shutdown SHUT_RD": lambda s: s.sock.shutdown(stdlib.SHUT_RD),
    "shutdown SHUT_WR": lambda s: s.sock.shutdown(stdlib.SHUT_WR),
    "shutdown SHUT_RDWR": lambda s: s.sock.shutdown(stdlib.SHUT_RDWR),
    "shutdown 3": lambda s: s.sock.shutdown(3),
    "getpeername": lambda s: s.sock.getpeername(),
    "SO_ERROR": option(stdlib.SOL_SOCKET, stdlib.SO_ERROR),
    "SO_TYPE": option(stdlib.SOL_SOCKET, stdlib.SO_TYPE),
    "SO_DOMAIN": option(stdlib.SOL_SOCKET, stdlib.SO_DOMAIN),
    "SO_PROTOCOL": option(stdlib.SOL_SOCKET, stdlib.SO_PROTOCOL),
    "SO_ACCEPTCONN": option(stdlib.SOL_SOCKET, stdlib.SO_ACCEPTCONN),
    "connect timeout of 10^6 us": timeout(1, 1_000_000),
    "connect timeout of -1 us": timeout(1, -1),
    "connect timeout of -1 s": timeout(-1, 0),
    "connect timeout of 0": timeout(0, 0),
    "no such option": option(AF_VSOCK, 99),
    "setting no such option": lambda s: s.sock.setsockopt(AF_VSOCK, 99, bytes(8)),
    "a buffer size of 4 bytes": lambda s: s.sock.setsockopt(AF_VSOCK, 0, bytes(4)),
}

_NO_PORT = "a failed connect allocates no port here: the socket's state is unchanged"
_BY_PORT = "a datagram to an unbound port is refused; the kernel's VMCI drops it"
_FIRST = "the kernel checks for the end of the stream first"
#: Deviations of the fabric: types, call, states, result, reason.
DEVIATIONS = [
    ("stream seqpacket", "bind", "refused", "0", _NO_PORT),
    ("stream seqpacket", "bind to a stranger's CID", "refused", "EADDRNOTAVAIL", _NO_PORT),
    ("stream seqpacket", "listen", "refused", "EINVAL", _NO_PORT),
    ("stream seqpacket", "recv MSG_OOB", "peer-closed shut-rdwr", "EOPNOTSUPP", _FIRST),
    *(
        ("stream seqpacket", call, "peer-closed shut-rdwr", "EISCONN", _FIRST)
        for call in ("sendto", "sendmsg with an address")
    ),
    *(
        ("dgram", call, states, "ECONNREFUSED", _BY_PORT)
        for call, states in (
            ("sendto", "new bound peer-closed"),
            ("sendmsg with an address", "new bound peer-closed"),
            ("send", "peer-closed"),
            ("send of 0 bytes", "peer-closed"),
            ("send MSG_OOB", "peer-closed"),
            ("sendmsg", "peer-closed"),
        )
    ),
]


def expected() -> dict[Cell, str]:
    """Return the table with the results that Python reports."""
    found = {}
    for cell, result in answers.read_table().items():
        if cell.call not in CALLS:
            continue
        first, *rest = result.split()
        if cell.call.startswith("SO_"):
            first = rest[0]
        elif cell.call in ("accept", "getpeername") and not first.startswith("E"):
            first = "0"
        found[cell] = first
    return found


def answer(action: Action, scene: Scene) -> str:
    try:
        result = action(scene)
    except OSError as error:
        code = error.errno or 0
        return "EOPNOTSUPP" if code == errno.EOPNOTSUPP else errno.errorcode[code]
    if result is None or isinstance(result, tuple):
        return "0"
    if isinstance(result, bytes):
        return str(len(result))
    return errno.errorcode[result] if action is CALLS["SO_ERROR"] and result else str(result)


@pytest.fixture(autouse=True)
def in_a_guest(vsock_fabric: PrivateFabric, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("VSOCKETS_CONTEXT", str(vsock_fabric.guest().folder))
    vsockets.attachment.current.cache_clear()
    yield
    vsockets.attachment.current.cache_clear()


@pytest.mark.parametrize("kind", TYPES)
def test_results_match_the_kernel(kind: str) -> None:
    wanted = {cell: result for cell, result in expected().items() if cell.kind == kind}
    wanted = {cell: result for cell, result in wanted.items() if cell.state != "connecting"}
    found = {}
    for cell in wanted:
        scene = Scene(TYPES[kind])
        with contextlib.closing(scene):
            scene.bring_to(cell.state)
            found[cell] = answer(CALLS[cell.call], scene)
    for kinds, call, states, result, _ in DEVIATIONS:
        if kind in kinds.split():
            wanted.update({Cell(kind, call, state): result for state in states.split()})
    assert answers.differences(wanted, found) == {}


@pytest.mark.parametrize("kind", ["stream", "seqpacket"])
def test_results_while_connecting(kind: str, vsock_fabric: PrivateFabric) -> None:
    wanted = {
        cell._replace(kind=kind): result
        for cell, result in expected().items()
        if cell.state == "connecting" and cell.call != "SO_TYPE"
    }
    found = {}
    for cell in wanted:
        scene = Scene(TYPES[kind])
        with contextlib.closing(scene):
            scene.sock.setblocking(False)
            scene.far = (VMADDR_CID_LOCAL, 5000)
            os.kill(vsock_fabric.pid, signal.SIGSTOP)
            try:
                assert scene.sock.connect_ex(scene.far) == errno.EINPROGRESS
                found[cell] = answer(CALLS[cell.call], scene)
            finally:
                os.kill(vsock_fabric.pid, signal.SIGCONT)
    assert answers.differences(wanted, found) == {}
