"""One client's AMQP connection through a guest proxy or a host proxy.

The near side is the client; the far side leads to the broker.  Whenever the far side ends, the
proxy closes the client's connection as AMQP requires: with connection.close, between two frames.
The client then knows that unconfirmed messages will not be confirmed.
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
from .limits import AMQP_HANDSHAKE_TIMEOUT_SECONDS
from .relay import SessionRelay, Side

log = logging.getLogger("vsockets.amqp")


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
        """Attach the near side to ``client``, a connected socket that the session now owns."""
        await self._loop.connect_accepted_socket(lambda: self.near, client)

    def interrupt(self, reason: str) -> None:
        """Close the client's connection (CONNECTION_FORCED): the broker is unreachable."""
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
        """Forward bytes: inspected from the client, in whole frames from the broker."""
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
        """Send ``answer`` to the client and wait for its close-ok; abort the far side."""
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
