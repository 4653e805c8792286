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

_MODULUS_BITS = 0xFFFF_FFFF


def distance(later: int, earlier: int) -> int:
    """How far a counter came, from ``earlier`` to ``later``: 0 to 2**32 - 1."""
    return later - earlier & _MODULUS_BITS


class SendCredit:
    """What may be sent to the guest."""

    __slots__ = ("_fwd", "_sent", "buffer")

    def __init__(self) -> None:
        self.buffer = 0  #: the guest's, in bytes
        self._sent = self._fwd = 0

    def update(self, buf_alloc: int, fwd_cnt: int) -> None:
        """The guest says this of its buffer, in any of its packets."""
        self.buffer = buf_alloc
        self._fwd = fwd_cnt

    def available(self) -> int:
        """Bytes that may be sent now."""
        # distance() without the call, here and below: it is asked for every packet.
        free = self.buffer - (self._sent - self._fwd & _MODULUS_BITS)
        return free if free > 0 else 0

    def spend(self, length: int) -> None:
        """``length`` bytes were sent, ``available()`` of them at most."""
        self._sent = self._sent + length & _MODULUS_BITS


class ReceiveCredit:
    """What the guest may send: a buffer of ``size`` bytes."""

    __slots__ = ("_forwarded", "_received", "_told", "size")

    def __init__(self, size: int) -> None:
        self.size = size
        self._received = self._forwarded = self._told = 0

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

    def tell(self) -> int:
        """The count for a packet that is about to be sent."""
        self._told = self._forwarded
        return self._forwarded

    @property
    def untold(self) -> int:
        """Bytes passed on that the guest does not know of."""
        return distance(self._forwarded, self._told)

    def is_due(self, guest_buffer: int) -> bool:
        """Whether the guest should be told, though nothing else is to be sent.

        It must be before the guest believes that there is no room.  Linux 7.3 never has more
        on its way than fits ``guest_buffer``, a buffer of its own size.  Until half of
        the smaller one was passed on since the guest was told, it knows of the other half that
        it is free, or will be without a word: enough to go on with while we wake up.
        """
        size = guest_buffer if guest_buffer < self.size else self.size
        return (self._forwarded - self._told & _MODULUS_BITS) * 2 >= size
