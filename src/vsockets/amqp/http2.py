"""One HTTP/2 connection that carries sessions as streams; ``h2`` implements the protocol.

*Streams.*  A stream that CONNECT has opened (RFC 9113, section 8.5) is an asyncio transport.  The
protocol of such a transport sees the same as on a TCP connection: bytes in order both ways,
half-close, and separate back-pressure.

*Flow control.*  The reader of a stream opens that stream's window.  ``pause_reading()`` keeps it
closed; bytes that the window permitted before still arrive, AMQP_SESSION_WINDOW_BYTES at most.  The
connection's window is opened as soon as bytes arrive, because the streams' windows already bound
the bytes buffered here.  A session that is not read therefore takes nothing from the others.

*Turns.*  Streams with pending bytes send one frame each, in rotation.

*Frames.*  A bounded number of the peer's frames is handled in one turn of the loop, so that a
flood does not delay other connections.

*Silence.*  A peer that has been silent is probed with PING, and the connection is aborted if the
probe is not answered, even while TCP still keeps the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import Callable

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

from .limits import (
    AMQP_SESSION_UNSENT_MAX_BYTES,
    AMQP_SESSION_WINDOW_BYTES,
    AMQP_SESSIONS_MAX,
    AMQP_UPLINK_FRAME_MAX_BYTES,
    AMQP_UPLINK_FRAMES_PER_TURN_MAX,
    AMQP_UPLINK_SILENCE_SECONDS,
    AMQP_UPLINK_UNREAD_MAX_BYTES,
    AMQP_UPLINK_WINDOW_BYTES,
)
from .routing import Headers

#: HTTP/2 in the ALPN extension of TLS.
ALPN = "h2"

#: Bytes of stream data collected for one write to the transport.
_BATCH = 256 * 1024

_FIRST_WINDOW = 65_535  # of a connection (RFC 9113, section 6.9.2)
_PREFACE = 24  # bytes of a client's preface (RFC 9113, section 3.4)
_HEAD = 9  # bytes of a frame's header
_HEADERS = 16_384  # bytes of a request's header list, which has five short entries


class H2Stream(asyncio.Transport):
    """A stream of an :class:`H2Connection`, as an asyncio transport.

    The connection creates it.  Until a protocol is set, arriving bytes are buffered.
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
        """Set the protocol, and deliver to it the bytes that have arrived before."""
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
        """Remove the stream from the connection, and call the protocol's ``connection_lost``."""
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
        """Enlarge the window by the received bytes, once they are half a window."""
        wanted = self._reading and self._protocol is not None and not self.end_received
        if wanted and not self._lost and self._uncredited >= AMQP_SESSION_WINDOW_BYTES // 2:
            self._connection.credit(self, self._uncredited)
            self._uncredited = 0


class FrameCounter:
    """A scanner for frame boundaries in received bytes (RFC 9113, section 4.1)."""

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip  # bytes before the next frame's header
        self._head = b""  # the incomplete header of the next frame

    def end(self, data: bytes, most: int) -> int:
        """Return the size in bytes of the next ``most`` frames; len(data) if there are fewer.

        The next call expects the bytes that follow these frames.
        """
        size = len(data)
        position, self._skip = self._skip, 0
        for _ in range(most):
            if position >= size:
                break
            head = self._head + data[position : position + _HEAD - len(self._head)]
            if len(head) < _HEAD:
                self._head = head
                return size
            position += _HEAD - len(self._head) + int.from_bytes(head[:3])
            self._head = b""
        if position >= size:
            self._skip = position - size
            return size
        return position


class StreamRefused(OSError):
    """The peer's refusal to open a stream."""


class H2Connection(asyncio.Protocol):
    """The asyncio protocol of either end of an HTTP/2 connection.

    The server passes ``on_request``, which is called with the connection, the new stream and the
    request's headers.
    """

    def __init__(
        self, on_request: Callable[[H2Connection, H2Stream, Headers], None] | None = None
    ) -> None:
        self._on_request = on_request
        self._loop = asyncio.get_running_loop()
        configuration = h2.config.H2Configuration(client_side=on_request is None)
        self._http = h2.connection.H2Connection(configuration)
        self._transport: asyncio.Transport | None = None
        self._streams: dict[int, H2Stream] = {}
        self._opening: dict[int, asyncio.Future[int]] = {}
        self._queued: dict[H2Stream, None] = {}  # streams with pending bytes, in sending order
        self._scheduled = False
        self._congested = False
        self._uncredited = 0
        self._active = False
        self._probing = False
        self._frames = FrameCounter(_PREFACE if on_request is not None else 0)
        self._held = b""  # received bytes left for later turns
        self._silence_timer = self._loop.call_later(AMQP_UPLINK_SILENCE_SECONDS, self._check_peer)
        #: resolves when the peer has sent SETTINGS
        self.ready: asyncio.Future[None] = self._loop.create_future()
        self.closed: asyncio.Future[Exception | None] = self._loop.create_future()

    @property
    def sessions(self) -> int:
        """The number of open streams."""
        return len(self._streams)

    async def open(self, headers: Headers, protocol: asyncio.Protocol) -> H2Stream:
        """Open a stream for ``protocol``, and return it once the peer has accepted the request.

        Raises StreamRefused when the peer refuses, OSError when the connection is lost.
        """
        if self.closed.done():
            raise OSError(errno.ECONNABORTED, "the HTTP/2 connection has ended")
        try:
            number = self._http.get_next_available_stream_id()
            self._http.send_headers(number, list(headers.items()))
        except h2.exceptions.TooManyStreamsError:
            raise StreamRefused(errno.EAGAIN, "the peer accepts no further sessions") from None
        except h2.exceptions.ProtocolError as error:
            self.abort(ConnectionError(str(error)))  # for example: stream identifiers are exhausted
            raise OSError(errno.ECONNABORTED, str(error)) from None
        stream = self._streams[number] = H2Stream(self, number)
        answer = self._opening[number] = self._loop.create_future()
        self._schedule()
        try:
            status = await answer
        except BaseException:
            stream.abort()
            raise
        finally:
            self._opening.pop(number, None)
        if not 200 <= status < 300:
            stream.abort()
            raise StreamRefused(errno.ECONNREFUSED, f"the peer refused: status {status}")
        stream.set_protocol(protocol)
        return stream

    def answer(self, stream: H2Stream, status: int) -> None:
        """Answer a request (server only); a ``status`` other than 200 closes the stream."""
        with contextlib.suppress(h2.exceptions.ProtocolError):  # the client has closed the stream
            headers = [(b":status", b"%d" % status)]
            self._http.send_headers(stream.number, headers, end_stream=status != 200)
            self._schedule()
        if status != 200:
            stream.finishing = stream.end_sent = True
            stream.close()

    def close(self) -> None:
        """Send GOAWAY and close all streams."""
        if not self.closed.done():
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._http.close_connection()
            self._write()
            if self._transport is not None:
                self._transport.close()
            self._end(None)

    def abort(self, error: Exception) -> None:
        """Abort the connection and all streams because of ``error``."""
        if self._transport is not None:
            self._transport.abort()
        self._end(error)

    # The streams' interface

    def queue(self, stream: H2Stream) -> None:
        """Add ``stream`` to the streams with pending bytes."""
        self._queued[stream] = None
        self._schedule()

    def credit(self, stream: H2Stream, size: int) -> None:
        """Open the window of ``stream`` by ``size`` bytes."""
        with contextlib.suppress(h2.exceptions.ProtocolError):  # the stream has just ended
            self._http.increment_flow_control_window(size, stream.number)
            self._schedule()

    def reset(self, stream: H2Stream) -> None:
        """Send RST_STREAM for ``stream``."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._http.reset_stream(stream.number, h2.errors.ErrorCodes.CONNECT_ERROR)
            self._schedule()

    def forget(self, stream: H2Stream) -> None:
        """Remove ``stream``, which has ended."""
        self._streams.pop(stream.number, None)
        self._queued.pop(stream, None)

    # asyncio's interface

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send the preface and the settings."""
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_BATCH)
        encrypted = transport.get_extra_info("ssl_object")
        if encrypted is not None and encrypted.selected_alpn_protocol() != ALPN:
            self.abort(ConnectionError(f"the peer's TLS does not offer HTTP/2 (ALPN {ALPN})"))
            return
        http = self._http
        http.initiate_connection()
        codes = h2.settings.SettingCodes
        http.update_settings(
            {
                codes.ENABLE_PUSH: 0,
                codes.INITIAL_WINDOW_SIZE: AMQP_SESSION_WINDOW_BYTES,
                codes.MAX_FRAME_SIZE: AMQP_UPLINK_FRAME_MAX_BYTES,
                codes.MAX_CONCURRENT_STREAMS: AMQP_SESSIONS_MAX,
                codes.MAX_HEADER_LIST_SIZE: _HEADERS,
            }
        )
        http.increment_flow_control_window(AMQP_UPLINK_WINDOW_BYTES - _FIRST_WINDOW)
        self._write()

    def data_received(self, data: bytes) -> None:
        """Handle the first frames of ``data`` now and the rest in later turns."""
        self._active = True
        if self._held:
            self._held += data
        else:
            self._handle_some(data)

    def _handle_some(self, data: bytes) -> None:
        end = self._frames.end(data, AMQP_UPLINK_FRAMES_PER_TURN_MAX)
        self._held = data[end:]
        if self._held:
            assert self._transport is not None
            self._transport.pause_reading()
            self._loop.call_soon(self._handle_held)
        self._handle_bytes(data[:end])

    def _handle_held(self) -> None:
        if not self.closed.done():
            data, self._held = self._held, b""
            self._handle_some(data)
            if not self._held and self._transport is not None:
                self._transport.resume_reading()

    def _handle_bytes(self, data: bytes) -> None:
        try:
            events = self._http.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self._write()  # the GOAWAY frame with the reason
            self.abort(ConnectionError(f"HTTP/2 protocol error of the peer: {error}"))
            return
        for event in events:
            self._handle(event)
        if self._uncredited >= AMQP_UPLINK_WINDOW_BYTES // 4:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._http.increment_flow_control_window(self._uncredited)
            self._uncredited = 0
        self._schedule()

    def eof_received(self) -> bool:
        """Close the connection: HTTP/2 has no half-close."""
        return False

    def connection_lost(self, error: Exception | None) -> None:
        """Close all streams."""
        self._end(error or ConnectionError("the peer has closed the connection"))

    def pause_writing(self) -> None:
        """Stop sending stream data while the transport's buffer is full."""
        self._congested = True

    def resume_writing(self) -> None:
        """Send stream data again."""
        self._congested = False
        self._schedule()

    # Events

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived(stream_id=number):
                size = event.flow_controlled_length
                self._uncredited += size
                if (stream := self._streams.get(number)) is not None:
                    stream.on_data(event.data, size)
            case h2.events.WindowUpdated(stream_id=number):
                self._window_opened(number)
            case h2.events.StreamEnded(stream_id=number) if number in self._streams:
                self._streams[number].on_end()
            case h2.events.StreamReset(stream_id=number):
                self._on_reset(number)
            case h2.events.ResponseReceived(stream_id=number):
                status = dict(event.headers or ()).get(b":status", b"")
                self._answered(number, int(status) if status.isdigit() else 502)
            case h2.events.RequestReceived(stream_id=number):
                assert self._on_request is not None
                stream = self._streams[number] = H2Stream(self, number)
                self._on_request(self, stream, dict(event.headers or ()))
            case h2.events.RemoteSettingsChanged():
                self._on_settings()
            case h2.events.ConnectionTerminated():
                self.abort(ConnectionError("the peer sent GOAWAY"))

    def _on_reset(self, number: int) -> None:
        why = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
        self._answered(number, why)
        if (stream := self._streams.get(number)) is not None:
            stream.lose(why)

    def _on_settings(self) -> None:
        if not self.ready.done():
            self.ready.set_result(None)
        self._window_opened(0)

    def _answered(self, number: int, answer: int | OSError) -> None:
        """Complete a pending :meth:`open` with a status or an error."""
        waiting = self._opening.get(number)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, int):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)

    def _window_opened(self, number: int) -> None:
        """Queue stream ``number``, whose window the peer has opened; 0 stands for all streams."""
        if number:
            stream = self._streams.get(number)
            if stream is not None and stream.pending:
                self._queued[stream] = None
        else:
            self._queued.update((one, None) for one in self._streams.values() if one.pending)

    # Sending

    def _schedule(self) -> None:
        """Send in the next turn of the loop, so that one turn's data is written together."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        ready = 0
        while self._queued and not self._congested and not self.closed.done():
            stream = next(iter(self._queued))
            del self._queued[stream]
            sent = self._send_some(stream)
            if sent and stream.pending:
                self._queued[stream] = None
            ready += sent
            if ready >= _BATCH:
                ready = 0
                self._write()
        self._write()

    def _send_some(self, stream: H2Stream) -> int:
        """Send one frame of ``stream``; return the number of bytes sent."""
        size = 0
        try:
            if stream.pending:
                room = self._http.local_flow_control_window(stream.number)
                data = stream.take(max(0, min(room, self._http.max_outbound_frame_size)))
                if not data:
                    return 0  # the window is closed
                self._http.send_data(stream.number, data)
                size = len(data)
            if stream.finishing and not stream.pending and not stream.end_sent:
                self._http.end_stream(stream.number)
                stream.on_end_sent()
        except h2.exceptions.ProtocolError:
            pass  # the stream has just ended; an event reports it
        return size

    def _write(self) -> None:
        data = self._http.data_to_send()
        if self._transport is None or not data:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > AMQP_UPLINK_UNREAD_MAX_BYTES:
            self.abort(ConnectionError("the peer does not read the answers to its requests"))

    # The end

    def _check_peer(self) -> None:
        if self._active and self.ready.done():
            self._probing = False
        elif self._probing or not self.ready.done():
            self.abort(TimeoutError(errno.ETIMEDOUT, "the peer does not answer"))
            return
        else:
            self._probing = True
            self._http.ping(b"answer?!")
            self._write()
        self._active = False
        self._silence_timer = self._loop.call_later(AMQP_UPLINK_SILENCE_SECONDS, self._check_peer)

    def _end(self, error: Exception | None) -> None:
        if self.closed.done():
            return
        self._silence_timer.cancel()
        self.closed.set_result(error)
        why = error or OSError(errno.ECONNABORTED, "the HTTP/2 connection was closed")
        text = f"the HTTP/2 connection has ended: {why}"
        for number in list(self._opening):
            self._answered(number, OSError(errno.ECONNABORTED, text))
        for stream in list(self._streams.values()):
            stream.lose(why)
