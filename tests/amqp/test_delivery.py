"""What clients get of a broker: whole frames, however they came."""

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
def test_a_client_has_whole_frames_at_any_time(parts: list[bytes], places: list[int]) -> None:
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


def test_a_large_frame_in_small_pieces() -> None:
    delivery = FrameAssembler()
    data = frame.marshal(body.ContentBody(bytes(200_000)), 1)
    got = [delivery.receive(piece) for piece in pieces(data, list(range(0, len(data), 1000)))]
    assert got[-1] == data
    assert not any(got[:-1])


@given(st.sampled_from([commands.Connection.Close(320, "x", 0, 0), commands.Connection.CloseOk()]))
def test_a_farewell_is_noticed(last: commands.Connection.Close) -> None:
    delivery = FrameAssembler()
    data = frame.marshal(last, 0)
    assert delivery.receive(data[:5]) == b""
    assert not delivery.broker_closed
    assert delivery.receive(data[5:]) == data
    assert delivery.broker_closed


def test_a_broker_that_speaks_another_protocol_has_said_all() -> None:
    delivery = FrameAssembler()
    assert delivery.receive(PROTOCOL_HEADER[:3]) == b""
    assert delivery.receive(PROTOCOL_HEADER[3:]) == PROTOCOL_HEADER
    assert delivery.broker_closed


@pytest.mark.parametrize(
    "data",
    [b"HTTP/1.1 200", b"AMQP\0\1\0\0", b"\x03\0\1" + (AMQP_FRAME_MAX_BYTES + 1).to_bytes(4, "big")],
)
def test_what_is_not_amqp_is_refused(data: bytes) -> None:
    with pytest.raises(FrameError):
        FrameAssembler().receive(data)


@given(st.binary(max_size=100), cuts)
def test_a_client_that_agrees_is_understood(before: bytes, places: list[int]) -> None:
    parting = CloseHandshake()
    answers = [parting.receive(piece) for piece in pieces(before + CLOSE_OK, places)]
    assert answers[-1]
    assert not parting.receive(b"x")
