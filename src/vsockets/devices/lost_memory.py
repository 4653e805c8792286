"""Exit of a device whose guest memory has been taken away.

A monitor can truncate the file that backs its guest's memory.  The next access to guest memory
then raises SIGBUS, in any line of the device.  A signal handler of Python runs only after the
interrupted instruction, which never ends; so the handler is a C function.
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

#: Exit status, as a shell reports a program that was killed by the signal.
STATUS = 128 + signal.SIGBUS

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _end(number: int) -> None:
    # The interrupted access copies bytes and changes no object, so Python can run.
    os.write(_STDERR, _TEXT)
    os._exit(STATUS)


_HANDLER = _Handler(_end)


def explain_lost_memory() -> None:
    """Exit with one line on standard error at the first bus error.

    Call it before :func:`.sandbox.enter_sandbox`, which refuses executable memory.
    """
    libc = ctypes.CDLL(None)
    libc.signal.argtypes = (ctypes.c_int, _Handler)
    libc.signal.restype = ctypes.c_void_p
    libc.signal(signal.SIGBUS, _HANDLER)
