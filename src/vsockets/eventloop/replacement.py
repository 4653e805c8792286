"""Replacement of a service's process while it serves, at SIGUSR2.

The process that a service manager or a shell has started, the *main* process, starts its own
command again as a *worker*, with a link (a socket) between the two::

    new worker                   main                          serving process
      starts, reads its
      configuration
      "started"     ----------->
                                 "hand over"  ------------->
                                                               goes on serving
                                              <-------------   its listening sockets
                    <-----------
      takes them for its
      listeners
      "ready"       ----------->
                                 "retire"     ------------->
                                                               stops accepting, releases files
                                              <-------------   "retired"
      serves        <----------- "serve"                       serves the connections it has, then
                                                               ends, unless it is the main process

The serving process is the main one itself at first, later a worker.  Clients that connect meanwhile
wait in the backlog of the same sockets.  If the new worker fails before it is ready, the serving
process goes on.

The main process stays until all workers have ended.  At SIGTERM it sends them "end", which has no
further effect on a worker that has got SIGTERM itself (from a service manager that signals all
processes, or a terminal), and "close" at a second SIGTERM.  A worker whose main process is killed
ends as at SIGTERM.

A *keeper* is a main process that never serves (:meth:`Replacement.keep`): it holds the listeners
for its workers, the first of which it starts at once, and starts another one when the serving
worker is killed.  So the listeners are never missing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import functools
import json
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from .._linux.folders import SocketFile

T = TypeVar("T")

log = logging.getLogger("vsockets.service")

#: The environment variable with a worker's descriptor of its link.
_LINK = "VSOCKETS_REPLACEMENT_LINK"
#: Seconds for a new worker to start and to be ready; and for any other answer of a process.
_START_SECONDS, _ANSWER_SECONDS = 60.0, 20.0
#: Bytes of one message, and descriptors in it: a listener has two at most.
_MESSAGE, _DESCRIPTORS_MAX = 65_536, 16


class HandedOver(NamedTuple):
    """The sockets of one listener on their way to another process."""

    locator: str
    file: Any  #: of a unix socket: its path, with device and inode; else None
    fds: list[int]


#: Returns the listeners that this process hands over, with descriptors that stay its own.
_sources: list[Callable[[], Iterable[HandedOver]]] = []
#: Called when the listeners belong to another process: their files stay.
_disowners: list[Callable[[], None]] = []


def register(source: Callable[[], Iterable[HandedOver]], disown: Callable[[], None]) -> None:
    """Register the functions that return this process's listeners, and that give them up."""
    _sources.append(source)
    _disowners.append(disown)


# A worker's side of its link


class _MainProcess:
    """The main process, as a worker sees it."""

    def __init__(self, fd: int) -> None:
        self.link = socket.socket(fileno=fd)
        self.link.set_inheritable(False)
        self.link.settimeout(_ANSWER_SECONDS)
        self._serves = False
        self.listeners: dict[str, HandedOver] = {}
        self.link.send(b"started")
        for handed_over in _receive_listeners(self.link):
            self.listeners[handed_over.locator] = handed_over

    def take_over(self) -> None:
        """Report that this process is ready; return when it is to serve."""
        if self._serves:
            return
        self._serves = True
        with contextlib.suppress(OSError):  # the main process has ended: see Replacement
            self.link.send(b"ready")
            # Any other message stays in the link: this process is to end, see Replacement.
            if self.link.recv(64, socket.MSG_PEEK) == b"serve":
                self.link.recv(64)

    def close_unused(self) -> None:
        """Close the listeners that this process's configuration does not have."""
        _close(self.listeners.values())
        for _, file, _ in self.listeners.values():
            if file is not None:
                path, made = file
                with contextlib.suppress(OSError):
                    SocketFile(Path(path), made=made).remove()
        self.listeners.clear()


@functools.cache
def _main_process() -> _MainProcess | None:
    number = os.environ.pop(_LINK, "")
    return _MainProcess(int(number)) if number else None


def is_worker() -> bool:
    """Return whether this process is a worker, which another process has started."""
    return _main_process() is not None


def inherited(locator: str) -> HandedOver | None:
    """Return the sockets that the predecessor has handed over for ``locator``, once.

    The caller takes ownership of the descriptors.
    """
    main = _main_process()
    return main.listeners.pop(locator, None) if main is not None else None


def take_over() -> None:
    """If this process replaces another one, have that release its files, and wait for it.

    The caller is about to open what only one process can have open.  Later calls do nothing.
    """
    main = _main_process()
    if main is not None:
        main.take_over()


def close_unused() -> None:
    """Close the listeners that were handed over and are not in this process's configuration."""
    main = _main_process()
    if main is not None:
        main.close_unused()


# Messages


def _send_listeners(sock: socket.socket, listeners: Iterable[HandedOver]) -> None:
    for locator, file, fds in listeners:
        socket.send_fds(sock, [json.dumps([locator, file]).encode()], fds)
    sock.send(b"end")


def _receive_listeners(sock: socket.socket) -> Iterator[HandedOver]:
    """Yield the listeners; the caller takes ownership of their descriptors."""
    while True:
        data, fds, _, _ = socket.recv_fds(sock, _MESSAGE, _DESCRIPTORS_MAX)
        for fd in fds:
            os.set_inheritable(fd, False)
        if data == b"end":
            return
        if not data:
            raise _has_ended()
        locator, file = json.loads(data)
        yield HandedOver(locator, file, list(fds))


def _has_ended() -> OSError:
    return ConnectionResetError(errno.ECONNRESET, "the process has ended; see its messages")


def _expect(sock: socket.socket, word: bytes, seconds: float = _ANSWER_SECONDS) -> None:
    sock.settimeout(seconds)
    found = sock.recv(64)
    if not found:
        raise _has_ended()
    if found != word:
        raise OSError(errno.EPROTO, f"unexpected message {found!r} (expected {word!r})")


class _Worker:
    """A worker, as the main process sees it."""

    def __init__(self) -> None:
        """Start this process's own command.

        Raises OSError if it cannot be started.
        """
        self.link, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            number = theirs.fileno()
            self.process = subprocess.Popen(
                [sys.executable, *sys.orig_argv[1:]],
                # The service manager is notified by the process that it has started.
                env={
                    **{name: os.environ[name] for name in os.environ.keys() - {"NOTIFY_SOCKET"}},
                    _LINK: str(number),
                },
                pass_fds=[number],
            )
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[int] = loop.create_future()
        self._exchanges = False  #: whether a thread uses the link
        self._pidfd = os.pidfd_open(self.process.pid)
        loop.add_reader(self._pidfd, self._on_end)

    def _on_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        os.close(self._pidfd)
        self.ended.set_result(self.process.wait())
        self._close_unused_link()

    def _close_unused_link(self) -> None:
        if self.ended.done() and not self._exchanges:
            self.link.close()

    def send(self, word: bytes) -> None:
        """Send a message, unless the process has ended."""
        with contextlib.suppress(OSError):
            self.link.send(word)

    async def exchange(self, step: Callable[..., T], *arguments: object) -> T:
        """Call ``step``, one of the methods below, in a thread; return its value.

        The thread alone uses the link meanwhile, and the link stays open.

        Raises OSError if the process has ended.
        """
        if self.ended.done():
            raise _has_ended()
        self._exchanges = True
        try:
            return await asyncio.to_thread(step, *arguments)
        finally:
            self._exchanges = False
            self._close_unused_link()

    # The exchange

    def wait_until_started(self) -> None:
        _expect(self.link, b"started", _START_SECONDS)

    def give(self, listeners: list[HandedOver]) -> None:
        """Hand listeners over, and wait until the worker is ready."""
        self.link.settimeout(_ANSWER_SECONDS)
        _send_listeners(self.link, listeners)
        _expect(self.link, b"ready", _START_SECONDS)

    def listeners(self) -> list[HandedOver]:
        self.link.settimeout(_ANSWER_SECONDS)
        self.link.send(b"hand over")
        return list(_receive_listeners(self.link))

    def retire(self) -> None:
        self.link.settimeout(_ANSWER_SECONDS)
        self.link.send(b"retire")
        _expect(self.link, b"retired")


class Replacement:
    """The replacement of this process, in a running asyncio loop.

    ``retire`` stops accepting, releases what only one process can have open, and returns an
    awaitable of the remaining connections' end; without it the process cannot be replaced.
    ``stop`` ends the process as SIGTERM does; ``reload`` reads its configuration again.
    """

    def __init__(
        self,
        retire: Callable[[], Awaitable[object]] | None,
        stop: Callable[[], object],
        reload: Callable[[], object] | None,
    ) -> None:
        self.retired = asyncio.Event()  #: set when this process has stopped accepting
        self._retire_service = retire
        self._stop = stop
        self._reload = reload
        self._ending = False
        self._keeps = False
        self._drained: asyncio.Future[object] | None = None
        self._workers: list[_Worker] = []  #: that have served; the last one serves
        self._replacing: asyncio.Task[int | None] | None = None
        self._starting: _Worker | None = None
        self._main = _main_process()
        if self._main is not None:
            asyncio.get_running_loop().add_reader(self._main.link.fileno(), self._on_message)

    @property
    def signals(self) -> dict[signal.Signals, Callable[[], object]]:
        """The functions to call at signals."""
        calls: dict[signal.Signals, Callable[[], object]] = {
            signal.SIGTERM: self._end,
            signal.SIGINT: self._end,
            signal.SIGUSR2: self._start,
        }
        if self._reload is not None:
            calls[signal.SIGHUP] = self._on_reload
        return calls

    def _end(self) -> None:
        """End this process and its workers; a second call closes the connections."""
        if self._main is not None and self._ending:
            return  # the main process decides
        word = b"close" if self._ending else b"end"
        self._ending = True
        self._stop()
        if self._starting is not None:
            self._starting.process.kill()
        for worker in self._workers:
            worker.send(word)

    def _on_reload(self) -> None:
        if self._workers and not self._workers[-1].ended.done():
            self._workers[-1].process.send_signal(signal.SIGHUP)
        elif self._reload is not None and not self._workers:
            self._reload()

    def _start(self) -> None:
        if self._main is not None:
            return  # the main process does it
        if self._retire_service is None and not self._keeps:
            log.error("not replaced: this service serves a single connection")
        elif not self._can_replace():
            log.error("not replaced: a replacement is under way")
        else:
            self._replacing = asyncio.ensure_future(self._replace())

    def _can_replace(self) -> bool:
        if self._replacing is not None and not self._replacing.done():
            return False
        # A keeper starts the next worker by itself.
        return not self._keeps or bool(self._workers and not self._workers[-1].ended.done())

    async def finished(self) -> None:
        """Wait until the connections of this process and all workers have ended.

        Raises OSError if the serving worker has failed.
        """
        while True:
            alive = [worker.ended for worker in self._workers if not worker.ended.done()]
            serving = self._workers[-1].ended if self._workers else None
            if serving is not None and serving.done() and (status := serving.result()):
                text = f"the process that has replaced this one failed (status {status})"
                raise OSError(errno.ECHILD, text)
            waiting: list[asyncio.Future[Any]] = [*alive]
            if self._drained is not None and not self._drained.done():
                waiting.append(self._drained)
            if not waiting:
                return
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)

    async def workers_ended(self) -> None:
        """Wait until all workers have ended."""
        if self._workers:
            await asyncio.wait([worker.ended for worker in self._workers])

    # The main process

    async def keep(self, pause: float, ready: Callable[[], object]) -> int:
        """Hold this process's listeners while workers serve; return the exit status of the last.

        A worker that is killed is followed by another one, but not within ``pause`` seconds of its
        start.  ``ready`` is called whenever such a worker serves.
        """
        self._keeps = True
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            self._replacing = asyncio.ensure_future(self._replace())
            status = await self._replacing
            if status is None:
                ready()
                status = await self._last_end()
            if self._ending or status >= 0:
                return status if status >= 0 else 128 - status
            log.error("the serving process was ended by signal %d; starting another one", -status)
            await asyncio.sleep(max(0.0, pause - (loop.time() - began)))

    async def _last_end(self) -> int:
        """Return the exit status of the worker that serves and is not replaced."""
        while True:
            serving = self._workers[-1]
            status = await serving.ended
            if self._replacing is not None:
                await self._replacing
            if serving is self._workers[-1]:
                return status

    async def _replace(self) -> int | None:
        """Start a worker that serves from now on; return its exit status if it fails before."""
        if self._ending:
            return 0
        old = self._workers[-1] if self._workers else None
        begins = self._keeps and (old is None or old.ended.done())
        new: _Worker | None = None
        try:
            with contextlib.ExitStack() as stack:
                new = self._starting = _Worker()
                await new.exchange(new.wait_until_started)
                if old is None or self._keeps:
                    listeners = stack.enter_context(_own_listeners())
                else:
                    listeners = await old.exchange(old.listeners)
                    stack.callback(_close, listeners)
                await new.exchange(new.give, listeners)
        except OSError as error:
            what = "not started" if begins else "not replaced"
            log.error("%s: %s", what, error.strerror or error)
            if new is None:
                return 1
            new.process.kill()
            status = await new.ended
            return 0 if self._ending else status
        finally:
            self._starting = None
        self._workers.append(new)
        if old is None and not self._keeps:
            self._retire()
        elif old is not None:
            with contextlib.suppress(OSError):  # it has ended
                await old.exchange(old.retire)
        new.send(b"serve")
        if not begins:
            log.warning("replaced by process %d", new.process.pid)
        return None

    # Any process

    def _retire(self) -> None:
        assert self._retire_service is not None
        for disown in _disowners:
            disown()
        self._drained = asyncio.ensure_future(self._retire_service())
        self.retired.set()

    def _on_message(self) -> None:
        """Handle a message of the main process."""
        assert self._main is not None
        link = self._main.link
        word = b""
        with contextlib.suppress(OSError):
            word = link.recv(64)
            if word == b"hand over":
                with _own_listeners() as listeners:
                    _send_listeners(link, listeners)
            elif word == b"retire":
                self._retire()
                link.send(b"retired")
        if word in (b"end", b"close", b""):
            self._end()
        if word == b"close":
            self._stop()
        if not word:  # the main process has ended
            asyncio.get_running_loop().remove_reader(link.fileno())


@contextlib.contextmanager
def _own_listeners() -> Iterator[list[HandedOver]]:
    """Yield this process's listeners, with duplicates of their descriptors."""
    listeners = [
        HandedOver(locator, file, [os.dup(fd) for fd in fds])
        for source in _sources
        for locator, file, fds in source()
    ]
    try:
        yield listeners
    finally:
        _close(listeners)


def _close(listeners: Iterable[HandedOver]) -> None:
    for listener in listeners:
        for fd in listener.fds:
            os.close(fd)
