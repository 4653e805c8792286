"""The splice pump in an asyncio loop.

asyncio handles connects and handshakes, where coroutines are worth their cost.  For established
connections, its event handling would cost as much as the transfer itself.  So these connections are
served from a separate epoll instance, in which asyncio's own epoll instance is one descriptor
(:class:`PumpSelector`); asyncio runs only for its own events.
"""

from __future__ import annotations

import asyncio
import errno
import select
import selectors
import socket
import time
from collections.abc import Callable, Mapping
from typing import Any

from .. import splice


class ForwardedConnection(splice.SplicedPair):
    """Two joined streams.  The future ``ended`` has the result None or the OSError of their end."""

    def __init__(self, pump: AsyncioSplicePump, one: socket.socket, other: socket.socket) -> None:
        super().__init__(pump, one, other)
        self.ended: asyncio.Future[OSError | None] = pump.loop.create_future()
        self._wake = pump.wake

    def finished(self, why: OSError | None) -> None:
        """Set the result of ``ended``."""
        if not self.ended.done():  # the future is done already if the waiting task was cancelled
            self.ended.set_result(why)
            self._wake()


class PumpSelector(selectors.BaseSelector):
    """A selector for asyncio that serves a pump's connections while it waits."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._awaited = False  # a connection's end is to be handled by asyncio
        self._rest = selectors.EpollSelector()
        self._epoll.register(self._rest.fileno(), select.EPOLLIN)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for asyncio's events and return them; meanwhile serve the pump's events."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._serve(self._epoll.poll(timeout)):
                return self._rest.select(0)
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return []

    def wake(self) -> None:
        """End :meth:`select` after the present batch, so that asyncio handles its callbacks."""
        self._awaited = True

    def _serve(self, ready: list[tuple[int, int]]) -> bool:
        """Serve a batch of events; return True if :meth:`select` must return to asyncio."""
        callbacks = self._callbacks
        for fd, events in ready:
            callback = callbacks.get(fd)
            if callback is None:  # an event of asyncio, or of a connection that has just ended
                self._awaited = True
            else:
                callback(events)
        awaited, self._awaited = self._awaited, False
        return awaited

    # The pump's poller

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        """Call ``callback(events)`` whenever ``fd`` is ready for ``events``."""
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        """Replace the events that ``fd`` is watched for."""
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        """Stop watching ``fd``, which is closed next."""
        self._callbacks.pop(fd, None)  # closing fd removes it from the epoll instance

    # asyncio's selector

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Register a file for asyncio."""
        return self._rest.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        """Remove a file of asyncio."""
        return self._rest.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        """Change the events that asyncio watches ``fileobj`` for."""
        return self._rest.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        """Return the files of asyncio."""
        return self._rest.get_map()

    def close(self) -> None:
        """Close both epoll instances."""
        self._epoll.close()
        self._rest.close()


class AsyncioSplicePump(splice.SplicePump):
    """A splice pump in an asyncio loop that was made with ``selector``."""

    def __init__(self, selector: PumpSelector) -> None:
        super().__init__(selector)
        self.loop = asyncio.get_running_loop()
        self.wake = selector.wake

    def join(
        self,
        one: socket.socket,
        other: socket.socket,
        *,
        early: bytes = b"",
        idle: float | None = None,
        capture: Callable[[bool, bytes], None] | None = None,
    ) -> ForwardedConnection:
        """Join two connected stream sockets, which the pump now owns.

        ``early`` and ``capture`` are those of :meth:`vsockets.splice.SplicePump.start`.  After
        ``idle`` seconds without a byte in either direction the connection ends with ETIMEDOUT.
        """
        connection = ForwardedConnection(self, one, other)
        self.start(connection, early, capture)
        if idle is not None and not connection.ended.done():
            self._watch_idleness(connection, idle)
        return connection

    def _watch_idleness(self, connection: ForwardedConnection, idle: float) -> None:
        def check() -> None:
            if connection.ended.done():
                return
            left = connection.last_moved + idle - time.monotonic()
            if left > 0:
                timer[0] = self.loop.call_later(left, check)
            else:
                self.end(connection, OSError(errno.ETIMEDOUT, f"idle for {idle:g} s"))

        timer = [self.loop.call_later(idle, check)]
        connection.ended.add_done_callback(lambda _: timer[0].cancel())
