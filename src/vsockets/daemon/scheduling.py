"""Shares of vsockd's time for each party's requests, and for deferred work.

*Turns.*  A guest may have thousands of connections to vsockd, with a request on each of them.  In
the loop's own epoll the kernel would report all of them before one of another guest.  So each party
has an epoll of its own, and a few requests of each are served per turn of the loop.  A party that
has sent a descriptor that is slow to close is served again later, after a pause.

*Deferred work.*  Clients do not report when they close what vsockd counts for them, so vsockd has
to search, and one client can hold thousands of items.  Each search is a *task*: an iterator that
does a little work before each ``yield``.  One step is done per turn of the loop, tasks take turns,
and all of them together get at most a quarter of vsockd's time: searching for one party never makes
another wait longer than one step takes.
"""

from __future__ import annotations

import logging
import select
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from select import EPOLLHUP
from time import monotonic, thread_time

from ..eventloop.loop import READABLE, EventLoop
from ..fabric import Party
from .limits import (
    DAEMON_ENDS_PER_TURN_MAX,
    DAEMON_PARTIES_PER_TURN_MAX,
    DAEMON_PAUSE_FACTOR,
    DAEMON_PAUSE_MAX_SECONDS,
    DAEMON_REQUESTS_PER_TURN_MAX,
)

log = logging.getLogger(__name__)

#: Each task bounds the duration of its steps.  The pause after a step is this many times its
#: duration, and at least this many seconds.
_PAUSE_FACTOR = 3
_PAUSE = 0.001


def run_for(task: Iterator[None], seconds: float) -> bool:
    """Do steps of ``task`` for at most ``seconds``; return whether it is complete.

    ``seconds`` are processor time: on a busy machine the same amount of work is done.
    """
    end = thread_time() + seconds
    return all(thread_time() < end for _ in task)


class DeferredWork:
    """The tasks in progress, by purpose."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        #: the task whose turn is next comes first
        self._tasks: dict[Hashable, Iterator[None]] = {}
        self._scheduled = False

    def start(self, key: Hashable, task: Iterator[None]) -> None:
        """Start ``task`` unless one for ``key`` is in progress."""
        if key in self._tasks:
            return
        self._tasks[key] = task
        if not self._scheduled:
            self._schedule(_PAUSE)

    def _schedule(self, seconds: float) -> None:
        self._scheduled = True
        self._loop.call_later(seconds, self._step)

    def _step(self) -> None:
        self._scheduled = False
        begin = monotonic()
        key = next(iter(self._tasks))
        task = self._tasks.pop(key)
        try:
            next(task)
        except StopIteration:
            pass
        except Exception:
            log.exception("deferred work failed: closed sockets may still be counted")
        else:
            self._tasks[key] = task
        if self._tasks:
            self._schedule(max(_PAUSE, _PAUSE_FACTOR * (monotonic() - begin)))


_ENDED = int(EPOLLHUP)


def pause_for(party: Party) -> float:
    """Return the seconds until a party that has blocked vsockd is to be served again."""
    seconds = min(DAEMON_PAUSE_FACTOR * party.blocked, DAEMON_PAUSE_MAX_SECONDS)
    party.blocked = 0.0
    return seconds


class _Queue:
    """The watched descriptors of one party."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.epoll = select.epoll()
        self.callbacks: dict[int, Callable[[bool], None]] = {}


class RequestTurns:
    """Watches on clients' descriptors, whose callbacks run in the party's turn.

    The callback gets True for a hang-up, after which no reply can be sent.
    """

    def __init__(self, loop: EventLoop) -> None:
        self._queues: dict[Party, _Queue] = {}
        self._by_fd: dict[int, _Queue] = {}  # by descriptor of the queue's epoll
        self._loop = loop
        self._paused: set[Party] = set()
        self._epoll = select.epoll()  # contains the epolls of all queues except paused parties'
        loop.watch_first(self._epoll.fileno(), self._serve)

    def watch(self, party: Party, fd: int, callback: Callable[[bool], None]) -> None:
        """Call ``callback`` whenever ``fd`` is readable or hung up, in the party's turn.

        Raises OSError if the kernel has no descriptor or memory left.
        """
        queue = self._queues.get(party)
        if queue is None:
            queue = _Queue(party)
            if party not in self._paused:
                self._epoll.register(queue.epoll.fileno(), select.EPOLLIN)
            self._queues[party] = self._by_fd[queue.epoll.fileno()] = queue
        queue.callbacks[fd] = callback
        try:
            queue.epoll.register(fd, READABLE)
        except OSError:
            self._forget(queue, fd)
            raise

    def unwatch(self, party: Party, fd: int) -> None:
        """Stop watching ``fd``, before it is closed; do nothing if it is not watched."""
        queue = self._queues.get(party)
        if queue is not None and fd in queue.callbacks:
            queue.epoll.unregister(fd)
            self._forget(queue, fd)

    def _forget(self, queue: _Queue, fd: int) -> None:
        """Remove a callback; close the queue if it has none left."""
        del queue.callbacks[fd]
        if not queue.callbacks:
            del self._queues[queue.party]
            del self._by_fd[queue.epoll.fileno()]
            if queue.party not in self._paused:
                self._epoll.unregister(queue.epoll.fileno())
            queue.epoll.close()

    def _serve(self, _: int) -> None:
        """Serve all hang-ups and some requests of each party; the others wait for its next turn.

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
                    self._call(queue, fd, True)
                    if queue.party in self._paused:
                        break
                elif left:
                    left -= 1
                    requests.append((queue, fd))
        for queue, fd in requests:
            if queue.party not in self._paused:
                self._call(queue, fd, False)

    def _call(self, queue: _Queue, fd: int, hung_up: bool) -> None:
        callback = queue.callbacks.get(fd)
        if callback is not None:
            try:
                callback(hung_up)
            except Exception:
                log.exception("callback failed: an event was lost")
        if queue.party.blocked:
            self._pause(queue.party)

    def _pause(self, party: Party) -> None:
        queue = self._queues.get(party)
        if queue is not None:  # not closed by the callback
            self._epoll.unregister(queue.epoll.fileno())
        self._paused.add(party)
        self._loop.call_later(pause_for(party), partial(self._resume, party))

    def _resume(self, party: Party) -> None:
        self._paused.remove(party)
        queue = self._queues.get(party)
        if queue is not None:
            self._epoll.register(queue.epoll.fileno(), select.EPOLLIN)
