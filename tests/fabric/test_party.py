"""Rate limits, and limits of what a guest or user may hold."""

from __future__ import annotations

import errno
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.fabric import (
    LIMIT_RULES,
    Context,
    Credentials,
    Denied,
    EndpointKind,
    Fabric,
    Limits,
    Party,
    Program,
    Refused,
    Rule,
)
from vsockets.fabric.limits import HOST_USERS_REMEMBERED_MAX
from vsockets.model.buffers import BufferSizes
from vsockets.model.rates import TokenBucket

from .programs import ME, ROOT, YOU, StubProgram

NOW = 1000.0

#: Owner of the fabric.
OWNER = StubProgram(Credentials(300, 3000, 3000))

rates = st.integers(1, 50)
pauses = st.lists(st.floats(0, 3), max_size=200)


def rising(pauses: list[float]) -> list[float]:
    moments, now = [], NOW
    for pause in pauses:
        now += pause
        moments.append(now)
    return moments


# The token bucket


@given(rates, pauses)
def test_never_more_than_the_rate_after_a_full_second(rate: int, pauses: list[float]) -> None:
    """Over any interval: at most a burst of one second's events plus the rate times its length."""
    meter = TokenBucket(rate)
    allowed = [moment for moment in rising(pauses) if meter.try_take(moment)]
    for first, begin in enumerate(allowed):
        for number, end in enumerate(allowed[first:], 1):
            assert number <= rate + (end - begin) * rate + 1e-6


@given(rates, pauses)
def test_a_client_within_the_rate_is_never_refused(rate: int, pauses: list[float]) -> None:
    meter = TokenBucket(rate)
    now = NOW
    for pause in pauses:
        assert meter.try_take(now)
        now += 1.001 / rate + pause


@given(rates, pauses)
def test_a_refusal_costs_nothing(rate: int, pauses: list[float]) -> None:
    """A client that was refused gets the same afterwards as one that made no request."""
    eager, patient = TokenBucket(rate), TokenBucket(rate)
    for _ in range(rate):
        assert eager.try_take(NOW) and patient.try_take(NOW)
    for moment in rising([min(pause, 0.9 / rate / 200) for pause in pauses]):
        assert not eager.try_take(moment)
    later = NOW + 1.001 / rate
    assert eager.try_take(later) and patient.try_take(later)


@given(rates)
def test_a_quiet_second_allows_as_many_at_once(rate: int) -> None:
    meter = TokenBucket(rate)
    for moment in (NOW, NOW + 1.001):
        assert [meter.try_take(moment) for _ in range(rate + 1)] == [True] * rate + [False]


# Limits of guests


def guest(limits: Limits) -> Context:
    context = Context(3, "", 0)
    context.set_limits(limits)
    return context


def party(limits: Limits) -> Party:
    return guest(limits).party_of(0)


def denial(ask: Callable[[], object]) -> Rule | None:
    try:
        ask()
    except Denied as denied:
        return denied.rule
    return None


def test_the_errno_of_every_limit() -> None:
    context = guest(Limits(1, 1, 1))
    one = context.party_of(0)
    one.pending = 1
    one.check_rate(NOW)
    Fabric(0).bind(context, EndpointKind.STREAM, 3, 5000, ME)
    for require in (one.check_socket_limit, one.check_pending_limit, lambda: one.check_rate(NOW)):
        with pytest.raises(Denied) as denied:
            require()
        assert denied.value.errno == errno.ENOBUFS


def test_request_rate() -> None:
    one = party(Limits(request_rate=3))
    asked = [denial(lambda: one.check_rate(NOW)) for _ in range(4)]
    assert asked == [None, None, None, Rule.REQUEST_RATE]
    assert denial(lambda: one.check_rate(NOW + 0.5)) is None


def test_pending_connects() -> None:
    one = party(Limits(pending_connects=2))
    for pending, expected in ((0, None), (1, None), (2, Rule.PENDING_CONNECTS)):
        one.pending = pending
        assert denial(one.check_pending_limit) is expected


def test_sockets() -> None:
    """Every port counts: bound, connecting, datagrams."""
    fabric = Fabric(owner=0)
    context = fabric.contexts.add(3, "", 0)
    context.set_limits(Limits(sockets=3))
    server = fabric.bind(fabric.contexts.host, EndpointKind.STREAM, 2, 5000, ME)
    fabric.listen(server, BufferSizes())

    def bind(kind: EndpointKind) -> None:
        fabric.bind(context, kind, 3, 2**32 - 1, ME)

    bound = fabric.bind(context, EndpointKind.STREAM, 3, 2**32 - 1, ME)
    bind(EndpointKind.DATAGRAM)
    connection = fabric.connect(context, server, None, BufferSizes(), ME.credentials)
    for kind in EndpointKind:
        with pytest.raises(Denied) as denied:
            bind(kind)
        assert (denied.value.errno, denied.value.rule) == (errno.ENOBUFS, Rule.SOCKETS)
    with pytest.raises(Denied) as denied:
        fabric.connect(context, server, None, BufferSizes(), ME.credentials)
    assert (denied.value.errno, denied.value.rule) == (errno.ENOBUFS, Rule.SOCKETS)
    assert context.sockets == 3
    fabric.end(connection.number)
    bind(EndpointKind.SEQPACKET)
    # A bound socket that connects holds no more than before.
    fabric.connect(context, server, bound, BufferSizes(), ME.credentials)
    assert context.sockets == 3


def test_lower_limits_revoke_nothing() -> None:
    fabric = Fabric(owner=0)
    context = fabric.contexts.add(3, "", 0)
    endpoints = [fabric.bind(context, EndpointKind.STREAM, 3, 2**32 - 1, ME) for _ in range(5)]
    context.set_limits(Limits(sockets=2))
    assert context.sockets == 5
    one = context.party_of(ME.credentials.uid)
    assert denial(one.check_socket_limit) is Rule.SOCKETS
    for endpoint in endpoints[:4]:
        fabric.unbind(endpoint)
    assert denial(one.check_socket_limit) is None


@pytest.mark.parametrize("cid", [0, 2])
@pytest.mark.parametrize("program", [ROOT, OWNER])
def test_administrators_have_no_limits(cid: int, program: Program) -> None:
    fabric = Fabric(owner=OWNER.credentials.uid)
    context = fabric.contexts.require(cid)
    context.set_limits(Limits(1, 1, 1, 1))
    one = context.party_of(program.credentials.uid)
    one.pending = 100
    for _ in range(3):
        fabric.bind(context, EndpointKind.STREAM, cid, 2**32 - 1, program)
        one.check_pending_limit()
        one.check_rate(NOW)


def test_each_user_of_the_host_has_limits_of_its_own() -> None:
    """Streams count as bound sockets do; closed ones do not count."""
    fabric = Fabric(owner=0)
    host = fabric.contexts.host
    host.set_limits(Limits(sockets=2))
    server = fabric.bind(host, EndpointKind.STREAM, 2, 5000, ROOT)
    fabric.listen(server, BufferSizes())
    bound = fabric.bind(host, EndpointKind.DATAGRAM, 2, 2**32 - 1, ME)
    stream = fabric.connect(host, server, None, BufferSizes(), ME.credentials)

    def bind(program: Program) -> Rule | None:
        return denial(lambda: fabric.bind(host, EndpointKind.STREAM, 2, 2**32 - 1, program))

    assert bind(ME) is Rule.SOCKETS
    assert (
        denial(lambda: fabric.connect(host, server, None, BufferSizes(), ME.credentials))
        is Rule.SOCKETS
    )
    assert bind(YOU) is None
    fabric.unbind(bound)
    fabric.unbind(bound)
    fabric.end(stream.number)
    assert [bind(ME) for _ in range(3)] == [None, None, Rule.SOCKETS]
    host.set_limits(Limits(sockets=3))
    assert [bind(ME) for _ in range(2)] == [None, Rule.SOCKETS]


def test_users_without_holdings_are_forgotten_eventually() -> None:
    """One user may have thousands of user ids."""
    fabric = Fabric(owner=0)
    host = fabric.contexts.host
    endpoint = fabric.bind(host, EndpointKind.STREAM, 2, 2**32 - 1, ME)
    mine = host.party_of(ME.credentials.uid)
    for uid in range(10_000, 10_000 + 3 * HOST_USERS_REMEMBERED_MAX):
        assert host.party_of(uid) is host.party_of(uid)
    assert len(host.parties()) <= HOST_USERS_REMEMBERED_MAX
    assert host.party_of(ME.credentials.uid) is mine
    fabric.unbind(endpoint)
    assert not mine.is_in_use


def test_which_denials_are_limits() -> None:
    assert {rule.value for rule in LIMIT_RULES} == set(Limits.__slots__)


def test_denied_is_a_kind_of_refused() -> None:
    """So code that handles the errno alone need not know the rules."""
    assert issubclass(Denied, Refused)
