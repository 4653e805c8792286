"""Requests of a vhost-user front end, valid and invalid."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vsockets.devices.guest_memory import GuestMemory
from vsockets.devices.unix_server import DeviceProtocolError
from vsockets.devices.vhost_user import Session, Vring, messages
from vsockets.devices.vhost_user.messages import (
    F_PROTOCOL_FEATURES,
    Flag,
    Message,
    Protocol,
    RequestType,
)

VERSION_1 = 1 << 32
SIZE = 1 << 16
GUEST, USER = 0x10_0000, 0x7000_0000


class Device:
    features = VERSION_1
    queues = 2

    def __init__(self) -> None:
        self.memory = GuestMemory()
        self.used = 0
        self.running: dict[int, tuple[int, int, int]] = {}
        self.resets = 0

    def configuration(self) -> bytes:
        return b"12345678"

    def set_features(self, features: int) -> None:
        self.used = features

    def start_ring(self, index: int, vring: Vring, addresses: tuple[int, int, int]) -> None:
        assert index not in self.running
        self.memory.view(addresses[0], 16)
        self.running[index] = addresses

    def stop_ring(self, index: int) -> int:
        del self.running[index]
        return 42

    def reset(self) -> None:
        assert not self.running
        self.resets += 1


class Front:
    """A front end that sends requests to a session."""

    def __init__(self) -> None:
        self.device = Device()
        self.session = Session(self.device)

    def request_reply(self, request: int, payload: bytes = b"") -> bytes:
        answer = self.session.handle(Message(request, 1, payload))
        assert answer is not None
        assert messages.HEADER.unpack_from(answer)[1] == 1 | Flag.REPLY
        return answer[messages.HEADER.size :]

    def number(self, request: int) -> int:
        return int(messages.U64.unpack(self.request_reply(request))[0])

    def request_ack(self, request: int, payload: bytes = b"", *fds: int) -> int:
        message = Message(request, 1 | Flag.NEED_REPLY, payload, tuple(os.dup(fd) for fd in fds))
        answer = self.session.handle(message)
        assert answer is not None
        return int(messages.U64.unpack(answer[messages.HEADER.size :])[0])

    def negotiate(self) -> None:
        features = int(Protocol.REPLY_ACK | Protocol.CONFIG)
        message = Message(RequestType.SET_PROTOCOL_FEATURES, 1, messages.U64.pack(features))
        assert self.session.handle(message) is None
        features = VERSION_1 | F_PROTOCOL_FEATURES
        assert self.request_ack(RequestType.SET_FEATURES, messages.U64.pack(features)) == 0


@pytest.fixture
def front() -> Iterator[Front]:
    front = Front()
    front.negotiate()
    yield front
    front.session.close()


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("memory")
    os.ftruncate(fd, 2 * SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def kick() -> Iterator[int]:
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def region(number: int = 0, size: int = SIZE, offset: int | None = None) -> bytes:
    at = number * SIZE
    return messages.REGION.pack(GUEST + at, size, USER + at, at if offset is None else offset)


def table(*regions: bytes) -> bytes:
    return messages.REGIONS.pack(len(regions), 0) + b"".join(regions)


def set_ring(front: Front, kick: int, index: int = 0) -> None:
    state = messages.VRING_STATE
    assert front.request_ack(RequestType.SET_VRING_NUM, state.pack(index, 16)) == 0
    assert front.request_ack(RequestType.SET_VRING_BASE, state.pack(index, 7)) == 0
    address = messages.VRING_ADDR.pack(index, 0, USER, USER + 0x2000, USER + 0x1000, 0)
    assert front.request_ack(RequestType.SET_VRING_ADDR, address) == 0
    assert front.request_ack(RequestType.SET_VRING_KICK, messages.U64.pack(index), kick) == 0
    assert front.request_ack(RequestType.SET_VRING_ENABLE, state.pack(index, 1)) == 0


def test_feature_negotiation(front: Front) -> None:
    assert front.number(RequestType.GET_FEATURES) == VERSION_1 | F_PROTOCOL_FEATURES
    assert front.device.used == VERSION_1
    assert front.number(RequestType.GET_QUEUE_NUM) == 2
    assert front.number(RequestType.GET_MAX_MEM_SLOTS) > 8
    assert front.request_ack(RequestType.SET_FEATURES, messages.U64.pack(1 << 5)) == errno.EINVAL
    assert (
        front.request_ack(RequestType.SET_PROTOCOL_FEATURES, messages.U64.pack(1 << 63))
        == errno.EINVAL
    )


def test_configuration_space(front: Front) -> None:
    config = messages.CONFIG
    assert front.request_reply(RequestType.GET_CONFIG, config.pack(2, 3, 0) + b"...") == (
        config.pack(2, 3, 0) + b"345"
    )
    assert front.request_reply(RequestType.GET_CONFIG, config.pack(2, 7, 0) + bytes(7)) == b""
    assert (
        front.request_reply(RequestType.GET_CONFIG, config.pack(0xFFFF_FFFF, 0xFFFF_FFFF, 0)) == b""
    )
    assert front.request_reply(RequestType.GET_CONFIG, b"short") == b""
    assert front.request_ack(RequestType.SET_CONFIG, config.pack(0, 1, 0) + b"x") == errno.ENOTSUP


def test_ring_starts_when_enabled_and_stops_at_get_vring_base(
    front: Front, memory: int, kick: int
) -> None:
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region()), memory) == 0
    set_ring(front, kick)
    assert front.device.running == {0: (GUEST, GUEST + 0x1000, GUEST + 0x2000)}
    state = messages.VRING_STATE
    assert front.request_ack(RequestType.SET_VRING_BASE, state.pack(0, 0)) == errno.EBUSY
    assert front.request_reply(RequestType.GET_VRING_BASE, state.pack(0, 0)) == state.pack(0, 42)
    assert front.device.running == {}


def test_ring_is_enabled_at_kick_without_protocol_features(memory: int, kick: int) -> None:
    front = Front()
    tell = front.session.handle
    assert tell(Message(RequestType.SET_FEATURES, 1, messages.U64.pack(VERSION_1))) is None
    assert tell(Message(RequestType.SET_MEM_TABLE, 1, table(region()), (os.dup(memory),))) is None
    tell(Message(RequestType.SET_VRING_NUM, 1, messages.VRING_STATE.pack(1, 16)))
    address = messages.VRING_ADDR.pack(1, 0, USER, USER + 0x2000, USER + 0x1000, 0)
    tell(Message(RequestType.SET_VRING_ADDR, 1, address))
    tell(Message(RequestType.SET_VRING_KICK, 1, messages.U64.pack(1), (os.dup(kick),)))
    assert 1 in front.device.running
    front.session.close()
    assert front.device.resets == 1


def test_need_reply_is_honoured_without_reply_ack(memory: int) -> None:
    """QEMU negotiates REPLY_ACK only once.

    After a restart of the device it sets NEED_REPLY without negotiation, and waits.
    """
    front = Front()
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region()), memory) == 0
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region())) == errno.EINVAL
    front.session.close()


def test_memory_changes_restart_running_rings(front: Front, memory: int, kick: int) -> None:
    slot = messages.U64.pack(0)
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region()), memory) == 0
    set_ring(front, kick)
    assert front.request_ack(RequestType.ADD_MEM_REG, slot + region(1), memory) == 0
    assert len(front.device.memory) == 2
    assert front.request_ack(RequestType.REM_MEM_REG, slot + region(1)) == 0
    assert front.request_ack(RequestType.REM_MEM_REG, slot + region(1)) == errno.EINVAL
    assert 0 in front.device.running
    assert (
        front.request_ack(RequestType.SET_MEM_TABLE, table(region(0), region(1)), memory, memory)
        == 0
    )
    assert 0 in front.device.running
    # Unmapped memory of a ring stops the ring.
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region(1)), memory) == errno.EINVAL
    assert front.device.running == {}


@pytest.mark.parametrize(
    ("payload", "files"),
    [
        (b"", 0),
        (table(region()), 0),
        (table(region()), 2),
        (struct.pack("=II", 9, 0) + region() * 9, 8),
        (struct.pack("=II", 0xFFFF_FFFF, 0), 0),
        (table(region(size=0)), 1),
        (table(region(size=4 * SIZE)), 1),
        (table(region(size=1 << 63)), 1),
        (table(region(offset=1 << 63)), 1),
        (table(region(offset=123)), 1),
        (table(region(), region()), 2),
    ],
)
def test_invalid_memory_tables_are_refused(
    front: Front, memory: int, payload: bytes, files: int
) -> None:
    assert front.request_ack(RequestType.SET_MEM_TABLE, payload, *[memory] * files) != 0


def test_memory_must_be_a_regular_file(front: Front, kick: int) -> None:
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region()), kick) == errno.EINVAL


@pytest.mark.parametrize(
    ("request_", "payload", "code"),
    [
        (RequestType.SET_VRING_NUM, messages.VRING_STATE.pack(2, 16), errno.EINVAL),
        (RequestType.SET_VRING_NUM, messages.VRING_STATE.pack(0, 0), errno.EINVAL),
        (RequestType.SET_VRING_NUM, messages.VRING_STATE.pack(0, 65_536), errno.EINVAL),
        (RequestType.SET_VRING_NUM, b"", errno.EINVAL),
        (RequestType.SET_VRING_KICK, messages.U64.pack(0), errno.EINVAL),
        (RequestType.SET_VRING_KICK, messages.U64.pack(0x100), errno.ENOTSUP),
        (RequestType.SET_VRING_CALL, messages.U64.pack(200), errno.EINVAL),
        (RequestType.SET_VRING_ENABLE, messages.VRING_STATE.pack(77, 1), errno.EINVAL),
        (9999, b"", errno.ENOTSUP),
        (RequestType.ADD_MEM_REG, bytes(40), errno.EINVAL),
    ],
)
def test_invalid_requests_are_refused(
    front: Front, request_: int, payload: bytes, code: int
) -> None:
    assert front.request_ack(request_, payload) == code


def test_errors_without_a_reply_end_the_connection(front: Front) -> None:
    with pytest.raises(DeviceProtocolError):
        front.session.handle(Message(9999, 1, b""))
    with pytest.raises(DeviceProtocolError):
        front.session.handle(Message(RequestType.GET_VRING_BASE, 1, b""))


def test_reset_and_status(front: Front, memory: int, kick: int) -> None:
    assert front.request_ack(RequestType.SET_MEM_TABLE, table(region()), memory) == 0
    set_ring(front, kick)
    assert front.request_ack(RequestType.SET_STATUS, messages.U64.pack(15)) == 0
    assert front.number(RequestType.GET_STATUS) == 15
    assert front.request_ack(RequestType.SET_STATUS, messages.U64.pack(0)) == 0
    assert (front.device.running, front.device.resets) == ({}, 0)
    assert front.request_ack(RequestType.RESET_DEVICE) == 0
    assert front.device.resets == 1


def test_unused_descriptors_are_closed(front: Front, memory: int) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for request in (
        RequestType.SET_OWNER,
        RequestType.SET_VRING_NUM,
        RequestType.REM_MEM_REG,
        9999,
    ):
        front.request_ack(request, b"", memory, memory)
    assert len(os.listdir("/proc/self/fd")) == before


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(
    st.lists(
        st.tuples(
            st.one_of(
                st.sampled_from([int(r) for r in RequestType]), st.integers(0, (1 << 32) - 1)
            ),
            st.one_of(
                st.binary(max_size=80),
                st.builds(messages.VRING_STATE.pack, st.integers(0, 3), st.integers(0, 40_000)),
                st.builds(messages.U64.pack, st.integers(0, 0x1FF)),
                st.just(table(region())),
            ),
            st.integers(0, 2),
        ),
        max_size=30,
    )
)
def test_any_sequence_of_messages(said: list[tuple[int, bytes, int]]) -> None:
    front = Front()
    memory = os.memfd_create("memory")
    os.ftruncate(memory, 2 * SIZE)
    try:
        for request, payload, files in said:
            fds = tuple(os.dup(memory) for _ in range(files))
            try:
                front.session.handle(Message(request, 1 | Flag.NEED_REPLY, payload, fds))
            except DeviceProtocolError:
                break
    finally:
        front.session.close()
        os.close(memory)
