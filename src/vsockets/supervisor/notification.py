"""seccomp's user notification: system calls that wait for somebody else's answer.

``seccomp_unotify(2)`` has the whole of it.  One descriptor tells of the calls of every process
under the filter, and takes the answers.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
from typing import NamedTuple

from .arch import Architecture

# struct seccomp_notif: id, pid, flags; then struct seccomp_data: number, architecture,
# instruction pointer, six arguments.
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADD_DESCRIPTOR = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")

# ioctls of the listener, linux/seccomp.h.
_RECEIVE, _SEND, _IS_VALID, _ADD = 0xC050_2100, 0xC018_2101, 0x4008_2102, 0xC018_2103
_SET_FLAGS = 0x4008_2104
_SYNCHRONOUS_WAKE_UP = 1

_CONTINUE = 1
_ADD_AND_ANSWER = 2

_SET_MODE_FILTER = 1
_NEW_LISTENER = 8
_PR_SET_NO_NEW_PRIVS = 38


class Notification(NamedTuple):
    """One system call that waits."""

    id: int
    pid: int  #: of the thread, as this process's pid namespace knows it; 0 if it does not
    number: int
    architecture: int
    instruction: int  #: where in the program the call is
    arguments: tuple[int, ...]


class Gone(Exception):
    """The call does not wait any more: a signal interrupted it, or its process has ended."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(machine: Architecture, program: bytes) -> int:
    """Put this process under a filter, for good; returns the listener's descriptor.

    Raises OSError: EBUSY when a filter with a listener holds already, EINVAL or ENOSYS when the
    kernel cannot do it.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    length = len(program) // 8
    argument = ctypes.byref(_Program(length, program))

    def attempt() -> int:
        result: int = libc.syscall(machine.seccomp, _SET_MODE_FILTER, _NEW_LISTENER, argument)
        return result

    # Who has no privilege must first promise never to get any.
    listener = attempt()
    if listener < 0 and ctypes.get_errno() == errno.EACCES:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = attempt()
    if listener < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return listener


class Listener:
    """The supervisor's end.  Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray(_NOTIFICATION.size)
        self._empty = bytes(_NOTIFICATION.size)
        with contextlib.suppress(OSError):  # Linux 6.6: hand the processor over, and get it back
            fcntl.ioctl(fd, _SET_FLAGS, _SYNCHRONOUS_WAKE_UP)

    def fileno(self) -> int:
        """The descriptor: readable when a call waits, hung up when no process is left."""
        return self._fd

    def receive(self) -> Notification:
        """The next call; Gone when it was interrupted in the meantime.  Blocks without one."""
        self._buffer[:] = self._empty  # the kernel insists
        try:
            fcntl.ioctl(self._fd, _RECEIVE, self._buffer)
        except FileNotFoundError:
            raise Gone from None
        id_, pid, _, number, architecture, instruction, *arguments = _NOTIFICATION.unpack(
            self._buffer
        )
        return Notification(id_, pid, number, architecture, instruction, tuple(arguments))

    def is_valid(self, id_: int) -> bool:
        """Whether the call still waits.  True after a look at its process means that it was
        that process which was looked at.
        """
        try:
            fcntl.ioctl(self._fd, _IS_VALID, _ID.pack(id_))
        except FileNotFoundError:
            return False
        return True

    def answer(self, id_: int, value: int) -> None:
        """Let the call return ``value``, or fail when it is a negative errno.  Raises Gone."""
        response = (id_, 0, value, 0) if value < 0 else (id_, value, 0, 0)
        self._respond(_RESPONSE.pack(*response))

    def let_through(self, id_: int) -> None:
        """Let the kernel perform the call.

        Its arguments in memory may have changed since they were looked at; never do this to a
        call that must not happen.  Raises Gone.
        """
        self._respond(_RESPONSE.pack(id_, 0, 0, _CONTINUE))

    def answer_with_descriptor(self, id_: int, fd: int, close_on_exec: bool) -> int:
        """Give the process a copy of ``fd`` and let the call return its number, in one step.

        The number is the lowest free one.  Raises Gone, or OSError EMFILE.
        """
        return self._add(id_, fd, close_on_exec, _ADD_AND_ANSWER)

    def add_descriptor(self, id_: int, fd: int, close_on_exec: bool) -> int:
        """As :meth:`answer_with_descriptor`, but the call waits on; returns the number."""
        return self._add(id_, fd, close_on_exec, 0)

    def _add(self, id_: int, fd: int, close_on_exec: bool, flags: int) -> int:
        request = _ADD_DESCRIPTOR.pack(id_, flags, fd, 0, os.O_CLOEXEC if close_on_exec else 0)
        try:
            added: int = fcntl.ioctl(self._fd, _ADD, bytearray(request))
        except (FileNotFoundError, ProcessLookupError):
            # ESRCH: a signal interrupted the call just while the descriptor was being added.
            raise Gone from None
        return added

    def _respond(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self._fd, _SEND, bytearray(response))
        except FileNotFoundError:
            raise Gone from None

    def close(self) -> None:
        """Every intercepted call fails with ENOSYS from now on."""
        os.close(self._fd)
