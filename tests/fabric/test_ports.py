"""Holders of ports, and the search for ephemeral ports."""

from __future__ import annotations

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.fabric import Refused
from vsockets.fabric.model import Ports

LAST_PORT = 2**32 - 2


def test_a_held_port_is_refused() -> None:
    ports: Ports[str] = Ports()
    ports.claim(5000, "one")
    with pytest.raises(Refused) as refusal:
        ports.claim(5000, "other")
    assert refusal.value.errno == errno.EADDRINUSE
    assert ports.get(5000) == "one"


def test_only_the_holder_releases_a_port() -> None:
    ports: Ports[str] = Ports()
    ports.claim(5000, "one")
    ports.release(5000, "other")
    assert ports.get(5000) == "one"
    ports.release(5000, "one")
    assert ports.get(5000) is None
    ports.release(5000, "one")
    assert len(ports) == 0


def test_holders() -> None:
    ports: Ports[str] = Ports()
    ports.claim(1, "one")
    ports.claim(2, "two")
    assert sorted(ports.values()) == ["one", "two"]
    assert len(ports) == 2


def test_an_ephemeral_port_needs_no_privilege_and_is_not_reused_soon() -> None:
    ports: Ports[int] = Ports()
    given_out = [ports.next_ephemeral() for _ in range(1000)]
    assert len(set(given_out)) == 1000
    assert all(1024 <= port <= LAST_PORT for port in given_out)


def test_each_context_starts_at_a_random_port() -> None:
    # One in four billion that two of them meet.
    assert len({Ports[int]().next_ephemeral() for _ in range(10)}) > 1


def test_a_search_ends_after_24_ports_and_goes_on_from_there() -> None:
    ports: Ports[str] = Ports()
    first = ports.next_ephemeral()
    for port in range(first + 1, first + 25):
        ports.claim(port, "held")
    with pytest.raises(Refused) as refusal:
        ports.next_ephemeral()
    assert refusal.value.errno == errno.EADDRNOTAVAIL
    assert ports.next_ephemeral() == first + 25


@given(st.sets(st.integers(0, 8)))
def test_ephemeral_ports_wrap_around_and_skip_held_ones(held: set[int]) -> None:
    ports: Ports[str] = Ports()
    ports.following = LAST_PORT - 4
    round_trip = [*range(LAST_PORT - 4, LAST_PORT + 1), *range(1024, 1034)]
    for place in held:
        ports.claim(round_trip[place], "held")
    free = [port for place, port in enumerate(round_trip) if place not in held]
    assert [ports.next_ephemeral() for _ in range(5)] == free[:5]
