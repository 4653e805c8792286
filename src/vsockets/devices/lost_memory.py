"""The end of a device whose guest's memory has been taken away.

A monitor can truncate the file that it shared as its guest's memory.  The next access is a bus
error then, at any line that reads or writes guest memory.  Python's own signal handlers run after
the instruction that was interrupted, and this one never ends; so the handler is one of C's.
"""

from __future__ import annotations

import ctypes
import os
import signal

_TEXT = (
    b"vsock device: the guest's memory cannot be accessed (SIGBUS): the virtual machine's monitor"
    b" has truncated its file; the device ends\n"
)
_STDERR = 2

#: As a program in a shell that was killed by the signal.
STATUS = 128 + signal.SIGBUS

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _end(number: int) -> None:
    # The interrupted access copies bytes and changes no object, so Python can run.
    os.write(_STDERR, _TEXT)
    os._exit(STATUS)


_HANDLER = _Handler(_end)


def explain_lost_memory() -> None:
    """End this process with one line on standard error at the first bus error.

    To be called before :func:`.sandbox.enter_sandbox`, which refuses executable memory.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGBUS, _HANDLER)
