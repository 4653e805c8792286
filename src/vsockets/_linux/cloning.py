"""A child process that shares the descriptors of this one (clone(2) with CLONE_FILES)."""

from __future__ import annotations

import ctypes
import os
import platform
import signal

from .libc import end_with_parent, last_error

_CLONE_FILES = 0x400
_CLONE = {"x86_64": 56, "aarch64": 220}
# Calls that keep the GIL, as fork(2) does in the interpreter.
_syscall = ctypes.PyDLL(None, use_errno=True).syscall


def can_share_descriptors() -> bool:
    """Return whether :func:`clone_sharing_descriptors` works on this architecture."""
    return platform.machine() in _CLONE


def clone_sharing_descriptors() -> int:
    """Fork; parent and child have one table of descriptors.  Return 0 in the child, else its pid.

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
