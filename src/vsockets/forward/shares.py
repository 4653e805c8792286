"""Dividing a number of places among parties that come and go.  Decisions only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class Shares:
    """Places that parties hold, of ``limit``, which may be changed.

    A party may take a place while it holds fewer than are free.  So one party alone gets half of
    them, several get as many as each other in the long run, and a party that has none finds a
    free one, unless there are more greedy ones than the limit has binary digits.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._held: Counter[Hashable] = Counter()
        self._taken = 0

    def take(self, party: Hashable) -> bool:
        """Take a place for ``party``, and return True, if it may have one more."""
        if self._held[party] >= self.limit - self._taken:
            return False
        self._held[party] += 1
        self._taken += 1
        return True

    def give_back(self, party: Hashable) -> None:
        """Free a place of ``party``."""
        self._taken -= 1
        self._held[party] -= 1
        if not self._held[party]:
            del self._held[party]
