"""One stream of an HTTP/2 connection, opened with CONNECT (RFC 9113, section 8.5), as a transport.

It is to its protocol what a TCP connection would be: bytes in order both ways, half-close, and
back-pressure of its own.  ``pause_reading()`` keeps the window of this one stream shut; what it
allowed before still comes, AMQP_SESSION_WINDOW_BYTES bytes at most.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .limits import AMQP_SESSION_UNSENT_MAX_BYTES, AMQP_SESSION_WINDOW_BYTES

if TYPE_CHECKING:
    from .h2_connection import H2Connection


class H2Stream(asyncio.Transport):
    """Made by a :class:`~.link.Link`; until there is a protocol it keeps what comes."""

    def __init__(self, link: H2Connection, number: int) -> None:
        super().__init__()
        self.number = number  #: the HTTP/2 stream's
        self.pending = bytearray()  #: what waits to be sent
        self.finishing = False  #: nothing comes after what is pending
        self.ended_here = self.ended_there = False  #: END_STREAM was sent, was received
        self._link = link
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol | None = None
        self._early = bytearray()
        self._protocol_paused = False
        self._reading = True
        self._uncredited = 0
        self._closing = self._gone = False
        self._error: Exception | None = None
        self.set_write_buffer_limits()

    # asyncio's interface

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol
        protocol.connection_made(self)
        early, self._early = bytes(self._early), bytearray()
        if early:
            protocol.data_received(early)
        if self.ended_there:
            protocol.eof_received()
        if self._gone:
            self._loop.call_soon(protocol.connection_lost, self._error)
        else:
            self._credit()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if self.finishing or self._gone:
            return
        self.pending += data
        self._link.has_work(self)
        if len(self.pending) > self._most_unsent and not self._protocol_paused and self._protocol:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.pending)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        self._most_unsent = AMQP_SESSION_UNSENT_MAX_BYTES if high is None else high
        self._resume_at = self._most_unsent // 4 if low is None else low

    def can_write_eof(self) -> bool:
        return True

    def write_eof(self) -> None:
        if not (self.finishing or self._gone):
            self.finishing = True
            self._link.has_work(self)

    def pause_reading(self) -> None:
        self._reading = False

    def resume_reading(self) -> None:
        self._reading = True
        self._credit()

    def is_closing(self) -> bool:
        return self._closing or self._gone

    def close(self) -> None:
        """Send what is pending, and be done with both directions."""
        self._closing = True
        self.write_eof()
        self._settle()

    def abort(self) -> None:
        """Be done now; the peer is told that it did not end well."""
        if not self._gone:
            self._link.reset(self)
            self.lost(None)

    # The link's interface

    def take(self, size: int) -> bytes:
        """At most so many bytes of what is pending."""
        data = bytes(memoryview(self.pending)[:size])
        del self.pending[:size]
        if self._protocol_paused and len(self.pending) <= self._resume_at and self._protocol:
            self._protocol_paused = False
            self._protocol.resume_writing()
        return data

    def has_ended(self) -> None:
        """END_STREAM was sent."""
        self.ended_here = True
        self._settle()

    def received(self, data: bytes, size: int) -> None:
        """``data`` came, which took ``size`` bytes of the window."""
        self._uncredited += size
        if self._protocol is None:
            self._early += data
        elif not self._closing:
            self._protocol.data_received(data)
        self._credit()

    def end_received(self) -> None:
        """END_STREAM came."""
        self.ended_there = True
        if self._protocol is not None and not self._closing:
            self._protocol.eof_received()
        self._settle()

    def lost(self, error: Exception | None) -> None:
        """The stream is no more."""
        if self._gone:
            return
        self._gone = True
        self._error = error
        self.pending.clear()
        self._link.forget(self)
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def _settle(self) -> None:
        if self.ended_here and self.ended_there:
            self.lost(None)
        elif self.ended_here and self._closing:
            self.abort()

    def _credit(self) -> None:
        """Let the peer send as much again, when that is worth a frame."""
        wanted = self._reading and self._protocol is not None and not self.ended_there
        if wanted and not self._gone and self._uncredited >= AMQP_SESSION_WINDOW_BYTES // 2:
            self._link.credit(self, self._uncredited)
            self._uncredited = 0
