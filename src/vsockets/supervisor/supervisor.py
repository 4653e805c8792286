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
from .call import Answer, Call, OtherSocket, Services, Serving, SocketHandler
from .calls import ARGUMENTS, CHECKING, DUPLICATING, HANDLERS, PATHS, SOCKET_HANDLERS
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
    """The coroutine that serves a call, and its current wait."""

    __slots__ = ("_call", "_coroutine", "_interceptor", "_is_suspended", "_key", "_scheduler")

    def __init__(self, scheduler: CoroutineScheduler, call: Call, coroutine: Serving) -> None:
        self._scheduler = scheduler
        self._interceptor = call.services.interceptor
        self._call = call
        self._coroutine = coroutine
        self._key = 0  #: of the wait
        self._is_suspended = False  #: whether the thread waits, too

    def run(self, value: bool | CallInterrupted | None = None) -> None:
        """Begin the coroutine, or resume it with the result of its wait."""
        try:
            if isinstance(value, CallInterrupted):
                wait = self._coroutine.throw(value)
            else:
                wait = self._coroutine.send(value)  # type: ignore[arg-type]  # None begins
        except StopIteration as stop:
            if stop.value is not None and not self._call.answered:
                self._call.conclude(stop.value)
        except Exception as error:
            self._call.fail(error)
        else:
            self._wait(wait)

    def _wait(self, wait: Wait) -> None:
        call = self._call
        self._is_suspended = not call.answered  # else the thread runs on already
        try:
            self._key = self._scheduler.add(wait, self._on_event)
        except OSError as error:  # no memory, or no room in the epoll
            self._coroutine.close()
            call.fail(error)
            return
        if not self._is_suspended:
            return
        if call.is_shielded or wait.defers_signals:
            interruption = Interruption.DEFER
        else:
            interruption = Interruption.RESTART if wait.seconds is None else Interruption.FAIL
        self._interceptor.suspend(call.intercepted, interruption, self._on_signal)

    def _on_event(self, happened: bool) -> None:
        if not self._is_suspended or self._interceptor.resume(
            self._call.intercepted, functools.partial(self.run, happened)
        ):
            self.run(happened)

    def _on_signal(self) -> None:
        """End the wait: a signal has interrupted the call."""
        self._scheduler.cancel(self._key)
        self.run(CallInterrupted())


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
        self._socket_handlers = {
            getattr(architecture, name): serve for name, serve in SOCKET_HANDLERS.items()
        }
        self._checking = {getattr(architecture, name) for name in CHECKING}
        self._duplicating = {getattr(architecture, name) for name in DUPLICATING}
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
        """Serve a call, or begin the coroutine that serves it."""
        call = Call(self._services, intercepted)
        try:
            answer = self._dispatch(call)
            if isinstance(answer, int):
                call.conclude(answer)
            elif answer is not None:
                _Task(self.scheduler, call, answer).run()
        except Exception as error:
            call.fail(error)

    def _dispatch(self, call: Call) -> Answer | Serving:
        intercepted = call.intercepted
        if intercepted.architecture != self._architecture.architecture:
            self._kill_unsupported(intercepted)
            return None
        number = intercepted.number
        serve = self._socket_handlers.get(number)
        if serve is None:
            return self._dispatch_other(call)
        if number not in self._duplicating:
            return self._dispatch_by_link(call, serve)
        descriptor = call.arguments[0] & 0xFFFF_FFFF
        expected = self._sockets.expected(call.pid, descriptor)
        if expected is not None:
            try:
                return serve(call, expected)
            except OtherSocket:
                self._sockets.forget(call.pid, descriptor)
        return self._dispatch_by_link(call, serve)

    def _dispatch_by_link(self, call: Call, serve: SocketHandler) -> Answer | Serving:
        """Serve a call on the socket that /proc shows."""
        descriptor = call.arguments[0] & 0xFFFF_FFFF
        inode = inode_in(self._processes.what_is(call.pid, descriptor))
        if inode is None:  # not a socket, or not open: the kernel has the right error
            call.let_through()
            return None
        try:
            endpoint = self._sockets.find(inode)
        except KeyError:
            return self._recognise(call, inode, serve)
        if endpoint is None:
            call.let_through()
            return None
        if endpoint.served is not None:
            call.check()  # the descriptor was the caller's
            if not self._intercepts_data(call, endpoint):
                return None
        elif call.intercepted.number in self._duplicating:
            self._sockets.expect(call.pid, descriptor, endpoint)
        elif call.intercepted.number not in self._checking:
            call.check()
        return serve(call, endpoint)

    def _dispatch_other(self, call: Call) -> Answer | Serving:
        """Serve a call whose first argument is not a socket."""
        number = call.intercepted.number
        path = self._paths.get(number)
        # Most calls are about other files: look at the path first.  If it is changed
        # afterwards, the program gets the machine's device, whose only use is by ioctls that
        # are intercepted on every descriptor.
        if path is not None and not self._processes.begins_with(
            call.pid, call.arguments[path], DEVICE
        ):
            call.let_through()
            return None
        if number in self._beginning:
            if self.interceptor.begin_socket_calls(call.intercepted):
                call.let_through()
            return None
        return self._handlers[number](call)

    def _inode_of(self, pid: int, descriptor: int) -> int | None:
        return inode_in(self._processes.what_is(pid, descriptor & 0xFFFF_FFFF))

    def _serves_data(self, pid: int, descriptor: int) -> bool:
        endpoint = self._sockets.known(self._inode_of(pid, descriptor))
        return endpoint is not None and endpoint.served is not None

    def _intercepts_data(self, call: Call, endpoint: Endpoint) -> bool:
        served = endpoint.served
        assert served is not None
        return self.interceptor.intercepts_data(call.intercepted, served, endpoint.inode)

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
        answer = serve(call, endpoint)
        return answer if answer is None or isinstance(answer, int) else await answer

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
        # OSError: the process has ended.
        with contextlib.suppress(OSError), self._processes.opened(pid) as pidfd:
            if pid not in self._reported_unsupported:
                self._reported_unsupported.add(pid)
                name = self._processes.executable(pid)
                text = f"{name}: 32-bit programs are not supported; killed"
                with contextlib.suppress(OSError):  # the process has no standard error
                    self._processes.report(
                        pid, text, self.interceptor.duplicate, intercepted.is_waiting
                    )
            if intercepted.is_waiting():  # so the pidfd is this process's
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _always() -> None:
    """Accept the identity of a socket: its process waits for the supervisor and cannot change."""
