"""The C library, for calls that Python does not offer.

``libc.NAME`` is shared by the whole process, so its ``argtypes`` and ``restype`` must not be set.
A caller that needs them set uses ``libc["NAME"]``, a new function object at each access.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import signal
from collections.abc import Iterator

libc = ctypes.CDLL(None, use_errno=True)

_PR_SET_PDEATHSIG = 1  # prctl(2)


def last_error() -> OSError:
    """Return the OSError for the errno of this thread's last call of the C library."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def check(result: int) -> int:
    """Return ``result``, the result of a function of the C library.

    Raises OSError with the C library's errno if ``result`` is negative.
    """
    if result < 0:
        raise last_error()
    return result


def end_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process the signal ``number`` when its parent's thread ends.

    A parent that has ended before the call is not noticed.

    Raises OSError.
    """
    check(libc.prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0))


class EpollEvent(ctypes.Structure):
    """``struct epoll_event``.

    The standard library's epoll can report only descriptor numbers; epoll(7) can report any 64-bit
    number that was given when the descriptor was registered.
    """

    # The kernel packs the structure on x86-64 only, to match that of 32-bit programs.
    if platform.machine() in ("x86_64", "AMD64"):
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))


@contextlib.contextmanager
def interrupted_by(number: int) -> Iterator[None]:
    """During the with block, have the signal ``number`` interrupt system calls and do nothing else.

    A handler of Python does more: it runs between two bytecode instructions, and the signal is
    written to the descriptor of :func:`signal.set_wakeup_fd`, which wakes an event loop.
    """
    set_handler = libc["signal"]
    set_handler.argtypes = (ctypes.c_int, ctypes.c_void_p)
    set_handler.restype = ctypes.c_void_p
    # abs(3) has a handler's parameter and no effect.
    old = set_handler(number, ctypes.cast(libc.abs, ctypes.c_void_p))
    try:
        signal.siginterrupt(number, True)
        yield
    finally:
        set_handler(number, old)
        signal.siginterrupt(number, True)
