"""The flow table against a plain model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from vsockets.bridges.forward.flows import FlowTable

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
