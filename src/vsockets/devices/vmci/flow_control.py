"""Flow control over a queue pair: when a side must tell the other that it may go on.

A side that finds nothing to read, or no room to write, sleeps, and must be told.

With *queue state* whoever ends that state tells: a WROTE by who writes into an empty queue, a
READ by who reads from a full one.  Both see the queue, so neither needs to ask.

In the older way a side asks (WAITING_READ, WAITING_WRITE) and is told once.
"""

from __future__ import annotations

from collections.abc import Callable

from .packets import Kind

#: Sends a packet: its kind, and two numbers.
Send = Callable[[Kind, int, int], None]


class QueueState:
    """Flow control since Linux has vSockets, and VMware's for longer."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def on_produced(self, was_empty: bool, position: int) -> None:
        """We have produced."""
        if was_empty:
            self._send(Kind.WROTE, 0, 0)

    def on_consumed(self, was_full: bool, position: int) -> None:
        """We have consumed, and said so."""
        if was_full:
            self._send(Kind.READ, 0, 0)

    def on_empty(self) -> None:
        """There is nothing to read."""

    def on_full(self) -> None:
        """There is no room to write."""

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """A packet about flow.  ``can_read``, ``can_write``: whether the guest can, now."""


class QueueNotifications:
    """The older one."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._reader_waits = self._writer_waits = False
        self._data_requested = self._room_requested = False
        # How often each queue was gone through: a position is a generation and an offset.
        self._read_to = self._wrote_to = (0, 0)

    def on_produced(self, was_empty: bool, position: int) -> None:
        """We have produced, up to ``position`` in the queue."""
        self._wrote_to = _advance(self._wrote_to, position)
        if self._reader_waits:
            self._reader_waits = False
            self._send(Kind.WROTE, 0, 0)

    def on_consumed(self, was_full: bool, position: int) -> None:
        """We have consumed, up to ``position`` in the queue."""
        self._read_to = _advance(self._read_to, position)
        if self._writer_waits:
            self._writer_waits = False
            self._send(Kind.READ, 0, 0)

    def on_empty(self) -> None:
        """There is nothing to read."""
        if not self._data_requested:
            self._data_requested = True
            generation, offset = self._read_to
            self._send(Kind.WAITING_READ, generation, offset + 1)

    def on_full(self) -> None:
        """There is no room to write."""
        if not self._room_requested:
            self._room_requested = True
            generation, offset = self._wrote_to
            self._send(Kind.WAITING_WRITE, generation, offset + 2)

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """A packet about flow.  ``can_read``, ``can_write``: whether the guest can, now."""
        if kind == Kind.WROTE:
            self._data_requested = False
        elif kind == Kind.READ:
            self._room_requested = False
        elif kind == Kind.WAITING_READ:
            self._reader_waits = not can_read
            if can_read:
                self._send(Kind.WROTE, 0, 0)
        elif kind == Kind.WAITING_WRITE:
            self._writer_waits = not can_write
            if can_write:
                self._send(Kind.READ, 0, 0)


def _advance(at: tuple[int, int], position: int) -> tuple[int, int]:
    generation, offset = at
    return generation + (position < offset), position
