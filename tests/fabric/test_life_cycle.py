"""State changes of virtual machines: every change in every state (guide page 7)."""

from __future__ import annotations

import errno
import itertools
from collections.abc import Callable

import pytest

from vsockets.fabric import (
    Change,
    Connection,
    Context,
    Denied,
    Endpoint,
    EndpointKind,
    Fabric,
    Refused,
    Rule,
    State,
)
from vsockets.model.buffers import BufferSizes

from .programs import ME

RUNNING, SUSPENDED, OFF = State.RUNNING, State.SUSPENDED, State.OFF

#: States in which each change is allowed, the state after it, and whether connections end.
#: FT mode can be enabled only while disabled, and vice versa: see below.
TABLE = {
    (RUNNING, Change.SUSPEND): (SUSPENDED, True),
    (SUSPENDED, Change.RESUME): (RUNNING, False),
    (RUNNING, Change.MIGRATE): (RUNNING, True),
    (RUNNING, Change.RESET): (RUNNING, True),
    (SUSPENDED, Change.RESET): (SUSPENDED, True),
    (RUNNING, Change.FT_ON): (RUNNING, True),
    (RUNNING, Change.POWER_OFF): (OFF, True),
    (SUSPENDED, Change.POWER_OFF): (OFF, True),
    (OFF, Change.POWER_ON): (RUNNING, False),
}


class House:
    """A host with a listener on 5000, two guests, and two connections of each."""

    def __init__(self) -> None:
        self.fabric = Fabric(owner=0)
        self.host = self.fabric.contexts.host
        self.guest = self.fabric.contexts.add(3, "", 0)
        self.other = self.fabric.contexts.add(4, "", 0)
        self.at = {context: self._listen(context) for context in (self.host, self.guest)}
        self.datagram = self.fabric.bind(self.guest, EndpointKind.DATAGRAM, 3, 5001, ME)
        self.of_guest = [self._connect(self.guest, self.host), self._connect(self.host, self.guest)]
        self.of_other = [self._connect(self.other, self.host)]

    def _listen(self, context: Context) -> Endpoint:
        endpoint = self.fabric.bind(context, EndpointKind.STREAM, context.cid, 5000, ME)
        self.fabric.listen(endpoint, BufferSizes())
        return endpoint

    def _connect(self, source: Context, destination: Context) -> Connection:
        listener = self.fabric.find_listener(source, EndpointKind.STREAM, destination.cid, 5000, ME)
        return self.fabric.connect(source, listener, None, BufferSizes(), ME.credentials)

    def reaches(self, source: Context, destination: Context) -> int:
        """Return 0, or the errno of a connect."""
        try:
            self.fabric.find_listener(source, EndpointKind.STREAM, destination.cid, 5000, ME)
        except Refused as refused:
            return refused.errno
        return 0

    def sends(self, source: Context, destination: Context) -> int:
        """Return 0, or the errno of a datagram."""
        try:
            self.fabric.find_datagram(source, destination.cid, 5001, ME)
        except Refused as refused:
            return refused.errno
        return 0


@pytest.fixture
def house() -> House:
    return House()


def put_into(house: House, state: State) -> None:
    if state is not RUNNING:
        change = Change.SUSPEND if state is SUSPENDED else Change.POWER_OFF
        house.fabric.change(house.guest, change)
    assert house.guest.state is state


# The table


@pytest.mark.parametrize(("before", "change"), TABLE)
def test_allowed_changes(house: House, before: State, change: Change) -> None:
    put_into(house, before)
    connected = list(house.fabric.connections_of(house.guest))
    after, drops = TABLE[before, change]
    assert house.fabric.change(house.guest, change) == (connected if drops else [])
    assert house.guest.state is after


@pytest.mark.parametrize(
    ("before", "change"), [pair for pair in itertools.product(State, Change) if pair not in TABLE]
)
def test_refused_changes_have_no_effect(house: House, before: State, change: Change) -> None:
    put_into(house, before)
    connections = dict(house.fabric.connections)
    with pytest.raises(Refused) as refused:
        house.fabric.change(house.guest, change)
    assert refused.value.errno == errno.EINVAL
    assert house.guest.state is before
    assert not house.guest.fault_tolerant
    assert house.fabric.connections == connections


@pytest.mark.parametrize("change", Change)
def test_host_and_hypervisor_refuse_every_change(house: House, change: Change) -> None:
    for context in (house.host, house.fabric.contexts.hypervisor):
        with pytest.raises(Refused) as refused:
            house.fabric.change(context, change)
        assert refused.value.errno == errno.EINVAL
        assert context.state is RUNNING


# Dropped connections


@pytest.mark.parametrize("change", [Change.SUSPEND, Change.MIGRATE, Change.FT_ON, Change.POWER_OFF])
def test_connections_of_the_guest_are_dropped_and_no_others(house: House, change: Change) -> None:
    assert house.fabric.change(house.guest, change) == house.of_guest
    assert list(house.fabric.connections.values()) == house.of_other
    # The ports of the connecting sides are free.
    assert list(house.guest.connected.values()) == [house.at[house.guest]]
    assert list(house.host.connected.values()) == [house.at[house.host]]


@pytest.mark.parametrize("change", [Change.SUSPEND, Change.MIGRATE, Change.FT_ON])
def test_bound_and_listening_sockets_stay(house: House, change: Change) -> None:
    house.fabric.change(house.guest, change)
    for context, endpoint in house.at.items():
        assert context.connected.get(5000) is endpoint
        assert endpoint.listening
    assert house.guest.datagrams.get(5001) is house.datagram


# Suspended


def test_a_suspended_guest_neither_sends_nor_receives(house: House) -> None:
    house.fabric.change(house.guest, Change.SUSPEND)
    for way in (house.reaches, house.sends):
        assert way(house.guest, house.host) == errno.ENETDOWN
        assert way(house.guest, house.guest) == errno.ENETDOWN
        assert way(house.host, house.guest) == errno.EHOSTUNREACH
    assert house.reaches(house.other, house.host) == 0


def test_a_resumed_guest_is_as_before(house: House) -> None:
    house.fabric.change(house.guest, Change.SUSPEND)
    house.fabric.change(house.guest, Change.RESUME)
    for source, destination in itertools.product((house.host, house.guest), repeat=2):
        assert house.reaches(source, destination) == 0
    assert house.sends(house.host, house.guest) == 0


def test_a_migrated_guest_connects_again_at_once(house: House) -> None:
    house.fabric.change(house.guest, Change.MIGRATE)
    assert house.reaches(house.guest, house.host) == house.reaches(house.host, house.guest) == 0


# Fault tolerance


def test_no_connections_in_ft_mode_but_datagrams(house: House) -> None:
    house.fabric.change(house.guest, Change.FT_ON)
    assert house.reaches(house.guest, house.host) == errno.ENETDOWN
    assert house.reaches(house.guest, house.guest) == errno.ENETDOWN
    assert house.reaches(house.host, house.guest) == errno.EHOSTUNREACH
    assert house.sends(house.host, house.guest) == house.sends(house.guest, house.guest) == 0
    assert house.fabric.change(house.guest, Change.FT_OFF) == []
    assert house.reaches(house.guest, house.host) == house.reaches(house.host, house.guest) == 0


def test_the_rule_is_in_the_audit(house: House) -> None:
    for change, rule in (
        (Change.FT_ON, Rule.FAULT_TOLERANCE),
        (Change.SUSPEND, Rule.SUSPENDED),
    ):
        house.fabric.change(house.guest, change)
        for source, destination in ((house.guest, 2), (house.host, 3)):
            with pytest.raises(Denied) as denied:
                house.fabric.find_listener(source, EndpointKind.STREAM, destination, 5000, ME)
            assert denied.value.rule is rule


def test_ft_mode_cannot_be_set_to_its_present_value(house: House) -> None:
    with pytest.raises(Refused):
        house.fabric.change(house.guest, Change.FT_OFF)
    house.fabric.change(house.guest, Change.FT_ON)
    with pytest.raises(Refused) as refused:
        house.fabric.change(house.guest, Change.FT_ON)
    assert refused.value.errno == errno.EINVAL
    assert house.guest.fault_tolerant


def test_ft_mode_lasts_through_suspension_and_migration_and_not_through_power_off(
    house: House,
) -> None:
    for change in (Change.FT_ON, Change.MIGRATE, Change.SUSPEND, Change.RESUME):
        house.fabric.change(house.guest, change)
    assert house.guest.fault_tolerant
    house.fabric.change(house.guest, Change.POWER_OFF)
    house.fabric.change(house.guest, Change.POWER_ON)
    assert not house.guest.fault_tolerant


# Off


def test_a_powered_off_guest_answers_like_a_missing_one(house: House) -> None:
    house.fabric.change(house.guest, Change.POWER_OFF)
    fabric, host = house.fabric, house.host
    finders: list[Callable[[int], object]] = [
        lambda cid: fabric.find_datagram(host, cid, 5000, ME),
        lambda cid: fabric.find_listener(host, EndpointKind.STREAM, cid, 5000, ME),
    ]
    told = set()
    for cid, find in itertools.product((3, 99), finders):
        with pytest.raises(Refused) as refused:
            find(cid)
        assert not isinstance(refused.value, Denied)
        told.add((refused.value.errno, refused.value.reason.replace(str(cid), "N")))
    assert told == {(errno.EHOSTUNREACH, "no context N")}
