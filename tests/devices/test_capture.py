"""Captures of a device: filters, slow readers, closed readers."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capture.dissecting import take_records, tapped
from vsockets.devices.capture import CaptureSink
from vsockets.devices.limits import DEVICE_CAPTURES_MAX
from vsockets.devices.loop import DeviceLoop
from vsockets.limits import CAPTURE_PAYLOAD_MAX_BYTES
from vsockets.protocol import ProtocolError
from vsockets.protocol.vsockmon import HEADER_SIZE, Captured, Operation, encode_header

GUEST, HOST = (3, 1024), (2, 5000)


@pytest.fixture
def loop() -> Iterator[DeviceLoop]:
    loop = DeviceLoop()
    yield loop
    loop.close()


@pytest.fixture
def capture(loop: DeviceLoop) -> Iterator[CaptureSink]:
    capture = CaptureSink(loop)
    yield capture
    capture.close()


def payload_of(record: Captured) -> bytes:
    return record.body[HEADER_SIZE:]


def test_payload_in_parts_is_joined_and_cut_to_its_length(capture: CaptureSink) -> None:
    with tapped(capture) as records:
        parts = [memoryview(b"hel"), memoryview(b"lo, and more")]
        capture.record(Operation.PAYLOAD, GUEST, HOST, parts, 5)
        (record,) = take_records(records)
    assert record.body == encode_header(Operation.PAYLOAD, GUEST, HOST) + b"hello"
    assert (record.missed, record.length) == (0, HEADER_SIZE + 5)


def test_length_beyond_the_payload_is_reduced(capture: CaptureSink) -> None:
    with tapped(capture) as records:
        capture.record(Operation.PAYLOAD, GUEST, HOST, [memoryview(b"short")], 0xFFFF_FFFF)
        (record,) = take_records(records)
    assert record.length == len(record.body) == HEADER_SIZE + 5


def test_payload_limit_applies_per_capture(capture: CaptureSink) -> None:
    with (
        tapped(capture, limit=2) as little,
        tapped(capture, limit=0) as none,
        tapped(capture) as all_of_it,
    ):
        capture.record(Operation.PAYLOAD, GUEST, HOST, [memoryview(b"12345")], 5)
        for records, kept in ((little, b"12"), (none, b""), (all_of_it, b"12345")):
            (record,) = take_records(records)
            assert payload_of(record) == kept
            assert record.length == HEADER_SIZE + 5


def test_port_filter_matches_either_side(capture: CaptureSink) -> None:
    with tapped(capture, port=5000) as records:
        for there in (HOST, (2, 5001)):
            capture.record(Operation.CONNECT, GUEST, there)
            capture.record(Operation.CONTROL, there, GUEST)
        assert len(take_records(records)) == 2


def test_long_stream_is_split_into_records(capture: CaptureSink) -> None:
    data = bytes(range(256)) * 1000
    with tapped(capture) as records:
        records.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        got = []
        view = memoryview(data)
        for begin in range(0, len(data), 100_000):
            part = view[begin : begin + 100_000]
            capture.stream(GUEST, HOST, [part, memoryview(b"not sent")], len(part))
            got += take_records(records)
    assert b"".join(map(payload_of, got)) == data
    assert max(len(payload_of(record)) for record in got) == CAPTURE_PAYLOAD_MAX_BYTES


def test_slow_reader_misses_records_and_gets_their_number(capture: CaptureSink) -> None:
    with tapped(capture) as records:
        for _ in range(10_000):  # more than any buffer takes
            capture.record(Operation.PAYLOAD, GUEST, HOST, [memoryview(bytes(1000))], 1000)
        came = take_records(records)
        assert 0 < len(came) < 10_000
        assert not any(record.missed for record in came)
        capture.record(Operation.CONTROL, GUEST, HOST)
        capture.record(Operation.CONTROL, GUEST, HOST)
        missed = [record.missed for record in take_records(records)]
        assert missed == [10_000 - len(came), 0]


def test_closed_capture_is_removed_and_others_continue(capture: CaptureSink) -> None:
    gone = tapped(capture)
    with tapped(capture) as stays:
        gone.close()
        for _ in range(2):
            capture.record(Operation.CONTROL, GUEST, HOST)
        assert len(take_records(stays)) == 2
        assert len(capture.recorders) == 1
    capture.record(Operation.CONTROL, GUEST, HOST)
    assert not capture.recorders


def test_number_of_captures_is_limited(capture: CaptureSink, loop: DeviceLoop) -> None:
    readers = [tapped(capture) for _ in range(DEVICE_CAPTURES_MAX)]
    with tapped(capture) as refused:
        assert refused.recv(1) == b""
    readers.pop().close()
    loop.turn()
    # takes the place of the closed one, although nothing was recorded since
    with tapped(capture) as another:
        capture.record(Operation.CONTROL, GUEST, HOST)
        assert len(take_records(another)) == 1
    for reader in readers:
        reader.close()


def test_final_record_reports_missed_records(capture: CaptureSink, loop: DeviceLoop) -> None:
    with tapped(capture) as records:
        for _ in range(10_000):
            capture.record(Operation.PAYLOAD, GUEST, HOST, [memoryview(bytes(1000))], 1000)
        records.send(b"this means nothing")
        loop.turn()
        records.shutdown(socket.SHUT_WR)
        loop.turn()  # no room for the final record yet
        assert len(capture.recorders) == 1
        came = take_records(records)
        loop.turn()
        (last,) = take_records(records)
        assert last.body == b""
        assert last.missed == 10_000 - len(came)
        assert records.recv(1) == b""
        assert not capture.recorders


u32 = st.integers(0, 2**32 - 1)


@given(
    st.integers(0, 2**64 - 1),
    u32,
    u32,
    st.binary(min_size=HEADER_SIZE, max_size=200) | st.just(b""),
)
def test_encoded_message_decodes_to_itself(
    nanoseconds: int, missed: int, length: int, body: bytes
) -> None:
    record = Captured(nanoseconds, missed, length, body)
    if length >= len(body):
        assert Captured.decode(record.encode()) == record
    else:
        with pytest.raises(ProtocolError, match="captured record of"):
            Captured.decode(record.encode())


@given(st.binary(max_size=HEADER_SIZE + 15).filter(lambda data: len(data) != 16))
def test_short_messages_are_rejected(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="captured record of"):
        Captured.decode(data)
