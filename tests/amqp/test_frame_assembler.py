"""Assembly of whole frames from a broker's bytes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import body, commands, frame

from vsockets.amqp.frames import (
    CLOSE_OK,
    PROTOCOL_HEADER,
    CloseHandshake,
    FrameAssembler,
    FrameError,
)
from vsockets.amqp.limits import AMQP_FRAME_MAX_BYTES

from .strategies import commands_in, conversations, cuts, pieces


@given(conversations, cuts)
def test_client_receives_whole_frames_only(parts: list[bytes], places: list[int]) -> None:
    delivery = FrameAssembler()
    sent = got = b""
    data = b"".join(parts)
    for piece in pieces(data, places):
        sent += piece
        new = delivery.receive(piece)
        assert len(commands_in(new)) <= len(data)
        got += new
        assert sent.startswith(got)
        assert not any(len(got) < sum(map(len, parts[:n])) <= len(sent) for n in range(len(parts)))
    assert got == data
    assert not delivery.broker_closed


def test_large_frame_in_small_pieces_is_assembled() -> None:
    delivery = FrameAssembler()
    data = frame.marshal(body.ContentBody(bytes(200_000)), 1)
    got = [delivery.receive(piece) for piece in pieces(data, list(range(0, len(data), 1000)))]
    assert got[-1] == data
    assert not any(got[:-1])


@given(st.sampled_from([commands.Connection.Close(320, "x", 0, 0), commands.Connection.CloseOk()]))
def test_close_of_the_broker_is_detected(last: commands.Connection.Close) -> None:
    delivery = FrameAssembler()
    data = frame.marshal(last, 0)
    assert delivery.receive(data[:5]) == b""
    assert not delivery.broker_closed
    assert delivery.receive(data[5:]) == data
    assert delivery.broker_closed


def test_protocol_header_of_the_broker_counts_as_close() -> None:
    delivery = FrameAssembler()
    assert delivery.receive(PROTOCOL_HEADER[:3]) == b""
    assert delivery.receive(PROTOCOL_HEADER[3:]) == PROTOCOL_HEADER
    assert delivery.broker_closed


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 200", b"AMQP\0\1\0\0", b"\x03\0\1" + (AMQP_FRAME_MAX_BYTES + 1).to_bytes(4, "big")],
)
def test_invalid_frame_raises_frame_error(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameAssembler().receive(data)


@given(st.binary(max_size=100), cuts)
def test_close_ok_is_recognized_in_pieces(before: bytes, places: list[int]) -> None:
    parting = CloseHandshake()
    answers = [parting.receive(piece) for piece in pieces(before + CLOSE_OK, places)]
    assert answers[-1]
    assert not parting.receive(b"x")
