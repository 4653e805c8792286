"""Interface and common parts of split and packed virtqueues."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Protocol

from ..guest_memory import BadAddress, GuestMemory
from .limits import VIRTIO_CHAIN_DESCRIPTORS_MAX

# Feature bits of all virtio devices (virtio 1.3, chapter 6).
F_RING_INDIRECT_DESC = 1 << 28
F_RING_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

# Flags of a descriptor.
NEXT, WRITE, INDIRECT = 1, 2, 4

DESCRIPTOR = struct.Struct("<QIHH")  #: address, length, flags, next (split) or: id, flags

#: A chain that the driver made available: the ring's identifier for it (its head), the parts to
#: read, the parts to write.  A plain tuple: one is made for every packet.
Chain = tuple[int, list[memoryview], list[memoryview]]

_fence_lock = threading.Lock()


class RingError(Exception):
    """The driver violated the rules of the ring, which must not be used any longer."""


class Ring(Protocol):
    """A virtqueue, device side.

    Methods raise RingError when the driver violated the rules.
    """

    def pop(self) -> Chain | None:
        """Return the next available chain, or None."""

    def rewind(self) -> None:
        """Return to the first chain that was popped and not pushed."""

    def push(self, head: int, length: int) -> None:
        """Mark a chain as used, with ``length`` bytes written; in the order of :meth:`pop`."""

    def publish(self) -> bool:
        """Make pushed chains visible to the driver; return whether it expects a notification."""

    def enable_notification(self, chains: int = 1) -> bool:
        """Request a kick; return whether a chain is available now.

        The kick is due once ``chains`` more chains are available; it may come earlier.
        """

    @property
    def base(self) -> int:
        """Position at which to resume, in the form of vhost-user's ring base."""


def fence() -> None:
    """Order earlier stores before later loads, as the driver sees them.

    x86 and all others let a load overtake a store; taking a lock is a barrier on all of them.
    """
    with _fence_lock:
        pass


def ring_view(memory: GuestMemory, address: int, size: int, alignment: int) -> memoryview:
    """Return a view of a part of a ring.

    Raises RingError when it is not mapped or not aligned.
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
    """Return a view of an indirect descriptor table.

    Raises RingError when its length is invalid or it is not mapped.
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
