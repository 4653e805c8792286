"""Other processes' sockets: which process has one, and a copy of its descriptor."""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import os
from collections.abc import Iterator
from socket import AF_UNIX, SOCK_STREAM

_PIDFD_GETFD = 438  # the same on every architecture
_syscall = ctypes.CDLL(None, use_errno=True).syscall


@contextlib.contextmanager
def opened(pid: int) -> Iterator[int]:
    """Yield a pidfd of process ``pid``."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the descriptors of process ``pid`` and their inodes; 0 for one that is no socket."""
    folder = f"/proc/{pid}/fd/"
    for entry in os.listdir(folder):
        try:
            name = os.readlink(folder + entry)
        except FileNotFoundError:
            continue  # it has been closed since
        is_socket = name.startswith("socket:[")
        yield int(entry), int(name[len("socket:[") : -1]) if is_socket else 0


@contextlib.contextmanager
def copied(pidfd: int, fd: int) -> Iterator[_socket.socket]:
    """Yield a copy of descriptor ``fd`` of another process."""
    copy = _syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # Whatever it is: asking the kernel for family and type would take as long as the rest.
    sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, copy)
    try:
        yield sock
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # it has ended by itself in the meantime
            raise
    finally:
        sock.close()


def processes() -> list[int]:
    """Return the numbers of all processes."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
