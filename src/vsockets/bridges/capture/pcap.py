"""The pcap file format with vSockets in it.

A file is one file header and any number of records (``pcap-savefile(5)``; the magic number is that
of nanoseconds).  What is in a record says the link type: LINKTYPE_VSOCK, which is what Linux's
``vsockmon`` device delivers (``linux/vsockmon.h``): addresses and an operation, then the header of
a transport, of which there is none here, then the payload.
"""

from __future__ import annotations

import enum
import struct

from ...limits import CAPTURE_PAYLOAD

#: Number of the link type in tcpdump.org's list.
LINKTYPE_VSOCK = 271

_MAGIC_NANOSECONDS = 0xA1B23C4D
_VERSION = (2, 4)
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")
_VSOCKMON = struct.Struct("<QQIIHHHxx")

#: ``AF_VSOCK_TRANSPORT_NO_INFO``: no header of a transport follows.
_NO_TRANSPORT_HEADER = 1

Address = tuple[int, int]


class Operation(enum.IntEnum):
    """``enum af_vsockmon_op``."""

    CONNECT = 1
    DISCONNECT = 2
    PAYLOAD = 4


def file_header() -> bytes:
    """What a file begins with."""
    longest = _VSOCKMON.size + CAPTURE_PAYLOAD
    return _FILE_HEADER.pack(_MAGIC_NANOSECONDS, *_VERSION, 0, 0, longest, LINKTYPE_VSOCK)


def record(
    nanoseconds: int,
    operation: Operation,
    source: Address,
    destination: Address,
    payload: bytes = b"",
    limit: int = CAPTURE_PAYLOAD,
) -> bytes:
    """One record, of ``nanoseconds`` since 1970; ``limit`` bytes of the payload are kept."""
    kept = payload[:limit]
    vsockmon = _VSOCKMON.pack(
        *(source[0], destination[0], source[1], destination[1]),
        *(operation, _NO_TRANSPORT_HEADER, 0),
    )
    seconds, rest = divmod(nanoseconds, 1_000_000_000)
    header = _RECORD_HEADER.pack(
        seconds, rest, len(vsockmon) + len(kept), len(vsockmon) + len(payload)
    )
    return header + vsockmon + kept
