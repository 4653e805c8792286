"""Takes AF_VSOCK away from this process and from every program it will ever start.

The tests are about the fabric.  A test that reached the kernel's AF_VSOCK by mistake would talk
to the hypervisor of the machine it runs on, or load a kernel module there.  So a seccomp filter
(``seccomp(2)``), which no process can take off again, refuses to make such sockets.

The filter answers SECCOMP_RET_TRACE, which fails the call with ENOSYS where there is no tracer,
and not SECCOMP_RET_ERRNO with EPERM: of several filters the kernel obeys the sternest answer,
and an ERRNO here would outrank the SECCOMP_RET_USER_NOTIF by which a supervisor, started by a
test, answers the same call of the program it supervises.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
from typing import NamedTuple

AF_VSOCK = 40


class _Machine(NamedTuple):
    architecture: int  #: AUDIT_ARCH_* of linux/audit.h
    seccomp: int  #: system call numbers
    socket: int
    socketpair: int


_MACHINES = {
    "x86_64": _Machine(0xC000003E, 317, 41, 53),
    "aarch64": _Machine(0xC00000B7, 277, 198, 199),
}
_IO_URING_SETUP = 425  # the same everywhere
_FIRST_X32_CALL = 0x4000_0000

# Offsets in struct seccomp_data; arguments are 64 bits, of which a family fills the lower 32.
_NUMBER, _ARCHITECTURE, _FIRST_ARGUMENT = 0, 4, 16

# Instructions of classic BPF: load a word, and compare with a constant.
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06

_ALLOW = 0x7FFF_0000
_REFUSE = 0x7FF0_0000  # SECCOMP_RET_TRACE

_SET_MODE_FILTER = 1
_FLAG_ALL_THREADS = 1  # SECCOMP_FILTER_FLAG_TSYNC
_PR_SET_NO_NEW_PRIVS = 38


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def _filter(machine: _Machine) -> bytes:
    def instruction(code: int, constant: int, if_so: int = 0, if_not: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_so, if_not, constant)

    # The two jump distances count the instructions to skip.
    return b"".join(
        (
            instruction(_LOAD, _ARCHITECTURE),
            instruction(_IF_EQUAL, machine.architecture, 0, 8),  # a 32-bit program gets nothing
            instruction(_LOAD, _NUMBER),
            instruction(_IF_AT_LEAST, _FIRST_X32_CALL, 6, 0),
            instruction(_IF_EQUAL, _IO_URING_SETUP, 5, 0),  # a ring makes sockets, unseen by us
            instruction(_IF_EQUAL, machine.socket, 1, 0),
            instruction(_IF_EQUAL, machine.socketpair, 0, 2),
            instruction(_LOAD, _FIRST_ARGUMENT),
            instruction(_IF_EQUAL, AF_VSOCK, 1, 0),
            instruction(_RETURN, _ALLOW),
            instruction(_RETURN, _REFUSE),
        )
    )


def install() -> None:
    """Install the filter, for all threads of this process and all its children to come."""
    machine = _MACHINES.get(platform.machine())
    if machine is None:
        raise NotImplementedError(f"no system call numbers for {platform.machine()}: add them here")
    libc = ctypes.CDLL(None, use_errno=True)
    instructions = _filter(machine)
    program = _Program(len(instructions) // 8, instructions)

    def set_filter() -> int:
        result: int = libc.syscall(
            machine.seccomp, _SET_MODE_FILTER, _FLAG_ALL_THREADS, ctypes.byref(program)
        )
        return result

    # Who has no privilege must first promise never to get any; root's tests go without that.
    if set_filter() != 0:
        libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        if set_filter() != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"seccomp: {os.strerror(code)}: not running without the filter")
