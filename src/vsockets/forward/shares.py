"""Division of a limited number of places among parties that come and go."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable


class Shares:
    """The places held by parties, out of ``limit``, which may be changed.

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
