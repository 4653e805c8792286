"""What ``vsock perf run`` tells ``vsock perf serve``.

A stream begins with one request, which says what the server is to do with it.  Each datagram
begins with a header that says what it is, and which run it belongs to.  Numbers are big-endian.
"""

from __future__ import annotations

import enum
import struct
from dataclasses import dataclass

from .limits import PERF_MESSAGE_MAX_BYTES, PERF_RUN_MAX_SECONDS

_MAGIC = b"VSP1"
_REQUEST = struct.Struct("!4sBxxxII")
_HEADER = struct.Struct("!4sBxxxQQ")
_COUNT = struct.Struct("!Q")

REQUEST_SIZE = _REQUEST.size
HEADER_SIZE = _HEADER.size
COUNT_SIZE = _COUNT.size


class PerfProtocolError(ValueError):
    """The other side does not speak this protocol, or asks for too much."""


class Job(enum.IntEnum):
    """What a stream's server does."""

    SINK = 1  #: read to the end, then tell how many bytes that were
    SOURCE = 2  #: send for some time, then close
    ECHO = 3  #: send back what comes
    GREET = 4  #: send one byte, then close


@dataclass(frozen=True, slots=True)
class PerfRequest:
    """The beginning of a stream."""

    job: Job
    size: int = 0  #: bytes of one write
    milliseconds: int = 0  #: how long a SOURCE sends

    def encode(self) -> bytes:
        """As it is sent."""
        return _REQUEST.pack(_MAGIC, self.job, self.size, self.milliseconds)

    @classmethod
    def decode(cls, data: bytes) -> PerfRequest:
        """Raises PerfProtocolError."""
        if len(data) != _REQUEST.size:
            raise PerfProtocolError(f"{len(data)} bytes, expected {_REQUEST.size}")
        magic, job, size, milliseconds = _REQUEST.unpack(data)
        if magic != _MAGIC or job not in Job.__members__.values():
            raise PerfProtocolError("that is not vsock perf of this version")
        if not 0 < size <= PERF_MESSAGE_MAX_BYTES:
            raise PerfProtocolError(f"size {size}: expected 1 to {PERF_MESSAGE_MAX_BYTES}")
        if milliseconds > PERF_RUN_MAX_SECONDS * 1000:
            raise PerfProtocolError(
                f"{milliseconds} ms: expected at most {PERF_RUN_MAX_SECONDS:g} s"
            )
        return cls(Job(job), size, milliseconds)


class MessageKind(enum.IntEnum):
    """What a datagram is."""

    DATA = 1  #: one of those to be counted
    PING = 2  #: to be sent back
    REPORT = 3  #: to be answered with the number of DATA that arrived


@dataclass(frozen=True, slots=True)
class Header:
    """The beginning of a datagram."""

    kind: MessageKind
    run: int  #: which run it belongs to; chosen by the client
    number: int = 0  #: counts the datagrams, or, in an answer to REPORT, says how many arrived

    def encode(self, size: int = HEADER_SIZE) -> bytes:
        """A datagram of ``size`` bytes."""
        return _HEADER.pack(_MAGIC, self.kind, self.run, self.number).ljust(size, b"\0")

    @classmethod
    def decode(cls, data: bytes) -> Header:
        """Raises PerfProtocolError."""
        if len(data) < _HEADER.size:
            raise PerfProtocolError(f"{len(data)} bytes, expected {_HEADER.size} at least")
        magic, kind, run, number = _HEADER.unpack_from(data)
        if magic != _MAGIC or kind not in MessageKind.__members__.values():
            raise PerfProtocolError("that is not vsock perf of this version")
        return cls(MessageKind(kind), run, number)


def encode_count(count: int) -> bytes:
    """What a SINK says at the end."""
    return _COUNT.pack(count)


def decode_count(data: bytes) -> int:
    """Raises PerfProtocolError."""
    if len(data) != _COUNT.size:
        raise PerfProtocolError("the server ended before it had counted")
    count: int = _COUNT.unpack(data)[0]
    return count
