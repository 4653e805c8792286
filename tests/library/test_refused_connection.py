"""A vsockd that refuses a connection before its request: the program gets the errno it replied."""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import vsockets
from vsockets import Attachment
from vsockets.protocol import Record, client
from vsockets.state_folder import SEQPACKET, STREAM

NAMES = {socket.SOCK_STREAM: STREAM, socket.SOCK_SEQPACKET: SEQPACKET}


class Refusing(Attachment):
    """A context whose control sockets reply ENOBUFS and close every connection.

    ``before_request``: the connection is closed before the client sends its request, and otherwise
    after that, with the request unread.
    """

    def __init__(self, folder: Path, before_request: bool) -> None:
        super().__init__(folder)
        self.before_request = before_request
        self.listeners = {}
        for kind, name in NAMES.items():
            self.listeners[int(kind)] = listener = socket.socket(socket.AF_UNIX, kind)
            listener.bind(str(folder / name))
            listener.listen()

    def open_channel(self, sock: Any, kind: int, seconds: float = 0.0) -> float:
        left = super().open_channel(sock, kind, seconds)
        accepted, _ = self.listeners[kind].accept()
        accepted.send(Record(errno.ENOBUFS).encode())
        if self.before_request:
            accepted.close()
        else:
            threading.Thread(target=close_with_unread, args=(accepted,)).start()
        return left


def close_with_unread(sock: socket.socket) -> None:
    with sock:
        assert sock.recv(1, socket.MSG_PEEK)


@pytest.fixture(params=(True, False), ids=("before its request", "with its request unread"))
def context(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Refusing]:
    made = Refusing(tmp_path, request.param)
    yield made
    for listener in made.listeners.values():
        listener.close()


def connect_polling(sock: vsockets.socket) -> None:
    sock.setblocking(False)
    assert sock.connect_ex((2, 5000)) == errno.EINPROGRESS
    vsockets.attachment.wait_readable(sock.fileno(), 10)
    code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
    raise OSError(code, "SO_ERROR")


CALLS: dict[str, Callable[[vsockets.socket], object]] = {
    "connect": lambda sock: sock.connect((2, 5000)),
    "connect without blocking": connect_polling,
    "bind": lambda sock: sock.bind((-1, -1)),
}


@pytest.mark.parametrize("kind", NAMES, ids=("stream", "packets"))
@pytest.mark.parametrize("call", CALLS)
def test_the_errno_of_the_refusal_is_raised(context: Refusing, call: str, kind: int) -> None:
    with (
        vsockets.socket(type=kind, context=context) as sock,
        pytest.raises(OSError) as refusal,
    ):
        CALLS[call](sock)
    assert refusal.value.errno == errno.ENOBUFS


def test_a_request_on_a_connection_of_its_own(context: Refusing) -> None:
    with pytest.raises(OSError) as refusal:
        context.request(client.local_cid())
    assert refusal.value.errno == errno.ENOBUFS
