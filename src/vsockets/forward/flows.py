"""Flows of datagrams: who sent from where, so that answers find the way back.

Only the bookkeeping; least recently used first, so both limits are met without a search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from .throttled_log import party_of

Flow = TypeVar("Flow")


class FlowTable(Generic[Flow]):
    """At most ``limit`` flows, each forgotten after ``idle`` seconds of silence.

    When there are too many the party that has most loses one, the one silent for longest: so no
    party takes those of others.  Times are of a clock that only rises.
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
        """The flow from ``source``, which something moved on at ``now``."""
        flows = self._parties.get(party_of(source))
        entry = flows.get(source) if flows is not None else None
        if flows is None or entry is None:
            return None
        flows[source] = entry[0], now
        flows.move_to_end(source)
        return entry[0]

    def add(self, source: Hashable, flow: Flow, now: float) -> list[Flow]:
        """Enter a new flow; returns those that had to go for it."""
        gone = []
        while self._count >= self.limit:
            party = max(self._parties, key=lambda party: len(self._parties[party]))
            gone.append(self._remove_first(party))
        self._parties.setdefault(party_of(source), OrderedDict())[source] = flow, now
        self._count += 1
        return gone

    def remove(self, source: Hashable) -> None:
        """Forget a flow."""
        party = party_of(source)
        flows = self._parties.get(party)
        if flows is not None and flows.pop(source, None) is not None:
            self._count -= 1
            if not flows:
                del self._parties[party]

    def overdue(self, now: float) -> list[Flow]:
        """Remove and return the flows that were silent for too long."""
        gone = []
        for party in list(self._parties):
            while (used := self._oldest(party)) is not None and now - used >= self.idle:
                gone.append(self._remove_first(party))
        return gone

    def next_overdue(self) -> float | None:
        """When the next flow is due, if there is one."""
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
