"""Queue pairs: two rings in guest pages, one for each direction.

The guest lists the pages: a header and the data of its produce queue, then the same for its
consume queue.  Each side's two indices, the tail of its produce queue and the head of its consume
queue, are in the header of *its own* produce queue; the device's are thus in the guest's consume
header.  Indices run from 0 to size - 1; equal indices mean empty, so a ring holds size - 1 bytes.

The guest can write any part at any time.  So the device keeps its own indices outside of guest
memory and copies them to the headers; a guest's index is read once for each decision, as one
aligned 64-bit load, and must be less than the size.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

from ..guest_memory import GuestMemory, PageList, ScatterList
from ..limits import IO_VECTORS_MAX
from .packets import Handle

_TAIL, _HEAD = 1, 2  #: 64-bit words of a header; word 0 is the handle
_HEADER = struct.Struct("<IIQQ")  #: of a queue: handle, tail, head
_HEADER_BYTES = _HEADER.size

#: Lock whose acquire and release order the device's store of its index before its load of the
#: guest's index.
_fence = threading.Lock()


class BrokenQueue(Exception):
    """The guest wrote a queue index that is out of range."""


class _Data:
    """The data of one queue: ``size`` bytes in the pages from index ``first`` to before ``last``.

    Views of the pages are made at the first transfer: a connect without payload, or a stream in one
    direction, needs none.
    """

    def __init__(self, pages: PageList, first: int, last: int, size: int) -> None:
        self._pages, self._first, self._last = pages, first, last
        self._size = size
        self._views: ScatterList | None = None

    def window(self, start: int, length: int) -> Sequence[memoryview]:
        """Return views of the ``length`` bytes from ``start`` on, or of fewer bytes.

        The range may continue at the start of the queue.
        """
        views, size = self._views, self._size
        if views is None:
            views = self._views = self._pages.scatter(self._first, self._last)
        if start + length <= size:
            return views.window(start, length)
        first = views.window(start, size - start)
        if sum(map(len, first)) < size - start:  # as many buffers as one system call takes
            return first
        second = views.window(0, length - (size - start))
        return [*first, *second][:IO_VECTORS_MAX]


class Inbound:
    """The guest's produce queue, from which the device consumes data."""

    def __init__(self, data: _Data, size: int, theirs: memoryview, ours: memoryview) -> None:
        self._data = data
        self.size = size
        self._theirs, self._ours = theirs, ours
        self._head = 0
        self._published = 0
        self.moved = 0  #: bytes consumed so far

    def ready(self) -> int:
        """Return the number of bytes that the device can consume.

        Raises BrokenQueue when the guest's index is out of range.
        """
        tail: int = self._theirs[_TAIL]
        if tail >= self.size:
            raise BrokenQueue(f"invalid tail {tail} (expected less than {self.size})")
        ready = tail - self._head
        return ready if ready >= 0 else ready + self.size

    def window(self, length: int) -> Sequence[memoryview]:
        """Return views of the next ``length`` bytes to consume, or of fewer bytes.

        The caller ensures ``0 < length <= ready()``.
        """
        return self._data.window(self._head, length)

    def consume(self, count: int) -> None:
        """Advance the device's position by ``count`` bytes; :meth:`publish` announces it."""
        self.moved += count
        head = self._head + count
        self._head = head if head < self.size else head - self.size

    def publish(self, all_but: int = 0) -> bool:
        """Publish the device's position to the guest, less the last ``all_but`` bytes.

        Return whether the queue was full before, in which case the guest may wait for room.
        """
        head = (self._head - all_but) % self.size
        freed = (head - self._published) % self.size
        if not freed:
            return False
        self._ours[_HEAD] = self._published = head
        with _fence:
            tail: int = self._theirs[_TAIL]
        return (head - tail - 1) % self.size <= freed

    @property
    def position(self) -> int:
        """The device's position in the queue, as a byte offset."""
        return self._head


class Outbound:
    """The guest's consume queue, to which the device writes data."""

    def __init__(self, data: _Data, size: int, theirs: memoryview, ours: memoryview) -> None:
        self._data = data
        self.size = size
        self._theirs, self._ours = theirs, ours
        self._tail = 0
        self.moved = 0  #: bytes produced so far

    def free(self) -> int:
        """Return the number of bytes for which the queue has room.

        Raises BrokenQueue when the guest's index is out of range.
        """
        free = self._head() - self._tail - 1
        return free if free >= 0 else free + self.size

    @property
    def position(self) -> int:
        """The device's position in the queue, as a byte offset."""
        return self._tail

    @property
    def consumed(self) -> int:
        """The guest's position in the queue, as a byte offset.

        Raises BrokenQueue when the guest's index is out of range.
        """
        return self._head()

    @property
    def is_empty(self) -> bool:
        """Flag: true while the guest has consumed all data in the queue.

        Raises BrokenQueue when the guest's index is out of range.
        """
        return self._head() == self._tail

    def window(self, length: int) -> Sequence[memoryview]:
        """Return views to fill with the next ``length`` bytes, or with fewer bytes.

        The caller ensures ``0 < length <= free()``.
        """
        return self._data.window(self._tail, length)

    def produce(self, count: int) -> bool:
        """Publish ``count`` bytes, which the caller has written to a :meth:`window`, to the guest.

        Return whether the queue was empty before, in which case the guest may wait for data.

        Raises BrokenQueue when the guest's index is out of range.
        """
        self.moved += count
        tail = self._tail + count
        self._tail = tail if tail < self.size else tail - self.size
        self._ours[_TAIL] = self._tail
        with _fence:
            head = self._head()
        return (self._tail - head) % self.size <= count

    def _head(self) -> int:
        head: int = self._theirs[_HEAD]
        if head >= self.size:
            raise BrokenQueue(f"invalid head {head} (expected less than {self.size})")
        return head


class QueuePair:
    """Queue pair: the queues of both directions, in pages of guest memory."""

    def __init__(
        self,
        memory: GuestMemory,
        handle: Handle,
        peer: int,
        produce_size: int,
        consume_size: int,
        pages: Sequence[int],
        page_size: int,
    ) -> None:
        """Create views of the queues, and initialize their headers.

        Sizes are in bytes, ``peer`` is a CID.  ``pages`` are guest physical addresses, as many as
        :func:`page_count` returns.

        Raises BadAddress when a page is not mapped.
        """
        self.handle = handle
        self.peer = peer  #: the context at the other end, as the guest claims
        self.sizes = produce_size, consume_size
        self.pages = PageList(memory, pages, page_size)
        second = -(-produce_size // page_size) + 1
        headers = [self.pages.view(index, _HEADER_BYTES) for index in (0, second)]
        for header in headers:
            header[:] = _HEADER.pack(*handle, 0, 0)
        theirs, ours = (header.cast("Q") for header in headers)
        produced = _Data(self.pages, 1, second, produce_size)
        consumed = _Data(self.pages, second + 1, len(pages), consume_size)
        self.inbound = Inbound(produced, produce_size, theirs, ours)
        self.outbound = Outbound(consumed, consume_size, theirs, ours)


def page_count(produce_size: int, consume_size: int, page_size: int) -> int:
    """Return the number of pages of a queue pair, both headers included; sizes are in bytes."""
    return -(-produce_size // page_size) + -(-consume_size // page_size) + 2
