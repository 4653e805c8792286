"""Sockets of programs that vsockd reaches by a name, without having them open.

A socket is bound to a name in a folder that only vsockd enters; a descriptor of the name is kept
and the name is unlinked.  From then on only vsockd can connect anything to the socket.
"""

from __future__ import annotations

import _socket
import errno
import functools
import os
from dataclasses import dataclass
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM, SOL_SOCKET

from ..fabric import Refused

_SO_COOKIE = 57


def cookie_of(sock: _socket.socket) -> int:
    """Return the kernel's number for a socket, which it never uses again."""
    return int.from_bytes(sock.getsockopt(SOL_SOCKET, _SO_COOKIE, 8), "little")


def bind_to_name(sock: _socket.socket, name: str) -> int:
    """Bind ``sock`` in the current directory; return an O_PATH descriptor of the name.

    Refused with EINVAL if the socket has a name already; ENOSPC, EMFILE and others are the host's.
    """
    try:
        sock.bind(name)
        try:
            return os.open(name, os.O_PATH | os.O_CLOEXEC)
        finally:
            os.unlink(name)
    except OSError as error:
        reason = f"the socket cannot be bound: {error}"
        raise Refused(error.errno or errno.EINVAL, reason) from None


@dataclass(slots=True, eq=False)
class NamedSocket:
    """What vsockd holds of a program's socket: not the socket, only a way to it."""

    name: str  #: what it was bound to, in the folder only vsockd enters
    node: int  #: an O_PATH descriptor of that name

    @property
    def path(self) -> str:
        """What a socket is connected to that shall be connected to the program's."""
        return f"/proc/self/fd/{self.node}"

    def connect(self, sock: _socket.socket) -> None:
        """Connect ``sock`` to the program's socket.  ECONNREFUSED once that is closed."""
        sock.connect(self.path)

    def is_open(self, other_type: int = SOCK_STREAM) -> bool:
        """Return whether any process still has the program's socket open.

        ``other_type`` is one that the socket does not have.
        """
        # The kernel looks the socket up first and compares the types after that.
        return probe_of(int(other_type)).connect_ex(self.path) == errno.EPROTOTYPE

    def close(self) -> None:
        """Give up the way to the socket."""
        os.close(self.node)


@functools.cache
def probe_of(type_: int) -> _socket.socket:
    """Return a socket whose connects fail, after which it is what it was."""
    return _socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC)
