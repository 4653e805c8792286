"""This process: limit of descriptors, service manager, and children that share descriptors."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import platform
import resource
import signal
import socket

from .libc import end_with_parent, last_error

_CLONE_FILES = 0x400
_CLONE = {"x86_64": 56, "aarch64": 220}
# Calls that keep the GIL, as fork(2) does in the interpreter.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall


def allow_many_descriptors() -> None:
    """Raise the soft limit of descriptors to the hard limit.

    For programs that hold descriptors for every client connection.  The usual soft limit of 1024
    exists for programs that call select().
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):  # a hard limit above fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def notify_ready() -> None:
    """Notify the service manager, if any, that this process is ready to serve clients.

    NOTIFY_SOCKET is removed from the environment, so that no child process notifies it as well.
    """
    address = os.environ.pop("NOTIFY_SOCKET", "")
    if not address:
        return
    if address[0] == "@":
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        try:
            manager.sendto(b"READY=1", address)
        except OSError as error:
            logging.warning("cannot notify the service manager: %s", error)


def can_share_descriptors() -> bool:
    """Return whether :func:`clone_sharing_descriptors` works on this architecture."""
    return platform.machine() in _CLONE


def clone_sharing_descriptors() -> int:
    """Fork, with one table of descriptors for both; return 0 in the child, else its pid.

    A descriptor that either of them opens or closes is opened or closed in both, and the
    descriptors stay open until both have ended.  The memory is copied, as by fork(2).  The child
    gets SIGKILL when this thread ends, which must be the only one of the process.

    Raises OSError if the kernel, or a seccomp filter, does not allow it.
    """
    api = ctypes.pythonapi
    parent = os.getpid()
    flags = ctypes.c_ulong(_CLONE_FILES | signal.SIGCHLD)
    api.PyOS_BeforeFork()
    # The C library's fork(3) cannot do this.  What it does beside the system call is not needed:
    # there are no other threads, whose locks would have to be released.
    pid: int = _syscall(ctypes.c_long(_CLONE[platform.machine()]), flags, 0, 0, 0, 0)
    if pid == 0:
        api.PyOS_AfterFork_Child()
        end_with_parent()
        if os.getppid() != parent:
            os._exit(1)
        return 0
    error = last_error() if pid < 0 else None
    api.PyOS_AfterFork_Parent()
    if error is not None:
        raise error
    return pid
