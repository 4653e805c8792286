"""AMQP 0-9-1's frames, as far as a proxy needs them (the specification's section 4.2).

A frame is a type, a channel, a size, so many bytes, and an octet that marks its end.  What a
method of channel 0 is, the connection's own, say its first four bytes.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Iterator
from typing import NamedTuple

#: What a client begins with, and what a broker answers to one that speaks another protocol.
PROTOCOL_HEADER = b"AMQP\x00\x00\x09\x01"

METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT = 1, 2, 3, 8
_TYPES = (METHOD, CONTENT_HEADER, CONTENT_BODY, HEARTBEAT)
_END = 0xCE

_HEAD = struct.Struct(">BHI")
_METHOD = struct.Struct(">HH")
_CODE = struct.Struct(">H")

#: What surrounds a frame's payload, in bytes.
OVERHEAD = _HEAD.size + 1

_LONGEST_SHORT_STRING = 255


class ConnectionMethod(enum.IntEnum):
    """Methods of class 10, the connection; those of the spec, by their numbers there."""

    START = 10
    START_OK = 11
    SECURE_OK = 21
    TUNE_OK = 31
    OPEN = 40
    CLOSE = 50
    CLOSE_OK = 51


CONNECTION_CLASS = 10


class Reply(enum.IntEnum):
    """Why a connection is closed (the specification's section 1.6, "constants")."""

    CONNECTION_FORCED = 320
    ACCESS_REFUSED = 403
    FRAME_ERROR = 501
    SYNTAX_ERROR = 502
    COMMAND_INVALID = 503
    NOT_ALLOWED = 530


class FrameError(ValueError):
    """What came is not AMQP 0-9-1."""


class Frame(NamedTuple):
    """Where a frame is in what was received."""

    type: int
    channel: int
    start: int
    end: int  #: one past its end octet


def whole_frames(data: bytes, largest: int, start: int = 0) -> Iterator[Frame]:
    """The frames that are whole, from ``start`` on.

    Raises FrameError for what cannot become a frame, or one with a payload of more than
    ``largest`` bytes: as soon as its head is there.
    """
    size = len(data)
    while size - start >= _HEAD.size:
        kind, channel, length = _HEAD.unpack_from(data, start)
        if kind not in _TYPES:
            raise FrameError(f"a frame of type {kind}, expected 1, 2, 3 or 8")
        if length > largest:
            raise FrameError(f"a frame of {length} bytes, expected {largest} at most")
        end = start + OVERHEAD + length
        if end > size:
            return
        if data[end - 1] != _END:
            raise FrameError(f"a frame that ends with {data[end - 1]:#04x}, expected {_END:#04x}")
        yield Frame(kind, channel, start, end)
        start = end


def needed(data: bytes) -> int:
    """How many bytes the frame takes that ``data`` begins with; 0 while its head is cut off."""
    return OVERHEAD + _HEAD.unpack_from(data)[2] if len(data) >= _HEAD.size else 0


def connection_method(data: bytes, frame: Frame) -> int | None:
    """Which method of the connection a frame is; None for every other one."""
    if frame.type != METHOD or frame.channel != 0 or frame.end - frame.start < OVERHEAD + 4:
        return None
    number, method = _METHOD.unpack_from(data, frame.start + _HEAD.size)
    return int(method) if number == CONNECTION_CLASS else None


def begins_connection(data: bytes) -> bool:
    """Whether ``data`` is how a broker answers a client's first words."""
    start = _HEAD.size + _METHOD.size
    return len(data) >= start and _METHOD.unpack_from(data, _HEAD.size) == (
        CONNECTION_CLASS,
        ConnectionMethod.START,
    )


def arguments(data: bytes, frame: Frame) -> bytes:
    """What follows a method's number."""
    return data[frame.start + _HEAD.size + _METHOD.size : frame.end - 1]


def connection_frame(method: int, payload: bytes) -> bytes:
    """A method of the connection, framed."""
    body = _METHOD.pack(CONNECTION_CLASS, method) + payload
    return b"%b%b%c" % (_HEAD.pack(METHOD, 0, len(body)), body, _END)


def connection_close(reply: Reply, text: str, cause: int = 0) -> bytes:
    """``connection.close``; ``cause`` is the method of the connection that was refused."""
    said = f"{reply.name} - {text}".encode()[:_LONGEST_SHORT_STRING]
    said = said.decode(errors="ignore").encode()  # no half character at its end
    about = _METHOD.pack(CONNECTION_CLASS if cause else 0, cause)
    return connection_frame(
        ConnectionMethod.CLOSE, b"%b%c%b%b" % (_CODE.pack(reply), len(said), said, about)
    )


#: What a client answers to connection.close; the last it says.
CLOSE_OK = connection_frame(ConnectionMethod.CLOSE_OK, b"")
