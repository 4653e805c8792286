"""The event loop: one thread, one epoll, a heap of timers.

Written out rather than taken from asyncio because a connection costs vsockd about a dozen
system calls, and a framework's bookkeeping would be half the price of each (docs/design.md
has the figures).
"""

from __future__ import annotations

import contextlib
import heapq
import logging
import select
import signal
import socket
import time
from collections.abc import Callable, Iterator
from itertools import count

log = logging.getLogger(__name__)


def _goes_on(event: tuple[int, int]) -> bool:
    return not event[1] & (select.EPOLLHUP | select.EPOLLRDHUP)


class Timer:
    """A call to be made later; :meth:`cancel` takes it back."""

    __slots__ = ("callback",)

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback: Callable[[], None] | None = callback

    def cancel(self) -> None:
        """Do not make the call.  Harmless after it was made."""
        self.callback = None


class Loop:
    """Calls ``callback(events)`` when a watched descriptor is ready."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._timers: list[tuple[float, int, Timer]] = []
        self._sequence = count()
        self._running = True

    def watch(self, fd: int, callback: Callable[[int], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN | select.EPOLLRDHUP)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``; call it before closing the descriptor."""
        if self._callbacks.pop(fd, None) is not None:
            self._epoll.unregister(fd)

    def call_later(self, seconds: float, callback: Callable[[], None]) -> Timer:
        """Call ``callback`` once, ``seconds`` from now."""
        timer = Timer(callback)
        heapq.heappush(self._timers, (time.monotonic() + seconds, next(self._sequence), timer))
        return timer

    def stop(self) -> None:
        """Leave :meth:`run` after the current batch of events."""
        self._running = False

    def run(self) -> None:
        """Serve events until :meth:`stop`.  A callback that fails is logged, not fatal."""
        poll, callbacks = self._epoll.poll, self._callbacks
        while self._running:
            ready = poll(self._run_timers())
            if len(ready) > 1:
                # What has ended comes first: a port given back or a listener closed before a
                # request was made must not be seen after it.
                ready.sort(key=_goes_on)
            for fd, events in ready:
                callback = callbacks.get(fd)
                if callback is None:
                    continue
                try:
                    callback(events)
                except Exception:
                    log.exception("a request was dropped")

    @contextlib.contextmanager
    def stopped_by(self, *signals: signal.Signals) -> Iterator[None]:
        """Within this context the signals stop the loop."""
        reader, writer = socket.socketpair()
        reader.setblocking(False)
        writer.setblocking(False)
        old_wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
        old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
        self.watch(reader.fileno(), lambda events: self.stop())
        try:
            yield
        finally:
            self.unwatch(reader.fileno())
            for number, handler in old_handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(old_wakeup)
            reader.close()
            writer.close()

    def _run_timers(self) -> float | None:
        while self._timers:
            wait = self._timers[0][0] - time.monotonic()
            if wait > 0:
                return wait
            callback = heapq.heappop(self._timers)[2].callback
            if callback is not None:
                callback()
        return None
