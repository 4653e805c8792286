"""The handshake, packet by packet."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.devices.vmci.handshake import Accepting, Connecting
from vsockets.devices.vmci.packets import Handle, Kind, Packet, handle_value
from vsockets.model.buffers import BufferSizes

HANDLE = Handle(3, 0x400)
SIZES = BufferSizes(65_536, 128, 262_144)


def packet(kind: int, value: int = 0, protocol: int = 0) -> Packet:
    return Packet(kind, 1, 2, value, 0, protocol)


def found(handle: Handle, size: int) -> bool:
    return handle == HANDLE


@pytest.mark.parametrize("protocol_v1", [False, True])
def test_connect_by_the_guest(protocol_v1: bool) -> None:
    request = packet(Kind.REQUEST, 4096) if protocol_v1 else packet(Kind.REQUEST2, 4096, 3)
    accepting = Accepting(request, found)
    assert accepting.possible and accepting.protocol_v1 is protocol_v1
    step = accepting.accepted(5000)
    assert step.packets == [
        (Kind.NEGOTIATE, 5000, 0) if protocol_v1 else (Kind.NEGOTIATE2, 5000, 1)
    ]
    step = accepting.receive(packet(Kind.OFFER, handle_value(HANDLE)))
    assert step.handle == HANDLE
    assert step.packets == [(Kind.ATTACH, handle_value(HANDLE), 0)]


def test_invalid_requests_are_refused() -> None:
    assert not Accepting(packet(Kind.REQUEST2, 0, 1), found).possible
    assert not Accepting(packet(Kind.REQUEST2, 4096, 0), found).possible
    assert not Accepting(packet(Kind.REQUEST2, 4096, 2), found).possible


def test_unexpected_offer_fails_the_handshake() -> None:
    accepting = Accepting(packet(Kind.REQUEST2, 4096, 1), found)
    step = accepting.receive(packet(Kind.OFFER, handle_value(HANDLE)))
    assert step.error == errno.ECONNRESET and step.packets == [(Kind.RST, 0, 0)]
    accepting = Accepting(packet(Kind.REQUEST2, 4096, 1), found)
    accepting.accepted(4096)
    step = accepting.receive(packet(Kind.OFFER, handle_value(Handle(3, 1))))
    assert step.error == errno.ECONNRESET


def test_connect_to_the_guest() -> None:
    connecting = Connecting(SIZES, HANDLE, found)
    assert connecting.begin().packets == [(Kind.REQUEST2, 65_536, 1)]
    step = connecting.receive(packet(Kind.NEGOTIATE2, 128, 1))
    assert step.packets == [(Kind.OFFER, handle_value(HANDLE), 0)]
    step = connecting.receive(packet(Kind.ATTACH, handle_value(HANDLE)))
    assert step.handle == HANDLE and connecting.size == 128


def test_fallback_to_version_1() -> None:
    connecting = Connecting(SIZES, HANDLE, found)
    connecting.begin()
    assert connecting.receive(packet(Kind.INVALID)).packets == [(Kind.REQUEST, 65_536, 0)]
    assert connecting.receive(packet(Kind.RST)).packets == []  # for the first request
    assert connecting.receive(packet(Kind.NEGOTIATE, 65_536)).packets[0][0] == Kind.OFFER


@pytest.mark.parametrize(
    ("answer", "error", "told"),
    [
        (packet(Kind.RST), errno.ECONNRESET, False),
        (packet(Kind.NEGOTIATE2, 127, 1), errno.EINVAL, True),
        (packet(Kind.NEGOTIATE2, 262_145, 1), errno.EINVAL, True),
        (packet(Kind.NEGOTIATE2, 65_536, 2), errno.EINVAL, True),
        (packet(Kind.NEGOTIATE, 65_536), errno.ECONNRESET, True),
        (packet(Kind.ATTACH, handle_value(HANDLE)), errno.ECONNRESET, True),
        (packet(99), errno.ECONNRESET, True),
    ],
)
def test_replies_that_fail_the_handshake(answer: Packet, error: int, told: bool) -> None:
    connecting = Connecting(SIZES, HANDLE, found)
    connecting.begin()
    step = connecting.receive(answer)
    assert step.error == error
    assert step.packets == ([(Kind.RST, 0, 0)] if told else [])


@given(st.lists(st.tuples(st.integers(0, 13), st.integers(0, 2**64 - 1), st.integers(0, 65_535))))
def test_only_the_valid_sequence_connects(packets: list[tuple[int, int, int]]) -> None:
    connecting = Connecting(SIZES, HANDLE, found)
    connecting.begin()
    for kind, value, protocol in packets:
        step = connecting.receive(packet(kind, value, protocol))
        if step.handle is not None:
            assert SIZES.minimum <= connecting.size <= SIZES.maximum
            assert value == handle_value(HANDLE)
        # A reset is never answered with a reset.
        assert kind != Kind.RST or (Kind.RST, 0, 0) not in step.packets
        if step.error or step.handle:
            break
