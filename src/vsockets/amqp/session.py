"""One client's AMQP connection on its way to the broker, in a guest proxy and in a host proxy.

The near side is the client, the far side leads to the broker.  Whatever ends the far side, the
client's connection ends as AMQP wants it: with connection.close, between two frames.  So a
client knows that what was not acknowledged by then is not going to be.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import socket as stdlib

from ..forward.throttled_log import Client
from .frame_assembler import CloseHandshake, FrameAssembler
from .frames import FrameError, Reply, connection_close
from .handshake_inspector import HandshakeInspector, HandshakeRefused
from .limits import AMQP_HANDSHAKE_TIMEOUT_SECONDS
from .relay import SessionRelay, Side

log = logging.getLogger("vsockets.amqp")


class AmqpSession(SessionRelay):
    """Joined by :meth:`join` with a client, and beside that with a far side."""

    def __init__(self, client: Client, guard: HandshakeInspector | None = None) -> None:
        super().__init__()
        self.guard = guard
        self._client = client
        self._delivery = FrameAssembler()
        self._parting: CloseHandshake | None = None
        self._client_ended = False
        self._handshake: asyncio.TimerHandle | None = None
        self.done.add_done_callback(lambda _: self._end_handshake())

    async def join(self, client: stdlib.socket) -> None:
        """Begin to serve a client; its end of the session is ours from now on."""
        await self._loop.connect_accepted_socket(lambda: self.near, client)

    def interrupt(self, text: str) -> None:
        """The way to the broker is there no more: tell the client, and let it go."""
        self._part(text, connection_close(Reply.CONNECTION_FORCED, text))

    # SessionRelay's events

    def joined(self, side: Side) -> None:
        super().joined(side)
        if side is self.far and self.guard is not None:
            self._handshake = self._loop.call_later(AMQP_HANDSHAKE_TIMEOUT_SECONDS, self._too_slow)

    def received(self, side: Side, data: bytes) -> None:
        if side is self.near:
            self._from_client(data)
        elif self._parting is None:
            try:
                self.near.write(self._delivery.receive(data))
            except FrameError as error:
                text = f"the broker sent {error}"
                self._part(text, connection_close(Reply.FRAME_ERROR, text))

    def ended(self, side: Side) -> None:
        if side is self.far:
            self._far_ended(None)
        else:
            self._client_ended = True
            super().ended(side)

    def gone(self, side: Side, error: Exception | None) -> None:
        if side is self.far:
            self._far_ended(error)
        else:
            self._client_ended = True
            super().gone(side, error)

    # What comes of them

    def _from_client(self, data: bytes) -> None:
        if self._parting is not None:
            if self._parting.receive(data):
                self.near.close()
            return
        if self.guard is not None and self.guard.virtual_host is None:
            try:
                data = self.guard.receive(data)
            except HandshakeRefused as refused:
                self._part(str(refused), refused.answer)
                return
            if self.guard.virtual_host is not None:
                name = self.guard.virtual_host
                self._client.log.info("%s: is in virtual host %r", self._client.who, name)
                self._end_handshake()
        self.far.write(data)

    def _far_ended(self, error: Exception | None) -> None:
        if self._client_ended or self._delivery.farewell:
            self.near.close()
        elif self._parting is None and not self.near.lost:
            why = f" ({error})" if error is not None else ""
            self.interrupt(f"the connection to the broker has ended{why}")

    def _part(self, why: str, answer: bytes) -> None:
        """Say the last thing to the client, and wait for it to go."""
        if self._parting is not None:
            return
        self._client.log.warning("%s: %s", self._client.who, why)
        self._parting = CloseHandshake()
        self.near.write(answer)
        if self.near.transport is not None and not self.near.lost:
            self.near.transport.resume_reading()
            self.limit()
        if self.far.transport is not None and not self.far.lost:
            self.far.transport.abort()

    def _too_slow(self) -> None:
        why = os.strerror(errno.ETIMEDOUT)
        self._client.log.warning("%s: %s", self._client.who, why)
        self.abort()

    def _end_handshake(self) -> None:
        if self._handshake is not None:
            self._handshake.cancel()
