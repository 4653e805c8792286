"""Deferred work, done in steps between requests.

Clients do not report when they close what vsockd counts for them, so vsockd has to search, and one
client can hold thousands of items.  Each search is a *task*: an iterator that does a little work
before each ``yield``.  One step is done per turn of the loop, tasks take turns, and all of them
together get at most a quarter of vsockd's time: searching for one party never makes another wait
longer than one step takes.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from time import monotonic

from ..eventloop.loop import EventLoop

log = logging.getLogger(__name__)

#: Each task bounds the duration of its steps.  The pause after a step is this many times its
#: duration, and at least this many seconds.
_PAUSE_FACTOR = 3
_PAUSE = 0.001


def run_for(task: Iterator[None], seconds: float) -> bool:
    """Do steps of ``task`` for at most ``seconds``; return whether it is complete."""
    end = monotonic() + seconds
    return all(monotonic() < end for _ in task)


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
