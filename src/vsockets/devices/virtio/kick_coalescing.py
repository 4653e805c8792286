"""Coalescing of kicks from a streaming guest.

A kick, the device's wake-up and reading the ring's index cost more than forwarding a packet.  A
streaming guest need not kick for each packet: the device requests a kick only after some packets,
and polls the ring by itself in case no further packets arrive.

A guest streams when it has sent more than its credit without receiving payload, so that a guest
that waits for replies is never delayed.  The number of packets per kick grows while they arrive in
time, and falls to the number that did arrive otherwise.
"""

from __future__ import annotations

from .limits import VIRTIO_BUFFER_BYTES, VIRTIO_KICK_DELAY_SECONDS, VIRTIO_PACKETS_PER_KICK_MAX

#: Share of the guest's credit that one batch may use; the guest continues with the rest.
_BATCH_BYTES_MAX = VIRTIO_BUFFER_BYTES * 3 // 4

#: Delay of the device's own poll, in multiples of the expected arrival time of a batch.
_DELAY_FACTOR = 2


class KickCoalescing:
    """Number of packets to announce with the next kick, from the recent arrival rate.

    ``packets`` is that number; if it is above 1, the device polls the ring after ``delay``
    seconds.
    """

    def __init__(self) -> None:
        self.packets = 1
        self.delay = 0.0
        self._bytes_since_reply = 0  # bytes since payload was last sent to the guest
        self._last_poll = 0.0

    def on_reply(self) -> None:
        """Stop coalescing: payload was sent to the guest."""
        self._bytes_since_reply = 0
        self.packets = 1

    def on_packets(self, packets: int, length: int, now: float) -> None:
        """Account for a poll at time ``now``: ``packets`` with ``length`` bytes of payload."""
        interval = max(now - self._last_poll, 1e-6) / max(packets, 1)
        self._last_poll = now
        self._bytes_since_reply += length
        if self._bytes_since_reply <= VIRTIO_BUFFER_BYTES or not length:
            self.packets = 1
            return
        wanted = min(
            2 * packets if packets >= self.packets else packets, VIRTIO_PACKETS_PER_KICK_MAX
        )
        wanted = min(
            wanted,
            _BATCH_BYTES_MAX * packets // length,
            int(VIRTIO_KICK_DELAY_SECONDS / interval / _DELAY_FACTOR),
        )
        self.packets = max(wanted, 1)
        self.delay = self.packets * interval * _DELAY_FACTOR
