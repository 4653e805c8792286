"""The pump in asyncio.

asyncio does what comes before, connects and handshakes, where a coroutine is worth its price.  A
round trip through its event handling costs as much as the moving itself, though, so established
connections have an epoll of their own, in which asyncio's is one member: see
:class:`PumpSelector`.  asyncio is woken only when something happens that is its own.
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
    """Two joined streams.  ``ended`` resolves to None, or to the OSError that ended it."""

    def __init__(self, pump: AsyncioSplicePump, one: socket.socket, other: socket.socket) -> None:
        super().__init__(pump, one, other)
        self.ended: asyncio.Future[OSError | None] = pump.loop.create_future()
        self._wake = pump.wake

    def finished(self, why: OSError | None) -> None:
        if not self.ended.done():  # whoever waited for it was cancelled
            self.ended.set_result(why)
            self._wake()


class PumpSelector(selectors.BaseSelector):
    """asyncio's selector, which serves a pump's connections while it waits."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._awaited = False  # asyncio has something to do because of a connection
        self._rest = selectors.EpollSelector()
        self._epoll.register(self._rest.fileno(), select.EPOLLIN)

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Wait for what is asyncio's own.  What is the pump's is served and not returned."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            if self._serve(self._epoll.poll(timeout)):
                return self._rest.select(0)
            if deadline is not None:
                timeout = deadline - time.monotonic()
                if timeout <= 0:
                    return []

    def wake(self) -> None:
        """Have asyncio look at what it has to do, after the events that are being served."""
        self._awaited = True

    def _serve(self, ready: list[tuple[int, int]]) -> bool:
        """Serve events; whether asyncio has something to do now."""
        callbacks = self._callbacks
        for fd, events in ready:
            callback = callbacks.get(fd)
            if callback is None:  # asyncio's, or of a connection that has just ended
                self._awaited = True
            else:
                callback(events)
        awaited, self._awaited = self._awaited, False
        return awaited

    # As the pump's poller

    def watch_for(self, fd: int, callback: Callable[[int], None], events: int) -> None:
        self._callbacks[fd] = callback
        self._epoll.register(fd, events)

    def change(self, fd: int, events: int) -> None:
        self._epoll.modify(fd, events)

    def unwatch(self, fd: int) -> None:
        self._callbacks.pop(fd, None)  # closing takes it out of the epoll

    # As asyncio's selector

    def register(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._rest.register(fileobj, events, data)

    def unregister(self, fileobj: Any) -> selectors.SelectorKey:
        return self._rest.unregister(fileobj)

    def modify(self, fileobj: Any, events: int, data: Any = None) -> selectors.SelectorKey:
        return self._rest.modify(fileobj, events, data)

    def get_map(self) -> Mapping[Any, selectors.SelectorKey]:
        return self._rest.get_map()

    def close(self) -> None:
        self._epoll.close()
        self._rest.close()


class AsyncioSplicePump(splice.SplicePump):
    """Serves any number of connections in an asyncio loop made with ``selector``."""

    def __init__(self, selector: PumpSelector) -> None:
        super().__init__(selector)
        self.loop = asyncio.get_running_loop()
        self.wake = selector.wake

    def join(
        self,
        one: socket.socket,
        other: socket.socket,
        *,
        said: bytes = b"",
        idle: float | None = None,
        tap: Callable[[bool, bytes], None] | None = None,
    ) -> ForwardedConnection:
        """Join two connected stream sockets, which are the pump's from now on.

        ``said`` and ``tap`` are as :meth:`vsockets.splice.SplicePump.start` has them.  After
        ``idle``
        seconds in which nothing moved in either direction the connection is ended with ETIMEDOUT.
        """
        connection = ForwardedConnection(self, one, other)
        self.start(connection, said, tap)
        if idle is not None and not connection.ended.done():
            self._watch_idleness(connection, idle)
        return connection

    def _watch_idleness(self, connection: ForwardedConnection, idle: float) -> None:
        def look() -> None:
            if connection.ended.done():
                return
            left = connection.last_moved + idle - time.monotonic()
            if left > 0:
                timer[0] = self.loop.call_later(left, look)
            else:
                self.end(connection, OSError(errno.ETIMEDOUT, f"nothing moved for {idle:g} s"))

        timer = [self.loop.call_later(idle, look)]
        connection.ended.add_done_callback(lambda _: timer[0].cancel())
