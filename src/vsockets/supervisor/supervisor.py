"""Serving system calls: one thread, a coroutine for each call that has to wait."""

from __future__ import annotations

import _socket
import contextlib
import errno
import functools
import logging
import os
import select
import signal
import time
from collections import OrderedDict
from collections.abc import Callable, Coroutine
from socket import (
    AF_UNIX,
    SO_DOMAIN,
    SO_TYPE,
    SOL_SOCKET,
)
from typing import NamedTuple

from ..attachment import Attachment
from ..protocol import Op, Record, Request, RequestFlag, Role
from .arch import Architecture
from .call import Answer, Call, Serving, SocketHandler, TracedCall
from .calls import ARGUMENTS, HANDLERS, PATHS, SOCKET_HANDLERS
from .calls.creating import DEVICE
from .calls.datagrams import Routes
from .filter import Served
from .limits import SUPERVISOR_SIGNAL_POLL_SECONDS, SUPERVISOR_SIGNAL_WAIT_SECONDS
from .notification import Gone, Listener, Notification
from .port_holders import Hold
from .process import Processes
from .ptrace import SystemCall
from .scheduler import CoroutineScheduler, Wait, pause
from .sockets import SERVED, Endpoint, Phase, Sockets, inode_in
from .tracing import Tracee, Tracer
from .vsockd_client import Asker, VsockdClient, cookie_of, may_be_known

log = logging.getLogger(__name__)

#: Answers that a thread was interrupted before it got; it asks again at once or never.
_KEPT_ANSWERS = 1024

#: How often a program that has not begun is tried to be prepared, and how soon again, in seconds.
_TRIES, _A_MOMENT = 1000, 0.001


class _Task:
    """A call being served by a coroutine that waits."""

    __slots__ = ("call", "coroutine", "key")

    def __init__(self, call: Call, coroutine: Serving) -> None:
        self.call = call
        self.coroutine = coroutine
        self.key = 0


class _Kept(NamedTuple):
    """An answer that its thread has not got, or may not have: for when it makes the call again."""

    call: Call
    value: int
    until: float  #: when it is given in any case, as ``time.monotonic``


class Supervisor:
    """Answers the intercepted calls of all processes under one filter, in one context."""

    def __init__(self, machine: Architecture, listener: Listener, context: Attachment) -> None:
        self.machine = machine
        self.listener = listener
        self.processes = Processes(machine)
        self.sockets = Sockets()
        #: what holds the ports of bound sockets, by inode: not to be forgotten with the sockets
        self._holds: dict[int, Hold] = {}
        self.vsockd = VsockdClient(context)
        self.routes = Routes()
        #: A descriptor of nothing much, see ``calls.packets``.
        self.marker = os.open(os.devnull, os.O_PATH | os.O_CLOEXEC)
        self.waits = CoroutineScheduler(listener.fileno(), self._on_listener)
        self.tracer = Tracer(machine, self.processes, self._serve_traced, self._is_served)
        self._plain = {getattr(machine, name): serve for name, serve in HANDLERS.items()}
        self._paths = {getattr(machine, name): argument for name, argument in PATHS.items()}
        self._on_sockets = {
            getattr(machine, name): serve for name, serve in SOCKET_HANDLERS.items()
        }
        self._arguments = {getattr(machine, name): count for name, count in ARGUMENTS.items()}
        self._waiting: dict[int, _Task] = {}  # by thread
        self._kept: OrderedDict[int, _Kept] = OrderedDict()  # by thread
        self._told_unsupported: set[int] = set()
        self._told_untraced: set[tuple[int, Served]] = set()
        self._running = True

    def run(self) -> None:
        """Serve until no process is left under the filter."""
        while self._running:
            self.waits.poll()

    def begin(self, pid: int, begun: Callable[[], None]) -> None:
        """Prepare for a program that has not begun: it may have inherited sockets.

        Its thread waits in a system call, and ``begun`` is called when it may go on.
        """
        self._run(self._prepare(pid, begun))

    async def _prepare(self, pid: int, begun: Callable[[], None]) -> None:
        numbers: dict[Served, list[int]] = {}
        names: list[str] = []
        with contextlib.suppress(OSError):  # before the program is executed it may be closed to us
            names = os.listdir(f"/proc/{pid}/fd")
        for name in names:
            inode = self._inode_of(pid, int(name))
            if inode is not None:
                endpoint = None
                with contextlib.suppress(OSError):
                    fd = self.processes.duplicate(pid, int(name))
                    endpoint = await self._identify(fd, inode, _always)
                self.sockets.add(inode, endpoint)
                if endpoint is not None and endpoint.served is not None:
                    numbers.setdefault(endpoint.served, []).append(int(name))
        for kind, descriptors in numbers.items():
            await self._cover_inherited(pid, kind, descriptors)
        begun()

    async def _cover_inherited(self, pid: int, kind: Served, descriptors: list[int]) -> None:
        try:
            self.tracer.attach(pid)
        except OSError:  # the program is told at its first call about one of them
            return
        for _ in range(_TRIES):
            codes: list[int] = []
            # OSError: it does not wait yet.
            with contextlib.suppress(OSError):
                arguments = self.processes.arguments_of(pid)
                self.tracer.cover(pid, kind, descriptors, arguments, codes.append)
                while not codes and self.tracer.is_tracing(pid):
                    await pause(_A_MOMENT)
            if codes and codes[0] != errno.EINTR:
                return
            await pause(_A_MOMENT)

    def _run(self, coroutine: Coroutine[Wait, bool, None], value: bool | None = None) -> None:
        """Run a coroutine that serves no call."""
        try:
            wait = coroutine.send(value)  # type: ignore[arg-type]  # None begins
        except StopIteration:
            return
        self.waits.add(wait, lambda happened: self._run(coroutine, happened))

    # Calls

    def _on_listener(self, events: int) -> None:
        if events & select.POLLIN:
            try:
                notification = self.listener.receive()
            except (Gone, InterruptedError):
                return
            try:
                self._serve(notification)
            except Gone:
                pass
            except Exception:  # a mistake of ours; the program is not left waiting
                log.exception("call %d of thread %d lost", notification.number, notification.pid)
                with contextlib.suppress(Gone, OSError):
                    self.listener.answer(notification.id, -errno.EIO)
        elif events & (select.POLLHUP | select.POLLERR):
            self._running = False

    def _serve(self, notification: Notification) -> None:
        if notification.architecture != self.machine.architecture:
            self._end_unsupported(notification)
            return
        pid = notification.pid
        path = self._paths.get(notification.number)
        # A look at what most calls are, before anything is made for this one.  If the path is
        # another one afterwards, the program gets the machine's device, which has nothing but
        # the ioctls that are intercepted whatever descriptor they are made on.
        if path is not None and not self.processes.begins_with(
            pid, notification.arguments[path], DEVICE
        ):
            self.listener.let_through(notification.id)
            return
        if self._waiting or self._kept:
            call = Call(self, notification)
            if self._is_call_again(call):
                return
        serve = self._on_sockets.get(notification.number)
        if serve is None:
            call = Call(self, notification)
            self._start(call, self._plain[notification.number](call))
            return
        inode = inode_in(self.processes.what_is(pid, notification.arguments[0] & 0xFFFF_FFFF))
        if inode is None:  # no socket, or no descriptor: the kernel says so best
            self.listener.let_through(notification.id)
            return
        try:
            endpoint = self.sockets.find(inode)
        except KeyError:
            call = Call(self, notification)
            self._start(call, self._recognise(call, inode, serve))
            return
        if endpoint is None:
            self.listener.let_through(notification.id)
        else:
            call = Call(self, notification)
            call.check()  # it was its own process's descriptor
            if endpoint.served is None or self._is_covered(call, endpoint):
                self._start(call, serve(call, endpoint))

    def _serve_traced(self, thread: Tracee, stopped: SystemCall) -> None:
        """Serve a call that the tracer has stopped."""
        call = TracedCall(self, thread, stopped)
        serve = self._on_sockets.get(call.number)
        endpoint = self.known(self._inode_of(call.pid, call.arguments[0]))
        if serve is None or endpoint is None:  # the number is another file's by now
            call.let_through()
        else:
            self._start(call, serve(call, endpoint))

    def _inode_of(self, pid: int, descriptor: int) -> int | None:
        return inode_in(self.processes.what_is(pid, descriptor & 0xFFFF_FFFF))

    def _is_call_again(self, call: Call) -> bool:
        """Whether a signal interrupted this call, and its thread now makes it again."""
        used = self._arguments[call.number]
        earlier = self._waiting.get(call.pid)
        if earlier is not None:
            if earlier.call.is_same_as(call, used):
                earlier.call.id = call.id
                return True
            del self._waiting[call.pid]
            self._stop(earlier)
        kept = self._kept.pop(call.pid, None)
        if kept is not None and kept.call.is_same_as(call, used):
            self._give(kept._replace(call=call))
            return True
        return False

    def _start(self, call: Call, coroutine: Serving) -> None:
        self._resume(_Task(call, coroutine), None)

    def _resume(self, task: _Task, value: bool | Gone | None) -> None:
        call = task.call
        try:
            if isinstance(value, Gone):
                wait = task.coroutine.throw(value)
            else:
                wait = task.coroutine.send(value)  # type: ignore[arg-type]  # None begins
        except StopIteration as stop:
            if stop.value is not None and not call.answered:
                call.conclude(stop.value)
        except Gone:
            pass
        except OSError as error:
            if not call.answered:
                call.conclude(-(error.errno or errno.EIO))
        except Exception:
            log.exception("call %d of thread %d lost", call.number, call.pid)
            if not call.answered:
                call.conclude(-errno.EIO)
        else:
            self._suspend(task, wait)

    def _suspend(self, task: _Task, wait: Wait) -> None:
        pid = task.call.pid

        def resume(happened: bool) -> None:
            if self._waiting.get(pid) is task:
                del self._waiting[pid]
            self._resume(task, happened)

        try:
            task.key = self.waits.add(wait, resume)
        except OSError as error:  # no memory, or no room in the epoll
            task.coroutine.close()
            if not task.call.answered:
                task.call.conclude(-(error.errno or errno.EIO))
            return
        if task.call.answered:  # the thread is about other things already
            return
        if isinstance(task.call, TracedCall):
            self.tracer.sleep(task.call.thread, wait.seconds is None, lambda: self._stop(task))
        else:
            self._waiting[pid] = task

    def _stop(self, task: _Task) -> None:
        """Let a task that waits end: a signal has interrupted its call."""
        self.waits.cancel(task.key)
        self._resume(task, Gone())

    def give(self, call: Call, value: int) -> None:
        """Answer a call that is done, now or when its thread makes it again."""
        self._give(self._keeping(call, value))

    @staticmethod
    def _keeping(call: Call, value: int) -> _Kept:
        return _Kept(call, value, time.monotonic() + SUPERVISOR_SIGNAL_WAIT_SECONDS)

    def _give(self, answer: _Kept) -> None:
        """Answer a call that is done, and must not be done again if a signal gets in between.

        The kernel takes an answer also when a signal has woken the thread already, and then
        drops it: the thread makes the call again although this end was told that all is well.
        So first the thread is let take its signals.
        """
        pid = answer.call.pid
        if not self.processes.has_signal(pid) or time.monotonic() >= answer.until:
            try:
                answer.call.answer(answer.value)
                return
            except Gone:
                pass
        else:
            self.waits.add(
                pause(SUPERVISOR_SIGNAL_POLL_SECONDS), lambda _: self._give_again(answer)
            )
        self._keep(answer)

    def _keep(self, answer: _Kept) -> None:
        self._kept[answer.call.pid] = answer
        if len(self._kept) > _KEPT_ANSWERS:
            self._kept.popitem(last=False)

    def _give_again(self, answer: _Kept) -> None:
        if self._kept.get(answer.call.pid) is answer:  # else the call has been made again
            del self._kept[answer.call.pid]
            self._give(answer)

    # Sockets

    async def _recognise(self, call: Call, inode: int, serve: SocketHandler) -> Answer:
        """A socket seen for the first time: is it the fabric's, from another process?"""
        endpoint = None
        with contextlib.suppress(OSError):
            endpoint = await self._look_up(call, inode)
        self.sockets.add(inode, endpoint)
        if endpoint is None:
            call.let_through()
            return None
        if endpoint.served is not None and not self._is_covered(call, endpoint):
            return None
        return await serve(call, endpoint)

    async def _look_up(self, call: Call, inode: int) -> Endpoint | None:
        fd = self.processes.duplicate(call.pid, call.integer(0))
        return await self._identify(fd, inode, call.check)

    async def _identify(self, fd: int, inode: int, check: Callable[[], None]) -> Endpoint | None:
        """Return the vSockets socket that ``fd``, which this closes, is a copy of, if it is one."""
        with contextlib.closing(_socket.socket(fileno=fd)) as sock:
            check()
            if sock.getsockopt(SOL_SOCKET, SO_DOMAIN) != AF_UNIX:
                return None
            if not may_be_known(sock):
                return None
            endpoint = Endpoint(sock.getsockopt(SOL_SOCKET, SO_TYPE), inode, cookie_of(sock))
        request = Request(Op.QUERY, cookie=endpoint.cookie, inode=inode)
        record, _ = await self.vsockd.ask(None, request)
        self._recover(endpoint, record)
        return endpoint

    def _recover(self, endpoint: Endpoint, record: Record) -> None:
        if record.role == Role.CONNECTED:
            endpoint.settle(record)
        else:
            endpoint.named = bool(record.flags & RequestFlag.NAMED)
            endpoint.hold = self._holds.get(endpoint.inode)
            endpoint.entered = not endpoint.named
            endpoint.local = record.local
            endpoint.phase = Phase.LISTENING if record.role == Role.LISTENING else Phase.BOUND

    async def bind(
        self,
        asker: Asker | None,
        endpoint: Endpoint,
        sock: _socket.socket,
        address: tuple[int, int],
        flags: int,
    ) -> None:
        """Give a stream or packet socket, copied to ``sock``, a local address.  OSError."""
        hold = Hold(await self.vsockd.open(), self.waits, self._holds)
        try:
            record = await hold.bind(asker, sock, address, endpoint.buffers, flags)
        except BaseException:
            hold.close()
            raise
        hold.watch(self._lose)
        endpoint.hold = hold
        endpoint.named = True
        endpoint.local = record.local
        endpoint.phase = Phase.BOUND

    def _lose(self, inode: int, closed: bool) -> None:
        """End a socket whose port vsockd has given up, unless it is ``closed``."""
        endpoint = self.known(inode)
        if endpoint is not None:
            endpoint.hold = None
            endpoint.phase = Phase.LOST
        if not closed:
            self.processes.shut_down(inode)

    def known(self, inode: int | None) -> Endpoint | None:
        """Return the vSockets socket with this inode, if it is known to be one."""
        try:
            return None if inode is None else self.sockets.find(inode)
        except KeyError:
            return None

    def adopt(self, sock: _socket.socket, type_: int) -> Endpoint:
        """Remember a socket that a program is about to be given."""
        inode = os.fstat(sock.fileno()).st_ino
        endpoint = Endpoint(type_, inode, cookie_of(sock))
        self.sockets.add(inode, endpoint)
        return endpoint

    def hand_over(self, call: Call, sock: _socket.socket, type_: int, close_on_exec: bool) -> None:
        """Give the process ``sock`` as the answer to its call.

        The number is the lowest free one, as POSIX has it.  If data calls on the socket are served
        the process is traced from now on.  OSError EPERM when a datagram socket's cannot be.
        """
        kind = SERVED.get(type_)
        if kind is None or not self._may_trace(call, kind):
            call.answer_with_descriptor(sock.fileno(), close_on_exec)
            return
        number = call.add_descriptor(sock.fileno(), close_on_exec)
        if self.tracer.covers(call.pid, kind, number):
            call.conclude(number)
        else:
            self._cover(call, kind, [number], number)

    def _is_covered(self, call: Call, endpoint: Endpoint) -> bool:
        """Return whether data calls of the process on a socket are traced, as far as may be.

        If not, they will be when its thread makes this call again.
        """
        kind, descriptor = endpoint.served, call.arguments[0] & 0xFFFF_FFFF
        assert kind is not None
        if self.tracer.covers(call.pid, kind, descriptor) or not self._may_trace(call, kind, False):
            return True
        numbers = self.processes.numbers_of(call.pid, endpoint.inode)
        call.check()
        self._cover(call, kind, numbers or [descriptor], None)
        return False

    def _may_trace(self, call: Call, kind: Served, is_new: bool = True) -> bool:
        """Return whether the process could be attached to the tracer.

        OSError EPERM for a datagram socket that is new: it could not be used.
        """
        try:
            self.tracer.attach(call.pid)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES):
                raise Gone from None
            self._tell_untraced(call, kind)
            if kind is Served.DATAGRAM and is_new:
                raise
            return False
        return True

    def _cover(self, call: Call, kind: Served, numbers: list[int], answer: int | None) -> None:
        """Have calls on descriptors traced; the call's thread then makes it again, and gets the
        ``answer``, if there is one.
        """

        def done(code: int) -> None:
            value = answer
            if code:
                log.warning("process of thread %d: no filter: %s", call.pid, os.strerror(code))
                if kind is Served.DATAGRAM and answer is not None:
                    value = -errno.EPERM
            if value is not None:
                self._keep(self._keeping(call, value))

        self.tracer.cover(call.pid, kind, numbers, call.arguments, done)

    def _is_served(self, pid: int, descriptor: int) -> bool:
        endpoint = self.known(self._inode_of(pid, descriptor))
        return endpoint is not None and endpoint.served is not None

    def _tell_untraced(self, call: Call, kind: Served) -> None:
        what = "datagram sockets do not work"
        if kind is Served.PACKET:
            what = "packet sockets lose MSG_EOR"
        process = self.processes.first_thread(call.pid)
        if (process, kind) in self._told_untraced:
            return
        self._told_untraced.add((process, kind))
        name = self.processes.executable(call.pid)
        text = f"{name} may not be traced (Yama's ptrace_scope, or it has a tracer): {what}"
        with contextlib.suppress(OSError), self.processes.opened(call.pid) as pidfd:
            valid = functools.partial(self.listener.is_valid, call.id)
            self.processes.tell(pidfd, call.pid, text, valid)

    # Programs we cannot serve

    def _end_unsupported(self, notification: Notification) -> None:
        """Kill a process whose system call numbers mean something else, and say so once."""
        pid = notification.pid

        def waits() -> bool:
            return self.listener.is_valid(notification.id)

        # OSError: the process has ended.
        with contextlib.suppress(OSError), self.processes.opened(pid) as pidfd:
            if pid not in self._told_unsupported:
                self._told_unsupported.add(pid)
                name = self.processes.executable(pid)
                text = f"{name}: 32-bit programs are not supported, it is killed"
                self.processes.tell(pidfd, pid, text, waits)
            if waits():  # then it is this process that the number meant
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _always() -> None:
    """Nothing is to be checked: the process waits for us."""
