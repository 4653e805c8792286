"""Flow control over a queue pair: when to notify the other side.

A side that finds no data, or no room, sleeps until it is notified.

With *queue state* the side that ends such a state notifies: WROTE after writing to an empty queue,
READ after reading from a full one.  Both sides see the queue, so neither needs to ask.

In version 1 of the protocol a side asks (WAITING_READ, WAITING_WRITE) and is notified once.
"""

from __future__ import annotations

from collections.abc import Callable

from .packets import Kind

#: Sends a packet: its kind, and two numbers.
Send = Callable[[Kind, int, int], None]


class QueueState:
    """Flow control by queue state, as Linux has used it from its first vSockets on."""

    def __init__(self, send: Send) -> None:
        self._send = send

    def on_produced(self, was_empty: bool, position: int) -> None:
        """Notify the guest if the queue was empty before data was produced."""
        if was_empty:
            self._send(Kind.WROTE, 0, 0)

    def on_consumed(self, was_full: bool, position: int) -> None:
        """Notify the guest if the queue was full before data was consumed."""
        if was_full:
            self._send(Kind.READ, 0, 0)

    def on_empty(self) -> None:
        """Handle an empty queue."""

    def on_full(self) -> None:
        """Handle a full queue."""

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """Handle a packet of flow control, given what the guest can do now."""


class QueueNotifications:
    """Flow control of version 1: notifications on request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._reader_waits = self._writer_waits = False
        self._data_requested = self._room_requested = False
        # Positions in both queues: generation (number of passes) and offset.
        self._read_to = self._wrote_to = (0, 0)

    def on_produced(self, was_empty: bool, position: int) -> None:
        """Notify a waiting guest of data up to ``position`` in the queue."""
        self._wrote_to = _advance(self._wrote_to, position)
        if self._reader_waits:
            self._reader_waits = False
            self._send(Kind.WROTE, 0, 0)

    def on_consumed(self, was_full: bool, position: int) -> None:
        """Notify a waiting guest of room up to ``position`` in the queue."""
        self._read_to = _advance(self._read_to, position)
        if self._writer_waits:
            self._writer_waits = False
            self._send(Kind.READ, 0, 0)

    def on_empty(self) -> None:
        """Handle an empty queue."""
        if not self._data_requested:
            self._data_requested = True
            generation, offset = self._read_to
            self._send(Kind.WAITING_READ, generation, offset + 1)

    def on_full(self) -> None:
        """Handle a full queue."""
        if not self._room_requested:
            self._room_requested = True
            generation, offset = self._wrote_to
            self._send(Kind.WAITING_WRITE, generation, offset + 2)

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """Handle a packet of flow control, given what the guest can do now."""
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
