"""Sessions of AMQP clients, and the relay of bytes between two asyncio transports below them.

A relay passes on bytes and ends of stream:

*Back-pressure.*  While the write buffer of one side is full, nothing is read from the other side.
*Half-close.*  The end of one direction is passed on.  The other direction stays open for at most
AMQP_CLOSE_TIMEOUT_SECONDS seconds: AMQP clients and brokers do not close one direction alone.
*Connection loss.*  When the peer of one side is lost, the other side is closed after its pending
bytes are written.

In a guest proxy or host proxy, the near side is the client, and the far side leads to the broker.
Whenever the far side ends, the proxy closes the client's connection as AMQP requires: with
connection.close, between two frames.  The client then knows that unconfirmed messages will not be
confirmed.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket as stdlib

from ..forward.client import Client
from .frames import CloseHandshake, FrameAssembler, FrameError, Reply, connection_close
from .handshake_inspector import HandshakeInspector, HandshakeRefused
from .limits import (
    AMQP_CLOSE_TIMEOUT_SECONDS,
    AMQP_HANDSHAKE_TIMEOUT_SECONDS,
    AMQP_SESSION_UNSENT_MAX_BYTES,
)

log = logging.getLogger("vsockets.amqp")


class Side(asyncio.Protocol):
    """The asyncio protocol of one of the two transports of a :class:`SessionRelay`."""

    def __init__(self, relay: SessionRelay) -> None:
        self.transport: asyncio.Transport | None = None
        self.other: Side
        self.lost = False
        self._relay = relay

    def write(self, data: bytes) -> None:
        """Send ``data`` to this side's peer; discard it if the transport is closed."""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(data)

    def close(self) -> None:
        """Close the transport after its pending bytes; start the relay's close timer."""
        if self.transport is not None and not self.lost:
            self.transport.close()
            self._relay.start_close_timer()

    # asyncio's interface

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the transport with the relay."""
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(AMQP_SESSION_UNSENT_MAX_BYTES)
        self._relay.joined(self)

    def data_received(self, data: bytes) -> None:
        """Pass bytes received from the peer to the relay."""
        self._relay.received(self, data)

    def eof_received(self) -> bool:
        """Pass the peer's end of stream to the relay; keep the other direction open."""
        self._relay.ended(self)
        return True

    def connection_lost(self, error: Exception | None) -> None:
        """Report the loss of the transport to the relay."""
        self.lost = True
        self._relay.lost(self, error)

    def pause_writing(self) -> None:
        """Stop reading from the other side while this side's write buffer is full."""
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        """Read from the other side again."""
        if self.other.transport is not None:
            self.other.transport.resume_reading()


class SessionRelay:
    """A relay between the transports of ``near`` and ``far``, its two protocol objects.

    ``done`` resolves when both transports are lost.
    """

    def __init__(self) -> None:
        self.near, self.far = Side(self), Side(self)
        self.near.other, self.far.other = self.far, self.near
        self._loop = asyncio.get_running_loop()
        self._close_timer: asyncio.TimerHandle | None = None
        self.done: asyncio.Future[None] = self._loop.create_future()

    def joined(self, side: Side) -> None:
        """Record that ``side`` is connected; read from both sides once both are."""
        if side.other.transport is None:
            # Not at once: asyncio of Python 3.11.2 (Debian 12) starts to read after
            # connection_made().
            self._loop.call_soon(self._hold, side)
        else:
            side.other.transport.resume_reading()

    def _hold(self, side: Side) -> None:
        if side.other.transport is None and side.transport is not None and not side.lost:
            side.transport.pause_reading()

    def received(self, side: Side, data: bytes) -> None:
        """Forward ``data``, received from the peer of ``side``."""
        side.other.write(data)

    def ended(self, side: Side) -> None:
        """Pass on the end of stream that the peer of ``side`` has sent."""
        other = side.other
        if other.transport is not None and not other.transport.is_closing():
            other.transport.write_eof()
            self.start_close_timer()
        else:
            side.close()

    def peer_lost(self, side: Side, error: Exception | None) -> None:
        """Close the other side because the peer of ``side`` is lost."""
        side.other.close()

    def lost(self, side: Side, error: Exception | None) -> None:
        """Handle ``connection_lost`` of ``side``."""
        self.peer_lost(side, error)
        if all(one.lost or one.transport is None for one in (self.near, self.far)):
            if self._close_timer is not None:
                self._close_timer.cancel()
            if not self.done.done():
                self.done.set_result(None)

    def abort(self) -> None:
        """Abort both transports."""
        for side in (self.near, self.far):
            if side.transport is not None and not side.lost:
                side.transport.abort()

    def start_close_timer(self) -> None:
        """Abort the relay after AMQP_CLOSE_TIMEOUT_SECONDS, unless both sides close earlier."""
        if self._close_timer is None:
            self._close_timer = self._loop.call_later(AMQP_CLOSE_TIMEOUT_SECONDS, self.abort)


class AmqpSession(SessionRelay):
    """The session of one client; ``inspector`` checks its handshake (host proxy only).

    :meth:`join` connects the near side; the proxy connects ``far`` itself.
    """

    def __init__(self, client: Client, inspector: HandshakeInspector | None = None) -> None:
        super().__init__()
        self.inspector = inspector
        self._client = client
        self._assembler = FrameAssembler()
        self._close_handshake: CloseHandshake | None = None
        self._client_ended = False
        self._handshake_timer: asyncio.TimerHandle | None = None
        self.done.add_done_callback(lambda _: self._stop_handshake_timer())

    async def join(self, client: stdlib.socket) -> None:
        """Take ownership of ``client``, a connected socket, as the near side's transport."""
        await self._loop.connect_accepted_socket(lambda: self.near, client)

    def interrupt(self, reason: str) -> None:
        """Close the client's connection with CONNECTION_FORCED: the broker is unreachable."""
        self._close(reason, connection_close(Reply.CONNECTION_FORCED, reason))

    # SessionRelay's events

    def joined(self, side: Side) -> None:
        """Start the handshake timer once the far side is connected."""
        super().joined(side)
        if side is self.far and self.inspector is not None:
            self._handshake_timer = self._loop.call_later(
                AMQP_HANDSHAKE_TIMEOUT_SECONDS, self._handshake_timed_out
            )

    def received(self, side: Side, data: bytes) -> None:
        """Forward ``data``: the client's after inspection, the broker's in whole frames."""
        if side is self.near:
            self._from_client(data)
        elif self._close_handshake is None:
            try:
                self.near.write(self._assembler.receive(data))
            except FrameError as error:
                reason = f"the broker sent {error}"
                self._close(reason, connection_close(Reply.FRAME_ERROR, reason))

    def ended(self, side: Side) -> None:
        """Handle the end of stream of ``side``."""
        if side is self.far:
            self._far_ended(None)
        else:
            self._client_ended = True
            super().ended(side)

    def peer_lost(self, side: Side, error: Exception | None) -> None:
        """Handle the loss of the peer of ``side``."""
        if side is self.far:
            self._far_ended(error)
        else:
            self._client_ended = True
            super().peer_lost(side, error)

    def _from_client(self, data: bytes) -> None:
        if self._close_handshake is not None:
            if self._close_handshake.receive(data):
                self.near.close()
            return
        if self.inspector is not None and self.inspector.virtual_host is None:
            try:
                data = self.inspector.receive(data)
            except HandshakeRefused as refused:
                self._close(str(refused), refused.answer)
                return
            if self.inspector.virtual_host is not None:
                name = self.inspector.virtual_host
                self._client.log.info("%s: opened virtual host %r", self._client.who, name)
                self._stop_handshake_timer()
        self.far.write(data)

    def _far_ended(self, error: Exception | None) -> None:
        if self._client_ended or self._assembler.broker_closed:
            self.near.close()
        elif self._close_handshake is None and not self.near.lost:
            why = f" ({error})" if error is not None else ""
            self.interrupt(f"the connection to the broker has ended{why}")

    def _close(self, reason: str, answer: bytes) -> None:
        """Send ``answer`` to the client and wait for the client's close-ok; abort the far side."""
        if self._close_handshake is not None:
            return
        self._client.log.warning("%s: %s", self._client.who, reason)
        self._close_handshake = CloseHandshake()
        self.near.write(answer)
        if self.near.transport is not None and not self.near.lost:
            self.near.transport.resume_reading()
            self.start_close_timer()
        if self.far.transport is not None and not self.far.lost:
            self.far.transport.abort()

    def _handshake_timed_out(self) -> None:
        reason = os.strerror(errno.ETIMEDOUT)
        self._client.log.warning("%s: AMQP handshake: %s", self._client.who, reason)
        self.abort()

    def _stop_handshake_timer(self) -> None:
        if self._handshake_timer is not None:
            self._handshake_timer.cancel()
