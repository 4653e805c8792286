"""Deferred work, done in steps between requests.

Clients do not report when they close what vsockd counts for them, so vsockd has to search, and one
client can hold thousands of items.  Each search is a *chore*: an iterator that does a little work
before each ``yield``.  One step is done per turn of the loop, chores take turns, and all of them
together get at most a quarter of vsockd's time: searching for one party never makes another wait
longer than one step takes.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from time import monotonic

from ..eventloop.loop import EventLoop

log = logging.getLogger(__name__)

#: Each chore bounds the duration of its steps.  The pause after a step is this many times its
#: duration, and at least this many seconds.
_PAUSE_FACTOR = 3
_PAUSE = 0.001


class Chores:
    """The chores in progress, by purpose."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        #: the chore whose turn is next comes first
        self._under_way: dict[Hashable, Iterator[None]] = {}
        self._scheduled = False

    def start(self, key: Hashable, chore: Iterator[None]) -> None:
        """Start ``chore`` unless one for ``key`` is in progress."""
        if key in self._under_way:
            return
        self._under_way[key] = chore
        if not self._scheduled:
            self._schedule(_PAUSE)

    def _schedule(self, seconds: float) -> None:
        self._scheduled = True
        self._loop.call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._scheduled = False
        begin = monotonic()
        key = next(iter(self._under_way))
        chore = self._under_way.pop(key)
        try:
            next(chore)
        except StopIteration:
            pass
        except Exception:
            log.exception("deferred work failed: closed sockets may still be counted")
        else:
            self._under_way[key] = chore
        if self._under_way:
            self._schedule(max(_PAUSE, _PAUSE_FACTOR * (monotonic() - begin)))
