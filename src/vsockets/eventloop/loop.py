"""The event loop: one thread, one epoll, a heap of timers; and accept loops on it.

The loop replaces asyncio for speed: a connection costs vsockd about a dozen system calls, and
asyncio's bookkeeping would add about half as much to each of them.
"""

from __future__ import annotations

import contextlib
import errno
import heapq
import logging
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from time import monotonic

from .. import logs
from .._linux.libc import interrupted_by

log = logging.getLogger(__name__)

#: The epoll(7) events that :meth:`EventLoop.watch` waits for.
READABLE = int(select.EPOLLIN | select.EPOLLRDHUP)

#: Seconds without an event after which the loop counts as idle.
_IDLE = 1.0


#: Same as EPOLLIN to the kernel.  Only :meth:`EventLoop.watch_first` sets it, so the bit marks
#: descriptors to be served before others.
_FIRST = int(select.EPOLLRDNORM)

_COMES_FIRST = int(select.EPOLLHUP | select.EPOLLRDHUP) | _FIRST


def _comes_later(event: tuple[int, int]) -> bool:
    return not event[1] & _COMES_FIRST


class Timer:
    """A scheduled call; :meth:`cancel` prevents it."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Prevent the scheduled call.  Has no effect if the call was already made."""
        self.callback = None


class EventLoop:
    """A loop that calls ``callback(events)`` when a watched descriptor is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._poll = self._epoll.poll
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = count()
        self._running = True
        self._hurry = 0.0

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up."""
        self.watch_for(fd, callback, READABLE)

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        """Call ``callback`` for the given epoll(7) ``events``; hang-ups are always included."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def watch_first(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback`` as :meth:`watch` does, before others that are ready simultaneously."""
        self.watch_for(fd, callback, READABLE | _FIRST)

    def change(self, fd: int, events: int) -> None:
        """Change the epoll(7) events that ``fd`` is watched for."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``; call it before closing the descriptor."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def time(self) -> float:
        """Return the time in seconds that timers use."""
        return monotonic()

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``seconds`` from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (monotonic() + seconds, next(self._sequence), timer))
        return timer

    def stop(self) -> None:
        """Return from :meth:`run` after the current batch of events."""
        self._running = False

    def stop_at_once(self) -> None:
        """Return from :meth:`run` without any further callback; nothing is watched any longer."""
        self._running = False
        self._callbacks.clear()

    def run(self) -> None:  # noqa: C901 - hot loop
        """Serve events until :meth:`stop`.  An exception in a callback is logged, not fatal."""
        poll, callbacks, timers = self._poll, self._callbacks, self._timers
        hurried = False
        while self._running:
            wait = None
            while timers:
                if timers[0][2].callback is None:  # cancelled timers wake nothing
                    heapq.heappop(timers)
                    continue
                wait = timers[0][0] - monotonic()
                if wait <= 0:
                    wait = self._run_timers()
                break
            if not self._running:
                break
            if hurried:
                wait = _IDLE if wait is None else min(wait, _IDLE)
            ready = poll(wait)
            if hurried != bool(ready) and self._hurry:
                hurried = bool(ready)
                interval = self._hurry if hurried else 0
                signal.setitimer(signal.ITIMER_REAL, interval, interval)
            if len(ready) > 1:
                # Hang-ups before requests: a port released or a listener closed before a request
                # was made must not be in use when the request is served.
                ready.sort(key=_comes_later)
            for fd, events in ready:
                callback = callbacks.get(fd)
                if callback is None:
                    continue
                try:
                    callback(events)
                except Exception:
                    log.exception("callback failed: an event was lost")

    @contextlib.contextmanager
    def signalled(self, calls: Mapping[signal.Signals, Callable[[], None]]) -> Iterator[None]:
        """Call the function that ``calls`` has for a signal, during the with block.

        Main thread only.  Python runs its own handlers between two bytecode instructions, so a
        signal that arrives just before the loop waits would be handled after the wait.  The
        descriptor that Python writes to immediately (:func:`signal.set_wakeup_fd`) ends the wait.
        """
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)

        def dispatch(events: int) -> None:
            try:
                numbers = reader.recv(4096)
            except BlockingIOError:
                return
            for number in numbers:
                if call := calls.get(signal.Signals(number)):
                    call()

        old_handlers = {number: signal.signal(number, _ignore) for number in calls}
        old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        self.watch(reader.fileno(), dispatch)
        try:
            yield
        finally:
            self.unwatch(reader.fileno())
            dispatch(0)  # one that has come in the loop's last turn
            signal.set_wakeup_fd(old_wakeup)
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            reader.close()
            writer.close()

    @contextlib.contextmanager
    def interrupting_calls(self, seconds: float) -> Iterator[None]:
        """During the with block, interrupt system calls that block the loop for over ``seconds``.

        The kernel lets a close sleep, for example that of a TCP socket with SO_LINGER, and a close
        may be part of any call that discards a message with descriptors.  The sender of the
        descriptors decides how long.  A signal ends such a sleep, so while the loop is busy, one
        is raised at this interval.
        """
        with interrupted_by(signal.SIGALRM):
            self._hurry = seconds
            try:
                yield
            finally:
                self._hurry = 0.0
                signal.setitimer(signal.ITIMER_REAL, 0)

    def _run_timers(self) -> float | None:
        while self._timers and self._running:
            wait = self._timers[0][0] - monotonic()
            if wait > 0:
                return wait
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                try:
                    callback()
                except Exception:
                    log.exception("timer callback failed")
        return None


def _ignore(number: int, frame: object) -> None:
    """Do nothing: the signal is handled when the loop wakes up."""


#: Seconds to stop accepting while resources are exhausted.
_PAUSE = 0.05

#: Errors of a process or machine without free descriptors or memory.
OUT_OF_RESOURCES = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS)


class Acceptor:
    """An accept loop that owns ``listener`` and passes each accepted descriptor to ``admit``.

    The acceptor pauses while resources are exhausted, and for the seconds that ``admit`` returns,
    if any.
    """

    def __init__(
        self,
        loop: EventLoop,
        listener: socket.socket,
        who: str,
        admit: Callable[[int], float | None],
    ) -> None:
        self._loop = loop
        self.listener = listener
        self._who = who
        # The C method, which typeshed leaves out: avoids an object that lives for microseconds.
        self.accept: Callable[[], tuple[int, object]] = listener._accept  # type: ignore[attr-defined]
        self._admit = admit
        self._watch()

    def close(self) -> None:
        """Stop accepting and close the listener."""
        self._loop.unwatch(self.listener.fileno())
        self.listener.close()

    def owns(self, fd: int) -> bool:
        """Return whether ``fd`` is a connection to the listener."""
        try:
            sock = socket.socket(fileno=fd)
        except OSError:
            return False
        try:
            is_listening = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
            return not is_listening and sock.getsockname() == self.listener.getsockname()
        finally:
            sock.detach()

    def _watch(self) -> None:
        if self.listener.fileno() >= 0:
            self._loop.watch(self.listener.fileno(), self._ready)

    def _ready(self, events: int) -> None:
        try:
            fd, _ = self.accept()
        except BlockingIOError:
            return  # the client has closed the connection already
        except OSError as error:
            if error.errno not in OUT_OF_RESOURCES:
                raise
            log.warning("%s waits: %s", self._who, error, extra=logs.rare(self))
            self._pause(_PAUSE)
        else:
            if seconds := self._admit(fd):
                self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        self._loop.unwatch(self.listener.fileno())
        self._loop.call_later(seconds, self._watch)
