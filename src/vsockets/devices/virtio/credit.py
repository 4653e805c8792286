"""Flow control by credit (virtio 1.3, 5.10.6.3).

Both sides count bytes, modulo 2**32.  A sender counts what it sent (``tx_cnt``) and is told, in
every packet, how large the receiver's buffer is (``buf_alloc``) and how much the receiver has
passed on (``fwd_cnt``).  It may send what fits:

    buf_alloc - (tx_cnt - fwd_cnt)

The inner difference is what is on its way.  It is taken modulo 2**32, so a counter may wrap; and
a receiver that lies (its count runs ahead, or backwards) has a huge amount on its way, so no
credit at all, never too much.
"""

from __future__ import annotations

from collections import deque

from .limits import VIRTIO_MERGED_PACKET_MAX_BYTES, VIRTIO_PACKET_OVERHEAD_BYTES

_MODULUS_BITS = 0xFFFF_FFFF
_HALF = 1 << 31

#: Packets are counted in runs of a sixteenth of what fits.
_RUNS = 16 * VIRTIO_PACKET_OVERHEAD_BYTES

#: Unread packets are many when so many times that is the guest's buffer: half of what fits.
HALF_FULL_PACKET_BYTES = 2 * VIRTIO_PACKET_OVERHEAD_BYTES


def distance(later: int, earlier: int) -> int:
    """How far a counter came, from ``earlier`` to ``later``: 0 to 2**32 - 1."""
    return later - earlier & _MODULUS_BITS


class SendCredit:
    """The bytes and packets that may be sent to the guest.

    A guest may count a packet that its program has not read as VIRTIO_PACKET_OVERHEAD_BYTES bytes
    more than its
    payload, and resets the connection when these are more than its buffer, although the
    specification has bytes of payload alone.  So unread packets are counted here, too:

        one whose last byte the guest has not passed on (``fwd_cnt``) is unread
        a small one may be part of the one before it (:data:`VIRTIO_MERGED_PACKET_MAX_BYTES`)

    A stream never has to wait for a reader because of its packets: when there are many, the rest
    of its credit is spent in small ones, which the guest merges.
    """

    __slots__ = (
        *("_requested", "_end", "_full", "_fwd", "_room", "_run", "_runs", "_sent"),
        *("buffer", "packets"),
    )

    def __init__(self) -> None:
        self.buffer = 0  #: the guest's, in bytes
        self.packets = 0  #: that may be unread; some that were read are counted for a while
        self._sent = self._fwd = 0
        self._end = 0  # the guest's count when it has read everything
        self._runs: deque[tuple[int, int]] = deque()  # its count when it has read so many packets
        self._run = 0  # packets after those
        self._room = 0  # bytes that the guest can merge into its last packet
        self._full = self._requested = -1  # its count when it was full, and when it was asked

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """Take what the guest says of its buffer, in any of its packets."""
        self.buffer = buf_alloc
        self._fwd = fwd_cnt

    def available(self) -> int:
        """Return the bytes that may be sent now."""
        # distance() without the call, here and below: it is asked for every packet.
        free = self.buffer - (self._sent - self._fwd & _MODULUS_BITS)
        return free if free > 0 and self._fwd != self._full else 0

    def spend(self, length: int, packets: int = 1, room: int = 0) -> None:
        """``length`` bytes were sent, at most :meth:`available`, in ``packets``.

        ``room`` is what is left of the guest's buffer for the last one, if the guest may merge the
        next packet into it.
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
        """Return how many bytes each of a stream's next packets may have, if the guest's buffers
        take ``room``: these, VIRTIO_MERGED_PACKET_MAX_BYTES, or 0 when it must wait for the guest.

        To be called when the guest has :data:`MANY` unread packets.
        """
        self._discard_read()
        limit = self._limit
        if self.packets >= limit:
            self._full = self._fwd
            return 0
        # Packets that the rest of the credit takes, merged by the guest; and one that is not full.
        rest = self.available() // max(room - VIRTIO_MERGED_PACKET_MAX_BYTES, 1) + 2
        return (
            VIRTIO_MERGED_PACKET_MAX_BYTES
            if self.packets and self.packets + rest >= limit
            else room
        )

    def admits_message(self, packets: int) -> bool:
        """Return whether a message of ``packets`` may be sent; if not, it must wait."""
        if (self.packets + packets) * VIRTIO_PACKET_OVERHEAD_BYTES <= self.buffer:
            return True
        self._discard_read()
        # A message is sent whole: the guest reads nothing of it before.
        if self.packets and self.packets + packets > self._limit:
            self._full = self._fwd
            return False
        return True

    def admits_empty_message(self) -> bool:
        """Return whether a message without content may be sent.

        The guest never says that it was read, so room is kept for those of which it does.
        """
        self._discard_read()
        return self.packets < self._limit // 2

    @property
    def is_full(self) -> bool:
        """Whether a packet waits until the guest has read others."""
        return self._full == self._fwd

    def retry(self) -> None:
        """Have it found out anew whether it is full."""
        self._full = -1

    def take_request_due(self) -> bool:
        """Return whether the guest was not asked for its credit since it passed something on;
        it is taken as asked now.
        """
        if self._requested == self._fwd:
            return False
        self._requested = self._fwd
        return True

    @property
    def _limit(self) -> int:
        """Unread packets the guest can hold: one in any case, else nothing could be sent."""
        return self.buffer // VIRTIO_PACKET_OVERHEAD_BYTES or 1

    def _discard_read(self) -> None:
        """Count no packets that the guest has read."""
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
    """What the guest may send: a buffer of ``size`` bytes."""

    __slots__ = ("_announced", "_forwarded", "_received", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._received = self._forwarded = self._announced = 0

    @property
    def held(self) -> int:
        """Bytes received and not passed on."""
        return distance(self._received, self._forwarded)

    def receive(self, length: int) -> bool:
        """``length`` bytes came; False when the guest had no credit for them."""
        if length > self.size - (self._received - self._forwarded & _MODULUS_BITS):
            return False
        self._received = self._received + length & _MODULUS_BITS
        return True

    def forward(self, length: int) -> None:
        """``length`` bytes of those held were passed on."""
        self._forwarded = self._forwarded + length & _MODULUS_BITS

    def announce(self) -> int:
        """The count for a packet that is about to be sent."""
        self._announced = self._forwarded
        return self._forwarded

    @property
    def unannounced(self) -> int:
        """Bytes passed on that the guest does not know of."""
        return distance(self._forwarded, self._announced)

    def update_is_due(self, guest_buffer: int) -> bool:
        """Whether the guest should be told, though nothing else is to be sent.

        It must be before the guest believes that there is no room.  Linux 7.3 never has more
        on its way than fits ``guest_buffer``, a buffer of its own size.  Until half of
        the smaller one was passed on since the guest was told, it knows of the other half that
        it is free, or will be without a word: enough to go on with while we wake up.
        """
        size = guest_buffer if guest_buffer < self.size else self.size
        return (self._forwarded - self._announced & _MODULUS_BITS) * 2 >= size
