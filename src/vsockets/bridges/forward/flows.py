"""Flows of datagrams: who sent from where, so that answers find the way back.

Only the bookkeeping; least recently used first, so both limits are met without a search.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

Flow = TypeVar("Flow")


class FlowTable(Generic[Flow]):
    """At most ``limit`` flows, each forgotten after ``idle`` seconds of silence.

    Times are of a clock that only rises.
    """

    def __init__(self, limit: int, idle: float) -> None:
        self.limit = limit
        self.idle = idle
        self._flows: OrderedDict[Hashable, tuple[Flow, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._flows)

    def clear(self) -> list[Flow]:
        """Remove and return all flows."""
        flows = [flow for flow, _ in self._flows.values()]
        self._flows.clear()
        return flows

    def use(self, source: Hashable, now: float) -> Flow | None:
        """The flow from ``source``, which something moved on at ``now``."""
        entry = self._flows.get(source)
        if entry is None:
            return None
        self._flows[source] = entry[0], now
        self._flows.move_to_end(source)
        return entry[0]

    def add(self, source: Hashable, flow: Flow, now: float) -> list[Flow]:
        """Enter a new flow; returns those that had to go for it."""
        gone = []
        while len(self._flows) >= self.limit:
            gone.append(self._flows.popitem(last=False)[1][0])
        self._flows[source] = flow, now
        return gone

    def remove(self, source: Hashable) -> None:
        """Forget a flow."""
        self._flows.pop(source, None)

    def overdue(self, now: float) -> list[Flow]:
        """Remove and return the flows that were silent for too long."""
        gone = []
        while self._flows:
            source, (flow, used) = next(iter(self._flows.items()))
            if now - used < self.idle:
                break
            del self._flows[source]
            gone.append(flow)
        return gone

    def next_overdue(self) -> float | None:
        """When the next flow is due, if there is one."""
        for _, used in self._flows.values():
            return used + self.idle
        return None
