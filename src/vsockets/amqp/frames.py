"""The part of AMQP 0-9-1's frame format that a proxy needs (specification, section 4.2).

A frame consists of type, channel, payload size, payload and an end octet.  The first four bytes
of a method frame's payload are its class and method; channel 0 carries the connection's methods.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

#: The first bytes from a client, and a broker's answer to a client of another protocol version.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT = 1, 2, 3, 8
_TYPES = (METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT)
_END = 0xCE

_HEAD = struct.Struct(">BHI")
_METHOD = struct.Struct(">HH")
_CODE = struct.Struct(">H")

#: Bytes of a frame around its payload.
OVERHEAD = _HEAD.size + 1

_LONGEST_SHORT_STRING = 255


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
    """The position of a frame in the received bytes."""

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


def needed(data: bytes) -> int:
    """Return the size in bytes of the first frame of ``data``; 0 if its header is incomplete."""
    return OVERHEAD + _HEAD.unpack_from(data)[2] if len(data) >= _HEAD.size else 0


def connection_method(data: bytes, frame: Frame) -> int | None:
    """Return the connection method that a frame carries; None if it is another frame."""
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


def arguments(data: bytes, frame: Frame) -> bytes:
    """Return the arguments of the method that a frame carries."""
    return data[frame.start + _HEAD.size + _METHOD.size : frame.end - 1]


def connection_frame(method: int, payload: bytes) -> bytes:
    """Return a frame with a method of class connection."""
    body = _METHOD.pack(CONNECTION_CLASS, method) + payload
    return b"%b%b%c" % (_HEAD.pack(METHOD, 0, len(body)), body, _END)


def connection_close(reply: Reply, text: str, cause: int = 0) -> bytes:
    """Return a ``connection.close`` frame; ``cause`` is the connection method that failed."""
    reason = f"{reply.name} - {text}".encode()[:_LONGEST_SHORT_STRING]
    reason = reason.decode(errors="ignore").encode()  # drops a character cut in the middle
    failed = _METHOD.pack(CONNECTION_CLASS if cause else 0, cause)
    return connection_frame(
        ConnectionMethod.CLOSE, b"%b%c%b%b" % (_CODE.pack(reply), len(reason), reason, failed)
    )


#: A client's answer to connection.close, and its last frame.
CLOSE_OK = connection_frame(ConnectionMethod.CLOSE_OK, b"")
