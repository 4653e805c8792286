"""Virtqueues, device side: the interface of both kinds, and the split virtqueue (virtio 1.3, 2.7).

The driver can write every part of a ring at any time.  Each index, length and address is read once
into a Python integer, checked, and then used.  :mod:`.packed_ring` is the other kind.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Protocol

from ..guest_memory import BadAddress, GuestMemory
from ..limits import VIRTIO_CHAIN_DESCRIPTORS_MAX

# Feature bits of all virtio devices (virtio 1.3, chapter 6).
F_RING_INDIRECT_DESC = 1 << 28
F_RING_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

# Flags of a descriptor.
NEXT, WRITE, INDIRECT = 1, 2, 4

DESCRIPTOR = struct.Struct("<QIHH")  #: address, length, flags, next (split) or: id, flags

#: A chain that the driver made available: its head (the number by which the ring identifies the
#: chain), the parts to read, the parts to write.  A plain tuple, because every packet makes one.
Chain = tuple[int, list[memoryview], list[memoryview]]

#: A chain for the device to write a packet: its head, the part for the header (it may be longer),
#: the parts for payload, and the payload's room in bytes.  If the header spans several parts, the
#: second item is None and the parts begin with the header's.
Buffer = tuple[int, memoryview | None, list[memoryview], int]

_fence_lock = threading.Lock()


class RingError(Exception):
    """The driver violated the rules of the ring; the device must stop the ring."""


class Ring(Protocol):
    """A virtqueue, device side.

    Each method raises RingError when the driver has violated the rules of the ring.
    """

    def pop(self) -> Chain | None:
        """Return the next available chain, or None if the driver has added none."""

    def pop_buffers(self, count: int, header: int) -> list[Buffer]:
        """Return the next available chains, at most ``count``, as buffers to write.

        ``header`` is the size of a packet's header, in bytes.
        """

    def rewind(self) -> None:
        """Make :meth:`pop` continue at the first chain that was popped and not pushed."""

    def push(self, head: int, length: int) -> None:
        """Mark the chain ``head`` as used, with ``length`` bytes written to it.

        Chains are pushed in the order in which :meth:`pop` returned them.
        """

    def push_all(self, used: Sequence[tuple[int, int]]) -> None:
        """Mark chains as used: the head of each, and the number of bytes written to it."""

    def publish(self) -> bool:
        """Make pushed chains visible to the driver; return whether the driver must be notified."""

    def enable_notification(self, chains: int = 1) -> bool:
        """Request a kick from the driver; return whether a chain is available already.

        The driver kicks once ``chains`` more chains are available, or earlier.
        """

    @property
    def base(self) -> int:
        """Position at which a restarted ring resumes (:attr:`.Vring.base`)."""


def fence() -> None:
    """Order earlier stores before later loads, as the driver sees them.

    Every architecture, x86 included, lets a load overtake an earlier store; taking a lock is a
    memory barrier on all of them.
    """
    with _fence_lock:
        pass


def ring_view(memory: GuestMemory, address: int, size: int, alignment: int) -> memoryview:
    """Return a view of a part of a ring: ``size`` bytes at ``address``.

    Raises RingError when the part is not mapped or not aligned.
    """
    if address % alignment:
        raise RingError(
            f"misaligned part of the ring at {address:#x} (expected a multiple of {alignment})"
        )
    try:
        return memory.view(address, size)
    except BadAddress as error:
        raise RingError(f"part of the ring is not mapped: {error}") from None


def indirect_table(memory: GuestMemory, address: int, length: int) -> memoryview:
    """Return a view of an indirect descriptor table of ``length`` bytes.

    Raises RingError when the length is invalid or the table is not mapped.
    """
    if (
        not length
        or length % DESCRIPTOR.size
        or length > VIRTIO_CHAIN_DESCRIPTORS_MAX * DESCRIPTOR.size
    ):
        raise RingError(f"indirect table of invalid size: {length} bytes")
    try:
        return memory.view(address, length)
    except BadAddress as error:
        raise RingError(f"indirect table is not mapped: {error}") from None


def total_length(parts: Sequence[memoryview]) -> int:
    """Return the number of bytes in all parts."""
    return sum(map(len, parts))


def split_header(chain: Chain, header: int) -> Buffer:
    """Return ``chain`` as a buffer for a packet with a header of ``header`` bytes.

    Raises RingError when the chain has a readable part, or no room for a header.
    """
    head, readable, parts = chain
    if readable or not parts:
        raise RingError("invalid buffer in the receive queue (expected writable descriptors only)")
    first = parts[0]
    size = len(first)
    if size == header:
        del parts[0]
    elif size > header:
        parts[0] = first[header:]
    else:
        room = total_length(parts) - header
        if room < 0:
            raise RingError("buffer in the receive queue without room for a header")
        return head, None, parts, room
    return head, first, parts, total_length(parts)


_MASK = 0xFFFF
_NO_INTERRUPT = 1  # in the flags of the available ring
_read_descriptor = DESCRIPTOR.unpack_from
_PAIR = struct.Struct("<QIHHQIHH")  # an indirect table of two descriptors
_read_pair = _PAIR.unpack_from

# Positions of 16-bit words in both rings.
_FLAGS, _INDEX, _RING = 0, 1, 2


class SplitRing:
    """Split ring of ``size`` entries.

    ``addresses`` are those of the descriptor table, the available ring and the used ring.  ``base``
    is the index at which to resume.  ``event_index`` is true if VIRTIO_F_EVENT_IDX was negotiated.

    Raises RingError when size or addresses are invalid.
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
            raise RingError(f"invalid split ring size {size} (expected a power of two)")
        descriptors, available, used = addresses
        self._view = memory.view
        self._memory = memory
        self._size = size
        self._descriptors = ring_view(memory, descriptors, DESCRIPTOR.size * size, 16)
        # Aligned 16-bit words, which are read and written whole, in the machine's byte order;
        # virtio's order is the same on all supported machines.
        self._available = ring_view(memory, available, 6 + 2 * size, 2).cast("H")
        whole = ring_view(memory, used, 6 + 8 * size, 4)
        self._used = whole.cast("H")
        self._elements = whole[4 : 4 + 8 * size].cast("Q")
        self._event_index = event_index
        self._next = base & _MASK  # the first entry that was not popped
        self._available_index = self._next  # the driver's index, as last read
        self._pushed = self._published = self._next
        if not event_index:
            self._used[_FLAGS] = 0

    @property
    def base(self) -> int:
        """Index at which a restarted ring resumes: all earlier chains were pushed."""
        return self._pushed

    def pop(self) -> Chain | None:  # noqa: C901 - hot loop: every field is read once
        """Return the next available chain, or None if the driver has added none."""
        position = self._next
        if position == self._available_index:
            available_index = self._available[_INDEX]
            if position == available_index:
                return None
            if (available_index - position) & _MASK > self._size:
                raise RingError(f"available index jumps from {position} to {available_index}")
            self._available_index = available_index
        head = self._available[_RING + (position & self._size - 1)]
        if head >= self._size:
            raise RingError(f"invalid descriptor {head} (expected less than {self._size})")
        readable: list[memoryview] = []
        writable: list[memoryview] = []
        descriptors, limit, index, left = self._descriptors, self._size, head, self._size
        try:
            while True:
                address, length, flags, following = _read_descriptor(descriptors, index << 4)
                if flags & INDIRECT:
                    if descriptors is not self._descriptors or flags & NEXT:
                        raise RingError("indirect table within a chain")
                    descriptors = indirect_table(self._memory, address, length)
                    limit = len(descriptors) >> 4
                    left, index = limit, 0
                    continue
                if length:
                    if flags & WRITE:
                        writable.append(self._view(address, length))
                    elif writable:
                        raise RingError("readable descriptor after a writable one")
                    else:
                        readable.append(self._view(address, length))
                if not flags & NEXT:
                    break
                left -= 1
                if not left or len(readable) + len(writable) >= VIRTIO_CHAIN_DESCRIPTORS_MAX:
                    raise RingError("endless chain of descriptors")
                if following >= limit:
                    raise RingError(f"invalid descriptor {following} (expected less than {limit})")
                index = following
        except BadAddress as error:
            raise RingError(f"buffer is not mapped: {error}") from None
        self._next = position + 1 & _MASK
        return head, readable, writable

    def pop_buffers(self, count: int, header: int) -> list[Buffer]:  # noqa: C901, PLR0915 - hot loop
        """Return the next available chains, at most ``count``, as buffers to write.

        Two layouts are those of Linux, before and since 6.3, and are read without a call: an
        indirect table of two parts, for header and payload, and one part for both.  What was read
        of a chain with another layout is discarded: :meth:`pop` reads the chain.
        """
        position, size, available = self._next, self._size, self._available
        ready = self._available_index - position & _MASK
        if ready < count:
            self._available_index = available[_INDEX]
            ready = self._available_index - position & _MASK
            if ready > size:
                raise RingError(f"available index jumps from {position} to {self._available_index}")
            count = min(count, ready)
        if not count:
            return []
        index = position & size - 1
        heads = available[_RING + index : _RING + min(index + count, size)].tolist()
        if len(heads) < count:
            heads += available[_RING : _RING + count - len(heads)].tolist()
        buffers: list[Buffer] = []
        descriptors, region = self._descriptors, self._memory.region
        start, end = 0, -1  # no region yet
        memory = descriptors
        try:
            for head in heads:
                if head < size:
                    address, length, flags, _ = _read_descriptor(descriptors, head << 4)
                    if flags == WRITE and length > header:
                        if not start <= address <= end - length:
                            start, memory = region(address, length)
                            end = start + len(memory)
                        address -= start
                        middle, length = address + header, length - header
                        buffers.append(
                            (
                                head,
                                memory[address:middle],
                                [memory[middle : middle + length]],
                                length,
                            )
                        )
                        continue
                    if flags == INDIRECT and length == _PAIR.size:
                        if not start <= address <= end - length:
                            start, memory = region(address, length)
                            end = start + len(memory)
                        address, length, flags, following, second, rest, last, _ = _read_pair(
                            memory, address - start
                        )
                        if (
                            flags == WRITE | NEXT and following == 1 and last == WRITE
                            and length == header and rest
                        ):  # fmt: skip
                            if not start <= address <= end - length:
                                start, memory = region(address, length)
                                end = start + len(memory)
                            address -= start
                            first = memory[address : address + length]
                            if not start <= second <= end - rest:
                                start, memory = region(second, rest)
                                end = start + len(memory)
                            second -= start
                            buffers.append((head, first, [memory[second : second + rest]], rest))
                            continue
                self._next = position + len(buffers) & _MASK
                chain = self.pop()
                assert chain is not None  # the driver's index is not read again
                buffers.append(split_header(chain, header))
        except BadAddress as error:
            raise RingError(f"buffer is not mapped: {error}") from None
        self._next = position + count & _MASK
        return buffers

    def rewind(self) -> None:
        """Make :meth:`pop` continue at the first chain that was popped and not pushed."""
        self._next = self._available_index = self._pushed

    def push(self, head: int, length: int) -> None:
        """Mark the chain ``head`` as used, with ``length`` bytes written to it."""
        self._elements[self._pushed & self._size - 1] = head | length << 32
        self._pushed = self._pushed + 1 & _MASK

    def push_all(self, used: Sequence[tuple[int, int]]) -> None:
        """Mark chains as used: the head of each, and the number of bytes written to it."""
        elements, mask, position = self._elements, self._size - 1, self._pushed
        for head, length in used:
            elements[position & mask] = head | length << 32
            position += 1
        self._pushed = position & _MASK

    def publish(self) -> bool:
        """Make pushed chains visible to the driver; return whether the driver must be notified."""
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
        """Request a kick after ``chains`` more chains; return whether a chain is available now."""
        if self._event_index:
            ahead = min(chains, self._size >> 1 or 1) - 1
            self._used[_RING + 4 * self._size] = self._next + ahead & _MASK
            fence()
        return self._available[_INDEX] != self._next
