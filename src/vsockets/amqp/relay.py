"""Two transports joined: what comes from one goes to the other, and so do its ends.

*Back-pressure.*  While one side's buffer is full nothing is read from the other.
*Half-close.*  The end of one direction is passed on; the other direction goes on, but for no
longer than AMQP_CLOSE_TIMEOUT_SECONDS seconds: nobody who speaks AMQP closes one direction alone.
*Lost.*  When one side is gone the other is closed, once it has what it should have.
"""

from __future__ import annotations

import asyncio

from .limits import AMQP_CLOSE_TIMEOUT_SECONDS, AMQP_SESSION_UNSENT_MAX_BYTES


class Side(asyncio.Protocol):
    """What a relay is on one of its sides."""

    def __init__(self, relay: SessionRelay) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side
        self.lost = False
        self._relay = relay

    def write(self, data: bytes) -> None:
        """To the peer of this side, if it is there still."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Be done with the peer, as soon as it has what was written."""
        if self.transport is not None and not self.lost:
            self.transport.close()
            self._relay.limit()

    # asyncio's interface

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(AMQP_SESSION_UNSENT_MAX_BYTES)
        self._relay.joined(self)

    def data_received(self, data: bytes) -> None:
        self._relay.received(self, data)

    def eof_received(self) -> bool:
        self._relay.ended(self)
        return True  # the other direction goes on

    def connection_lost(self, error: Exception | None) -> None:
        self.lost = True
        self._relay.lost(self, error)

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.resume_reading()


class SessionRelay:
    """``near`` and ``far`` are protocols for the two transports; ``done`` when both are lost."""

    def __init__(self) -> None:
        self.near, self.far = Side(self), Side(self)
        self.near.other, self.far.other = self.far, self.near
        self._loop = asyncio.get_running_loop()
        self._limit: asyncio.TimerHandle | None = None
        self.done: asyncio.Future[None] = self._loop.create_future()

    def joined(self, side: Side) -> None:
        """``side`` has its transport, from which nothing is read before the other has one."""
        if side.other.transport is None:
            # Not now: asyncio of 3.11.2 (Debian 12) begins to read after connection_made() even so.
            self._loop.call_soon(self._hold, side)
        else:
            side.other.transport.resume_reading()

    def _hold(self, side: Side) -> None:
        if side.other.transport is None and side.transport is not None and not side.lost:
            side.transport.pause_reading()

    def received(self, side: Side, data: bytes) -> None:
        """``data`` came from the peer of ``side``."""
        side.other.write(data)

    def ended(self, side: Side) -> None:
        """The peer of ``side`` says no more."""
        other = side.other
        if other.transport is not None and not other.transport.is_closing():
            other.transport.write_eof()
            self.limit()
        else:
            side.close()

    def gone(self, side: Side, error: Exception | None) -> None:
        """The peer of ``side`` is there no more."""
        side.other.close()

    def lost(self, side: Side, error: Exception | None) -> None:
        """asyncio's connection_lost."""
        self.gone(side, error)
        if all(one.lost or one.transport is None for one in (self.near, self.far)):
            if self._limit is not None:
                self._limit.cancel()
            if not self.done.done():
                self.done.set_result(None)

    def abort(self) -> None:
        """End both sides now."""
        for side in (self.near, self.far):
            if side.transport is not None and not side.lost:
                side.transport.abort()

    def limit(self) -> None:
        """From now on it is only a matter of time."""
        if self._limit is None:
            self._limit = self._loop.call_later(AMQP_CLOSE_TIMEOUT_SECONDS, self.abort)
