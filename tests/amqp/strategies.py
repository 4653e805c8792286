"""Strategies for AMQP 0-9-1, encoded by ``pamqp``, the codec of aio-pika."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st
from pamqp import body, commands, frame, header, heartbeat

from vsockets.amqp.frames import PROTOCOL_HEADER

short_texts = st.text(max_size=40).filter(lambda text: "\0" not in text)
channels = st.integers(1, 0xFFFF)

values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**63 - 1)
    | st.text()
    | st.binary().map(bytearray),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(short_texts, inner, max_size=3),
    max_leaves=8,
)
tables = st.dictionaries(short_texts, values, max_size=5)

contents = st.builds(
    lambda channel, data: (
        frame.marshal(commands.Basic.Deliver("c", 1, False, "", "q"), channel)
        + frame.marshal(header.ContentHeader(body_size=len(data)), channel)
        + frame.marshal(body.ContentBody(data), channel)
    ),
    channels,
    st.binary(min_size=1, max_size=300),
)
heartbeats = st.just(frame.marshal(heartbeat.Heartbeat(), 0))
acks = st.builds(
    lambda channel, tag: frame.marshal(commands.Basic.Ack(tag), channel),
    channels,
    st.integers(0, 2**32),
)
conversations = st.lists(contents | heartbeats | acks, max_size=8)
cuts = st.lists(st.integers(0, 2000), max_size=8)


def start_ok(properties: dict[str, Any]) -> bytes:
    return frame.marshal(commands.Connection.StartOk(properties, "PLAIN", "\0a\0b", "en_US"), 0)


def handshake(virtual_host: str, properties: dict[str, Any]) -> bytes:
    """Return a client's handshake up to the opening of ``virtual_host``."""
    return (
        PROTOCOL_HEADER
        + start_ok(properties)
        + frame.marshal(commands.Connection.TuneOk(2047, 131_072, 60), 0)
        + frame.marshal(commands.Connection.Open(virtual_host), 0)
    )


def pieces(data: bytes, places: list[int]) -> Iterator[bytes]:
    """Yield ``data`` in pieces, cut at ``places``."""
    ends = sorted({min(place, len(data)) for place in places} | {0, len(data)})
    for begin, end in itertools.pairwise(ends):
        yield data[begin:end]


def commands_in(data: bytes) -> list[Any]:
    """Return the frames of ``data``, decoded by pamqp."""
    found: list[Any] = []
    while data:
        size, _, one = frame.unmarshal(data)
        found.append(one)
        data = data[size:]
    return found
