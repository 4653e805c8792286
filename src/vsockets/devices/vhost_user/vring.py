"""A ring as the front end describes it: where it lies, and how its two sides wake each other."""

from __future__ import annotations

import logging
import os

log = logging.getLogger(__name__)

_ONE = (1).to_bytes(8, "little")

#: The largest ring virtio knows (virtio 1.3, 2.7).
LARGEST_RING = 32768


class Vring:
    """One ring's settings.  The descriptors are its own."""

    def __init__(self) -> None:
        self.size = 0  #: entries
        self.base = 0  #: where to go on: an index, of a packed ring two with their wrap counters
        # User addresses, as long as it is stopped.
        self.descriptors = 0
        self.available = 0
        self.used = 0
        self.enabled = False
        self.running = False
        self._fds: dict[str, int] = {}

    @property
    def kick(self) -> int | None:
        """The eventfd by which the guest's driver says that there are new buffers."""
        return self._fds.get("kick")

    def take(self, purpose: str, fd: int | None) -> None:
        """Use ``fd`` for ``purpose``: ``kick``, ``call`` or ``error``; None for no descriptor."""
        old = self._fds.pop(purpose, None)
        if old is not None:
            os.close(old)
        if fd is not None:
            self._fds[purpose] = fd

    def call(self) -> None:
        """Tell the guest's driver that buffers were used."""
        self._signal("call")

    def report_error(self) -> None:
        """Tell the front end that the ring makes no sense."""
        self._signal("error")

    def close(self) -> None:
        """Close every descriptor."""
        for purpose in list(self._fds):
            self.take(purpose, None)

    def _signal(self, purpose: str) -> None:
        fd = self._fds.get(purpose)
        if fd is not None:
            try:
                os.write(fd, _ONE)
            except OSError as error:  # 2**64 calls that nobody has taken, or it is no eventfd
                log.info("a %s was lost: %s", purpose, error)
