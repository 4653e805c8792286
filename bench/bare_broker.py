"""The lower bound of a broker in Python: the system calls of a brokered connect alone.

Like vsockd, it accepts, gets the peer's credentials, reads the request, registers the stream in an
epoll instance to detect its end, answers, hands the descriptor off and closes its copy.  It parses,
decides and records nothing, and its client and server are plain sockets.  The difference to
vsockd's figures is the cost of the Python code of vsockd and the library.
"""

from __future__ import annotations

import _socket
import array
import select
import socket
from itertools import count
from socket import AF_UNIX, CMSG_LEN, SCM_RIGHTS, SO_PEERCRED, SOCK_STREAM, SOL_SOCKET
from typing import NoReturn

from vsockets.attachment import wait_readable
from vsockets.daemon.stream_liveness import Group
from vsockets.limits import CONNECT_TIMEOUT_SECONDS
from vsockets.protocol import RECORD_SIZE, REQUEST_SIZE

_REQUEST, _RECORD = bytes(REQUEST_SIZE), bytes(RECORD_SIZE)
_UCRED_SIZE = 12
_SO_COOKIE, _COOKIE_SIZE = 57, 8


class Service:
    """The service's link to the broker, with ``accept()`` as of a listening socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def accept(self) -> tuple[socket.socket, None]:
        """Wait for a connection and return it."""
        _, ancillary, _, _ = self._link.recvmsg(RECORD_SIZE, CMSG_LEN(4))
        return socket.socket(AF_UNIX, SOCK_STREAM, 0, array.array("i", ancillary[0][2])[0]), None


def connect(sock: socket.socket, path: str) -> None:
    """Connect to the service through the broker at ``path``."""
    sock.getsockopt(SOL_SOCKET, _SO_COOKIE, _COOKIE_SIZE)
    sock.connect(path)
    sock.send(_REQUEST)
    wait_readable(sock.fileno(), CONNECT_TIMEOUT_SECONDS)
    sock.recv(RECORD_SIZE)


def serve(listener: socket.socket, service: socket.socket) -> NoReturn:
    """Hand every connection to ``listener`` off to ``service``."""
    epoll, watch, numbers = select.epoll(), Group(), count(1)
    epoll.register(listener, select.EPOLLIN)
    while True:
        epoll.poll()
        fd, _ = listener._accept()  # type: ignore[attr-defined]
        sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, fd)
        sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED_SIZE)
        sock.recv(REQUEST_SIZE)
        watch.add(fd, next(numbers))
        sock.send(_RECORD)
        rights = array.array("i", (fd,))
        service.sendmsg((_RECORD,), ((SOL_SOCKET, SCM_RIGHTS, rights),))
        sock.close()
