"""The codec of vhost-user messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.limits import VHOST_USER_DESCRIPTORS_MAX
from vsockets.devices.unix_server import DeviceProtocolError
from vsockets.devices.vhost_user.messages import (
    HEADER,
    Decoder,
    Message,
    RequestType,
    encode,
    reply,
)


def read(decoder: Decoder, data: bytes, step: int, fds: list[int]) -> list[Message]:
    """Return what a socket gives: never more than wanted, sometimes less."""
    messages = []
    while data:
        size = min(step, decoder.wanted)
        message = decoder.receive(data[:size], fds)
        fds = []
        data = data[size:]
        if message is not None:
            messages.append(message)
    return messages


@given(
    st.lists(st.tuples(st.integers(0, 99), st.binary(max_size=100)), max_size=5),
    st.integers(1, 300),
)
def test_messages_are_complete_for_any_read_sizes(sent: list[tuple[int, bytes]], step: int) -> None:
    decoder = Decoder()
    data = b"".join(encode(request, payload) for request, payload in sent)
    got = read(decoder, data, step, [])
    assert [(message.request, message.payload) for message in got] == sent


def test_descriptors_belong_to_their_message() -> None:
    decoder = Decoder()
    (first,) = read(decoder, encode(RequestType.SET_OWNER), 99, [])
    (second,) = read(decoder, encode(RequestType.ADD_MEM_REG, bytes(40)), 7, [5, 6])
    (third,) = read(decoder, encode(RequestType.SET_OWNER), 99, [])
    assert (first.fds, second.fds, third.fds) == ((), (5, 6), ())


def test_descriptors_of_an_incomplete_message_are_returned() -> None:
    decoder = Decoder()
    decoder.receive(b"\1", [5])
    assert decoder.pending_fds() == [5]


@pytest.mark.parametrize(
    "header",
    [
        HEADER.pack(1, 0, 0),
        HEADER.pack(1, 2, 0),
        HEADER.pack(1, 5, 0),
        HEADER.pack(1, 1, 4097),
        HEADER.pack(1, 1, 0xFFFF_FFFF),
    ],
)
def test_malformed_requests_are_refused(header: bytes) -> None:
    decoder = Decoder()
    with pytest.raises(DeviceProtocolError):
        decoder.receive(header, [5, 6])
    assert decoder.pending_fds() == [5, 6]


def test_descriptors_of_a_message_are_limited() -> None:
    decoder = Decoder()
    decoder.receive(b"\1", [5] * VHOST_USER_DESCRIPTORS_MAX)
    with pytest.raises(DeviceProtocolError, match="too many descriptors: 9"):
        decoder.receive(b"\1", [6])
    assert decoder.pending_fds() == [*([5] * VHOST_USER_DESCRIPTORS_MAX), 6]


def test_reply_has_the_reply_flag() -> None:
    assert reply(Message(1, 1, b""), b"12345678") == HEADER.pack(1, 5, 8) + b"12345678"
