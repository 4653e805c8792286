"""Event loop of a device: vsockd's event loop, with timeouts below a millisecond."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from contextlib import AbstractContextManager

from ..eventloop.loop import READABLE, EventLoop, Timer
from .limits import DEVICE_SLOW_CALL_SECONDS

__all__ = ["READABLE", "DeviceLoop", "Timer"]

#: Python's epoll counts milliseconds and rounds up; select(2) waits for shorter timeouts.
_SHORT = 0.001


class DeviceLoop(EventLoop):
    """Event loop that can also busy-poll a condition between events."""

    def __init__(self) -> None:
        super().__init__()
        epoll = self._epoll
        self._wait = self._poll
        self._only = [epoll.fileno()]
        self._poll = self._poll_precisely
        self._spinning: dict[Callable[[], bool], float] = {}

    def unhindered(self) -> AbstractContextManager[None]:
        """Interrupt slow close(2) calls on descriptors that a peer passed, during the with block.

        On older kernels a socket cannot refuse descriptors, and a device's sandbox allows no
        second thread that could close them.  Call it in the main thread only.
        """
        return self.interrupting_calls(DEVICE_SLOW_CALL_SECONDS)

    def watches(self, fd: int) -> bool:
        """Return whether the loop watches the descriptor ``fd``."""
        return fd in self._callbacks

    def spin(self, poll_once: Callable[[], bool], seconds: float) -> None:
        """Call ``poll_once`` between events until it returns True or ``seconds`` have passed."""
        self._spinning[poll_once] = time.monotonic() + seconds

    def turn(self) -> None:
        """Run due timers and the callbacks of ready descriptors once, without waiting."""
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

    def fileno(self) -> int:
        """Return the epoll descriptor, which is readable when :meth:`turn` has work."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Close the loop's epoll descriptor."""
        self._epoll.close()
