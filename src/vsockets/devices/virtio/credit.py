"""Flow control by credit (virtio 1.3, 5.10.6.3).

Both sides count bytes, modulo 2**32.  A sender counts the bytes it sent (``tx_cnt``).  Every packet
of the receiver announces its buffer size (``buf_alloc``) and its count of forwarded bytes
(``fwd_cnt``).  The sender may send

    buf_alloc - (tx_cnt - fwd_cnt)

bytes.  The inner difference is the number of bytes in flight.  This difference is taken modulo
2**32, so that counters may wrap.  If a hostile receiver's count is ahead of ``tx_cnt`` or
decreases, the difference is huge, and the sender sends nothing.
"""

from __future__ import annotations

from collections import deque

from ..limits import VIRTIO_MERGED_PACKET_MAX_BYTES, VIRTIO_PACKET_OVERHEAD_BYTES

_MODULUS_BITS = 0xFFFF_FFFF
_HALF = 1 << 31

#: A run of packets that are counted together: a sixteenth of the guest's limit, in bytes.
_RUNS = 16 * VIRTIO_PACKET_OVERHEAD_BYTES

#: The number of unread packets times this constant reaches the guest's buffer size when half of the
#: guest's limit is reached.
_HALF_FULL_PACKET_BYTES = 2 * VIRTIO_PACKET_OVERHEAD_BYTES


def distance(later: int, earlier: int) -> int:
    """Return by how much a 32-bit counter grew from ``earlier`` to ``later``, modulo 2**32."""
    return later - earlier & _MODULUS_BITS


class SendCredit:
    """Bytes and packets that may be sent to the guest.

    A guest may count each packet that its program has not read as VIRTIO_PACKET_OVERHEAD_BYTES
    bytes beside the payload, and resets the connection when the sum exceeds its buffer, although
    the specification counts payload only.  So unread packets are counted here, too:

        a packet is unread until the guest has forwarded its last byte (``fwd_cnt``)
        a small packet may be merged into the one before (:data:`VIRTIO_MERGED_PACKET_MAX_BYTES`)

    The number of packets never blocks a stream: when many are unread, the rest of the credit is
    spent in small packets, which the guest merges.
    """

    __slots__ = (
        *("_requested", "_end", "_full", "_fwd", "_room", "_run", "_runs", "_sent"),
        *("buffer", "packets"),
    )

    def __init__(self) -> None:
        self.buffer = 0  #: the guest's buffer size, in bytes
        #: upper bound of the packets that the guest's programs have not read
        self.packets = 0
        self._sent = self._fwd = 0
        self._end = 0  # the guest's count once it has read everything
        # (the guest's count once it has read a run, number of packets in the run)
        self._runs: deque[tuple[int, int]] = deque()
        self._run = 0  # packets after the last run
        self._room = 0  # bytes that the guest can merge into its last packet
        # The guest's count when it was full, and when a CREDIT_REQUEST was sent.
        self._full = self._requested = -1

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Store the guest's buffer size and count of forwarded bytes, from a packet's header."""
        self.buffer = buf_alloc
        self._fwd = fwd_cnt

    @property
    def sent(self) -> int:
        """Bytes sent to the guest, modulo 2**32."""
        return self._sent

    def available(self) -> int:
        """Return the number of payload bytes that may be sent now."""
        # distance() inlined here and below: this runs for every packet.
        free = self.buffer - (self._sent - self._fwd & _MODULUS_BITS)
        return free if free > 0 and self._fwd != self._full else 0

    def spend(self, length: int, packets: int = 1, room: int = 0) -> None:
        """Account for ``length`` sent bytes, at most :meth:`available`, in ``packets`` packets.

        ``room`` is the free part, in bytes, of the guest buffer that holds the last packet, into
        which the guest may merge the next packet.
        """
        if self._fwd == self._end:
            self._discard_all()
        sent = self._sent = self._sent + length & _MODULUS_BITS
        # An empty packet has been read for certain when a byte after it has.
        self._end = sent if length else sent + 1 & _MODULUS_BITS
        if (
            length <= VIRTIO_MERGED_PACKET_MAX_BYTES
            and length < self._room
            and packets == 1
            and self.packets
        ):
            self._room -= length
            if not self._run:
                self._runs[-1] = (self._end, self._runs[-1][1])
            return
        self._room = room
        self.packets += packets
        self._run += packets
        if self._run * _RUNS >= self.buffer:
            self._runs.append((self._end, self._run))
            self._run = 0

    def packet_size(self, room: int) -> int:
        """Return the maximum payload of a stream's next packets.

        ``room`` is the number of payload bytes for which a guest buffer has room.  The result is
        ``room``, or VIRTIO_MERGED_PACKET_MAX_BYTES when many packets are unread, or 0 when the
        guest must read first.  Callers need the result only while :attr:`is_half_full`.
        """
        self._discard_read()
        limit = self._limit
        if self.packets >= limit:
            self._full = self._fwd
            return 0
        # Packets for the rest of the credit, merged by the guest, and one that is partly filled.
        rest = self.available() // max(room - VIRTIO_MERGED_PACKET_MAX_BYTES, 1) + 2
        return (
            VIRTIO_MERGED_PACKET_MAX_BYTES
            if self.packets and self.packets + rest >= limit
            else room
        )

    def admits_message(self, packets: int) -> bool:
        """Return whether a message of ``packets`` packets may be sent now."""
        if (self.packets + packets) * VIRTIO_PACKET_OVERHEAD_BYTES <= self.buffer:
            return True
        self._discard_read()
        # A message is sent whole: the guest reads no part of it before the end.
        if self.packets and self.packets + packets > self._limit:
            self._full = self._fwd
            return False
        return True

    def admits_empty_message(self) -> bool:
        """Return whether a message without content may be sent.

        An empty message does not change the guest's count of forwarded bytes, so the guest never
        reports that it was read.  Half of the guest's limit is kept for messages with content.
        """
        self._discard_read()
        return self.packets < self._limit // 2

    @property
    def is_half_full(self) -> bool:
        """Flag: true while :attr:`packets` are at least half of the packets the guest can hold."""
        return self.packets * _HALF_FULL_PACKET_BYTES >= self.buffer

    @property
    def is_full(self) -> bool:
        """Flag: true while nothing is sent until the guest reports that it has read packets."""
        return self._full == self._fwd

    def retry(self) -> None:
        """Clear :attr:`is_full`, so that the next packet is checked against the limit again."""
        self._full = -1

    def take_request_due(self) -> bool:
        """Return whether to send a CREDIT_REQUEST, and count it as sent.

        One CREDIT_REQUEST is sent for each count of forwarded bytes that the guest announces.
        """
        if self._requested == self._fwd:
            return False
        self._requested = self._fwd
        return True

    @property
    def _limit(self) -> int:
        """Number of unread packets that the guest can hold; at least 1, to send at all."""
        return self.buffer // VIRTIO_PACKET_OVERHEAD_BYTES or 1

    def _discard_read(self) -> None:
        """Reduce :attr:`packets`, unread by the guest, by those that it has reported as read."""
        if self._fwd == self._end:
            self._discard_all()
        runs = self._runs
        while runs and self._fwd - runs[0][0] & _MODULUS_BITS < _HALF:
            self.packets -= runs.popleft()[1]

    def _discard_all(self) -> None:
        self.packets = self._run = 0
        if self._runs:
            self._runs.clear()


class ReceiveCredit:
    """Bytes that the guest may send, into a buffer of ``size`` bytes."""

    __slots__ = ("_announced", "_forwarded", "_received", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._received = self._forwarded = self._announced = 0

    @property
    def forwarded(self) -> int:
        """Bytes forwarded, modulo 2**32."""
        return self._forwarded

    @property
    def held(self) -> int:
        """Bytes received and not yet forwarded."""
        return distance(self._received, self._forwarded)

    def receive(self, length: int) -> bool:
        """Account for ``length`` received bytes; return whether the guest had credit for them."""
        if length > self.size - (self._received - self._forwarded & _MODULUS_BITS):
            return False
        self._received = self._received + length & _MODULUS_BITS
        return True

    def forward(self, length: int) -> None:
        """Account for ``length`` forwarded bytes."""
        self._forwarded = self._forwarded + length & _MODULUS_BITS

    def announce(self) -> int:
        """Return the count of forwarded bytes (``fwd_cnt``), and mark it as announced."""
        self._announced = self._forwarded
        return self._forwarded

    @property
    def unannounced(self) -> int:
        """Forwarded bytes that were not yet announced to the guest."""
        return distance(self._forwarded, self._announced)

    def update_is_due(self, guest_buffer: int) -> bool:
        """Return whether to send a CREDIT_UPDATE.

        The guest must know of free room before it considers the buffer full.  Linux 7.3 never has
        more bytes in flight than ``guest_buffer``, its own buffer size.  Until half of the smaller
        buffer was forwarded since the last announcement, the guest knows that the other half is
        free or will be: enough to continue while the device wakes up.
        """
        size = guest_buffer if guest_buffer < self.size else self.size
        return (self._forwarded - self._announced & _MODULUS_BITS) * 2 >= size
