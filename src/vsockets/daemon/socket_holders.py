"""Sockets of other processes: find the descriptor, and duplicate it."""

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
def open_pidfd(pid: int) -> Iterator[int]:
    """Yield a pidfd of process ``pid``."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Yield the descriptors of process ``pid`` and their inodes, 0 for one that is not a socket."""
    folder = f"/proc/{pid}/fd/"
    for entry in os.listdir(folder):
        try:
            name = os.readlink(folder + entry)
        except FileNotFoundError:
            continue  # it has just been closed
        is_socket = name.startswith("socket:[")
        yield int(entry), int(name[len("socket:[") : -1]) if is_socket else 0


@contextlib.contextmanager
def duplicate(pidfd: int, fd: int) -> Iterator[_socket.socket]:
    """Yield a duplicate of descriptor ``fd`` of another process."""
    copy = _syscall(_PIDFD_GETFD, pidfd, fd, 0)
    if copy < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    # With any family and type: asking the kernel for them would take as long as all the rest.
    sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, copy)
    try:
        yield sock
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the stream has just ended
            raise
    finally:
        sock.close()


def process_ids() -> list[int]:
    """Return all process ids."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]
