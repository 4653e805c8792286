"""The pcap file format with vSockets in it.

A file is one file header and any number of records (``pcap-savefile(5)``; the magic number is that
of nanoseconds).  What is in a record says the link type: LINKTYPE_VSOCK, which is what Linux's
``vsockmon`` device delivers (:mod:`vsockets.protocol.vsockmon`).
"""

from __future__ import annotations

import struct

from ..limits import CAPTURE_PAYLOAD_MAX_BYTES
from ..protocol.vsockmon import HEADER_SIZE, Address, Captured, Operation, encode_header

#: Number of the link type in tcpdump.org's list.
LINKTYPE_VSOCK = 271

_MAGIC_NANOSECONDS = 0xA1B23C4D
_VERSION = (2, 4)
_FILE_HEADER = struct.Struct("<IHHiIII")
_RECORD_HEADER = struct.Struct("<IIII")

#: The header of virtio-vsock's packets, the longest of a transport.
_LONGEST_TRANSPORT_HEADER = 44


def file_header() -> bytes:
    """What a file begins with."""
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
    """One record, of ``nanoseconds`` since 1970; ``limit`` bytes of the payload are kept."""
    header = encode_header(operation, source, destination)
    whole = len(header) + len(payload)
    return captured_record(Captured(nanoseconds, 0, whole, header + payload[:limit]))


def captured_record(captured: Captured) -> bytes:
    """One record that was made elsewhere."""
    seconds, rest = divmod(captured.nanoseconds, 1_000_000_000)
    header = _RECORD_HEADER.pack(seconds, rest, len(captured.body), captured.length)
    return header + captured.body
