"""Capture files, read by an independent parser and by tshark."""

from __future__ import annotations

import struct
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from vsockets.capture import LINKTYPE_VSOCK, file_header, record
from vsockets.protocol.vsockmon import Operation

from .dissecting import CONNECT, DISCONNECT, PAYLOAD, dissect, needs_tshark

u32 = st.integers(0, 0xFFFFFFFF)
addresses = st.tuples(u32, u32)


def test_file_header_is_pcap_with_nanoseconds() -> None:
    magic, major, minor, _, _, longest, link_type = struct.unpack("<IHHiIII", file_header())
    assert (magic, major, minor) == (0xA1B23C4D, 2, 4)
    assert link_type == LINKTYPE_VSOCK == 271
    assert longest <= 262_144  # Wireshark's limit


@given(
    st.integers(0, (1 << 32) * 1_000_000_000 - 1),
    st.sampled_from(Operation),
    *(addresses, addresses),
    *(st.binary(max_size=100), st.integers(0, 100)),
)
def test_record_has_header_and_payload(
    nanoseconds: int,
    operation: Operation,
    source: tuple[int, int],
    destination: tuple[int, int],
    payload: bytes,
    limit: int,
) -> None:
    data = record(nanoseconds, operation, source, destination, payload, limit)
    seconds, rest, kept, whole = struct.unpack_from("<IIII", data)
    assert seconds * 1_000_000_000 + rest == nanoseconds
    assert kept == len(data) - 16 == 32 + min(limit, len(payload))
    assert whole == 32 + len(payload)
    fields = struct.unpack_from("<QQIIHHHxx", data, 16)
    assert fields == (
        *(source[0], destination[0], source[1], destination[1]),
        *(operation, 1, 0),
    )
    assert data[48:] == payload[:limit]


@needs_tshark
def test_tshark_reads_the_records(tmp_path: Path) -> None:
    one, other = (3, 1024), (2, 0xFFFFFFFE)
    file = tmp_path / "x.pcap"
    file.write_bytes(
        file_header()
        + record(1, Operation.CONNECT, one, other)
        + record(2, Operation.PAYLOAD, one, other, b"hello")
        + record(3, Operation.DISCONNECT, other, one)
    )
    assert dissect(file) == [
        (CONNECT, "3:1024", "2:4294967294", 32, b""),
        (PAYLOAD, "3:1024", "2:4294967294", 37, b"hello"),
        (DISCONNECT, "2:4294967294", "3:1024", 32, b""),
    ]
