"""Counting what a party holds, when it has reached a limit as far as is known."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from time import monotonic
from weakref import WeakKeyDictionary

from ..fabric import Party
from ..limits import COUNT_AGAIN
from .listeners import Listener


class Allowance:
    """Parties' limits, as far as keeping to them needs the kernel's word on what has gone.

    Counting anew costs time, and a party at its limit must not make vsockd spend it again and
    again: so it is done only so often.
    """

    def __init__(
        self, forget_what_has_gone: Callable[[], None], listeners: Callable[[], Iterable[Listener]]
    ) -> None:
        self._forget_what_has_gone = forget_what_has_gone
        self._listeners = listeners
        self._counted: WeakKeyDictionary[Party, float] = WeakKeyDictionary()

    def make_room(self, party: Party) -> None:
        """Forget what a party with as many sockets as it may have does not hold any more."""
        limits = party.limits
        if limits is not None and party.sockets >= limits.sockets and self._may_count(party):
            self._forget_what_has_gone()

    def require_patience(self, party: Party, count: Callable[[], None] | None = None) -> None:
        """Raise Denied when too many connections of a party wait.  ``count`` has those counted
        that wait for the one asked for now."""
        if party.limits is None:
            return
        most = party.limits.pending_connects
        if party.pending < most:
            return
        if count is not None:
            count()
        if party.pending >= most and self._may_count(party):
            self.count_waiting()
        party.require_patience()

    def count_waiting(self) -> None:
        """Find out which connections have been accepted, at every listener."""
        for listener in self._listeners():
            listener.count_waiting()

    def _may_count(self, party: Party) -> bool:
        """Whether it is long ago that everything was counted anew for this party: each has a
        clock of its own, so that one at its limit does not keep the others waiting.
        """
        now = monotonic()
        if now - self._counted.get(party, -COUNT_AGAIN) < COUNT_AGAIN:
            return False
        self._counted[party] = now
        return True
