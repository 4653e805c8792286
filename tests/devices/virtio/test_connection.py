"""The state machine of a connection."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vsockets.devices.virtio.connection import (
    BOTH,
    Action,
    ConnectionState,
    PendingTx,
    VirtioConnection,
)
from vsockets.devices.virtio.packet import Op, Shutdown, Type

SEND, RECEIVE = int(Shutdown.SEND), int(Shutdown.RECEIVE)


def make(state: ConnectionState) -> VirtioConnection:
    made = VirtioConnection(state, Type.STREAM, (2, 5000), 1024, 4096)
    made.send.update(4096, 0)
    return made


def packets_of(connection: VirtioConnection) -> list[tuple[int, int]]:
    packets = []
    while (packet := connection.next_packet()) is not None:
        packets.append(packet)
    return packets


def opened() -> VirtioConnection:
    connection = make(ConnectionState.PEER_INIT)
    connection.accept()
    assert packets_of(connection) == [(Op.RESPONSE, 0)]
    return connection


def test_host_accepts_the_guests_request() -> None:
    assert opened().state is ConnectionState.ESTABLISHED


def test_host_refuses_the_guests_request() -> None:
    connection = make(ConnectionState.PEER_INIT)
    connection.refuse()
    assert packets_of(connection) == [(Op.RST, 0)]
    assert connection.is_finished


def test_guest_accepts_the_hosts_request() -> None:
    connection = make(ConnectionState.LOCAL_INIT)
    assert packets_of(connection) == [(Op.REQUEST, 0)]
    assert connection.on_packet(Op.RESPONSE, 0) == Action.ACCEPT
    assert connection.state is ConnectionState.ESTABLISHED


def test_guest_refuses_the_hosts_request() -> None:
    connection = make(ConnectionState.LOCAL_INIT)
    packets_of(connection)
    assert connection.on_packet(Op.RST, 0) == Action.REFUSE
    assert connection.is_finished


@pytest.mark.parametrize(
    "state",
    [
        ConnectionState.PEER_INIT,
        ConnectionState.LOCAL_INIT,
        ConnectionState.ESTABLISHED,
        ConnectionState.CLOSING,
    ],
)
def test_reset_is_never_answered(state: ConnectionState) -> None:
    """moby's Cloud Hypervisor #8692: the reset would hit the next connection of the ports."""
    connection = make(state)
    connection.on_packet(Op.RST, 0)
    assert connection.state is ConnectionState.CLOSED
    assert packets_of(connection) == []
    connection.on_packet(Op.RST, 0)
    assert packets_of(connection) == []


def test_half_close_keeps_the_other_direction_open() -> None:
    """cloud-hypervisor#8300, #8372."""
    connection = opened()
    assert connection.on_packet(Op.SHUTDOWN, SEND) == Action.SHUTDOWN_WRITE
    connection.on_all_forwarded()
    assert connection.state is ConnectionState.ESTABLISHED and connection.can_send
    connection.shut_down(SEND)
    assert packets_of(connection) == [(Op.SHUTDOWN, SEND)]
    assert connection.state is ConnectionState.ESTABLISHED


def test_close_by_the_guest() -> None:
    connection = opened()
    assert connection.on_packet(Op.SHUTDOWN, BOTH) == Action.SHUTDOWN_WRITE | Action.SHUTDOWN_READ
    assert packets_of(connection) == []  # payload may remain to be forwarded
    connection.on_all_forwarded()
    assert packets_of(connection) == [(Op.RST, 0)]


def test_close_by_the_host() -> None:
    connection = opened()
    connection.shut_down(BOTH)
    assert connection.state is ConnectionState.CLOSING
    assert packets_of(connection) == [(Op.SHUTDOWN, BOTH)]
    assert not connection.on_payload(10)  # in flight since before
    assert connection.state is ConnectionState.CLOSING
    assert connection.on_packet(Op.RST, 0) == Action.CLOSE
    assert connection.is_finished


def test_simultaneous_close() -> None:
    connection = opened()
    connection.shut_down(BOTH)
    packets_of(connection)
    assert connection.on_packet(Op.SHUTDOWN, BOTH) == Action.CLOSE
    assert packets_of(connection) == [(Op.RST, 0)]


def test_payload_beyond_the_credit_resets() -> None:
    connection = opened()
    assert connection.on_payload(4096)
    assert not connection.on_payload(1)
    assert packets_of(connection) == [(Op.RST, 0)]


def test_payload_after_shutdown_resets() -> None:
    connection = opened()
    connection.on_packet(Op.SHUTDOWN, SEND)
    assert not connection.on_payload(1)
    assert connection.state is ConnectionState.CLOSED


@pytest.mark.parametrize("op", [0, Op.REQUEST, Op.RESPONSE, 8, 65535])
def test_unexpected_packets_reset(op: int) -> None:
    connection = opened()
    assert connection.on_packet(op, 0) == Action.CLOSE
    assert packets_of(connection) == [(Op.RST, 0)]


def test_credit_update_is_sent_after_half_the_buffer() -> None:
    connection = opened()
    connection.receive.announce()
    assert connection.on_payload(4096)
    connection.on_forwarded(2047)
    assert packets_of(connection) == []
    connection.on_forwarded(1)
    assert packets_of(connection) == [(Op.CREDIT_UPDATE, 0)]


def test_credit_request_is_answered() -> None:
    connection = opened()
    connection.on_packet(Op.CREDIT_REQUEST, 0)
    connection.on_packet(Op.CREDIT_REQUEST, 0)
    assert packets_of(connection) == [(Op.CREDIT_UPDATE, 0)]


class AnyOrder(RuleBasedStateMachine):
    """Any sequence of operations by both sides."""

    def __init__(self) -> None:
        super().__init__()
        self.connection = make(ConnectionState.PEER_INIT)
        self.resets = 0
        self.heard_reset = False

    @rule(op=st.integers(0, 9), flags=st.integers(0, 7))
    def on_packet(self, op: int, flags: int) -> None:
        if op == Op.RST:
            self.heard_reset = True
        self.connection.on_packet(op, flags)

    @rule(length=st.integers(0, 5000))
    def take(self, length: int) -> None:
        if self.connection.on_payload(length):
            self.connection.on_forwarded(length)

    @precondition(lambda self: self.connection.state is ConnectionState.PEER_INIT)
    @rule(yes=st.booleans())
    def answer(self, yes: bool) -> None:
        if yes:
            self.connection.accept()
        else:
            self.connection.refuse()

    @rule(flags=st.sampled_from([SEND, RECEIVE, BOTH]))
    def end(self, flags: int) -> None:
        self.connection.shut_down(flags)

    @rule()
    def drain(self) -> None:
        self.connection.on_all_forwarded()

    @rule()
    def say(self) -> None:
        packet = self.connection.next_packet()
        if packet is not None and packet[0] == Op.RST:
            self.resets += 1

    @invariant()
    def resets_once(self) -> None:
        pending = 1 if self.connection.pending_tx & PendingTx.RST else 0
        assert self.resets + pending <= 1
        if self.connection.state is ConnectionState.CLOSED:
            assert self.connection.pending_tx in (0, PendingTx.RST)
            assert self.heard_reset or self.resets + pending == 1
        else:
            assert not self.resets and not pending


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
