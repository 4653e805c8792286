"""An asyncio transport over one HTTP/2 stream that CONNECT has opened (RFC 9113, section 8.5).

Its protocol sees the same as on a TCP connection: bytes in order both ways, half-close, and
separate back-pressure.  ``pause_reading()`` keeps the window of this one stream closed; bytes that
the window permitted before still arrive, AMQP_SESSION_WINDOW_BYTES at most.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .limits import AMQP_SESSION_UNSENT_MAX_BYTES, AMQP_SESSION_WINDOW_BYTES

if TYPE_CHECKING:
    from .h2_connection import H2Connection


class H2Stream(asyncio.Transport):
    """A stream of an :class:`H2Connection`, which creates it.

    Until it has a protocol it buffers the bytes that arrive.
    """

    def __init__(self, connection: H2Connection, number: int) -> None:
        super().__init__()
        self.number = number  #: the HTTP/2 stream identifier
        self.pending = bytearray()  #: bytes to be sent
        self.finishing = False  #: END_STREAM follows the pending bytes
        self.end_sent = self.end_received = False  #: END_STREAM was sent, was received
        self._connection = connection
        self._loop = asyncio.get_running_loop()
        self._protocol: asyncio.Protocol | None = None
        self._early = bytearray()
        self._protocol_paused = False
        self._reading = True
        self._uncredited = 0
        self._closing = self._lost = False
        self._error: Exception | None = None
        self.set_write_buffer_limits()

    # asyncio's interface

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Attach the protocol, and deliver what has arrived before."""
        assert isinstance(protocol, asyncio.Protocol)
        self._protocol = protocol
        protocol.connection_made(self)
        early, self._early = bytes(self._early), bytearray()
        if early:
            protocol.data_received(early)
        if self.end_received:
            protocol.eof_received()
        if self._lost:
            self._loop.call_soon(protocol.connection_lost, self._error)
        else:
            self._credit()

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Queue bytes; pause the protocol's writing above the buffer limit."""
        if self.finishing or self._lost:
            return
        self.pending += data
        self._connection.queue(self)
        if len(self.pending) > self._unsent_max and not self._protocol_paused and self._protocol:
            self._protocol_paused = True
            self._protocol.pause_writing()

    def get_write_buffer_size(self) -> int:
        """Return the number of bytes to be sent."""
        return len(self.pending)

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the buffered bytes above which writing pauses, and below which it resumes."""
        self._unsent_max = AMQP_SESSION_UNSENT_MAX_BYTES if high is None else high
        self._resume_at = self._unsent_max // 4 if low is None else low

    def can_write_eof(self) -> bool:
        """Return True: streams have half-close."""
        return True

    def write_eof(self) -> None:
        """Send END_STREAM after the pending bytes."""
        if not (self.finishing or self._lost):
            self.finishing = True
            self._connection.queue(self)

    def pause_reading(self) -> None:
        """Keep this stream's window closed."""
        self._reading = False

    def resume_reading(self) -> None:
        """Open this stream's window again."""
        self._reading = True
        self._credit()

    def is_closing(self) -> bool:
        """Return whether the stream is closed or closing."""
        return self._closing or self._lost

    def close(self) -> None:
        """Send the pending bytes, then close both directions."""
        self._closing = True
        self.write_eof()
        self._finish_if_ended()

    def abort(self) -> None:
        """Close both directions at once, and send RST_STREAM to the peer."""
        if not self._lost:
            self._connection.reset(self)
            self.lose(None)

    # The connection's interface

    def take(self, size: int) -> bytes:
        """Remove and return at most ``size`` of the pending bytes."""
        data = bytes(memoryview(self.pending)[:size])
        del self.pending[:size]
        if self._protocol_paused and len(self.pending) <= self._resume_at and self._protocol:
            self._protocol_paused = False
            self._protocol.resume_writing()
        return data

    def on_end_sent(self) -> None:
        """Record that END_STREAM was sent."""
        self.end_sent = True
        self._finish_if_ended()

    def on_data(self, data: bytes, size: int) -> None:
        """Deliver received bytes, which took ``size`` bytes of the window."""
        self._uncredited += size
        if self._protocol is None:
            self._early += data
        elif not self._closing:
            self._protocol.data_received(data)
        self._credit()

    def on_end(self) -> None:
        """Handle a received END_STREAM."""
        self.end_received = True
        if self._protocol is not None and not self._closing:
            self._protocol.eof_received()
        self._finish_if_ended()

    def lose(self, error: Exception | None) -> None:
        """Remove the stream from the connection, and report the loss to the protocol."""
        if self._lost:
            return
        self._lost = True
        self._error = error
        self.pending.clear()
        self._connection.forget(self)
        if self._protocol is not None:
            self._loop.call_soon(self._protocol.connection_lost, error)

    def _finish_if_ended(self) -> None:
        if self.end_sent and self.end_received:
            self.lose(None)
        elif self.end_sent and self._closing:
            self.abort()

    def _credit(self) -> None:
        """Acknowledge received bytes, once they are half a window."""
        wanted = self._reading and self._protocol is not None and not self.end_received
        if wanted and not self._lost and self._uncredited >= AMQP_SESSION_WINDOW_BYTES // 2:
            self._connection.credit(self, self._uncredited)
            self._uncredited = 0
