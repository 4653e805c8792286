"""One TCP connection that carries tunnels: HTTP/2, of which ``h2`` knows the rules.

*Flow control.*  A stream's window is opened by whoever reads that stream (:mod:`.tunnel`); the
connection's is opened again as soon as anything came, because the streams' windows bound what
is here.  So a session that nobody reads takes nothing from the others.

*Turns.*  Each tunnel with something to send sends one frame, then it is the next one's turn.

*Frames.*  However much a peer says, a bounded number of its frames is looked at before it is the
others' turn.

*Silence.*  A peer that said nothing for a while is asked (PING); one that does not answer has
gone, whatever TCP thinks of it.
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

from .connect_request import Headers
from .h2_stream import H2Stream
from .limits import (
    AMQP_SESSION_WINDOW_BYTES,
    AMQP_SESSIONS_MAX,
    AMQP_UPLINK_FRAME_MAX_BYTES,
    AMQP_UPLINK_FRAMES_PER_TURN_MAX,
    AMQP_UPLINK_SILENCE_SECONDS,
    AMQP_UPLINK_UNREAD_MAX_BYTES,
    AMQP_UPLINK_WINDOW_BYTES,
)

#: What is made ready before it is written, in bytes.
_BATCH = 256 * 1024

_FIRST_WINDOW = 65_535  # of a connection (RFC 9113, section 6.9.2)
_PREFACE = 24  # bytes that a client says first (RFC 9113, section 3.4)
_HEAD = 9  # bytes of a frame's head
_HEADERS = 16_384  # bytes of a request's; it has five short ones


class Frames:
    """Finds where frames end in what is received (RFC 9113, section 4.1)."""

    def __init__(self, skip: int = 0) -> None:
        self._skip = skip  # bytes to the next frame's head
        self._head = b""  # of a frame, as much as there is of it

    def end(self, data: bytes, most: int) -> int:
        """Return how many bytes of ``data`` the next ``most`` frames take, all if there are fewer.

        What comes next is what follows them.
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
    """The far end does not open a tunnel."""


class H2Connection(asyncio.Protocol):
    """Either end of the connection; only the server's has ``on_request``."""

    def __init__(
        self, on_request: Callable[[H2Connection, H2Stream, Headers], None] | None = None
    ) -> None:
        self._on_request = on_request
        self._loop = asyncio.get_running_loop()
        configuration = h2.config.H2Configuration(client_side=on_request is None)
        self._http = h2.connection.H2Connection(configuration)
        self._transport: asyncio.Transport | None = None
        self._tunnels: dict[int, H2Stream] = {}
        self._opening: dict[int, asyncio.Future[int]] = {}
        self._working: dict[H2Stream, None] = {}  # those with something to send, in turn
        self._scheduled = False
        self._congested = False
        self._uncredited = 0
        self._heard = False
        self._asked = False
        self._frames = Frames(_PREFACE if on_request is not None else 0)
        self._held = b""  # what came, and is looked at in the next turns
        self._error: Exception | None = None
        self._probe = self._loop.call_later(AMQP_UPLINK_SILENCE_SECONDS, self._check)
        self.ready: asyncio.Future[None] = self._loop.create_future()  #: the peer speaks HTTP/2
        self.closed: asyncio.Future[Exception | None] = self._loop.create_future()

    @property
    def sessions(self) -> int:
        """Tunnels there are."""
        return len(self._tunnels)

    async def open(self, headers: Headers, protocol: asyncio.Protocol) -> H2Stream:
        """A tunnel for ``protocol``, when the far end has agreed.  Raises OSError, StreamRefused
        too."""
        if self.closed.done():
            raise OSError(errno.ECONNABORTED, "the link has ended")
        try:
            number = self._http.get_next_available_stream_id()
            self._http.send_headers(number, list(headers.items()))
        except h2.exceptions.TooManyStreamsError:
            raise StreamRefused(errno.EAGAIN, "the far end takes no more sessions") from None
        except h2.exceptions.ProtocolError as error:
            self.abort(ConnectionError(str(error)))  # such as no stream's number that is left
            raise OSError(errno.ECONNABORTED, str(error)) from None
        tunnel = self._tunnels[number] = H2Stream(self, number)
        answer = self._opening[number] = self._loop.create_future()
        self._schedule()
        try:
            status = await answer
        except BaseException:
            tunnel.abort()
            raise
        finally:
            self._opening.pop(number, None)
        if not 200 <= status < 300:
            tunnel.abort()
            raise StreamRefused(errno.ECONNREFUSED, f"the far end answered with status {status}")
        tunnel.set_protocol(protocol)
        return tunnel

    def answer(self, tunnel: H2Stream, status: int) -> None:
        """The server's answer to a request; all but 200 are its end."""
        with contextlib.suppress(h2.exceptions.ProtocolError):  # the client has gone meanwhile
            headers = [(b":status", b"%d" % status)]
            self._http.send_headers(tunnel.number, headers, end_stream=status != 200)
            self._schedule()
        if status != 200:
            tunnel.finishing = tunnel.ended_here = True
            tunnel.close()

    def close(self) -> None:
        """Say goodbye, and end all tunnels."""
        if not self.closed.done():
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._http.close_connection()
            self._write()
            if self._transport is not None:
                self._transport.close()
            self._end(None)

    def abort(self, error: Exception) -> None:
        """End all tunnels at once, because of ``error``."""
        if self._transport is not None:
            self._transport.abort()
        self._end(error)

    # The tunnels' interface

    def has_work(self, tunnel: H2Stream) -> None:
        """It has something to send."""
        self._working[tunnel] = None
        self._schedule()

    def credit(self, tunnel: H2Stream, size: int) -> None:
        """Let the peer send ``size`` bytes more into it."""
        with contextlib.suppress(h2.exceptions.ProtocolError):  # it has just ended
            self._http.increment_flow_control_window(size, tunnel.number)
            self._schedule()

    def reset(self, tunnel: H2Stream) -> None:
        """Tell the peer that it has ended in disorder."""
        with contextlib.suppress(h2.exceptions.ProtocolError):
            self._http.reset_stream(tunnel.number, h2.errors.ErrorCodes.CONNECT_ERROR)
            self._schedule()

    def forget(self, tunnel: H2Stream) -> None:
        """It has ended."""
        self._tunnels.pop(tunnel.number, None)
        self._working.pop(tunnel, None)

    # asyncio's interface

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        transport.set_write_buffer_limits(_BATCH)
        encrypted = transport.get_extra_info("ssl_object")
        if encrypted is not None and encrypted.selected_alpn_protocol() != "h2":
            self.abort(ConnectionError("the peer's TLS does not offer HTTP/2 (ALPN h2)"))
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
        self._heard = True
        if self._held:  # more of it than one turn's was on its way
            self._held += data
        else:
            self._take(data)

    def _take(self, data: bytes) -> None:
        """Look at the first frames of what came, and later at the others."""
        end = self._frames.end(data, AMQP_UPLINK_FRAMES_PER_TURN_MAX)
        self._held = data[end:]
        if self._held:
            assert self._transport is not None
            self._transport.pause_reading()
            self._loop.call_soon(self._go_on)
        self._look_at(data[:end])

    def _go_on(self) -> None:
        if not self.closed.done():
            data, self._held = self._held, b""
            self._take(data)
            if not self._held and self._transport is not None:
                self._transport.resume_reading()

    def _look_at(self, data: bytes) -> None:
        try:
            events = self._http.receive_data(data)
        except h2.exceptions.ProtocolError as error:
            self._write()  # why
            self.abort(ConnectionError(f"the peer breaks HTTP/2's rules: {error}"))
            return
        for event in events:
            self._handle(event)
        if self._uncredited >= AMQP_UPLINK_WINDOW_BYTES // 4:
            with contextlib.suppress(h2.exceptions.ProtocolError):
                self._http.increment_flow_control_window(self._uncredited)
            self._uncredited = 0
        self._schedule()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self._end(error or ConnectionError("the peer has closed the connection"))

    def pause_writing(self) -> None:
        self._congested = True

    def resume_writing(self) -> None:
        self._congested = False
        self._schedule()

    # Events

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.DataReceived(stream_id=number):
                size = event.flow_controlled_length
                self._uncredited += size
                if (tunnel := self._tunnels.get(number)) is not None:
                    tunnel.received(event.data, size)
            case h2.events.WindowUpdated(stream_id=number):
                self._window_opened(number)
            case h2.events.StreamEnded(stream_id=number):
                if (tunnel := self._tunnels.get(number)) is not None:
                    tunnel.end_received()
            case h2.events.StreamReset(stream_id=number):
                why = ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                self._answered(number, why)
                if (tunnel := self._tunnels.get(number)) is not None:
                    tunnel.lost(why)
            case h2.events.ResponseReceived(stream_id=number):
                status = dict(event.headers or ()).get(b":status", b"")
                self._answered(number, int(status) if status.isdigit() else 502)
            case h2.events.RequestReceived(stream_id=number):
                assert self._on_request is not None
                tunnel = self._tunnels[number] = H2Stream(self, number)
                self._on_request(self, tunnel, dict(event.headers or ()))
            case h2.events.RemoteSettingsChanged():
                if not self.ready.done():
                    self.ready.set_result(None)
                self._window_opened(0)
            case h2.events.ConnectionTerminated():
                self.abort(ConnectionError("the peer has said goodbye"))

    def _answered(self, number: int, answer: int | OSError) -> None:
        """The far end has said whether it opens a tunnel."""
        waiting = self._opening.get(number)
        if waiting is None or waiting.done():
            return
        if isinstance(answer, int):
            waiting.set_result(answer)
        else:
            waiting.set_exception(answer)

    def _window_opened(self, number: int) -> None:
        """There is room in a stream's window, or with 0 in all."""
        if number:
            tunnel = self._tunnels.get(number)
            if tunnel is not None and tunnel.pending:
                self._working[tunnel] = None
        else:
            self._working.update((t, None) for t in self._tunnels.values() if t.pending)

    # Sending

    def _schedule(self) -> None:
        """Send soon what there is; what comes within one turn of the loop goes together."""
        if not self._scheduled:
            self._scheduled = True
            self._loop.call_soon(self._send)

    def _send(self) -> None:
        self._scheduled = False
        ready = 0
        while self._working and not self._congested and not self.closed.done():
            tunnel = next(iter(self._working))
            del self._working[tunnel]
            sent = self._send_some(tunnel)
            if sent and tunnel.pending:
                self._working[tunnel] = None
            ready += sent
            if ready >= _BATCH:
                ready = 0
                self._write()
        self._write()

    def _send_some(self, tunnel: H2Stream) -> int:
        """One frame of a tunnel; how many bytes that were."""
        size = 0
        try:
            if tunnel.pending:
                room = self._http.local_flow_control_window(tunnel.number)
                data = tunnel.take(max(0, min(room, self._http.max_outbound_frame_size)))
                if not data:
                    return 0  # until the window opens
                self._http.send_data(tunnel.number, data)
                size = len(data)
            if tunnel.finishing and not tunnel.pending and not tunnel.ended_here:
                self._http.end_stream(tunnel.number)
                tunnel.has_ended()
        except h2.exceptions.ProtocolError:
            pass  # it has just ended, and will hear so
        return size

    def _write(self) -> None:
        data = self._http.data_to_send()
        if self._transport is None or not data:
            return
        self._transport.write(data)
        if self._transport.get_write_buffer_size() > AMQP_UPLINK_UNREAD_MAX_BYTES:
            self.abort(ConnectionError("the peer asks, and does not read the answers"))

    # The end

    def _check(self) -> None:
        if self._heard and self.ready.done():
            self._asked = False
        elif self._asked or not self.ready.done():
            self.abort(TimeoutError(errno.ETIMEDOUT, "the peer does not answer"))
            return
        else:
            self._asked = True
            self._http.ping(b"answer?!")
            self._write()
        self._heard = False
        self._probe = self._loop.call_later(AMQP_UPLINK_SILENCE_SECONDS, self._check)

    def _end(self, error: Exception | None) -> None:
        if self.closed.done():
            return
        self._probe.cancel()
        self.closed.set_result(error)
        why = error or OSError(errno.ECONNABORTED, "the link was closed")
        for number in list(self._opening):
            self._answered(number, OSError(errno.ECONNABORTED, f"the link has ended: {why}"))
        for tunnel in list(self._tunnels.values()):
            tunnel.lost(why)
