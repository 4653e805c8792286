"""Which node of a cluster gets the next session.  Decisions only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..model.locator import Locator


@dataclass(eq=False, slots=True)
class BrokerNode:
    """A broker, and what is known of it."""

    locator: Locator
    sessions: int = 0  #: that it has from us
    healthy: bool = True  #: it answered when it was last asked or connected to


class BrokerNodes:
    """The nodes of a cluster, each as good as any other."""

    def __init__(self, locators: Iterable[Locator]) -> None:
        self.all = [BrokerNode(locator) for locator in locators]
        self._turn = 0

    def choose(self, tried: Collection[BrokerNode] = ()) -> BrokerNode | None:
        """The healthy node with the fewest sessions that was not tried yet.

        BrokerNodes that seem to be down are the last resort, and of equals each has its turn.  None
        when all were tried.
        """
        self._turn += 1
        order = self.all[self._turn % len(self.all) :] + self.all[: self._turn % len(self.all)]
        left = [node for node in order if node not in tried]
        return min(left, key=lambda node: (not node.healthy, node.sessions), default=None)
