"""Forwarding of a broker's bytes to its client in whole frames.

A client that has only whole frames can be sent a valid connection.close at any time, even when
the broker's connection ended in the middle of a frame.
"""

from __future__ import annotations

from .frames import (
    CLOSE_OK,
    PROTOCOL_HEADER,
    ConnectionMethod,
    FrameError,
    connection_method,
    needed,
    whole_frames,
)
from .limits import AMQP_FRAME_MAX_BYTES

_LAST_WORDS = (ConnectionMethod.CLOSE, ConnectionMethod.CLOSE_OK)


class FrameAssembler:
    """A buffer for the incomplete last frame: AMQP_FRAME_MAX_BYTES bytes at most."""

    def __init__(self) -> None:
        self.broker_closed = False  #: the broker has sent close, close-ok or a refusal
        self._begun = False
        self._held = bytearray()
        self._needed = 0  #: size of the held frame, in bytes; 0 while its header is incomplete

    def receive(self, data: bytes) -> bytes:
        """Add bytes from the broker; return the whole frames, to be forwarded to the client.

        Raises FrameError.
        """
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return b""
            data = bytes(self._held)
            self._held.clear()
        if not self._begun:
            if data[:1] == PROTOCOL_HEADER[:1]:  # the broker refuses the client's version
                return self._refusal(data)
            self._begun = bool(data)
        done = 0
        for frame in whole_frames(data, AMQP_FRAME_MAX_BYTES):
            done = frame.end
            if connection_method(data, frame) in _LAST_WORDS:
                self.broker_closed = True
        if done == len(data):
            return data
        self._held += data[done:]
        self._needed = needed(data[done:])
        return data[:done]

    def _refusal(self, data: bytes) -> bytes:
        if len(data) < len(PROTOCOL_HEADER):
            self._held += data
            return b""
        if data != PROTOCOL_HEADER:
            raise FrameError(f"{data[:8]!r} (expected exactly {PROTOCOL_HEADER!r})")
        self.broker_closed = True
        return data


class CloseHandshake:
    """The wait for a client's connection.close-ok; everything before it is discarded.

    Frame boundaries are unknown here, so close-ok is recognized by its bytes alone.  A message
    that contains the same bytes only ends the connection a little earlier.
    """

    def __init__(self) -> None:
        self._last = b""

    def receive(self, data: bytes) -> bool:
        """Add bytes from the client; return whether they end with connection.close-ok."""
        self._last = (self._last + data[-len(CLOSE_OK) :])[-len(CLOSE_OK) :]
        return self._last == CLOSE_OK
