"""Shutdown of other processes' sockets where ``pidfd_getfd(2)`` is forbidden, as in containers.

The process itself makes the system calls, for a tracer.  A child process of the caller's traces
that process for some hundred microseconds; if it does not stop in time, the child ends, and the
kernel releases the process (:class:`Attempt`).  A process can have one tracer, and a supervisor of
``vsock run`` may be the tracer of its programs.  The supervisor is then asked to shut the sockets
down (:class:`Requests`, :class:`RequestServer`).
"""

from __future__ import annotations

import _socket
import array
import contextlib
import errno
import json
import logging
import os
import select
import signal
import struct
import threading
from collections.abc import Callable, Iterable, Iterator
from socket import (
    AF_UNIX,
    CMSG_SPACE,
    MSG_CMSG_CLOEXEC,
    MSG_DONTWAIT,
    MSG_NOSIGNAL,
    SCM_CREDENTIALS,
    SCM_RIGHTS,
    SO_PASSCRED,
    SOCK_CLOEXEC,
    SOCK_DGRAM,
    SOCK_NONBLOCK,
    SOL_SOCKET,
)
from typing import Any, NamedTuple

from .._linux.inspection import sockets_of
from .._linux.sockets import SO_COOKIE
from .arch import this_architecture
from .injection import SCRATCH_SIZE, Injector, Space, StoppedThread
from .interception import CallInterrupted
from .process import Processes
from .ptrace import SYSTEM_CALL_STOPS, WAIT_FOR_ALL, Event, Ptrace, read_stop
from .scheduler import CoroutineScheduler

log = logging.getLogger(__name__)

#: Seconds that a process has to stop in.  One in an uninterruptible wait does not.
_STOP_SECONDS = 0.1
#: Threads of a process to try: a thread may be in a state in which it can make no call.
_THREADS = 8
_COOKIE = struct.Struct("=Q")
#: A class of ELF files, and where it is in them.
_ELF_CLASS, _ELF_64 = 4, 2

_DATAGRAM = int(SOCK_DGRAM | SOCK_CLOEXEC | SOCK_NONBLOCK)
_TAKE = int(MSG_DONTWAIT | MSG_CMSG_CLOEXEC)
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_CREDENTIALS = struct.Struct("=iII")
#: Credentials, and up to the kernel's limit of descriptors, which are closed.
_CONTROL = CMSG_SPACE(_CREDENTIALS.size) + CMSG_SPACE(253 * 4)
#: Requests that a supervisor serves before its programs' next call.
_REQUESTS_AT_ONCE = 64


class Target(NamedTuple):
    """A stream to end: its accepting end by inode, its connecting end by cookie; 0: unknown."""

    inode: int
    cookie: int = 0


_TARGET = struct.Struct("=QQ")


# A process that has no tracer


class _Visit:
    """A tracer's short attachment to one process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid
        self._machine = this_architecture()
        self._ptrace = Ptrace(self._machine)
        self._processes = Processes(self._machine)
        self._injector = Injector(self._machine, self._ptrace, self._processes)

    def shut_down(self, targets: Iterable[Target]) -> list[Target]:
        """Shut down the sockets of the process that are among ``targets``; return those."""
        _require_64_bits(self._pid)
        space = Space(instruction=self._injector.find_trap(self._pid))
        threads = sorted(map(int, os.listdir(f"/proc/{self._pid}/task")))[:_THREADS]
        problem: OSError | None = None
        for number in threads:
            try:
                with self._stopped(StoppedThread(number, space)) as thread:
                    return self._shut_down(thread, list(targets))
            except CallInterrupted:  # the process has ended
                continue
            except OSError as error:
                problem = error
        raise problem or ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))

    def _shut_down(self, thread: StoppedThread, targets: list[Target]) -> list[Target]:
        by_inode = {target.inode: target for target in targets if target.inode}
        by_cookie = {target.cookie: target for target in targets if target.cookie}
        done = []
        try:
            for fd, inode in list(sockets_of(self._pid)):
                if not inode:
                    continue
                target = by_inode.get(inode)
                if target is None and by_cookie:
                    target = by_cookie.get(self._cookie_of(thread, fd))
                if target is not None and self._injector.shut_down(thread, fd, inode):
                    done.append(target)
                    if len(done) == len(targets):
                        break
        finally:
            scratch, thread.space.scratch = thread.space.scratch, 0
            if scratch:
                self._injector.call(thread, self._machine.munmap, scratch, SCRATCH_SIZE)
        return done

    def _cookie_of(self, thread: StoppedThread, fd: int) -> int:
        size = _COOKIE.size
        at = self._injector.write_scratch(thread, struct.pack("=QI", 0, size))
        arguments = (fd, SOL_SOCKET, SO_COOKIE, at, at + size)
        if self._injector.call(thread, self._machine.getsockopt, *arguments) < 0:
            return 0
        return int(_COOKIE.unpack(self._processes.read(thread.number, at, size))[0])

    @contextlib.contextmanager
    def _stopped(self, thread: StoppedThread) -> Iterator[StoppedThread]:
        """Trace and stop a thread, and release it afterwards."""
        self._ptrace.seize(thread.number, SYSTEM_CALL_STOPS)
        # Until the thread stops, the end of this process releases it.
        signal.setitimer(signal.ITIMER_REAL, _STOP_SECONDS)
        self._injector.stop(thread)
        signal.setitimer(signal.ITIMER_REAL, 0)
        try:
            yield thread
        finally:
            with contextlib.suppress(CallInterrupted):
                self._injector.go_on(thread)
                self._release(thread.number)

    def _release(self, number: int) -> None:
        """Stop tracing a thread, which runs, at its next stop."""
        with contextlib.suppress(OSError):
            self._ptrace.interrupt(number)
            while True:
                _, status = os.waitpid(number, WAIT_FOR_ALL)
                if not os.WIFSTOPPED(status):
                    return
                stop = read_stop(status)
                if stop.event in (Event.STOP, Event.GROUP_STOP):
                    self._ptrace.detach(number)
                    return
                self._ptrace.resume(number, stop.signal if stop.event is Event.SIGNAL else 0)


def _require_64_bits(pid: int) -> None:
    with open(f"/proc/{pid}/exe", "rb") as program:
        if program.read(_ELF_CLASS + 1)[-1:] != bytes([_ELF_64]):
            raise OSError(errno.ENOEXEC, "a 32-bit program")


class Attempt:
    """A child process that traces a process, and shuts down its sockets."""

    def __init__(self, pid: int, targets: Iterable[Target]) -> None:
        """Begin to shut down ``targets`` in process ``pid``.

        Raises OSError if no child process can be started.
        """
        wanted = list(targets)
        self._output, output = os.pipe2(os.O_CLOEXEC)
        try:
            self._child = os.fork()
        except BaseException:
            os.close(self._output)
            os.close(output)
            raise
        if self._child == 0:
            try:
                signal.signal(signal.SIGALRM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
                os.write(output, json.dumps(_attempt(pid, wanted)).encode())
            finally:
                os._exit(0)
        os.close(output)

    def is_over(self, seconds: float) -> bool:
        """Return whether the child has ended, after waiting for at most ``seconds``."""
        poll = select.poll()
        poll.register(self._output, select.POLLIN)
        return bool(poll.poll(seconds * 1000))

    def result(self) -> tuple[list[Target], str]:
        """Return the targets that were shut down, and the problem with the others, if any.

        A call before :meth:`is_over` has returned True waits for the child's end.
        """
        try:
            text = b"".join(iter(lambda: os.read(self._output, 1 << 16), b""))
        finally:
            os.close(self._output)
            with contextlib.suppress(ChildProcessError):
                os.waitpid(self._child, 0)
        if not text:
            return [], "it did not stop"
        done, problem = json.loads(text)
        return [Target(*one) for one in done], problem


def _attempt(pid: int, targets: list[Target]) -> tuple[list[Target], str]:
    try:
        return _Visit(pid).shut_down(targets), ""
    except (OSError, NotImplementedError) as error:
        return [], str(getattr(error, "strerror", error))


# A process that a supervisor traces


def _name_of(supervisor: int) -> bytes:
    # Abstract: it needs no file system in common.
    return b"\0vsockets-supervisor-%d" % supervisor


def _messages(sock: _socket.socket, most: int) -> Iterator[tuple[Target, Any]]:
    """Receive up to ``most`` targets that root or this process's user has sent.

    Yields each with its sender.
    """
    for _ in range(most):
        try:
            data, control, _, sender = sock.recvmsg(_TARGET.size, _CONTROL, _TAKE)
        except BlockingIOError:
            return
        user = -1
        for level, kind, value in control:
            if (level, kind) == (SOL_SOCKET, SCM_CREDENTIALS):
                user = _CREDENTIALS.unpack(value)[1]
            elif (level, kind) == (SOL_SOCKET, SCM_RIGHTS):
                unwanted = array.array("i", value[: len(value) // 4 * 4])
                threading.Thread(target=_close, args=(list(unwanted),), daemon=True).start()
        if user in (0, os.geteuid()) and len(data) == _TARGET.size:
            yield Target(*_TARGET.unpack(data)), sender


def _close(descriptors: list[int]) -> None:
    for fd in descriptors:
        os.close(fd)


def _datagram_socket() -> _socket.socket:
    sock = _socket.socket(AF_UNIX, _DATAGRAM)
    sock.setsockopt(SOL_SOCKET, SO_PASSCRED, 1)
    return sock


class RequestServer:
    """The supervisor's side: serves requests to shut down sockets of its programs."""

    def __init__(self, scheduler: CoroutineScheduler, shut_down: Callable[[Target], bool]) -> None:
        """Serve requests by ``shut_down``, which returns whether it has shut down the socket."""
        self._shut_down = shut_down
        self._sock = _datagram_socket()
        try:
            self._sock.bind(_name_of(os.getpid()))
            scheduler.watch(self._sock.fileno(), self._serve)
        except OSError as error:  # another process has taken the name
            log.warning("streams cannot be disconnected on request: %s", error)
            self.close()

    def close(self) -> None:
        """Stop serving, after the scheduler has ended."""
        self._sock.close()

    def _serve(self, events: int) -> None:
        for target, sender in _messages(self._sock, _REQUESTS_AT_ONCE):
            if sender and self._shut_down(target):
                with contextlib.suppress(OSError):
                    self._sock.sendto(_TARGET.pack(*target), _SEND, sender)


class Requests:
    """The caller's side: requests to supervisors, and their confirmations."""

    def __init__(self) -> None:
        self._sock = _datagram_socket()
        self._sock.bind("")  # the kernel chooses a name

    def close(self) -> None:
        """Close the socket."""
        self._sock.close()

    def fileno(self) -> int:
        """Return the descriptor that confirmations arrive on."""
        return self._sock.fileno()

    def send(self, process: int, target: Target) -> bool:
        """Ask ``process`` to shut down a socket; return False if it is no supervisor."""
        try:
            self._sock.sendto(_TARGET.pack(*target), _SEND, _name_of(process))
        except OSError as error:
            # The supervisor has many requests, and may serve the next one.
            return error.errno == errno.EAGAIN
        return True

    def confirmed(self) -> list[Target]:
        """Return the targets that supervisors have shut down since the last call."""
        return [target for target, _ in _messages(self._sock, 1024)]
