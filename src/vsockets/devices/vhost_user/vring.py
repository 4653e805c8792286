"""Settings of a ring: its memory and its eventfds."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)

_ONE = (1).to_bytes(8, "little")

#: The largest ring (virtio 1.3, 2.7).
LARGEST_RING = 32768


class Vring:
    """Settings of one ring, which owns its eventfds."""

    def __init__(self) -> None:
        self.size = 0  #: number of entries
        #: position at which to resume: an index; of a packed ring two, with their wrap counters
        self.base = 0
        # User addresses, which may change while the ring is stopped.
        self.descriptors = 0
        self.available = 0
        self.used = 0
        self.enabled = False
        self.running = False
        self._fds: dict[str, int] = {}

    @property
    def kick(self) -> int | None:
        """The eventfd by which the driver announces new buffers."""
        return self._fds.get("kick")

    def take(self, purpose: str, fd: int | None) -> None:
        """Replace the eventfd for ``purpose``: ``kick``, ``call`` or ``error``; None closes it."""
        old = self._fds.pop(purpose, None)
        if old is not None:
            os.close(old)
        if fd is not None:
            self._fds[purpose] = fd

    def call(self) -> None:
        """Notify the driver of used buffers."""
        self._signal("call")

    def report_error(self) -> None:
        """Report to the front end that the ring is invalid."""
        self._signal("error")

    def close(self) -> None:
        """Close all eventfds."""
        for purpose in list(self._fds):
            self.take(purpose, None)

    def _signal(self, purpose: str) -> None:
        fd = self._fds.get(purpose)
        if fd is not None:
            try:
                os.write(fd, _ONE)
            # the counter is full (2**64 unread notifications), or not an eventfd
            except OSError as error:
                log.info("%s notification lost: %s", purpose, error)
