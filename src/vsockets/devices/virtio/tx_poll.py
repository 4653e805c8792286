"""Scheduling of the transmit queue: when to poll it, and when to notify the guest."""

from __future__ import annotations

from collections.abc import Callable

from ..loop import DeviceLoop, Timer
from ..vhost_user import Vring
from .kick_coalescing import KickCoalescing
from .limits import VIRTIO_USED_BATCH_PACKETS, VIRTIO_USED_BATCH_SECONDS
from .tx import TransmitQueue


class TxPoll:
    """Scheduler of ``queue``; ``poll`` is called when the queue is due without a kick."""

    def __init__(
        self, loop: DeviceLoop, queue: TransmitQueue, vring: Vring, poll: Callable[[], None]
    ) -> None:
        self.coalescing = KickCoalescing()
        self._loop = loop
        self._queue = queue
        self._vring = vring
        self._poll = poll
        self._poll_timer: Timer | None = None
        self._notify_timer: Timer | None = None
        self._unnotified = 0  # packets received since the last used-buffer notification
        self._notify_batch = min(VIRTIO_USED_BATCH_PACKETS, vring.size // 2)
        self._notify_due = False  # the guest expects a notification

    def run(self) -> bool:
        """Receive packets for one turn; return whether more are available."""
        queue = self._queue
        more, call = queue.run(self.coalescing)
        self._unnotified += queue.packets
        if call or self._notify_due:
            self._notify_due = True
            if self._unnotified >= self._notify_batch:
                self._notify()
            elif self._notify_timer is None:
                self._notify_timer = self._loop.call_later(VIRTIO_USED_BATCH_SECONDS, self._notify)
        if self._poll_timer is not None:
            self._poll_timer.cancel()
            self._poll_timer = None
        if not more and self.coalescing.packets > 1:
            self._poll_timer = self._loop.call_later(self.coalescing.delay, self._poll)
        return more

    def stop(self) -> int:
        """Release guest memory; return the ring's base."""
        if self._poll_timer is not None:
            self._poll_timer.cancel()
        if self._notify_due:
            self._notify()
        return self._queue.stop()

    def _notify(self) -> None:
        if self._notify_timer is not None:
            self._notify_timer.cancel()
            self._notify_timer = None
        self._notify_due = False
        self._unnotified = 0
        self._vring.call()
