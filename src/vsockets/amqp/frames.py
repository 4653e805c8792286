"""The part of AMQP 0-9-1's wire format that a proxy needs (specification, section 4.2).

A frame consists of type, channel, payload size, payload and an end octet.  The first four bytes
of a method frame's payload are its class and method; channel 0 carries the connection's methods.
Field tables (section 4.2.5.5) have RabbitMQ's type letters, some of which differ from the
specification's.

Guests run this code with the standard library only, and the host with bytes from hostile guests:
values of tables are skipped by their length, not decoded, so that nesting costs nothing.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

from .limits import AMQP_FRAME_MAX_BYTES

#: The first bytes from a client, and a broker's answer to a client of another protocol version.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT = 1, 2, 3, 8
_TYPES = (METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT)
_END = 0xCE

_HEAD = struct.Struct(">BHI")
_METHOD = struct.Struct(">HH")
_CODE = struct.Struct(">H")

_LONG = struct.Struct(">I")
_SIGNED = struct.Struct(">q")

#: Size in bytes of a value by its type; values of the types in _WITH_LENGTH begin with their
#: length in four bytes.
_SIZES = {
    **dict.fromkeys(b"V", 0),
    **dict.fromkeys(b"tbB", 1),
    **dict.fromkeys(b"su", 2),
    **dict.fromkeys(b"Iif", 4),
    **dict.fromkeys(b"D", 5),
    **dict.fromkeys(b"lLdT", 8),
}
_WITH_LENGTH = b"SAFx"

#: Bytes of a frame around its payload.
OVERHEAD = _HEAD.size + 1

_SHORT_STRING_MAX_BYTES = 255


class ConnectionMethod(enum.IntEnum):
    """Methods of class 10 (connection), with the specification's numbers."""

    START = 10
    START_OK = 11
    SECURE_OK = 21
    TUNE_OK = 31
    OPEN = 40
    CLOSE = 50
    CLOSE_OK = 51


CONNECTION_CLASS = 10


class Reply(enum.IntEnum):
    """Reply codes of connection.close (specification, section 1.6, "constants")."""

    CONNECTION_FORCED = 320
    ACCESS_REFUSED = 403
    FRAME_ERROR = 501
    SYNTAX_ERROR = 502
    COMMAND_INVALID = 503
    NOT_ALLOWED = 530


class FrameError(ValueError):
    """The received bytes are not valid AMQP 0-9-1."""


class Frame(NamedTuple):
    """The kind and the position of a frame in the received bytes."""

    type: int
    channel: int
    start: int
    end: int  #: one past the frame's end octet


def whole_frames(data: bytes, largest: int, start: int = 0) -> Iterator[Frame]:
    """Yield the complete frames of ``data`` from ``start`` on.

    Raises FrameError for an invalid frame and for a payload of more than ``largest`` bytes, as
    soon as the frame's header is complete.
    """
    size = len(data)
    while size - start >= _HEAD.size:
        kind, channel, length = _HEAD.unpack_from(data, start)
        if kind not in _TYPES:
            raise FrameError(f"a frame of type {kind} (expected 1, 2, 3 or 8)")
        if length > largest:
            raise FrameError(f"a frame of {length} bytes (expected {largest} at most)")
        end = start + OVERHEAD + length
        if end > size:
            return
        if data[end - 1] != _END:
            raise FrameError(f"a frame with end octet {data[end - 1]:#04x} (expected {_END:#04x})")
        yield Frame(kind, channel, start, end)
        start = end


def frame_size(data: bytes) -> int:
    """Return the size in bytes of the first frame of ``data``; 0 if its header is incomplete."""
    return OVERHEAD + _HEAD.unpack_from(data)[2] if len(data) >= _HEAD.size else 0


def connection_method(data: bytes, frame: Frame) -> int | None:
    """Return the number of the connection method in ``frame``; None for any other frame."""
    if frame.type != METHOD or frame.channel != 0 or frame.end - frame.start < OVERHEAD + 4:
        return None
    number, method = _METHOD.unpack_from(data, frame.start + _HEAD.size)
    return int(method) if number == CONNECTION_CLASS else None


def begins_connection(data: bytes) -> bool:
    """Return whether ``data`` begins with a broker's connection.start."""
    start = _HEAD.size + _METHOD.size
    return len(data) >= start and _METHOD.unpack_from(data, _HEAD.size) == (
        CONNECTION_CLASS,
        ConnectionMethod.START,
    )


def method_arguments(data: bytes, frame: Frame) -> bytes:
    """Return the encoded arguments of the method in ``frame``."""
    return data[frame.start + _HEAD.size + _METHOD.size : frame.end - 1]


def connection_frame(method: int, payload: bytes) -> bytes:
    """Return a frame with a method of class connection."""
    body = _METHOD.pack(CONNECTION_CLASS, method) + payload
    return b"%b%b%c" % (_HEAD.pack(METHOD, 0, len(body)), body, _END)


def connection_close(reply: Reply, text: str, cause: int = 0) -> bytes:
    """Return a ``connection.close`` frame; ``cause`` is the connection method that failed."""
    reason = f"{reply.name} - {text}".encode()[:_SHORT_STRING_MAX_BYTES]
    reason = reason.decode(errors="ignore").encode()  # drops a character cut in the middle
    failed = _METHOD.pack(CONNECTION_CLASS if cause else 0, cause)
    return connection_frame(
        ConnectionMethod.CLOSE, b"%b%c%b%b" % (_CODE.pack(reply), len(reason), reason, failed)
    )


#: A client's answer to connection.close, and its last frame.
CLOSE_OK = connection_frame(ConnectionMethod.CLOSE_OK, b"")


def table_end(data: bytes) -> int:
    """Return the offset past the table at the start of ``data``.

    Raises FrameError when the table is incomplete.
    """
    if len(data) < _LONG.size:
        raise FrameError("a table whose length is incomplete")
    end: int = _LONG.size + _LONG.unpack_from(data)[0]
    if end > len(data):
        raise FrameError("a table longer than its frame")
    return end


def table_names(table: bytes) -> list[bytes]:
    """Return the names in ``table``, which begins with its length; skip the values.

    Raises FrameError if the table is malformed.
    """
    found = []
    place, end = _LONG.size, len(table)
    while place < end:
        name_end = place + 1 + table[place]
        if name_end >= end:
            raise FrameError("a table with a truncated name")
        found.append(table[place + 1 : name_end])
        kind = table[name_end]
        place = name_end + 1
        if kind in _SIZES:
            place += _SIZES[kind]
        elif kind in _WITH_LENGTH and place + _LONG.size <= end:
            place += _LONG.size + _LONG.unpack_from(table, place)[0]
        else:
            raise FrameError(f"a table with a value of unknown type {bytes([kind])!r}")
    if place != end:
        raise FrameError("a table with a truncated value")
    return found


def with_integer(table: bytes, name: bytes, value: int) -> bytes:
    """Return ``table`` with the 64-bit integer ``value`` appended under ``name``."""
    entry = b"%c%bl%b" % (len(name), name, _SIGNED.pack(value))
    return _LONG.pack(len(table) - _LONG.size + len(entry)) + table[_LONG.size :] + entry


#: Methods after which a broker sends nothing.
_CLOSING_METHODS = (ConnectionMethod.CLOSE, ConnectionMethod.CLOSE_OK)


class FrameAssembler:
    """A cutter of the broker's bytes into whole frames; it buffers the incomplete last one."""

    def __init__(self) -> None:
        self.broker_closed = False  #: the broker has sent close, close-ok or a refusal
        self._begun = False
        self._held = bytearray()
        self._needed = 0  #: size of the held frame, in bytes; 0 while its header is incomplete

    def receive(self, data: bytes) -> bytes:
        """Add bytes from the broker; return the whole frames, to be forwarded to the client.

        Raises FrameError if a frame is malformed.
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
            if connection_method(data, frame) in _CLOSING_METHODS:
                self.broker_closed = True
        if done == len(data):
            return data
        self._held += data[done:]
        self._needed = frame_size(data[done:])
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

    Frame boundaries are unknown here, so close-ok is recognized by its bytes alone.  If a
    message contains the same bytes, the connection merely ends a little earlier.
    """

    def __init__(self) -> None:
        self._last = b""

    def receive(self, data: bytes) -> bool:
        """Add bytes from the client; return whether all bytes so far end with close-ok."""
        self._last = (self._last + data[-len(CLOSE_OK) :])[-len(CLOSE_OK) :]
        return self._last == CLOSE_OK
