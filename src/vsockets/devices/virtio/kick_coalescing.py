"""How many packets of a streaming guest are taken at a time.

A kick, the wake-up and the look at the ring cost more than passing on a packet.  A guest that
streams can do without a kick for each: it is asked for one only when there are some packets
more, and the device looks after them by itself in case no more come.

A guest streams when it has sent more than its credit without being answered: who waits for
answers is never made to wait longer.  How many packets are taken at a time grows as long as they
come in time, and falls to what there was when they did not.
"""

from __future__ import annotations

from .limits import VIRTIO_BUFFER_BYTES, VIRTIO_KICK_DELAY_SECONDS, VIRTIO_PACKETS_PER_KICK_MAX

#: Of the guest's credit, so much may come at a time: then there is some left to go on with.
_BATCH_BYTES_MAX = VIRTIO_BUFFER_BYTES * 3 // 4

#: A look without a kick comes after so many times what the packets should have taken.
_DELAY_FACTOR = 2


class KickCoalescing:
    """What the next kick is asked for, from what the last ones brought.

    ``packets`` is how many must be there; if several, the device looks after ``delay`` seconds
    without a kick.
    """

    def __init__(self) -> None:
        self.packets = 1
        self.delay = 0.0
        self._bytes_since_reply = 0  # bytes since the guest was sent payload
        self._last_poll = 0.0

    def on_reply(self) -> None:
        """The guest was sent payload."""
        self._bytes_since_reply = 0
        self.packets = 1

    def on_packets(self, packets: int, length: int, now: float) -> None:
        """A look at time ``now`` found ``packets`` with ``length`` bytes of payload."""
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
