"""The supervisor: one thread that serves system calls, with a coroutine for each that waits."""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import logging
import os
import signal
from collections.abc import Callable, Coroutine, Sequence
from socket import AF_UNIX, SO_DOMAIN, SO_TYPE, SOL_SOCKET

from .._linux.sockets import cookie_of
from ..attachment import Attachment
from ..protocol import Record, Role, client
from ..socket import Phase
from .arch import Architecture
from .call import Answer, Call, QuickHandler, Services, Serving, SocketHandler
from .calls import ARGUMENTS, CHECKING, HANDLERS, PATHS, QUICK_HANDLERS, SOCKET_HANDLERS
from .calls.creating import DEVICE
from .filter import Rule, Served
from .interception import (
    CallInterrupted,
    InterceptedCall,
    Interruption,
    Mechanism,
    Surroundings,
)
from .process import Processes
from .remote_shutdown import RequestServer, Target
from .scheduler import CoroutineScheduler, Wait
from .sockets import Endpoint, Routes, Sockets, inode_in
from .vsockd_client import PortHolders, VsockdClient, may_be_registered

log = logging.getLogger(__name__)


class _Task:
    """A call served by a coroutine that waits."""

    __slots__ = ("call", "coroutine", "key")

    def __init__(self, call: Call, coroutine: Serving) -> None:
        self.call = call
        self.coroutine = coroutine
        self.key = 0


class Supervisor:
    """The dispatcher of intercepted calls of all processes under one filter, in one context."""

    def __init__(
        self,
        architecture: Architecture,
        mechanism: Mechanism,
        descriptors: Sequence[int],
        context: Attachment,
        on_group_stop: Callable[[int], None],
        second: Sequence[Rule] = (),
    ) -> None:
        """Start interception; ``descriptors`` come from ``mechanism``'s other half.

        ``second`` are the rules of :attr:`.Surroundings.second`.
        """
        self._architecture = architecture
        self.scheduler = CoroutineScheduler()
        self._processes = Processes(architecture)
        self._sockets = Sockets()
        self._handlers = {getattr(architecture, name): serve for name, serve in HANDLERS.items()}
        self._paths = {getattr(architecture, name): argument for name, argument in PATHS.items()}
        self._quick = {getattr(architecture, name): serve for name, serve in QUICK_HANDLERS.items()}
        self._socket_handlers = {
            getattr(architecture, name): serve for name, serve in SOCKET_HANDLERS.items()
        } | {number: _in_coroutine(serve) for number, serve in self._quick.items()}
        self._checking = {getattr(architecture, name) for name in CHECKING}
        self._reported_unsupported: set[int] = set()
        surroundings = Surroundings(
            architecture,
            self._processes,
            self.scheduler,
            {getattr(architecture, name): count for name, count in ARGUMENTS.items()},
            self._serve,
            self._serves_data,
            on_group_stop,
            second,
        )
        self._beginning = {architecture.ptrace, architecture.seccomp, architecture.prctl}
        self.interceptor = mechanism.intercept(descriptors, surroundings)
        self._vsockd = VsockdClient(context)
        self._ports = PortHolders(self._vsockd, self.scheduler, self._lose_port)
        self._services = Services(
            architecture,
            self.interceptor,
            self._processes,
            self._sockets,
            self._vsockd,
            self._ports,
            Routes(),
            os.open(os.devnull, os.O_PATH | os.O_CLOEXEC),
        )
        RequestServer(self.scheduler, self._shut_down)

    def run(self) -> None:
        """Serve until no process is left under the filter."""
        while self.interceptor.is_running:
            self.scheduler.poll()

    def begin(self, pid: int, begun: Callable[[OSError | None], None]) -> None:
        """Start supervising the first process ``pid``, which waits in a system call.

        Sockets that it inherits are recognised first.

        ``begun`` is called when the process can go on, with an error if it cannot be supervised.
        """
        try:
            self._processes.check_access()
            self.interceptor.begin(pid)
        except OSError as error:
            # These calls exist: with ENOSYS it is a filter that refuses them.
            is_refused = error.errno == errno.ENOSYS
            begun(PermissionError(errno.EPERM, os.strerror(errno.EPERM)) if is_refused else error)
        else:
            self._run(self._prepare(pid, begun))

    async def _prepare(self, pid: int, begun: Callable[[OSError | None], None]) -> None:
        numbers: dict[Served, list[int]] = {}
        names: list[str] = []
        with contextlib.suppress(OSError):  # Yama may forbid reading until the program is executed
            names = os.listdir(f"/proc/{pid}/fd")
        for name in names:
            inode = self._inode_of(pid, int(name))
            if inode is not None:
                endpoint = None
                with contextlib.suppress(OSError):
                    fd = self.interceptor.duplicate(pid, int(name))
                    endpoint = await self._identify(fd, inode, _always)
                self._sockets.add(inode, endpoint)
                if endpoint is not None and endpoint.served is not None:
                    numbers.setdefault(endpoint.served, []).append(int(name))
        for data_calls, descriptors in numbers.items():
            await self.interceptor.intercept_inherited(pid, data_calls, descriptors)
        begun(None)

    def _run(self, coroutine: Coroutine[Wait, bool, None], value: bool | None = None) -> None:
        """Resume a coroutine that serves no call; ``value`` is the result of its last wait."""
        try:
            wait = coroutine.send(value)  # type: ignore[arg-type]  # None begins
        except StopIteration:
            return
        self.scheduler.add(wait, lambda happened: self._run(coroutine, happened))

    # Calls

    def _serve(self, intercepted: InterceptedCall) -> None:
        """Serve a call, or start the coroutine that serves it."""
        try:
            self._dispatch(intercepted)
        except CallInterrupted:
            pass
        except Exception:  # a defect of the supervisor; the program must not wait for ever
            log.exception("call %d of thread %d failed", intercepted.number, intercepted.pid)
            with contextlib.suppress(CallInterrupted, OSError):
                self.interceptor.answer(intercepted, -errno.EIO)

    def _dispatch(self, intercepted: InterceptedCall) -> None:
        if intercepted.architecture != self._architecture.architecture:
            self._kill_unsupported(intercepted)
            return
        pid, number = intercepted.pid, intercepted.number
        serve = self._socket_handlers.get(number)
        if serve is None:
            self._dispatch_other(intercepted)
            return
        inode = self._inode_of(pid, intercepted.arguments[0])
        if inode is None:  # not a socket, or not open: the kernel has the right error
            self.interceptor.let_through(intercepted)
            return
        try:
            endpoint = self._sockets.find(inode)
        except KeyError:
            call = Call(self._services, intercepted)
            self._start(call, self._recognise(call, inode, serve))
            return
        if endpoint is None:
            self.interceptor.let_through(intercepted)
        else:
            call = Call(self._services, intercepted)
            if endpoint.served is not None:
                call.check()  # the descriptor was the caller's
                if not self._intercepts_data(call, endpoint):
                    return
            elif number not in self._checking:
                call.check()
            self._begin(call, endpoint, serve)

    def _dispatch_other(self, intercepted: InterceptedCall) -> None:
        """Serve a call whose first argument is not a socket."""
        pid, number = intercepted.pid, intercepted.number
        path = self._paths.get(number)
        # Most calls are about other files: look at the path first.  If it is changed
        # afterwards, the program gets the machine's device, whose only use is by ioctls that
        # are intercepted on every descriptor.
        if path is not None and not self._processes.begins_with(
            pid, intercepted.arguments[path], DEVICE
        ):
            self.interceptor.let_through(intercepted)
            return
        if number in self._beginning:
            if self.interceptor.begin_socket_calls(intercepted):
                self.interceptor.let_through(intercepted)
            return
        call = Call(self._services, intercepted)
        self._start(call, self._handlers[number](call))

    def _inode_of(self, pid: int, descriptor: int) -> int | None:
        return inode_in(self._processes.what_is(pid, descriptor & 0xFFFF_FFFF))

    def _serves_data(self, pid: int, descriptor: int) -> bool:
        endpoint = self._sockets.known(self._inode_of(pid, descriptor))
        return endpoint is not None and endpoint.served is not None

    def _intercepts_data(self, call: Call, endpoint: Endpoint) -> bool:
        served = endpoint.served
        assert served is not None
        return self.interceptor.intercepts_data(call.intercepted, served, endpoint.inode)

    def _begin(self, call: Call, endpoint: Endpoint, serve: SocketHandler) -> None:
        """Serve a call on a vSockets socket, at once or by a coroutine."""
        quick = self._quick.get(call.intercepted.number)
        if quick is None:
            self._start(call, serve(call, endpoint))
            return
        try:
            value = quick(call, endpoint)
        except OSError as error:
            value = -(error.errno or errno.EIO)
        # Not kept for the case of a signal: the thread repeats the call, and it is served again.
        call.answer(value)

    # Coroutines of calls

    def _start(self, call: Call, coroutine: Serving) -> None:
        self._resume(_Task(call, coroutine), None)

    def _resume(self, task: _Task, value: bool | CallInterrupted | None) -> None:
        call = task.call
        try:
            if isinstance(value, CallInterrupted):
                wait = task.coroutine.throw(value)
            else:
                wait = task.coroutine.send(value)  # type: ignore[arg-type]  # None begins
        except StopIteration as stop:
            if stop.value is not None and not call.answered:
                call.conclude(stop.value)
        except CallInterrupted:
            pass
        except OSError as error:
            if not call.answered:
                call.conclude(-(error.errno or errno.EIO))
        except Exception:
            log.exception("call %d of thread %d failed", call.intercepted.number, call.pid)
            if not call.answered:
                call.conclude(-errno.EIO)
        else:
            self._suspend(task, wait)

    def _suspend(self, task: _Task, wait: Wait) -> None:
        call = task.call
        is_suspended = not call.answered

        def resume(happened: bool) -> None:
            if not is_suspended or self.interceptor.resume(
                call.intercepted, lambda: self._resume(task, happened)
            ):
                self._resume(task, happened)

        try:
            task.key = self.scheduler.add(wait, resume)
        except OSError as error:  # no memory, or no room in the epoll
            task.coroutine.close()
            if not call.answered:
                call.conclude(-(error.errno or errno.EIO))
            return
        if not is_suspended:  # the thread runs on already
            return
        if call.is_shielded or wait.defers_signals:
            interruption = Interruption.DEFER
        else:
            interruption = Interruption.RESTART if wait.seconds is None else Interruption.FAIL
        self.interceptor.suspend(call.intercepted, interruption, lambda: self._interrupt(task))

    def _interrupt(self, task: _Task) -> None:
        """End a task's wait: a signal has interrupted its call."""
        self.scheduler.cancel(task.key)
        self._resume(task, CallInterrupted())

    # Sockets

    async def _recognise(self, call: Call, inode: int, serve: SocketHandler) -> Answer:
        """Serve a call on a socket that the supervisor sees for the first time.

        A process that is not supervised may have created the socket.
        """
        endpoint = None
        with contextlib.suppress(OSError):
            fd = self.interceptor.duplicate(call.pid, call.integer(0))
            endpoint = await self._identify(fd, inode, call.check)
        if endpoint is not None and not self.interceptor.begin_socket_calls(call.intercepted):
            return None
        self._sockets.add(inode, endpoint)
        if endpoint is None:
            call.let_through()
            return None
        if endpoint.served is not None and not self._intercepts_data(call, endpoint):
            return None
        return await serve(call, endpoint)

    async def _identify(self, fd: int, inode: int, check: Callable[[], None]) -> Endpoint | None:
        """Return the vSockets socket of which ``fd`` is a copy, or None; close ``fd``."""
        with contextlib.closing(_socket.socket(fileno=fd)) as sock:
            check()
            if sock.getsockopt(SOL_SOCKET, SO_DOMAIN) != AF_UNIX:
                return None
            if not may_be_registered(sock):
                return None
            endpoint = Endpoint(sock.getsockopt(SOL_SOCKET, SO_TYPE), inode, cookie_of(sock))
        request = client.query(cookie=endpoint.cookie, inode=inode)
        record, _ = await self._vsockd.request(None, request)
        self._recover(endpoint, record)
        return endpoint

    def _recover(self, endpoint: Endpoint, record: Record) -> None:
        if record.role == Role.CONNECTED:
            endpoint.establish(record)
        else:
            endpoint.has_name = record.is_named
            endpoint.holder = self._ports.find(endpoint.inode)
            endpoint.is_attached = not endpoint.has_name
            endpoint.local = record.local
            endpoint.phase = Phase.LISTENING if record.role == Role.LISTENING else Phase.BOUND

    def _lose_port(self, inode: int, closed: bool) -> None:
        """Shut down a socket whose port vsockd has released, unless it is ``closed``."""
        endpoint = self._sockets.known(inode)
        if endpoint is not None:
            endpoint.holder = None
            endpoint.phase = Phase.LOST
        if not closed:
            self.interceptor.shut_down(inode, insists=True)

    def _shut_down(self, target: Target) -> bool:
        """Shut down a program's end of a stream where vsockd is not allowed to do so."""
        inodes = target.inode, self._sockets.inode_of(target.cookie)
        return any(self.interceptor.shut_down(one, insists=False) for one in inodes if one)

    def _kill_unsupported(self, intercepted: InterceptedCall) -> None:
        """Kill a process whose system call numbers have other meanings, and report it once."""
        pid = intercepted.pid
        is_waiting = functools.partial(self.interceptor.is_waiting, intercepted)
        # OSError: the process has ended.
        with contextlib.suppress(OSError), self._processes.opened(pid) as pidfd:
            if pid not in self._reported_unsupported:
                self._reported_unsupported.add(pid)
                name = self._processes.executable(pid)
                text = f"{name}: 32-bit programs are not supported; killed"
                with contextlib.suppress(OSError):  # the process has no standard error
                    self._processes.report(pid, text, self.interceptor.duplicate, is_waiting)
            if is_waiting():  # so the pidfd is this process's
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _in_coroutine(serve: QuickHandler) -> SocketHandler:
    """Return a coroutine handler that calls ``serve``, a handler that never waits."""

    async def served(call: Call, endpoint: Endpoint) -> Answer:
        return serve(call, endpoint)

    return served


def _always() -> None:
    """Accept the identity of a socket: its process waits for the supervisor and cannot change."""
