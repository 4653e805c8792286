"""The packed virtqueue (virtio 1.3, 2.8), device side.

Driver and device walk through one table of descriptors in the same direction.  Each lap begins
with the other value of a bit, the wrap counter; two flags of a descriptor show, by that value,
whether the descriptor is available or used.  The device marks a chain as used by overwriting the
chain's first descriptor.  This device uses chains in the order of their arrival.

As in the split ring, the driver can write every part at any time.  Each flag, length and address
is read once into a Python integer, checked, and then used.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence

from ..guest_memory import BadAddress, GuestMemory
from ..limits import VIRTIO_CHAIN_DESCRIPTORS_MAX
from .ring import (
    DESCRIPTOR,
    INDIRECT,
    NEXT,
    WRITE,
    Buffer,
    Chain,
    RingError,
    fence,
    indirect_table,
    ring_view,
    split_header,
)

_AVAILABLE, _USED = 1 << 7, 1 << 15  # in the flags of a descriptor
_STATE = _AVAILABLE | _USED

# In an event suppression structure: the upper half selects whether the other side is notified
# always, never, or at the descriptor in the lower half.
_ALWAYS, _NEVER, _AT = 0, 1, 2
_WRAP = 1 << 15  # in the lower half

_DESCRIPTOR = struct.Struct("<QIH")  # address, length, id; the flags were read before
_read_descriptor = _DESCRIPTOR.unpack_from
_INDIRECT = struct.Struct("<QIHH")

_ID_BITS = 16


class PackedRing:
    """Packed ring of ``size`` entries.

    ``addresses`` are those of the descriptors, the driver's and the device's event suppression.
    ``base`` has vhost-user's form: the lower 16 bits are the position of the next available chain,
    the upper 16 bits that of the next used chain, each with its wrap counter in the highest bit.
    ``event_index`` is true if VIRTIO_F_EVENT_IDX was negotiated.

    Raises RingError when base or addresses are invalid.
    """

    def __init__(
        self,
        memory: GuestMemory,
        size: int,
        addresses: tuple[int, int, int],
        base: int,
        event_index: bool,
    ) -> None:
        descriptors, driver, device = addresses
        self._view = memory.view
        self._memory = memory
        self._size = size
        self._descriptors = ring_view(memory, descriptors, DESCRIPTOR.size * size, 16)
        # Aligned words, which are read and written whole, in the machine's byte order.
        self._lengths = self._descriptors.cast("I")
        self._words = self._descriptors.cast("H")
        self._driver = ring_view(memory, driver, 4, 4).cast("I")
        self._device = ring_view(memory, device, 4, 4).cast("I")
        self._event_index = event_index
        # Positions increase without wrapping; the wrap counter of the first lap is 1, of the next
        # 0.
        used = base >> 16
        if used & ~_WRAP >= size:
            raise RingError(f"invalid base {used & ~_WRAP} (expected less than {size})")
        self._next = (used & ~_WRAP) + (0 if used & _WRAP else size)
        self._pushed = self._published = self._next
        self._device[0] = _ALWAYS

    def _locate(self, position: int) -> tuple[int, int]:
        """Return the index of ``position`` in the table, and the wrap counter of its lap."""
        lap, index = divmod(position, self._size)
        return index, not lap & 1

    def _is_available(self) -> int | None:
        """Return the flags of the next descriptor, or None if it is not available yet."""
        index, wrap = self._locate(self._next)
        flags: int = self._words[index * 8 + 7]
        if flags & _STATE == (_AVAILABLE if wrap else _USED):
            return flags
        return None

    @property
    def base(self) -> int:
        """Position at which a restarted ring resumes, in the lower and the upper 16 bits.

        Both halves are equal: all chains before this position were pushed.
        """
        index, wrap = self._locate(self._pushed)
        half = index | (_WRAP if wrap else 0)
        return half | half << 16

    def pop(self) -> Chain | None:
        """Return the next available chain, or None if the driver has added none.

        The chain's head combines the buffer's id (the lower 16 bits) and the number of descriptors
        in the chain.
        """
        found = self._is_available()
        if found is None:
            return None
        flags = found
        index = self._next % self._size
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        count = 0
        try:
            while True:
                address, length, buffer = _read_descriptor(self._descriptors, index << 4)
                count += 1
                if flags & INDIRECT:
                    if count > 1 or flags & NEXT:
                        raise RingError("indirect table within a chain")
                    for part in _INDIRECT.iter_unpack(
                        indirect_table(self._memory, address, length)
                    ):
                        self._add(part[0], part[1], part[3], readable, writable)
                    break
                self._add(address, length, flags, readable, writable)
                if not flags & NEXT:
                    break
                if count == self._size or count >= VIRTIO_CHAIN_DESCRIPTORS_MAX:
                    raise RingError("endless chain of descriptors")
                index = index + 1 if index + 1 < self._size else 0
                flags = self._words[index * 8 + 7]
        except BadAddress as error:
            raise RingError(f"buffer is not mapped: {error}") from None
        self._next += count
        return buffer | count << _ID_BITS, readable, writable

    def _add(
        self,
        address: int,
        length: int,
        flags: int,
        readable: list[memoryview],
        writable: list[memoryview],
    ) -> None:
        if not length:
            return
        if flags & WRITE:
            writable.append(self._view(address, length))
        elif writable:
            raise RingError("readable descriptor after a writable one")
        else:
            readable.append(self._view(address, length))

    def pop_buffers(self, count: int, header: int) -> list[Buffer]:
        """Return the next available chains, at most ``count``, as buffers to write."""
        buffers: list[Buffer] = []
        while len(buffers) < count and (chain := self.pop()) is not None:
            buffers.append(split_header(chain, header))
        return buffers

    def rewind(self) -> None:
        """Make :meth:`pop` continue at the first chain that was popped and not pushed."""
        self._next = self._pushed

    def push(self, head: int, length: int) -> None:
        """Mark the chain ``head`` as used, with ``length`` bytes written to it.

        The driver sees the used chain at once.
        """
        index, wrap = self._locate(self._pushed)
        self._lengths[index * 4 + 2] = length
        self._words[index * 8 + 6] = head & (1 << _ID_BITS) - 1
        # The flags last: they pass the descriptor to the driver.
        self._words[index * 8 + 7] = (_STATE if wrap else 0) | (WRITE if length else 0)
        self._pushed += head >> _ID_BITS

    def push_all(self, used: Sequence[tuple[int, int]]) -> None:
        """Mark chains as used: the head of each, and the number of bytes written to it."""
        for head, length in used:
            self.push(head, length)

    def publish(self) -> bool:
        """Return whether the driver must be notified of the chains pushed since the last call."""
        old, new = self._published, self._pushed
        if old == new:
            return False
        self._published = new
        fence()
        wanted: int = self._driver[0]
        if wanted >> 16 != _AT:
            return wanted >> 16 != _NEVER
        # The awaited descriptor is in this lap or the one before.  (If it is in the next lap, it
        # is taken for an old one, which causes one superfluous notification at most.)
        lap = new // self._size
        if bool(wanted & _WRAP) is bool(lap & 1):
            lap -= 1
        return old <= lap * self._size + (wanted & _WRAP - 1) < new

    def enable_notification(self, chains: int = 1) -> bool:
        """Request a kick after ``chains`` more descriptors; return whether a chain is available."""
        if self._event_index:
            ahead = min(chains, self._size >> 1 or 1) - 1
            index, wrap = self._locate(self._next + ahead)
            self._device[0] = index | (_WRAP if wrap else 0) | _AT << 16
            fence()
        return self._is_available() is not None
