"""What split and packed virtqueues have in common."""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence
from typing import Protocol

from ..guest_memory import BadAddress, GuestMemory
from .limits import VIRTIO_CHAIN_DESCRIPTORS_MAX

# Feature bits every virtio device may offer (virtio 1.3, chapter 6).
F_RING_INDIRECT_DESC = 1 << 28
F_RING_EVENT_IDX = 1 << 29
F_VERSION_1 = 1 << 32
F_RING_PACKED = 1 << 34
F_IN_ORDER = 1 << 35

# Flags of a descriptor.
NEXT, WRITE, INDIRECT = 1, 2, 4

DESCRIPTOR = struct.Struct("<QIHH")  #: address, length, flags, next (split) or: id, flags

#: What a driver made available: the ring's own note of it, the parts the device reads, the
#: parts it writes.  A plain tuple: there is one for every packet.
Chain = tuple[int, list[memoryview], list[memoryview]]

_fence_lock = threading.Lock()


class RingError(Exception):
    """The driver broke the ring: it must not be used any more."""


class Ring(Protocol):
    """One virtqueue, from the device's side.  RingError whenever the driver broke it."""

    def pop(self) -> Chain | None:
        """The next buffers of the driver, None when there are no more."""

    def rewind(self) -> None:
        """What was popped and not pushed will be popped again."""

    def push(self, head: int, length: int) -> None:
        """Give back a chain, with ``length`` bytes written; in the order they were popped."""

    def publish(self) -> bool:
        """Let the driver see what was pushed; returns whether it wants to be told."""

    def enable_notification(self, chains: int = 1) -> bool:
        """Ask for a kick when there are so many more chains; returns whether there is one already.

        It may come earlier.
        """

    @property
    def base(self) -> int:
        """Where to go on, as vhost-user says it."""


def fence() -> None:
    """Make what was stored visible to the driver before what is loaded next.

    x86 and all others let a load overtake a store; taking a lock is a barrier on each of them.
    """
    with _fence_lock:
        pass


def ring_view(memory: GuestMemory, address: int, size: int, alignment: int) -> memoryview:
    """A part of a ring.  RingError when it is not in memory, or not aligned."""
    if address % alignment:
        raise RingError(f"a part of the ring at {address:#x}: not a multiple of {alignment}")
    try:
        return memory.view(address, size)
    except BadAddress as error:
        raise RingError(f"a part of the ring is not in memory: {error}") from None


def indirect_table(memory: GuestMemory, address: int, length: int) -> memoryview:
    """An indirect descriptor table."""
    if (
        not length
        or length % DESCRIPTOR.size
        or length > VIRTIO_CHAIN_DESCRIPTORS_MAX * DESCRIPTOR.size
    ):
        raise RingError(f"an indirect table of {length} bytes")
    try:
        return memory.view(address, length)
    except BadAddress as error:
        raise RingError(f"an indirect table is not in memory: {error}") from None


def total_length(parts: Sequence[memoryview]) -> int:
    """Bytes of all parts."""
    return sum(map(len, parts))
