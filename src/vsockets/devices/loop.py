"""A device's event loop: vsockd's, with waits below a millisecond."""

from __future__ import annotations

import select

from ..daemon.loop import Loop, Timer

__all__ = ["DeviceLoop", "Timer"]

#: epoll(7) as Python has it counts milliseconds; what is shorter waits by select(2).
_SHORT = 0.002


class DeviceLoop(Loop):
    """Calls ``callback(events)`` when a watched descriptor is ready."""

    def __init__(self) -> None:
        super().__init__()
        epoll = self._epoll
        self._wait = self._poll
        self._only = [epoll.fileno()]
        self._poll = self._poll_precisely

    def watches(self, fd: int) -> bool:
        """Whether ``fd`` is watched."""
        return fd in self._callbacks

    def turn(self) -> None:
        """Serve what is ready now, and the timers that are due."""
        self._run_timers()
        for fd, events in self._epoll.poll(0):
            callback = self._callbacks.get(fd)
            if callback is not None:
                callback(events)

    def _poll_precisely(
        self, timeout: float | None = None, maxevents: int = -1
    ) -> list[tuple[int, int]]:
        if timeout is not None and 0 < timeout < _SHORT:
            select.select(self._only, (), (), timeout)
            timeout = 0
        return self._wait(timeout, maxevents)

    def close(self) -> None:
        """Watch nothing any more."""
        self._epoll.close()
