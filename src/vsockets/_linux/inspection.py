"""Inspection of sockets, and of other processes' descriptors and capabilities."""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import fcntl
import os
from collections.abc import Iterator
from socket import AF_UNIX, SOCK_STREAM
from termios import TIOCOUTQ  # the same ioctl as SIOCOUTQ

from .libc import check, libc

SYS_PIDFD_GETFD = 438  # the same on every architecture
_SOCKET_PREFIX = "socket:["


def unread_bytes(fd: int) -> int:
    """Return the number of bytes sent on the unix socket ``fd`` that the peer has not read yet.

    The number includes the kernel's overhead for each message.
    """
    answer = array.array("i", [0])
    fcntl.ioctl(fd, TIOCOUTQ, answer)
    return answer[0]


def socket_inode(link: str) -> int:
    """Return the inode in ``link``, the target of a link in ``/proc/PID/fd``; 0 if no socket."""
    return int(link[len(_SOCKET_PREFIX) : -1]) if link.startswith(_SOCKET_PREFIX) else 0


def process_ids() -> list[int]:
    """Return the ids of all processes in ``/proc``."""
    return [int(entry) for entry in os.listdir("/proc") if entry.isdecimal()]


def sockets_of(pid: int) -> Iterator[tuple[int, int]]:
    """Yield (descriptor, inode) for each descriptor of process ``pid``; inode 0 for no socket.

    Raises OSError if the process has ended or may not be inspected.
    """
    folder = f"/proc/{pid}/fd/"
    with os.scandir(folder) as entries:  # not listdir(), which takes long if there are very many
        for entry in entries:
            try:
                link = os.readlink(folder + entry.name)
            except FileNotFoundError:
                continue  # closed since
            yield int(entry.name), socket_inode(link)


def descriptor_count(pid: int) -> int:
    """Return the number of descriptors that process ``pid`` has open.

    Returns 0 if the process has ended, and before Linux 6.2.
    """
    try:
        return os.stat(f"/proc/{pid}/fd").st_size
    except OSError:
        return 0


@contextlib.contextmanager
def open_pidfd(pid: int) -> Iterator[int]:
    """Open a pidfd of process ``pid`` and close it after the with block.

    Raises OSError(ESRCH) if the process has ended.
    """
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def duplicate_descriptor(pidfd: int, fd: int) -> int:
    """Return a duplicate of descriptor ``fd`` of the process that ``pidfd`` refers to.

    Raises OSError(EPERM) if the process may not be examined, OSError(EBADF) if ``fd`` is not open.
    """
    return check(libc.syscall(SYS_PIDFD_GETFD, pidfd, fd, 0))


@contextlib.contextmanager
def duplicate(pidfd: int, fd: int) -> Iterator[_socket.socket]:
    """Yield a duplicate of socket ``fd`` of the process that ``pidfd`` refers to.

    An OSError(ENOTCONN) in the with block ends the block without an error: the stream has ended.

    Raises OSError as :func:`duplicate_descriptor`.
    """
    # The socket object gets any family and type: asking the kernel for the real ones would double
    # the cost, and no caller needs them.
    sock = _socket.socket(AF_UNIX, SOCK_STREAM, 0, duplicate_descriptor(pidfd, fd))
    try:
        yield sock
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # the stream has ended in the meantime
            raise
    finally:
        sock.close()


def effective_capabilities(status: bytes) -> int:
    """Return the effective capabilities in the text of ``/proc/PID/status``, as a bit mask."""
    return int(status_field(status, b"CapEff"), 16)


def status_field(status: bytes, name: bytes) -> bytes:
    """Return the value of the field ``name`` in ``status``, the text of ``/proc/PID/status``."""
    return status.partition(b"\n" + name + b":")[2].partition(b"\n")[0]


def open_descriptors() -> set[int]:
    """Return the numbers of this process's open descriptors."""
    found = [int(name) for name in os.listdir("/proc/self/fd")]
    # One that listing them has taken is closed now.
    return {fd for fd in found if os.path.lexists(f"/proc/self/fd/{fd}")}
