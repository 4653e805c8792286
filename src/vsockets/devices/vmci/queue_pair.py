"""Queue pairs: two rings in the guest's pages, one for each direction.

The guest lists the pages: a header and the data of what it produces, then the same for what it
consumes.  Each side's two indices, the tail of what it produces and the head of what it
consumes, are in the header of *its own* produce queue; so ours are in the guest's consume
header.  Indices run from 0 to size - 1; equal ones mean empty, so a ring holds size - 1 bytes.

The guest can write anything anywhere here at any time.  Our own indices are therefore kept
here, and only copied there; the guest's are read once for each decision, as one aligned
64-bit load, and must be less than the size.
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Sequence

from ..guest_memory import BadAddress, GuestMemory, ScatterList
from ..limits import IO_VECTORS_MAX
from .datagrams import Handle

_TAIL, _HEAD = 1, 2  #: 64-bit words of a header; word 0 is the handle
_HEADER_BYTES = 24

#: An acquire and release orders our store of an index before our load of the guest's.
_fence = threading.Lock()


class BrokenQueue(Exception):
    """The guest's index is none."""


class Inbound:
    """What the guest produces and we consume."""

    def __init__(self, data: ScatterList, size: int, theirs: memoryview, ours: memoryview) -> None:
        self._data = data
        self.size = size
        self._theirs, self._ours = theirs, ours
        self._head = 0
        self._published = 0

    def ready(self) -> int:
        """How many bytes there are to consume.  BrokenQueue."""
        tail: int = self._theirs[_TAIL]
        if tail >= self.size:
            raise BrokenQueue(f"tail {tail} of {self.size}")
        ready = tail - self._head
        return ready if ready >= 0 else ready + self.size

    def window(self, length: int) -> Sequence[memoryview]:
        """The next ``length`` bytes, or fewer; ``0 < length <= ready()``."""
        return _window(self._data, self.size, self._head, length)

    def consume(self, count: int) -> None:
        """Have done with ``count`` bytes; the guest learns it from :meth:`publish`."""
        head = self._head + count
        self._head = head if head < self.size else head - self.size

    def publish(self, all_but: int = 0) -> bool:
        """Tell the guest what was consumed, but for the last ``all_but`` bytes.

        Returns whether the queue was full before, so that the guest may wait for room.
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
        """Where in the queue we are."""
        return self._head


class Outbound:
    """What we produce and the guest consumes."""

    def __init__(self, data: ScatterList, size: int, theirs: memoryview, ours: memoryview) -> None:
        self._data = data
        self.size = size
        self._theirs, self._ours = theirs, ours
        self._tail = 0

    def free(self) -> int:
        """How many bytes there is room for.  BrokenQueue."""
        free = self._head() - self._tail - 1
        return free if free >= 0 else free + self.size

    @property
    def position(self) -> int:
        """Where in the queue we are."""
        return self._tail

    @property
    def consumed(self) -> int:
        """Where in the queue the guest is.  BrokenQueue."""
        return self._head()

    @property
    def is_empty(self) -> bool:
        """Whether the guest has consumed everything.  BrokenQueue."""
        return self._head() == self._tail

    def window(self, length: int) -> Sequence[memoryview]:
        """Where the next ``length`` bytes go, or fewer; ``0 < length <= free()``."""
        return _window(self._data, self.size, self._tail, length)

    def produce(self, count: int) -> bool:
        """``count`` bytes are there.  Returns whether the queue was empty before, so that the
        guest may wait for data.  BrokenQueue.
        """
        tail = self._tail + count
        self._tail = tail if tail < self.size else tail - self.size
        self._ours[_TAIL] = self._tail
        with _fence:
            head = self._head()
        return (self._tail - head) % self.size <= count

    def _head(self) -> int:
        head: int = self._theirs[_HEAD]
        if head >= self.size:
            raise BrokenQueue(f"head {head} of {self.size}")
        return head


class QueuePair:
    """Both directions, and the guest's pages they are made of."""

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
        """BadAddress when a page is not the guest's.  There are as many ``pages``, by their
        addresses, as :func:`pages_of` says.
        """
        self.handle = handle
        self.peer = peer  #: the context at the other end, as the guest says
        self.sizes = produce_size, consume_size
        self.pages = -(-produce_size // page_size) + -(-consume_size // page_size) + 2
        second = -(-produce_size // page_size) + 1
        headers = [memory.view(pages[place], page_size) for place in (0, second)]
        produced = _runs(memory, pages[1:second], page_size)
        consumed = _runs(memory, pages[second + 1 :], page_size)
        for header in headers:
            header[:_HEADER_BYTES] = struct.pack("<IIQQ", *handle, 0, 0)
        theirs, ours = (header[:_HEADER_BYTES].cast("Q") for header in headers)
        self.inbound = Inbound(produced, produce_size, theirs, ours)
        self.outbound = Outbound(consumed, consume_size, theirs, ours)
        self._spans = _spans(pages, page_size)

    def overlaps(self, address: int, size: int) -> bool:
        """Whether any of its pages is in this range."""
        return any(start < address + size and address < end for start, end in self._spans)


def page_count(produce_size: int, consume_size: int, page_size: int) -> int:
    """How many pages a queue pair of these sizes has, both headers included."""
    return -(-produce_size // page_size) + -(-consume_size // page_size) + 2


def _spans(pages: Sequence[int], page_size: int) -> list[tuple[int, int]]:
    """Runs of pages that follow each other: address and end."""
    spans: list[tuple[int, int]] = []
    for page in pages:
        if spans and spans[-1][1] == page:
            spans[-1] = spans[-1][0], page + page_size
        else:
            spans.append((page, page + page_size))
    return spans


def _runs(memory: GuestMemory, pages: Sequence[int], page_size: int) -> ScatterList:
    views = []
    for start, end in _spans(pages, page_size):
        try:
            views.append(memory.view(start, end - start))
        except BadAddress:  # as one; perhaps the run crosses from one region to the next
            views += [memory.view(page, page_size) for page in range(start, end, page_size)]
    return ScatterList(views)


def _window(data: ScatterList, size: int, start: int, length: int) -> Sequence[memoryview]:
    if start + length <= size:
        return data.window(start, length)
    first = data.window(start, size - start)
    if sum(map(len, first)) < size - start:  # as many buffers as a system call takes
        return first
    second = data.window(0, length - (size - start))
    return [*first, *second][:IO_VECTORS_MAX]
