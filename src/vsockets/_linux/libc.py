"""The C library, for calls that Python does not offer.

``libc.NAME`` is one object for the whole process: leave its ``argtypes`` and ``restype`` alone.  A
caller that sets them takes a function object of its own, ``libc["NAME"]``.
"""

from __future__ import annotations

import ctypes
import os
import platform

libc = ctypes.CDLL(None, use_errno=True)


def last_error() -> OSError:
    """Return the error of the last call of this thread."""
    code = ctypes.get_errno()
    return OSError(code, os.strerror(code))


def check(result: int) -> int:
    """Return the result of a call.  Raises OSError if it is negative."""
    if result < 0:
        raise last_error()
    return result


class EpollEvent(ctypes.Structure):
    """``struct epoll_event``.

    The standard library's epoll reports descriptor numbers; epoll_ctl(2) reports any number.
    """

    # The kernel packs the structure on x86-64 only, to match that of 32-bit programs.
    if platform.machine() in ("x86_64", "AMD64"):
        _pack_ = 1
    _fields_ = (("events", ctypes.c_uint32), ("data", ctypes.c_uint64))
