"""Assembler of classic BPF for seccomp filters (``linux/filter.h``, ``linux/seccomp.h``).

A program reads 32-bit words of ``struct seccomp_data`` and returns an action.  An argument of the
system call has 64 bits: its lower 32 are at ``ARGUMENTS + 8 * index``, its upper 32 four bytes
later, on the little-endian machines that vSockets supports.
"""

from __future__ import annotations

import struct

#: Operation codes: load a word into the accumulator, compare the accumulator, return.
LOAD, RETURN = 0x20, 0x06
IF_EQUAL, IF_AT_LEAST, IF_ANY_BIT = 0x15, 0x35, 0x45
#: The longest jump, in instructions: its field has one byte.
LAST_JUMP = 255

#: Offsets in struct seccomp_data.
NUMBER, ARCHITECTURE, ARGUMENTS = 0, 4, 16

#: Actions.  The lower 16 bits of TRACE and TRAP are data for the tracer.
ALLOW = 0x7FFF_0000
TRACE = 0x7FF0_0000
NOTIFY = 0x7FC0_0000
TRAP = 0x0003_0000
KILL_PROCESS = 0x8000_0000
_FAIL = 0x0005_0000  # SECCOMP_RET_ERRNO

#: Arguments of prctl(2) and seccomp(2).
PR_SET_NO_NEW_PRIVS = 38
SET_MODE_FILTER = 1

#: struct sock_fprog: the number of instructions and their address.
SOCK_FPROG = struct.Struct("@HP")
_INSTRUCTION = struct.Struct("=HBBI")
INSTRUCTION_SIZE = _INSTRUCTION.size


def refuse(errno: int) -> int:
    """Return the action that fails a system call with ``errno``."""
    return _FAIL | errno


def instruction(code: int, constant: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """Encode one instruction; ``if_true`` and ``if_false`` are numbers of instructions to skip."""
    return _INSTRUCTION.pack(code, if_true, if_false, constant)
