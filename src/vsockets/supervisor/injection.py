"""System calls that stopped threads of other processes make for the supervisor.

Everything here is synchronous: the supervisor waits for the thread.  The wait is short, because an
injected call never blocks: it is about memory, or about a unix socket that nothing waits for.

A thread stops for the supervisor at one of these places; ``-->`` is a method of :class:`Injector`::

    AT_CALL   before a call that a filter wants traced; the call has not begun
    AT_TRAP   behind a call that a filter has kept from happening, with a SIGSYS to be delivered
    AT_STOP   anywhere: it was interrupted
    AT_EXIT   behind an injected call, wherever it stopped before
    ASLEEP    not stopped: it waits in a call that has no end but a signal

    AT_CALL | AT_TRAP | AT_EXIT  --> call        AT_EXIT
    AT_CALL | AT_TRAP | AT_EXIT  --> answer      runs
    AT_CALL | AT_EXIT            --> let_through runs
    AT_CALL | AT_EXIT            --> sleep       ASLEEP
    ASLEEP                       --> rouse       AT_EXIT
    runs                         --> stop        AT_STOP
    AT_STOP                      --> call        AT_STOP
    AT_STOP                      --> go_on       runs

From the first injected call until the thread runs again its signals are blocked.  SIGSYS and
SIGTRAP are not: if the kernel has to raise one of them while it is blocked, it removes the
program's handler.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import signal
import time
from collections import deque
from collections.abc import Callable
from enum import Enum, auto
from socket import SHUT_RDWR

from .arch import Architecture
from .filter import TRACE_MARK
from .interception import CallInterrupted
from .process import Processes
from .ptrace import (
    ERESTARTSYS,
    WAIT_FOR_ALL,
    Event,
    Ptrace,
    Registers,
    Stop,
    SystemCall,
    is_gone,
    read_stop,
)

#: What an injected call can raise if another thread has unmapped the instruction that makes it.
_FAULTS = (signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE, signal.SIGTRAP)
_NOT_BLOCKED = (signal.SIGSYS, signal.SIGTRAP)
_BLOCKED = ((1 << 64) - 1) & ~sum(1 << number - 1 for number in _NOT_BLOCKED)

#: mmap()'s: a page of memory for what injected calls read and write.
_PRIVATE_ANONYMOUS, _READ_WRITE = 0x22, 3
_DUPLICATE = 1030  # F_DUPFD_CLOEXEC of fcntl()
_NO_DESCRIPTOR = (1 << 64) - 1
SCRATCH_SIZE = 4096
#: Seconds in which an interrupted thread has to stop, in which one has to stop that waits in
#: vfork(), and between two looks whether it has.
_STOP_SECONDS, _VFORK_SECONDS, _LOOK_SECONDS = 1.0, 0.01, 0.0001


def stops_soon(number: int) -> bool:
    """Wait until the status of an interrupted thread has changed; return False if it does not.

    A parent in vfork() stops after its child has executed a program, for which the child may need
    the supervisor.  A thread that the kernel does not schedule is waited for longer.
    """
    began = time.monotonic()
    options = os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT | WAIT_FOR_ALL
    with contextlib.suppress(ChildProcessError):  # reported by the wait that follows
        while os.waitid(os.P_PID, number, options) is None:
            waited = time.monotonic() - began
            if waited > _STOP_SECONDS or (waited > _VFORK_SECONDS and _is_in_vfork(number)):
                return False
            time.sleep(_LOOK_SECONDS)
    return True


def _is_in_vfork(number: int) -> bool:
    """Return whether a thread sleeps and cannot be interrupted."""
    try:
        with open(f"/proc/{number}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2][1:2] == b"D"
    except OSError:
        return False


class Place(Enum):
    """The point at which a thread is stopped, or RUNNING; see the table in the module."""

    RUNNING = auto()
    AT_CALL = auto()
    AT_TRAP = auto()
    AT_STOP = auto()
    AT_EXIT = auto()
    ASLEEP = auto()


class Space:
    """Addresses that the supervisor uses in the memory of one process."""

    __slots__ = ("instruction", "scratch")

    def __init__(self, scratch: int = 0, instruction: int = 0) -> None:
        self.scratch = scratch  #: the address of the supervisor's page, or 0
        self.instruction = instruction  #: the address of an instruction that makes a call, or 0

    def copy(self) -> Space:
        """Return a copy, for a forked process."""
        return Space(self.scratch, self.instruction)


class StoppedThread:
    """A traced thread, and the state of its injected calls."""

    __slots__ = (
        "blocked",
        "call",
        "held",
        "instruction",
        "is_group_stopped",
        "number",
        "place",
        "saved",
        "space",
    )

    def __init__(self, number: int, space: Space) -> None:
        self.number = number
        self.space = space
        self.place = Place.RUNNING
        #: the call that the thread has stopped at, or sleeps for
        self.call: SystemCall | None = None
        #: AT_EXIT and ASLEEP: the registers that the thread goes on with
        self.saved: Registers | None = None
        self.instruction = 0  #: the address of the instruction that makes its injected calls
        self.blocked: int | None = None  #: the signals that it blocked, if others are blocked now
        self.held: list[int] = []  #: signals that could not be blocked
        self.is_group_stopped = False  #: a signal has stopped its process meanwhile

    def may_step(self) -> bool:
        """Return whether the supervisor may stop the thread by a SIGTRAP of the kernel.

        A thread whose program may ignore SIGTRAP must not be stopped so: the kernel would reset
        that, because a signal that it raises itself cannot be ignored.
        """
        return False


class Injector:
    """Injects calls into stopped threads.

    Each method may raise CallInterrupted: the thread has been killed, or another thread of its
    process executes a program.  The wait status of the thread is then in :attr:`unread`.
    """

    def __init__(self, machine: Architecture, ptrace: Ptrace, processes: Processes) -> None:
        self._machine = machine
        self._ptrace = ptrace
        self._processes = processes
        self._syscall = ctypes.CDLL(None).syscall
        #: Wait statuses of threads that were waited for here, and have not been handled.
        self.unread: deque[tuple[int, int]] = deque()

    # Where a thread is

    def stopped_at_call(self, thread: StoppedThread, call: SystemCall) -> None:
        """Note that a thread has stopped before ``call``, which the kernel has not begun."""
        thread.place, thread.call, thread.saved = Place.AT_CALL, call, None
        thread.instruction = thread.space.instruction = call.instruction - len(self._ptrace.trap)

    def stopped_at_trap(self, thread: StoppedThread, call: SystemCall) -> bool:
        """Note that a thread has stopped with the SIGSYS of ``call``.

        Returns False if the program has sent that signal to itself, without making a call.
        """
        registers = self._ptrace.registers(thread.number)
        if registers.instruction != call.instruction:
            return False
        at = call.instruction - len(self._ptrace.trap)
        if not self._is_trap(thread, at):
            return False
        thread.place, thread.call, thread.saved = Place.AT_TRAP, call, registers
        thread.instruction = thread.space.instruction = at
        return True

    def stop(self, thread: StoppedThread) -> None:
        """Stop a running thread.

        Raises OSError(EAGAIN) if the thread cannot make a call now, or its last stop has not been
        handled.
        """
        if any(number == thread.number for number, _ in self.unread):
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        self._request(self._ptrace.interrupt, thread)
        if not stops_soon(thread.number):  # its stop is handled when it is reported
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        stop = self._next_stop(thread)
        if stop.event is Event.GROUP_STOP:  # reported again when the thread is let go
            thread.is_group_stopped = True
        elif stop.event is not Event.STOP:
            # Another event came first, which is handled in its turn; the interrupt follows it.
            self.unread.append((thread.number, self._last_status))
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        if not self.stopped_anywhere(thread):
            self.go_on(thread)
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    def stopped_anywhere(self, thread: StoppedThread) -> bool:
        """Note that a thread was interrupted; return whether it can make calls now."""
        thread.place = Place.AT_STOP
        thread.saved = self._registers(thread)
        here = thread.saved.instruction
        for instruction in (here - len(self._ptrace.trap), thread.space.instruction):
            if instruction != here and self._is_trap(thread, instruction):
                thread.instruction = instruction
                return True
        # On arm64 a thread that waits in a call stops at the call's own instruction, to make it
        # again.  Another call from there can become that one: the kernel may prepare its restart.
        thread.instruction = self.find_trap(thread.number)
        return thread.instruction != 0

    def find_trap(self, pid: int) -> int:
        """Return the address of a system call instruction in the vDSO of a process, or 0."""
        with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
            for line in maps:
                if line.endswith(b"[vdso]\n"):
                    start, _, end = line.split(None, 1)[0].partition(b"-")
                    first = int(start, 16)
                    code = self._processes.read_some(pid, first, int(end, 16) - first)
                    at = code.find(self._ptrace.trap)
                    return first + at if at >= 0 else 0
        return 0

    # Injection

    def call(self, thread: StoppedThread, number: int, *arguments: int) -> int:
        """Have a thread make the call ``number``; return its result, or a negative errno."""
        if thread.place is Place.AT_CALL:
            saved = thread.saved = self._registers(thread)
            self._block_signals(thread)
            changed = saved.copy()
            changed.replace(number, arguments)
            self._set_registers(thread, changed)
            thread.place = Place.AT_EXIT
        else:
            self._block_signals(thread)
            self._prepare(thread, number, arguments)
            if thread.may_step():
                result = self._step_over(thread)
            else:
                self._enter(thread)
                result = None
            if thread.place is Place.AT_TRAP:
                thread.place = Place.AT_EXIT
            if result is not None:
                return result
        while self._run(thread).event is Event.SECCOMP:
            self._pass_filter(thread)
        return self._registers(thread).result

    def checked(self, thread: StoppedThread, number: int, *arguments: int) -> int:
        """Have a thread make a call, as :meth:`call` does, and return its result.

        Raises OSError if the call fails.
        """
        result = self.call(thread, number, *arguments)
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def shut_down(self, thread: StoppedThread, fd: int, inode: int) -> bool:
        """Have a thread shut down its descriptor ``fd``, if that is the socket with this inode.

        Other threads of its process run, and may close the descriptor and use the number for
        another file.  So the thread makes a duplicate, which is checked.

        Returns False if ``fd`` is not that socket.
        """
        copy = self.call(thread, self._machine.fcntl, fd, _DUPLICATE, 0)
        if copy < 0:
            return False
        try:
            if self._processes.what_is(thread.number, copy) != f"socket:[{inode}]":
                return False
            return self.call(thread, self._machine.shutdown, copy, SHUT_RDWR) >= 0
        finally:
            self.call(thread, self._machine.close, copy)

    def scratch(self, thread: StoppedThread) -> int:
        """Return the address of the supervisor's page in a thread's memory; mapped if needed."""
        if not thread.space.scratch:
            arguments = (0, SCRATCH_SIZE, _READ_WRITE, _PRIVATE_ANONYMOUS, _NO_DESCRIPTOR, 0)
            thread.space.scratch = self.checked(thread, self._machine.mmap, *arguments)
        return thread.space.scratch

    def unmap_scratch(self, thread: StoppedThread) -> None:
        """Have a thread unmap the supervisor's page."""
        if thread.space.scratch:
            self.call(thread, self._machine.munmap, thread.space.scratch, SCRATCH_SIZE)
            thread.space.scratch = 0

    def write_scratch(self, thread: StoppedThread, data: bytes) -> int:
        """Write ``data`` to the supervisor's page in a thread's memory; return the page's address.

        Raises OSError(EFAULT) if the program unmaps the page repeatedly.
        """
        for _ in range(2):
            address = self.scratch(thread)
            if self._processes.write_some(thread.number, address, data) == len(data):
                return address
            thread.space.scratch = 0  # the program has unmapped it
        raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))

    # Going on

    def answer(self, thread: StoppedThread, value: int) -> None:
        """Let the call that a thread has stopped at return ``value``, instead of performing it."""
        registers = thread.saved or self._registers(thread)
        registers.entered = -1
        registers.result = value
        self._set_registers(thread, registers)
        self._release(thread)

    def let_through(self, thread: StoppedThread) -> None:
        """Let the kernel perform the call that a thread has stopped at."""
        if thread.place is not Place.AT_CALL:
            self._return_to_call(thread)
        self._release(thread)

    def sleep(self, thread: StoppedThread) -> None:
        """Let a thread wait in the kernel, in place of the call that it has stopped at.

        A signal ends the wait; the caller then calls :meth:`woken`, unless it has called
        :meth:`rouse` before.
        """
        if thread.place is not Place.AT_CALL:
            self._return_to_call(thread)
        saved = self._registers(thread)
        registers = saved.copy()
        registers.replace(self._machine.ppoll, (0, 0, 0, 0, 0))
        self._set_registers(thread, registers)
        self._unblock_signals(thread)
        self._request(self._ptrace.resume_to_call, thread)
        thread.place, thread.saved = Place.ASLEEP, saved
        self._send_held(thread)

    def rouse(self, thread: StoppedThread) -> None:
        """Stop a thread that sleeps.

        If a signal has woken the thread, it is delivered when the thread runs again.
        """
        self._request(self._ptrace.interrupt, thread)
        while self._next_stop(thread).event is not Event.SYSTEM_CALL:
            self._request(self._ptrace.resume_to_call, thread)
        thread.place = Place.AT_EXIT

    def woken(self, thread: StoppedThread, restarts: bool) -> None:
        """Interrupt the call of a thread that a signal has woken from :meth:`sleep`.

        With ``restarts`` the kernel makes the call again, unless the signal has a handler without
        SA_RESTART; otherwise the call fails with EINTR.
        """
        registers = thread.saved
        assert registers is not None and thread.call is not None
        registers.result = -ERESTARTSYS if restarts else -errno.EINTR
        registers.entered = thread.call.number if restarts else -1
        self._set_registers(thread, registers)
        self._release(thread)

    def go_on(self, thread: StoppedThread) -> None:
        """Let a thread that was stopped anywhere run on."""
        registers = thread.saved
        assert registers is not None
        self._set_registers(thread, registers)
        if thread.blocked is not None:
            # It is behind an injected call: only at another stop like the first one the kernel
            # looks whether the program's own call is to be made again.
            thread.is_group_stopped = True
        self._release(thread)

    # Inside

    def _prepare(self, thread: StoppedThread, number: int, arguments: tuple[int, ...]) -> None:
        """Move a thread to an instruction that makes the call ``number``."""
        assert thread.saved is not None
        registers = thread.saved.copy()
        registers.rewind_to(thread.instruction)
        registers.prepare(number, arguments)
        self._set_registers(thread, registers)

    def _enter(self, thread: StoppedThread) -> None:
        """Have a thread enter the call that it has been moved to."""
        stop = self._run(thread)
        assert stop.event is Event.SYSTEM_CALL, stop

    def _step_over(self, thread: StoppedThread) -> int:
        """Have a thread make the call that it has been moved to; return the result.

        A single step needs one stop, and entering and leaving the call two; each stop takes two
        context switches.
        """
        first, behind = thread.instruction, thread.instruction + len(self._ptrace.trap)
        while True:
            stop = self._resume_to_stop(self._ptrace.step, thread)
            if stop.event is Event.SECCOMP:
                self._pass_filter(thread)
            elif stop.event is Event.SIGNAL:
                registers = self._registers(thread)
                if stop.signal != signal.SIGTRAP or registers.instruction not in (first, behind):
                    self._hold(thread, stop.signal)
                    continue
                if registers.instruction == first or self._is_sent(thread):
                    thread.held.append(signal.SIGTRAP)  # by a process; the kernel sends no second
                if registers.instruction == behind:
                    return registers.result

    def _return_to_call(self, thread: StoppedThread) -> None:
        """Move a thread back to the stop before its call, from a later stop."""
        call, saved = thread.call, thread.saved
        assert call is not None and saved is not None
        self._block_signals(thread)
        registers = saved.copy()
        registers.rewind_to(thread.instruction)
        registers.prepare(call.number, call.arguments)
        self._set_registers(thread, registers)
        self._run(thread)
        while self._run(thread).event is not Event.SECCOMP:
            # No filter stopped the call, so it has been made, which no sequence of stops allows.
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        thread.place, thread.saved = Place.AT_CALL, None

    def _run(self, thread: StoppedThread) -> Stop:
        """Resume a thread until it enters or leaves a system call; return that stop."""
        while True:
            stop = self._resume_to_stop(self._ptrace.resume_to_call, thread)
            if stop.event in (Event.SYSTEM_CALL, Event.SECCOMP):
                return stop
            if stop.event is Event.SIGNAL:
                self._hold(thread, stop.signal)

    def _resume_to_stop(self, resume: Callable[[int], None], thread: StoppedThread) -> Stop:
        self._request(resume, thread)
        stop = self._next_stop(thread)
        if stop.event is Event.GROUP_STOP:
            thread.is_group_stopped = True
        return stop

    def _hold(self, thread: StoppedThread, number: int) -> None:
        """Keep a signal that has come during an injected call, to be sent again after it."""
        if number in _FAULTS:
            self._abandon(thread, number)
        if number != signal.SIGSYS:  # that of a filter of the program's own
            thread.held.append(number)

    def _abandon(self, thread: StoppedThread, number: int) -> None:
        """Resume a thread that cannot make calls, and deliver the fault ``number`` to it."""
        if thread.saved is not None:
            self._set_registers(thread, thread.saved)
        self._unblock_signals(thread)
        thread.place = Place.RUNNING
        self._request(lambda at: self._ptrace.resume(at, number), thread)
        raise CallInterrupted

    def _pass_filter(self, thread: StoppedThread) -> None:
        """Continue an injected call at which a filter has stopped the thread.

        The filter is the supervisor's, or one of the program's own that expects no tracer.
        """
        if self._call_of(thread).mark == TRACE_MARK:
            return
        registers = self._registers(thread)
        registers.entered = -1
        registers.result = -errno.ENOSYS
        self._set_registers(thread, registers)

    def _call_of(self, thread: StoppedThread) -> SystemCall:
        try:
            return self._ptrace.call_of(thread.number)
        except OSError as error:
            raise self._lost(thread, error) from None

    def _is_sent(self, thread: StoppedThread) -> bool:
        try:
            return self._ptrace.is_sent(thread.number)
        except OSError as error:
            raise self._lost(thread, error) from None

    def _is_trap(self, thread: StoppedThread, address: int) -> bool:
        if not address:
            return False
        trap = self._ptrace.trap
        try:
            return self._processes.read_some(thread.number, address, len(trap)) == trap
        except OSError:
            return False

    def _block_signals(self, thread: StoppedThread) -> None:
        if thread.blocked is None:
            try:
                thread.blocked = self._ptrace.block_signals(thread.number, _BLOCKED)
            except OSError as error:
                raise self._lost(thread, error) from None

    def _unblock_signals(self, thread: StoppedThread) -> None:
        if thread.blocked is not None:
            blocked, thread.blocked = thread.blocked, None
            try:
                self._ptrace.block_signals(thread.number, blocked)
            except OSError as error:
                raise self._lost(thread, error) from None

    def _release(self, thread: StoppedThread) -> None:
        """Let a thread run."""
        self._unblock_signals(thread)
        if thread.is_group_stopped:  # the thread stops at once, if its process is still stopped
            thread.is_group_stopped = False
            self._request(self._ptrace.interrupt, thread)
        thread.place, thread.call, thread.saved = Place.RUNNING, None, None
        self._request(self._ptrace.resume, thread)
        self._send_held(thread)

    def _send_held(self, thread: StoppedThread) -> None:
        if not thread.held:
            return
        held, thread.held = thread.held, []
        try:
            process = self._processes.first_thread(thread.number)
        except OSError:  # it has ended
            return
        for number in held:
            self._syscall(self._machine.tgkill, process, thread.number, number)

    def _next_stop(self, thread: StoppedThread) -> Stop:
        try:
            number, status = os.waitpid(thread.number, WAIT_FOR_ALL)
        except ChildProcessError:
            thread.place = Place.RUNNING
            raise CallInterrupted from None
        if not os.WIFSTOPPED(status) or status >> 16 == Event.EXEC:
            thread.place = Place.RUNNING
            self.unread.append((number, status))
            raise CallInterrupted
        self._last_status = status
        return read_stop(status)

    def _registers(self, thread: StoppedThread) -> Registers:
        try:
            return self._ptrace.registers(thread.number)
        except OSError as error:
            raise self._lost(thread, error) from None

    def _set_registers(self, thread: StoppedThread, registers: Registers) -> None:
        try:
            self._ptrace.set_registers(thread.number, registers)
        except OSError as error:
            raise self._lost(thread, error) from None

    def _request(self, request: Callable[[int], None], thread: StoppedThread) -> None:
        try:
            request(thread.number)
        except OSError as error:
            raise self._lost(thread, error) from None

    @staticmethod
    def _lost(thread: StoppedThread, error: OSError) -> BaseException:
        """Return the exception for a failed request: CallInterrupted if the tracee was killed."""
        if not is_gone(error):
            return error
        thread.place = Place.RUNNING
        return CallInterrupted()
