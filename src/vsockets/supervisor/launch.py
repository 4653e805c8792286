"""Starting a supervised program so that it behaves as if nobody supervised it.

Three processes::

    front         the process the user started: ends as the program ends, passes signals on
      supervisor  answers the intercepted calls until the last process under the filter has ended
        program   the user's, in front's place in the terminal's process group

The supervisor is an ancestor of all it supervises, and made to stay so (child subreaper),
because that is whose memory it may read where Yama is strict (``ptrace_scope`` 1, Ubuntu's
default).  The front leaves the program's process group: what the terminal or a shell sends to
the group reaches the program once, and whatever reaches the front was meant for it alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import resource
import select
import signal
import socket
import struct
from collections.abc import Callable, Collection
from typing import NoReturn

from .._linux.rlimit import allow_many_descriptors
from ..attachment import Attachment
from .arch import this_architecture
from .filter import may_be_opened, rules
from .interception import Interceptor
from .notification import NotificationMechanism
from .ptrace import WAIT_FOR_ALL
from .supervisor import Supervisor

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36

_LAST_STANDARD = 2
#: waitpid()'s options: children that stop or go on, and all tracees.
_OF_ALL = os.WUNTRACED | os.WCONTINUED | WAIT_FOR_ALL

#: Between front and supervisor: what happened, and a number.
_NOTE = struct.Struct("=ci")
#: From the program's process to the supervisor, and back: whether it can begin.
_INSTALLED, _ERRNO = b"i", struct.Struct("=i")
_STOPPED, _ENDED, _SIGNAL, _CONTINUED = b"S", b"E", b"K", b"C"

#: Signals that end or inform a program, or stop it; the rest are the front's own business.
_PASSED_ON = frozenset(signal.valid_signals()) - {
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
#: sizeof(sigset_t) of C libraries, and of struct signalfd_siginfo, in bytes.
_SIGNAL_SET, _SIGNAL_INFO = 128, 128

_OUTLIVED = (
    *(signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGTSTP),
    *(signal.SIGTTIN, signal.SIGTTOU, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE),
)


def launch(
    become: Callable[[], NoReturn], context: Attachment, lease: int | None, device: bool
) -> NoReturn:
    """Run what ``become`` turns a process into, supervised, and end as it ends.

    ``become`` is called in the program's process, under the filter; its exceptions are raised
    here, in that process.  ``lease`` is a descriptor that is held open as long as any process of
    the program lives.  With ``device`` a program that looks for ``/dev/vsock`` finds it.

    Raises OSError in the program's process when there is no supervising it.
    """
    machine = this_architecture()
    mechanism = NotificationMechanism()
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    front, back = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    starter = os.getpid()
    supervisor_pid = os.fork()
    if supervisor_pid:
        back.close()
        _be_front(front, supervisor_pid)
    front.close()
    _control(_PR_SET_CHILD_SUBREAPER, 1)
    opens = not may_be_opened()
    made = rules(machine, opens, looks=opens and device)
    ours, theirs = socket.socketpair()
    program_pid = os.fork()
    if program_pid == 0:
        back.close()
        ours.close()
        _control(_PR_SET_PDEATHSIG, signal.SIGKILL)
        descriptors = mechanism.install(machine, made)
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
    program = _Program(program_pid, back)
    _be_supervisor(
        lambda descriptors: Supervisor(
            machine, mechanism, descriptors, context, program.on_group_stop
        ),
        program,
        ours,
        [fd for fd in (lease,) if fd is not None],
    )


# The supervisor


class _Program:
    """The program's first process, as its parent sees it."""

    def __init__(self, pid: int, front: socket.socket) -> None:
        self.pid = pid
        self._front: socket.socket | None = front
        self._front_pid = os.getppid()
        self._stopped = False
        self._interceptor: Interceptor | None = None

    def fileno(self) -> int:
        """The connection to the front."""
        assert self._front is not None
        return self._front.fileno()

    def wait(self) -> None:
        """Return when it has ended and the front knows.  A process leaves its filter first."""
        while self._front is not None:
            self.reap(0)

    def reap(self, options: int = os.WNOHANG) -> None:
        """Look what became of our children: the program's process, and its orphans."""
        while True:
            try:
                pid, status = os.waitpid(-1, options | _OF_ALL)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if self._interceptor is not None and self._interceptor.on_wait_status(pid, status):
                continue
            if pid != self.pid:
                continue
            if os.WIFSTOPPED(status):
                self.on_group_stop(pid)
                continue
            # It may have ended before we saw that it went on.
            if self._stopped and self._front is not None:
                os.kill(self._front_pid, signal.SIGCONT)
            self._stopped = False
            if not os.WIFCONTINUED(status):
                self._tell(_ENDED, status)
                if self._front is not None:
                    self._front.close()
                self._front = None

    def watch(self, interceptor: Interceptor) -> None:
        """Pass on what waitpid() reports to ``interceptor``, which may trace the program."""
        self._interceptor = interceptor

    def on_group_stop(self, pid: int) -> None:
        """Tell the front that a process is stopped, if it is the program's first."""
        if pid == self.pid:
            self._stopped = True
            self._tell(_STOPPED, 0)

    def on_front(self, events: int) -> None:
        """The front passes a signal on, or has ended."""
        if self._front is None:
            return
        note = _heard(self._front)
        if not note:  # killed: so the program is killed
            self._front = None
            self._send(signal.SIGKILL)
            return
        kind, number = _NOTE.unpack(note)
        if kind == _SIGNAL:
            self._send(number)
        elif kind == _CONTINUED and self._stopped:
            self._send(signal.SIGCONT)

    def _send(self, number: int) -> None:
        # Not reaped yet, so the number is still its own.
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def _tell(self, kind: bytes, number: int) -> None:
        if self._front is not None:
            with contextlib.suppress(OSError):
                self._front.send(_NOTE.pack(kind, number))


def _be_supervisor(
    make: Callable[[list[int]], Supervisor],
    program: _Program,
    starting: socket.socket,
    kept: Collection[int],
) -> NoReturn:
    status = 1
    try:
        for number in _OUTLIVED:
            signal.signal(number, signal.SIG_IGN)
        with contextlib.suppress(OSError):  # a group of our own, for the front too
            os.setpgid(0, 0)
        children = _blocked_as_descriptor(signal.SIGCHLD)
        program._tell(_CONTINUED, 0)  # our group is there to move into
        installed, descriptors, _, _ = socket.recv_fds(starting, 1, 1)
        fds = {program.fileno(), starting.fileno(), children, *kept}
        _close_all_but(fds | set(descriptors))
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

        def begin(error: OSError | None) -> None:
            starting.send(_ERRNO.pack((error.errno or errno.EIO) if error else 0))
            starting.close()

        supervisor.begin(program.pid, begin)
        program.reap()
        supervisor.run()
        program.wait()
        status = 0
    finally:
        os._exit(status)


# The front


def _be_front(channel: socket.socket, supervisor: int) -> NoReturn:
    wakes, wake = socket.socketpair()
    wakes.setblocking(False)
    wake.setblocking(False)
    for number in _PASSED_ON:
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, lambda number, frame: None)
    signal.set_wakeup_fd(wake.fileno())
    _close_all_but({channel.fileno(), wakes.fileno(), wake.fileno()})
    while True:
        ready, _, _ = select.select([channel, wakes], [], [])
        if wakes in ready:
            with contextlib.suppress(BlockingIOError, OSError):
                for received in wakes.recv(4096):
                    if received in _PASSED_ON:
                        channel.send(_NOTE.pack(_SIGNAL, received))
        if channel not in ready:
            continue
        note = _heard(channel)
        if not note:
            _end_all_children()
            _end_as(signal.SIGKILL)  # which the kernel sent the program, or we did
        kind, status = _NOTE.unpack(note)
        if kind == _ENDED:
            _end_as(status)
        elif kind == _STOPPED:
            os.kill(os.getpid(), signal.SIGSTOP)
            with contextlib.suppress(OSError):
                channel.send(_NOTE.pack(_CONTINUED, 0))
        elif kind == _CONTINUED:
            # Unless we lead the session; then what is sent to the group arrives twice.
            with contextlib.suppress(OSError):
                os.setpgid(0, supervisor)


def _end_as(status: int) -> NoReturn:
    """End as the process with this wait status has."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # one image of it is enough
        with contextlib.suppress(OSError, ValueError):
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
        os._exit(128 + number)
    os._exit(os.WEXITSTATUS(status))


def _end_all_children() -> None:
    """The supervisor has died: what it supervised is ours now, and must not go on."""
    while True:
        with open(f"/proc/self/task/{os.getpid()}/children") as children:
            pids = [int(pid) for pid in children.read().split()]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            return


# Both


def _heard(channel: socket.socket) -> bytes:
    """The next note, or nothing when the other side has ended."""
    try:
        return channel.recv(_NOTE.size)
    except ConnectionResetError:  # with a note of ours unread; what it had said is still to come
        return channel.recv(_NOTE.size)


def _close_all_but(kept: Collection[int]) -> None:
    """Hold nothing open that the program would otherwise be the last to close.

    Standard input, output and error stay taken: by nothing, so that nothing can be written
    where it does not belong.
    """
    first = 0
    for fd in [*sorted(kept), os.sysconf("SC_OPEN_MAX")]:
        os.closerange(first, fd)
        first = fd + 1
    while (nothing := os.open(os.devnull, os.O_RDWR)) <= _LAST_STANDARD:
        pass
    os.close(nothing)


def _blocked_as_descriptor(number: int) -> int:
    """A descriptor that is readable when the signal has come, which interrupts nothing any more.

    Interrupted while it adds a descriptor to a program, the kernel lets the program's call
    return 0: ``socket()`` would give standard input.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, [number])
    libc = ctypes.CDLL(None, use_errno=True)
    mask = (1 << number - 1).to_bytes(_SIGNAL_SET, "little")
    fd: int = libc.signalfd(-1, mask, os.O_NONBLOCK | os.O_CLOEXEC)
    if fd < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return fd


def _control(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
