"""Datagrams through two buffers in guest memory.

Each buffer begins with a header: busy, operation, size, unused (32 bits each), and a 64-bit result.
The guest writes the address of a buffer to a register.  After sending, the guest polls the header
with interrupts off until busy is 0; for receiving, an interrupt announces that busy is 1.
"""

from __future__ import annotations

import contextlib
import struct
from collections import deque
from collections.abc import Callable

from ..guest_memory import BadAddress, GuestMemory, ScatterList
from .datagrams import HEADER, LARGEST, TERMINATOR, Code
from .limits import VMCI_SCATTER_ELEMENTS_MAX

_BUFFER = struct.Struct("<IIIIq")
_RESULT_AT = 16
_ELEMENT = struct.Struct("<QQ")

_INLINE, _SCATTERED = 0, 1


class DmaBuffers:
    """The buffers for sending and receiving, at the addresses that the guest wrote last."""

    def __init__(self, memory: GuestMemory) -> None:
        self._memory = memory
        self.reset()

    def reset(self) -> None:
        """Clear the upper 32 bits of both buffers' addresses."""
        self.out_high = self.in_high = 0

    def submit(self, low: int, run: Callable[[bytes], int]) -> None:
        """Call ``run`` with the datagram in the buffer, and store the result in the buffer.

        ``low`` is the lower half of the buffer's address.  If the buffer is invalid, ``run`` gets
        empty bytes.
        """
        try:
            header = self._memory.view(self.out_high | low, _BUFFER.size)
        except BadAddress:
            run(b"")
            return
        _, operation, size, _, _ = _BUFFER.unpack(bytes(header))
        data = b""
        if operation == _INLINE and HEADER.size <= size <= LARGEST:
            with contextlib.suppress(BadAddress):
                data = bytes(self._memory.view((self.out_high | low) + _BUFFER.size, size))
        result = run(data)
        header[_RESULT_AT:] = result.to_bytes(8, "little", signed=True)
        header[:4].cast("I")[0] = 0  # last, and in one store: the guest polls busy

    def deliver(self, low: int, waiting: deque[bytes], on_delivered: Callable[[int], None]) -> bool:
        """Move encoded datagrams from ``waiting`` to the guest's buffer, as many as fit whole.

        ``low`` is the lower half of the buffer's address.  ``on_delivered`` is called with the size
        in bytes of each datagram.  Return whether to interrupt the guest.
        """
        try:
            header = self._memory.view(self.in_high | low, _BUFFER.size)
            room = self._room(bytes(header), (self.in_high | low) + _BUFFER.size)
        except BadAddress:
            return False
        at = 0
        while waiting:
            size = len(waiting[0])
            padded = (size + 7) & ~7
            if at + padded > room.size:
                break
            _put(room, at, waiting.popleft())
            on_delivered(size)
            at += padded
        if at + len(TERMINATOR) <= room.size:
            _put(room, at, TERMINATOR)
        header[_RESULT_AT:] = Code.SUCCESS.to_bytes(8, "little")
        header[:4].cast("I")[0] = 1
        return True

    def _room(self, header: bytes, elements_at: int) -> ScatterList:
        _, operation, count, _, _ = _BUFFER.unpack(header)
        if operation != _SCATTERED or not 0 < count <= VMCI_SCATTER_ELEMENTS_MAX:
            raise BadAddress(f"buffer with an invalid number of elements: {count}")
        elements = bytes(self._memory.view(elements_at, count * _ELEMENT.size))
        left = LARGEST
        views = []
        for address, size in _ELEMENT.iter_unpack(elements):
            size = min(size, left)
            left -= size
            if size:
                views.append(self._memory.view(address, size))
        return ScatterList(views)


def _put(room: ScatterList, at: int, data: bytes) -> None:
    done = 0
    for view in room.window(at, len(data)):
        view[:] = data[done : done + len(view)]
        done += len(view)
