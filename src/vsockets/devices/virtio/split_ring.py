"""The split virtqueue (virtio 1.3, 2.7), from the device's side.

Everything in it is the driver's, who may write it at any time.  Each index, length and address
is read once, into a value of our own, checked, and then used.
"""

from __future__ import annotations

from ..guest_memory import BadAddress, GuestMemory
from .limits import VIRTIO_CHAIN_DESCRIPTORS_MAX
from .ring import (
    DESCRIPTOR,
    INDIRECT,
    NEXT,
    WRITE,
    Chain,
    RingError,
    fence,
    indirect_table,
    ring_view,
)

_MASK = 0xFFFF
_NO_INTERRUPT = 1  # of the available ring's flags
_NO_NOTIFY = 1  # of the used ring's flags
_read_descriptor = DESCRIPTOR.unpack_from

# Places of the 16-bit words of both rings.
_FLAGS, _INDEX, _RING = 0, 1, 2


class SplitRing:
    """``size`` entries; ``addresses`` of descriptor table, available ring and used ring.

    RingError when that cannot be a ring.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: tuple[int, int, int],
        base: int,
        event_index: bool,
    ) -> None:
        if size & size - 1:
            raise RingError(f"a split ring of {size} entries: not a power of two")
        descriptors, available, used = addresses
        self._view = memory.view
        self._memory = memory
        self._size = size
        self._descriptors = ring_view(memory, descriptors, DESCRIPTOR.size * size, 16)
        # Words of 16 bits at their own alignment: each is read and written whole.  A view of
        # the machine's byte order, which must be virtio's: tests run where it is.
        self._available = ring_view(memory, available, 6 + 2 * size, 2).cast("H")
        whole = ring_view(memory, used, 6 + 8 * size, 4)
        self._used = whole.cast("H")
        self._elements = whole[4 : 4 + 8 * size].cast("Q")
        self._event_index = event_index
        self._next = base & _MASK  # the first available entry not popped yet
        self._available_index = self._next  # the driver's index, as of the last look
        self._pushed = self._published = self._next
        if not event_index:
            self._used[_FLAGS] = 0

    @property
    def base(self) -> int:
        """The next available entry: all before it were used, too."""
        return self._pushed

    def pop(self) -> Chain | None:
        """As :meth:`.ring.Ring.pop`."""
        position = self._next
        if position == self._available_index:
            available_index = self._available[_INDEX]
            if position == available_index:
                return None
            if (available_index - position) & _MASK > self._size:
                raise RingError(
                    f"the index of available entries is {available_index}, after {position}"
                )
            self._available_index = available_index
        head = self._available[_RING + (position & self._size - 1)]
        if head >= self._size:
            raise RingError(f"descriptor {head} of {self._size}")
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        descriptors, limit, index, left = self._descriptors, self._size, head, self._size
        try:
            while True:
                address, length, flags, following = _read_descriptor(descriptors, index << 4)
                if flags & INDIRECT:
                    if descriptors is not self._descriptors or flags & NEXT:
                        raise RingError("an indirect table within a chain")
                    descriptors = indirect_table(self._memory, address, length)
                    limit = len(descriptors) >> 4
                    left, index = limit, 0
                    continue
                if length:
                    if flags & WRITE:
                        writable.append(self._view(address, length))
                    elif writable:
                        raise RingError("a part to be read after one to be written")
                    else:
                        readable.append(self._view(address, length))
                if not flags & NEXT:
                    break
                left -= 1
                if not left or len(readable) + len(writable) >= VIRTIO_CHAIN_DESCRIPTORS_MAX:
                    raise RingError("an endless chain of descriptors")
                if following >= limit:
                    raise RingError(f"descriptor {following} of {limit}")
                index = following
        except BadAddress as error:
            raise RingError(f"a buffer is not in memory: {error}") from None
        self._next = position + 1 & _MASK
        return head, readable, writable

    def rewind(self) -> None:
        """As :meth:`.ring.Ring.rewind`."""
        self._next = self._available_index = self._pushed

    def push(self, head: int, length: int) -> None:
        """As :meth:`.ring.Ring.push`."""
        self._elements[self._pushed & self._size - 1] = head | length << 32
        self._pushed = self._pushed + 1 & _MASK

    def publish(self) -> bool:
        """As :meth:`.ring.Ring.publish`."""
        old, new = self._published, self._pushed
        if old == new:
            return False
        self._used[_INDEX] = new
        self._published = new
        fence()
        if self._event_index:
            wanted = self._available[_RING + self._size]
            return (new - wanted - 1) & _MASK < (new - old) & _MASK
        return not self._available[_FLAGS] & _NO_INTERRUPT

    def enable_notification(self, chains: int = 1) -> bool:
        """As :meth:`.ring.Ring.want_kick`."""
        if self._event_index:
            ahead = min(chains, self._size >> 1 or 1) - 1
            self._used[_RING + 4 * self._size] = self._next + ahead & _MASK
            fence()
        return self._available[_INDEX] != self._next
