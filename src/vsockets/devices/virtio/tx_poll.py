"""The guest's transmit queue at work: when it is looked at, and when the guest is told of it."""

from __future__ import annotations

from collections.abc import Callable

from ..loop import DeviceLoop, Timer
from ..vhost_user import Vring
from .kick_coalescing import KickCoalescing
from .limits import VIRTIO_USED_BATCH_PACKETS, VIRTIO_USED_BATCH_SECONDS
from .tx import TransmitQueue


class TxPoll:
    """Runs ``queue``; ``work`` is called when it is time to look without a kick."""

    def __init__(
        self, loop: DeviceLoop, queue: TransmitQueue, vring: Vring, work: Callable[[], None]
    ) -> None:
        self.pace = KickCoalescing()
        self._loop = loop
        self._queue = queue
        self._vring = vring
        self._work = work
        self._looking: Timer | None = None
        self._calling: Timer | None = None
        self._untold = 0  # packets taken since the guest was told
        self._most_untold = min(VIRTIO_USED_BATCH_PACKETS, vring.size // 2)
        self._owes_call = False  # the guest wants to be told of them

    def run(self) -> bool:
        """Take packets, for a turn; returns whether there are more."""
        queue = self._queue
        more, call = queue.run(self.pace)
        self._untold += queue.packets
        if call or self._owes_call:
            self._owes_call = True
            if self._untold >= self._most_untold:
                self._call()
            elif self._calling is None:
                self._calling = self._loop.call_later(VIRTIO_USED_BATCH_SECONDS, self._call)
        if self._looking is not None:
            self._looking.cancel()
            self._looking = None
        if not more and self.pace.packets > 1:
            self._looking = self._loop.call_later(self.pace.delay, self._work)
        return more

    def stop(self) -> int:
        """Let go of the guest's memory; returns where to go on."""
        if self._looking is not None:
            self._looking.cancel()
        if self._owes_call:
            self._call()
        return self._queue.stop()

    def _call(self) -> None:
        if self._calling is not None:
            self._calling.cancel()
            self._calling = None
        self._owes_call = False
        self._untold = 0
        self._vring.call()
