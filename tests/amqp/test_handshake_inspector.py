"""Inspection of a guest's handshake up to the opening of a virtual host."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands, frame

from vsockets.amqp.frames import PROTOCOL_HEADER
from vsockets.amqp.handshake_inspector import HandshakeInspector, HandshakeRefused
from vsockets.amqp.limits import AMQP_HANDSHAKE_FRAME_MAX_BYTES, AMQP_HANDSHAKE_FRAMES_MAX

from .strategies import commands_in, cuts, handshake, pieces, short_texts, start_ok, tables

CID = 4_000_000_000


def refusal(data: bytes, *admitted: str) -> commands.Connection.Close:
    """Return the connection.close that answers ``data``, which is refused as a whole."""
    with pytest.raises(HandshakeRefused) as caught:
        HandshakeInspector(CID, lambda name: name in admitted).receive(data)
    (close,) = commands_in(caught.value.answer)
    assert isinstance(close, commands.Connection.Close)
    return close


@given(short_texts, tables, st.binary(max_size=100), cuts)
def test_handshake_is_forwarded_with_the_cid_added(
    name: str, properties: dict[str, Any], rest: bytes, places: list[int]
) -> None:
    properties.pop("vsock_cid", None)
    inspector = HandshakeInspector(CID, lambda asked: asked == name)
    data = handshake(name, properties)
    passed = b"".join(inspector.receive(piece) for piece in pieces(data + rest, places))
    assert inspector.virtual_host == name
    assert passed.startswith(PROTOCOL_HEADER)
    assert passed.endswith(rest)
    start_ok, tune_ok, opened = commands_in(passed[8 : len(passed) - len(rest)])
    assert isinstance(start_ok, commands.Connection.StartOk)
    assert start_ok.client_properties == {
        **commands_in(data[8:])[0].client_properties,
        "vsock_cid": CID,
    }
    assert isinstance(tune_ok, commands.Connection.TuneOk)
    assert isinstance(opened, commands.Connection.Open)
    assert opened.virtual_host == name


@given(short_texts, cuts)
def test_virtual_host_without_a_rule_is_refused(name: str, places: list[int]) -> None:
    inspector = HandshakeInspector(CID, lambda asked: False)
    passed = b""
    with pytest.raises(HandshakeRefused) as caught:
        for piece in pieces(handshake(name, {}), places):
            passed += inspector.receive(piece)
    (close,) = commands_in(caught.value.answer)
    assert isinstance(close, commands.Connection.Close)
    assert (close.reply_code, close.class_id, close.method_id) == (530, 10, 40)
    assert close.reply_text.startswith("NOT_ALLOWED - access to virtual host ")
    assert inspector.virtual_host is None
    assert not any(isinstance(one, commands.Connection.Open) for one in commands_in(passed[8:]))


def test_cid_property_from_the_guest_is_refused() -> None:
    close = refusal(PROTOCOL_HEADER + start_ok({"product": "pika", "vsock_cid": 2}))
    assert close.reply_code == 403
    assert "vsock_cid" in close.reply_text


@pytest.mark.parametrize(
    ("said", "code"),
    [
        (frame.marshal(commands.Channel.Open(), 1), 503),
        (frame.marshal(commands.Connection.Open("/"), 1), 503),
        (frame.marshal(commands.Connection.Start(), 0), 503),
        (b"\x08\0\1\0\0\0\0\xce", 503),
        (b"\x02\0\0\0\0\0\0\xce", 503),
        (b"\x09\0\0\0\0\0\0\xce", 501),
        (b"\x01\0\0" + (AMQP_HANDSHAKE_FRAME_MAX_BYTES + 1).to_bytes(4, "big"), 501),
        (b"\x01\0\0\0\0\0\x06\0\x0a\0\x0b\0\0\xce", 501),  # a truncated table
        (b"\x01\0\0\0\0\0\x0e\0\x0a\0\x0b\0\0\0\x06\x01aQ\0\0\0\xce", 501),  # an unknown type
        (b"\x01\0\0\0\0\0\x04\0\x0a\0\x28\xce", 502),  # no virtual host
        (b"\x01\0\0\0\0\0\x07\0\x0a\0\x28\x05/\0\xce", 502),  # a truncated virtual host
        (b"\x01\0\0\0\0\0\x09\0\x0a\0\x28\x01/\0\0\0\xce", 502),  # trailing bytes
        (b"\x01\0\0\0\0\0\x08\0\x0a\0\x28\x01\xff\0\0\xce", 502),  # not UTF-8
    ],
)
def test_invalid_handshake_frame_is_refused(said: bytes, code: int) -> None:
    assert refusal(PROTOCOL_HEADER + said, "/").reply_code == code


def test_other_protocol_is_answered_with_the_protocol_header() -> None:
    for said in (b"AMQP\0\1\0\0", b"AMQP\3\1\0\0", b"GET / HTTP/1.1", b"\x16\x03\x01"):
        with pytest.raises(HandshakeRefused) as caught:
            HandshakeInspector(CID, lambda name: True).receive(said)
        assert caught.value.answer == PROTOCOL_HEADER


@given(st.lists(st.binary(max_size=50), max_size=5))
def test_invalid_bytes_are_not_forwarded(said: list[bytes]) -> None:
    inspector = HandshakeInspector(CID, lambda name: False)
    passed = b""
    try:
        for data in [PROTOCOL_HEADER, *said]:
            passed += inspector.receive(data)
    except HandshakeRefused:
        pass
    assert inspector.virtual_host is None
    for one in commands_in(passed.removeprefix(PROTOCOL_HEADER)):
        assert isinstance(one, commands.Connection.Close | commands.Connection.CloseOk)


def test_number_of_handshake_frames_is_limited() -> None:
    heartbeat = b"\x08\0\0\0\0\0\0\xce"
    inspector = HandshakeInspector(CID, lambda name: True)
    data = PROTOCOL_HEADER + heartbeat * AMQP_HANDSHAKE_FRAMES_MAX
    assert inspector.receive(data) == data
    with pytest.raises(HandshakeRefused, match="too many frames"):
        inspector.receive(heartbeat)
