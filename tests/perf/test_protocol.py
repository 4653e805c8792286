"""Requests, headers and counts, and invalid ones."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.perf.limits import PERF_MESSAGE_MAX_BYTES
from vsockets.perf.measures import percentiles
from vsockets.perf.protocol import (
    HEADER_SIZE,
    Header,
    Job,
    MessageKind,
    PerfProtocolError,
    PerfRequest,
    decode_count,
    encode_count,
)

u64 = st.integers(0, (1 << 64) - 1)


@given(st.sampled_from(Job), st.integers(1, PERF_MESSAGE_MAX_BYTES), st.integers(0, 600_000))
def test_request_round_trip(job: Job, size: int, milliseconds: int) -> None:
    request = PerfRequest(job, size, milliseconds)
    assert PerfRequest.decode(request.encode()) == request


@given(st.sampled_from(MessageKind), u64, u64, st.integers(0, 100))
def test_header_round_trip(kind: MessageKind, run: int, number: int, more: int) -> None:
    header = Header(kind, run, number)
    data = header.encode(HEADER_SIZE + more)
    assert len(data) == HEADER_SIZE + more
    assert Header.decode(data) == header


@given(st.binary(max_size=40) | st.binary(max_size=30).map(lambda rest: b"VSP1" + rest))
def test_invalid_bytes_are_refused(data: bytes) -> None:
    for decode in (PerfRequest.decode, Header.decode):
        try:
            decoded = decode(data)
        except PerfProtocolError:
            continue
        assert data.startswith(decoded.encode()[:5])


@pytest.mark.parametrize(
    "request_",
    [
        PerfRequest(Job.SINK, 0),
        PerfRequest(Job.SINK, PERF_MESSAGE_MAX_BYTES + 1),
        PerfRequest(Job.SOURCE, 1, 600_001),
    ],
)
def test_excessive_request_is_refused(request_: PerfRequest) -> None:
    with pytest.raises(PerfProtocolError):
        PerfRequest.decode(request_.encode())


@given(u64)
def test_count_round_trip(count: int) -> None:
    assert decode_count(encode_count(count)) == count


def test_missing_count_is_refused() -> None:
    with pytest.raises(PerfProtocolError):
        decode_count(b"")


def test_percentiles_use_the_nearest_rank() -> None:
    found = percentiles(array("Q", (1000 * number for number in range(100, 0, -1))))
    assert found == {"min": 1, "p50": 50, "p90": 90, "p99": 99, "p99.9": 100, "max": 100}
    assert set(percentiles(array("Q", [7000])).values()) == {7.0}
