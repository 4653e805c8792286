"""The pcap file format with vSockets records.

A file is a file header and any number of records (``pcap-savefile(5)``; the magic number is that
of nanosecond timestamps).  The link type is LINKTYPE_VSOCK: records have the format of Linux's
``vsockmon`` device (:mod:`vsockets.protocol.vsockmon`).
"""

from __future__ import annotations

import struct

from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..protocol.vsockmon import HEADER_SIZE, Address, Captured, Operation, encode_header

#: The link type's number in tcpdump.org's list.
LINKTYPE_VSOCK = 271

_MAGIC_NANOSECONDS = 0xA1B23C4D
_VERSION = (2, 4)
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")

#: Bytes of a virtio-vsock packet header, the longest header of a transport.
_LONGEST_TRANSPORT_HEADER = 44


def file_header() -> bytes:
    """Return the header that begins a capture file."""
    longest = HEADER_SIZE + _LONGEST_TRANSPORT_HEADER + CAPTURE_PAYLOAD_MAX_BYTES
    return _FILE_HEADER.pack(_MAGIC_NANOSECONDS, *_VERSION, 0, 0, longest, LINKTYPE_VSOCK)


def record(
    nanoseconds: int,
    operation: Operation,
    source: Address,
    destination: Address,
    payload: bytes = b"",
    limit: int = CAPTURE_PAYLOAD_MAX_BYTES,
) -> bytes:
    """Return a record at ``nanoseconds`` since 1970 with at most ``limit`` bytes of payload."""
    header = encode_header(operation, source, destination)
    whole = len(header) + len(payload)
    return captured_record(Captured(nanoseconds, 0, whole, header + payload[:limit]))


def captured_record(captured: Captured) -> bytes:
    """Return the capture file's record for ``captured``, a packet that a device has reported."""
    seconds, rest = divmod(captured.nanoseconds, 1_000_000_000)
    header = _RECORD_HEADER.pack(seconds, rest, len(captured.body), captured.length)
    return header + captured.body
