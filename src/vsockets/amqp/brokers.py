"""Choice of the cluster node for a session.  Performs no I/O."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from ..model.locator import Locator


@dataclass(eq=False, slots=True)
class BrokerNode:
    """A broker and its state."""

    locator: Locator
    sessions: int = 0  #: sessions that this proxy has open to the node
    healthy: bool = True  #: whether the last health check or connect succeeded


class BrokerNodes:
    """The interchangeable nodes of a cluster."""

    def __init__(self, locators: Iterable[Locator]) -> None:
        self.all = [BrokerNode(locator) for locator in locators]
        self._turn = 0

    def choose(self, tried: Collection[BrokerNode] = ()) -> BrokerNode | None:
        """Return the healthy node with the fewest sessions that is not in ``tried``.

        Nodes that seem to be down are the last resort; equal nodes take turns.  Returns None
        when all nodes were tried.
        """
        self._turn += 1
        order = self.all[self._turn % len(self.all) :] + self.all[: self._turn % len(self.all)]
        left = [node for node in order if node not in tried]
        return min(left, key=lambda node: (not node.healthy, node.sessions), default=None)
