"""GuestRPC's packets: bytes by hand, and hostile ones."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.guestrpc import limits
from vsockets.guestrpc.packets import Decoder, Packet, PacketError, decode, encode, encode_ping

#: ``info-get guestinfo.a`` of a one-shot tool: kind 1, payload, "fast close" 1.  The layout is that
#: of open-vm-tools' DataMap_Serialize; an integer's low half comes first.
REQUEST = (
    bytes.fromhex(
        "00000040"
        "00000001 00000001 00000001 00000000"
        "00000001 00000003 00000001 00000000"
        "00000002 00000002 00000014"
    )
    + b"info-get guestinfo.a"
)


def test_a_request_as_the_tools_send_it() -> None:
    assert list(Decoder().feed(REQUEST)) == [Packet(b"info-get guestinfo.a", is_last=True)]
    assert encode(b"info-get guestinfo.a", is_last=True) == REQUEST


def test_a_request_as_vgauth_service_sends_it() -> None:
    """Integers have the high half first (open-vm-tools' ``_vmxlog_htonll``)."""
    kind, flag = "00000001 00000001 00000000 00000001", "00000001 00000003 00000000 00000001"
    payload = bytes.fromhex("00000002 00000002 00000005") + b"log x"
    request = bytes.fromhex(f"00000031 {kind} {flag}") + payload
    assert list(Decoder().feed(request)) == [Packet(b"log x", is_last=True)]


def test_a_ping_as_the_tools_send_it() -> None:
    ping = bytes.fromhex("00000010 00000001 00000001 00000002 00000000")
    assert list(Decoder().feed(ping)) == [Packet(is_ping=True)]
    assert encode_ping() == ping


@given(st.lists(st.binary(min_size=1, max_size=50)), st.integers(1, 40))
def test_packets_arrive_in_pieces(payloads: list[bytes], size: int) -> None:
    data = b"".join(map(encode, payloads))
    decoder = Decoder()
    found = [
        packet.payload
        for at in range(0, len(data), size)
        for packet in decoder.feed(data[at : at + size])
    ]
    assert found == payloads
    assert not decoder.is_within


@given(st.binary(max_size=200))
def test_any_bytes_are_a_packet_or_an_error(data: bytes) -> None:
    try:
        packet = decode(data)
    except PacketError:
        return
    assert packet.is_ping or packet.payload


INTEGER = struct.pack(">IIII", 1, 1, 1, 0)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (b"", "kind None, expected 1"),
        (INTEGER, "without payload"),
        (INTEGER + INTEGER, "field 1 is given twice"),
        (struct.pack(">IIII", 1, 1, 3, 0), "kind 3, expected 1"),
        (INTEGER + struct.pack(">III", 2, 2, 0), "a string of 0 bytes, expected 1 to 0"),
        (INTEGER + struct.pack(">III", 2, 2, 9) + b"x", "a string of 9 bytes, expected 1 to 1"),
        (INTEGER + struct.pack(">III", 2, 2, 0xFFFF_FFFF) + b"x", "expected 1 to 1"),
        (INTEGER + struct.pack(">III", 3, 2, 1), "field 2 has type 3, expected 1 or 2"),
        (INTEGER + struct.pack(">IIII", 1, 2, 1, 0), "expected the opposite"),
        (INTEGER + b"\0\0", "2 bytes left, expected a field"),
        (struct.pack(">III", 1, 1, 1), "4 bytes left, expected an integer"),
        (b"".join(struct.pack(">IIII", 1, n, 1, 0) for n in range(20)), "more than 16 fields"),
    ],
)
def test_invalid_packets(fields: bytes, message: str) -> None:
    with pytest.raises(PacketError, match=message):
        decode(fields)


def test_a_length_is_checked_before_the_packet_arrives() -> None:
    for length in (0, 0xFFFF_FFFF, limits.GUESTRPC_SKIPPED_MAX_BYTES + 1):
        with pytest.raises(PacketError, match=f"a packet of {length} bytes"):
            list(Decoder().feed(struct.pack(">I", length)))


def test_a_packet_that_is_too_long_is_skipped_without_being_kept() -> None:
    decoder = Decoder()
    length = limits.GUESTRPC_PACKET_MAX_BYTES + 1
    assert list(decoder.feed(struct.pack(">I", length))) == []
    chunk = bytes(65_536)
    for _ in range(length // len(chunk)):
        assert list(decoder.feed(chunk)) == []
        assert len(decoder._buffer) == 0  # the memory is what matters
    rest = bytes(length % len(chunk)) + encode(b"next")
    assert list(decoder.feed(rest)) == [Packet(is_too_long=True), Packet(b"next")]
