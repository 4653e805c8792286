"""Layout of requests and records, and validation when they are decoded."""

from __future__ import annotations

import contextlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.model.buffers import BufferSizes
from vsockets.protocol import (
    PADDING,
    RECORD_SIZE,
    REQUEST_SIZE,
    Op,
    ProtocolError,
    Record,
    Request,
    RequestFlag,
    Role,
    encode_stream,
)

little_endian_only = pytest.mark.skipif(
    sys.byteorder != "little", reason="the golden bytes are a little-endian machine's"
)

u16 = st.integers(0, 2**16 - 1)
u32 = st.integers(0, 2**32 - 1)
u64 = st.integers(0, 2**64 - 1)
requests = st.builds(Request, u16, u16, u32, u32, u32, u32, u32, u64, u64, u64, u64, u64)
records = st.builds(Record, u16, u16, u32, u32, u32, u32, u32, u32, u32, u32, u64, u64, u64)

GOLDEN_REQUEST = bytes.fromhex(
    "016b7376"  # magic: "vsk", version 1
    "0300"  # op: CONNECT
    "0100"  # flags: POLLING
    "03000000"  # local CID
    "ffffffff"  # local port
    "02000000"  # peer CID
    "88130000"  # peer port
    "80000000"  # backlog
    "00000000"  # nothing
    "0000010000000000"  # size
    "8000000000000000"  # minimum
    "0000040000000000"  # maximum
    "efcdab8967452301"  # cookie
    "1032547698badcfe"  # inode
)
REQUEST = Request(
    Op.CONNECT,
    RequestFlag.POLLING,
    3,
    0xFFFF_FFFF,
    2,
    5000,
    128,
    65_536,
    128,
    262_144,
    0x0123_4567_89AB_CDEF,
    0xFEDC_BA98_7654_3210,
)

GOLDEN_RECORD = bytes.fromhex(
    "016b7376"  # magic
    "6800"  # status: ECONNRESET
    "0200"  # flags: TRUSTED
    "02000000"  # local CID
    "88130000"  # local port
    "03000000"  # peer CID
    "00040000"  # peer port
    "03000000"  # role: CONNECTED
    "39300000"  # pid
    "e8030000"  # uid
    "e9030000"  # gid
    "0080000000000000"  # size
    "8000000000000000"  # minimum
    "0000040000000000"  # maximum
)
RECORD = Record(
    104,
    RequestFlag.TRUSTED_STREAM,
    2,
    5000,
    3,
    1024,
    Role.CONNECTED,
    12345,
    1000,
    1001,
    32_768,
    128,
    262_144,
)


def test_sizes_of_messages_are_fixed() -> None:
    assert (REQUEST_SIZE, RECORD_SIZE, len(PADDING)) == (72, 64, 3072)
    assert not any(PADDING)


@little_endian_only
def test_request_has_the_golden_layout() -> None:
    assert REQUEST.encode() == GOLDEN_REQUEST
    assert Request.decode(GOLDEN_REQUEST) == REQUEST


@little_endian_only
def test_record_has_the_golden_layout() -> None:
    assert RECORD.encode() == GOLDEN_RECORD
    assert Record.decode(GOLDEN_RECORD) == RECORD


def test_enumerations_have_fixed_numbers() -> None:
    assert {op.name: op.value for op in Op} == {
        "BIND": 1,
        "LISTEN": 2,
        "CONNECT": 3,
        "UPDATE": 4,
        "BIND_DATAGRAM": 5,
        "ROUTE": 6,
        "QUERY": 7,
        "LOCAL_CID": 8,
        "SETTLE": 9,
        "CATCH_ALL": 10,
        "CAPTURE": 11,
        "RESIZE": 12,
        "COUNT": 14,
        "BIND_SOCKET": 13,
    }
    assert {flag.name: flag.value for flag in RequestFlag} == {
        "POLLING": 1,
        "TRUSTED_STREAM": 2,
        "TRUSTED_DATAGRAM": 4,
        "OK_LINE": 8,
        "UNPRIVILEGED": 16,
        "NAMED": 32,
    }
    assert {role.name: role.value for role in Role} == {
        "BOUND": 1,
        "LISTENING": 2,
        "CONNECTED": 3,
        "DATAGRAM": 4,
        "NOT_LISTENING": 5,
        "CAPTURE": 6,
        "BUFFER": 7,
    }


def test_properties_group_addresses_and_sizes() -> None:
    assert REQUEST.sizes() == BufferSizes(65_536, 128, 262_144)
    assert RECORD.local == (2, 5000)
    assert RECORD.peer == (3, 1024)


@given(requests)
def test_decoded_request_equals_the_encoded_one(request: Request) -> None:
    data = request.encode()
    assert len(data) == REQUEST_SIZE
    assert Request.decode(data) == request


@given(records)
def test_decoded_record_equals_the_encoded_one(record: Record) -> None:
    data = record.encode()
    assert len(data) == RECORD_SIZE
    assert Record.decode(data) == record


@given(st.tuples(u32, u32), st.tuples(u32, u32), st.tuples(u32, u32, u32), u64, u64, u64)
def test_encode_stream_equals_an_encoded_record(
    local: tuple[int, int],
    peer: tuple[int, int],
    credentials: tuple[int, int, int],
    size: int,
    minimum: int,
    maximum: int,
) -> None:
    fields = *local, *peer, Role.CONNECTED, *credentials, size, minimum, maximum
    assert encode_stream(*fields) == Record(0, 0, *fields).encode()


# Bytes that pass the check of the length, and that of the magic.
junk = (
    st.binary(max_size=200)
    | st.binary(min_size=REQUEST_SIZE, max_size=REQUEST_SIZE)
    | st.binary(min_size=RECORD_SIZE, max_size=RECORD_SIZE)
)
junk |= junk.map(lambda data: GOLDEN_REQUEST[:4] + data[4:])


@given(junk)
def test_request_decodes_only_what_encode_produces(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert Request.decode(data).encode() == data


@given(junk)
def test_record_decodes_only_what_encode_produces(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        assert Record.decode(data).encode() == data


@pytest.mark.parametrize("size", [0, 1, REQUEST_SIZE - 1, REQUEST_SIZE + 1])
def test_request_of_another_length_raises_protocol_error(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        Request.decode((GOLDEN_REQUEST * 2)[:size])


@pytest.mark.parametrize("size", [0, 1, RECORD_SIZE - 1, RECORD_SIZE + 1])
def test_record_of_another_length_raises_protocol_error(size: int) -> None:
    with pytest.raises(ProtocolError, match=f"{size} bytes"):
        Record.decode((GOLDEN_RECORD * 2)[:size])


@pytest.mark.parametrize("at", range(4))
def test_another_magic_raises_protocol_error(at: int) -> None:
    data = bytearray(REQUEST.encode())
    data[at] ^= 1
    with pytest.raises(ProtocolError, match="request starts with"):
        Request.decode(bytes(data))
    data = bytearray(RECORD.encode())
    data[at] ^= 1
    with pytest.raises(ProtocolError, match="record starts with"):
        Record.decode(bytes(data))
