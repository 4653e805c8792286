"""Datagrams through two I/O ports, a byte at a time: drivers before Linux 5.18.

Sending is simple: when the bytes of a datagram are complete, it is run.

Receiving, the driver reads into a buffer of its own and looks at it afterwards: one page
first; if a datagram in it is cut off, what is left of the largest size, with the cut one moved
to the front.  Where no datagram begins it looks for one at the next page of the buffer, and
stops after the last.  A datagram that came in the middle of that would be torn.  So the reads
are followed here as the driver makes them, and filled up once there was nothing to give.
"""

from __future__ import annotations

from collections.abc import Callable

from .datagrams import HEADER, LARGEST, TERMINATOR

_PAGE = 4096
_FILLER = TERMINATOR[:1]  # every byte of a terminator but the size is this


class BytePorts:
    """Both ports."""

    def __init__(self, submit: Callable[[bytes], int], take: Callable[[], bytes | None]) -> None:
        self._submit = submit
        self._take = take
        self.reset()

    def reset(self) -> None:
        """Nothing was begun."""
        self._sent = bytearray()
        self._start_read()
        self._rest = b""  # of the datagram that is being read
        self._given = 0  # bytes of it that were read

    def _start_read(self) -> None:
        self._size = self._left = _PAGE  # of the read the driver makes, and what is left of it
        self._ended = False  # there was nothing more; the driver stops after this read

    # From the guest

    def write(self, data: bytes) -> None:
        """Bytes of a datagram."""
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
        """The next ``count`` bytes."""
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
