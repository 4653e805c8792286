"""Asking vsockd without waiting for it."""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import os
import time
from socket import (
    AF_UNIX,
    CMSG_LEN,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_RIGHTS,
    SOCK_CLOEXEC,
    SOCK_SEQPACKET,
    SOL_SOCKET,
)

from ..attachment import Attachment, descriptor_in, understand
from ..limits import REQUEST_TIMEOUT
from ..state_folder import SEQPACKET, STREAM
from ..wire import RECORD_SIZE, Record, Request
from .sockets import Endpoint
from .waiting import ready

_SO_COOKIE = 57
SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TAKE = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
_ONE_DESCRIPTOR = CMSG_LEN(array.array("i").itemsize)


class Vsockd:
    """The vsockd of a context."""

    def __init__(self, context: Attachment) -> None:
        self._context = context

    def enter(self, endpoint: Endpoint, sock: _socket.socket) -> None:
        """Connect a program's socket to the control socket of its type, once."""
        if not endpoint.entered:
            self._context.enter(sock.connect, endpoint.type)
            endpoint.entered = True

    async def ask_on(self, endpoint: Endpoint, sock: _socket.socket, request: Request) -> Record:
        """One question on the socket's own connection; OSError as vsockd answers.

        What the program does with its socket meanwhile can only make the answer get lost.
        """
        self.enter(endpoint, sock)
        sock.send(request.encode(), SEND)
        return (await receive_record(sock))[0]

    async def ask(self, request: Request, fd: int | None = None) -> tuple[Record, int | None]:
        """One question on a connection of our own, with a descriptor if need be.

        Returns the answer and the descriptor that came with it.
        """
        sock = _socket.socket(AF_UNIX, SOCK_SEQPACKET | SOCK_CLOEXEC)
        with contextlib.closing(sock):
            self._context.enter(sock.connect, SOCK_SEQPACKET)
            ancillary = []
            if fd is not None:
                ancillary = [(SOL_SOCKET, SCM_RIGHTS, array.array("i", [fd]))]
            sock.sendmsg([request.encode()], ancillary, SEND)
            return await receive_record(sock)


async def receive_record(
    sock: _socket.socket, seconds: float = REQUEST_TIMEOUT
) -> tuple[Record, int | None]:
    """vsockd's answer, and the descriptor that came with it; OSError ETIMEDOUT."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            return take_record(sock)
        except BlockingIOError:
            if not await ready(sock.fileno(), max(0.0, deadline - time.monotonic())):
                raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None


def take_record(sock: _socket.socket) -> tuple[Record, int | None]:
    """As :func:`receive_record`; OSError EAGAIN when there is nothing yet."""
    data, came, _, _ = sock.recvmsg(RECORD_SIZE, _ONE_DESCRIPTOR, _TAKE)
    return understand(data), descriptor_in(came)


def cookie_of(sock: _socket.socket) -> int:
    """The kernel's number for a socket; never used twice."""
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, _SO_COOKIE, 8), "little")


def is_control_socket(sock: _socket.socket) -> bool:
    """Whether a unix socket is, or was before it became a stream, connected to a vsockd."""
    for name_of in (sock.getpeername, sock.getsockname):
        with contextlib.suppress(OSError):
            name = name_of()
            if isinstance(name, str) and os.path.basename(name) in (STREAM, SEQPACKET):
                return True
    return False
