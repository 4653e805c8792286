"""Sockets of programs that vsockd reaches by name, without having them open.

A socket is bound to a name in a folder that only vsockd can enter; vsockd keeps an O_PATH
descriptor of the name and unlinks it.  From then on only vsockd can connect to the socket.
"""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import os
import re
from dataclasses import dataclass
from socket import AF_UNIX, SOCK_CLOEXEC, SOCK_STREAM

from ..fabric import Refused

#: A name in the folder that only vsockd can enter.
_NAME = re.compile(r"[0-9a-f]{16}\.[0-9a-z.]+")

#: Names that a vsockd which was killed has left in the current directory.
_left_over: set[str] = set()
#: Nodes that a vsockd which was killed had opened for a request under way, by name.
_recovered: dict[str, int] = {}


def bind_to_name(sock: _socket.socket, name: str) -> tuple[str, int]:
    """Bind ``sock`` in the current directory; return its name, and an O_PATH descriptor of it.

    The name is another one if a vsockd that was killed has bound the socket for this request.

    Raises Refused with EINVAL if the socket is bound already, or with another errno, such as ENOSPC
    or EMFILE, if the host lacks a resource.
    """
    try:
        try:
            sock.bind(name)
        except OSError as error:
            if error.errno != errno.EINVAL or not (bound := _bound_before(sock)):
                raise
            name = bound
        if name in _recovered:
            return name, _recovered.pop(name)
        try:
            return name, os.open(name, os.O_PATH | os.O_CLOEXEC)
        finally:
            os.unlink(name)
    except OSError as error:
        reason = f"cannot bind the socket: {error.strerror}"
        raise Refused(error.errno or errno.EINVAL, reason) from None


def _bound_before(sock: _socket.socket) -> str:
    """Return the name that a vsockd which was killed has bound the socket to; "" without one."""
    name = sock.getsockname()
    if not isinstance(name, str) or not name or "/" in name:
        return ""
    return name if name in _recovered or name in _left_over else ""


def recover_node(fd: int) -> bool:
    """Keep ``fd`` for the request under way if it refers to a name; return whether it does."""
    path, deleted, _ = os.readlink(f"/proc/self/fd/{fd}").partition(" (deleted)")
    name = os.path.basename(path)
    if not deleted or not _NAME.fullmatch(name):
        return False
    _recovered[name] = fd
    return True


def recover_names() -> None:
    """Keep the names in the current directory for the request under way."""
    _left_over.update(name for name in os.listdir() if _NAME.fullmatch(name))


def close_recovered() -> None:
    """Close and remove the descriptors and names that the request under way has not used."""
    for fd in _recovered.values():
        os.close(fd)
    _recovered.clear()
    for name in _left_over:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
    _left_over.clear()


@dataclass(slots=True, eq=False)
class NamedSocket:
    """A program's socket, reachable through its name; vsockd does not have it open."""

    name: str  #: the socket's name in the folder that only vsockd can enter
    node: int  #: an O_PATH descriptor of ``name``; -1 once the path is closed

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
        self.node = -1  # the number is another descriptor's from now on


@functools.cache
def probe_of(type_: int) -> _socket.socket:
    """Return a socket of a type for probing: its connects fail and leave it unchanged."""
    return _socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC)
