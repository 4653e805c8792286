"""The state machine of a connection."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from vsockets.devices.virtio.connection import BOTH, Action, Connection, ConnectionState, PendingTx
from vsockets.devices.virtio.packet import Op, Shutdown, Type

SEND, RECEIVE = int(Shutdown.SEND), int(Shutdown.RECEIVE)


def connection(state: ConnectionState) -> Connection:
    made = Connection(state, Type.STREAM, (2, 5000), 1024, 4096)
    made.send.update(4096, 0)
    return made


def said(link: Connection) -> list[tuple[int, int]]:
    packets = []
    while (packet := link.next_packet()) is not None:
        packets.append(packet)
    return packets


def opened() -> Connection:
    link = connection(ConnectionState.ASKED)
    link.host_accepts()
    assert said(link) == [(Op.RESPONSE, 0)]
    return link


def test_the_guest_asks_and_the_host_agrees() -> None:
    assert opened().state is ConnectionState.OPEN


def test_the_guest_asks_and_the_host_refuses() -> None:
    link = connection(ConnectionState.ASKED)
    link.host_refuses()
    assert said(link) == [(Op.RST, 0)]
    assert link.is_silent


def test_the_host_asks_and_the_guest_agrees() -> None:
    link = connection(ConnectionState.OFFERED)
    assert said(link) == [(Op.REQUEST, 0)]
    assert link.hear(Op.RESPONSE, 0) == Action.ACCEPT
    assert link.state is ConnectionState.OPEN


def test_the_host_asks_and_the_guest_refuses() -> None:
    link = connection(ConnectionState.OFFERED)
    said(link)
    assert link.hear(Op.RST, 0) == Action.REFUSE
    assert link.is_silent


@pytest.mark.parametrize(
    "state",
    [ConnectionState.ASKED, ConnectionState.OFFERED, ConnectionState.OPEN, ConnectionState.CLOSING],
)
def test_a_reset_is_never_answered(state: ConnectionState) -> None:
    """moby's Cloud Hypervisor #8692: it kills whoever has the ports next."""
    link = connection(state)
    link.hear(Op.RST, 0)
    assert link.state is ConnectionState.GONE
    assert said(link) == []
    link.hear(Op.RST, 0)
    assert said(link) == []


def test_half_closes_stay_halves() -> None:
    """cloud-hypervisor#8300, #8372."""
    link = opened()
    assert link.hear(Op.SHUTDOWN, SEND) == Action.END_WRITING
    link.all_passed_on()
    assert link.state is ConnectionState.OPEN and link.may_send
    link.host_ends(SEND)
    assert said(link) == [(Op.SHUTDOWN, SEND)]
    assert link.state is ConnectionState.OPEN


def test_the_guest_closes() -> None:
    link = opened()
    assert link.hear(Op.SHUTDOWN, BOTH) == Action.END_WRITING | Action.END_READING
    assert said(link) == []  # there may be something to be passed on
    link.all_passed_on()
    assert said(link) == [(Op.RST, 0)]


def test_the_host_closes() -> None:
    link = opened()
    link.host_ends(BOTH)
    assert link.state is ConnectionState.CLOSING
    assert said(link) == [(Op.SHUTDOWN, BOTH)]
    assert not link.take(10)  # on its way since before
    assert link.state is ConnectionState.CLOSING
    assert link.hear(Op.RST, 0) == Action.CLOSE
    assert link.is_silent


def test_both_close_at_once() -> None:
    link = opened()
    link.host_ends(BOTH)
    said(link)
    assert link.hear(Op.SHUTDOWN, BOTH) == Action.CLOSE
    assert said(link) == [(Op.RST, 0)]


def test_payload_beyond_its_credit_resets() -> None:
    link = opened()
    assert link.take(4096)
    assert not link.take(1)
    assert said(link) == [(Op.RST, 0)]


def test_payload_after_its_end_resets() -> None:
    link = opened()
    link.hear(Op.SHUTDOWN, SEND)
    assert not link.take(1)
    assert link.state is ConnectionState.GONE


@pytest.mark.parametrize("op", [0, Op.REQUEST, Op.RESPONSE, 8, 65535])
def test_what_makes_no_sense_resets(op: int) -> None:
    link = opened()
    assert link.hear(op, 0) == Action.CLOSE
    assert said(link) == [(Op.RST, 0)]


def test_credit_is_told_when_half_was_passed_on() -> None:
    link = opened()
    link.receive.tell()
    assert link.take(4096)
    link.passed_on(2047)
    assert said(link) == []
    link.passed_on(1)
    assert said(link) == [(Op.CREDIT_UPDATE, 0)]


def test_credit_is_told_when_asked_for() -> None:
    link = opened()
    link.hear(Op.CREDIT_REQUEST, 0)
    link.hear(Op.CREDIT_REQUEST, 0)
    assert said(link) == [(Op.CREDIT_UPDATE, 0)]


class AnyOrder(RuleBasedStateMachine):
    """Whatever both sides do, in whatever order."""

    def __init__(self) -> None:
        super().__init__()
        self.link = connection(ConnectionState.ASKED)
        self.resets = 0
        self.heard_reset = False

    @rule(op=st.integers(0, 9), flags=st.integers(0, 7))
    def hear(self, op: int, flags: int) -> None:
        if op == Op.RST:
            self.heard_reset = True
        self.link.hear(op, flags)

    @rule(length=st.integers(0, 5000))
    def take(self, length: int) -> None:
        if self.link.take(length):
            self.link.passed_on(length)

    @precondition(lambda self: self.link.state is ConnectionState.ASKED)
    @rule(yes=st.booleans())
    def answer(self, yes: bool) -> None:
        if yes:
            self.link.host_accepts()
        else:
            self.link.host_refuses()

    @rule(flags=st.sampled_from([SEND, RECEIVE, BOTH]))
    def end(self, flags: int) -> None:
        self.link.host_ends(flags)

    @rule()
    def drain(self) -> None:
        self.link.all_passed_on()

    @rule()
    def say(self) -> None:
        packet = self.link.next_packet()
        if packet is not None and packet[0] == Op.RST:
            self.resets += 1

    @invariant()
    def resets_once(self) -> None:
        pending = 1 if self.link.say & PendingTx.RST else 0
        assert self.resets + pending <= 1
        if self.link.state is ConnectionState.GONE:
            assert self.link.say in (0, PendingTx.RST)
            assert self.heard_reset or self.resets + pending == 1
        else:
            assert not self.resets and not pending


TestAnyOrder = AnyOrder.TestCase
TestAnyOrder.settings = settings(max_examples=200, stateful_step_count=30, deadline=None)
