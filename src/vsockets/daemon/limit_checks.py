"""Checks of limits whose state only the kernel knows: free descriptors, and what parties hold.

A reserve of descriptors lets vsockd serve while clients have taken all others.  The kernel assigns
the lowest free number.  So the number of a new descriptor bounds from below how many are in use,
and vsockd need not count.  A descriptor of the reserve is used for what completes at once (a
connect, a query, a refusal), and is not kept.
"""

from __future__ import annotations

import errno
import logging
import resource
from collections.abc import Callable
from itertools import islice
from time import monotonic
from weakref import WeakKeyDictionary

from .. import logs
from ..fabric import Party, Refused
from ..model.rates import TokenBucket
from .limits import DAEMON_DESCRIPTOR_RESERVE, DAEMON_PROBES_PER_SECOND, LIMIT_RECOUNT_SECONDS

log = logging.getLogger(__name__)

#: Listeners to recount at once: some 10 microseconds.
_LISTENERS = 16


def require_unreserved(fd: int) -> None:
    """Raise Refused with ENOBUFS if ``fd``, a new descriptor, is in the reserve."""
    limit, reserve = _sizes()
    if fd >= limit - reserve:
        log.warning("few descriptors are left: refusing new sockets", extra=logs.rare(__name__))
        raise Refused(errno.ENOBUFS, "vsockd has few descriptors left")


def may_keep_descriptor(fd: int) -> bool:
    """Return whether a connection's ``fd`` may stay open for another request.

    The upper half of the reserve is for connections that make one request.
    """
    limit, reserve = _sizes()
    return fd < limit - reserve // 2


def max_silent_descriptors() -> int:
    """Return how many connections in the reserve's upper half may have sent no request yet."""
    return _sizes()[1] // 4


def _sizes() -> tuple[int, int]:
    """Return the process's limit of descriptors, and how many of them are the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return limit, min(DAEMON_DESCRIPTOR_RESERVE, limit // 4)


class LimitChecks:
    """Limits of parties that need the kernel's report of what has been closed or accepted.

    Recounting takes time, and a party at its limit must not make vsockd spend it repeatedly: a
    request recounts a little, and the rest is deferred work, started at a limited rate.
    """

    def __init__(self, release_some: Callable[[Party | None], None]) -> None:
        """Use ``release_some`` to release closed sockets: some at once, others later.

        It releases those of a party, or, with None, of all.
        """
        self._release_some = release_some
        self._counted: WeakKeyDictionary[Party, float] = WeakKeyDictionary()
        self._looks: WeakKeyDictionary[Party, TokenBucket] = WeakKeyDictionary()

    def require_free(self, fd: int) -> None:
        """Raise Refused when few descriptors are left, and release some that are not needed."""
        try:
            require_unreserved(fd)
        except Refused:
            self._release_some(None)
            raise

    def reclaim_sockets(self, party: Party) -> None:
        """Release closed sockets of a party that has reached its limit of sockets."""
        limits = party.limits
        if limits is not None and party.sockets >= limits.sockets and self._may_count(party):
            self._release_some(party)

    def check_pending_limit(self, party: Party, count: Callable[[], None] | None = None) -> None:
        """Raise Denied when a party has reached its limit of pending connections.

        ``count`` recounts the connections pending at the requested listener.
        """
        if party.limits is None:
            return
        most = party.limits.pending_connects
        if party.pending < most:
            return
        if count is not None:
            count()
        for listener in list(islice(party.pending_listeners, _LISTENERS)):
            if party.pending < most:
                return
            # Move it to the end, so that each listener gets its turn.
            party.pending_listeners[listener] = party.pending_listeners.pop(listener)
            listener.recount_pending()
        party.check_pending_limit()

    def may_probe(self, party: Party) -> bool:
        """Return whether ``party`` may cause another probe of a stream now, and count the probe."""
        if party.limits is None:
            return True
        bucket = self._looks.get(party)
        if bucket is None:
            bucket = self._looks[party] = TokenBucket(DAEMON_PROBES_PER_SECOND)
        return bucket.try_take(monotonic())

    def _may_count(self, party: Party) -> bool:
        """Return whether the last full recount for this party is long enough ago.

        Each party has its own time, so that one at its limit does not delay the others.
        """
        now = monotonic()
        if now - self._counted.get(party, -LIMIT_RECOUNT_SECONDS) < LIMIT_RECOUNT_SECONDS:
            return False
        self._counted[party] = now
        return True
