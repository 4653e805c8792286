"""Work that can wait, done in pieces between requests.

What clients hold without telling vsockd when they let go of it must be looked for, and one client
can make that thousands of things.  So each such search is a *chore*: an iterator that does a little
before each ``yield``.  One piece is done in a turn of the loop, chores take turns, and all together
get a quarter of vsockd's time at most: what one party has to be searched for never makes another
wait longer than one piece takes.
"""

from __future__ import annotations

import logging
from collections.abc import Hashable, Iterator
from time import monotonic

from ..eventloop.loop import EventLoop

log = logging.getLogger(__name__)

#: How long a piece may take is for each chore to keep to; this is how much longer the pause after
#: it is, and how long it is at least, in seconds.
_PAUSE_FACTOR = 3
_PAUSE = 0.001


class Chores:
    """The chores that have not ended, by what they are for."""

    def __init__(self, loop: EventLoop) -> None:
        self._loop = loop
        #: the one whose turn is next comes first
        self._under_way: dict[Hashable, Iterator[None]] = {}
        self._scheduled = False

    def start(self, key: Hashable, chore: Iterator[None]) -> None:
        """Do ``chore`` unless one for ``key`` is under way."""
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
            log.exception("a search for what clients no longer hold has failed")
        else:
            self._under_way[key] = chore
        if self._under_way:
            self._schedule(max(_PAUSE, _PAUSE_FACTOR * (monotonic() - begin)))
