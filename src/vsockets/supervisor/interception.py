"""The interface between a mechanism that intercepts system calls and the handlers of the calls.

An *interceptor* holds a thread at a system call and delivers the call to the supervisor, whose
handler then answers it through the same interceptor.  Handlers do not know which interceptor that
is.

Methods do not wait, unless they are coroutines: between two ``await`` a handler relies on no other
handler running.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple, Protocol

from .arch import Architecture
from .filter import Rule, Served
from .process import Processes
from .scheduler import CoroutineScheduler


class CallInterrupted(Exception):
    """A call that no longer waits: a signal interrupted it, or its process has ended."""


class Interruption(Enum):
    """The effect of a signal on a call that waits."""

    RESTART = auto()  #: fails with EINTR, unless the signal's handler has SA_RESTART
    FAIL = auto()  #: fails with EINTR
    DEFER = auto()  #: no effect until the call is answered, if the mechanism can defer signals


class InterceptedCall:
    """One system call that waits for its answer."""

    __slots__ = ("architecture", "arguments", "id", "instruction", "number", "pid")

    def __init__(
        self,
        id_: int,
        pid: int,
        number: int,
        architecture: int,
        instruction: int,
        arguments: tuple[int, ...],
    ) -> None:
        #: The interceptor's number of the call; it changes when the thread repeats the call.
        self.id = id_
        #: The thread, in the supervisor's pid namespace; 0 if it has no number there.
        self.pid = pid
        self.number = number
        self.architecture = architecture  #: AUDIT_ARCH_*
        self.instruction = instruction  #: the address behind the instruction that made the call
        self.arguments = arguments

    def is_waiting(self) -> bool:
        """Return whether the call still waits.

        If so, all that was read before from the process with the caller's number came from the
        caller.
        """
        raise NotImplementedError

    def answer(self, value: int) -> None:
        """Let the call return ``value``, or fail if ``value`` is a negative errno.

        Raises CallInterrupted if the call no longer waits.
        """
        raise NotImplementedError

    def let_through(self) -> None:
        """Let the kernel perform the call.

        The memory that its arguments point to may have changed since it was checked: a call that
        must not happen is never let through.

        Raises CallInterrupted if the call no longer waits.
        """
        raise NotImplementedError

    def is_repeated_by(self, later: InterceptedCall, used: int) -> bool:
        """Return whether ``later`` is a repetition of this call by its thread.

        The kernel makes a call again after a signal, and so does a program that got EINTR.
        """
        return (self.architecture, self.number, self.instruction, self.arguments[:used]) == (
            later.architecture,
            later.number,
            later.instruction,
            later.arguments[:used],
        )


class Surroundings(NamedTuple):
    """The parts of a supervisor that an interceptor works with."""

    architecture: Architecture
    processes: Processes
    scheduler: CoroutineScheduler
    argument_counts: Mapping[int, int]  #: of each intercepted call, by its number
    #: Serves a call.
    deliver: Callable[[InterceptedCall], None]
    #: Returns whether data calls on a thread's descriptor are served.
    serves_data: Callable[[int, int], bool]
    #: Called with each traced thread that a signal has stopped with its process.
    on_group_stop: Callable[[int], None]
    #: The rules of the filter to install before the program gets its first vSockets socket; empty
    #: if the first filter has all.
    second: Sequence[Rule] = ()


class Interceptor(Protocol):
    """A mechanism that stops threads at system calls, and gives them the supervisor's answers."""

    # One call

    def conclude(self, call: InterceptedCall, value: int) -> None:
        """Answer a call that has taken effect and must not be served a second time.

        If a signal interrupts the thread before it has ``value``, it gets ``value`` when it repeats
        the call.
        """

    def begin_socket_calls(self, call: InterceptedCall) -> bool:
        """Return whether calls on sockets are intercepted in all processes of the program.

        If False, their interception has begun, and the thread repeats ``call`` afterwards.

        Raises OSError(EPERM) if it is not possible, CallInterrupted if the call no longer waits.
        """

    def create_socket(
        self,
        call: InterceptedCall,
        type_: int,
        data_calls: Served | None,
        created: Callable[[int, int], None],
    ) -> int:
        """Give the process a new unix socket; let the call return its number, and return that, too.

        ``type_`` may include SOCK_NONBLOCK and SOCK_CLOEXEC.  ``created`` is called with the
        socket's inode, and its cookie if that is known, or 0, before the program can use it.  The
        rest is as in :meth:`answer_with_descriptor`.
        """

    def answer_with_descriptor(
        self, call: InterceptedCall, fd: int, close_on_exec: bool, data_calls: Served | None
    ) -> int:
        """Give the process a copy of ``fd``; let the call return its number, and return that, too.

        The number is the lowest free one, as POSIX requires.  With ``data_calls``, data calls on it
        are intercepted before the program can make one.

        Raises CallInterrupted if the call no longer waits, OSError(EMFILE) if the process has no
        free descriptor, OSError(EPERM) if the data calls of a datagram socket, which is useless
        otherwise, cannot be intercepted.
        """

    def intercepts_data(self, call: InterceptedCall, data_calls: Served, inode: int) -> bool:
        """Return whether data calls on the socket in the first argument are intercepted.

        If False, their interception has begun, and the thread repeats the call afterwards.  The
        result is True also if they cannot be intercepted.

        Raises CallInterrupted if the call no longer waits.
        """

    def duplicate(self, pid: int, fd: int) -> int:
        """Return a copy of a thread's descriptor.

        The thread waits in a call; the caller checks afterwards that the thread still waits.

        Raises OSError(EBADF) if the descriptor is not open, CallInterrupted if the call no longer
        waits.
        """

    def suspend(
        self,
        call: InterceptedCall,
        interruption: Interruption,
        interrupted: Callable[[], None],
    ) -> None:
        """Let a thread wait while the handler of its call waits.

        ``interrupted`` is called once if a signal ends the call before :meth:`resume`.
        """

    def resume(self, call: InterceptedCall, run: Callable[[], None]) -> bool:
        """End :meth:`suspend`; return whether the call's handler may run now.

        If False, ``run`` is called when the handler may run, or ``interrupted`` of :meth:`suspend`.
        """

    # The programs

    def begin(self, pid: int) -> None:
        """Attach to the first process, which has its filter and waits in a system call.

        Raises OSError if that is not possible: the program cannot be started.
        """

    async def intercept_inherited(self, pid: int, data_calls: Served, numbers: list[int]) -> None:
        """Intercept data calls on sockets that the first process has inherited."""

    def on_wait_status(self, pid: int, status: int) -> bool:
        """Handle a wait status of waitpid(); return False if the caller has to handle it, too."""

    #: Wait statuses that the interceptor has waited for, each to be handled like one that waitpid()
    #: reports, and before those.
    unread: deque[tuple[int, int]]

    def shut_down(self, inode: int, insists: bool) -> bool:
        """Shut down the socket with this inode, if a process that can be accessed has it.

        Returns whether it was shut down.  With ``insists``, attempts continue after a failure.
        """

    @property
    def is_running(self) -> bool:
        """True while a process is left that can make intercepted calls."""


class Mechanism(Protocol):
    """A kind of interceptor: a half for the program's process, and one for the supervisor's."""

    def install(self, architecture: Architecture, rules: Sequence[Rule]) -> list[int]:
        """Put this process under a filter with ``rules``, irrevocably.

        Returns the descriptors that the supervisor needs.

        Raises OSError if the kernel refuses the filter.
        """

    def may_install_later(self, architecture: Architecture, pid: int) -> bool:
        """Return whether the program's process can get a second filter from the supervisor.

        The process ``pid`` is a child of this one, and waits in a system call.
        """

    def intercept(self, descriptors: Sequence[int], surroundings: Surroundings) -> Interceptor:
        """Return the interceptor, for the supervisor's process; it owns the ``descriptors``."""
