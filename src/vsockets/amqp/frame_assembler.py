"""What a broker says to its client, passed on frame by whole frame.

So the client's connection can end between two frames at any time, with a connection.close that
the client understands, whatever the broker's end was cut off in.
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
    """Holds back what is no whole frame yet: AMQP_FRAME_MAX_BYTES bytes at most."""

    def __init__(self) -> None:
        self.farewell = False  #: the broker has closed the connection as AMQP does that
        self._begun = False
        self._held = bytearray()
        self._needed = 0  #: bytes that must be there before it is worth looking again

    def receive(self, data: bytes) -> bytes:
        """What of it the client may have now.  Raises FrameError."""
        if self._held:
            self._held += data
            if len(self._held) < self._needed:
                return b""
            data = bytes(self._held)
            self._held.clear()
        if not self._begun:
            if data[:1] == PROTOCOL_HEADER[:1]:  # the broker speaks only this, and will hang up
                return self._refusal(data)
            self._begun = bool(data)
        done = 0
        for frame in whole_frames(data, AMQP_FRAME_MAX_BYTES):
            done = frame.end
            if connection_method(data, frame) in _LAST_WORDS:
                self.farewell = True
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
            raise FrameError(f"{data[:8]!r}, expected {PROTOCOL_HEADER!r} and nothing more")
        self.farewell = True
        return data


class CloseHandshake:
    """What a client still says after it was sent connection.close: nothing that counts.

    The last of it is connection.close-ok.  It is known by its bytes alone, as where a frame
    begins is not known here; should a message's bytes look the same, the end comes a little
    earlier.
    """

    def __init__(self) -> None:
        self._last = b""

    def receive(self, data: bytes) -> bool:
        """Whether the client has agreed."""
        self._last = (self._last + data[-len(CLOSE_OK) :])[-len(CLOSE_OK) :]
        return self._last == CLOSE_OK
