"""Serve clients' requests in turns, a few of each party per turn of the loop.

A guest may have thousands of connections to vsockd, with a request on each of them.  In the loop's
own epoll the kernel would report all of them before one of another guest.  So each party has an
epoll of its own.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable
from select import EPOLLHUP

from ..eventloop.loop import READABLE, EventLoop
from ..fabric import Party
from .limits import (
    DAEMON_ENDS_PER_TURN_MAX,
    DAEMON_PARTIES_PER_TURN_MAX,
    DAEMON_REQUESTS_PER_TURN_MAX,
)

log = logging.getLogger(__name__)

_ENDED = int(EPOLLHUP)


class _Queue:
    """The watched descriptors of one party."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callable[[bool], None]] = {}


class RequestTurns:
    """Calls back when a client's descriptor is readable or hung up, in its party's turn.

    The callback gets True for a hang-up, after which no reply can be sent.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._queues: dict[Party, _Queue] = {}
        self._by_fd: dict[int, _Queue] = {}  # by descriptor of the queue's epoll
        self._epoll = select.epoll()  # contains the epolls of all queues
        loop.watch_first(self._epoll.fileno(), self._serve)

    def watch(self, party: Party, fd: int, callback: Callable[[bool], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up, in the party's turn."""
        queue = self._queues.get(party)
        if queue is None:
            queue = self._queues[party] = _Queue()
            self._by_fd[queue.epoll.fileno()] = queue
            self._epoll.register(queue.epoll.fileno(), select.EPOLLIN)
        queue.epoll.register(fd, READABLE)
        queue.callbacks[fd] = callback

    def unwatch(self, party: Party, fd: int) -> None:
        """Stop watching ``fd``, before it is closed.  Does nothing if it is not watched."""
        queue = self._queues.get(party)
        if queue is None or queue.callbacks.pop(fd, None) is None:
            return
        queue.epoll.unregister(fd)
        if not queue.callbacks:
            del self._queues[party]
            del self._by_fd[queue.epoll.fileno()]
            self._epoll.unregister(queue.epoll.fileno())
            queue.epoll.close()

    def _serve(self, _: int) -> None:
        """Serve all hang-ups and some requests of each party; the rest waits for its next turn.

        Hang-ups come first, as in the loop: a port released before a request was made is free.
        """
        requests: list[tuple[_Queue, int]] = []
        for number, _ in self._epoll.poll(0, DAEMON_PARTIES_PER_TURN_MAX):
            queue = self._by_fd.get(number)
            if queue is None:
                continue  # closed while serving a hang-up of another queue
            left = DAEMON_REQUESTS_PER_TURN_MAX
            for fd, events in queue.epoll.poll(0, DAEMON_ENDS_PER_TURN_MAX):
                if events & _ENDED:
                    _call(queue, fd, True)
                elif left:
                    left -= 1
                    requests.append((queue, fd))
        for queue, fd in requests:
            _call(queue, fd, False)


def _call(queue: _Queue, fd: int, hung_up: bool) -> None:
    callback = queue.callbacks.get(fd)
    if callback is not None:
        try:
            callback(hung_up)
        except Exception:
            log.exception("callback failed: an event was lost")
