"""Flow control over a queue pair: when to notify the other side.

A side that finds no data, or no room, sleeps until it is notified.

With *queue state* the side that ends such a state notifies: WROTE after writing to an empty queue,
READ after reading from a full one.  Both sides see the queue, so neither needs to ask.

In version 1 of the protocol a side asks (WAITING_READ, WAITING_WRITE) and is notified once.

Notifications must not overtake the device's ATTACH: see :class:`AttachOrdering`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..loop import DeviceLoop
from .limits import VMCI_ATTACH_HOLD_SECONDS
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


class AttachOrdering:
    """Queue of packets to ``send``, in order, until the guest has handled the ATTACH.

    Linux's driver handles packets of a socket that is in use in separate work items, which can
    overtake each other.  A socket that is still connecting fails with EPROTO when it sees a WROTE
    or SHUTDOWN. So packets after the device's ATTACH wait until the guest has sent a packet on the
    stream, or for :data:`VMCI_ATTACH_HOLD_SECONDS`.
    """

    def __init__(self, loop: DeviceLoop, send: Send) -> None:
        self._send = send
        #: each once: a second WROTE adds nothing to the first
        self._held: dict[tuple[Kind, int, int], None] | None = {}
        loop.call_later(VMCI_ATTACH_HOLD_SECONDS, self.release)

    def send(self, kind: Kind, value: int, offset: int) -> None:
        """Send a packet, now or after the ATTACH was handled."""
        if self._held is None:
            self._send(kind, value, offset)
        else:
            self._held[kind, value, offset] = None

    def release(self) -> None:
        """Send the queued packets: the guest has handled the ATTACH."""
        if self._held is not None:
            held, self._held = self._held, None
            for packet in held:
                self._send(*packet)

    def discard(self) -> None:
        """Discard the queued packets: the stream has ended."""
        self._held = None
