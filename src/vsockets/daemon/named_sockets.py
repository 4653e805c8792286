"""Sockets of programs that vsockd reaches by name, without having them open.

A socket is bound to a name in a folder that only vsockd can enter; vsockd keeps an O_PATH
descriptor of the name and unlinks it.  From then on only vsockd can connect to the socket.
"""

from __future__ import annotations

import _socket
import errno
import functools
import os
from dataclasses import dataclass
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM

from ..fabric import Refused


def bind_to_name(sock: _socket.socket, name: str) -> int:
    """Bind ``sock`` in the current directory; return an O_PATH descriptor of the name.

    Raises Refused with EINVAL if the socket is bound already, or with another errno, such as ENOSPC
    or EMFILE, if the host lacks a resource.
    """
    try:
        sock.bind(name)
        try:
            return os.open(name, os.O_PATH | os.O_CLOEXEC)
        finally:
            os.unlink(name)
    except OSError as error:
        reason = f"cannot bind the socket: {error.strerror}"
        raise Refused(error.errno or errno.EINVAL, reason) from None


@dataclass(slots=True, eq=False)
class NamedSocket:
    """A program's socket, reachable through its name; vsockd does not have it open."""

    name: str  #: the socket's name in the folder that only vsockd can enter
    node: int  #: an O_PATH descriptor of ``name``

    @property
    def path(self) -> str:
        """Path to connect to the program's socket."""
        return f"/proc/self/fd/{self.node}"

    def connect(self, sock: _socket.socket) -> None:
        """Connect ``sock`` to the program's socket.

        Raises ConnectionRefusedError when no process has the program's socket open.
        """
        sock.connect(self.path)

    def is_open(self, other_type: int = SOCK_STREAM) -> bool:
        """Return whether any process has the program's socket open.

        ``other_type`` is any type that the program's socket does not have, so that the probe's
        connect always fails: with an errno for an open socket, another for a closed one.
        """
        # The kernel looks up the socket before it compares the types.
        return probe_of(int(other_type)).connect_ex(self.path) == errno.EPROTOTYPE

    def close(self) -> None:
        """Close the path to the socket."""
        os.close(self.node)


@functools.cache
def probe_of(type_: int) -> _socket.socket:
    """Return a socket of a type for probing: its connects fail and leave it unchanged."""
    return _socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC)
