"""The start of a supervised program: signals and exit status are as without supervision.

Three processes::

    front         the process that the user started: relays signals, ends as the program ends
      supervisor  answers the intercepted calls until the last process under the filter has ended
        program   the user's program, in the front's place in the terminal's process group

The supervisor is an ancestor of all that it supervises, and remains so (child subreaper): where
Yama is strict (``ptrace_scope`` 1, Ubuntu's default) it may read the memory of descendants alone.
The front leaves the program's process group: a signal that the terminal or a shell sends to the
group reaches the program once, and a signal that reaches the front was sent to the front alone.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Collection
from typing import NoReturn, Protocol

from .._linux.libc import check, end_with_parent, libc
from .._linux.process import allow_many_descriptors
from ..attachment import Attachment
from .arch import this_architecture
from .filter import Rules, may_be_opened, rules
from .interception import Interceptor, Mechanism
from .process import inherited_sockets
from .ptrace import WAIT_FOR_ALL
from .supervisor import Supervisor

_PR_SET_CHILD_SUBREAPER = 36

_LAST_STANDARD = 2
#: Options of waitpid(): children that stop or continue, and all tracees.
_WAIT_OPTIONS = os.WUNTRACED | os.WCONTINUED | WAIT_FOR_ALL

#: A message between front and supervisor: its kind, and a signal, wait status or process group.
MESSAGE = struct.Struct("=ci")
#: From the program's process to the supervisor, and back: whether it can begin.
_IN_TWO_STEPS, _AT_ONCE = b"2", b"1"
_INSTALLED, _ERRNO = b"i", struct.Struct("=i")
STOPPED, ENDED, SIGNAL, CONTINUED = b"S", b"E", b"K", b"C"

#: Signals that the front relays to the program; the others concern the front itself.
_RELAYED = frozenset(signal.valid_signals()) - {
    signal.SIGKILL,
    signal.SIGSTOP,
    signal.SIGCHLD,
    signal.SIGCONT,
    signal.SIGTTIN,
    signal.SIGTTOU,
    signal.SIGSEGV,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGILL,
    signal.SIGPIPE,
}
#: The wait status of an exit status 1.
FAILURE = 1 << 8

#: sizeof(sigset_t) of C libraries, and of struct signalfd_siginfo, in bytes.
_SIGNAL_SET, _SIGNAL_INFO = 128, 128

#: Signals that the supervisor ignores: it ends after the program.
_IGNORED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP),
    *(signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE),
)


class Keeper(Protocol):
    """The connection to a process that outlives the program, and cleans up after it.

    The connection is readable when that process has ended.
    """

    pid: int  #: id of the process

    def descriptors(self) -> list[int]:
        """Return the descriptors to keep open, that of the connection first."""

    def end(self, status: int) -> int:
        """Report the program's wait status; return the final one when all is cleaned up."""


def launch(
    become: Callable[[], NoReturn],
    context: Attachment,
    lease: int | None,
    device: bool,
    mechanism: Mechanism,
    keeper: Keeper | None = None,
    lifeline: int | None = None,
) -> NoReturn:
    """Run a program, supervised, and end with its exit status or signal.

    ``become`` executes the program: it is called in the program's process, under the filter, and
    its exceptions are raised there.  ``lease`` is a descriptor to hold open until the last process
    of the program has ended.  With ``device``, stat() and access() find ``/dev/vsock``.
    With ``keeper`` (see :func:`follow_program`), all that the program leaves is killed when the
    program or this process ends.  ``lifeline`` is the descriptor of a connection: when its other
    end is shut down, all processes of the program are killed.

    Raises OSError in the program's process if it cannot be supervised.
    """
    machine = this_architecture()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    starter = os.getpid()
    supervisor_pid = os.fork()
    if supervisor_pid:
        back.close()
        follow_program(front, supervisor_pid, keeper)
    front.close()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    opens = not may_be_opened()
    made = Rules.of(machine, opens, looks=opens and device)
    # An inherited socket may be a vSockets socket, on which calls are to be intercepted at once.
    in_two_steps = not inherited_sockets(socket.AF_UNIX)
    ours, theirs = socket.socketpair()
    program_pid = os.fork()
    if program_pid == 0:
        back.close()
        ours.close()
        if lifeline is not None:
            os.close(lifeline)
        end_with_parent()
        has_second = theirs.recv(1) == _IN_TWO_STEPS
        descriptors = mechanism.install(
            machine, made.first if has_second else rules(machine, opens, looks=opens and device)
        )
        socket.send_fds(theirs, [_INSTALLED], descriptors)
        for fd in descriptors:
            os.close(fd)
        (code,) = _ERRNO.unpack(theirs.recv(_ERRNO.size))
        theirs.close()
        if code:
            raise OSError(code, os.strerror(code))
        if os.environ.get("LISTEN_PID") == str(starter):
            os.environ["LISTEN_PID"] = str(os.getpid())
        become()
    theirs.close()
    program = _Program(program_pid, back, ends_all=keeper is not None)
    in_two_steps = in_two_steps and mechanism.may_install_later(machine, program_pid)
    ours.send(_IN_TWO_STEPS if in_two_steps else _AT_ONCE)
    second = made.all if in_two_steps else ()
    _run_supervisor(
        lambda descriptors: Supervisor(
            machine, mechanism, descriptors, context, program.on_group_stop, second
        ),
        program,
        ours,
        lease,
        lifeline,
    )


# The supervisor


class _Program:
    """The program's first process, as its parent, the supervisor, sees it.

    ``front`` leads to the process that the user started.  With ``ends_all``, the end of either
    process is followed by :meth:`end_all`.
    """

    def __init__(self, pid: int, front: socket.socket, ends_all: bool) -> None:
        self.pid = pid
        self._ends_all = ends_all
        self._is_ending = False
        self._status: int | None = None
        self._front: socket.socket | None = front
        self._front_pid = os.getppid()
        self._stopped = False
        self._interceptor: Interceptor | None = None

    def fileno(self) -> int:
        """Return the descriptor of the connection to the front."""
        assert self._front is not None
        return self._front.fileno()

    def wait(self) -> None:
        """Wait until the process has ended, and the front has its status.

        A process leaves its filter before it is reported to have ended.
        """
        while self._front is not None:
            self.reap(0)

    def reap(self, options: int = os.WNOHANG) -> None:
        """Reap children that have ended or stopped: the program's first process, and orphans."""
        while True:
            pid, status = self._wait_status(options)
            if pid == 0:
                break
            if self._interceptor is not None and self._interceptor.on_wait_status(pid, status):
                continue
            if pid != self.pid:
                continue
            if os.WIFSTOPPED(status):
                self.on_group_stop(pid)
                continue
            # The process may have ended before its continuing was reported.
            if self._stopped and self._front is not None:
                os.kill(self._front_pid, signal.SIGCONT)
            self._stopped = False
            if not os.WIFCONTINUED(status):
                self._status = status
                self._is_ending = self._is_ending or self._ends_all
                if not self._is_ending:
                    self._report_end()
        if self._is_ending:
            self.end_all()

    def end_all(self) -> None:
        """Kill all processes of the program, and the orphans that they leave.

        The front gets the wait status when the last process has ended.  Until then calls are
        answered: a process that is not killed yet sees no difference.
        """
        self._is_ending = True
        is_left = False
        for pid in _children():
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
                is_left = True
        if not is_left:
            self._report_end()

    def _report_end(self) -> None:
        if self._status is not None:
            self.report(ENDED, self._status)
            if self._front is not None:
                self._front.close()
            self._front = None

    def _wait_status(self, options: int) -> tuple[int, int]:
        """Return the next process id to handle with its wait status; 0 and 0 without one."""
        if self._interceptor is not None and self._interceptor.unread:
            return self._interceptor.unread.popleft()
        try:
            return os.waitpid(-1, options | _WAIT_OPTIONS)
        except ChildProcessError:
            return 0, 0

    def watch(self, interceptor: Interceptor) -> None:
        """Pass on what waitpid() reports to ``interceptor``, which may trace the program."""
        self._interceptor = interceptor

    def on_group_stop(self, pid: int) -> None:
        """Report to the front that a process is stopped, if it is the program's first."""
        if pid == self.pid:
            self._stopped = True
            self.report(STOPPED, 0)

    def on_front(self, events: int) -> None:
        """Handle a message of the front, or its end."""
        if self._front is None:
            return
        message = _receive(self._front)
        if not message:  # the front was killed: kill the program
            self._front.close()  # also ends the watch, which would report the end for ever
            self._front = None
            if self._ends_all:
                self.end_all()
            else:
                self._signal(signal.SIGKILL)
            return
        kind, number = MESSAGE.unpack(message)
        if kind == SIGNAL:
            self._signal(number)
        elif kind == CONTINUED and self._stopped:
            self._signal(signal.SIGCONT)

    def _signal(self, number: int) -> None:
        # The process is not reaped yet, so no other process has its id.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def report(self, kind: bytes, number: int) -> None:
        """Send a message to the front, if it still runs."""
        if self._front is not None:
            with contextlib.suppress(OSError):
                self._front.send(MESSAGE.pack(kind, number))


def _run_supervisor(
    make: Callable[[list[int]], Supervisor],
    program: _Program,
    starting: socket.socket,
    lease: int | None,
    lifeline: int | None,
) -> NoReturn:
    status = 1
    try:
        for number in _IGNORED:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # a new group, for the front too
            os.setpgid(0, 0)
        children = _block_as_descriptor(signal.SIGCHLD)
        program.report(CONTINUED, 0)  # the new group exists
        installed, descriptors, _, _ = socket.recv_fds(starting, 1, 1)
        kept = {fd for fd in (lease, lifeline) if fd is not None}
        _close_all_but({program.fileno(), starting.fileno(), children, *kept, *descriptors})
        os.chdir("/")
        if not installed:  # the program's process raises why
            program.wait()
            return  # type: ignore[misc]  # by way of finally
        supervisor = make(descriptors)
        program.watch(supervisor.interceptor)
        allow_many_descriptors()

        def on_child(events: int) -> None:
            with contextlib.suppress(BlockingIOError):
                os.read(children, _SIGNAL_INFO)
            program.reap()

        supervisor.scheduler.watch(children, on_child)
        supervisor.scheduler.watch(program.fileno(), program.on_front)
        if lifeline is not None:

            def on_lifeline(events: int) -> None:
                # The descriptor stays open until this process ends: the other side waits for its
                # end.
                supervisor.scheduler.unwatch(key, lifeline)
                program.end_all()

            key = supervisor.scheduler.watch(lifeline, on_lifeline)

        def begin(error: OSError | None) -> None:
            starting.send(_ERRNO.pack((error.errno or errno.EIO) if error else 0))
            starting.close()

        supervisor.begin(program.pid, begin)
        program.reap()
        # Objects made so far live as long as the supervisor, and few calls create reference cycles.
        gc.freeze()
        gc.set_threshold(50_000)
        supervisor.run()
        program.wait()
        status = 0
    finally:
        os._exit(status)


# The front


def follow_program(channel: socket.socket, group: int, keeper: Keeper | None = None) -> NoReturn:
    """Relay signals to a program, and end as the program does.

    ``channel`` leads to the program's parent, and ``group`` is that process's group.  With a
    ``keeper``, all other children of this process are killed when the program or the keeper has
    ended, and the keeper decides on the exit status.
    """
    wakeups, wakeup = socket.socketpair()
    wakeups.setblocking(False)
    wakeup.setblocking(False)
    for number in _RELAYED:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(wakeup.fileno())
    watched: list[socket.socket | int] = [channel, wakeups]
    of_keeper = keeper.descriptors() if keeper is not None else []
    watched += of_keeper[:1]
    _close_all_but({channel.fileno(), wakeups.fileno(), wakeup.fileno(), *of_keeper})
    while True:
        ready, _, _ = select.select(watched, [], [])
        if wakeups in ready:
            with contextlib.suppress(BlockingIOError, OSError):
                for received in wakeups.recv(4096):
                    if received in _RELAYED:
                        channel.send(MESSAGE.pack(SIGNAL, received))
        if channel in ready:
            message = _receive(channel)
            if not message:
                kill_all_children(keeper.pid if keeper is not None else 0)
                # The program was killed, by the kernel or just now.
                message = MESSAGE.pack(ENDED, signal.SIGKILL)
        elif set(of_keeper) & set(ready):
            channel.close()  # the supervisor kills all
            with contextlib.suppress(ChildProcessError):
                os.waitpid(group, 0)
            message = MESSAGE.pack(ENDED, FAILURE)
        else:
            continue
        kind, value = MESSAGE.unpack(message)
        if kind == ENDED and keeper is not None:
            # Process 1 of a container is the parent of the keeper, too.
            kill_all_children(keeper.pid)
            value = keeper.end(value)
        _follow(channel, group, kind, value)


def _follow(channel: socket.socket, group: int, kind: bytes, status: int) -> None:
    """Handle a report of the supervisor: end or stop as the program has, or leave its group."""
    if kind == ENDED:
        _end_like(status)
    elif kind == STOPPED:
        os.kill(os.getpid(), signal.SIGSTOP)
        with contextlib.suppress(OSError):
            channel.send(MESSAGE.pack(CONTINUED, 0))
    elif kind == CONTINUED and os.getpid() != 1:
        # Fails for a session leader, which then gets signals to the group twice.  Process 1 stays:
        # the kernel never ends a pid namespace whose process 1 is in another's process group.
        with contextlib.suppress(OSError):
            os.setpgid(0, group)


def _end_like(status: int) -> NoReturn:
    """End this process with the exit status or the signal of a wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the program has dumped core already
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.WEXITSTATUS(status))


def kill_all_children(spared: int = 0) -> None:
    """Kill this process's children, except one, and those that they leave (child subreaper)."""
    while pids := [pid for pid in _children() if pid != spared]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in pids:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


# Common to both


def _children() -> list[int]:
    """Return the process IDs of this process's children, zombies included."""
    pids: list[int] = []
    for thread in os.listdir("/proc/self/task"):
        with (
            contextlib.suppress(OSError),  # the thread has ended
            open(f"/proc/self/task/{thread}/children") as children,
        ):
            pids += map(int, children.read().split())
    return pids


def _receive(channel: socket.socket) -> bytes:
    """Return the next message; empty if the other side has ended."""
    try:
        return channel.recv(MESSAGE.size)
    except ConnectionResetError:  # it left a message unread: its last follows
        return channel.recv(MESSAGE.size)


def _close_all_but(kept: Collection[int]) -> None:
    """Close all descriptors except ``kept``: the program must be the last to hold its files.

    Standard input, output and error become ``/dev/null``, so that no file opened later gets one of
    their numbers.
    """
    first = 0
    for fd in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, fd)
        first = fd + 1
    while (nothing := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(nothing)


def _block_as_descriptor(number: int) -> int:
    """Block a signal, and return a descriptor that is readable when it is pending.

    The signal is blocked because it must not interrupt the supervisor while the supervisor adds a
    descriptor to a program: the kernel would let the program's ``socket()`` return 0, which is its
    standard input.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    mask = (1 << number - 1).to_bytes(_SIGNAL_SET, "little")
    return check(libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC))


def _prctl(option: int, value: int) -> None:
    check(libc.prctl(option, value, 0, 0, 0))
