"""The bound of a broker in Python: the system calls that a connect through one needs, and no more.

As vsockd it accepts, asks the kernel who is there, reads the request, registers the stream in an
epoll so that its end is noticed, answers, hands the descriptor over and closes its copy.  But it
looks at nothing it reads, decides nothing and remembers nothing, and its client and its server are
plain sockets.  Beside it stands what vsockd's and the library's own Python costs.
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
    """Where the connections to a service arrive: ``accept()`` as of a listening socket."""

    def __init__(self, link: socket.socket) -> None:
        self._link = link

    def accept(self) -> tuple[socket.socket, None]:
        """Wait for a connection."""
        _, ancillary, _, _ = self._link.recvmsg(RECORD_SIZE, CMSG_LEN(4))
        return socket.socket(AF_UNIX, SOCK_STREAM, 0, array.array("i", ancillary[0][2])[0]), None


def connect(sock: socket.socket, path: str) -> None:
    """Be brokered to the service."""
    sock.getsockopt(SOL_SOCKET, _SO_COOKIE, _COOKIE_SIZE)
    sock.connect(path)
    sock.send(_REQUEST)
    wait_readable(sock.fileno(), CONNECT_TIMEOUT_SECONDS)
    sock.recv(RECORD_SIZE)


def serve(door: socket.socket, service: socket.socket) -> NoReturn:
    """Broker every connection to ``door``."""
    epoll, watch, numbers = select.epoll(), Group(), count(1)
    epoll.register(door, select.EPOLLIN)
    while True:
        epoll.poll()
        fd, _ = door._accept()  # type: ignore[attr-defined]
        sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, fd)
        sock.getsockopt(SOL_SOCKET, SO_PEERCRED, _UCRED_SIZE)
        sock.recv(REQUEST_SIZE)
        watch.add(fd, next(numbers))
        sock.send(_RECORD)
        rights = array.array("i", (fd,))
        service.sendmsg((_RECORD,), ((SOL_SOCKET, SCM_RIGHTS, rights),))
        sock.close()
