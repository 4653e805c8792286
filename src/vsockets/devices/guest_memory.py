"""The guest's memory, as far as a device was given it.

Every address and length here was written by the guest, which is hostile.  All of them pass
:meth:`GuestMemory.view`: the whole range lies in one region that is mapped now, or it is
:class:`BadAddress`.  Python's integers do not overflow, and a memoryview is never longer than
what was checked.

The memory goes on changing while it is looked at.  So what is read from it is read once, into
a value of our own, then checked, then used.
"""

from __future__ import annotations

import errno
import mmap
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence

from .limits import DMA_REGIONS_MAX, IO_VECTORS_MAX

#: Guest physical addresses have 64 bits.
_ADDRESSES = 1 << 64


class BadAddress(Exception):
    """The guest named memory that it does not have, or not for that."""


class _Region:
    __slots__ = ("end", "start", "view", "writable")

    def __init__(self, start: int, size: int, view: memoryview | None, writable: bool) -> None:
        self.start = start
        self.end = start + size
        self.view = view
        self.writable = writable


class GuestMemory:
    """Regions of guest physical addresses, none overlapping another."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._deselect_region()

    def __len__(self) -> int:
        return len(self._regions)

    def map(self, address: int, size: int, writable: bool, fd: int | None, offset: int) -> None:
        """Add ``size`` bytes at ``address``: those of the file ``fd`` from ``offset`` on.

        Without a file the region is known and cannot be accessed.  ``fd`` stays the caller's.
        OSError: EINVAL (no such range, or the file is shorter), EEXIST (it overlaps), ENOSPC.
        """
        if size <= 0 or address < 0 or address + size > _ADDRESSES:
            raise OSError(errno.EINVAL, f"a region of {size} bytes at {address:#x}")
        index = bisect_left(self._starts, address)
        before = self._regions[index - 1] if index else None
        after = self._regions[index] if index < len(self._regions) else None
        if (before and before.end > address) or (after and after.start < address + size):
            raise OSError(errno.EEXIST, f"the region at {address:#x} overlaps another")
        if len(self._regions) >= DMA_REGIONS_MAX:
            raise OSError(errno.ENOSPC, f"more than {DMA_REGIONS_MAX} regions")
        view = None
        if fd is not None:
            # Memory beyond the file's end would be a deadly signal on access.
            if offset + size > os.fstat(fd).st_size:
                raise OSError(errno.EINVAL, "the region is longer than its file")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            try:
                mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, access, offset=offset)
            except ValueError as error:  # the file has become shorter since
                raise OSError(errno.EINVAL, str(error)) from None
            view = memoryview(mapping)
        self._regions.insert(index, _Region(address, size, view, writable))
        self._starts.insert(index, address)

    def unmap(self, address: int, size: int) -> None:
        """Remove the region that is exactly this; OSError EINVAL when there is none.

        The memory stays ours as long as somebody has a view of it.
        """
        index = bisect_left(self._starts, address)
        if index == len(self._regions) or self._regions[index].end != address + size:
            raise OSError(errno.EINVAL, f"no region of {size} bytes at {address:#x}")
        if self._starts[index] != address:
            raise OSError(errno.EINVAL, f"no region at {address:#x}")
        del self._regions[index], self._starts[index]
        self._deselect_region()

    def clear(self) -> None:
        """Remove every region."""
        self._regions.clear()
        self._starts.clear()
        self._deselect_region()

    def view(self, address: int, size: int) -> memoryview:
        """The ``size`` bytes at ``address``, to read and write.  BadAddress."""
        start = address - self._start
        if not 0 <= start <= start + size <= self._size:
            self._select_region(address, size)
            start = address - self._start
        return self._view[start : start + size]

    def _select_region(self, address: int, size: int) -> None:
        """Take the region in which this is for the one where the next view is, as it mostly is."""
        index = bisect_right(self._starts, address) - 1
        if index >= 0 and size >= 0:
            region = self._regions[index]
            if address + size <= region.end and region.view is not None and region.writable:
                self._start, self._size = region.start, len(region.view)
                self._view = region.view
                return
        raise BadAddress(f"{size} bytes at {address:#x}")

    def _deselect_region(self) -> None:
        self._start, self._size = -1, 0
        self._view = memoryview(b"")


class ScatterList:
    """Bytes that lie scattered over guest memory, as if they lay in a row."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = list(views)
        self._starts: list[int] = []
        size = 0
        for view in self._views:
            self._starts.append(size)
            size += len(view)
        self.size = size

    def window(self, start: int, length: int) -> Sequence[memoryview]:
        """The ``length`` bytes from ``start`` on, or as many of them as one system call takes.

        The caller keeps ``0 <= start``, ``0 < length`` and ``start + length <= size``.
        """
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, start + length)
        if last - first > IO_VECTORS_MAX:
            last = first + IO_VECTORS_MAX
            length = self._starts[last] - start
        views = self._views[first:last]
        # The last one first: it may be the first one, too.
        views[-1] = views[-1][: start + length - self._starts[last - 1]]
        if self._starts[first] != start:
            views[0] = views[0][start - self._starts[first] :]
        return views
