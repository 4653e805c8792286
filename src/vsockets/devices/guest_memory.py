"""Guest memory that a device may access, and transfer between guest memory and sockets.

The guest, which is hostile, chooses every address and length.  :meth:`GuestMemory.view` checks each
range: it lies in one mapped region, or :class:`BadAddress` is raised.  Python's integers do not
overflow, and a memoryview is never longer than the checked range.

The guest can change its memory while the device reads.  So each value is read once into a Python
object, then checked, then used.

A monitor can truncate the file that backs its guest's memory.  The next access to guest memory then
raises SIGBUS, in any line of the device.  A signal handler of Python would run only after the
interrupted instruction, which never completes; so :func:`explain_lost_memory` installs a handler in
C.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import signal
import socket
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Sequence
from socket import MSG_DONTWAIT, MSG_NOSIGNAL

from .._linux.libc import libc
from .limits import DMA_REGIONS_MAX, IO_VECTORS_MAX

#: Guest physical addresses have 64 bits.
_ADDRESSES = 1 << 64


class BadAddress(Exception):
    """The guest gave an address range that is not in one mapped and writable region."""


class _Region:
    __slots__ = ("end", "start", "view", "writable")

    def __init__(self, start: int, size: int, view: memoryview | None, writable: bool) -> None:
        self.start = start
        self.end = start + size
        self.view = view
        self.writable = writable


class GuestMemory:
    """The mapped regions of guest physical memory, which do not overlap."""

    def __init__(self) -> None:
        self._regions: list[_Region] = []
        self._starts: list[int] = []
        self._deselect_region()

    def __len__(self) -> int:
        return len(self._regions)

    def map(self, address: int, size: int, writable: bool, fd: int | None, offset: int) -> None:
        """Map ``size`` bytes of the file ``fd``, from ``offset`` on, at the guest's ``address``.

        Without a file the region is reserved and cannot be accessed.  The caller keeps ownership
        of ``fd``.

        Raises OSError: EINVAL for an invalid range or a file that is too short, EEXIST when the
        region overlaps another, ENOSPC for too many regions.
        """
        if size <= 0 or address < 0 or address + size > _ADDRESSES:
            raise OSError(errno.EINVAL, f"invalid region of {size} bytes at {address:#x}")
        index = bisect_left(self._starts, address)
        before = self._regions[index - 1] if index else None
        after = self._regions[index] if index < len(self._regions) else None
        if (before and before.end > address) or (after and after.start < address + size):
            raise OSError(errno.EEXIST, f"the region at {address:#x} overlaps another")
        if len(self._regions) >= DMA_REGIONS_MAX:
            raise OSError(errno.ENOSPC, f"more than {DMA_REGIONS_MAX} regions")
        view = None
        if fd is not None:
            # Access beyond the end of the file would raise SIGBUS.
            if offset + size > os.fstat(fd).st_size:
                raise OSError(errno.EINVAL, "the region is longer than its file")
            access = mmap.PROT_READ | (mmap.PROT_WRITE if writable else 0)
            try:
                mapping = mmap.mmap(fd, size, mmap.MAP_SHARED, access, offset=offset)
            except ValueError as error:  # the file was truncated meanwhile
                raise OSError(errno.EINVAL, str(error)) from None
            view = memoryview(mapping)
        self._regions.insert(index, _Region(address, size, view, writable))
        self._starts.insert(index, address)

    def unmap(self, address: int, size: int) -> None:
        """Remove the region that has exactly this address and size.

        The memory stays mapped in this process until the last view of the region is released.

        Raises OSError(EINVAL) when no region has exactly this address and size.
        """
        index = bisect_left(self._starts, address)
        if index == len(self._regions) or self._regions[index].end != address + size:
            raise OSError(errno.EINVAL, f"no region of {size} bytes at {address:#x}")
        if self._starts[index] != address:
            raise OSError(errno.EINVAL, f"no region at {address:#x}")
        del self._regions[index], self._starts[index]
        self._deselect_region()

    def clear(self) -> None:
        """Remove all regions."""
        self._regions.clear()
        self._starts.clear()
        self._deselect_region()

    def view(self, address: int, size: int) -> memoryview:
        """Return a writable view of ``size`` bytes at ``address``.

        Raises BadAddress when the range does not lie in one writable region.
        """
        start = address - self._start
        if not 0 <= start <= start + size <= self._size:
            self._select_region(address, size)
            start = address - self._start
        return self._view[start : start + size]

    def region(self, address: int, size: int) -> tuple[int, memoryview]:
        """Return the region with ``size`` bytes at ``address``: its start, and a view of it.

        A caller that views many ranges checks each against the region itself, without a call.

        Raises BadAddress when the range does not lie in one writable region.
        """
        start = address - self._start
        if not 0 <= start <= start + size <= self._size:
            self._select_region(address, size)
        return self._start, self._view

    def _select_region(self, address: int, size: int) -> None:
        """Select the region with this range for :meth:`view`.

        The next range that a device views is mostly in the same region.

        Raises BadAddress when the range does not lie in one writable region.
        """
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


class PageList:
    """Pages of guest memory, of ``size`` bytes each, at the guest physical ``addresses``.

    All pages are checked at once.  Views of them are made when they are needed.  The memory stays
    mapped in this process as long as the list exists.

    Raises BadAddress when a page is not mapped.
    """

    def __init__(self, memory: GuestMemory, addresses: Sequence[int], size: int) -> None:
        self.addresses = addresses
        self.total_size = len(addresses) * size  #: size of all pages, in bytes
        self._size = size
        self._start = min(addresses)
        self._end = max(addresses) + size
        self._views: list[memoryview] | None = None
        try:
            self._whole = memory.view(self._start, self._end - self._start)
        except BadAddress:  # pages in several regions, or invalid ones
            self._views = [memory.view(address, size) for address in addresses]

    def __len__(self) -> int:
        return len(self.addresses)

    def view(self, index: int, length: int) -> memoryview:
        """Return a view of the first ``length`` bytes of a page."""
        if self._views is not None:
            return self._views[index][:length]
        start = self.addresses[index] - self._start
        return self._whole[start : start + length]

    def scatter(self, first: int, last: int) -> ScatterList:
        """Return the pages from index ``first`` to before ``last``, adjacent ones in one view."""
        if self._views is not None:
            return ScatterList(self._views[first:last])
        views: list[memoryview] = []
        whole, size, origin = self._whole, self._size, self._start
        start = end = self.addresses[first]
        for address in self.addresses[first:last]:
            if address != end:
                views.append(whole[start - origin : end - origin])
                start = address
            end = address + size
        views.append(whole[start - origin : end - origin])
        return ScatterList(views)

    def overlaps(self, address: int, size: int) -> bool:
        """Return whether a page overlaps the ``size`` bytes at ``address``."""
        end = address + size
        if address >= self._end or end <= self._start:
            return False
        return any(page < end and address < page + self._size for page in self.addresses)


class ScatterList:
    """Sequence of memory views, addressed as one range of bytes."""

    def __init__(self, views: Iterable[memoryview]) -> None:
        self._views = list(views)
        self._starts: list[int] = []
        size = 0
        for view in self._views:
            self._starts.append(size)
            size += len(view)
        self.size = size

    def window(self, start: int, length: int) -> Sequence[memoryview]:
        """Return views of ``length`` bytes from ``start`` on.

        At most IO_VECTORS_MAX views are returned, which one system call accepts; they may have
        fewer bytes.

        The caller ensures ``0 <= start``, ``0 < length`` and ``start + length <= size``.
        """
        first = bisect_right(self._starts, start) - 1
        last = bisect_left(self._starts, start + length)
        if last - first > IO_VECTORS_MAX:
            last = first + IO_VECTORS_MAX
            length = self._starts[last] - start
        views = self._views[first:last]
        # Trim the last view before the first: both may be the same view.
        views[-1] = views[-1][: start + length - self._starts[last - 1]]
        if self._starts[first] != start:
            views[0] = views[0][start - self._starts[first] :]
        return views


# Plain integers: an enum's | costs as much as a system call.
_SEND = int(MSG_DONTWAIT | MSG_NOSIGNAL)
_TAKE = int(MSG_DONTWAIT)


def push(sock: socket.socket, views: Sequence[memoryview]) -> int:
    """Send ``views`` as far as the socket has room; return the number of bytes sent, or 0.

    Raises ConnectionError when the peer has closed.
    """
    try:
        return sock.sendmsg(views, (), _SEND)
    except BlockingIOError:
        return 0


def pull(sock: socket.socket, views: Sequence[memoryview]) -> int | None:
    """Receive from ``sock`` into ``views``; return the number of bytes received.

    The result is None when no data is available, and 0 at end of file.  A reset connection counts
    as end of file.
    """
    try:
        return sock.recvmsg_into(views, 0, _TAKE)[0]
    except BlockingIOError:
        return None
    except ConnectionError:
        return 0


_TEXT = (
    b"vsock device: the guest's memory cannot be accessed (SIGBUS): the virtual machine's monitor"
    b" has truncated its file; the device ends\n"
)
_STDERR = 2

#: Exit status after SIGBUS, as a shell reports a program that was killed by this signal.
STATUS = 128 + signal.SIGBUS

_Handler = ctypes.CFUNCTYPE(None, ctypes.c_int)


def _end(number: int) -> None:
    # The interrupted access copies bytes and changes no object, so Python can run.
    os.write(_STDERR, _TEXT)
    os._exit(STATUS)


_HANDLER = _Handler(_end)


def explain_lost_memory() -> None:
    """Install a SIGBUS handler that prints one line to standard error and ends the process.

    Call this function before :func:`.sandbox.enter_sandbox`, which refuses executable memory.
    """
    set_handler = libc["signal"]
    set_handler.argtypes = (ctypes.c_int, _Handler)
    set_handler.restype = ctypes.c_void_p
    set_handler(signal.SIGBUS, _HANDLER)
