"""Counting what a party holds, when it has reached a limit as far as is known."""

from __future__ import annotations

from collections.abc import Callable
from itertools import islice
from time import monotonic
from weakref import WeakKeyDictionary

from ..fabric import Party
from ..model.rate_limit import TokenBucket
from .limits import DAEMON_PROBES_PER_SECOND, LIMIT_RECOUNT_SECONDS

#: Listeners that are asked in one go which connections were accepted: some 10 microseconds.
_LISTENERS = 16


class LimitChecks:
    """Parties' limits, as far as keeping to them needs the kernel's word on what has gone.

    Counting costs time, and a party at its limit must not make vsockd spend it again and again: so
    a request counts a little, and the rest is a chore, begun only so often.
    """

    def __init__(self, forget_some: Callable[[Party], None]) -> None:
        """``forget_some``: some of what a party has closed, at once, and the rest as a chore."""
        self._forget_some = forget_some
        self._counted: WeakKeyDictionary[Party, float] = WeakKeyDictionary()
        self._looks: WeakKeyDictionary[Party, TokenBucket] = WeakKeyDictionary()

    def make_room(self, party: Party) -> None:
        """Forget what a party with as many sockets as it may have does not hold any more."""
        limits = party.limits
        if limits is not None and party.sockets >= limits.sockets and self._may_count(party):
            self._forget_some(party)

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
        for listener in list(islice(party.awaited, _LISTENERS)):
            if party.pending < most:
                return
            # Last, in case it is not the one: each has its turn.
            party.awaited[listener] = party.awaited.pop(listener)
            listener.count_waiting()
        party.require_patience()

    def may_look(self, party: Party) -> bool:
        """Return whether ``party`` may have it found out once more what has become of a stream."""
        if party.limits is None:
            return True
        meter = self._looks.get(party)
        if meter is None:
            meter = self._looks[party] = TokenBucket(DAEMON_PROBES_PER_SECOND)
        return meter.take(monotonic())

    def _may_count(self, party: Party) -> bool:
        """Whether it is long ago that everything was counted anew for this party: each has a
        clock of its own, so that one at its limit does not keep the others waiting.
        """
        now = monotonic()
        if now - self._counted.get(party, -LIMIT_RECOUNT_SECONDS) < LIMIT_RECOUNT_SECONDS:
            return False
        self._counted[party] = now
        return True
