"""Division of connections and datagram flows among parties, which are guests or the host."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from .client import party_of


class Shares:
    """A fair division of ``limit`` places among parties; ``limit`` may be changed.

    A party may take a place while it holds fewer places than are free.  A single party therefore
    gets half of them, several parties get equal numbers in the long run, and a new party finds a
    free place, unless there are more greedy parties than the limit has binary digits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[Hashable] = Counter()
        self._taken = 0

    def take(self, party: Hashable) -> bool:
        """Take a place for ``party``; return False if it may not have another one."""
        if self._held[party] >= self.limit - self._taken:
            return False
        self._held[party] += 1
        self._taken += 1
        return True

    def give_back(self, party: Hashable) -> None:
        """Free one place of ``party``."""
        self._taken -= 1
        self._held[party] -= 1
        if not self._held[party]:
            del self._held[party]


Flow = TypeVar("Flow")


class FlowTable(Generic[Flow]):
    """At most ``limit`` flows, each forgotten after ``idle`` seconds of silence.

    When the table is full, the party with the most flows loses the one that was silent for the
    longest time, so that no party displaces the flows of others.  Times are in seconds of a
    monotonic clock.
    """

    def __init__(self, limit: int, idle: float) -> None:
        self.limit = limit
        self.idle = idle
        self._parties: dict[Hashable, OrderedDict[Hashable, tuple[Flow, float]]] = {}
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def clear(self) -> list[Flow]:
        """Remove and return all flows."""
        flows = [flow for flows in self._parties.values() for flow, _ in flows.values()]
        self._parties.clear()
        self._count = 0
        return flows

    def use(self, source: Hashable, now: float) -> Flow | None:
        """Return the flow of ``source`` and mark it as used at ``now``; None if it is missing."""
        flows = self._parties.get(party_of(source))
        entry = flows.get(source) if flows is not None else None
        if flows is None or entry is None:
            return None
        flows[source] = entry[0], now
        flows.move_to_end(source)
        return entry[0]

    def add(self, source: Hashable, flow: Flow, now: float) -> list[Flow]:
        """Add a flow; return the flows that were removed to make room."""
        removed = []
        while self._count >= self.limit:
            party = max(self._parties, key=lambda party: len(self._parties[party]))
            removed.append(self._remove_first(party))
        self._parties.setdefault(party_of(source), OrderedDict())[source] = flow, now
        self._count += 1
        return removed

    def remove(self, source: Hashable) -> None:
        """Remove the flow of ``source``, if it exists."""
        party = party_of(source)
        flows = self._parties.get(party)
        if flows is not None and flows.pop(source, None) is not None:
            self._count -= 1
            if not flows:
                del self._parties[party]

    def overdue(self, now: float) -> list[Flow]:
        """Remove and return the flows that have been silent for ``idle`` seconds."""
        removed = []
        for party in list(self._parties):
            while (used := self._oldest(party)) is not None and now - used >= self.idle:
                removed.append(self._remove_first(party))
        return removed

    def next_overdue(self) -> float | None:
        """Return the time at which the next flow is overdue; None without flows."""
        times = (used for party in self._parties if (used := self._oldest(party)) is not None)
        oldest = min(times, default=None)
        return None if oldest is None else oldest + self.idle

    def _oldest(self, party: Hashable) -> float | None:
        for _, used in self._parties.get(party, {}).values():
            return used
        return None

    def _remove_first(self, party: Hashable) -> Flow:
        flows = self._parties[party]
        _, (flow, _) = flows.popitem(last=False)
        self._count -= 1
        if not flows:
            del self._parties[party]
        return flow
