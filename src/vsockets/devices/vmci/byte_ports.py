"""Datagrams through two I/O ports, one byte at a time: drivers before Linux 5.18.

To send, the driver writes the bytes of a datagram; the device submits it when it is complete.

To receive, the driver fills a buffer and then parses it: first one page; if a datagram in it is
cut off, the rest of the largest size, after moving the cut datagram to the front.  Where no
datagram begins, it continues at the next page of the buffer, and stops after the last.  A datagram
that starts in the middle of a read would be torn.  So this module follows the driver's reads, and
pads each with terminators once the queue was empty.
"""

from __future__ import annotations

from collections.abc import Callable

from .datagrams import HEADER, LARGEST, TERMINATOR

_PAGE = 4096
_FILLER = TERMINATOR[:1]  # every byte of a terminator but the size


class BytePorts:
    """State of both ports."""

    def __init__(self, submit: Callable[[bytes], int], take: Callable[[], bytes | None]) -> None:
        self._submit = submit
        self._take = take
        self.reset()

    def reset(self) -> None:
        """Discard partial datagrams of both directions."""
        self._sent = bytearray()
        self._start_read()
        self._rest = b""  # unread rest of the current datagram
        self._given = 0  # bytes of it that were read

    def _start_read(self) -> None:
        # size of the driver's current read, and its remaining bytes
        self._size = self._left = _PAGE
        self._ended = False  # the queue was empty; the driver stops after this read

    # From the guest

    def write(self, data: bytes) -> None:
        """Append bytes of a datagram; submit it when complete."""
        self._sent += data
        while len(self._sent) >= HEADER.size:
            size = HEADER.size + HEADER.unpack_from(self._sent)[4]
            if size > LARGEST:
                self._sent.clear()
                self._submit(b"")
                return
            if len(self._sent) < size:
                return
            datagram = bytes(self._sent[:size])
            del self._sent[:size]
            self._submit(datagram)

    # To the guest

    def read(self, count: int) -> bytes:
        """Return the next ``count`` bytes for the driver."""
        parts = []
        while count:
            part = self._read_part(min(count, self._left))
            parts.append(part)
            count -= len(part)
            self._left -= len(part)
            if not self._left:
                self._next_read()
        return b"".join(parts)

    def _read_part(self, count: int) -> bytes:
        if not self._rest and not self._ended and self._left >= HEADER.size:
            datagram = self._take()
            if datagram is None:
                self._ended = True
            else:
                self._rest = datagram + bytes(-len(datagram) % 8)
                self._given = 0
        if not self._rest:
            return _FILLER * count
        part, self._rest = self._rest[:count], self._rest[count:]
        self._given += len(part)
        return part

    def _next_read(self) -> None:
        if self._ended:
            self._start_read()
        elif self._rest:
            self._size = LARGEST
            self._left = LARGEST - self._given
        else:
            self._left = self._size
