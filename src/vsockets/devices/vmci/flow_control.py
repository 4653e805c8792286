"""Flow control over a queue pair: notifications of data and of room.

A side that finds no data, or no room, sleeps until it is notified.

With *queue state* a side notifies the other with WROTE after writing to an empty queue, and with
READ after reading from a full queue.  Both sides see the queue, so no side requests notifications.

In version 1 of the protocol a side requests one notification (WAITING_READ, WAITING_WRITE).

Notifications must not overtake the device's ATTACH: see :class:`AttachOrdering`.
"""

from __future__ import annotations

from collections.abc import Callable

from ..limits import (
    VMCI_ATTACH_HOLD_MAX_SECONDS,
    VMCI_ATTACH_HOLD_REPLIES,
    VMCI_ATTACH_HOLD_SECONDS,
)
from ..loop import DeviceLoop
from .packets import Kind

#: Function that sends a control packet: its kind, value and offset.
Send = Callable[[Kind, int, int], None]


class QueueState:
    """Flow control by queue state, which all versions of Linux's driver use."""

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
        """Do nothing: the guest sends WROTE without a request."""

    def on_full(self) -> None:
        """Do nothing: the guest sends READ without a request."""

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """Do nothing: WROTE and READ change no state here."""


class QueueNotifications:
    """Flow control of version 1: notifications on request."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._reader_waits = self._writer_waits = False
        self._data_requested = self._room_requested = False
        # Positions in both queues: generation (number of passes) and offset.
        self._read_to = self._wrote_to = (0, 0)

    def on_produced(self, was_empty: bool, position: int) -> None:
        """Notify the guest of data up to ``position`` in the queue if the guest waits for data."""
        self._wrote_to = _advance(self._wrote_to, position)
        if self._reader_waits:
            self._reader_waits = False
            self._send(Kind.WROTE, 0, 0)

    def on_consumed(self, was_full: bool, position: int) -> None:
        """Notify the guest of room up to ``position`` in the queue if the guest waits for room."""
        self._read_to = _advance(self._read_to, position)
        if self._writer_waits:
            self._writer_waits = False
            self._send(Kind.READ, 0, 0)

    def on_empty(self) -> None:
        """Request a notification of data, unless one is requested already."""
        if not self._data_requested:
            self._data_requested = True
            generation, offset = self._read_to
            self._send(Kind.WAITING_READ, generation, offset + 1)

    def on_full(self) -> None:
        """Request a notification of room, unless one is requested already."""
        if not self._room_requested:
            self._room_requested = True
            generation, offset = self._wrote_to
            self._send(Kind.WAITING_WRITE, generation, offset + 2)

    def receive(self, kind: int, can_read: bool, can_write: bool) -> None:
        """Handle a flow-control packet of the guest.

        ``can_read`` is whether the guest has data to read now, ``can_write`` whether it has room
        to write.
        """
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
    """Queue that holds packets back until the guest has handled the device's ATTACH.

    Linux's driver handles packets of a socket that is in use in separate work items, which can
    overtake each other.  A socket that is still connecting fails with EPROTO when it receives a
    WROTE or SHUTDOWN.  So packets after the device's ATTACH wait until the guest has
    sent a packet on the stream, or for some time: the longer, the slower the guest is.
    """

    def __init__(self, loop: DeviceLoop, send: Send, latency: float) -> None:
        """Start to hold packets back; the guest's last handshake reply took ``latency`` seconds."""
        self._send = send
        #: held packets, equal ones once: a second WROTE has no further effect
        self._held: dict[tuple[Kind, int, int], None] | None = {}
        hold = max(VMCI_ATTACH_HOLD_SECONDS, VMCI_ATTACH_HOLD_REPLIES * latency)
        loop.call_later(min(hold, VMCI_ATTACH_HOLD_MAX_SECONDS), self.release)

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
