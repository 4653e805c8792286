"""Interception by seccomp's user notification, ``seccomp_unotify(2)``.

One descriptor, the *listener*, reports the calls of every process under the filter, and takes the
answers.  A filter cannot distinguish data calls on vSockets from others: they are intercepted
by the tracer (:mod:`.tracing`), in the processes that have such sockets.
"""

from __future__ import annotations

import _socket
import contextlib
import ctypes
import errno
import fcntl
import logging
import os
import select
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from socket import AF_UNIX, SOCK_CLOEXEC
from typing import NamedTuple

from .._linux.bpf import PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER
from .._linux.libc import libc
from .arch import Architecture
from .filter import Rule, Served, assemble
from .interception import CallInterrupted, InterceptedCall, Interruption, Surroundings
from .limits import SUPERVISOR_SIGNAL_POLL_SECONDS, SUPERVISOR_SIGNAL_WAIT_SECONDS
from .scheduler import pause
from .second_filter import SecondFilter, may_stop
from .tracing import TracedCall, Tracer

log = logging.getLogger(__name__)

# struct seccomp_notif: id, pid, flags; then struct seccomp_data: number, architecture,
# instruction pointer, six arguments.
_NOTIFICATION = struct.Struct("=QIIiIQ6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADD_DESCRIPTOR = struct.Struct("=QIIII")
_ID = struct.Struct("=Q")

# ioctls of the listener, linux/seccomp.h.
_RECEIVE, _SEND, _IS_VALID, _ADD = 0xC050_2100, 0xC018_2101, 0x4008_2102, 0xC018_2103
_SET_FLAGS = 0x4008_2104
_SYNCHRONOUS_WAKE_UP = 1

_CONTINUE = 1
_ADD_AND_ANSWER = 2

_NEW_LISTENER = 8

#: A call no longer waits, or its listener is closed.
_ENDED = (FileNotFoundError, ValueError)

#: Answers kept for threads that were interrupted before they had them: such a thread repeats the
#: call at once or never.
_KEPT_ANSWERS = 1024
#: Attempts to install the second filter, and seconds between two.
_BEGIN_ATTEMPTS, _BEGIN_SECONDS = 1000, 0.001
#: Attempts to intercept data calls before the first program begins, and seconds between two.
_ATTEMPTS, _ATTEMPT_SECONDS = 1000, 0.001


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def install(machine: Architecture, program: bytes, flags: int = _NEW_LISTENER) -> int:
    """Put this process under a filter, irrevocably; return the listener's descriptor.

    Without flags the filter has no listener.

    Raises OSError: EBUSY if a filter with a listener is installed already, EINVAL or ENOSYS if the
    kernel does not support it.
    """
    length = len(program) // 8
    argument = ctypes.byref(_Program(length, program))

    def attempt() -> int:
        result: int = libc.syscall(machine.seccomp, SET_MODE_FILTER, flags, argument)
        return result

    # Without privileges, a process must first promise never to gain any.
    listener = attempt()
    if listener < 0 and ctypes.get_errno() == errno.EACCES:
        libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        listener = attempt()
    if listener < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return listener


class NotifiedCall(InterceptedCall):
    """A call that a filter has reported to its listener."""

    __slots__ = ("listener",)

    listener: Listener


class Listener:
    """The supervisor's end of a filter.  Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._buffer = bytearray(_NOTIFICATION.size)
        self._empty = bytes(_NOTIFICATION.size)
        with contextlib.suppress(OSError):  # Linux 6.6: wake the other side on this processor
            fcntl.ioctl(fd, _SET_FLAGS, _SYNCHRONOUS_WAKE_UP)

    def fileno(self) -> int:
        """Return the listener's descriptor.

        The descriptor is readable when a call waits, and hung up when no process is left under the
        filter.
        """
        return self._fd

    def close(self) -> None:
        """Close the listener: calls that wait are interrupted, and new ones fail with ENOSYS."""
        os.close(self._fd)
        self._fd = -1

    def receive(self) -> NotifiedCall:
        """Return the next call; block until there is one.

        Raises CallInterrupted if a signal has interrupted the call since the listener was readable.
        """
        self._buffer[:] = self._empty  # the kernel requires zeros
        try:
            fcntl.ioctl(self._fd, _RECEIVE, self._buffer)
        except FileNotFoundError:
            raise CallInterrupted from None
        id_, pid, _, number, architecture, instruction, *arguments = _NOTIFICATION.unpack(
            self._buffer
        )
        call = NotifiedCall(id_, pid, number, architecture, instruction, tuple(arguments))
        call.listener = self
        return call

    def is_valid(self, id_: int) -> bool:
        """Return whether a call still waits."""
        try:
            fcntl.ioctl(self._fd, _IS_VALID, _ID.pack(id_))
        except _ENDED:
            return False
        return True

    def answer(self, id_: int, value: int) -> None:
        """Let a call return ``value``, or fail if it is a negative errno.

        Raises CallInterrupted if the call no longer waits.
        """
        response = (id_, 0, value, 0) if value < 0 else (id_, value, 0, 0)
        self._respond(_RESPONSE.pack(*response))

    def let_through(self, id_: int) -> None:
        """Let the kernel perform the call.

        Raises CallInterrupted if the call no longer waits.
        """
        self._respond(_RESPONSE.pack(id_, 0, 0, _CONTINUE))

    def answer_with_descriptor(self, id_: int, fd: int, close_on_exec: bool) -> int:
        """Give the process a copy of ``fd`` and let the call return its number, atomically.

        Raises CallInterrupted if the call no longer waits, OSError(EMFILE) if the process has no
        free descriptor.
        """
        return self._add(id_, fd, close_on_exec, _ADD_AND_ANSWER)

    def add_descriptor(self, id_: int, fd: int, close_on_exec: bool) -> int:
        """Give the process a copy of ``fd`` and return its number; the call still waits."""
        return self._add(id_, fd, close_on_exec, 0)

    def _add(self, id_: int, fd: int, close_on_exec: bool, flags: int) -> int:
        request = _ADD_DESCRIPTOR.pack(id_, flags, fd, 0, os.O_CLOEXEC if close_on_exec else 0)
        try:
            added: int = fcntl.ioctl(self._fd, _ADD, bytearray(request))
        except (*_ENDED, ProcessLookupError):
            # ESRCH: a signal interrupted the call while the descriptor was being added.
            raise CallInterrupted from None
        return added

    def _respond(self, response: bytes) -> None:
        try:
            fcntl.ioctl(self._fd, _SEND, response)
        except _ENDED:
            raise CallInterrupted from None


class _KeptAnswer(NamedTuple):
    """An answer kept for a thread that may repeat the call, because a signal came first."""

    call: NotifiedCall
    value: int
    deadline: float  #: ``time.monotonic`` when it is given despite pending signals


class _Suspended(NamedTuple):
    """A call whose handler waits."""

    call: NotifiedCall
    interrupted: Callable[[], None]


class NotificationInterceptor:
    """An interceptor that uses listeners, and a tracer for data calls.

    A program has one listener until it gets its first vSockets socket, and then one for each
    process that it has at that time, with the children of that process
    (:mod:`.second_filter`).
    """

    def __init__(self, listener: Listener, surroundings: Surroundings) -> None:
        self._listeners: set[Listener] = set()
        self._processes = surroundings.processes
        self._scheduler = surroundings.scheduler
        self._argument_counts = surroundings.argument_counts
        self._deliver = surroundings.deliver
        self._tracer = Tracer(
            surroundings.architecture,
            surroundings.processes,
            surroundings.deliver,
            surroundings.serves_data,
            surroundings.on_group_stop,
        )
        self._suspended: dict[int, _Suspended] = {}  # by thread
        self._kept: OrderedDict[int, _KeptAnswer] = OrderedDict()  # by thread
        self._reported_untraced: set[tuple[int, Served]] = set()  # with the process
        #: The listener of a filter that does not intercept calls on sockets, if that is in force.
        self._first: Listener | None = None
        self._second: SecondFilter | None = None
        #: Calls that wait until the second filter is installed.
        self._beginning: list[InterceptedCall] = []
        self.unread: deque[tuple[int, int]] = deque()
        if surroundings.second:
            machine = surroundings.architecture
            program = assemble(machine, surroundings.second)
            self._first = listener
            self._second = SecondFilter(machine, self._processes, program)
            self.unread = self._second.unread
        self._watch(listener)

    @property
    def is_running(self) -> bool:
        """True while a process is left under the filter."""
        return bool(self._listeners)

    def _watch(self, listener: Listener) -> None:
        self._listeners.add(listener)
        self._scheduler.watch_directly(
            listener.fileno(), lambda events: self._on_listener(listener, events)
        )

    def _close(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        self._scheduler.unwatch_directly(listener.fileno())
        listener.close()

    # Calls

    def _on_listener(self, listener: Listener, events: int) -> None:
        if events & select.POLLIN:
            try:
                call = listener.receive()
            except (CallInterrupted, InterruptedError):
                return
            if (self._suspended or self._kept) and self._is_repeated(call):
                return
            self._deliver(call)
        elif events & (select.POLLHUP | select.POLLERR):
            self._close(listener)

    def _is_repeated(self, call: NotifiedCall) -> bool:
        """Return whether a thread repeats a call that is being served, or has its answer."""
        used = self._argument_counts.get(call.number)
        if used is None:  # of another architecture
            return False
        suspended = self._suspended.get(call.pid)
        if suspended is not None:
            if suspended.call.is_repeated_by(call, used):
                suspended.call.id, suspended.call.listener = call.id, call.listener
                return True
            del self._suspended[call.pid]
            suspended.interrupted()
        kept = self._kept.pop(call.pid, None)
        if kept is not None and kept.call.is_repeated_by(call, used):
            self._give(kept._replace(call=call))
            return True
        return False

    def is_waiting(self, call: InterceptedCall) -> bool:
        """Return whether the listener, or the tracer, still holds a call."""
        if isinstance(call, TracedCall):
            return self._tracer.is_waiting(call)
        assert isinstance(call, NotifiedCall)
        return call.listener.is_valid(call.id)

    def answer(self, call: InterceptedCall, value: int) -> None:
        """Answer a call; the answer is lost if a signal has woken the thread already."""
        if isinstance(call, TracedCall):
            self._tracer.answer(call.thread, value)
        else:
            assert isinstance(call, NotifiedCall)
            call.listener.answer(call.id, value)

    def let_through(self, call: InterceptedCall) -> None:
        """Let the kernel perform a call."""
        if isinstance(call, TracedCall):
            self._tracer.let_through(call.thread)
        else:
            assert isinstance(call, NotifiedCall)
            call.listener.let_through(call.id)

    def suspend(
        self,
        call: InterceptedCall,
        interruption: Interruption,
        interrupted: Callable[[], None],
    ) -> None:
        """Remember a call that waits, in case its thread is interrupted and repeats it."""
        if isinstance(call, TracedCall):
            restarts = interruption is Interruption.RESTART
            self._tracer.sleep(call.thread, restarts, interrupted)
        else:
            # The kernel interrupts and restarts the call itself.
            assert isinstance(call, NotifiedCall)
            self._suspended[call.pid] = _Suspended(call, interrupted)

    def resume(self, call: InterceptedCall, run: Callable[[], None]) -> bool:
        """Forget a suspended call, and return True: its handler can run at once."""
        suspended = self._suspended.get(call.pid)
        if suspended is not None and suspended.call is call:
            del self._suspended[call.pid]
        return True

    # The second filter

    def begin_socket_calls(self, call: InterceptedCall) -> bool:
        """Return whether the second filter is installed; otherwise begin to install it.

        The thread repeats ``call`` because it is stopped meanwhile.
        """
        if self._first is None:
            return True
        self._beginning.append(call)
        if len(self._beginning) == 1:
            self._install_second(_BEGIN_ATTEMPTS)
        return False

    def _install_second(self, attempts: int) -> None:
        first, second = self._first, self._second
        assert first is not None and second is not None
        listeners = second.install(lambda: self._close(first))
        if listeners is not None:
            self._first = None
            self._beginning.clear()
            for fd in listeners:
                self._watch(Listener(fd))
            return
        self._beginning = [call for call in self._beginning if self.is_waiting(call)]
        if not self._beginning:
            return
        if attempts > 1:
            self._scheduler.add(pause(_BEGIN_SECONDS), lambda _: self._install_second(attempts - 1))
            return
        log.warning("cannot intercept calls on sockets: a thread of the program does not stop")
        refused, self._beginning = self._beginning, []
        for call in refused:
            with contextlib.suppress(CallInterrupted):
                self.answer(call, -errno.EPERM)

    # Answers that must not be lost

    def conclude(self, call: InterceptedCall, value: int) -> None:
        """Answer a call, or keep the answer for when its thread repeats it."""
        if isinstance(call, TracedCall):
            self._tracer.answer(call.thread, value)
            return
        assert isinstance(call, NotifiedCall)
        if not self._processes.has_signal(call.pid):  # nearly always
            try:
                call.listener.answer(call.id, value)
                return
            except CallInterrupted:
                pass
        self._give(self._keeping(call, value))

    @staticmethod
    def _keeping(call: InterceptedCall, value: int) -> _KeptAnswer:
        assert isinstance(call, NotifiedCall)
        return _KeptAnswer(call, value, time.monotonic() + SUPERVISOR_SIGNAL_WAIT_SECONDS)

    def _give(self, answer: _KeptAnswer) -> None:
        """Answer a call, once the signals of its thread have been delivered.

        The kernel accepts an answer also after a signal has woken the thread, and drops it then:
        the thread repeats the call, although the kernel has reported to the supervisor that it has
        the answer.
        """
        call = answer.call
        if not self._processes.has_signal(call.pid) or time.monotonic() >= answer.deadline:
            try:
                call.listener.answer(call.id, answer.value)
                return
            except CallInterrupted:
                pass
        else:
            self._scheduler.add(
                pause(SUPERVISOR_SIGNAL_POLL_SECONDS), lambda _: self._give_again(answer)
            )
        self._keep(answer)

    def _keep(self, answer: _KeptAnswer) -> None:
        self._kept[answer.call.pid] = answer
        if len(self._kept) > _KEPT_ANSWERS:
            self._kept.popitem(last=False)

    def _give_again(self, answer: _KeptAnswer) -> None:
        if self._kept.get(answer.call.pid) is answer:  # else the thread has repeated the call
            del self._kept[answer.call.pid]
            self._give(answer)

    # Descriptors

    def duplicate(self, pid: int, fd: int) -> int:
        """Return a copy of a thread's descriptor, by pidfd_getfd().

        Raises OSError(EBADF) if the descriptor is not open.
        """
        return self._processes.duplicate(pid, fd)

    def shut_down(self, inode: int, insists: bool) -> bool:
        """Shut down a socket by a copy of the descriptor that /proc shows."""
        return self._processes.shut_down(inode)

    def create_socket(
        self,
        call: InterceptedCall,
        type_: int,
        data_calls: Served | None,
        created: Callable[[int], None],
    ) -> None:
        """Create a socket here, and give the process a copy of it."""
        with contextlib.closing(_socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC)) as sock:
            created(os.fstat(sock.fileno()).st_ino)
            close_on_exec = bool(type_ & SOCK_CLOEXEC)
            self.answer_with_descriptor(call, sock.fileno(), close_on_exec, data_calls)

    def answer_with_descriptor(
        self, call: InterceptedCall, fd: int, close_on_exec: bool, data_calls: Served | None
    ) -> None:
        """Give the process a copy of ``fd``; for ``data_calls``, trace the process from then on."""
        assert isinstance(call, NotifiedCall)
        if data_calls is None or not self._may_trace(call, data_calls, is_new=True):
            call.listener.answer_with_descriptor(call.id, fd, close_on_exec)
            return
        number = call.listener.add_descriptor(call.id, fd, close_on_exec)
        if self._tracer.covers(call.pid, data_calls, number):
            self.conclude(call, number)
        else:
            self._cover(call, data_calls, [number], number)

    # Data calls

    def intercepts_data(self, call: InterceptedCall, data_calls: Served, inode: int) -> bool:
        """Return True if data calls are traced or cannot be; otherwise begin tracing them."""
        descriptor = call.arguments[0] & 0xFFFF_FFFF
        if isinstance(call, TracedCall) or self._tracer.covers(call.pid, data_calls, descriptor):
            return True
        if not self._may_trace(call, data_calls, is_new=False):
            return True
        numbers = self._processes.numbers_of(call.pid, inode)
        if not self.is_waiting(call):
            raise CallInterrupted
        self._cover(call, data_calls, numbers or [descriptor], None)
        return False

    def _may_trace(self, call: InterceptedCall, data_calls: Served, is_new: bool) -> bool:
        """Return whether the process is traced from now on.

        Raises CallInterrupted if the call no longer waits, OSError(EPERM) for a new datagram
        socket, which would be useless.
        """
        try:
            self._tracer.attach(call.pid)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES):
                raise CallInterrupted from None
            self._report_untraced(call, data_calls)
            if data_calls is Served.DATAGRAM and is_new:
                raise
            return False
        return True

    def _cover(
        self, call: InterceptedCall, data_calls: Served, numbers: list[int], answer: int | None
    ) -> None:
        """Have the tracer intercept data calls on these descriptors.

        The thread repeats its call afterwards, and gets ``answer`` then, if any.
        """

        def done(code: int) -> None:
            value = answer
            if code:
                log.warning(
                    "process of thread %d: cannot install a filter: %s", call.pid, os.strerror(code)
                )
                if data_calls is Served.DATAGRAM and answer is not None:
                    value = -errno.EPERM
            if value is not None:
                self._keep(self._keeping(call, value))

        self._tracer.cover(call.pid, data_calls, numbers, call.arguments, done)

    def _report_untraced(self, call: InterceptedCall, data_calls: Served) -> None:
        effect = "datagram sockets do not work"
        if data_calls is Served.PACKET:
            effect = "packet sockets lose MSG_EOR"
        key = self._processes.first_thread(call.pid), data_calls
        if key in self._reported_untraced:
            return
        self._reported_untraced.add(key)
        name = self._processes.executable(call.pid)
        text = f"{name} may not be traced (Yama's ptrace_scope, or it has a tracer): {effect}"
        with contextlib.suppress(OSError):  # it has ended, or has no standard error
            self._processes.report(call.pid, text, self.duplicate, lambda: self.is_waiting(call))

    # The programs

    def begin(self, pid: int) -> None:
        """Do nothing: a filter needs no attaching."""

    async def intercept_inherited(self, pid: int, data_calls: Served, numbers: list[int]) -> None:
        """Trace the first process, if it may be traced, and cover its inherited sockets."""
        try:
            self._tracer.attach(pid)
        except OSError:  # reported at the program's first call about one of the sockets
            return
        for _ in range(_ATTEMPTS):
            codes: list[int] = []
            # OSError: it does not wait yet.
            with contextlib.suppress(OSError):
                arguments = self._processes.arguments_of(pid)
                self._tracer.cover(pid, data_calls, numbers, arguments, codes.append)
                while not codes and self._tracer.is_tracing(pid):
                    await pause(_ATTEMPT_SECONDS)
            if codes and codes[0] != errno.EINTR:
                return
            await pause(_ATTEMPT_SECONDS)

    def on_wait_status(self, pid: int, status: int) -> bool:
        """Pass what waitpid() reports to the tracer."""
        if self._second is not None and self._second.on_wait_status(pid, status):
            return True
        return self._tracer.on_wait_status(pid, status)


class NotificationMechanism:
    """Interception by seccomp notification, in the program's and the supervisor's process."""

    def install(self, architecture: Architecture, rules: Sequence[Rule]) -> list[int]:
        """Install the filter, and return its listener."""
        return [install(architecture, assemble(architecture, rules))]

    def may_install_later(self, architecture: Architecture, pid: int) -> bool:
        """Return whether this process may trace the program's."""
        return may_stop(architecture, pid)

    def intercept(
        self, descriptors: Sequence[int], surroundings: Surroundings
    ) -> NotificationInterceptor:
        """Return the interceptor of a listener, the only one of ``descriptors``."""
        (listener,) = descriptors
        return NotificationInterceptor(Listener(listener), surroundings)
