"""Tracing processes whose calls a filter cannot tell from others': those with datagram sockets.

The supervisor's filter sees numbers, and none of them says that a ``sendmsg()`` is about a socket
of ours: the filter that every program begins with would have to trap those calls of every program.
So a process is traced from when it gets a socket whose data calls are to be served.  The supervisor
has the process itself install another filter, which has just those descriptors' numbers traced.
Other processes pay nothing, and a traced one only for these calls, its signals, and what it forks.

A thread stops at such a call, before the kernel has begun it.  The call is answered by skipping it.
If it has to wait, the thread waits in the kernel meanwhile, in a call that only a signal ends: so
signals, stops and restarts are the kernel's own.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import logging
import os
import struct
from collections.abc import Callable, Generator
from enum import Enum, auto

from .arch import Architecture
from .filter import COPYING, TRACE_MARK, Numbers, Served, assemble, traced_rules
from .interception import InterceptedCall
from .process import Processes, write_memory
from .ptrace import (
    ERESTARTNOHAND,
    ERESTARTNOINTR,
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

_RESTARTS = (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND)

# For calls that a tracee makes for us.
_SET_MODE_FILTER, _ALL_THREADS = 1, 1
_PR_SET_NO_NEW_PRIVS = 38
_PRIVATE_ANONYMOUS, _READ_WRITE = 0x22, 3
_NOWHERE = (1 << 64) - 1
#: struct sock_fprog: how many instructions, and where.
_PROGRAM = struct.Struct("=H6xQ")

#: So many filters of a process have one number each; the later ones have twice as many each time,
#: up to the last number that a process can have: the kernel allows some hundreds of filters.
_EXACT, _MOST_DOUBLINGS = 4, 20


class _Then(Enum):
    """How a thread goes on from a stop."""

    RUN = auto()
    TO_CALL = auto()  #: until it begins or ends a system call


#: What is done with a thread at one stop after the other.
_Script = Generator[_Then, Stop, None]


class TracedCall(InterceptedCall):
    """A call that a thread has stopped before."""

    __slots__ = ("thread",)

    def __init__(self, thread: Tracee, call: SystemCall) -> None:
        number, architecture, instruction, arguments, _ = call
        super().__init__(0, thread.number, number, architecture, instruction, arguments)
        self.thread = thread


class Tracee:
    """A thread that is traced."""

    def __init__(self, number: int, process: _Process) -> None:
        self.number = number
        self.process = process
        self.script: _Script | None = None
        self.started = False  #: the script
        self.then = _Then.RUN  #: the script's last
        self.held: list[int] = []  #: signals that came while the script was at work
        #: the call that it has stopped before, or sleeps for
        self.call: TracedCall | None = None
        self.asleep: Registers | None = None  #: what it had before it was put to sleep
        self.answer: int | None = None  #: to be given when it wakes
        self.again = False  #: to make the call again when it wakes
        self.code = -ERESTARTSYS  #: what the call returns when a signal wakes it
        self.interrupted: Callable[[], None] = _nothing


class _Process:
    """A process some or all of whose threads are traced."""

    def __init__(self, number: int, covered: dict[Served, list[Numbers]]) -> None:
        self.number = number
        self.covered = covered
        self.threads: set[int] = set()

    def covers(self, kind: Served, number: int) -> bool:
        return any(first <= number < end for first, end in self.covered[kind])

    def kind_of(self, number: int) -> Served | None:
        """Whose calls on descriptors of this number are traced."""
        return next((kind for kind in Served if self.covers(kind, number)), None)


def _nothing() -> None:
    """Nobody waits."""


class Tracer:
    """All tracees of this process.  Its requests must be made by the thread that has made it."""

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
        self._syscall = ctypes.CDLL(None).syscall
        self._threads: dict[int, Tracee] = {}
        self._by_process: dict[int, _Process] = {}
        #: of processes that have been made and have not stopped yet: what their parents have
        self._inherited: dict[int, dict[Served, list[Numbers]]] = {}
        self._on_group_stop = on_group_stop

    # What is traced

    def attach(self, number: int) -> None:
        """Trace all threads of a process, of which ``number`` is one.  OSError EPERM."""
        if number in self._threads:
            return
        process_id = self._processes.first_thread(number)
        process = self._by_process.get(process_id) or self._add_process(process_id)
        try:
            found = True
            while found:  # one that is not traced yet may make another
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
        """Return whether this thread is traced: it is until it ends."""
        return number in self._threads

    def covers(self, number: int, kind: Served, descriptor: int) -> bool:
        """Return whether calls on this descriptor of a thread are traced."""
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
        """Have calls on these descriptors traced, in a process that is attached.

        The thread waits in a system call with these ``arguments``, which it will make again.
        ``done`` is called before, with 0 or an errno; EINTR if it did not wait.
        """
        thread = self._threads[number]
        thread.script = self._cover(thread, kind, descriptors, arguments, done)
        thread.started = False
        self._ptrace.interrupt(number)

    # Answers to calls

    @staticmethod
    def is_waiting(call: TracedCall) -> bool:
        """Return whether a call still waits for its answer."""
        return call.thread.call is call

    def answer(self, thread: Tracee, value: int) -> None:
        """Let the call that a thread has stopped before return ``value``, without being done."""
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
        """Let the kernel do the call that a thread has stopped before."""
        if thread.asleep is not None:
            thread.again = True
            self._wake(thread)
            return
        thread.call = None
        with self._unless_gone():
            self._ptrace.resume(thread.number)

    def sleep(self, thread: Tracee, restarts: bool, interrupted: Callable[[], None]) -> None:
        """Let a thread wait before its call, until the call is answered.

        ``interrupted`` is called if a signal comes before.  ``restarts``: the thread then makes
        the call again, if the signal's handler allows that.
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

    # What waitpid() reports

    def on_wait_status(self, number: int, status: int) -> bool:
        """Take what waitpid() reports; return False if it does not concern tracing alone."""
        if not os.WIFSTOPPED(status):
            if not os.WIFCONTINUED(status):
                self._forget(number)
            return False
        thread = self._threads.get(number)
        if thread is None:
            if not status >> 16:  # a child of ours that is not traced
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
        if thread.asleep is not None:  # it has not gone to sleep yet
            self._ptrace.resume_to_call(thread.number, number)
        else:
            self._ptrace.resume(thread.number, number)

    # Calls

    def _on_call(self, thread: Tracee, call: SystemCall) -> None:
        if call.mark != TRACE_MARK:
            # Of a filter of the program's own, which has no tracer: as without us.
            self._skip(thread, -errno.ENOSYS)
            self._ptrace.resume(thread.number)
            return
        if self._copies(call):
            self._begin(thread, self._follow_copy(thread, call))
            return
        thread.call = traced = TracedCall(thread, call)
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
        """The call that a thread slept in has ended."""
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
        """Begin a script at the stop that a thread is in."""
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
        if registers.result in _RESTARTS and registers.entered >= 0:
            number = registers.entered
            registers.rewind()
            registers.prepare(number, arguments)
            code = yield from self._extend(thread, registers, True, kind, descriptors)
        else:
            code = errno.EINTR
        done(code)

    def _follow_copy(self, thread: Tracee, call: SystemCall) -> _Script:
        """Let a thread copy a descriptor, and have calls on the copy traced."""
        machine = self._machine
        source = call.arguments[0] & 0xFFFF_FFFF
        kind = thread.process.kind_of(source)
        if kind is None or not self._serves_data(thread.number, source):
            return
        if call.number in (machine.dup2, machine.dup3):
            # Before: it is another thread's as soon as it is there.
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
        """Have a thread leave the call that it has stopped before, without doing it."""
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
        """Have the process install a filter for descriptors; returns 0 or an errno.

        Afterwards the thread has ``registers``, in which the next instruction makes a call
        (``at_trap``), or the last one has made one.
        """
        process = thread.process
        missing = [number for number in descriptors if not process.covers(kind, number)]
        base = registers.copy()
        if not at_trap:
            base.rewind()
        blocked = self._ptrace.block_signals(thread.number)
        code = 0
        if missing:
            at = base.instruction
            trap = self._processes.read_some(thread.number, at, len(self._ptrace.trap))
            if trap != self._ptrace.trap:
                code = errno.ENOEXEC
        for number in missing:
            if not code and not process.covers(kind, number):
                numbers = _numbers_for(process.covered[kind], number)
                code = yield from self._install(thread, base, kind, numbers)
                if not code:
                    process.covered[kind].append(numbers)
        self._ptrace.block_signals(thread.number, blocked)
        self._ptrace.set_registers(thread.number, registers)
        return code

    def _install(
        self, thread: Tracee, base: Registers, kind: Served, numbers: Numbers
    ) -> Generator[_Then, Stop, int]:
        machine = self._machine
        program = assemble(machine, traced_rules(machine, kind, numbers), is_first=False)
        size = _PROGRAM.size + len(program)
        arguments = (0, size, _READ_WRITE, _PRIVATE_ANONYMOUS, _NOWHERE, 0)
        at = yield from self._call(thread, base, machine.mmap, arguments)
        if -4096 < at < 0:
            return -at
        data = _PROGRAM.pack(len(program) // 8, at + _PROGRAM.size) + program
        with self._processes.opened_memory(thread.number) as memory:
            write_memory(memory, at, data)
        install = (_SET_MODE_FILTER, _ALL_THREADS, at)
        result = yield from self._call(thread, base, machine.seccomp, install)
        if result == -errno.EACCES:
            # As for the first filter: who has no privilege must promise never to get any.
            promise = (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            yield from self._call(thread, base, machine.prctl, promise)
            result = yield from self._call(thread, base, machine.seccomp, install)
        yield from self._call(thread, base, machine.munmap, (at, size))
        # A positive result is a thread with a filter of its own, which cannot have this one.
        return errno.EBUSY if result > 0 else -result

    def _call(
        self, thread: Tracee, base: Registers, number: int, arguments: tuple[int, ...]
    ) -> Generator[_Then, Stop, int]:
        """Have a thread make a system call; returns its result."""
        registers = base.copy()
        registers.prepare(number, arguments)
        self._ptrace.set_registers(thread.number, registers)
        yield _Then.TO_CALL
        yield _Then.TO_CALL
        return self._ptrace.registers(thread.number).result

    # Threads and processes that come and go

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
        """A thread that a tracee has made stops for the first time."""
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
        """All other threads of a process have ended, and the one that is left has its number."""
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
        """Nothing that was to be done with a thread can be done any more."""
        script, thread.script = thread.script, None
        if script is not None:
            script.close()
        thread.interrupted()
        thread.interrupted = _nothing
        thread.call = thread.asleep = thread.answer = None
        thread.again = False

    def _send_signal(self, thread: Tracee, number: int) -> None:
        with contextlib.suppress(OSError):  # it has ended
            process_id = self._processes.first_thread(thread.number)
            self._syscall(self._machine.tgkill, process_id, thread.number, number)

    def _drop_if_empty(self, process: _Process) -> None:
        if not process.threads:
            self._by_process.pop(process.number, None)

    @staticmethod
    @contextlib.contextmanager
    def _unless_gone() -> Generator[None]:
        """A tracee can be killed at any stop; then its end is reported."""
        try:
            yield
        except OSError as error:
            if not is_gone(error):
                raise


def _numbers_for(covered: list[Numbers], number: int) -> Numbers:
    """Return the next numbers to be covered, with ``number`` among them."""
    doublings = min(max(0, len(covered) - _EXACT + 1), _MOST_DOUBLINGS)
    first = number >> doublings << doublings
    return Numbers(first, first + (1 << doublings))
