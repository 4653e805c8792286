"""Shares of places, and the flow table compared with a plain model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.forward.fairness import FlowTable, Shares


def fill(shares: Shares, party: int) -> int:
    number = 0
    while shares.take(party):
        number += 1
    return number


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 1), (3, 2), (4, 2), (100, 50)])
def test_one_party_leaves_places_free(limit: int, most: int) -> None:
    assert fill(Shares(limit), 3) == most


@given(st.integers(1, 5000))
def test_new_party_finds_a_place(limit: int) -> None:
    shares = Shares(limit)
    for party in range(limit.bit_length()):
        assert fill(shares, party)


def test_parties_get_equal_shares() -> None:
    shares = Shares(400)
    held = {3: 0, 4: 0, 5: 0}
    for _ in range(1000):
        for party in held:
            held[party] += shares.take(party)
    assert held == {3: 100, 4: 100, 5: 100}


def test_returned_place_can_be_taken() -> None:
    shares = Shares(4)
    assert fill(shares, 3) == 2
    assert fill(shares, 4) == 1
    shares.give_back(3)
    assert shares.take(4)
    assert not shares.take(3)
    shares.give_back(4)
    assert shares.take(3)


steps = st.lists(st.tuples(st.sampled_from(["send", "look"]), st.integers(0, 6), st.integers(0, 5)))


@given(st.integers(1, 4), st.integers(1, 6), steps)
def test_least_recently_used_flow_is_removed_first(
    limit: int, idle: int, steps: list[tuple[str, int, int]]
) -> None:
    table: FlowTable[int] = FlowTable(limit, idle)
    used: dict[int, int] = {}
    now = 0
    for what, source, pause in steps:
        now += pause
        if what == "look":
            due = {one for one, when in used.items() if now - when >= idle}
            assert set(table.overdue(now)) == due
            used = {one: when for one, when in used.items() if one not in due}
        elif table.use(source, now) is None:
            gone = table.add(source, source, now)
            assert len(gone) == max(0, len(used) - limit + 1)
            for one in gone:
                assert used.pop(one) <= min(used.values(), default=now)
            used[source] = now
        else:
            assert source in used
            used[source] = now
        assert len(table) == len(used) <= limit
        expected = min(used.values()) + idle if used else None
        assert table.next_overdue() == expected


def test_party_does_not_displace_the_flows_of_others() -> None:
    table: FlowTable[tuple[int, int]] = FlowTable(8, 60)
    for now, source in enumerate([(4, 1), (5, 1), (5, 2)]):
        assert table.add(source, source, now) == []
    gone = []
    for port in range(20):
        gone += table.add((3, port), (3, port), 10 + port)
    assert gone == [(3, port) for port in range(15)]
    assert len(table) == 8
    assert table.next_overdue() == 60
    assert table.overdue(61) == [(4, 1), (5, 1)]
    table.remove((5, 2))
    assert sorted(table.clear()) == [(3, port) for port in range(15, 20)]
    assert len(table) == 0 and table.next_overdue() is None
