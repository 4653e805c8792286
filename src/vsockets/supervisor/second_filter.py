"""The second filter of a program that gets its first vSockets socket, with seccomp notification.

Until then a filter with few rules is in force, so that the program's other sockets cost nothing.
The kernel allows one listener for a process, and a filter cannot be replaced: but a filter whose
listener was closed does not count.  So all threads of the program are stopped, the first filter's
listener is closed, each process is made to install the second filter, and all threads go on.
The first filter's rules are among the second's, which is newer and therefore decides.

A thread that waits in ``epoll_wait()`` when it is stopped gets EINTR, as after SIGSTOP and SIGCONT.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
from collections import deque
from collections.abc import Callable, Iterator

from .._linux.bpf import PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, SOCK_FPROG
from .._linux.inspection import status_field
from .arch import Architecture
from .filter import OWN_CALL
from .injection import Injector, Space, StoppedThread, stops_soon
from .interception import CallInterrupted
from .process import Processes
from .ptrace import SYSTEM_CALL_STOPS, WAIT_FOR_ALL, Event, Ptrace, Stop, read_stop

log = logging.getLogger(__name__)

#: For all threads, with a listener, and with an error if another thread cannot have the filter.
_WITH_LISTENER = 1 << 0 | 1 << 3 | 1 << 4


class _NotNow(Exception):
    """A thread that cannot be stopped now."""


class SecondFilter:
    """The installation of the second filter in all processes of a program."""

    def __init__(self, machine: Architecture, processes: Processes, program: bytes) -> None:
        self._machine = machine
        self._processes = processes
        self._program = program
        self._ptrace = Ptrace(machine)
        self._injector = Injector(machine, self._ptrace, processes)
        #: Wait statuses that were read here, and have not been handled.
        self.unread: deque[tuple[int, int]] = self._injector.unread
        #: Threads that were interrupted, and had not stopped in time.
        self._late: set[int] = set()
        self._own_filters = _filters_of(os.getpid())

    def install(self, close_first: Callable[[], None]) -> list[int] | None:
        """Install the filter; return its listeners, or None if an attempt is to be made later.

        ``close_first`` is called to close the listener of the first filter.
        """
        stopped: dict[int, list[StoppedThread]] = {}
        try:
            try:
                self._stop_all(stopped)
            except _NotNow:
                return None
            close_first()
            installed = (self._install_in(pid, threads) for pid, threads in stopped.items())
            return [listener for listener in installed if listener is not None]
        finally:
            for threads in stopped.values():
                for thread in threads:
                    self._let_go(thread)

    def on_wait_status(self, number: int, status: int) -> bool:
        """Let a thread go on that has stopped too late; return False for any other status."""
        if number not in self._late:
            return False
        if not os.WIFSTOPPED(status):
            self._late.discard(number)
            return False
        stop = read_stop(status)
        with contextlib.suppress(OSError):  # it has ended
            self._ptrace.detach(number, _signal_of(stop))
        self._late.discard(number)
        return True

    # Stopping

    def _stop_all(self, stopped: dict[int, list[StoppedThread]]) -> None:
        """Stop all threads of the program, and add them to ``stopped``, by process.

        Raises _NotNow if one does not stop in time.
        """
        seen: set[int] = set()
        found = True
        while found:  # a thread that has not stopped yet may create another
            found = False
            for pid in _descendants(os.getpid()):
                if pid not in stopped and _filters_of(pid) <= self._own_filters:
                    continue  # the supervisor's own child
                threads = [n for n in _numbers_in(f"/proc/{pid}/task") if n not in seen]
                found = found or bool(threads)
                seen.update(threads)
                self._late.update(filter(self._interrupt, threads))
                for number in threads:
                    if number in self._late and self._has_stopped(number):
                        stopped.setdefault(pid, []).append(StoppedThread(number, Space()))

    def _interrupt(self, number: int) -> bool:
        """Interrupt a thread; return False if it has ended or may not be traced."""
        if number not in self._late:
            try:
                self._ptrace.seize(number, SYSTEM_CALL_STOPS)
            except OSError as error:
                if error.errno == errno.EPERM and not _has_ended(number):
                    log.warning("thread %d may not be traced: it gets no vSockets socket", number)
                return False
        with contextlib.suppress(OSError):  # it has ended, or stops already
            self._ptrace.interrupt(number)
        return True

    def _has_stopped(self, number: int) -> bool:
        """Wait until an interrupted thread has stopped; return False if it has ended.

        Raises _NotNow if it does not stop.
        """
        while True:
            if not stops_soon(number):
                raise _NotNow
            try:
                waited, status = os.waitpid(number, WAIT_FOR_ALL)
            except ChildProcessError:  # it has executed a program in another thread's place
                self._late.discard(number)
                raise _NotNow from None
            if not os.WIFSTOPPED(status):
                self._late.discard(number)
                self.unread.append((waited, status))
                return False
            stop = read_stop(status)
            if stop.event in (Event.STOP, Event.GROUP_STOP):
                self._late.discard(number)
                return True
            self._ptrace.resume(number, _signal_of(stop))  # it stops before it runs on

    def _let_go(self, thread: StoppedThread) -> None:
        """Let a stopped thread run, untraced."""
        try:
            if thread.blocked is None:  # it has made no call
                self._ptrace.detach(thread.number)
                return
            self._injector.go_on(thread)  # to another stop, from which the kernel restarts a call
            _, status = os.waitpid(thread.number, WAIT_FOR_ALL)
            if os.WIFSTOPPED(status):
                self._ptrace.detach(thread.number, _signal_of(read_stop(status)))
            else:
                self.unread.append((thread.number, status))
        except (OSError, CallInterrupted):  # killed meanwhile, or executes a program
            if not _has_ended(thread.number):
                self._late.add(thread.number)

    # Installing

    def _install_in(self, pid: int, threads: list[StoppedThread]) -> int | None:
        """Have one of a process's threads install the filter; return the listener."""
        for thread in threads:
            with contextlib.suppress(OSError, CallInterrupted):
                if self._injector.stopped_anywhere(thread):
                    return self._install_by(thread)
        log.warning("process %d: cannot install a filter: it gets no vSockets socket", pid)
        return None

    def _install_by(self, thread: StoppedThread) -> int:
        machine, call = self._machine, self._injector.call
        at = self._injector.scratch(thread)
        data = SOCK_FPROG.pack(len(self._program) // 8, at + SOCK_FPROG.size) + self._program
        if self._injector.write_scratch(thread, data) != at:
            raise OSError(errno.EFAULT, os.strerror(errno.EFAULT))
        install = (SET_MODE_FILTER, _WITH_LISTENER, at, 0, 0, OWN_CALL)
        number = call(thread, machine.seccomp, *install)
        if number == -errno.EACCES:
            # Without privileges, a process must first promise never to gain any.
            call(thread, machine.prctl, PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            number = call(thread, machine.seccomp, *install)
        self._injector.unmap_scratch(thread)
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        try:
            return self._processes.duplicate(thread.number, number)
        finally:
            call(thread, machine.close, number)


def may_stop(machine: Architecture, pid: int) -> bool:
    """Return whether this process may trace its child ``pid``, which waits in a system call."""
    ptrace = Ptrace(machine)
    try:
        ptrace.seize(pid, SYSTEM_CALL_STOPS)
        ptrace.interrupt(pid)
        _, status = os.waitpid(pid, WAIT_FOR_ALL)
        if not os.WIFSTOPPED(status):
            return False
        ptrace.detach(pid, _signal_of(read_stop(status)))
    except OSError:
        return False
    return True


def _signal_of(stop: Stop) -> int:
    return stop.signal if stop.event is Event.SIGNAL else 0


def _descendants(pid: int) -> Iterator[int]:
    """Yield the processes below ``pid``, parents first."""
    waiting = deque([pid])
    while waiting:
        parent = waiting.popleft()
        for thread in _numbers_in(f"/proc/{parent}/task"):
            with (
                contextlib.suppress(OSError),  # it has ended
                open(f"/proc/{parent}/task/{thread}/children") as children,
            ):
                for child in map(int, children.read().split()):
                    yield child
                    waiting.append(child)


def _numbers_in(folder: str) -> list[int]:
    """Return the entries of a folder in /proc that are numbers; none if the process has ended."""
    try:
        return [int(name) for name in os.listdir(folder) if name.isdecimal()]
    except OSError:
        return []


def _filters_of(pid: int) -> int:
    """Return the number of seccomp filters of a process."""
    with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as status:
        return int(status_field(status.read(), b"Seccomp_filters"))
    return 0


def _has_ended(number: int) -> bool:
    """Return whether a thread has ended, even if it was not reaped yet."""
    with contextlib.suppress(OSError), open(f"/proc/{number}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2][1:2] in b"ZX"
    return True
