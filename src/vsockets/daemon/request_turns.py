"""Requests of clients, a few of each party in a turn of the loop.

A guest may have thousands of connections to vsockd, and a request on each of them at once.  If they
were all in the loop's epoll, the kernel would have them all served before one of another guest.  So
each party's have an epoll of their own.
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
    """The descriptors of one party."""

    def __init__(self) -> None:
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callable[[bool], None]] = {}


class Turns:
    """Calls back when a descriptor of a client is readable or hung up, in its party's turn: with
    whether it hung up, so that there is nobody to answer.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._queues: dict[Party, _Queue] = {}
        self._by_number: dict[int, _Queue] = {}  # of its epoll
        self._epoll = select.epoll()  # of theirs
        loop.watch_first(self._epoll.fileno(), self._serve)

    def watch(self, party: Party, fd: int, callback: Callable[[bool], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up, and it is the party's turn."""
        queue = self._queues.get(party)
        if queue is None:
            queue = self._queues[party] = _Queue()
            self._by_number[queue.epoll.fileno()] = queue
            self._epoll.register(queue.epoll.fileno(), select.EPOLLIN)
        queue.epoll.register(fd, READABLE)
        queue.callbacks[fd] = callback

    def unwatch(self, party: Party, fd: int) -> None:
        """Stop watching ``fd``; call it before closing the descriptor.  Harmless if it was not."""
        queue = self._queues.get(party)
        if queue is None or queue.callbacks.pop(fd, None) is None:
            return
        queue.epoll.unregister(fd)
        if not queue.callbacks:
            del self._queues[party]
            del self._by_number[queue.epoll.fileno()]
            self._epoll.unregister(queue.epoll.fileno())
            queue.epoll.close()

    def _serve(self, _: int) -> None:
        """Serve what has ended, and some requests of each party; the rest has its turn later.

        In this order, as in the loop: a port given back before a request was made is free then.
        """
        requests: list[tuple[_Queue, int]] = []
        for number, _ in self._epoll.poll(0, DAEMON_PARTIES_PER_TURN_MAX):
            queue = self._by_number.get(number)
            if queue is None:
                continue  # the end of another party's was the end of its last
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
            log.exception("an event was lost")
