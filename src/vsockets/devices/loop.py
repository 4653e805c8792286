"""A device's event loop: vsockd's, with waits below a millisecond."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..daemon.limits import DAEMON_SLOW_CALL_SECONDS
from ..eventloop.loop import READABLE, EventLoop, Timer

__all__ = ["READABLE", "DeviceLoop", "Timer"]

#: epoll(7) as Python has it counts milliseconds, and rounds up; what is shorter waits by select(2).
_SHORT = 0.001


class DeviceLoop(EventLoop):
    """Calls ``callback(events)`` when a watched descriptor is ready."""

    def __init__(self) -> None:
        super().__init__()
        epoll = self._epoll
        self._wait = self._poll
        self._only = [epoll.fileno()]
        self._poll = self._poll_precisely
        self._spinning: dict[Callable[[], bool], float] = {}

    def unhindered(self) -> AbstractContextManager[None]:
        """Within this context no descriptor that a peer passes along holds the loop up for long.

        The kernel may not refuse it, and no thread can close it: a device's sandbox allows none.
        Only for the main thread.
        """
        return self.hurried(DAEMON_SLOW_CALL_SECONDS)

    def watches(self, fd: int) -> bool:
        """Whether ``fd`` is watched."""
        return fd in self._callbacks

    def spin(self, poll_once: Callable[[], bool], seconds: float) -> None:
        """Call ``look`` again and again between events, until it returns True or for so long."""
        self._spinning[poll_once] = time.monotonic() + seconds

    def turn(self) -> None:
        """Serve what is ready now, and the timers that are due."""
        self._run_timers()
        self._spin()
        for fd, events in self._epoll.poll(0):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)

    def _spin(self) -> None:
        now = time.monotonic()
        for poll_once, until in list(self._spinning.items()):
            if poll_once() or now > until:
                del self._spinning[poll_once]

    def _poll_precisely(
        self, timeout: float | None = None, maxevents: int = -1
    ) -> list[tuple[int, int]]:
        if self._spinning:
            self._spin()
            timeout = 0
        elif timeout is not None and 0 < timeout < _SHORT:
            if not select.select(self._only, (), (), timeout)[0]:
                return []
            timeout = 0
        return self._wait(timeout, maxevents)

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()
