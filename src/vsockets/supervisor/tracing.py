"""Interception of data calls by ptrace, in processes with datagram or packet sockets.

A filter sees the number of a descriptor, but not whether that is a vSockets socket: the first
filter of a program would have to intercept ``sendmsg()`` on all files.  So a process is traced from
when it gets a socket whose data calls are served, and a tracee of it is made to install another
filter, which traces calls on that descriptor's number: the descriptor is *covered*.  Other
processes pay nothing; a traced one pays for these calls, its signals and the processes it creates.

A thread stops at a covered call before the kernel performs it.  To answer, the tracer skips the
call.  To wait, it replaces the call with a ppoll() that only a signal ends: signals, stops and
restarts are then the kernel's own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections.abc import Callable, Generator
from enum import Enum, auto

from .._linux.bpf import PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, SOCK_FPROG
from .._linux.libc import libc
from .arch import Architecture
from .filter import COPYING, OWN_CALL, TRACE_MARK, Numbers, Served, assemble, traced_rules
from .interception import InterceptedCall
from .process import Processes, open_memory, write_memory
from .ptrace import (
    ERESTARTSYS,
    Event,
    Ptrace,
    Registers,
    Stop,
    SystemCall,
    is_gone,
    read_stop,
)

log = logging.getLogger(__name__)

# Arguments of calls that a tracee is made to perform.
_ALL_THREADS = 1
_PRIVATE_ANONYMOUS, _READ_WRITE = 0x22, 3
_NOWHERE = (1 << 64) - 1

#: The kernel allows some hundreds of filters for a process.  The first few cover one number each,
#: each later one twice as many as the one before, up to all numbers that a process can have.
_EXACT, _MOST_DOUBLINGS = 4, 20


class _Then(Enum):
    """The way to resume a thread from a stop."""

    RUN = auto()
    TO_CALL = auto()  #: until it enters or leaves a system call


#: Actions on a thread at successive stops: yields how to resume it, and gets the next stop.
_Script = Generator[_Then, Stop, None]


class TracedCall(InterceptedCall):
    """A call that a thread has stopped before."""

    __slots__ = ("_tracer", "thread")

    def __init__(self, tracer: Tracer, thread: Tracee, call: SystemCall) -> None:
        number, architecture, instruction, arguments, _ = call
        super().__init__(0, thread.number, number, architecture, instruction, arguments)
        self._tracer = tracer
        self.thread = thread

    def is_waiting(self) -> bool:
        """Return whether the call still waits for its answer."""
        return self.thread.call is self

    def answer(self, value: int) -> None:
        """Skip the call, and let it return ``value``."""
        self._tracer.answer(self.thread, value)

    def let_through(self) -> None:
        """Let the kernel perform the call."""
        self._tracer.let_through(self.thread)


class Tracee:
    """A traced thread."""

    def __init__(self, number: int, process: _Process) -> None:
        self.number = number
        self.process = process
        self.script: _Script | None = None
        self.started = False  #: whether the script has begun
        self.then = _Then.RUN  #: the last value yielded by the script
        self.held: list[int] = []  #: signals to send again after the script
        #: The call that the thread has stopped before, or sleeps for.
        self.call: TracedCall | None = None
        self.asleep: Registers | None = None  #: its registers before it was put to sleep
        self.answer: int | None = None  #: the call's result when it wakes
        self.again = False  #: whether it repeats the call when it wakes
        self.code = -ERESTARTSYS  #: the call's result when a signal wakes it
        self.interrupted: Callable[[], None] = _nothing


class _Process:
    """A process with traced threads, and the descriptors whose data calls are intercepted."""

    def __init__(self, number: int, covered: dict[Served, list[Numbers]]) -> None:
        self.number = number
        self.covered = covered
        self.threads: set[int] = set()

    def covers(self, kind: Served, number: int) -> bool:
        return any(first <= number < end for first, end in self.covered[kind])

    def kind_of(self, number: int) -> Served | None:
        """Return the kind of sockets for which data calls on this descriptor are intercepted."""
        return next((kind for kind in Served if self.covers(kind, number)), None)


def _nothing() -> None:
    """Ignore an interruption; the callback while no call is waiting."""


class Tracer:
    """All tracees of this process.

    Linux allows ptrace requests only from the tracer's thread, which is the thread that created
    this object.
    """

    def __init__(
        self,
        machine: Architecture,
        processes: Processes,
        deliver: Callable[[TracedCall], None],
        serves_data: Callable[[int, int], bool],
        on_group_stop: Callable[[int], None],
    ) -> None:
        """Start without tracees.

        ``deliver`` gets each call that a thread has stopped before: it is to call :meth:`answer`,
        :meth:`let_through` or :meth:`sleep`.  ``serves_data(thread, descriptor)`` returns whether
        the descriptor is a socket whose data calls are served.  ``on_group_stop`` gets the number
        of each thread that stops with its process.
        """
        self._machine = machine
        self._processes = processes
        self._deliver = deliver
        self._serves_data = serves_data
        self._ptrace = Ptrace(machine)
        self._syscall = libc.syscall
        self._threads: dict[int, Tracee] = {}
        self._by_process: dict[int, _Process] = {}
        #: By new process that has not stopped yet: its parent's covered numbers.
        self._inherited: dict[int, dict[Served, list[Numbers]]] = {}
        self._on_group_stop = on_group_stop

    # Attaching and covering

    def attach(self, number: int) -> None:
        """Trace all threads of the process that the thread ``number`` belongs to.

        Raises OSError(EPERM) if this process may not trace them.
        """
        if number in self._threads:
            return
        process_id = self._processes.first_thread(number)
        process = self._by_process.get(process_id) or self._add_process(process_id)
        try:
            found = True
            while found:  # a thread that is not traced yet may create another
                found = False
                for entry in os.listdir(f"/proc/{process_id}/task"):
                    thread = int(entry)
                    if thread not in process.threads:
                        self._seize(thread, process)
                        found = True
        except OSError:
            self._drop_if_empty(process)
            raise

    def is_tracing(self, number: int) -> bool:
        """Return whether a thread is traced; once traced, it is until it ends."""
        return number in self._threads

    def covers(self, number: int, kind: Served, descriptor: int) -> bool:
        """Return whether calls of ``kind`` on a thread's descriptor stop the thread."""
        thread = self._threads.get(number)
        return thread is not None and thread.process.covers(kind, descriptor)

    def cover(
        self,
        number: int,
        kind: Served,
        descriptors: list[int],
        arguments: tuple[int, ...],
        done: Callable[[int], None],
    ) -> None:
        """Cover descriptors of an attached process.

        The thread waits in a system call with these ``arguments``, and repeats it afterwards.
        ``done`` is called before the thread repeats the call, with 0 or an errno; with EINTR if the
        thread did not wait.
        """
        thread = self._threads[number]
        thread.script = self._cover(thread, kind, descriptors, arguments, done)
        thread.started = False
        self._ptrace.interrupt(number)

    # Answers to calls

    def answer(self, thread: Tracee, value: int) -> None:
        """Skip the call that a thread has stopped before, and let it return ``value``."""
        if thread.asleep is not None:
            thread.answer = value
            self._wake(thread)
            return
        thread.call = None
        with self._unless_gone():
            registers = self._ptrace.registers(thread.number)
            registers.entered = -1
            registers.result = value
            self._ptrace.set_registers(thread.number, registers)
            self._ptrace.resume(thread.number)

    def let_through(self, thread: Tracee) -> None:
        """Let the kernel perform the call that a thread has stopped before."""
        if thread.asleep is not None:
            thread.again = True
            self._wake(thread)
            return
        thread.call = None
        with self._unless_gone():
            self._ptrace.resume(thread.number)

    def sleep(self, thread: Tracee, restarts: bool, interrupted: Callable[[], None]) -> None:
        """Let a thread wait before its call until the call is answered.

        ``interrupted`` is called if a signal comes first.  With ``restarts``, the thread then
        repeats the call, if the signal's handler has SA_RESTART.
        """
        thread.code = -ERESTARTSYS if restarts else -errno.EINTR
        thread.interrupted = interrupted
        if thread.asleep is not None:
            return
        with self._unless_gone():
            registers = self._ptrace.registers(thread.number)
            thread.asleep = registers.copy()
            registers.replace(self._machine.ppoll, (0, 0, 0, 0, 0))
            self._ptrace.set_registers(thread.number, registers)
            self._ptrace.resume_to_call(thread.number)

    # Stops

    def on_wait_status(self, number: int, status: int) -> bool:
        """Handle a wait status of waitpid(); return False if the caller has to handle it, too."""
        if not os.WIFSTOPPED(status):
            if not os.WIFCONTINUED(status):
                self._forget(number)
            return False
        thread = self._threads.get(number)
        if thread is None:
            if not status >> 16:  # a child that is not traced
                return False
            thread = self._adopt(number)
        with self._unless_gone():
            self._on_stop(thread, read_stop(status))
        return True

    def _on_stop(self, thread: Tracee, stop: Stop) -> None:
        number = thread.number
        if stop.event is Event.GROUP_STOP:
            self._on_group_stop(number)
            self._ptrace.listen(number)
        elif thread.script is not None:
            self._on_stop_in_script(thread, stop)
        elif stop.event is Event.SECCOMP:
            self._on_call(thread, self._ptrace.call_of(number))
        elif stop.event is Event.SYSTEM_CALL and thread.asleep is not None:
            self._on_awake(thread)
        elif stop.event in (Event.FORK, Event.VFORK, Event.CLONE):
            self._on_made(thread, self._ptrace.message(number))
            self._ptrace.resume(number)
        elif stop.event is Event.EXEC:
            self._on_exec(thread)
            self._ptrace.resume(number)
        elif stop.event is Event.SIGNAL:
            self._go_on(thread, stop.signal)
        else:
            self._go_on(thread)

    def _go_on(self, thread: Tracee, number: int = 0) -> None:
        if thread.asleep is not None:  # not in ppoll() yet
            self._ptrace.resume_to_call(thread.number, number)
        else:
            self._ptrace.resume(thread.number, number)

    # Calls

    def _on_call(self, thread: Tracee, call: SystemCall) -> None:
        if call.mark != TRACE_MARK:
            # By a filter of the program's own, which has no tracer: ENOSYS, as without supervision.
            self._skip(thread, -errno.ENOSYS)
            self._ptrace.resume(thread.number)
            return
        if self._copies(call):
            self._begin(thread, self._follow_copy(thread, call))
            return
        thread.call = traced = TracedCall(self, thread, call)
        self._deliver(traced)

    def _copies(self, call: SystemCall) -> bool:
        machine = self._machine
        if call.number == machine.fcntl:
            return call.arguments[1] & 0xFFFF_FFFF in COPYING
        return call.number in (machine.dup, machine.dup2, machine.dup3)

    def _skip(self, thread: Tracee, value: int) -> None:
        registers = self._ptrace.registers(thread.number)
        registers.entered = -1
        registers.result = value
        self._ptrace.set_registers(thread.number, registers)

    def _wake(self, thread: Tracee) -> None:
        with self._unless_gone():
            self._ptrace.interrupt(thread.number)

    def _on_awake(self, thread: Tracee) -> None:
        """Interrupt or answer the call of a thread whose ppoll(), made in its place, has ended."""
        call, registers = thread.call, thread.asleep
        assert call is not None and registers is not None
        value, again = thread.answer, thread.again
        thread.call = thread.asleep = thread.answer = None
        thread.again = False
        if value is not None:
            registers.entered = -1
            registers.result = value
        elif again:
            registers.rewind()
            registers.prepare(call.number, call.arguments)
        else:  # a signal
            thread.interrupted()
            registers.result = thread.code
            registers.entered = call.number if thread.code == -ERESTARTSYS else -1
        thread.interrupted = _nothing
        self._ptrace.set_registers(thread.number, registers)
        self._ptrace.resume(thread.number)

    # Scripts

    def _begin(self, thread: Tracee, script: _Script) -> None:
        """Begin a script at a thread's present stop."""
        thread.script = script
        self._advance(thread, None)

    def _on_stop_in_script(self, thread: Tracee, stop: Stop) -> None:
        if stop.event is Event.SIGNAL:
            thread.held.append(stop.signal)
            if thread.started:
                self._repeat(thread)
                return
        elif stop.event is Event.SECCOMP:  # by a filter of the program's own
            self._skip(thread, -errno.ENOSYS)
            self._repeat(thread)
            return
        elif stop.event is Event.STOP and thread.started:  # after a group stop
            self._repeat(thread)
            return
        self._advance(thread, stop if thread.started else None)

    def _advance(self, thread: Tracee, stop: Stop | None) -> None:
        script = thread.script
        assert script is not None
        thread.started = True
        try:
            thread.then = next(script) if stop is None else script.send(stop)
        except StopIteration:
            thread.script = None
            self._ptrace.resume(thread.number)
            for number in thread.held:
                self._send_signal(thread, number)
            thread.held.clear()
        else:
            self._repeat(thread)

    def _repeat(self, thread: Tracee) -> None:
        if thread.then is _Then.TO_CALL:
            self._ptrace.resume_to_call(thread.number)
        else:
            self._ptrace.resume(thread.number)

    def _cover(
        self,
        thread: Tracee,
        kind: Served,
        descriptors: list[int],
        arguments: tuple[int, ...],
        done: Callable[[int], None],
    ) -> _Script:
        registers = self._ptrace.registers(thread.number)
        number = registers.rewind_interrupted(arguments)
        if number is not None and self._is_at_trap(thread, registers):
            registers.prepare(number, arguments)
            code = yield from self._extend(thread, registers, True, kind, descriptors)
        else:
            code = errno.EINTR
        done(code)

    def _follow_copy(self, thread: Tracee, call: SystemCall) -> _Script:
        """Let a thread copy a descriptor, and cover the copy."""
        machine = self._machine
        source = call.arguments[0] & 0xFFFF_FFFF
        kind = thread.process.kind_of(source)
        if kind is None or not self._serves_data(thread.number, source):
            return
        if call.number in (machine.dup2, machine.dup3):
            # Cover the copy before it exists: another thread can use it at once.
            target = call.arguments[1] & 0x7FFF_FFFF
            if thread.process.covers(kind, target):
                return
            registers = self._ptrace.registers(thread.number)
            yield from self._leave(thread, registers)
            registers.rewind()
            registers.prepare(call.number, call.arguments)
            code = yield from self._extend(thread, registers, True, kind, [target])
            if code:
                registers.result = -code
                registers.entered = -1
                self._ptrace.set_registers(thread.number, registers)
            return
        yield _Then.TO_CALL
        registers = self._ptrace.registers(thread.number)
        copy = registers.result
        if copy >= 0 and not thread.process.covers(kind, copy):
            yield from self._extend(thread, registers, False, kind, [copy])

    def _leave(self, thread: Tracee, registers: Registers) -> _Script:
        """Let a thread leave the call at whose entry it is stopped, without performing the call."""
        leaving = registers.copy()
        leaving.entered = -1
        self._ptrace.set_registers(thread.number, leaving)
        yield _Then.TO_CALL

    def _extend(
        self,
        thread: Tracee,
        registers: Registers,
        at_trap: bool,
        kind: Served,
        descriptors: list[int],
    ) -> Generator[_Then, Stop, int]:
        """Let a thread install filters that cover descriptors; return 0 or an errno.

        Afterwards the thread has ``registers``.  In these the next instruction makes a call
        (``at_trap``), or the last one has made one.
        """
        process = thread.process
        missing = [number for number in descriptors if not process.covers(kind, number)]
        base = registers.copy()
        if not at_trap:
            base.rewind()
        blocked = self._ptrace.block_signals(thread.number)
        code = 0
        if missing and not self._is_at_trap(thread, base):
            code = errno.ENOEXEC
        for number in missing:
            if not code and not process.covers(kind, number):
                numbers = numbers_for(process.covered[kind], number)
                code = yield from self._install(thread, base, kind, numbers)
                if not code:
                    process.covered[kind].append(numbers)
        self._ptrace.block_signals(thread.number, blocked)
        self._ptrace.set_registers(thread.number, registers)
        return code

    def _is_at_trap(self, thread: Tracee, registers: Registers) -> bool:
        """Return whether the next instruction makes a system call."""
        trap = self._ptrace.trap
        return self._processes.read_some(thread.number, registers.instruction, len(trap)) == trap

    def _install(
        self, thread: Tracee, base: Registers, kind: Served, numbers: Numbers
    ) -> Generator[_Then, Stop, int]:
        machine = self._machine
        program = assemble(machine, traced_rules(machine, kind, numbers), is_first=False)
        size = SOCK_FPROG.size + len(program)
        arguments = (0, size, _READ_WRITE, _PRIVATE_ANONYMOUS, _NOWHERE, 0)
        at = yield from self._call(thread, base, machine.mmap, arguments)
        if -4096 < at < 0:
            return -at
        data = SOCK_FPROG.pack(len(program) // 8, at + SOCK_FPROG.size) + program
        memory = open_memory(thread.number)
        try:
            write_memory(memory, at, data)
        finally:
            os.close(memory)
        install = (SET_MODE_FILTER, _ALL_THREADS, at, 0, 0, OWN_CALL)
        result = yield from self._call(thread, base, machine.seccomp, install)
        if result == -errno.EACCES:
            # Without privileges, a process must first promise never to gain any.
            promise = (PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            yield from self._call(thread, base, machine.prctl, promise)
            result = yield from self._call(thread, base, machine.seccomp, install)
        yield from self._call(thread, base, machine.munmap, (at, size))
        # A positive result is a thread with a filter of its own, which cannot have this one.
        return errno.EBUSY if result > 0 else -result

    def _call(
        self, thread: Tracee, base: Registers, number: int, arguments: tuple[int, ...]
    ) -> Generator[_Then, Stop, int]:
        """Let a thread make a system call, and return its result."""
        registers = base.copy()
        registers.prepare(number, arguments)
        self._ptrace.set_registers(thread.number, registers)
        yield _Then.TO_CALL
        yield _Then.TO_CALL
        return self._ptrace.registers(thread.number).result

    # Starts and ends of threads and processes

    def _seize(self, number: int, process: _Process) -> None:
        try:
            self._ptrace.seize(number)
        except OSError as error:
            if not is_gone(error):
                raise
        else:
            self._add(number, process)

    def _add(self, number: int, process: _Process) -> Tracee:
        thread = self._threads[number] = Tracee(number, process)
        process.threads.add(number)
        return thread

    def _add_process(self, number: int) -> _Process:
        covered = self._inherited.pop(number, None) or {kind: [] for kind in Served}
        process = self._by_process[number] = _Process(number, covered)
        return process

    def _adopt(self, number: int) -> Tracee:
        """Add a thread that a tracee has created, at its first stop."""
        process_id = number
        with contextlib.suppress(OSError):
            process_id = self._processes.first_thread(number)
        process = self._by_process.get(process_id) or self._add_process(process_id)
        return self._add(number, process)

    def _on_made(self, parent: Tracee, number: int) -> None:
        covered = {kind: list(numbers) for kind, numbers in parent.process.covered.items()}
        thread = self._threads.get(number)
        if thread is None:
            self._inherited[number] = covered
        elif thread.process is not parent.process and not any(thread.process.covered.values()):
            thread.process.covered = covered

    def _on_exec(self, thread: Tracee) -> None:
        """Forget the other threads, which exec has ended; ``thread`` has the process's number."""
        for number in list(thread.process.threads):
            if number != thread.number:
                self._forget(number)
        self._interrupt(thread)

    def _forget(self, number: int) -> None:
        self._inherited.pop(number, None)
        thread = self._threads.pop(number, None)
        if thread is None:
            return
        self._interrupt(thread)
        thread.process.threads.discard(number)
        self._drop_if_empty(thread.process)

    def _interrupt(self, thread: Tracee) -> None:
        """Drop the script and the call of a thread that has ended or executed a program."""
        script, thread.script = thread.script, None
        if script is not None:
            script.close()
        thread.interrupted()
        thread.interrupted = _nothing
        thread.call = thread.asleep = thread.answer = None
        thread.again = False

    def _send_signal(self, thread: Tracee, number: int) -> None:
        with contextlib.suppress(OSError):  # the thread has ended
            process_id = self._processes.first_thread(thread.number)
            self._syscall(self._machine.tgkill, process_id, thread.number, number)

    def _drop_if_empty(self, process: _Process) -> None:
        if not process.threads:
            self._by_process.pop(process.number, None)

    @staticmethod
    @contextlib.contextmanager
    def _unless_gone() -> Generator[None]:
        """Suppress the error of a tracee killed meanwhile; waitpid() reports its end."""
        try:
            yield
        except OSError as error:
            if not is_gone(error):
                raise


def numbers_for(covered: list[Numbers], number: int) -> Numbers:
    """Return the numbers that the next filter covers, ``number`` among them."""
    doublings = min(max(0, len(covered) - _EXACT + 1), _MOST_DOUBLINGS)
    first = number >> doublings << doublings
    return Numbers(first, first + (1 << doublings))
