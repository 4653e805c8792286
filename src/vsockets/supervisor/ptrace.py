"""ptrace(2): requests that stop, inspect and resume threads of other processes.

A thread is *seized*, which does not stop it.  A seized thread stops when it is interrupted, before
a signal is delivered, and at the events selected by the options.  waitpid() reports each stop once;
the stop ends when the tracer resumes the thread.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from enum import IntEnum
from typing import NamedTuple

from .._linux.inspection import status_field
from .._linux.libc import libc
from .arch import Architecture

# linux/ptrace.h
_CONT, _STEP, _SYSCALL = 7, 9, 24
_DETACH = 17
_GETEVENTMSG, _GETSIGINFO = 0x4201, 0x4202
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_INTERRUPT, _LISTEN = 0x4207, 0x4208
#: The requests that begin to trace a process.
PTRACE_TRACEME, PTRACE_ATTACH, PTRACE_SEIZE = 0, 16, 0x4206
TRACING_REQUESTS = (PTRACE_TRACEME, PTRACE_ATTACH, PTRACE_SEIZE)
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B
_GET_SYSCALL_INFO = 0x420E

# linux/elf.h: sets of registers.
_GENERAL, _ARM_SYSTEM_CALL = 1, 0x404

#: The option that marks system call stops.
SYSTEM_CALL_STOPS = 1 << 0
#: Further options: trace new processes and threads, and report them as events, also programs
#: executed and calls that a filter traces; kill the tracees when the tracer ends.
_OPTIONS = SYSTEM_CALL_STOPS | 1 << 1 | 1 << 2 | 1 << 3 | 1 << 4 | 1 << 7 | 1 << 20

#: The option of waitpid() for threads of all kinds (__WALL).
WAIT_FOR_ALL = 0x4000_0000

_EVENT_SHIFT, _SYSTEM_CALL_STOP = 16, signal.SIGTRAP | 0x80

#: struct ptrace_syscall_info: kind, architecture, instruction, stack; then number and arguments,
#: or the result and whether it is an error.
_CALL_INFO = struct.Struct("=B3xIQQ7QI4x")
#: The beginning of siginfo_t: signal, errno, code; for SIGSYS then the call's address and number,
#: and the architecture.
_SIGNAL_INFO = struct.Struct("=iii4xQiI")
_SIGNAL_INFO_SIZE = 128
_SYS_SECCOMP = 1
_MASK = struct.Struct("=Q")
_ALL_SIGNALS = (1 << 64) - 1

#: The kernel's internal results of calls that a signal has interrupted and that are restarted: if
#: the signal has no handler, or one with SA_RESTART; always; if it has no handler.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND = 512, 513, 514
_RESTARTS = (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND)


class Event(IntEnum):
    """The reason of a stop: PTRACE_EVENT_* up to STOP, and further values of this module."""

    FORK = 1
    VFORK = 2
    CLONE = 3
    EXEC = 4
    SECCOMP = 7  #: before a system call that a filter traces
    STOP = 128  #: the thread was interrupted, is new, or continues after a group stop
    GROUP_STOP = 129  #: a signal has stopped its process; PTRACE_EVENT_STOP as well
    SIGNAL = 130  #: before a signal is delivered
    SYSTEM_CALL = 131  #: before or after a system call


class Stop(NamedTuple):
    """A stop of a thread."""

    event: Event
    signal: int = 0  #: of SIGNAL and GROUP_STOP


def read_stop(status: int) -> Stop:
    """Return the stop that a wait status reports of a seized thread."""
    number, event = os.WSTOPSIG(status), status >> _EVENT_SHIFT
    if event == Event.STOP:
        return Stop(Event.STOP) if number == signal.SIGTRAP else Stop(Event.GROUP_STOP, number)
    if event:
        return Stop(Event(event))
    if number == _SYSTEM_CALL_STOP:
        return Stop(Event.SYSTEM_CALL)
    return Stop(Event.SIGNAL, number)


class SystemCall(NamedTuple):
    """A system call that a thread is about to make."""

    number: int
    architecture: int  #: AUDIT_ARCH_*
    instruction: int  #: the address behind the instruction
    arguments: tuple[int, ...]
    mark: int  #: the data in the filter's action (SECCOMP_RET_DATA)


class Layout(NamedTuple):
    """Indexes of registers in the kernel's set of general registers, each of 64 bits."""

    size: int  #: the number of registers
    arguments: tuple[int, ...]
    number: int  #: holds the call's number
    result: int
    instruction: int
    #: On x86-64, the kernel's copy of the call's number, -1 outside a call.
    entered: int | None
    trap: bytes  #: the instruction that makes a call


LAYOUTS = {
    # struct user_regs_struct: rdi, rsi, rdx, r10, r8, r9; rax; rip; orig_rax.  "syscall".
    0xC000_003E: Layout(27, (14, 13, 12, 7, 9, 8), 10, 10, 16, 15, b"\x0f\x05"),
    # struct user_pt_regs: x0 to x5; x8; x0; pc.  "svc #0".
    0xC000_00B7: Layout(34, (0, 1, 2, 3, 4, 5), 8, 0, 32, None, b"\x01\x00\x00\xd4"),
}


class Registers:
    """The general registers of a stopped thread, and the number of its system call."""

    __slots__ = ("_layout", "_values", "entered")

    def __init__(self, layout: Layout, values: list[int], entered: int) -> None:
        self._layout = layout
        self._values = values
        self.entered = entered  #: the number of the call that the thread is in, or -1

    def copy(self) -> Registers:
        """Return an independent copy."""
        return Registers(self._layout, self._values.copy(), self.entered)

    @property
    def values(self) -> list[int]:
        """All registers, in the kernel's order."""
        return self._values

    @property
    def result(self) -> int:
        """The result of the call; a negative errno if it failed."""
        value = self._values[self._layout.result]
        return value - (1 << 64) if value >> 63 else value

    @result.setter
    def result(self, value: int) -> None:
        self._values[self._layout.result] = value & 0xFFFF_FFFF_FFFF_FFFF

    @property
    def arguments(self) -> tuple[int, ...]:
        """The arguments of the call that the thread makes, or has been kept from making."""
        return tuple(self._values[index] for index in self._layout.arguments)

    @property
    def instruction(self) -> int:
        """The address of the next instruction."""
        return self._values[self._layout.instruction]

    def rewind_interrupted(self, arguments: tuple[int, ...]) -> int | None:
        """Move back to the call, with these arguments, that an interrupted thread waited in.

        Returns the call's number, or None if the thread did not wait in a call.  On arm64 the
        kernel itself has moved back when it reports the stop; the caller has to check that the
        thread is at an instruction that makes a call.
        """
        if self._layout.entered is None:
            number = self._values[self._layout.number]
            return number if self.arguments[: len(arguments)] == arguments else None
        if self.result not in _RESTARTS or self.entered < 0:
            return None
        number = self.entered
        self.rewind()
        return number

    def rewind(self) -> None:
        """Move back to the instruction that made the call, to execute it again."""
        self.rewind_to(self.instruction - len(self._layout.trap))

    def rewind_to(self, instruction: int) -> None:
        """Continue at an instruction that makes a call."""
        self._values[self._layout.instruction] = instruction
        self.entered = -1

    def prepare(self, number: int, arguments: tuple[int, ...]) -> None:
        """Set the call that the next instruction makes."""
        # The number shares its register with the result on x86-64, an argument does on arm64.
        self._values[self._layout.number] = number
        self.replace(-1, arguments)

    def replace(self, number: int, arguments: tuple[int, ...]) -> None:
        """Replace the call that the thread is about to make."""
        self.entered = number
        for index, value in zip(self._layout.arguments, arguments, strict=False):
            self._values[index] = value & 0xFFFF_FFFF_FFFF_FFFF


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Ptrace:
    """The ptrace requests.

    All raise OSError(ESRCH) if the thread has been killed, or is not stopped although the request
    needs that.
    """

    def __init__(self, machine: Architecture) -> None:
        self._ptrace = libc["ptrace"]
        self._ptrace.restype = ctypes.c_long
        self._ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._layout = LAYOUTS[machine.architecture]
        self._registers = struct.Struct(f"={self._layout.size}Q")
        self._buffer = ctypes.create_string_buffer(self._registers.size)
        self._vector = _Vector(ctypes.addressof(self._buffer), self._registers.size)
        self._number = ctypes.c_int()
        self._number_vector = _Vector(ctypes.addressof(self._number), ctypes.sizeof(ctypes.c_int))
        self._info = ctypes.create_string_buffer(_CALL_INFO.size)

    @property
    def trap(self) -> bytes:
        """The instruction that makes a system call."""
        return self._layout.trap

    # Attaching, stopping, resuming

    def seize(self, thread: int, options: int = _OPTIONS) -> None:
        """Trace a thread, by default with all that it creates.

        Raises OSError(EPERM) if this process may not trace it.
        """
        self._request(PTRACE_SEIZE, thread, 0, options)

    def detach(self, thread: int, number: int = 0) -> None:
        """Stop tracing a stopped thread, which then runs.

        The signal ``number`` is delivered unless it is 0.
        """
        self._request(_DETACH, thread, 0, number)

    def interrupt(self, thread: int) -> None:
        """Stop a thread, with :attr:`Event.STOP` unless another event comes first."""
        self._request(_INTERRUPT, thread)

    def resume(self, thread: int, number: int = 0) -> None:
        """Resume a thread, and deliver the signal ``number`` unless it is 0."""
        self._request(_CONT, thread, 0, number)

    def resume_to_call(self, thread: int, number: int = 0) -> None:
        """Resume a thread until it enters or leaves a system call."""
        self._request(_SYSCALL, thread, 0, number)

    def step(self, thread: int) -> None:
        """Resume a thread for one instruction, after which SIGTRAP stops it."""
        self._request(_STEP, thread)

    def listen(self, thread: int) -> None:
        """Leave a thread in its group stop; the end of the stop is reported."""
        self._request(_LISTEN, thread)

    # Inspecting and changing

    def call_of(self, thread: int) -> SystemCall:
        """Return the call that a thread, stopped by :attr:`Event.SECCOMP`, is about to make."""
        self._request(_GET_SYSCALL_INFO, thread, len(self._info), ctypes.addressof(self._info))
        _, architecture, instruction, _, number, *rest = _CALL_INFO.unpack(self._info)
        return SystemCall(number, architecture, instruction, tuple(rest[:6]), rest[6])

    def trapped_call_of(self, thread: int) -> SystemCall | None:
        """Return the call that a filter has answered with a SIGSYS, which is about to be delivered.

        Returns None if the signal has another cause.
        """
        info = ctypes.create_string_buffer(_SIGNAL_INFO_SIZE)
        self._request(_GETSIGINFO, thread, 0, ctypes.addressof(info))
        _, mark, code, address, number, architecture = _SIGNAL_INFO.unpack_from(info)
        if code != _SYS_SECCOMP:
            return None
        arguments = self.registers(thread).arguments
        return SystemCall(number, architecture, address, arguments, mark)

    def is_sent(self, thread: int) -> bool:
        """Return whether a process has sent the signal that a thread is about to get."""
        info = ctypes.create_string_buffer(_SIGNAL_INFO_SIZE)
        self._request(_GETSIGINFO, thread, 0, ctypes.addressof(info))
        _, _, code, sender, *_ = _SIGNAL_INFO.unpack_from(info)
        # That of a single step has a positive code on x86-64; on arm64 0 (SI_USER), and no process.
        return bool(code < 0 or (code == 0 and sender & 0xFFFF_FFFF))

    def message(self, thread: int) -> int:
        """Return the message of an event, such as the number of a new thread."""
        value = ctypes.c_ulong()
        self._request(_GETEVENTMSG, thread, 0, ctypes.addressof(value))
        return value.value

    def registers(self, thread: int) -> Registers:
        """Return the registers of a stopped thread."""
        self._request(_GETREGSET, thread, _GENERAL, ctypes.addressof(self._vector))
        values = list(self._registers.unpack(self._buffer))
        if self._layout.entered is not None:
            low = values[self._layout.entered] & 0xFFFF_FFFF
            entered = low - (1 << 32) if low >> 31 else low
        else:
            self._request(
                _GETREGSET, thread, _ARM_SYSTEM_CALL, ctypes.addressof(self._number_vector)
            )
            entered = self._number.value
        return Registers(self._layout, values, entered)

    def set_registers(self, thread: int, registers: Registers) -> None:
        """Change the registers of a stopped thread."""
        values = registers.values
        if self._layout.entered is not None:
            values[self._layout.entered] = registers.entered & 0xFFFF_FFFF_FFFF_FFFF
        else:
            self._number.value = registers.entered
            self._request(
                _SETREGSET, thread, _ARM_SYSTEM_CALL, ctypes.addressof(self._number_vector)
            )
        self._registers.pack_into(self._buffer, 0, *values)
        self._request(_SETREGSET, thread, _GENERAL, ctypes.addressof(self._vector))

    def block_signals(self, thread: int, mask: int = _ALL_SIGNALS) -> int:
        """Set the signals that a stopped thread blocks; return those that it blocked before."""
        before = ctypes.c_uint64()
        self._request(_GETSIGMASK, thread, _MASK.size, ctypes.addressof(before))
        wanted = ctypes.c_uint64(mask)
        self._request(_SETSIGMASK, thread, _MASK.size, ctypes.addressof(wanted))
        return before.value

    def _request(self, request: int, thread: int, address: int = 0, data: int = 0) -> None:
        if self._ptrace(request, thread, address, data) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def has_children() -> bool:
    """Return whether this process has children or tracees that it has not reaped."""
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WAIT_FOR_ALL)
    except ChildProcessError:
        return False
    return True


def tracer_of(pid: int) -> int:
    """Return the process that traces ``pid``, or 0.

    Raises OSError if ``pid`` has ended.
    """
    with open(f"/proc/{pid}/status", "rb") as status:
        return int(status_field(status.read(), b"TracerPid"))


def is_gone(error: OSError) -> bool:
    """Return whether a request has failed because its thread was killed meanwhile."""
    return error.errno == errno.ESRCH
