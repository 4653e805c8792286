"""Interception by ptrace(2), where a container's own filter forbids AF_VSOCK.

Of several filters the strictest answer holds, and an errno is stricter than a notification: below a
profile that refuses ``socket(AF_VSOCK)`` a supervisor is never notified.  SECCOMP_RET_TRAP is
stricter than an errno.  So the filter installed here answers ``socket(AF_VSOCK)`` with
SECCOMP_RET_TRAP, and all other intercepted calls with SECCOMP_RET_TRACE, which no profile forbids.
Every process of the program is traced from its beginning, and the tracer sees both.

A thread that has stopped makes system calls for the supervisor (:mod:`.injection`).  The thread
itself makes its sockets, and passes and receives descriptors.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import struct
from collections import deque
from collections.abc import Callable, Sequence
from socket import AF_UNIX

from .._linux.bpf import NOTIFY, PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, SOCK_FPROG
from .._linux.inspection import status_field
from .arch import Architecture
from .filter import (
    COPYING,
    MARKED_TRACE,
    MARKED_TRAP,
    OWN_CALL,
    TRACE_MARK,
    ArgumentCondition,
    Numbers,
    Rule,
    Served,
    When,
    assemble,
    traced_rules,
)
from .injection import Injector, Place, Space, StoppedThread
from .interception import CallInterrupted, InterceptedCall, Interruption, Surroundings
from .notification import install as install_filter
from .ptrace import (
    PTRACE_TRACEME,
    TRACING_REQUESTS,
    Event,
    Ptrace,
    Stop,
    SystemCall,
    has_children,
    is_gone,
    read_stop,
    tracer_of,
)
from .scheduler import pause
from .sockets import inode_in
from .tracee_descriptors import TraceeDescriptors
from .tracing import numbers_for

log = logging.getLogger(__name__)

# For calls that a tracee makes for the supervisor.
_ALL_THREADS = 1
#: The beginning of struct sigaction: the handler.
_HANDLER = struct.Struct("=Q")

#: How long a thread whose call waits stays stopped before it waits in the kernel, in seconds.
#: vsockd usually answers sooner, and two stops are saved.  Signals are delivered afterwards.
_STOPPED_SECONDS = 0.01
#: The same for a call that signals do not interrupt on Linux.  Only a vsockd that has been stopped
#: takes longer.
_DEFERRED_SECONDS = 1.0

#: Attempts to stop a thread where it can make calls, and seconds between two.
_TRIES, _A_MOMENT = 1000, 0.01


class StoppedCall(InterceptedCall):
    """A call that a thread has stopped at."""

    __slots__ = ("_interceptor", "thread")

    def __init__(self, interceptor: TraceInterceptor, thread: Thread, call: SystemCall) -> None:
        arguments = call.arguments
        super().__init__(
            0, thread.number, call.number, call.architecture, call.instruction, arguments
        )
        self._interceptor = interceptor
        self.thread = thread

    def is_waiting(self) -> bool:
        """Return whether the call still waits."""
        return self.thread.intercepted is self

    def answer(self, value: int) -> None:
        """Let the call return ``value``, or fail if ``value`` is a negative errno."""
        self._interceptor.answer(self, value)

    def let_through(self) -> None:
        """Let the kernel perform the call."""
        self._interceptor.let_through(self)


class Process:
    """A process all of whose threads are traced."""

    __slots__ = ("covered", "has_second", "ignores_trap", "number", "space", "threads")

    def __init__(
        self,
        number: int,
        covered: dict[Served, list[Numbers]],
        space: Space,
        ignores_trap: bool,
    ) -> None:
        self.number = number
        self.covered = covered
        self.space = space
        self.ignores_trap = ignores_trap  #: whether it ignores SIGTRAP
        self.has_second = False  #: whether it is known to have the second filter
        self.threads: set[int] = set()

    def covers(self, kind: Served, number: int) -> bool:
        """Return whether data calls on this descriptor are intercepted, for sockets of ``kind``."""
        return any(first <= number < end for first, end in self.covered[kind])

    def kind_of(self, number: int) -> Served | None:
        """Return the kind of sockets for which data calls on this descriptor are intercepted."""
        return next((kind for kind in Served if self.covers(kind, number)), None)


class Thread(StoppedThread):
    """A traced thread."""

    __slots__ = ("intercepted", "interrupted", "process", "restarts", "timer")

    def __init__(self, number: int, process: Process) -> None:
        super().__init__(number, process.space)
        self.process = process
        self.intercepted: StoppedCall | None = None  #: not answered yet
        self.interrupted: Callable[[], None] | None = None  #: set while its call's handler waits
        self.restarts = False  #: whether the kernel makes the call again after a signal
        self.timer = 0  #: the key of the wait after which the thread is put to sleep, or 0

    def may_step(self) -> bool:
        """Return whether the thread's process does not ignore SIGTRAP."""
        return not self.process.ignores_trap


class TraceInterceptor:
    """The interceptor that uses ptrace alone: the half in the supervisor's process.

    Linux allows ptrace requests only from the tracer's thread, which is the thread that created
    this object.
    """

    def __init__(self, surroundings: Surroundings) -> None:
        self._machine: Architecture = surroundings.architecture
        self._processes = surroundings.processes
        self._scheduler = surroundings.scheduler
        self._deliver = surroundings.deliver
        self._serves_data = surroundings.serves_data
        self._on_group_stop = surroundings.on_group_stop
        self._ptrace = Ptrace(self._machine)
        self._injector = Injector(self._machine, self._ptrace, self._processes)
        self.unread: deque[tuple[int, int]] = self._injector.unread
        self._descriptors = TraceeDescriptors(self._machine, self._injector, self._processes)
        self._threads: dict[int, Thread] = {}
        self._by_process: dict[int, Process] = {}
        self._second = [_traced(self._machine, rule) for rule in surroundings.second]
        #: The number of filters of a process that does not have the second one, and whether that
        #: is being installed in all processes.
        self._first_filters, self._has_second = 0, not self._second
        #: Copies of parents' states for new processes that have not stopped yet, by process id.
        self._inherited: dict[int, Process] = {}
        self._has_begun = False
        self._has_reported_tracing = False

    @property
    def is_running(self) -> bool:
        """True while a process is left that can make intercepted calls."""
        # A new child is not known before its first stop, and its parent may have ended by then.
        return bool(self._threads) or not self._has_begun or has_children()

    def close(self) -> None:
        """Close the interceptor's descriptors, after the last traced process has ended."""
        self._descriptors.close()

    # One call

    def answer(self, call: InterceptedCall, value: int) -> None:
        """Let a call return ``value``, or fail if ``value`` is a negative errno."""
        thread = self._thread_of(call)
        thread.intercepted = None
        self._injector.answer(thread, value)

    def conclude(self, call: InterceptedCall, value: int) -> None:
        """Answer a call that has taken effect, unless its process has ended."""
        with contextlib.suppress(CallInterrupted):  # signals do not interrupt a stopped thread
            self.answer(call, value)

    def let_through(self, call: InterceptedCall) -> None:
        """Let the kernel perform a call."""
        thread = self._thread_of(call)
        if thread.place is Place.AT_TRAP:
            self.answer(call, -errno.EPERM)
            return
        thread.intercepted = None
        self._injector.let_through(thread)

    # The second filter

    def begin_socket_calls(self, call: InterceptedCall) -> bool:
        """Install the second filter in the calling process now, and in all others; return True."""
        thread = self._thread_of(call)
        if self._has_second and (not self._second or thread.process.has_second):
            return True
        self._has_second = True
        code = self._install_second(thread)
        if code:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self._install_in_others(_TRIES)
        return True

    def _install_second(self, thread: Thread) -> int:
        """Have a stopped thread install the second filter; return 0 or an errno."""
        process = thread.process
        # A child has the filters of its parent, which may have been installed unnoticed.
        if _filters_of(process.number) > self._first_filters:
            process.has_second = True
            return 0
        program = assemble(self._machine, self._second, is_first=False)
        code = self._install(thread, program)
        process.has_second = not code
        if code:
            log.warning("process %d: no filter: %s", process.number, os.strerror(code))
        return code

    def _install_in_others(self, tries: int) -> None:
        """Install the second filter in processes that do not have it, by any of their threads."""
        is_left = False
        for process in list(self._by_process.values()):
            if not process.has_second and not self._install_by_any(process):
                is_left = True
        if is_left and tries > 1:  # no thread was in a state in which it can make a call
            self._scheduler.add(pause(_A_MOMENT), lambda _: self._install_in_others(tries - 1))

    def _install_by_any(self, process: Process) -> bool:
        for number in process.threads:
            thread = self._threads.get(number)
            if thread is not None and thread.place is Place.RUNNING:
                with contextlib.suppress(OSError, CallInterrupted), self._stopped(thread):
                    self._install_second(thread)
                    return True
        return False

    def create_socket(
        self,
        call: InterceptedCall,
        type_: int,
        data_calls: Served | None,
        created: Callable[[int, int], None],
    ) -> int:
        """Let the thread make a unix socket, and return its number from its call."""
        thread = self._thread_of(call)
        number = self._injector.checked(thread, self._machine.socket, AF_UNIX, type_, 0)
        inode = inode_in(self._processes.what_is(thread.number, number))
        if inode is None:  # the process has ended, or may not be inspected
            self._injector.call(thread, self._machine.close, number)
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        created(inode, 0)
        self._finish_with(call, thread, number, data_calls)
        return number

    def answer_with_descriptor(
        self, call: InterceptedCall, fd: int, close_on_exec: bool, data_calls: Served | None
    ) -> int:
        """Give the process a copy of ``fd``, and let the call return its number."""
        thread = self._thread_of(call)
        number = self._descriptors.give(thread, fd, close_on_exec)
        self._finish_with(call, thread, number, data_calls)
        return number

    def _finish_with(
        self, call: InterceptedCall, thread: Thread, number: int, data_calls: Served | None
    ) -> None:
        """Let a call return a descriptor whose data calls are intercepted."""
        if data_calls is not None and not thread.process.covers(data_calls, number):
            code = self._cover(thread, data_calls, [number])
            if code:
                log.warning("process of thread %d: no filter: %s", call.pid, os.strerror(code))
                if data_calls is Served.DATAGRAM:
                    self._injector.call(thread, self._machine.close, number)
                    raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        self.answer(call, number)

    def intercepts_data(self, call: InterceptedCall, data_calls: Served, inode: int) -> bool:
        """Intercept data calls on the socket in the first argument from now on; return True."""
        thread = self._thread_of(call)
        descriptor = call.arguments[0] & 0xFFFF_FFFF
        if not thread.process.covers(data_calls, descriptor):
            numbers = self._processes.numbers_of(call.pid, inode) or [descriptor]
            code = self._cover(thread, data_calls, numbers)
            if code:
                log.warning("process of thread %d: no filter: %s", call.pid, os.strerror(code))
        return True

    def duplicate(self, pid: int, fd: int) -> int:
        """Return a copy of a thread's descriptor."""
        thread = self._threads.get(pid)
        if thread is None:
            raise CallInterrupted
        with self._stopped(thread):
            return self._descriptors.take(thread, fd)

    @contextlib.contextmanager
    def _stopped(self, thread: Thread):  # type: ignore[no-untyped-def]
        """Keep a thread, which may be running, stopped during the with block."""
        if thread.place is not Place.RUNNING:
            yield
            return
        self._injector.stop(thread)
        try:
            yield
        finally:
            with contextlib.suppress(CallInterrupted):
                self._injector.go_on(thread)

    # Waiting

    def suspend(
        self, call: InterceptedCall, interruption: Interruption, interrupted: Callable[[], None]
    ) -> None:
        """Let a thread wait: stopped at first, and then in the kernel."""
        thread = self._thread_of(call)
        thread.interrupted = interrupted
        thread.restarts = interruption is Interruption.RESTART
        deferred = interruption is Interruption.DEFER
        seconds = _DEFERRED_SECONDS if deferred else _STOPPED_SECONDS
        thread.timer = self._scheduler.add(pause(seconds), lambda _: self._put_to_sleep(thread))

    def _put_to_sleep(self, thread: Thread) -> None:
        thread.timer = 0
        with contextlib.suppress(CallInterrupted):
            self._injector.sleep(thread)

    def resume(self, call: InterceptedCall, run: Callable[[], None]) -> bool:
        """End :meth:`suspend`; return whether the call's handler may run now."""
        assert isinstance(call, StoppedCall)
        thread = call.thread
        if thread.intercepted is not call:  # interrupted, and its handler knows
            return True
        if thread.timer:
            self._scheduler.cancel(thread.timer)
            thread.timer = 0
        if thread.place is Place.ASLEEP:
            try:
                self._injector.rouse(thread)
            except CallInterrupted:  # the thread has ended, which its wait status reports
                return False
        thread.interrupted = None
        return True

    def _thread_of(self, call: InterceptedCall) -> Thread:
        assert isinstance(call, StoppedCall)
        if call.thread.intercepted is not call:
            raise CallInterrupted
        return call.thread

    # The programs

    def begin(self, pid: int) -> None:
        """Attach to the first process, which has its filter and waits in a system call."""
        self._has_begun = True
        try:
            self._ptrace.seize(pid)
        except PermissionError:
            if tracer_of(pid):
                raise OSError(errno.EALREADY, os.strerror(errno.EALREADY)) from None
            raise
        self._add(pid, self._add_process(pid))
        self._first_filters = _filters_of(pid)

    async def intercept_inherited(self, pid: int, data_calls: Served, numbers: list[int]) -> None:
        """Intercept data calls on sockets that the first process has inherited."""
        thread = self._threads.get(pid)
        if thread is not None:
            with contextlib.suppress(OSError, CallInterrupted), self._stopped(thread):
                self._cover(thread, data_calls, numbers)

    def shut_down(self, inode: int, insists: bool) -> bool:
        """Shut down the socket with this inode, by the process that has it."""
        return self._try_to_shut_down(inode, _TRIES if insists else 1)

    def _try_to_shut_down(self, inode: int, tries: int) -> bool:
        found = False
        for process in list(self._by_process.values()):
            for number in self._processes.numbers_of(process.number, inode):
                found = True
                for tid in sorted(process.threads, key=self._is_asleep):
                    thread = self._threads.get(tid)
                    if thread is not None and self._shut_down(thread, number, inode):
                        return True
        if found and tries > 1:  # no thread was in a state in which it can make a call

            def again(_: bool) -> None:
                self._try_to_shut_down(inode, tries - 1)

            self._scheduler.add(pause(_A_MOMENT), again)
        return False

    def _is_asleep(self, number: int) -> bool:
        return self._threads[number].place is Place.ASLEEP

    def _shut_down(self, thread: Thread, descriptor: int, inode: int) -> bool:
        with contextlib.suppress(OSError, CallInterrupted):
            sleeps = thread.place is Place.ASLEEP
            if sleeps:
                self._injector.rouse(thread)
            try:
                with self._stopped(thread):
                    return self._injector.shut_down(thread, descriptor, inode)
            finally:
                if sleeps:
                    self._injector.sleep(thread)
        return False

    # What waitpid() reports

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
        with contextlib.suppress(CallInterrupted):
            try:
                self._on_stop(thread, read_stop(status))
            except OSError as error:
                if not is_gone(error):  # a tracee can be killed at any stop; then it is reported
                    raise
        return True

    def _on_stop(self, thread: Thread, stop: Stop) -> None:
        number, event = thread.number, stop.event
        if event is Event.SECCOMP:
            self._on_call(thread, self._ptrace.call_of(number))
        elif event is Event.GROUP_STOP:
            self._on_group_stop(number)
            self._ptrace.listen(number)
        elif event is Event.SIGNAL:
            if stop.signal != signal.SIGSYS or not self._on_trap(thread):
                self._ptrace.resume(number, stop.signal)
        elif event is Event.SYSTEM_CALL and thread.place is Place.ASLEEP:
            self._interrupt(thread)
            self._injector.woken(thread, thread.restarts)
        else:
            if event is Event.EXEC:
                self._on_exec(thread)
            elif event in (Event.FORK, Event.VFORK, Event.CLONE):
                self._on_made(thread, event, self._ptrace.message(number))
            self._ptrace.resume(number)

    # Calls

    def _on_call(self, thread: Thread, call: SystemCall) -> None:
        self._injector.stopped_at_call(thread, call)
        if call.mark != TRACE_MARK:
            # The event is of the program's own filter, which has no tracer: ENOSYS, as without a
            # supervisor.
            self._injector.answer(thread, -errno.ENOSYS)
        elif self._copies(call):
            self._follow_copy(thread, call)
        elif call.number == self._machine.rt_sigaction:
            self._follow_action(thread, call)
        elif call.number == self._machine.ptrace:
            self._refuse_to_trace(thread, call)
        else:
            self._begin_call(thread, call)

    def _on_trap(self, thread: Thread) -> bool:
        """Handle a SIGSYS; return False if the program has sent it."""
        call = self._ptrace.trapped_call_of(thread.number)
        if call is None or call.mark != TRACE_MARK or call.number != self._machine.socket:
            return False
        if not self._injector.stopped_at_trap(thread, call):
            return False
        self._begin_call(thread, call)
        return True

    def _begin_call(self, thread: Thread, call: SystemCall) -> None:
        thread.intercepted = StoppedCall(self, thread, call)
        self._deliver(thread.intercepted)

    def _refuse_to_trace(self, thread: Thread, call: SystemCall) -> None:
        """Fail a request to trace a supervised process, and report it once."""
        if call.arguments[0] != PTRACE_TRACEME and call.arguments[1] not in self._threads:
            self._injector.let_through(thread)
            return
        if not self._has_reported_tracing:
            self._has_reported_tracing = True
            pid = thread.number
            name = self._processes.executable(pid)
            text = f"{name}: cannot trace programs of vsock run (try --interceptor notify)"
            with contextlib.suppress(OSError):  # the process has no standard error
                self._processes.report(pid, text, self.duplicate, lambda: True)
        self._injector.answer(thread, -errno.EPERM)

    def _follow_action(self, thread: Thread, call: SystemCall) -> None:
        """Let a thread set its process's action for SIGTRAP."""
        with contextlib.suppress(OSError):
            action = self._processes.read(thread.number, call.arguments[1], _HANDLER.size)
            thread.process.ignores_trap = _HANDLER.unpack(action)[0] == signal.SIG_IGN
        self._injector.let_through(thread)

    def _copies(self, call: SystemCall) -> bool:
        machine = self._machine
        if call.number == machine.fcntl:
            return call.arguments[1] & 0xFFFF_FFFF in COPYING
        return call.number in (machine.dup, machine.dup2, machine.dup3)

    def _follow_copy(self, thread: Thread, call: SystemCall) -> None:
        """Let a thread copy a descriptor, and have data calls on the copy intercepted."""
        machine, injector = self._machine, self._injector
        source = call.arguments[0] & 0xFFFF_FFFF
        kind = thread.process.kind_of(source)
        if kind is None or not self._serves_data(thread.number, source):
            injector.let_through(thread)
        elif call.number in (machine.dup2, machine.dup3):
            # Cover the copy before it exists: another thread can use it at once.
            target = call.arguments[1] & 0x7FFF_FFFF
            code = 0
            if not thread.process.covers(kind, target):
                code = self._cover(thread, kind, [target])
            if code:
                injector.answer(thread, -code)
            else:
                injector.let_through(thread)
        else:
            copy = injector.call(thread, call.number, *call.arguments)
            if copy >= 0 and not thread.process.covers(kind, copy):
                self._cover(thread, kind, [copy])
            injector.answer(thread, copy)

    def _cover(self, thread: Thread, kind: Served, numbers: list[int]) -> int:
        """Have a stopped process install a filter for descriptors; return 0 or an errno."""
        process = thread.process
        for number in numbers:
            if not process.covers(kind, number):
                added = numbers_for(process.covered[kind], number)
                rules = traced_rules(self._machine, kind, added)
                code = self._install(thread, assemble(self._machine, rules, is_first=False))
                if code:
                    return code
                process.covered[kind].append(added)
        return 0

    def _install(self, thread: Thread, program: bytes) -> int:
        """Have a stopped thread install a filter for its process; return 0 or an errno."""
        machine, call = self._machine, self._injector.call
        at = self._injector.scratch(thread)
        data = SOCK_FPROG.pack(len(program) // 8, at + SOCK_FPROG.size) + program
        if self._injector.write_scratch(thread, data) != at:
            return errno.EFAULT
        arguments = (SET_MODE_FILTER, _ALL_THREADS, at, 0, 0, OWN_CALL)
        result = call(thread, machine.seccomp, *arguments)
        if result == -errno.EACCES:
            # As for the first filter: a process without privilege must promise never to get any.
            call(thread, machine.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            result = call(thread, machine.seccomp, *arguments)
        # A positive result is a thread with a filter of its own, which cannot have this one.
        return errno.EBUSY if result > 0 else -result

    # Threads and processes that begin and end

    def _add(self, number: int, process: Process) -> Thread:
        thread = self._threads[number] = Thread(number, process)
        process.threads.add(number)
        return thread

    def _add_process(self, number: int) -> Process:
        process = self._inherited.pop(number, None)
        if process is None:
            covered: dict[Served, list[Numbers]] = {kind: [] for kind in Served}
            process = Process(number, covered, Space(), _ignores_trap(number))
        self._by_process[number] = process
        return process

    def _adopt(self, number: int) -> Thread:
        """Add a thread that a tracee has created, at its first stop."""
        process_id = number
        if number not in self._inherited:
            with contextlib.suppress(OSError):
                process_id = self._processes.first_thread(number)
        process = self._by_process.get(process_id) or self._add_process(process_id)
        if self._second and self._has_second and not process.has_second:
            # A parent can have made it just before the parent got the filter.
            self._scheduler.add(pause(0), lambda _: self._install_in_others(_TRIES))
        return self._add(number, process)

    def _on_made(self, parent: Thread, event: Event, number: int) -> None:
        process = parent.process
        covered = {kind: list(numbers) for kind, numbers in process.covered.items()}
        # With vfork() the memory is shared until a program is executed.
        space = process.space if event is Event.VFORK else process.space.copy()
        thread = self._threads.get(number)
        if thread is not None:
            if thread.process is not process and not any(thread.process.covered.values()):
                thread.process.covered = covered
        elif event is not Event.CLONE or not self._is_thread(process, number):
            self._inherited[number] = Process(number, covered, space, process.ignores_trap)

    def _is_thread(self, process: Process, number: int) -> bool:
        try:
            return self._processes.first_thread(number) == process.number
        except OSError:
            return True

    def _on_exec(self, thread: Thread) -> None:
        """Forget the other threads, which exec has ended; ``thread`` has the process's number."""
        for number in list(thread.process.threads):
            if number != thread.number:
                self._forget(number)
        self._interrupt(thread)
        thread.process.space = thread.space = Space()
        thread.place, thread.call, thread.saved = Place.RUNNING, None, None
        thread.blocked, thread.is_group_stopped = None, False
        thread.held.clear()

    def _forget(self, number: int) -> None:
        self._inherited.pop(number, None)
        thread = self._threads.pop(number, None)
        if thread is None:
            return
        self._interrupt(thread)
        process = thread.process
        process.threads.discard(number)
        if not process.threads:
            self._by_process.pop(process.number, None)

    def _interrupt(self, thread: Thread) -> None:
        """Give up the call that a thread has stopped at, and notify its handler."""
        thread.intercepted = None
        if thread.timer:
            self._scheduler.cancel(thread.timer)
            thread.timer = 0
        interrupted, thread.interrupted = thread.interrupted, None
        if interrupted is not None:
            interrupted()


def _filters_of(pid: int) -> int:
    """Return the number of seccomp filters of a process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        return int(status_field(status.read(), b"Seccomp_filters"))
    return 0


def _ignores_trap(pid: int) -> bool:
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        return bool(int(status_field(status.read(), b"SigIgn"), 16) & 1 << signal.SIGTRAP - 1)
    return True


def _traced(architecture: Architecture, rule: Rule) -> Rule:
    """Return the rule of a tracing filter for the calls that ``rule`` reports to a listener."""
    if rule.action != NOTIFY:
        return rule
    is_refused_elsewhere = rule.number == architecture.socket
    return rule._replace(action=MARKED_TRAP if is_refused_elsewhere else MARKED_TRACE)


class TraceMechanism:
    """Interception by ptrace, in the program's and the supervisor's process."""

    def install(self, architecture: Architecture, rules: Sequence[Rule]) -> list[int]:
        """Put this process under a filter with ``rules``, irrevocably."""
        made = [_traced(architecture, rule) for rule in rules]
        made += [
            Rule(architecture.ptrace, MARKED_TRACE, (When(0, ArgumentCondition.EQUAL, request),))
            for request in TRACING_REQUESTS
        ]
        equal = When(0, ArgumentCondition.EQUAL, signal.SIGTRAP)
        made.append(Rule(architecture.rt_sigaction, MARKED_TRACE, (equal,)))
        install_filter(architecture, assemble(architecture, made, other=MARKED_TRACE), 0)
        return []

    def may_install_later(self, architecture: Architecture, pid: int) -> bool:
        """Return True: all processes of the program are traced."""
        return True

    def intercept(self, descriptors: Sequence[int], surroundings: Surroundings) -> TraceInterceptor:
        """Return the interceptor, for the supervisor's process."""
        return TraceInterceptor(surroundings)
