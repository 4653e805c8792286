"""The flow table against a plain model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsockets.forward.fairness import FlowTable

steps = st.lists(st.tuples(st.sampled_from(["send", "look"]), st.integers(0, 6), st.integers(0, 5)))


@given(st.integers(1, 4), st.integers(1, 6), steps)
def test_the_least_recently_used_goes_first(
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


def test_no_party_takes_the_flows_of_others() -> None:
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
