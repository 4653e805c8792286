"""Driver of a packed virtqueue, for a simulated guest."""

from __future__ import annotations

import os
from collections.abc import Sequence

from vsockets.devices.virtio.ring import DESCRIPTOR, INDIRECT, NEXT, WRITE, fence

from .virtio_driver import GUEST_BASE, Memory

_AVAILABLE, _USED = 1 << 7, 1 << 15
_AT = 2 << 16
_WRAP = 1 << 15


class PackedDriverRing:
    """A packed ring of ``size`` entries; see :class:`.virtio_driver.DriverRing`."""

    def __init__(
        self, memory: Memory, size: int, event_index: bool = True, indirect: bool = False
    ) -> None:
        self.size = size
        self.memory = memory
        self.event_index = event_index
        self.descriptors = memory.allocate(16 * size)
        #: The driver's event suppression, and the device's.
        self.available = memory.allocate(4)
        self.used = memory.allocate(4)
        self._words = memory.view[self.descriptors :][: 16 * size].cast("H")
        self._lengths = memory.view[self.descriptors :][: 16 * size].cast("I")
        self._ours = memory.view[self.available :][:4].cast("I")
        self._theirs = memory.view[self.used :][:4].cast("I")
        self._ids = list(range(size))
        self._counts: dict[int, int] = {}
        self._tables: list[int] | None = None
        if indirect:
            self._tables = [memory.allocate(32 * 16) for _ in range(size)]
        self._left = size
        self._pending: list[tuple[int, int]] = []  # first descriptors that are not published yet
        self.next = 0  #: positions increase without wrapping
        self._kicked = 0
        self.taken = 0
        self.kick = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self.error = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    @property
    def base(self) -> int:
        """Position at which the device begins, in vhost-user's form."""
        index, wrap = self._place(self.taken)
        half = index | (_WRAP if wrap else 0)
        return half | half << 16

    def start_at(self, position: int) -> None:
        """Begin at ``base``, as if the ring had been in use."""
        self.next = self._kicked = self.taken = position
        for at in range(position, position + self.size):
            index, wrap = self._place(at)
            self._words[index * 8 + 7] = 0 if wrap else _AVAILABLE | _USED
        if self.event_index:
            index, wrap = self._place(position)
            self._ours[0] = self._theirs[0] = index | (_WRAP if wrap else 0) | _AT

    def _place(self, position: int) -> tuple[int, bool]:
        lap, index = divmod(position, self.size)
        return index, not lap & 1

    def write_descriptor(self, index: int, address: int, length: int, flags: int, id: int) -> None:
        """Write a descriptor without any check."""
        at = self.descriptors + 16 * index
        DESCRIPTOR.pack_into(self.memory.view, at, address, length, id, flags)

    def has_room(self, parts: int) -> bool:
        """Return whether a chain of ``parts`` can be added."""
        return self._left >= (1 if self._tables is not None else parts)

    def add(self, parts: Sequence[tuple[int, int]], writable: bool) -> int:
        """Add a chain of ``parts``, offsets and lengths; return its id."""
        id = self._ids.pop()
        kind = WRITE if writable else 0
        if self._tables is not None:
            place = self._tables[id]
            for number, (offset, length) in enumerate(parts):
                DESCRIPTOR.pack_into(
                    self.memory.view, place + 16 * number, GUEST_BASE + offset, length, 0, kind
                )
            chain = [(GUEST_BASE + place, 16 * len(parts), INDIRECT)]
        else:
            last = len(parts) - 1
            chain = [
                (GUEST_BASE + offset, length, kind | (0 if number == last else NEXT))
                for number, (offset, length) in enumerate(parts)
            ]
        self._counts[id] = len(chain)
        self._left -= len(chain)
        for number, (address, length, flags) in enumerate(chain):
            index, wrap = self._place(self.next + number)
            # The first descriptor is published last.  Until then it has the state of the lap
            # before.
            before = 0 if wrap else _AVAILABLE | _USED
            flags |= _AVAILABLE if wrap else _USED
            shown = flags if number else before
            self.write_descriptor(index, address, length, shown, id)
            if not number:
                self._pending.append((index, flags))
        self.next += len(chain)
        return id

    def publish(self) -> bool:
        """Publish added chains; kick if the device requested it, and return whether."""
        old, new = self._kicked, self.next
        for index, flags in self._pending:
            self._words[index * 8 + 7] = flags
        self._pending.clear()
        fence()
        self._kicked = new
        wanted = self._theirs[0]
        wants = not wanted >> 16
        if wanted >= _AT:
            place = new // self.size * self.size + (wanted & _WRAP - 1)
            if bool(wanted & _WRAP) is not self._place(new)[1]:
                place -= self.size
            wants = old <= place < new
        if wants:
            os.eventfd_write(self.kick, 1)
        return wants

    def collect(self) -> list[tuple[int, int]]:
        """Return the chains used since the last call, and the numbers of bytes written."""
        used = []
        while self._is_used():
            index, _ = self._place(self.taken)
            id = self._words[index * 8 + 6]
            used.append((id, self._lengths[index * 4 + 2]))
            count = self._counts.pop(id)
            self.taken += count
            self._left += count
            self._ids.append(id)
        return used

    def _is_used(self) -> bool:
        index, wrap = self._place(self.taken)
        flags = self._words[index * 8 + 7]
        return bool(flags & _AVAILABLE) is bool(flags & _USED) is wrap and bool(self._counts)

    def enable_notification(self) -> bool:
        """Request a notification for the next used chain; return whether one exists already."""
        if self.event_index:
            index, wrap = self._place(self.taken)
            self._ours[0] = index | (_WRAP if wrap else 0) | _AT
            fence()
        return self._is_used()

    def close(self) -> None:
        """Close the eventfds."""
        for fd in (self.kick, self.call, self.error):
            os.close(fd)
