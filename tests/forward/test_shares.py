"""Places that are divided among parties."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vsockets.forward.fairness import Shares


def fill(shares: Shares, party: int) -> int:
    number = 0
    while shares.take(party):
        number += 1
    return number


@pytest.mark.parametrize(("limit", "most"), [(1, 1), (2, 1), (3, 2), (4, 2), (100, 50)])
def test_one_party_leaves_room(limit: int, most: int) -> None:
    assert fill(Shares(limit), 3) == most


@given(st.integers(1, 5000))
def test_a_party_that_has_none_finds_a_place(limit: int) -> None:
    shares = Shares(limit)
    for party in range(limit.bit_length()):
        assert fill(shares, party)


def test_several_get_as_many_as_each_other() -> None:
    shares = Shares(400)
    held = {3: 0, 4: 0, 5: 0}
    for _ in range(1000):
        for party in held:
            held[party] += shares.take(party)
    assert held == {3: 100, 4: 100, 5: 100}


def test_what_is_given_back_can_be_taken() -> None:
    shares = Shares(4)
    assert fill(shares, 3) == 2
    assert fill(shares, 4) == 1
    shares.give_back(3)
    assert shares.take(4)
    assert not shares.take(3)
    shares.give_back(4)
    assert shares.take(3)
