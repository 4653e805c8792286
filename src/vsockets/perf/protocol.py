"""The protocol between ``vsock perf run`` and ``vsock perf serve``.

A stream begins with a request, which names the job of the server.  Each datagram begins with a
header, which gives its kind and the run that it belongs to.  Numbers are big-endian.
"""

from __future__ import annotations

import enum
import socket
import struct
from dataclasses import dataclass

from .._linux.sockets import pack_timeval
from .limits import PERF_MESSAGE_MAX_BYTES, PERF_RUN_MAX_SECONDS, PERF_SILENCE_SECONDS

_MAGIC = b"VSP1"
_REQUEST = struct.Struct("!4sBxxxII")
_HEADER = struct.Struct("!4sBxxxQQ")
_COUNT = struct.Struct("!Q")

REQUEST_SIZE = _REQUEST.size
HEADER_SIZE = _HEADER.size
COUNT_SIZE = _COUNT.size


class PerfProtocolError(ValueError):
    """A message of the peer that violates this protocol, or a request above a limit."""


class Job(enum.IntEnum):
    """The operation that a client requests from the server on one stream."""

    SINK = 1  #: read to the end of stream, then send the number of bytes
    SOURCE = 2  #: send for the requested time, then close
    ECHO = 3  #: send received bytes back
    GREET = 4  #: send one byte, then close


@dataclass(frozen=True, slots=True)
class PerfRequest:
    """The request at the beginning of a stream."""

    job: Job
    size: int = 0  #: bytes of one write
    milliseconds: int = 0  #: duration of a SOURCE

    def encode(self) -> bytes:
        """Return the request as bytes."""
        return _REQUEST.pack(_MAGIC, self.job, self.size, self.milliseconds)

    @classmethod
    def decode(cls, data: bytes) -> PerfRequest:
        """Parse the bytes of a request.

        Raises PerfProtocolError if they are invalid.
        """
        if len(data) != _REQUEST.size:
            raise PerfProtocolError(f"{len(data)} bytes (expected {_REQUEST.size})")
        magic, job, size, milliseconds = _REQUEST.unpack(data)
        if magic != _MAGIC or job not in Job.__members__.values():
            raise PerfProtocolError("the peer is not vsock perf of this version")
        if not 0 < size <= PERF_MESSAGE_MAX_BYTES:
            raise PerfProtocolError(f"size {size} (expected 1 to {PERF_MESSAGE_MAX_BYTES})")
        if milliseconds > PERF_RUN_MAX_SECONDS * 1000:
            raise PerfProtocolError(
                f"{milliseconds} ms (expected at most {PERF_RUN_MAX_SECONDS:g} s)"
            )
        return cls(Job(job), size, milliseconds)


class MessageKind(enum.IntEnum):
    """The kind of a datagram."""

    DATA = 1  #: to be counted
    PING = 2  #: to be sent back
    REPORT = 3  #: to be answered with the number of DATA received


@dataclass(frozen=True, slots=True)
class Header:
    """The header at the beginning of a datagram."""

    kind: MessageKind
    run: int  #: the run that the datagram belongs to; chosen by the client
    number: int = 0  #: sequence number; in an answer to REPORT, the number of DATA received

    def encode(self, size: int = HEADER_SIZE) -> bytes:
        """Return a datagram of ``size`` bytes that begins with this header."""
        return _HEADER.pack(_MAGIC, self.kind, self.run, self.number).ljust(size, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Parse the header of a datagram.

        Raises PerfProtocolError if it is invalid.
        """
        if len(data) < _HEADER.size:
            raise PerfProtocolError(f"{len(data)} bytes (expected at least {_HEADER.size})")
        magic, kind, run, number = _HEADER.unpack_from(data)
        if magic != _MAGIC or kind not in MessageKind.__members__.values():
            raise PerfProtocolError("the peer is not vsock perf of this version")
        return cls(MessageKind(kind), run, number)


def encode_count(count: int) -> bytes:
    """Return the answer to a SINK, the number of bytes received, as bytes."""
    return _COUNT.pack(count)


def decode_count(data: bytes) -> int:
    """Return the number of bytes in the answer to a SINK.

    Raises PerfProtocolError if ``data`` is not one.
    """
    if len(data) != _COUNT.size:
        raise PerfProtocolError("the server closed the stream before it sent its count")
    count: int = _COUNT.unpack(data)[0]
    return count


def set_timeouts(
    sock: socket.socket, receive: float = PERF_SILENCE_SECONDS, send: float = PERF_SILENCE_SECONDS
) -> None:
    """Make ``sock`` blocking, with timeouts in seconds after which calls raise BlockingIOError.

    The kernel implements these timeouts.  Python's own would add a poll() to every call, which the
    measurements would include.
    """
    sock.settimeout(None)
    for option, seconds in ((socket.SO_RCVTIMEO, receive), (socket.SO_SNDTIMEO, send)):
        sock.setsockopt(socket.SOL_SOCKET, option, pack_timeval(seconds))
