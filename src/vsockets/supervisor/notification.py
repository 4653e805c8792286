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
import functools
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
from .._linux.sockets import cookie_of
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
_NOTIFICATION = struct.Struct("=QIIiIQ48x")
_ARGUMENTS = struct.Struct("=32x6Q")
_RESPONSE = struct.Struct("=QqiI")
_ADD_DESCRIPTOR = struct.Struct("=QIIII")

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

    __slots__ = ("_notification", "interrupted", "listener")

    def __init__(self, listener: Listener, notification: bytearray) -> None:
        self.listener = listener
        self._notification = notification
        self.id, self.pid, _, self.number, self.architecture, self.instruction = (
            _NOTIFICATION.unpack(notification)
        )
        self.arguments = _ARGUMENTS.unpack(notification)
        #: Called if a signal ends the call while its handler waits.
        self.interrupted: Callable[[], None] | None = None

    def is_waiting(self) -> bool:
        """Return whether the listener still holds the call."""
        try:
            # Its argument is the call's id, with which the notification begins.
            fcntl.ioctl(self.listener.fd, _IS_VALID, self._notification)
        except _ENDED:
            return False
        return True

    def answer(self, value: int) -> None:
        """Answer the call; the answer is lost if a signal has woken the thread already."""
        self.listener.answer(self.id, value)

    def let_through(self) -> None:
        """Let the kernel perform the call."""
        self.listener.answer(self.id, 0, _CONTINUE)

    def continue_as(self, repeated: NotifiedCall) -> None:
        """Take the place of ``repeated``, by which the thread has repeated this call."""
        self.id, self.listener = repeated.id, repeated.listener
        self._notification = repeated._notification


class Listener:
    """The supervisor's end of a filter.  Owns the descriptor."""

    def __init__(self, fd: int) -> None:
        #: Readable when a call waits, and hung up when no process is left under the filter.
        self.fd = fd
        # For ioctl().  That bytes are read-only it would notice by an exception each time.
        self._response = bytearray(_RESPONSE.size)
        self._addition = bytearray(_ADD_DESCRIPTOR.size)
        with contextlib.suppress(OSError):  # Linux 6.6: wake the other side on this processor
            fcntl.ioctl(fd, _SET_FLAGS, _SYNCHRONOUS_WAKE_UP)

    def close(self) -> None:
        """Close the listener: calls that wait are interrupted, and new ones fail with ENOSYS."""
        os.close(self.fd)
        self.fd = -1

    def receive(self) -> NotifiedCall:
        """Return the next call; block until there is one.

        Raises CallInterrupted if a signal has interrupted the call since the listener was readable.
        """
        notification = bytearray(_NOTIFICATION.size)  # the kernel requires zeros
        try:
            fcntl.ioctl(self.fd, _RECEIVE, notification)
        except FileNotFoundError:
            raise CallInterrupted from None
        return NotifiedCall(self, notification)

    def answer(self, id_: int, value: int, flags: int = 0) -> None:
        """Let a call return ``value``, or fail if it is a negative errno.

        Raises CallInterrupted if the call no longer waits.
        """
        error = 0
        if value < 0:
            value, error = 0, value
        _RESPONSE.pack_into(self._response, 0, id_, value, error, flags)
        try:
            fcntl.ioctl(self.fd, _SEND, self._response)
        except _ENDED:
            raise CallInterrupted from None

    def add_descriptor(self, id_: int, fd: int, close_on_exec: bool, flags: int = 0) -> int:
        """Give the process a copy of ``fd``, and return its number.

        With _ADD_AND_ANSWER, the call returns that number, atomically; else it still waits.

        Raises CallInterrupted if the call no longer waits, OSError(EMFILE) if the process has no
        free descriptor.
        """
        new_flags = os.O_CLOEXEC if close_on_exec else 0
        _ADD_DESCRIPTOR.pack_into(self._addition, 0, id_, flags, fd, 0, new_flags)
        try:
            added: int = fcntl.ioctl(self.fd, _ADD, self._addition)
        except (*_ENDED, ProcessLookupError):
            # ESRCH: a signal interrupted the call while the descriptor was being added.
            raise CallInterrupted from None
        return added


class _KeptAnswer(NamedTuple):
    """An answer kept for a thread that may repeat the call, because a signal came first."""

    call: NotifiedCall
    value: int
    deadline: float  #: ``time.monotonic`` when it is given despite pending signals


class NotificationInterceptor:
    """An interceptor that uses listeners, and a tracer for data calls.

    A program has one listener until it gets its first vSockets socket, and then one for each
    process that it has at that time, with the children of that process
    (:mod:`.second_filter`).
    """

    def __init__(self, listener: Listener, surroundings: Surroundings) -> None:
        self._listeners: set[Listener] = set()
        self.is_running = False  #: whether a process is left under the filter
        self._processes = surroundings.processes
        #: Returns a copy of a thread's descriptor, by pidfd_getfd().
        self.duplicate = surroundings.processes.duplicate
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
        self._suspended: dict[int, NotifiedCall] = {}  # calls whose handlers wait, by thread
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

    def _watch(self, listener: Listener) -> None:
        self._listeners.add(listener)
        self.is_running = True
        on_listener = functools.partial(self._on_listener, listener)
        self._scheduler.watch_directly(listener.fd, on_listener)

    def _close(self, listener: Listener) -> None:
        self._listeners.discard(listener)
        self.is_running = bool(self._listeners)
        self._scheduler.unwatch_directly(listener.fd)
        listener.close()

    # Calls

    def _on_listener(self, listener: Listener, events: int) -> None:
        if events & select.POLLIN:
            try:
                call = listener.receive()
            except (CallInterrupted, InterruptedError):
                return
            if (call.pid in self._suspended or call.pid in self._kept) and self._is_repeated(call):
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
            if suspended.is_repeated_by(call, used):
                suspended.continue_as(call)
                return True
            del self._suspended[call.pid]
            assert suspended.interrupted is not None
            suspended.interrupted()
        kept = self._kept.pop(call.pid, None)
        if kept is not None and kept.call.is_repeated_by(call, used):
            self._give(kept._replace(call=call))
            return True
        return False

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
            call.interrupted = interrupted
            self._suspended[call.pid] = call

    def resume(self, call: InterceptedCall, run: Callable[[], None]) -> bool:
        """Forget a suspended call, and return True: its handler can run at once."""
        if self._suspended.get(call.pid) is call:
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
        self._beginning = [call for call in self._beginning if call.is_waiting()]
        if not self._beginning:
            return
        if attempts > 1:
            self._scheduler.add(pause(_BEGIN_SECONDS), lambda _: self._install_second(attempts - 1))
            return
        log.warning("cannot intercept calls on sockets: a thread of the program does not stop")
        refused, self._beginning = self._beginning, []
        for call in refused:
            with contextlib.suppress(CallInterrupted):
                call.answer(-errno.EPERM)

    # Answers that must not be lost

    def conclude(self, call: InterceptedCall, value: int) -> None:
        """Answer a call, or keep the answer for when its thread repeats it."""
        if isinstance(call, TracedCall):
            call.answer(value)
            return
        if not self._processes.has_signal(call.pid):  # nearly always
            try:
                call.answer(value)
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
                call.answer(answer.value)
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

    def shut_down(self, inode: int, insists: bool) -> bool:
        """Shut down a socket by a copy of the descriptor that /proc shows."""
        return self._processes.shut_down(inode)

    def create_socket(
        self,
        call: InterceptedCall,
        type_: int,
        data_calls: Served | None,
        created: Callable[[int, int], None],
    ) -> int:
        """Create a socket here, and give the process a copy of it."""
        sock = _socket.socket(AF_UNIX, type_ | SOCK_CLOEXEC)
        try:
            created(os.fstat(sock.fileno()).st_ino, cookie_of(sock))
            close_on_exec = bool(type_ & SOCK_CLOEXEC)
            return self.answer_with_descriptor(call, sock.fileno(), close_on_exec, data_calls)
        finally:
            sock.close()

    def answer_with_descriptor(
        self, call: InterceptedCall, fd: int, close_on_exec: bool, data_calls: Served | None
    ) -> int:
        """Give the process a copy of ``fd``; for ``data_calls``, trace the process from then on."""
        assert isinstance(call, NotifiedCall)
        if data_calls is None or not self._may_trace(call, data_calls, is_new=True):
            return call.listener.add_descriptor(call.id, fd, close_on_exec, _ADD_AND_ANSWER)
        number = call.listener.add_descriptor(call.id, fd, close_on_exec)
        if self._tracer.covers(call.pid, data_calls, number):
            self.conclude(call, number)
        else:
            self._cover(call, data_calls, [number], number)
        return number

    # Data calls

    def intercepts_data(self, call: InterceptedCall, data_calls: Served, inode: int) -> bool:
        """Return True if data calls are traced or cannot be; otherwise begin tracing them."""
        descriptor = call.arguments[0] & 0xFFFF_FFFF
        if isinstance(call, TracedCall) or self._tracer.covers(call.pid, data_calls, descriptor):
            return True
        if not self._may_trace(call, data_calls, is_new=False):
            return True
        numbers = self._processes.numbers_of(call.pid, inode)
        if not call.is_waiting():
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
            self._processes.report(call.pid, text, self.duplicate, call.is_waiting)

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
